"""VMs of failed jobs, frozen to be looked into: written down, kept for a time and within limits, removed for certain.

    failed job ─► row "freezing" ─► the engine freezes its VM ─► row "frozen"
    time over · over a limit · an operator ─► row "removing" ─► the files go ─► row "removed"

Each arrow may be the last thing a service did: ``sweep`` goes on wherever rows and files stand, at each start before
anything else. The engine keeps the time too, for as long as any engine of the data directory is open.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from github_webhook.patterns import fits
from images.warm_guest import work_folder
from runner_service import audit
from runner_service.domain import Job, Runner
from runner_service.ports import RunnerVm
from runner_service.settings import Frozen as FrozenSettings
from runner_service.store import frozen_queries as fq
from runner_service.store import queries as q
from runner_service.store.frozen_queries import KeptVm
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.errors import BadRequest, UnknownVm, VmmError
from vmm_core.machine import Frozen, VmRecord

log = structlog.get_logger("frozen")

# Reasons of a runner to retire after which its VM still holds what the job left.
KEEPS = frozenset({"runner_exited", "completed"})
FAILED = frozenset({"failure", "timed_out"})
BY_OPERATOR = "removed by an operator"
_TICK = 30.0
# Blocks of the VM's own disk, which is removed with it, count as shared for a moment.
_SETTLED_SECONDS = 2.0
_TAIL_BYTES = 64 << 10
_RESULT = re.compile(rb"Job .{1,300} completed with result: (\w{1,20})")
_WORDS = {b"Failed": "failure", b"Succeeded": "success", b"Canceled": "cancelled"}


class Machines(Protocol):
    """The frozen machines of this host, as ``vmm_core.engine.Engine``."""

    def records(self) -> list[VmRecord]: ...
    def frozen(self) -> list[Frozen]: ...
    def discard(self, vm_id: str) -> Awaitable[None]: ...
    def destroy(self, vm_id: str) -> Awaitable[None]: ...


def result_in(log_file: Path) -> str | None:
    """What the runner itself said last about how its job ended, in GitHub's words; None when it did not."""
    try:
        with log_file.open("rb") as file:
            file.seek(max(0, log_file.stat().st_size - _TAIL_BYTES))
            found = _RESULT.findall(file.read())
    except OSError:
        return None
    return _WORDS.get(found[-1]) if found else None


def surplus(kept: Iterable[KeptVm], now: float, *, most: int, most_bytes: int) -> list[tuple[KeptVm, str]]:
    """Which are to go now, and why: those whose time has passed, then the oldest until the limits are met. Pure."""
    going: list[tuple[KeptVm, str]] = []
    staying: list[KeptVm] = []
    for one in sorted(kept, key=lambda one: (one.created_at, one.id)):
        if now >= one.expires_at:
            going.append((one, "its time had passed"))
        else:
            staying.append(one)
    taken = sum(one.bytes or 0 for one in staying)
    while staying and (len(staying) > most or taken > most_bytes):
        oldest = staying.pop(0)
        limit = f"{most} frozen VMs" if len(staying) >= most else f"{most_bytes >> 20} MiB of frozen VMs"
        going.append((oldest, f"the limit of {limit} was reached: the oldest goes first"))
        taken -= oldest.bytes or 0
    return going


