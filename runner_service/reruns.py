"""Notes jobs whose infrastructure failed, and has each of them run once more where a repository wants that.

    the runner's row says ``infra`` ─► noted: a row, a line of the job's story, a count
                                          └► wanted ─► the run is over ─► the forge is asked ─► the new job is seen

Every step is found in the tables again, so that a restart, a late event or a repeated one changes nothing. That the
forge is asked once only is held by the run's attempt: it is asked for the one that failed, and a re-run makes another.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from github_webhook.errors import ForgeError, NotFound, RateLimited
from github_webhook.patterns import fits
from runner_service.domain import Job, Runner, TimelineRow
from runner_service.infrastructure import Ask, Over, next_step, not_worth, sentence
from runner_service.ports import Forge
from runner_service.store import infra_queries as iq
from runner_service.store import queries as q
from runner_service.store.infra_queries import InfraFailure
from runner_service.store.store import Store
from runner_service.telemetry import Metrics

log = structlog.get_logger("reruns")

_TICK = 5.0
_BATCH = 100
# What ended before the service came back is looked at once; later only what is new, and a little of what was.
_FIRST_LOOK = 2 * 86400.0
_OVERLAP = 60.0
_PAUSES = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
# A run may have other jobs that take hours, and GitHub takes minutes to notice a lost runner.
_ASK_LIMIT = 12 * 3600.0
_SEEN_LIMIT = 3600.0


class Reruns:
    """``patterns`` are the repositories whose jobs are run again."""

    def __init__(
        self,
        *,
        store: Store,
        forges: Mapping[str, Forge],
        patterns: Sequence[str],
        metrics: Metrics,
        tick: float = _TICK,
        pauses: Sequence[float] = _PAUSES,
        ask_limit: float = _ASK_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._forges = forges
        self._patterns = patterns
        self._metrics = metrics
        self._tick = tick
        self._pauses = pauses
        self._ask_limit = ask_limit
        self._clock = clock
        self._woken = asyncio.Event()
        self._since = clock() - _FIRST_LOOK

    def reconfigure(self, patterns: Sequence[str]) -> None:
        """Other repositories, for failures that are noted from now on."""
        self._patterns = patterns

    def wake(self) -> None:
        """A runner was lost to its infrastructure: note it now, not at the next tick."""
        self._woken.set()

    async def run(self) -> None:
        """Round after round until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self.round()
            except Exception as error:
                log.exception("round_failed", error=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick):
                    await self._woken.wait()

    async def round(self) -> None:
        """Note what happened, then look after the re-runs that are due."""
        now = self._clock()
        await self._note(now)
        for failure, job in await self._store.read(lambda db: iq.due_reruns(db, now, _BATCH)):
            await self._look_after(failure, job)

    # ── noting ───────────────────────────────────────────────────────────────────────────────────

    async def _note(self, now: float) -> None:
        lost = await self._store.read(lambda db: iq.unnoticed(db, self._since, _BATCH))
        for job, runner in lost:
            failure = await self._store.write(lambda db, j=job, r=runner: self._note_one(db, j, r, now))
            if failure is not None:
                self._metrics.infra_failures.labels(failure.code).inc()
                log.warning("infrastructure_failed", job=job.id, runner=runner.id, code=failure.code)
        if len(lost) < _BATCH:
            self._since = max(self._since, now - _OVERLAP)

    async def _note_one(
        self, db: AsyncConnection, job: Job, runner: Runner, now: float
    ) -> InfraFailure | None:
        code = runner.infra or ""
        against = await self._against(db, job, code)
        configured = fits(f"{job.owner}/{job.repo}", self._patterns)
        wanted = configured and against is None
        failure = InfraFailure(
            job_id=job.id,
            runner_id=runner.id,
            at=now,
            code=code,
            reason=runner.reason or "",
            rerun="wanted" if wanted else "off",
            rerun_why=(against or "") if configured else "not configured for its repository",
            next_at=now + self._pauses[0] if wanted else None,
            deadline=now + self._ask_limit if wanted else None,
        )
        if not await iq.note(db, failure):
            return None
        lines = [_line(job, now, "infrastructure", sentence(code, failure.reason))]
        if wanted:
            lines.append(_line(job, now, "re-run", "it will be run once more", "its run to be over"))
        elif configured:
            lines.append(_line(job, now, "not re-run", failure.rerun_why))
        await q.add_timeline(db, lines)
        return failure

    async def _against(self, db: AsyncConnection, job: Job, code: str) -> str | None:
        """What speaks against running it once more."""
        if (why := not_worth(code)) is not None:
            return why
        if not job.run_id:
            return "its run is not known"
        earlier = await iq.was_rerun(db, job)
        return f"it was run once more already, for {earlier}" if earlier is not None else None

    # ── running once more ────────────────────────────────────────────────────────────────────────

    async def _look_after(self, failure: InfraFailure, job: Job) -> None:
        """One step of one re-run. Whoever writes first goes on with it, should several services share the database."""
        now = self._clock()
        pause = self._pauses[min(failure.tries, len(self._pauses) - 1)]
        mine = await self._change(failure, {"next_at": now + pause, "tries": failure.tries + 1})
        if mine is None:
            return
        step = next_step(job, await self._store.read(lambda db: iq.attempts_of(db, job)))
        if isinstance(step, Over):
            await self._end(mine, job, step.outcome, step.why, step.job)
        elif mine.deadline is not None and now >= mine.deadline:
            if mine.rerun == "asked":
                await self._end(mine, job, "done", "the forge took the order; the new job was not heard of")
            else:
                why = f"given up after {self._ask_limit / 3600:.0f} h: {mine.rerun_why or 'its run did not end'}"
                await self._end(mine, job, "given_up", why)
        elif mine.rerun == "wanted":
            await self._ask(mine, job, step)

    async def _ask(self, failure: InfraFailure, job: Job, step: Ask) -> None:
        forge = self._forges.get(job.forge)
        if forge is None:
            await self._end(failure, job, "given_up", f"no forge '{job.forge}' is configured any more")
            return
        try:
            answer = await forge.rerun(
                job.scope, step.job.forge_job_id,
                owner=job.owner, repo=job.repo, run_id=job.run_id, attempt=step.job.run_attempt,
            )  # fmt: skip
        except NotFound as error:
            await self._end(failure, job, "given_up", str(error))
        except ForgeError as error:
            await self._put_off(failure, job, error)
        else:
            now = self._clock()
            if answer == "asked":
                values = {"rerun": "asked", "rerun_why": "the forge was asked to run it again",
                          "deadline": now + _SEEN_LIMIT, "next_at": now + self._pauses[0]}  # fmt: skip
                line = _line(job, now, "re-run", "its run is over: the forge was asked to run it once more")
                await self._change(failure, values, [line])
                self._metrics.reruns.labels("asked").inc()
            elif answer == "cancelled":
                await self._end(failure, job, "needless", "its run was cancelled")

    async def _put_off(self, failure: InfraFailure, job: Job, error: ForgeError) -> None:
        """The forge did not want to, or could not: told once, tried again."""
        values: dict[str, Any] = {"rerun_why": f"{error.code}: {error}"[:500]}
        if isinstance(error, RateLimited):
            values["next_at"] = max(failure.next_at or 0.0, error.retry_at)
        new = values["rerun_why"] != failure.rerun_why
        lines = [_line(job, self._clock(), "re-run", str(error)[:500], "the forge")] if new else []
        await self._change(failure, values, lines)

    async def _end(
        self, failure: InfraFailure, job: Job, state: iq.RerunState, why: str, again: Job | None = None
    ) -> None:
        now = self._clock()
        step = "re-run" if state == "done" else "not re-run"
        lines = [_line(job, now, step, why)]
        if again is not None and again.id != job.id:
            told = f"this is job {job.id} once more, whose infrastructure failed ({failure.code})"
            lines.append(_line(again, now, "re-run", told))
        values = {
            "rerun": state,
            "rerun_why": why[:500],
            "next_at": None,
            "rerun_job_id": again.id if again is not None else None,
        }
        if await self._change(failure, values, lines) is not None:
            self._metrics.reruns.labels(state).inc()

    async def _change(
        self, failure: InfraFailure, values: Mapping[str, Any], lines: Sequence[TimelineRow] = ()
    ) -> InfraFailure | None:
        async def work(db: AsyncConnection) -> InfraFailure | None:
            changed = await iq.change(db, failure, values)
            if changed is not None:
                await q.add_timeline(db, lines)
            return changed

        return await self._store.write(work)


def _line(job: Job, at: float, step: str, reason: str, waits_for: str | None = None) -> TimelineRow:
    ms = round((at - job.event_at) * 1000, 1)
    return TimelineRow(
        at=at, job_id=job.id, runner_id=None, step=step, reason=reason, waits_for=waits_for, ms=ms
    )
