"""Demand and forward-only jobs as properties: whatever the order, loss and repetition of events."""

from hypothesis import given, settings
from hypothesis import strategies as st

from runner_service import demand
from runner_service.domain import JOB_RANK, Job, JobEvent, Runner, Scope, Template
from runner_service.ingest import Books, apply
from runner_service.labels import choose

TEMPLATE = Template("python-ci", "d" * 64, (), 512, "/opt/actions-runner")
STATES = ("wanted", "forking", "registering", "idle", "busy", "retiring")
GROUPS = ("a", "b")


def runner(number: int, state: str = "idle", group: str = "a", **more: object) -> Runner:
    values: dict[str, object] = {
        "id": f"r{number}", "forge": "github", "scope_kind": "repository", "scope_path": "o/r", "labels": ("microvm",),
        "group_key": group, "template": "python-ci", "memory_mib": 512, "state": state, "state_at": 0.0, "deadline": 1.0,  # noqa: E501
        "created_at": float(number), "event_at": 0.0,
    }  # fmt: skip
    return Runner(**(values | more))  # pyright: ignore


runners = st.lists(
    st.tuples(st.sampled_from(STATES), st.sampled_from(GROUPS), st.booleans(), st.booleans()), max_size=12
).map(
    lambda rows: [
        runner(
            i, state, group, cancelled_at=1.0 if cancelled else None, serving_job_id="j" if serving else None
        )
        for i, (state, group, cancelled, serving) in enumerate(rows)
    ]
)


@given(st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 20)), runners)
def test_after_making_and_giving_up_what_is_asked_demand_is_met_exactly(
    queued: dict[str, int], have: list[Runner]
) -> None:
    for group, difference in demand.balance(queued, have).items():
        if difference > 0:
            have = have + [runner(100 + len(have) + i, "wanted", group) for i in range(difference)]
        else:
            gone = demand.surplus(have, group, -difference, frozenset())
            assert len(gone) == -difference
            have = [r for r in have if r not in gone]
    assert demand.balance(queued, have) == {}
    for group in GROUPS:
        assert sum(r.covers for r in have if r.group_key == group) == queued.get(group, 0)


@given(runners, st.integers(0, 12))
def test_what_is_given_up_is_never_busy_and_never_another_groups(have: list[Runner], count: int) -> None:
    for one in demand.surplus(have, "a", count, frozenset({"j"})):
        assert one.covers and one.group_key == "a"


@given(st.lists(st.integers(0, 9).map(str), unique=True), runners, st.integers(0, 9))
def test_no_job_is_given_two_runners(queued: list[str], have: list[Runner], count: int) -> None:
    made = demand.made_for(queued, have, count)
    assert len(made) == len(set(made)) <= count
    assert not {r.job_id for r in have if r.covers} & set(made)


@given(st.integers(1, 40), st.floats(0, 1e9))
def test_a_brake_grows_to_a_minute_and_minds_the_forge(failures: int, now: float) -> None:
    held: demand.Brake | None = None
    for number in range(failures):
        held = demand.brake(held, now + number + 0.5, now + number + 1, "x")
    assert held is not None and held.failures == failures
    assert now + failures + 1 <= held.until <= now + failures + 60
    assert demand.brake(held, held.since + 1, held.since + 2, "x", retry_at=now + 500).until == now + 500


def test_runners_that_one_cause_takes_at_once_are_one_failure() -> None:
    held = demand.brake(None, 5.0, 10.0, "x")
    for _ in range(11):
        held = demand.brake(held, 5.0, 10.1, "the same")
    assert (held.failures, held.until) == (1, 11.0)
    assert demand.brake(held, 5.0, 10.1, "the same", retry_at=20.0).until == 20.0
    assert demand.brake(held, 11.5, 12.0, "again").until == 14.0


def event(job: int, state: str, runner_name: str | None, at: float) -> JobEvent:
    return JobEvent(
        forge="github", forge_job_id=str(job), owner="o", repo="r", state=state, labels=("microvm",), seen_at=at,  # pyright: ignore
        runner_name=runner_name if state in ("in_progress", "completed") else None,
        conclusion="success" if state == "completed" else None,
    )  # fmt: skip


