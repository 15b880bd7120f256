"""When is looked at what: as properties, because a forge's rate limit must never be used up by looking."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from runner_service.domain import JobEvent
from runner_service.doubts import AT_ONCE, Doubts, Unfinished, doubtful
from runner_service.poll_plan import CALLS_A_SECOND, SHARE, Allowance, Seen, choose, pace
from runner_service.polling import news

NOW = 1_000_000.0


def seen(number: int, *, recent: bool = True, **more: float) -> Seen:
    used = NOW - 60.0 if recent else 0.0
    return Seen(owner="o", repo=f"r{number}", used_at=used, **more)  # type: ignore[arg-type]


class Forge:
    """A forge that answers a look with what it costs, an hour at a time."""

    def __init__(self, limit: int, paid: int) -> None:
        self.limit = limit
        self.remaining = limit
        self.reset_at = NOW + 3600.0
        self.paid = paid
        self.calls: list[float] = []

    def allowance(self) -> Allowance:
        return Allowance(self.limit, self.remaining, self.reset_at)

    def look(self, repository: Seen, now: float) -> None:
        first = not repository.looked_at
        paid = 3 if first else self.paid
        self.remaining -= paid
        self.calls += [now] * 3
        repository.looked_at = now
        repository.count(3, paid, first=first)


@settings(max_examples=30, deadline=None)
@given(
    recent=st.integers(0, 60),
    others=st.integers(0, 200),
    limit=st.integers(60, 5000),
    paid=st.integers(0, 3),
    every=st.sampled_from((15.0, 60.0)),
)
def test_half_of_the_rate_limit_is_never_spent_on_looking(
    recent: int, others: int, limit: int, paid: int, every: float
) -> None:
    forge = Forge(limit, paid)
    repositories = [seen(i) for i in range(recent)] + [seen(i + 1000, recent=False) for i in range(others)]
    now, since = NOW, 0.0
    while now < NOW + 3600.0:
        _, looks = choose(repositories, forge.allowance(), every, since, now)
        for one in looks:
            forge.look(one, now)
        since = now if looks else since
        now += 10.0
    # One round's estimate may be wrong by what a look costs more than the last ones.
    assert forge.remaining >= SHARE * limit - 3 * (recent + others)
    assert forge.remaining >= 0
    for start in range(0, len(forge.calls), 50):
        within = [call for call in forge.calls[start:] if call < forge.calls[start] + 60.0]
        assert len(within) <= 60.0 * CALLS_A_SECOND + 3 * (recent + 60)


@given(st.integers(1, 20))
def test_unchanged_repositories_are_looked_at_every_interval(count: int) -> None:
    forge = Forge(5000, 0)
    repositories = [seen(i) for i in range(count)]
    now, longest = NOW, 0.0
    since = 0.0
    while now < NOW + 600.0:
        before = {one.repo: one.looked_at for one in repositories if one.looked_at}
        _, looks = choose(repositories, forge.allowance(), 60.0, since, now)
        for one in looks:
            longest = max(longest, now - before.get(one.repo, NOW))
            forge.look(one, now)
        since = now if looks else since
        now += 10.0
    assert longest <= 70.0, "an event that got lost is found within 90 s"


def test_when_the_limit_is_used_up_nothing_is_looked_at_until_it_begins_anew() -> None:
    repositories = [seen(1), seen(2, recent=False)]
    used_up = Allowance(5000, 2400, NOW + 900.0)
    found, looks = choose(repositories, used_up, 60.0, 0.0, NOW)
    assert looks == [] and found.interval == 900.0 and "2400 of 5000" in found.reason


def test_the_interval_stretches_as_far_as_the_limit_demands() -> None:
    busy = [seen(i, looked_at=NOW, paid=3.0) for i in range(100)]
    # 300 paid calls a round of 2500 in an hour: every 432 s.
    found = pace(busy, Allowance(5000, 5000, NOW + 3600.0), 60.0, NOW)
    assert 431.0 < found.interval < 433.0 and "100 repositories" in found.reason
    assert pace(busy, None, 60.0, NOW).interval == 60.0
    many = [seen(i) for i in range(1000)]
    assert pace(many, None, 60.0, NOW).interval == 600.0


def test_recent_repositories_come_first_and_the_others_in_turn() -> None:
    repositories = [
        seen(1, recent=False, looked_at=NOW - 100.0),
        seen(2, recent=False, looked_at=NOW - 300.0),
        seen(3, recent=False, looked_at=NOW - 10.0),
        seen(4, looked_at=NOW - 61.0),
        seen(5, looked_at=NOW - 30.0),
        seen(6, looked_at=NOW - 61.0, retry_at=NOW + 5.0),
    ]
    _, looks = choose(repositories, None, 60.0, NOW - 30.0, NOW)
    assert [one.repo for one in looks] == ["r4", "r2", "r1"]


# ── doubts ───────────────────────────────────────────────────────────────────────────────────────


def test_a_look_makes_doubtful_what_it_does_not_list_and_is_old_enough() -> None:
    books = [Unfinished("old", "queued", NOW - 60.0), Unfinished("new", "queued", NOW - 1.0)]
    assert doubtful(books, {"other"}, NOW) == {"old"}
    assert doubtful(books, {"old"}, NOW) == set()
    # A look that failed says nothing of jobs a minute old.
    assert doubtful(books, None, NOW) == set()
    assert doubtful([Unfinished("old", "waiting", NOW - 400.0)], None, NOW) == {"old"}


def test_questions_come_less_and_less_often_and_never_too_many_at_once() -> None:
    doubts = Doubts()
    doubts.hold({f"j{i}" for i in range(50)})
    due = doubts.due(NOW)
    assert len(due) == AT_ONCE
    times: list[float] = []
    now = NOW
    one = due[0]
    while now < NOW + 3600.0:
        doubts.hold({one})
        if one in doubts.due(now):
            times.append(now)
            doubts.asked(one, now)
        now += 1.0
    pauses = [round(b - a) for a, b in itertools.pairwise(times)]
    assert pauses[:7] == [10, 20, 40, 80, 160, 320, 600] and set(pauses[7:]) <= {600}


def test_only_a_forge_that_keeps_saying_no_is_believed() -> None:
    doubts = Doubts()
    doubts.hold({"j"})
    assert [doubts.answered("j", known=False) for _ in range(7)] == [False] * 7
    assert not doubts.answered("j", known=True)
    assert [doubts.answered("j", known=False) for _ in range(8)] == [False] * 7 + [True]
    assert not doubts.answered("nobody's", known=False)


def test_news_is_what_the_books_do_not_have() -> None:
    def job(number: str, state: str, label: str = "microvm") -> JobEvent:
        return JobEvent(
            forge="github",
            forge_job_id=number,
            owner="o",
            repo="r",
            state=state,
            labels=(label,),
            seen_at=NOW,
        )  # type: ignore[arg-type]

    books = [Unfinished("github-1", "queued", NOW), Unfinished("github-2", "waiting", NOW)]
    listed = (
        job("1", "queued"),
        job("2", "queued"),
        job("3", "waiting"),
        job("4", "queued", "ubuntu-latest"),
    )
    assert [one.forge_job_id for one in news(listed, books)] == ["2", "3"]
    assert news((job("1", "waiting"),), books) == []
