"""One reading of what runs on this host, and the end of what is seen there."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vmm_core.errors import VmmProtocolError
from vmm_core.process import VmmProcess, start_ticks

_PROC = Path("/proc")


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
    found: list[Seen] = []
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, LookupError, ValueError):
                found.append(_read(entry))
    return found


def of_uid(uid: int) -> list[Seen]:
    """The processes that have this real uid. Blocking."""
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


def _read(entry: Path) -> Seen:
    pid = int(entry.name)
    fields = dict(
        line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line
    )
    ticks = start_ticks(pid)
    if ticks is None or fields["State"].startswith(("Z", "X")):
        raise LookupError(pid)
    cwd = ""
    with contextlib.suppress(OSError):
        cwd = str((entry / "cwd").readlink())
    netns = 0
    with contextlib.suppress(OSError):
        netns = (entry / "ns/net").stat().st_ino
    uid = int(fields["Uid"].split()[0])
    return Seen(pid, ticks, int(fields["PPid"]), uid, fields["Name"], cwd, netns)
