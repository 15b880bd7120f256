"""Jobs in progress in our books though their runner is gone: their last event got lost, so the forge is asked."""

from collections.abc import Callable, Mapping

import structlog

from github_webhook.errors import ForgeError
from runner_service.domain import Job, JobEvent
from runner_service.ports import Forge
from runner_service.store import queries as q
from runner_service.store.store import Store

log = structlog.get_logger("stranded")

_AT_ONCE = 20
_FIRST_PAUSE = 10.0
_LONGEST_PAUSE = 600.0


class Stranded:
    """Asks about each such job again and again, less and less often, until the forge says how it ended."""

    def __init__(
        self, store: Store, forges: Mapping[str, Forge], observe: Callable[[JobEvent], None]
    ) -> None:
        self._store = store
        self._forges = forges
        self._observe = observe
        self._next: dict[str, tuple[float, float]] = {}

    async def ask(self, now: float) -> None:
        """One round: at most twenty questions, each for a job whose pause is over."""
        jobs = await self._store.read(lambda db: q.stranded_jobs(db, 500))
        known = {job.id for job in jobs}
        self._next = {job_id: entry for job_id, entry in self._next.items() if job_id in known}
        due = [job for job in jobs if self._next.get(job.id, (0.0, 0.0))[0] <= now][:_AT_ONCE]
        for job in due:
            pause = min(_LONGEST_PAUSE, 2 * self._next.get(job.id, (0.0, _FIRST_PAUSE / 2))[1])
            self._next[job.id] = (now + pause, pause)
            await self._ask(job)

    async def _ask(self, job: Job) -> None:
        forge = self._forges.get(job.forge)
        if forge is None:
            return
        try:
            event = await forge.job(job.scope, job.forge_job_id, owner=job.owner, repo=job.repo)
        except ForgeError as error:
            log.info("forge_failed", job=job.id, code=error.code)
            return
        if event is not None and event.state == "completed":
            self._observe(event)
