"""One reading of what runs on this host, and the end of what is seen there."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vmm_core.errors import VmmProtocolError
from vmm_core.process import VmmProcess, start_ticks

_PROC = Path("/proc")
# Of /proc/PID/status, which tells of a process's memory and signals after that.
_LINES = 12


class Seen(msgspec.Struct, frozen=True):
    """A process. ``ticks`` (its start) tells it from a later one of that pid. ``cwd`` is "" and ``netns`` (the inode
    of its network namespace) 0 where it cannot be read."""

    pid: int
    ticks: int
    parent: int
    uid: int
    name: str
    cwd: str
    netns: int = 0


def seen() -> list[Seen]:
    """Every process that has not ended. Blocking: some 100 µs each."""
    found = (_read(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdecimal())
    return [process for process in found if process is not None]


def one(pid: int, ticks: int) -> Seen | None:
    """The process of this pid and this start; None when it has ended, also when nobody has asked how."""
    found = _read(pid)
    return found if found is not None and found.ticks == ticks else None


def of_uid(uid: int) -> list[Seen]:
    """The processes that have this real uid. Blocking, as ``seen``."""
    return [process for process in seen() if process.uid == uid]


def watches(pid: int) -> set[int]:
    """The processes that ``pid`` holds a pidfd of; nothing for one that has ended."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for entry in (_PROC / str(pid) / "fdinfo").iterdir():
            with contextlib.suppress(OSError, ValueError):
                found.update(
                    int(line[4:]) for line in entry.read_text().splitlines() if line.startswith("Pid:")
                )
    return found - {-1}  # one that has ended


async def end(processes: Iterable[Seen]) -> list[Seen]:
    """Kill these and wait until they are gone; those that did not die, if any."""
    left: list[Seen] = []
    for process in processes:
        running = VmmProcess.adopt(process.pid, process.ticks)
        if running is not None:
            try:
                await running.end()
            except VmmProtocolError:
                left.append(process)
            finally:
                running.close()
    return left


def _read(pid: int) -> Seen | None:
    place = _PROC / str(pid)
    try:
        lines = (place / "status").read_text(errors="replace").splitlines()[:_LINES]
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        ticks = start_ticks(pid)
    except OSError:
        return None
    if ticks is None or fields["State"].startswith(("Z", "X")):
        return None
    cwd, netns = "", 0
    with contextlib.suppress(OSError):
        cwd = str((place / "cwd").readlink())
    with contextlib.suppress(OSError):
        netns = (place / "ns/net").stat().st_ino
    uid = int(fields["Uid"].split()[0])
    return Seen(pid, ticks, int(fields["PPid"]), uid, fields["Name"], cwd, netns)
