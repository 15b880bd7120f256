"""The bakes of this host: each a subprocess at low priority, so many at once, until it is done or has failed for good.

    queued ─► baking ─► done                the parent has its name; what is beyond the budget goes
       ▲         ├────► queued, later       it failed: exponential back-off with jitter, so many attempts
       │         ├────► failed              after the last one: step, output and advice are kept; the old parent stays
       └─────────┘                          the service stops: ended and queued again, the attempt does not count

A row left in ``baking`` by a killed service is queued again at the start, once nothing of that bake runs any more.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from github_webhook.errors import ForgeError
from runner_service.bake_process import Baked, BakeProcess, Failed, credential_bytes, end_survivor
from runner_service.domain import Bake, Repository
from runner_service.joblog import JobLogs
from runner_service.ports import Catalog
from runner_service.repositories import OriginOf
from runner_service.settings import Bakes as BakeSettings
from runner_service.store import bake_queries as bq
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.errors import VmmError
from vmm_core.machine import Output

log = structlog.get_logger("bakes")

_TICK = 10.0
_DAY = 86400.0
_MOST_PAUSE = 3600.0
_PREWARM_SECONDS = 60.0
_JITTER = 0.25


class Bakes:
    """``command`` starts a bake of ``microvm``; what is baked, and where, is added. ``server`` is the forge as jobs see
    it, when that is not where it is cloned from. ``prewarm`` makes ready what was baked, for its first job. While
    ``held`` says so, none is started."""

    def __init__(
        self,
        *,
        store: Store,
        host: str,
        settings: BakeSettings,
        command: Sequence[str],
        environ: Mapping[str, str],
        data_dir: Path,
        origin: OriginOf,
        server: str,
        prewarm: Callable[[str], Awaitable[None]],
        catalog: Catalog,
        metrics: Metrics,
        keep_seconds: float,
        held: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._held = held
        self._store = store
        self._host = host
        self._settings = settings
        self._command = command
        self._environ = environ
        self._data_dir = data_dir
        self._origin = origin
        self._server = server
        self._prewarm = prewarm
        self._catalog = catalog
        self._metrics = metrics
        self._keep_seconds = keep_seconds
        self._clock = clock
        self.logs = bake_logs(data_dir, settings)
        self._woken = asyncio.Event()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._pruned = 0.0

    def reconfigure(self, settings: BakeSettings) -> None:
        """Other numbers for every bake that is started from now on."""
        self._settings = settings
        self.wake()

    def wake(self) -> None:
        """Something was queued."""
        self._woken.set()

    async def start(self) -> None:
        """Queue again what a killed service left, and end what of it still runs."""
        for bake in await self._store.read(lambda db: bq.baking(db, self._host)):
            survived = bake.pid is not None and await end_survivor(bake.pid, bake.start_ticks or 0)
            log.info("bake_requeued", bake=bake.id, name=bake.name, survived=survived)
            await self._requeue(bake)

    async def run(self) -> None:
        """Bake what is due until cancelled; then what runs is ended and queued again."""
        try:
            while True:
                self._woken.clear()
                try:
                    await self._pass()
                except Exception as error:
                    log.exception("bakes_failed", error=str(error))
                await self._rest()
        finally:
            running = list(self._running.values())
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self.logs.end()

    async def _pass(self) -> None:
        now = self._clock()
        free = 0 if self._held() else self._settings.at_once - len(self._running)
        due = await self._store.write(lambda db: self._due(db, now, max(0, free)))
        for bake in due:
            task = asyncio.create_task(self._bake(bake), name=f"bake-{bake.id}")
            self._running[bake.id] = task
            task.add_done_callback(lambda _, number=bake.id: self._ended(number))
        if now - self._pruned >= _DAY:
            self._pruned = now
            await self._prune()
            await asyncio.to_thread(self.logs.prune, now - self._keep_seconds)

    async def _due(self, db: AsyncConnection, now: float, limit: int) -> list[Bake]:
        await bq.supersede(db, self._host, now)
        return await bq.due_bakes(db, self._host, now, limit)

    async def _rest(self) -> None:
        due = await self._store.read(lambda db: bq.next_due(db, self._host))
        pause = _TICK
        if due is not None and not self._held() and len(self._running) < self._settings.at_once:
            pause = min(_TICK, max(0.05, due - self._clock()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._woken.wait()

    def _ended(self, number: int) -> None:
        self._running.pop(number, None)
        self.wake()

    async def _prune(self) -> None:
        budget = self._settings.budget_mib << 20
        await self._catalog.prune(budget_bytes=budget or None, keep=self._settings.keep)

    # ── one bake ─────────────────────────────────────────────────────────────────────────────────

    async def _bake(self, bake: Bake) -> None:
        started = self._clock()
        begun = await self._step(
            bake, was="queued", state="baking", started_at=started, attempts=bake.attempts + 1, ended_at=None
        )
        if begun is None:
            return  # superseded in the meantime
        joblog = self.logs.open(str(bake.id))
        try:
            outcome = await self._run(begun)
        except asyncio.CancelledError:
            await self._requeue(begun)
            raise
        except Exception as error:
            log.exception("bake_broke", bake=bake.id)
            outcome = Failed("internal_error", f"internal error: {type(error).__name__}: {error}"[:500])
        said = outcome.name if isinstance(outcome, Baked) else f"{outcome.code}: {outcome.message}"
        joblog.append(Output("stderr", joblog.offsets["stderr"], f"── {said}\n".encode()))
        self.logs.close(str(bake.id))
        await self._settle(begun, outcome, self._clock() - started)

    async def _run(self, bake: Bake) -> Baked | Failed:
        """The subprocess, from its start to its answer. Its credential is fetched for it alone."""
        repository = await self._repository(bake)
        try:
            origin = await self._origin(repository)
        except ForgeError as error:
            return Failed(error.code, f"no credential for {bake.repository}: {error}", step="credential")
        argv = [
            *self._command, "--repo", origin.url, "--ref", bake.commit, "--branch", bake.branch,
            "--name", f"{repository.owner}/{repository.repo}", "--template", bake.base, "--json", "--credential-stdin",
            "--data-dir", str(self._data_dir), *(["--force"] if bake.force else []),
            *(["--server", self._server] if self._server else []),
        ]  # fmt: skip
        joblog = self.logs.open(str(bake.id))
        head = f"── {bake.name} at {bake.commit[:12]}, attempt {bake.attempts}: {bake.why}\n".encode()
        joblog.append(Output("stderr", joblog.offsets["stderr"], head))
        try:
            process = await BakeProcess.start(argv, joblog, nice=self._settings.nice, environ=self._environ)
        except OSError as error:
            return Failed("not_started", f"{self._command[0]} cannot be started: {error.strerror}")
        try:
            # Known before it does anything: it waits for its credential.
            await self._step(bake, was="baking", pid=process.pid, start_ticks=process.ticks)
            given = origin.credential
            secret = credential_bytes(given.username, given.password) if given is not None else b""
            return await process.finish(secret, limit=self._settings.limit_s)
        finally:
            await process.end()

    async def _repository(self, bake: Bake) -> Repository:
        """Its name as the forge spells it: what clones it there compares letters."""
        known = await self._store.read(lambda db: bq.repository(db, bake.forge, bake.repository))
        owner, _, repo = bake.repository.partition("/")
        return known or Repository(
            forge=bake.forge, name=bake.repository, owner=owner, repo=repo, seen_at=0.0
        )

    async def _settle(self, bake: Bake, outcome: Baked | Failed, seconds: float) -> None:
        """Write down what became of it; a failed one waits for its next attempt, or was the last."""
        now = self._clock()
        self._metrics.bake_seconds.observe(seconds)
        common: dict[str, Any] = {
            "pid": None,
            "start_ticks": None,
            "ended_at": now,
            "seconds": round(seconds, 3),
        }
        if isinstance(outcome, Baked):
            self._metrics.bakes.labels("hit" if outcome.cache_hit else "done").inc()
            log.info(
                "baked", bake=bake.id, name=bake.name, digest=outcome.digest[:12], seconds=round(seconds, 1)
            )
            await self._step(
                bake, was="baking", state="done", digest=outcome.digest, cache_hit=outcome.cache_hit,
                incremental=outcome.incremental, steps=outcome.steps, code=None, step=None, message=None,
                advice=None, output=(), **common,
            )  # fmt: skip
            await self._make_ready(outcome)
            await self._prune()
            return
        again = outcome.again and bake.attempts < self._settings.attempts
        self._metrics.bakes.labels("again" if again else "failed").inc()
        log.warning(
            "bake_failed", bake=bake.id, name=bake.name, code=outcome.code, step=outcome.step, again=again,
            message=outcome.message[:300],
        )  # fmt: skip
        await self._step(
            bake, was="baking", state="queued" if again else "failed", code=outcome.code, step=outcome.step,
            message=outcome.message, advice=outcome.advice, output=outcome.output,
            due_at=now + self._pause(bake.attempts) if again else bake.due_at,
            **{**common, "ended_at": None if again else now},
        )  # fmt: skip

    async def _make_ready(self, baked: Baked) -> None:
        try:
            async with asyncio.timeout(_PREWARM_SECONDS):
                await self._prewarm(baked.digest)
        except (VmmError, OSError, TimeoutError) as error:
            log.warning("prewarm_failed", name=baked.name, error=str(error))

    def _pause(self, attempts: int) -> float:
        pause = min(_MOST_PAUSE, self._settings.retry_s * 2 ** (attempts - 1))
        return pause * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads load, guards nothing

    async def _requeue(self, bake: Bake) -> None:
        """It was cut short by us: again, as soon as may be."""
        await self._step(
            bake, was="baking", state="queued", attempts=max(0, bake.attempts - 1), pid=None, start_ticks=None,
            due_at=self._clock(), started_at=None,
        )  # fmt: skip

    async def _step(self, bake: Bake, *, was: str, **values: Any) -> Bake | None:
        return await self._store.write(lambda db: bq.step_bake(db, bake.id, was=was, values=values))


def bake_logs(data_dir: Path, settings: BakeSettings) -> JobLogs:
    """The logs of all bakes of a data directory, by number."""
    return JobLogs(data_dir / "logs" / "bakes", limit=settings.log_limit_mib << 20)
