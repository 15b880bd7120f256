"""What a job could have left on this host: looked for before and after, and compared.

A running engine keeps slots and cells ready for the next VM: they are no leftovers. They are told by their claims,
which a living process holds for nobody yet; those of a VM that lives are told by its directory.
"""

import asyncio
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from vmm_core import cgroup, processes
from vmm_core.engine import Engine
from vmm_core.network.addresses import SLOTS, UID_BASE, number_of_address, number_of_name
from vmm_core.network.claims import RUN_DIR, Claims
from vmm_core.network.firewall import TABLE
from vmm_core.processes import Seen

_NAMES = Path("/run/netns")
_SECONDS = 5.0


class Leftovers:
    """One look at the host. ``since`` names what is there now and was not before."""

    def __init__(self, found: dict[str, set[str]]) -> None:
        self.found = found

    @classmethod
    def look(cls, engine: Engine) -> Self:
        slots = _Slots()
        running = processes.seen()
        searches: dict[str, Callable[[], set[str]]] = {
            "process": lambda: _processes(engine.pool.vms, running, slots),
            "jailer": lambda: _idle_jailers(running),
            "claim": slots.stale,
            "control group": lambda: _groups(slots),
            "firewall element": lambda: _elements(slots),
            "mount": lambda: _mounts(slots),
            "network namespace": lambda: _namespaces(running, slots),
            "network device": lambda: {name for name in os.listdir("/sys/class/net") if not slots.fine(name)},
            "disk or directory": lambda: {str(path) for path in engine.pool.vms.iterdir()},
            "draft": lambda: {str(path) for path in engine.pool.staging.iterdir()},
            "socket": lambda: _sockets(running, slots),
            "loop device": lambda: {path.parent.name for path in Path("/sys/block").glob("loop*/loop")},
        }
        return cls({kind: search() for kind, search in searches.items()})

    def since(self, before: "Leftovers") -> list[str]:
        return [
            f"{kind}: {thing}"
            for kind, things in self.found.items()
            for thing in sorted(things - before.found[kind])
        ]

    @classmethod
    async def lasting(cls, engine: Engine, before: "Leftovers") -> list[str]:
        """What is left since then and stays: a slot that was given back is scrubbed in the background."""
        deadline = time.monotonic() + _SECONDS
        while (left := cls.look(engine).since(before)) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        return left


class _Slots:
    """Which slots are as they should be: held by a living process, for nobody yet or for a VM that is there."""

    def __init__(self) -> None:
        self._claims = Claims(RUN_DIR) if (RUN_DIR / "slots").is_dir() else None
        self._known: dict[int, bool] = {}

    def fine(self, name: str) -> bool:
        """Whether ``name`` is one of a slot that is as it should be."""
        number = number_of_name(name)
        return number is not None and self.is_fine(number)

    def is_fine(self, number: int) -> bool:
        if number not in self._known:
            self._known[number] = self._claims is not None and self._is_fine(self._claims, number)
        return self._known[number]

    @staticmethod
    def _is_fine(claims: Claims, number: int) -> bool:
        owner = claims.owner(number)
        # A VM that waits for adoption has its slot, too.
        return (owner == "" and claims.locked(number)) or (bool(owner) and Path(owner or "").is_dir())

    def stale(self) -> set[str]:
        numbers = self._claims.numbers() if self._claims is not None else []
        return {f"slot {number} {self._told(number)}" for number in numbers if not self.is_fine(number)}

    def _told(self, number: int) -> str:
        claims = self._claims
        if claims is None:
            return ""
        return f"of {claims.owner(number)!r}, {'held' if claims.locked(number) else 'not held'}"


def _processes(vms: Path, running: Sequence[Seen], slots: _Slots) -> set[str]:
    """Processes that work in a VM's directory, were started for it, or have the uid of a slot: VMMs, cells, relays."""
    found: set[str] = set()
    for process in running:
        try:
            command = (
                Path(f"/proc/{process.pid}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode("utf-8", "replace")
            )
        except OSError:
            continue
        number = process.uid - UID_BASE
        jailed = 0 <= number < SLOTS and not slots.is_fine(number)
        if jailed or process.cwd.startswith(f"{vms}/") or f"{vms}/" in command:
            found.add(f"{process.pid} {command[:120]}")
    return found


def _idle_jailers(running: Sequence[Seen]) -> set[str]:
    """Jailers that nobody waits for and that watch nobody."""
    return {
        str(process.pid)
        for process in running
        if process.name == "microvm-jailer"
        and process.pid not in processes.watches(process.parent)
        and not processes.watches(process.pid)
    }


def _groups(slots: _Slots) -> set[str]:
    return {
        str(path)
        for hierarchy in cgroup.mounted(Path("/proc/self/mountinfo").read_text())
        for path in (hierarchy.path / cgroup.GROUP).glob("*/")
        if not (path.name.isdecimal() and slots.is_fine(int(path.name)))
    }


def _elements(slots: _Slots) -> set[str]:
    """Slots that the firewall has elements of; none when there is no table, or no nft."""
    try:
        command = ["nft", "list", "table", "inet", TABLE]
        listing = subprocess.run(command, capture_output=True, check=True, timeout=20, text=True).stdout
    except (OSError, subprocess.SubprocessError):
        return set()
    numbers = {number_of_name(name) for name in re.findall(r"\bmv-\d+\b", listing)}
    numbers |= {number_of_address(text) for text in re.findall(r"\b\d+(?:\.\d+){3}\b(?!/)", listing)}
    return {f"slot {number}" for number in numbers if number is not None and not slots.is_fine(number)}


def _mounts(slots: _Slots) -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if not slots.fine(Path(line.split()[4]).name)}


def _namespaces(running: Sequence[Seen], slots: _Slots) -> set[str]:
    """Every network namespace a process lives in or a name stands for."""
    names = [path for path in _NAMES.glob("*") if not slots.fine(path.name)]
    fine: set[int] = set()
    for path in _NAMES.glob("mv-*"):
        with contextlib.suppress(FileNotFoundError):  # it went between two looks
            if slots.fine(path.name):
                fine.add(path.stat().st_ino)
    lived_in = {process.netns for process in running} - fine - {0}
    return {f"name {path.name}" for path in names} | {f"inode {inode}" for inode in lived_in}


def _sockets(running: Sequence[Seen], slots: _Slots) -> set[str]:
    """Unix sockets of VMMs by inode; they are bound through a short path, so only the last part is known.

    Those of a VMM in a slot that is as it should be are its own."""
    found: set[str] = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[7].endswith(("/agent.sock", "/qmp.sock", "/console.sock")):
            found.add(f"inode {fields[6]} {fields[7]}")
    if not found:
        return found
    inhabitants = [
        p.pid for p in running if 0 <= p.uid - UID_BASE < SLOTS and slots.is_fine(p.uid - UID_BASE)
    ]
    theirs = set[str]().union(*map(_socket_inodes, inhabitants))
    return {socket for socket in found if socket.split()[1] not in theirs}


def _socket_inodes(pid: int) -> set[str]:
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return set()
    return {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
