"""Removes what nothing owns: what was left by processes that were killed, once it has been seen on two passes.

    seen once ──► suspect ──the next pass sees the same one──► removed, with a line in the log
                        └── gone, or owned by then ──► forgotten

Owned is what a living process holds by a lock (a VM's directory, a slot's claim, a capture) and what it is the
parent of. A VM whose owner has died waits for adoption (``Engine.adopt``) until its time to live has passed: it is
no orphan before. Slots, processes and control groups are looked for on the whole host, whichever data directory
they were for; directories in the reaper's own.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from vmm_core import processes
from vmm_core.berths import Berths
from vmm_core.cgroup import GROUP, Cgroups
from vmm_core.disk import Pool
from vmm_core.errors import SnapshotInUse, UnknownTemplate, VmmError
from vmm_core.network.addresses import SLOTS, UID_BASE, slot
from vmm_core.network.host import NETNS_DIR
from vmm_core.network.slots import SlotPool
from vmm_core.process import start_ticks
from vmm_core.processes import Seen
from vmm_core.record import RECORD, host_boot, try_lock
from vmm_core.snapshot import MANIFEST, SnapshotStore

EVERY_SECONDS = 30.0
MOST_IN_ONE_PASS = 64

Kind = Literal["vm", "slot", "group", "process", "draft", "capture", "jailer"]

_JAILER = "microvm-jailer"
_TRIED_BY = re.compile(r"probe-(\d+)-[0-9a-f]{8}")
_log = logging.getLogger(__name__)


class Orphan(msgspec.Struct, frozen=True):
    """Something that nothing owns, and how that is known. ``mark`` tells it from a later one of its name."""

    kind: Kind
    name: str
    mark: str
    why: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.name, self.mark


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


class _Told(msgspec.Struct):
    """What any release can read of a VM's record."""

    pid: int
    start_ticks: int
    expires_at: float
    host_boot: str = ""

    def among(self, running: Iterable[Seen]) -> list[Seen]:
        """Its VMM, if that runs."""
        if self.host_boot != host_boot():
            return []
        return [p for p in running if (p.pid, p.ticks) == (self.pid, self.start_ticks)]


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
        found = [*self._vms(running), *self._drafts()]
        found += await asyncio.to_thread(lambda: [*self._captures(), *_jailers(running)])
        found += self._processes(running)
        slots = self._berths.slots
        if slots is not None:
            found += await self._slots(slots, running)
            found += _groups(self._berths.jailer.cgroups)
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
                left = await processes.end(await _still(int(orphan.name), orphan.mark))
                return not left
            case "draft":
                return self._remove_draft(self._pool.staging / orphan.name)
            case "capture":
                return await asyncio.to_thread(self._remove_capture, orphan.name)

    # ── VMs of the data directory ────────────────────────────────────────────────────────────────

    def _vms(self, running: Sequence[Seen]) -> Iterator[Orphan]:
        owned = self._owned()
        for directory in _entries(self._pool.vms):
            if directory.name not in owned and (lock := _try(directory)) is not None:
                why = self._gone(directory, running)
                mark = _mark(directory)
                os.close(lock)
                if why is not None:
                    yield Orphan("vm", directory.name, mark, why)

    def _gone(self, directory: Path, running: Sequence[Seen]) -> str | None:
        """Why nobody will ever adopt the VM in a directory that nobody holds; None when somebody may."""
        try:
            told = _told(directory)
        except FileNotFoundError:
            return "its start was cut short"
        if told is None:
            # Not to be understood, and until when it may live neither: its jailer knows.
            lives = any(process.cwd == str(directory) for process in running) or self._in_slot(
                directory, running
            )
            return None if lives else "its record cannot be read, and nothing runs there"
        if not told.among(running):
            return "its VMM has ended"
        return "its time to live has passed" if told.expires_at <= time.time() else None

    def _in_slot(self, directory: Path, running: Sequence[Seen]) -> bool:
        slots = self._berths.slots
        return slots is not None and any(
            slots.owner(number) == str(directory) for process in running if (number := _slot_of(process)) >= 0
        )

    async def _remove_vm(self, directory: Path) -> bool:
        lock = _try(directory)
        if lock is None:
            return False
        try:
            running = await asyncio.to_thread(processes.seen)
            if self._gone(directory, running) is None:
                return False
            with contextlib.suppress(FileNotFoundError):
                told = _told(directory)
                if told is not None and await processes.end(told.among(running)):
                    return False
            await self._clear(directory)
        finally:
            os.close(lock)
        return not directory.exists()

    # ── slots and what lives in them ─────────────────────────────────────────────────────────────

    async def _slots(self, slots: SlotPool, running: Sequence[Seen]) -> list[Orphan]:
        cgroups = self._berths.jailer.cgroups
        empty = {orphan.number for orphan in await slots.orphans()}
        groups = {
            n for n in cgroups.numbers() if n < SLOTS and slots.owner(n) is None and not cgroups.pids(n)
        }
        living = {number for process in running if (number := _slot_of(process)) >= 0}
        found: list[Orphan] = []
        for number in sorted(empty | groups | living):
            inside = _inside(slots, number, running)
            if number in living and not inside:
                continue  # another world's, which has a slot of this number too
            why = _loose(slots, number, inside)
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
            inside = _inside(slots, number, running)
            try:
                if _loose(slots, number, inside) is not None and not await processes.end(inside):
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
        for path in _entries(self._pool.staging):
            if (why := _abandoned(path)) is not None:
                yield Orphan("draft", path.name, _mark(path), why)

    def _remove_draft(self, path: Path) -> bool:
        if _abandoned(path) is not None:
            shutil.rmtree(path, ignore_errors=True)
        return not path.exists()

    def _captures(self) -> Iterator[Orphan]:
        """Captures that were never completed, and those that nothing stands on any more."""
        for path in _entries(self._pool.snapshots):
            why = "it was never completed"
            if (path / MANIFEST).exists():
                if not self._unused(path.name):
                    continue
                why = "nothing stands on it any more"
            if (held := self._snapshots.hold(path.name, alone=True)) is not None:
                os.close(held)
                yield Orphan("capture", path.name, _mark(path), why)

    def _unused(self, digest: str) -> bool:
        with contextlib.suppress(VmmError, OSError):
            ephemeral = self._snapshots.load(digest).manifest.ephemeral
            return ephemeral and not self._snapshots.users(digest)
        return False

    def _remove_capture(self, digest: str) -> bool:
        path = self._pool.snapshots / digest
        if (path / MANIFEST).exists():
            with contextlib.suppress(SnapshotInUse, UnknownTemplate):
                self._snapshots.remove(digest)
        elif (held := self._snapshots.hold(digest, alone=True)) is not None:
            self._snapshots.abandon(digest)
            os.close(held)
        return not path.exists()