class Freezer:
    """``size`` tells the bytes of the pool that the snapshot of a digest alone takes."""

    def __init__(
        self,
        *,
        store: Store,
        machines: Machines,
        settings: FrozenSettings,
        host: str,
        size: Callable[[str], Awaitable[int]],
        metrics: Metrics,
        tick: float = _TICK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._machines = machines
        self._settings = settings
        self._host = host
        self._size = size
        self._metrics = metrics
        self._tick = tick
        self._clock = clock
        self._woken = asyncio.Event()
        self._sweeping = asyncio.Lock()

    def reconfigure(self, settings: FrozenSettings) -> None:
        """Other repositories and quotas; what is kept already keeps its time."""
        self._settings = settings

    def wants(self, job: Job) -> bool:
        """Whether the VM of ``job`` is kept should it fail."""
        return fits(f"{job.owner}/{job.repo}", self._settings.repositories)

    async def freeze(self, runner: Runner, job: Job, vm: RunnerVm) -> KeptVm:
        """Freeze the VM that ``job`` failed in, which ends it. When this raises VmmError it runs on."""
        now = self._clock()
        ttl = self._settings.ttl_h * 3600
        repository = f"{job.owner}/{job.repo}"
        kept = KeptVm(
            id=vm.id,
            host=self._host,
            job_id=job.id,
            runner_id=runner.id,
            repository=repository,
            owner=job.owner.lower(),
            folder=work_folder(repository),
            state="freezing",
            created_at=now,
            expires_at=now + ttl,
        )
        await self._store.write(lambda db: fq.begin(db, kept))
        try:
            frozen = await vm.freeze(ttl=ttl)
        except VmmError as error:
            await self._close(kept.id, f"it could not be frozen: {error}")
            self._metrics.frozen.labels("failed").inc()
            raise
        await self._frozen(frozen)
        await self._note("frozen.freeze", kept, f"the job failed; kept until {frozen.expires_at:.0f}")
        self._metrics.frozen.labels("frozen").inc()
        log.info("frozen", vm=kept.id, job=job.id, until=frozen.expires_at)
        self._woken.set()
        return kept

    async def start(self) -> None:
        """What is overdue goes now, and what a crash left is put in order. Never raises: the next sweep tries again."""
        try:
            await self.sweep()
        except Exception as error:
            log.exception("sweep_failed", error=str(error))

    async def run(self) -> None:
        """Sweep when something is due, and every tick."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(await self._pause()):
                    await self._woken.wait()
            self._woken.clear()
            await self.start()

    async def _pause(self) -> float:
        try:
            kept = await self._store.read(lambda db: fq.kept_on(db, self._host))
        except Exception as error:
            log.exception("frozen_unreadable", error=str(error))
            return self._tick
        now = self._clock()
        due = [one.expires_at - now for one in kept]
        due += [one.created_at + _SETTLED_SECONDS - now for one in kept if one.bytes is None]
        return min([self._tick, *(max(0.05, seconds) for seconds in due)])

    async def remove(self, vm_id: str, why: str) -> KeptVm:
        """Remove a frozen VM. Raises UnknownVm when none of that id is kept."""
        states: Sequence[fq.KeptState] = ("freezing", "frozen", "removing")
        kept = await self._store.write(lambda db: fq.change(db, vm_id, states, state="removing", why=why))
        if kept is None:
            raise UnknownVm(f"there is no frozen VM {vm_id}: see microvm frozen")
        if kept.host == self._host:
            await self._discard(kept)
        return kept

    # ── putting rows and files in order ──────────────────────────────────────────────────────────

    async def sweep(self) -> None:
        """One look at everything that is kept on this host."""
        async with self._sweeping:
            # In this order: a VM that is neither running nor frozen now was not about to be either.
            running = {record.id for record in await asyncio.to_thread(self._machines.records)}
            found = {one.id: one for one in await asyncio.to_thread(self._machines.frozen)}
            rows = await self._store.read(lambda db: fq.kept_on(db, self._host))
            for row in rows:
                await self._settle(row, found.get(row.id), running)
            await self._limit(found)
            await self._discard_unowned(found, {row.id for row in rows})

    async def _settle(self, row: KeptVm, frozen: Frozen | None, running: set[str]) -> None:
        """Let a row say what became of its VM."""
        if row.state == "removing":
            await self._discard(row)
        elif frozen is not None:
            if row.state == "freezing":
                await self._frozen(frozen)
            if row.bytes is None and self._clock() >= row.created_at + _SETTLED_SECONDS:
                await self._measure(frozen)
        elif row.state == "frozen":
            overdue = self._clock() >= row.expires_at
            await self._close(
                row.id, "its time had passed" if overdue else "it was thawed or discarded by other means"
            )
        elif row.id not in running:
            await self._close(row.id, "its VM ended before it was frozen")

    async def _limit(self, found: dict[str, Frozen]) -> None:
        rows = await self._store.read(lambda db: fq.kept_on(db, self._host))
        kept = [row for row in rows if row.state == "frozen" and row.id in found]
        settings = self._settings
        for row, why in surplus(kept, self._clock(), most=settings.most, most_bytes=settings.most_mib << 20):
            with contextlib.suppress(UnknownVm):
                await self.remove(row.id, why)

    async def _discard_unowned(self, found: dict[str, Frozen], rows: set[str]) -> None:
        """Those of ours without a row. A runner that is not over may want its VM back: it stays."""
        ours = {
            one.id: one.record.metadata["runner_id"]
            for one in found.values()
            if one.id not in rows
            and one.record.metadata.get("service") == self._host
            and "runner_id" in one.record.metadata
        }
        if not ours:
            return
        runners = await self._store.read(lambda db: q.runners_by_id(db, set(ours.values())))
        for vm_id, runner_id in ours.items():
            runner = runners.get(runner_id)
            if runner is None or runner.state == "gone":
                with contextlib.suppress(VmmError):
                    await self._machines.discard(vm_id)
                    log.warning("unowned_discarded", vm=vm_id)

    async def _frozen(self, frozen: Frozen) -> None:
        await self._store.write(
            lambda db: fq.change(
                db,
                frozen.id,
                ("freezing", "frozen"),
                state="frozen",
                digest=frozen.digest,
                expires_at=frozen.expires_at,
            )
        )

    async def _measure(self, frozen: Frozen) -> None:
        try:
            count = await self._size(frozen.digest)
        except (VmmError, OSError):
            return  # it goes right now
        await self._store.write(lambda db: fq.change(db, frozen.id, ("frozen",), bytes=count))

    async def _discard(self, row: KeptVm) -> None:
        """Remove it, and the copies of it that somebody looks around in: its files are theirs."""
        for record in await asyncio.to_thread(self._machines.records):
            if row.digest is not None and record.parent == row.digest:
                with contextlib.suppress(VmmError):
                    await self._machines.destroy(record.id)
        try:
            await self._machines.discard(row.id)
        except UnknownVm:
            pass  # its files are gone already
        except (BadRequest, OSError) as error:
            log.info("discard_again", vm=row.id, error=str(error))  # somebody opens it at this very moment
            return
        await self._close(row.id, row.why or "removed")
        if row.why != BY_OPERATOR:  # who that was is written down where the order came in
            await self._note("frozen.remove", row, row.why or "")
        self._metrics.frozen.labels("removed").inc()
        log.info("frozen_removed", vm=row.id, why=row.why)

    async def _note(self, action: str, row: KeptVm, why: str) -> None:
        """A line in the audit log: whoever asks where a job's memory was is told of its whole stay."""
        who, details = f"service {self._host}", {"job": row.job_id, "why": why}
        await self._store.write(
            lambda db: audit.record(db, who=who, action=action, target=row.id, details=details)
        )

    async def _close(self, vm_id: str, why: str) -> None:
        states: Sequence[fq.KeptState] = ("freezing", "frozen", "removing")
        now = self._clock()
        await self._store.write(
            lambda db: fq.change(db, vm_id, states, state="removed", removed_at=now, why=why[:500])
        )
