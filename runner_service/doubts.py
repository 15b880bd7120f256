"""Jobs whose state in our books may be wrong, because an event got lost: the forge is asked about each of them singly.

    not listed as queued any more · its runner is gone · on no runner of ours ─► asked after 10, 20, 40 … 600 s
        ─► the answer is worked like an event · eight times "no such job" (half an hour): given up

One look that does not list a job proves nothing (the forge's lists lag behind its events): asking does.
"""

from collections.abc import Collection, Iterable

import msgspec

from runner_service.domain import Job, JobEvent, JobState, concluded

AT_ONCE = 20
FIRST_PAUSE = 10.0
LONGEST_PAUSE = 600.0
GIVE_UP_AFTER = 8
LAG_SECONDS = 5.0
UNSEEN_SECONDS = 300.0


class Unfinished(msgspec.Struct, frozen=True):
    """A job that our books have as queued or waiting since ``event_at``."""

    id: str
    state: JobState
    event_at: float


def doubtful(books: Iterable[Unfinished], listed: Collection[str] | None, began: float) -> set[str]:
    """Which of a repository's jobs a look that ``began`` then makes doubtful.

    ``listed`` are the jobs it found; None: it failed or was not complete, and only old jobs are to be asked about.
    """
    if listed is None:
        return {job.id for job in books if job.event_at < began - UNSEEN_SECONDS}
    return {job.id for job in books if job.event_at < began - LAG_SECONDS and job.id not in listed}


class _Doubt(msgspec.Struct):
    next_at: float = 0.0
    pause: float = FIRST_PAUSE / 2
    unknown: int = 0


class Doubts:
    """When to ask about which job: less and less often, at most ``AT_ONCE`` a round."""

    def __init__(self) -> None:
        self._doubts: dict[str, _Doubt] = {}

    def hold(self, job_ids: Collection[str]) -> None:
        """These are in doubt now, and no others."""
        self._doubts = {job_id: self._doubts.get(job_id) or _Doubt() for job_id in job_ids}

    def due(self, now: float) -> list[str]:
        """Those to ask about now, the longest due first."""
        found = sorted(
            (doubt.next_at, job_id) for job_id, doubt in self._doubts.items() if doubt.next_at <= now
        )
        return [job_id for _, job_id in found[:AT_ONCE]]

    def asked(self, job_id: str, now: float) -> None:
        """The question goes out: the next one comes after a pause, whatever the answer."""
        doubt = self._doubts.get(job_id)
        if doubt is not None:
            doubt.pause = min(LONGEST_PAUSE, doubt.pause * 2)
            doubt.next_at = now + doubt.pause

    def answered(self, job_id: str, *, known: bool) -> bool:
        """The forge knows the job, or does not; True: it said so often enough to believe it."""
        doubt = self._doubts.get(job_id)
        if doubt is None:
            return False
        doubt.unknown = 0 if known else doubt.unknown + 1
        return doubt.unknown >= GIVE_UP_AFTER


def given_up(job: Job, now: float) -> JobEvent:
    """What is worked into the books for a job that the forge has known nothing of for half an hour."""
    return concluded(job, "stale", "the forge knows no such job any more", now)