def _inside(slots: SlotPool, number: int, running: Sequence[Seen]) -> list[Seen]:
    """The processes of slot ``number``. A container may have a slot of this number as well, and processes of its uid:
    what lives in another network namespace than ours of that name is not ours."""
    try:
        netns = (NETNS_DIR / slot(number).netns).stat().st_ino
    except OSError:
        netns = None
    if netns is None and slots.owner(number) is None:
        return []
    return [p for p in running if _slot_of(p) == number and (netns is None or p.netns == netns)]


def _loose(slots: SlotPool, number: int, inside: Sequence[Seen]) -> str | None:
    """Why slot ``number``, with these processes in it, is nobody's; None when it is somebody's."""
    if slots.held(number):
        return None
    owner = slots.owner(number)
    if not inside:
        return "no living process holds it, and none lives there"
    if not owner:
        return "processes live there that no VM is known of"
    directory = Path(owner)
    if not directory.exists():
        return "processes live there whose VM is gone"
    if (lock := _try(directory)) is None:
        return None  # its owner lives, but uses no slots itself
    os.close(lock)
    try:
        told = _told(directory)
    except FileNotFoundError:
        return "the start of its VM was cut short"
    if told is None:
        return None  # its jailer knows until when it may live
    if not told.among(inside):
        return "processes live there that are not its VM's"
    return "its VM's time to live has passed" if told.expires_at <= time.time() else None


def _groups(cgroups: Cgroups) -> Iterator[Orphan]:
    """Control groups of no slot: of a try-out that was killed, or of a number that slots do not have."""
    marks: dict[str, str] = {}
    for hierarchy in cgroups.hierarchies:
        for path in _entries(hierarchy.path / GROUP):
            maker = _TRIED_BY.fullmatch(path.name)
            strange = path.name.isdecimal() and int(path.name) >= SLOTS
            if strange or (maker and start_ticks(int(maker[1])) is None):
                marks[path.name] = marks.get(path.name, "") + f"{_mark(path)} "
    for name, mark in marks.items():
        if not cgroups.pids(name):
            yield Orphan("group", name, mark, "it is of no slot, and empty")


def _jailers(running: Sequence[Seen]) -> Iterator[Orphan]:
    """Jailers whose engine is gone and that watch nothing: they should have ended by themselves."""
    for process in running:
        if (
            process.name == _JAILER
            and process.uid == 0
            and process.pid not in processes.watches(process.parent)
            and not processes.watches(process.pid)
        ):
            yield Orphan("jailer", str(process.pid), str(process.ticks), "it has no engine and watches no VM")


def _abandoned(path: Path) -> str | None:
    """Why a draft is nobody's; None when its maker may live."""
    if path.name.startswith("removed-"):
        return "its removal was cut short"
    if path.name.startswith("snapshot-"):
        return "its maker has ended" if _lockable(path) else None
    if path.name.startswith("vm-") and (lock := _try(path)) is not None:
        os.close(lock)
        return "the start of its VM was cut short"
    return None


def _lockable(path: Path) -> bool:
    """Whether nobody holds a directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


async def _still(pid: int, ticks: str) -> list[Seen]:
    running = await asyncio.to_thread(processes.seen)
    return [process for process in running if process.pid == pid and str(process.ticks) == ticks]


def _told(directory: Path) -> _Told | None:
    """What a VM's record says, None when it cannot be read. FileNotFoundError when there is none."""
    try:
        return msgspec.json.decode((directory / RECORD).read_bytes(), type=_Told)
    except msgspec.DecodeError:
        return None


def _slot_of(process: Seen) -> int:
    """The slot whose uid a process has, or -1."""
    number = process.uid - UID_BASE
    return number if 0 <= number < SLOTS else -1


def _entries(directory: Path) -> list[Path]:
    """The directories in one, by name; none when there is none."""
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []


def _try(directory: Path) -> int | None:
    with contextlib.suppress(OSError):
        return try_lock(directory)
    return None


def _mark(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(path.stat().st_ino)
    return ""


def _tell(what: str, orphan: Orphan, why: str) -> None:
    _log.warning("%s kind=%s name=%s mark=%s why=%r", what, orphan.kind, orphan.name, orphan.mark, why)
