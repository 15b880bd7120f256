"""Where a job's time goes, from its timeline alone: each moment of its life belongs to one phase. Pure: no I/O.

    event ─► deciding ─► forking ─► registering ─► starting ─► forge ─► running ─► cleanup
               │  ▲          │            │            │         │
               ▼  │          └────────────┴────────────┴─────────┴──► deciding (its runner is given up or taken)
             waiting

event        created at the forge, not seen here yet (a late delivery, or a poll found it)
deciding     seen; no runner is made for it yet
waiting      held back by something that has a name: the code of the wait
forking      a place is promised, the VM is being forked; the registration is asked for at the same time
registering  the VM is there, its registration at the forge is not
starting     both are there; the runner process comes online
forge        its runner is online and idle; the forge has not given it the job
running      the job runs
cleanup      it is over; the VM and the registration are given back
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from runner_service.domain import TimelineRow

PhaseName = Literal[
    "event", "deciding", "waiting", "forking", "registering", "starting", "forge", "running", "cleanup"
]

_CODES = {"an approval at the forge": "approval", "a template for its labels": "no_template"}
_WORD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_ENTERED: dict[str, PhaseName] = {
    "placed": "forking", "forking": "forking", "started": "starting", "registering": "starting", "idle": "forge",
    "busy": "running",
}  # fmt: skip
_BEFORE_RUNNER: frozenset[PhaseName] = frozenset({"event", "deciding", "waiting"})


class Where(msgspec.Struct, frozen=True):
    """The phase a job is in. ``reason`` is the code of a wait, ``runner`` whose rows count, ``half`` what of fork and
    registration is there already."""

    phase: PhaseName = "event"
    reason: str | None = None
    runner: str | None = None
    half: frozenset[str] = frozenset()


class Span(msgspec.Struct, frozen=True):
    """A stretch of a job's life in one phase. ``at`` in Unix seconds; ``reason`` is the code of a wait."""

    phase: PhaseName
    at: float
    seconds: float
    reason: str | None = None


def code_of(row: TimelineRow) -> str:
    """The stable word for what a row waits for: a code as it stands, else a known phrase's; ``other`` for the rest."""
    waits_for = row.waits_for or row.reason.partition(":")[0]
    if waits_for in _CODES:
        return _CODES[waits_for]
    return waits_for if _WORD.fullmatch(waits_for) else "other"


def after(where: Where, row: TimelineRow) -> Where:
    """Where the job is once ``row`` was written; rows that tell of no progress change nothing."""
    if where.phase == "cleanup":
        return where
    if row.step in ("completed", "aged out"):
        return Where("cleanup", runner=where.runner)
    if row.step == "in progress":
        return Where("running", runner=row.runner_id or where.runner)
    if where.phase == "running":
        ends = row.step == "retiring" and where.runner in (None, row.runner_id)
        return Where("cleanup", runner=where.runner) if ends else where
    if row.runner_id is None:
        return _told_of_job(where, row)
    if row.step == "runner taken":
        return Where("waiting", "runner_taken")
    if row.step == "wanted":
        return Where("deciding", runner=row.runner_id)
    if where.runner not in (None, row.runner_id):
        return where
    return _told_of_runner(where, row, row.runner_id)


def _told_of_job(where: Where, row: TimelineRow) -> Where:
    if where.phase not in _BEFORE_RUNNER:
        return where
    if row.step == "queued":
        return Where("deciding")
    held = row.step in ("waiting", "not served")
    return Where("waiting", code_of(row), where.runner) if held else where


def _told_of_runner(where: Where, row: TimelineRow, runner: str) -> Where:
    if row.step == "waiting":
        before = where.phase in _BEFORE_RUNNER
        return Where("waiting", code_of(row), runner) if before else where
    if row.step in ("forked", "registered"):
        return _half_done(where, row.step, runner)
    if row.step in _ENTERED:
        return Where(_ENTERED[row.step], runner=runner)
    if row.step in ("retiring", "gone") and where.runner == runner:
        return Where("deciding")
    return where


def _half_done(where: Where, step: str, runner: str) -> Where:
    if where.phase not in ("forking", "registering"):
        return where
    half = where.half | {step}
    if len(half) == 2:
        return Where("starting", runner=runner)
    return Where("registering" if step == "forked" else "forking", None, runner, half)


def spans(
    rows: Sequence[TimelineRow], *, created_at: float | None = None, until: float | None = None
) -> list[Span]:
    """The phases one after the other, without gaps: from the event (or ``created_at``) to ``until`` (or the last row).

    Times that go backwards, as clocks do, count as no time.
    """
    ordered = sorted(rows, key=lambda row: row.at)
    if not ordered:
        return []
    begin = min(created_at, ordered[0].at) if created_at is not None else ordered[0].at
    where, since = Where(), begin
    found: list[Span] = []
    for row in ordered:
        then = after(where, row)
        if (then.phase, then.reason) != (where.phase, where.reason):
            _add(found, where, since, row.at)
            since = row.at
        where = then
    _add(found, where, since, max(ordered[-1].at, until or 0.0))
    return found


def _add(found: list[Span], where: Where, since: float, until: float) -> None:
    if until > since:
        found.append(Span(where.phase, since, until - since, where.reason))


class Ended(msgspec.Struct, frozen=True):
    """A phase that a job has left, and for how many seconds it was in it."""

    phase: PhaseName
    reason: str | None
    seconds: float


class Watch:
    """Follows many jobs through their phases while their rows are written; after a restart it begins anew.

    At most ``most`` at once: beyond them the one that was quiet longest is no longer followed.
    """

    def __init__(self, most: int = 20_000) -> None:
        self._most = most
        self._where: dict[str, tuple[Where, float]] = {}

    def told(self, rows: Iterable[TimelineRow]) -> list[Ended]:
        """The phases that ended with these rows."""
        left: list[Ended] = []
        for row in rows:
            if row.job_id is not None:
                left.extend(self._one(row, row.job_id))
        return left

    def _one(self, row: TimelineRow, job_id: str) -> Iterable[Ended]:
        known = self._where.pop(job_id, None)
        where, since = known or (Where(), row.at)
        then = after(where, row)
        changed = (then.phase, then.reason) != (where.phase, where.reason)
        over = then.phase == "cleanup" and (row.step == "gone" or then.runner is None or known is None)
        over = over or then.phase == "event"
        if not over:
            self._where[job_id] = (then, row.at if changed else since)
            if len(self._where) > self._most:
                del self._where[next(iter(self._where))]
        # What it was in before we began to watch is not known; nor how long.
        if known is not None and (changed or over) and where.phase != "event":
            yield Ended(where.phase, where.reason, max(0.0, row.at - since))
