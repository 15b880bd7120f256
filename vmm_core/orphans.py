"""How it is known that something on this host is nobody's: the rules of the reaper.

A lock that a living process holds says that a thing is owned: in a VM's directory, on a slot's claim, on a draft or
a capture. What a VM's record says counts as far as any release can read it.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from vmm_core import processes
from vmm_core.cgroup import GROUP, Cgroups
from vmm_core.network.addresses import SLOTS, UID_BASE, slot
from vmm_core.network.host import NETNS_DIR
from vmm_core.network.slots import SlotPool
from vmm_core.process import start_ticks
from vmm_core.processes import Seen
from vmm_core.record import RECORD, host_boot, try_lock

Kind = Literal["vm", "slot", "group", "process", "draft", "capture", "jailer"]

_JAILER = "microvm-jailer"
_TRIED_BY = re.compile(r"probe-(\d+)-[0-9a-f]{8}")


class Orphan(msgspec.Struct, frozen=True):
    """Something that nothing owns, and how that is known. ``mark`` tells it from a later one of its name."""

    kind: Kind
    name: str
    mark: str
    why: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind, self.name, self.mark


class Told(msgspec.Struct):
    """What any release can read of a VM's record."""

    pid: int
    start_ticks: int
    expires_at: float
    host_boot: str = ""

    @property
    def vmm(self) -> Seen | None:
        """Its VMM, if that runs."""
        return processes.one(self.pid, self.start_ticks) if self.host_boot == host_boot() else None


def inside_of(slots: SlotPool, number: int, running: Sequence[Seen]) -> list[Seen]:
    """The processes of slot ``number``. A container may have a slot of this number as well, and processes of its uid:
    what lives in another network namespace than ours of that name is not ours."""
    try:
        netns = (NETNS_DIR / slot(number).netns).stat().st_ino
    except OSError:
        netns = None
    if netns is None and slots.owner(number) is None:
        return []
    return [p for p in running if slot_of(p) == number and (netns is None or p.netns == netns)]


def loose(slots: SlotPool, number: int, inside: Sequence[Seen]) -> str | None:
    """Why slot ``number``, with these processes in it, is nobody's; None when it is somebody's."""
    if slots.held(number):
        return None
    owner = slots.owner(number)
    if not inside:
        said = "nobody has claimed it" if owner is None else "no living process holds it"
        return f"{said}, and nothing lives there"
    if not owner:
        return "processes live there that no VM is known of"
    directory = Path(owner)
    if not directory.exists():
        return "processes live there whose VM is gone"
    if (lock := free_lock(directory)) is None:
        return None  # its owner lives, but uses no slots itself
    os.close(lock)
    try:
        told = read_told(directory)
    except FileNotFoundError:
        return "the start of its VM was cut short"
    if told is None:
        return None  # its jailer knows until when it may live
    if told.vmm is None or told.pid not in {process.pid for process in inside}:
        return "processes live there that are not its VM's"
    return "its VM's time to live has passed" if told.expires_at <= time.time() else None


def groups(cgroups: Cgroups) -> Iterator[Orphan]:
    """Control groups of no slot: of a try-out that was killed, or of a number that slots do not have."""
    marks: dict[str, str] = {}
    for hierarchy in cgroups.hierarchies:
        for path in entries(hierarchy.path / GROUP):
            maker = _TRIED_BY.fullmatch(path.name)
            strange = path.name.isdecimal() and int(path.name) >= SLOTS
            if strange or (maker and start_ticks(int(maker[1])) is None):
                marks[path.name] = marks.get(path.name, "") + f"{mark_of(path)} "
    for name, mark in marks.items():
        if not cgroups.pids(name):
            yield Orphan("group", name, mark, "it is of no slot, and empty")


def jailers(running: Sequence[Seen]) -> Iterator[Orphan]:
    """Jailers whose engine is gone and that watch nothing: they should have ended by themselves."""
    for process in running:
        if (
            process.name == _JAILER
            and process.uid == 0
            and process.pid not in processes.watches(process.parent)
            and not processes.watches(process.pid)
        ):
            yield Orphan("jailer", str(process.pid), str(process.ticks), "it has no engine and watches no VM")


def abandoned(path: Path) -> str | None:
    """Why a draft is nobody's; None when its maker may live."""
    if path.name.startswith("removed-"):
        return "its removal was cut short"
    if path.name.startswith("snapshot-"):
        return "its maker has ended" if _lockable(path) else None
    if path.name.startswith("vm-") and (lock := free_lock(path)) is not None:
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


def read_told(directory: Path) -> Told | None:
    """What a VM's record says, None when it cannot be read. FileNotFoundError when there is none."""
    try:
        return msgspec.json.decode((directory / RECORD).read_bytes(), type=Told)
    except msgspec.DecodeError:
        return None


def slot_of(process: Seen) -> int:
    """The slot whose uid a process has, or -1."""
    number = process.uid - UID_BASE
    return number if 0 <= number < SLOTS else -1


def entries(directory: Path) -> list[Path]:
    """The directories in one, by name; none when there is none."""
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []


def free_lock(directory: Path) -> int | None:
    with contextlib.suppress(OSError):
        return try_lock(directory)
    return None


def mark_of(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return str(path.stat().st_ino)
    return ""