events = st.lists(
    st.tuples(
        st.integers(1, 4), st.sampled_from(("waiting", "queued", "in_progress", "completed")),
        st.sampled_from(("r1", "r2", "r3", "foreign", None)),
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=300)
@given(events)
def test_jobs_only_move_forward_in_any_order_loss_and_repetition(
    rows: list[tuple[int, str, str | None]],
) -> None:
    books = Books({}, [runner(i) for i in (1, 2, 3)])
    highest: dict[str, int] = {}
    for number, (job, state, name) in enumerate(rows):
        before = {job_id: JOB_RANK[found.state] for job_id, found in books.jobs.items()}
        apply(
            books,
            event(job, state, name, float(number)),
            choose=lambda job: choose(job.labels, [TEMPLATE], default="python-ci"),
            scope_of=lambda e: Scope("repository", f"{e.owner}/{e.repo}"),
            now=float(number),
        )
        key = f"github-{job}"
        highest[key] = max(highest.get(key, -1), JOB_RANK[state])  # pyright: ignore
        for job_id, rank in before.items():
            assert JOB_RANK[books.jobs[job_id].state] >= rank
    # The end depends on the set of events alone, not on their order or number.
    assert {job_id: JOB_RANK[job.state] for job_id, job in books.jobs.items()} == highest


@given(
    st.permutations([(1, "queued"), (1, "in_progress"), (1, "completed"), (2, "queued")]), st.integers(1, 3)
)
def test_any_order_of_the_same_events_ends_in_the_same_books(
    order: list[tuple[int, str]], repeats: int
) -> None:
    books = Books({}, [runner(1, job_id="github-1"), runner(2, job_id="github-2")])
    for number, (job, state) in enumerate(order * repeats):
        apply(
            books,
            event(job, state, "r1", float(number)),
            choose=lambda job: choose(job.labels, [TEMPLATE], default="python-ci"),
            scope_of=lambda e: Scope("repository", "o/r"),
            now=float(number),
        )
    assert (books.jobs["github-1"].state, books.jobs["github-2"].state) == ("completed", "queued")
    assert books.runners["r1"].serving_job_id == "github-1" and books.runners["r1"].job_done_at is not None
    assert books.runners["r2"].covers


def test_waiting_for_an_approval_is_no_demand_until_it_is_queued() -> None:
    books = Books({}, [])

    def work(state: str, at: float) -> Job:
        apply(
            books, event(1, state, None, at),
            choose=lambda job: choose(job.labels, [TEMPLATE], default="python-ci"),
            scope_of=lambda e: Scope("repository", "o/r"), now=at,
        )  # fmt: skip
        return books.jobs["github-1"]

    assert work("waiting", 1.0).group_key is None
    queued = work("queued", 50.0)
    assert queued.group_key is not None and queued.event_at == 50.0


def test_a_job_of_others_is_not_kept() -> None:
    books = Books({}, [])
    foreign = JobEvent(forge="github", forge_job_id="1", owner="o", repo="r", state="queued",
                       labels=("ubuntu-latest",), seen_at=0.0)  # fmt: skip
    outcome = apply(
        books, foreign, choose=lambda job: choose(job.labels, [TEMPLATE], default="python-ci"),
        scope_of=lambda e: Scope("repository", "o/r"), now=0.0,
    )  # fmt: skip
    assert outcome == "foreign" and not books.jobs


def test_times_are_the_forges_own_where_it_tells_them() -> None:
    import msgspec

    books = Books({}, [])
    told = {"in_progress": {"started_at": 40.0}, "completed": {"started_at": 40.0, "completed_at": 50.0}}
    for state, at in (("queued", 10.0), ("in_progress", 45.0), ("completed", 55.0)):
        # A queued job's started_at is the moment it was queued.
        more = told.get(state, {"started_at": 9.0})
        one = msgspec.structs.replace(event(1, state, "r1", at), **more)
        apply(
            books, one, choose=lambda job: choose(job.labels, [TEMPLATE], default="python-ci"),
            scope_of=lambda e: Scope("repository", "o/r"), now=at,
        )  # fmt: skip
        if state == "queued":
            assert books.jobs["github-1"].started_at is None
    assert books.jobs["github-1"].started_at == 40.0 and books.jobs["github-1"].completed_at == 50.0
