"""Forks of machines that run, machines that are frozen and thawed, and those that become parents.

    running ──one pause──► running, and a capture beside it ──► n children at once
                           capture ──written in the background──► an ephemeral snapshot ──nothing stands on it──► gone
    running ──save──► a snapshot that stands on what it was forked from, durably ──► the VM is ended
    running ──freeze──► a frozen snapshot, the same way ──► the VM is ended
    frozen  ──thaw──► the same machine, running ──► the snapshot is gone
    frozen  ──discard, or its time has passed──► gone

A capture's memory is resident at once, so children wait for no disk. Its image shares the blocks of its base's and
adds the private pages only. A VM and a frozen snapshot of it exist together only when a freeze or a thaw was cut
short: then the snapshot is the machine, and the VM is ended at the next adoption.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from vmm_core.capture import Captured, Image, Threads, capture, write_image, write_sums
from vmm_core.disk import Pool
from vmm_core.drivers.base import MEMORY, SUMS
from vmm_core.errors import BadRequest, SnapshotInvalid, UnknownTemplate, UnknownVm, VmmError
from vmm_core.frozen import FrozenVms
from vmm_core.machine import Frozen, Identity, MachineSpec, Manifest, Snapshot, VmExit
from vmm_core.record import new_identity
from vmm_core.residents import Residents
from vmm_core.snapshot import SnapshotStore, file_sizes, load_memory
from vmm_core.stop import Stops
from vmm_core.vm import RunningVm

MOST_CHILDREN = 256
_CHILD_MIB = 96
# Children that end sooner cost no disk at all, and those that begin are not disturbed.
_WRITE_AFTER = 2.0
_CLOSE_SECONDS = 60.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Start(Protocol):
    """Starts a clone of ``snapshot`` known as ``identity``, which stands on the snapshot ``parent``."""

    def __call__(
        self,
        snapshot: Snapshot,
        machine: MachineSpec,
        identity: Identity,
        ttl: float,
        metadata: Mapping[str, str] | None,
        *,
        parent: str | None,
        owner: str | None,
    ) -> Awaitable[RunningVm]: ...


class Engine(Protocol):
    """What an engine does for its captures."""

    @property
    def pool(self) -> Pool: ...
    @property
    def snapshots(self) -> SnapshotStore: ...

    def misfit(self, manifest: Manifest) -> str | None: ...
    async def destroy(self, vm_id: str) -> None: ...


class Live:
    """The captures and the frozen machines of one engine."""

    def __init__(
        self,
        engine: Engine,
        residents: Residents,
        *,
        start: Start,
        require: Callable[[MachineSpec, int], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._pool = engine.pool
        self._snapshots = engine.snapshots
        self._residents = residents
        self._start = start
        self._require = require
        self._threads = Threads()
        self._stops = Stops(engine.pool, engine.snapshots, self._threads, require)
        self._turns: dict[str, asyncio.Lock] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._hurry: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.frozen = FrozenVms(engine.snapshots)

    # ── forks ────────────────────────────────────────────────────────────────────────────────────

    async def fork(
        self,
        vm: RunningVm,
        count: int,
        *,
        ttl: float,
        metadata: Mapping[str, str] | None = None,
        hostname: str | None = None,
    ) -> list[RunningVm]:
        """``count`` children of ``vm`` in one pause of it; all of them or none. See ``RunningVm.fork_many``."""
        if not 1 <= count <= MOST_CHILDREN:
            raise BadRequest(f"{count} children of one machine at once: 1 to {MOST_CHILDREN} are possible")
        machine = vm.record.machine
        snapshot, captured, held = await _finished(self._capture(vm, count), self._drop)
        tags = vm.record.metadata if metadata is None else metadata
        try:
            return await _all_or_none(
                self._child(snapshot, machine, hostname, ttl, tags, captured.pause_ms) for _ in range(count)
            )
        finally:
            writing = asyncio.create_task(
                self._write(snapshot, captured, held), name=f"write-{snapshot.digest[:12]}"
            )
            self._writing[snapshot.digest] = writing

    async def _capture(self, vm: RunningVm, count: int) -> tuple[Snapshot, Captured, int]:
        """Capture ``vm``: its snapshot is in its place and its memory resident, held until ``_write`` has run."""
        record = vm.record
        self._pool.require_room()

        def require(memory_mib: int) -> Awaitable[None]:
            return self._require(record.machine, memory_mib + count * _CHILD_MIB)

        digest = _new_digest()
        async with self._turn(vm):
            with self._snapshots.draft() as draft:
                captured = await capture(
                    vm, draft, self._threads, into=None, exact=True, run_on=True, require=require
                )
                try:
                    path, held = self._snapshots.place(draft, digest)
                except BaseException:
                    captured.close()
                    raise
        manifest = self._manifest(vm, digest, path)
        self._residents.pin(digest, captured.memory)
        return Snapshot(path, msgspec.structs.replace(manifest, ephemeral=True)), captured, held

    async def _child(
        self,
        snapshot: Snapshot,
        machine: MachineSpec,
        hostname: str | None,
        ttl: float,
        metadata: Mapping[str, str],
        pause_ms: float,
    ) -> RunningVm:
        identity = new_identity(hostname)
        child = await self._start(
            snapshot, machine, identity, ttl, metadata, parent=snapshot.digest, owner=snapshot.manifest.owner
        )
        child.timings = msgspec.structs.replace(child.timings, pause_ms=pause_ms)
        return child

    async def _write(self, snapshot: Snapshot, captured: Captured, held: int) -> None:
        """Make the capture a snapshot on disk, if a child lives to need it."""
        digest = snapshot.digest
        written = False
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WRITE_AFTER):
                    await self._hurry.setdefault(digest, asyncio.Event()).wait()
            if await asyncio.to_thread(self._snapshots.users, digest):
                base = await self._image_of(snapshot.manifest.base)
                await self._threads.patient(lambda: self._complete(snapshot, captured, base))
                written = True
        except (VmmError, OSError) as error:
            # Its children run on without: what they are frozen to is whole then, instead of shared with it.
            _log.warning("capture %s was not written: %s", digest[:12], error)
        finally:
            self._residents.unpin(digest)
            os.close(held)
            self._writing.pop(digest, None)
            self._hurry.pop(digest, None)
        if not written:
            self._snapshots.abandon(digest)
        await asyncio.to_thread(self._snapshots.tidy)

    def _complete(self, snapshot: Snapshot, captured: Captured, base: Image | None) -> None:
        self._pool.require_room(captured.private_bytes)
        write_image(captured, base, snapshot.path)
        write_sums(captured, base, snapshot.path)
        manifest = snapshot.manifest
        self._snapshots.complete(
            msgspec.structs.replace(
                manifest,
                base=manifest.base if base is not None else None,
                files=file_sizes(snapshot.path),
            )
        )

    def _drop(self, made: tuple[Snapshot, Captured, int]) -> None:
        """The capture nobody waits for any more."""
        snapshot, _, held = made
        self._residents.unpin(snapshot.digest)
        os.close(held)
        self._snapshots.abandon(snapshot.digest)

    # ── parents ──────────────────────────────────────────────────────────────────────────────────

    async def save(self, vm: RunningVm, digest: str, finish: Callable[[Manifest], Manifest]) -> Snapshot:
        """Stop ``vm`` into the snapshot ``digest``. See ``Engine.snapshot``, which ends it."""

        async def work() -> Snapshot:
            async with self._turn(vm):
                if vm.record.parent is not None or _image_in(vm.directory) is not None:
                    return await self._stop(vm, digest, finish, exact=True)
                return await self._stops.booted(
                    vm,
                    lambda made: finish(
                        msgspec.structs.replace(self._manifest(vm, digest, made), state="migration")
                    ),
                )

        return await _finished(work(), lambda _: None)

    # ── frozen machines ──────────────────────────────────────────────────────────────────────────

    async def freeze(self, vm: RunningVm, ttl: float) -> Frozen:
        """Stop ``vm`` into a snapshot. See ``RunningVm.freeze``."""
        return await _finished(self._freeze(vm, ttl), lambda _: None)

    async def _freeze(self, vm: RunningVm, ttl: float) -> Frozen:
        now = time.time()
        frozen = Frozen(digest=_new_digest(), record=vm.record, frozen_at=now, expires_at=now + ttl)
        async with self._turn(vm):

            def finish(saved: Manifest) -> Manifest:
                return msgspec.structs.replace(saved, frozen=frozen)

            await self._stop(vm, frozen.digest, finish, exact=False)
            vm.end_as(VmExit(kind="frozen", cause="frozen", reason=f"frozen as {frozen.digest[:12]}"))
            await vm.destroy()
        self.frozen.watch_time()
        return frozen

    async def _stop(
        self, vm: RunningVm, digest: str, finish: Callable[[Manifest], Manifest], *, exact: bool
    ) -> Snapshot:
        """Stop ``vm`` into the snapshot ``digest``; ``finish`` has the last word on its manifest. In its turn."""
        own = _image_in(vm.directory)  # of a machine that was thawed
        image = own or await self._image_of(vm.record.parent)
        return await self._stops.forked(
            vm, image, lambda made: finish(self._manifest(vm, digest, made)), exact=exact
        )

    async def thaw(self, vm_id: str, ttl: float) -> RunningVm:
        """See ``Engine.thaw``."""
        async with self.frozen.claimed(vm_id) as (snapshot, frozen):
            manifest = snapshot.manifest
            if (problem := self._engine.misfit(manifest)) is not None:
                raise SnapshotInvalid(f"frozen VM {vm_id} cannot be thawed on this host: {problem}")
            await self._require(manifest.machine, _CHILD_MIB)
            with contextlib.suppress(UnknownVm):
                await self._engine.destroy(vm_id)  # what a freeze that was cut short has left
            record = frozen.record
            # Not among the residents: nobody else will be forked from it.
            self._residents.pin(frozen.digest, await asyncio.to_thread(load_memory, snapshot))
            try:
                vm = await self._start(
                    snapshot,
                    manifest.machine,
                    record.identity,
                    ttl,
                    record.metadata,
                    parent=manifest.base,
                    owner=manifest.owner,
                )
            finally:
                self._residents.unpin(frozen.digest)
            try:
                for name in (MEMORY, SUMS):
                    (vm.directory / name).hardlink_to(snapshot.path / name)
                self._snapshots.retire(snapshot)
            except BaseException:
                await vm.destroy()
                raise
        return vm

    # ── order ────────────────────────────────────────────────────────────────────────────────────

    def gone(self, vm: RunningVm) -> None:
        """A VM has ended: what it stood on may be of no use any more."""
        self._turns.pop(vm.id, None)
        if vm.record.parent is not None and self._is_ephemeral(vm.record.parent):
            self._spawn(asyncio.to_thread(self._snapshots.tidy))

    def _is_ephemeral(self, digest: str) -> bool:
        with contextlib.suppress(UnknownTemplate, SnapshotInvalid):
            return self._snapshots.load(digest).manifest.ephemeral
        return False  # gone, or still being written: then it is tidied up after that

    async def close(self) -> None:
        """Captures are written to their end, so that what runs on can stand on them."""
        await self.frozen.close()
        for digest in self._writing:
            self._hurry.setdefault(digest, asyncio.Event()).set()
        waiting = {*self._writing.values(), *self._tasks}
        if waiting:
            await asyncio.wait(waiting, timeout=_CLOSE_SECONDS)
        self._threads.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="live")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _turn(self, vm: RunningVm) -> asyncio.Lock:
        """One pause of a machine at a time."""
        return self._turns.setdefault(vm.id, asyncio.Lock())

    # ── what a capture is made of ────────────────────────────────────────────────────────────────

    def _manifest(self, vm: RunningVm, digest: str, directory: Path) -> Manifest:
        record = vm.record
        if not record.argv_digest:
            raise BadRequest(
                f"VM {vm.id} was started by an earlier release, which cannot be captured while it runs"
            )
        return Manifest(
            digest=digest,
            created_at=time.time(),
            machine=record.machine,
            accel=record.accel,
            vmm_version=record.vmm_version,
            cpu_model=record.cpu_model,
            argv_digest=record.argv_digest,
            files=file_sizes(directory),
            labels={"template": record.template} if record.template is not None else {},
            state="devices",
            base=record.parent if self._exists(record.parent) else None,
            owner=record.owner,
        )

    def _exists(self, digest: str | None) -> bool:
        if digest is None or digest in self._writing:
            return digest is not None
        with contextlib.suppress(UnknownTemplate, SnapshotInvalid):
            return bool(self._snapshots.load(digest))
        return False

    async def _image_of(self, digest: str | None) -> Image | None:
        """The memory image of a snapshot, once it is written; None when there is none."""
        if digest is None:
            return None
        if (writing := self._writing.get(digest)) is not None:
            self._hurry.setdefault(digest, asyncio.Event()).set()
            await asyncio.wait({writing})
        with contextlib.suppress(UnknownTemplate, SnapshotInvalid):
            return _image_in(self._snapshots.load(digest).path)
        return None


def _image_in(directory: Path) -> Image | None:
    image, sums = directory / MEMORY, directory / SUMS
    return Image(image, sums if sums.exists() else None) if image.exists() else None


def _new_digest() -> str:
    return secrets.token_hex(32)


async def _finished(work: Coroutine[Any, Any, T], undo: Callable[[T], None]) -> T:
    """Do it to the end even when the one who asked is cancelled; what nobody waits for any more is undone then."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise


async def _all_or_none(starts: Iterable[Coroutine[Any, Any, RunningVm]]) -> list[RunningVm]:
    tasks = [asyncio.create_task(start) for start in starts]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(vm.destroy() for vm in ended if isinstance(vm, RunningVm)))
        raise
