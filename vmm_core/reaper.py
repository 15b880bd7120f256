"""Removes what nothing owns: what was left by processes that were killed, once it has been seen on two passes.

    seen once ──► suspect ──the next pass sees the same one──► removed, with a line in the log
                        └── gone, or owned by then ──► forgotten

A VM whose owner has died waits for adoption (``Engine.adopt``) until its time to live has passed: it is no orphan
before. Slots with what lives in them, jailers and control groups are looked for on the whole host, whichever data
directory they were for; VMs, drafts and captures in the reaper's own.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from pathlib import Path

from vmm_core import processes
from vmm_core.berths import Berths
from vmm_core.disk import Pool
from vmm_core.errors import SnapshotInUse, UnknownTemplate, VmmError
from vmm_core.network.addresses import SLOTS
from vmm_core.network.slots import SlotPool
from vmm_core.orphans import (
    Orphan,
    abandoned,
    entries,
    free_lock,
    groups,
    inside_of,
    jailers,
    loose,
    mark_of,
    read_told,
    slot_of,
)
from vmm_core.processes import Seen
from vmm_core.record import read_records
from vmm_core.snapshot import MANIFEST, SnapshotStore

MOST_IN_ONE_PASS = 64

_log = logging.getLogger(__name__)


async def reap_on(make: Callable[[], Awaitable["Reaper"]], every: float) -> None:
    """Pass after pass until cancelled; the reaper is made with the first one."""
    reaper: Reaper | None = None
    while True:
        await asyncio.sleep(every)
        try:
            reaper = reaper or await make()
            await reaper.sweep()
        except (VmmError, OSError, TimeoutError) as error:
            _log.warning("a pass of the reaper failed, the next one is in %.0f s: %s", every, error)


class Reaper:
    """Looks at the host and at one data directory. ``owned`` are this process's VMs, ``clear`` removes a dead one."""

    def __init__(
        self,
        pool: Pool,
        snapshots: SnapshotStore,
        berths: Berths,
        *,
        owned: Callable[[], Collection[str]],
        clear: Callable[[Path], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._snapshots = snapshots
        self._berths = berths
        self._owned = owned
        self._clear = clear
        self.suspects: set[tuple[str, str, str]] = set()

    async def sweep(self) -> list[Orphan]:
        """One pass: remove what the pass before saw too (at most 64 of it), remember the rest. What was removed."""
        found = await self.look()
        due = [orphan for orphan in found if orphan.key in self.suspects][:MOST_IN_ONE_PASS]
        removed: list[Orphan] = []
        for orphan in due:
            if orphan.kind != "slot":
                try:
                    if await self._remove(orphan):
                        removed.append(orphan)
                except (VmmError, OSError, TimeoutError) as error:
                    _tell("not reaped", orphan, f"{type(error).__name__}: {error}")
        removed += await self._remove_slots([orphan for orphan in due if orphan.kind == "slot"])
        for orphan in removed:
            _tell("reaped", orphan, orphan.why)
        self.suspects = {orphan.key for orphan in found} - {orphan.key for orphan in removed}
        return removed

    async def look(self) -> list[Orphan]:
        """Everything that nothing owns at this moment. Some of it may be another process's in an instant."""
        running = await asyncio.to_thread(processes.seen)
        # Not on a thread: no adoption of this process comes in between the tries of the locks.
        found = [*self._vms(), *self._drafts()]
        found += await asyncio.to_thread(lambda: [*self._captures(), *jailers(running)])
        found += self._processes(running)
        slots = self._berths.slots
        if slots is not None:
            found += await self._slots(slots, running)
            found += groups(self._berths.jailer.cgroups)
        return found

    async def _remove(self, orphan: Orphan) -> bool:
        """Whether it was an orphan still, and is gone now."""
        match orphan.kind:
            case "vm":
                return await self._remove_vm(self._pool.vms / orphan.name)
            case "slot":
                return bool(await self._remove_slots([orphan]))
            case "group":
                await self._berths.jailer.cgroups.remove(orphan.name)
                return True
            case "process" | "jailer":
                process = processes.one(int(orphan.name), int(orphan.mark))
                return process is not None and not await processes.end([process])
            case "draft":
                return self._remove_draft(self._pool.staging / orphan.name)
            case "capture":
                return await asyncio.to_thread(self._remove_capture, orphan.name)

    # ── VMs of the data directory ────────────────────────────────────────────────────────────────

    def _vms(self) -> Iterator[Orphan]:
        owned = self._owned()
        for directory in entries(self._pool.vms):
            if directory.name not in owned and (lock := free_lock(directory)) is not None:
                why = self._gone(directory)
                mark = mark_of(directory)
                os.close(lock)
                if why is not None:
                    yield Orphan("vm", directory.name, mark, why)

    def _gone(self, directory: Path) -> str | None:
        """Why nobody will ever adopt the VM in a directory that nobody holds; None when somebody may."""
        try:
            told = read_told(directory)
        except FileNotFoundError:
            return "its start was cut short"
        if told is None:
            # Not to be understood, and until when it may live neither: its jailer knows.
            return None if self._lived_in(directory) else "its record cannot be read, and nothing runs there"
        if told.vmm is None:
            return "its VMM has ended"
        return "its time to live has passed" if told.expires_at <= time.time() else None

    def _lived_in(self, directory: Path) -> bool:
        slots = self._berths.slots
        for process in processes.seen():
            number = slot_of(process)
            if process.cwd == str(directory) or (
                slots is not None and number >= 0 and slots.owner(number) == str(directory)
            ):
                return True
        return False

    async def _remove_vm(self, directory: Path) -> bool:
        lock = free_lock(directory)
        if lock is None:
            return False
        try:
            if self._gone(directory) is None:
                return False
            with contextlib.suppress(FileNotFoundError):
                told = read_told(directory)
                vmm = told.vmm if told is not None else None
                if vmm is not None and await processes.end([vmm]):
                    return False
            await self._clear(directory)
        finally:
            os.close(lock)
        return not directory.exists()

    # ── slots and what lives in them ─────────────────────────────────────────────────────────────

    async def _slots(self, slots: SlotPool, running: Sequence[Seen]) -> list[Orphan]:
        cgroups = self._berths.jailer.cgroups
        empty = {orphan.number for orphan in await slots.orphans()}
        left = {n for n in cgroups.numbers() if n < SLOTS and slots.owner(n) is None and not cgroups.pids(n)}
        living = {number for process in running if (number := slot_of(process)) >= 0}
        found: list[Orphan] = []
        for number in sorted(empty | left | living):
            inside = inside_of(slots, number, running)
            if number in living and not inside:
                continue  # another world's, which has a slot of this number too
            why = loose(slots, number, inside)
            if why is not None:
                mark = ",".join(f"{process.pid}:{process.ticks}" for process in inside)
                found.append(Orphan("slot", str(number), mark, why))
        return found

    async def _remove_slots(self, due: Sequence[Orphan]) -> list[Orphan]:
        """End what lives in these slots and give them back, all at once; those that are gone."""
        slots = self._berths.slots
        if slots is None or not due:
            return []
        running = await asyncio.to_thread(processes.seen)
        empty: dict[int, Orphan] = {}
        for orphan in due:
            number = int(orphan.name)
            inside = inside_of(slots, number, running)
            try:
                if loose(slots, number, inside) is not None and not await processes.end(inside):
                    await self._berths.jailer.cgroups.remove(number)
                    empty[number] = orphan
            except (OSError, TimeoutError) as error:
                _tell("not reaped", orphan, f"{type(error).__name__}: {error}")
        try:
            return [empty[number] for number in await slots.reap_all(list(empty))]
        except (VmmError, OSError) as error:
            _log.warning("%d slots not reaped: %s", len(empty), error)
            return []

    # ── processes that no slot tells of ──────────────────────────────────────────────────────────

    def _processes(self, running: Sequence[Seen]) -> Iterator[Orphan]:
        """Plain VMMs and relays that work in a VM's directory that was removed."""
        for process in running:
            if process.cwd.startswith(f"{self._pool.vms}/") and process.cwd.endswith(" (deleted)"):
                yield Orphan("process", str(process.pid), str(process.ticks), "its VM is gone")

    # ── what was half made ───────────────────────────────────────────────────────────────────────

    def _drafts(self) -> Iterator[Orphan]:
        for path in entries(self._pool.staging):
            if (why := abandoned(path)) is not None:
                yield Orphan("draft", path.name, mark_of(path), why)

    def _remove_draft(self, path: Path) -> bool:
        if abandoned(path) is not None:
            shutil.rmtree(path, ignore_errors=True)
        return not path.exists()

    def _captures(self) -> Iterator[Orphan]:
        """Captures that were never completed, and those that nothing stands on any more."""
        manifests = {snapshot.digest: snapshot.manifest for snapshot in self._snapshots.list()}
        used = {record.parent for record in read_records(self._pool.vms)}
        used |= {manifest.base for manifest in manifests.values()}
        for path in entries(self._pool.snapshots):
            manifest = manifests.get(path.name)
            if manifest is not None and manifest.ephemeral and path.name not in used:
                why = "nothing stands on it any more"
            elif manifest is None and not (path / MANIFEST).exists():
                why = "it was never completed"
            else:
                continue
            if (held := self._snapshots.hold(path.name, alone=True)) is not None:
                os.close(held)
                yield Orphan("capture", path.name, mark_of(path), why)

    def _remove_capture(self, digest: str) -> bool:
        path = self._pool.snapshots / digest
        if (path / MANIFEST).exists():
            with contextlib.suppress(SnapshotInUse, UnknownTemplate):
                self._snapshots.remove(digest)
        elif (held := self._snapshots.hold(digest, alone=True)) is not None:
            self._snapshots.abandon(digest)
            os.close(held)
        return not path.exists()


def _tell(what: str, orphan: Orphan, why: str) -> None:
    _log.warning("%s kind=%s name=%s mark=%s why=%r", what, orphan.kind, orphan.name, orphan.mark, why)
