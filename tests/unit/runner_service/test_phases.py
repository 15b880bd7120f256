"""Where a job's time went: phases without gaps, whatever the timeline holds, and the usual stories told right."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_service.domain import TimelineRow
from runner_service.phases import Ended, Watch, code_of, spans

STEPS = (
    "queued", "waiting", "not served", "wanted", "placed", "forking", "forked", "registered", "register again",
    "started", "registering", "idle", "busy", "in progress", "runner taken", "given up", "retiring", "destroyed",
    "gone", "completed", "aged out", "adopted", "something new",
)  # fmt: skip
WAITS = (
    None,
    "capacity",
    "rate_limited",
    "a template for its labels",
    "an approval at the forge",
    "0.25 s after x",
)

rows = st.lists(
    st.builds(
        TimelineRow,
        at=st.floats(0, 1e9, allow_nan=False),
        job_id=st.just("j"),
        runner_id=st.sampled_from((None, "r1", "r2")),
        step=st.sampled_from(STEPS),
        reason=st.sampled_from(("", "capacity: full")),
        waits_for=st.sampled_from(WAITS),
    ),
    max_size=30,
)


@given(rows, st.none() | st.floats(0, 2e9), st.none() | st.floats(0, 2e9))
def test_spans_are_ordered_follow_each_other_and_sum_to_the_whole(
    story: list[TimelineRow], created_at: float | None, until: float | None
) -> None:
    found = spans(story, created_at=created_at, until=until)
    assert all(span.seconds > 0 for span in found)
    for one, other in itertools.pairwise(found):
        assert one.at + one.seconds == pytest.approx(other.at, abs=1e-3)
        assert (one.phase, one.reason) != (other.phase, other.reason)
    if story:
        first, last = min(row.at for row in story), max(row.at for row in story)
        begin = first if created_at is None else min(first, created_at)
        assert sum(span.seconds for span in found) == pytest.approx(max(last, until or 0) - begin, abs=1e-3)
    else:
        assert found == []


@given(rows)
def test_following_a_story_row_by_row_never_tells_more_than_there_was(story: list[TimelineRow]) -> None:
    story = sorted(story, key=lambda row: row.at)
    ended = [one for row in story for one in Watch().told([row])] + Watch().told(story)
    assert all(one.seconds >= 0 for one in ended)
    whole = story[-1].at - story[0].at if story else 0
    assert sum(one.seconds for one in ended) <= whole + 1e-3


def test_followed_to_its_end_a_story_is_told_whole_and_then_forgotten() -> None:
    watch = Watch()
    told = [(one.phase, one.reason, one.seconds) for row in USUAL for one in watch.told([row])]
    assert told == shown(USUAL) and watch._where == {}
    assert watch.told([row(99, "gone", "r1")]) == [] and watch._where == {}


def test_no_more_jobs_are_followed_than_asked_for() -> None:
    watch = Watch(10)
    for number in range(1000):
        watch.told([row(0, "queued", job=f"j{number}")])
    assert len(watch._where) == 10
    assert watch.told([row(5, "wanted", "r1", job="j999"), row(7, "placed", "r1", job="j999")]) == [
        Ended("deciding", None, 7.0)
    ]


def row(
    at: float, step: str, runner: str | None = None, waits: str | None = None, job: str = "j"
) -> TimelineRow:
    return TimelineRow(at=at, job_id=job, runner_id=runner, step=step, waits_for=waits)


def shown(story: list[TimelineRow], **more: float) -> list[tuple[str, str | None, float]]:
    return [(span.phase, span.reason, span.seconds) for span in spans(story, **more)]


USUAL = [
    row(10, "queued"), row(11, "wanted", "r1"), row(11, "waiting", "r1", "capacity"), row(15, "placed", "r1"),
    row(15, "forking", "r1"), row(16, "forked", "r1"), row(18, "registered", "r1"), row(18, "started", "r1"),
    row(18, "registering", "r1"), row(20, "idle", "r1"), row(21, "waiting", "r1", "a job from the forge"),
    row(23, "in progress", "r1"), row(24, "busy", "r1"), row(30, "completed", "r1"), row(31, "retiring", "r1"),
    row(32, "destroyed", "r1"), row(33, "gone", "r1"),
]  # fmt: skip


def test_the_usual_story() -> None:
    assert shown(USUAL, created_at=8) == [
        ("event", None, 2), ("deciding", None, 1), ("waiting", "capacity", 4), ("forking", None, 1),
        ("registering", None, 2), ("starting", None, 2), ("forge", None, 3), ("running", None, 7), ("cleanup", None, 3),
    ]  # fmt: skip


def test_a_registration_that_is_there_first_leaves_the_fork_to_wait_for() -> None:
    story = [
        row(0, "forking", "r1"),
        row(1, "registered", "r1"),
        row(3, "forked", "r1"),
        row(4, "idle", "r1"),
    ]
    assert shown(story) == [("forking", None, 3), ("starting", None, 1)]


def test_a_runner_that_fails_is_followed_by_a_wait_and_another() -> None:
    story = [
        row(0, "queued"), row(1, "wanted", "r1"), row(1, "forking", "r1"), row(2, "retiring", "r1"),
        row(2, "waiting", None, "rate_limited"), row(8, "wanted", "r2"), row(8, "forking", "r2"),
        row(9, "destroyed", "r1"), row(9, "gone", "r1"), row(10, "registering", "r2"), row(11, "idle", "r2"),
    ]  # fmt: skip
    assert shown(story, until=15) == [
        ("deciding", None, 1), ("forking", None, 1), ("waiting", "rate_limited", 6), ("forking", None, 2),
        ("starting", None, 1), ("forge", None, 4),
    ]  # fmt: skip


def test_a_taken_runner_is_a_wait_for_the_next() -> None:
    story = [
        row(0, "queued"), row(0, "wanted", "r1"), row(0, "forking", "r1"), row(1, "idle", "r1"),
        row(2, "runner taken", "r1", "runner r2"), row(4, "busy", "r2"), row(5, "retiring", "r2"),
    ]  # fmt: skip
    assert shown(story) == [
        ("forking", None, 1), ("forge", None, 1), ("waiting", "runner_taken", 2), ("running", None, 1),
    ]  # fmt: skip


def test_rows_that_come_after_their_time_turn_nothing_back() -> None:
    story = [
        row(0, "in progress", "r1"),
        row(1, "idle", "r1"),
        row(2, "completed", "r1"),
        row(3, "busy", "r1"),
    ]
    assert shown(story) == [("running", None, 2), ("cleanup", None, 1)]


@pytest.mark.parametrize(
    ("waits_for", "reason", "code"),
    [
        ("capacity", "capacity: 4 of 4", "capacity"), ("a template for its labels", "", "no_template"),
        (None, "limit: 3 of 3 VMs of o/r", "limit"), ("0.25 s after x", "", "other"), ("x" * 41, "", "other"),
        (None, "", "other"), ("Some/repository", "", "other"),
    ],
)  # fmt: skip
def test_codes_are_words(waits_for: str | None, reason: str, code: str) -> None:
    assert (
        code_of(
            TimelineRow(at=0, job_id="j", runner_id=None, step="waiting", reason=reason, waits_for=waits_for)
        )
        == code
    )


def test_one_wait_after_another_are_two() -> None:
    story = [row(0, "queued"), row(0, "waiting", None, "capacity"), row(2, "waiting", None, "limit")]
    assert shown(story, until=5) == [("waiting", "capacity", 2), ("waiting", "limit", 3)]
