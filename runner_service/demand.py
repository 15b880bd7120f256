"""How many more, or fewer, runners of what. Pure: counts decide, never +1 or -1 per event."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from runner_service.domain import Runner, RunnerState

# Which runner is given up first when there are too many: the one that has cost least so far.
_GIVE_UP_ORDER: dict[RunnerState, int] = {"wanted": 0, "forking": 1, "registering": 2, "idle": 3}


FRUITLESS = 4
"""So many runners in a row may end without a job before those for the same job are made more slowly."""


class Brake(msgspec.Struct, frozen=True):
    """No new runner of a group before ``until`` (Unix seconds), because of ``reason``. ``since`` is when it was set."""

    until: float
    reason: str
    failures: int
    since: float = 0.0


def balance(queued: Mapping[str, int], runners: Iterable[Runner]) -> dict[str, int]:
    """Per group: queued jobs minus runners starting or idle. Positive: make; negative: too many."""
    difference = dict(queued)
    for runner in runners:
        if runner.covers:
            difference[runner.group_key] = difference.get(runner.group_key, 0) - 1
    return {group: count for group, count in difference.items() if count}


def spread(count: int, differences: Mapping[str, int]) -> dict[str, int]:
    """Share the ``count`` runners a group needs out to its repositories, by what each is short of.

    A repository's runner that is too many serves another's job of the same group: the largest lack gives way to it.
    """
    lacks = {name: lack for name, lack in differences.items() if lack > 0}
    for _ in range(sum(lacks.values()) - count):
        largest = max(lacks, key=lambda name: (lacks[name], name))
        lacks[largest] -= 1
    return {name: lack for name, lack in lacks.items() if lack > 0}


def surplus(runners: Iterable[Runner], group: str, count: int, queued_jobs: frozenset[str]) -> list[Runner]:
    """The ``count`` runners of ``group`` to give up: made for no queued job first, least advanced first."""
    mine = [r for r in runners if r.covers and r.group_key == group and r.state in _GIVE_UP_ORDER]
    mine.sort(key=lambda r: (r.job_id in queued_jobs, _GIVE_UP_ORDER[r.state], -r.created_at, r.id))
    return mine[:count]


def made_for(
    queued: Sequence[str], runners: Iterable[Runner], count: int, *, passed: Collection[str] = ()
) -> list[str]:
    """Which of the ``queued`` job ids (oldest first) the next ``count`` runners are made for; none of ``passed``."""
    taken = {r.job_id for r in runners if r.covers}
    free = [job for job in queued if job not in taken and job not in passed]
    return free[:count]


def brake(
    before: Brake | None, begun: float, now: float, reason: str, *, retry_at: float | None = None
) -> Brake:
    """How long to hold back after failures in a row: 1, 2, 4 … 60 s, or until ``retry_at``.

    ``begun``: since when the runner was at what it failed at. Those that were at it when ``before`` was set failed of
    the same cause: a dozen runners that one outage takes at once are one failure, not twelve in a row.
    """
    if before is not None and begun <= before.since:
        return msgspec.structs.replace(before, until=max(before.until, retry_at or 0.0))
    failures = before.failures + 1 if before is not None else 1
    until = now + min(60.0, 2.0 ** (min(failures, 7) - 1))
    return Brake(max(until, retry_at or 0.0), reason, failures, now)


def fruitless_until(runners: int, last: float) -> float:
    """Until when no runner is made for a job after ``runners`` of its own ended without any job, the last at ``last``.

    Such a job is often over without our knowing: it must not get one runner after the other for ever. Four are made
    as soon as they are needed, then one after 10, 20, 40 … 600 s: at most 14 an hour, however fast they end. Jobs
    beside it in its group are not held up.
    """
    if runners < FRUITLESS:
        return last
    return last + min(600.0, 10.0 * 2.0 ** min(runners - FRUITLESS, 10))
