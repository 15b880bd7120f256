"""What a job could have left on this host: looked for before and after, and compared."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from vmm_core.engine import Engine


class Leftovers:
    """One look at the host. ``since`` names what is there now and was not before."""

    def __init__(self, found: dict[str, set[str]]) -> None:
        self.found = found

    @classmethod
    def look(cls, engine: Engine) -> Self:
        searches: dict[str, Callable[[], set[str]]] = {
            "process": lambda: _processes(engine.pool.vms),
            "mount": lambda: set(Path("/proc/self/mountinfo").read_text().splitlines()),
            "network namespace": _namespaces,
            "network device": lambda: set(os.listdir("/sys/class/net")),
            "disk or directory": lambda: {str(path) for path in engine.pool.vms.iterdir()},
            "draft": lambda: {str(path) for path in engine.pool.staging.iterdir()},
            "socket": _sockets,
            "loop device": lambda: {path.parent.name for path in Path("/sys/block").glob("loop*/loop")},
        }
        return cls({kind: search() for kind, search in searches.items()})

    def since(self, before: "Leftovers") -> list[str]:
        return [
            f"{kind}: {thing}"
            for kind, things in self.found.items()
            for thing in sorted(things - before.found[kind])
        ]


def _processes(vms: Path) -> set[str]:
    """Processes that work in a VM's directory or were started for it: VMMs and relays."""
    found: set[str] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            works_there = os.readlink(entry / "cwd").startswith(f"{vms}/")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if works_there or f"{vms}/" in command:
            found.add(f"{entry.name} {command[:120]}")
    return found


def _namespaces() -> set[str]:
    """Every network namespace a process lives in or a name stands for."""
    named = {f"name {path.name}" for path in Path("/run/netns").glob("*")}
    lived_in: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                lived_in.add(os.readlink(entry / "ns" / "net"))
            except OSError:
                continue
    return named | lived_in


def _sockets() -> set[str]:
    """Unix sockets of VMMs by inode; they are bound through a short path, so only the last part is known."""
    found: set[str] = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[7].endswith(("/agent.sock", "/qmp.sock", "/console.sock")):
            found.add(f"inode {fields[6]} {fields[7]}")
    return found
