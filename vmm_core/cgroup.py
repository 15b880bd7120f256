"""Limits of a VM by control groups: version 2 where the host has its controllers, version 1 as the lesser dialect.

A VM in slot N has the group ``microvm/N`` in every hierarchy used. Which hierarchy holds which controller is
found once; a host in between (some controllers here, some there) is served from both.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

GROUP = "microvm"
_WANTED = ("cpu", "memory", "pids", "io")
_NEEDED = ("cpu", "memory", "pids")
_PERIOD_US = 100_000
# What all VMs together weigh against the rest of the host: left alone, the group of them all would get no more
# than one other service (or, by version 1, than one other process). A fifth stays for the service that serves them.
_ALL_VMS_UNIFIED = ("cpu.weight", "400")
_ALL_VMS_VERSION_1 = ("cpu.shares", str(2 * 1024 * (os.cpu_count() or 1)))
_RELEASE_SECONDS = 5.0


class Limits(msgspec.Struct, frozen=True):
    """What a cell's control groups and rlimits are made from.

    ``vmm_mib`` is what the VMM itself may take beyond the guest's memory (software emulation keeps translated code:
    allow it a GiB). ``cpu_percent`` of one CPU is the quota, 0 meaning all of its vCPUs and half a CPU for the VMM.
    ``cpu_weight`` counts against other VMs (100 is the usual). ``disk_device`` ("8:0") is what ``disk_mbps`` (MB/s)
    and ``disk_iops`` (0: no limit) are counted on; without it they are left to the VMM.
    """

    vcpus: int
    memory_mib: int
    disk_mib: int = 4096
    vmm_mib: int = 1280
    cpu_percent: int = 0
    cpu_weight: int = 100
    disk_mbps: int = 0
    disk_iops: int = 0
    disk_device: str = ""

    @property
    def threads(self) -> int:
        """vCPUs, QEMU's own threads, and its pool of 64 for the disk."""
        return self.vcpus + 96

    @property
    def memory_bytes(self) -> int:
        return (self.memory_mib + self.vmm_mib) << 20

    @property
    def cpu_quota_us(self) -> int:
        return (self.cpu_percent or self.vcpus * 100 + 50) * _PERIOD_US // 100


class Hierarchy(msgspec.Struct, frozen=True):
    """A mounted hierarchy and the controllers of ours that it has. ``unified`` is version 2."""

    path: Path
    unified: bool
    controllers: tuple[str, ...]


class Cgroups(msgspec.Struct, frozen=True):
    """The hierarchies of this host that can be used, and why the others cannot."""

    hierarchies: tuple[Hierarchy, ...]
    obstacles: tuple[str, ...] = ()

    @property
    def controllers(self) -> frozenset[str]:
        return frozenset(name for hierarchy in self.hierarchies for name in hierarchy.controllers)

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that VMs cannot be limited by. I/O is limited by the VMM as well, so it is not counted."""
        return tuple(name for name in _NEEDED if name not in self.controllers)

    def describe(self) -> str:
        """One sentence for ``doctor``."""
        parts = [
            f"{' and '.join(hierarchy.controllers)} by version {2 if hierarchy.unified else 1}"
            for hierarchy in self.hierarchies
        ]
        text = "; ".join(parts) or "no control groups"
        if self.missing:
            text += f"; VMs have no limit of {', '.join(self.missing)}"
        return "; ".join([text, *self.obstacles])

    def plan(self, number: int, limits: Limits) -> list[dict[str, object]]:
        """What a cell does in each hierarchy before it joins; ``root`` is an index into ``hierarchies``."""
        return [
            {
                "root": index,
                "unified": hierarchy.unified,
                "path": f"{GROUP}/{number}",
                "set": settings(hierarchy, limits),
            }
            for index, hierarchy in enumerate(self.hierarchies)
        ]

    def apply(self, number: int, limits: Limits) -> None:
        """Change the limits of a VM's groups. OSError when the kernel refuses."""
        for hierarchy, directory in zip(self.hierarchies, self.group(number), strict=True):
            for name, value in settings(hierarchy, limits):
                (directory / name).write_text(value)

    def group(self, number: int | str) -> list[Path]:
        """The directories of a VM's groups, in every hierarchy."""
        return [hierarchy.path / GROUP / str(number) for hierarchy in self.hierarchies]

    def numbers(self) -> set[int]:
        """The slots that have a group, for the reaper."""
        found: set[int] = set()
        for hierarchy in self.hierarchies:
            with contextlib.suppress(FileNotFoundError):
                entries = (hierarchy.path / GROUP).iterdir()
                found.update(int(entry.name) for entry in entries if entry.name.isdecimal())
        return found

    def pids(self, number: int | str) -> set[int]:
        """The processes in a VM's groups."""
        found: set[int] = set()
        for directory in self.group(number):
            # ENODEV: the group was removed as it was read.
            with contextlib.suppress(OSError):
                found.update(int(line) for line in (directory / "cgroup.procs").read_text().split())
        return found

    def oom_kills(self, number: int) -> int:
        """How many processes of the group the kernel has killed for want of memory."""
        for directory in self.group(number):
            for name in ("memory.events", "memory.oom_control"):
                count = oom_kills_in(directory / name)
                if count is not None:
                    return count
        return 0

    async def remove(self, number: int | str) -> None:
        """Remove a VM's groups; its processes have ended. OSError (EBUSY) when they have not within seconds."""
        for directory in self.group(number):
            pause = 0.001
            async with asyncio.timeout(_RELEASE_SECONDS):
                while True:
                    try:
                        directory.rmdir()
                    except FileNotFoundError:
                        break
                    except OSError as error:
                        if error.errno != errno.EBUSY or pause > 1:
                            raise
                        await asyncio.sleep(pause)
                        pause *= 2
                    else:
                        break


def oom_kills_in(path: Path) -> int | None:
    """The ``oom_kill`` line of memory.events, memory.oom_control or /proc/vmstat; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def settings(hierarchy: Hierarchy, limits: Limits) -> list[tuple[str, str]]:
    """The files of one hierarchy and what is written to them, in order."""
    write = _unified if hierarchy.unified else _version_1
    found = [pair for controller in hierarchy.controllers for pair in write(controller, limits)]
    # Some kernels have no account of swap.
    swap = ("memory.swap.max", "memory.memsw.limit_in_bytes")
    top = hierarchy.path / GROUP
    return [pair for pair in found if pair[0] not in swap or (top / pair[0]).exists()]


def _unified(controller: str, limits: Limits) -> list[tuple[str, str]]:
    match controller:
        case "cpu":
            return [
                ("cpu.weight", str(limits.cpu_weight)),
                ("cpu.max", f"{limits.cpu_quota_us} {_PERIOD_US}"),
            ]
        case "memory":
            return [
                ("memory.max", str(limits.memory_bytes)),
                ("memory.swap.max", "0"),
                ("memory.oom.group", "1"),
            ]
        case "pids":
            return [("pids.max", str(limits.threads))]
        case _:
            return _unified_io(limits)


def _unified_io(limits: Limits) -> list[tuple[str, str]]:
    if not limits.disk_device:
        return []
    rate, count = limits.disk_mbps * 1_000_000 or "max", limits.disk_iops or "max"
    return [("io.max", f"{limits.disk_device} rbps={rate} wbps={rate} riops={count} wiops={count}")]


def _version_1(controller: str, limits: Limits) -> list[tuple[str, str]]:
    match controller:
        case "cpu":
            return [
                ("cpu.shares", str(max(2, limits.cpu_weight * 1024 // 100))),
                ("cpu.cfs_period_us", str(_PERIOD_US)),
                ("cpu.cfs_quota_us", str(limits.cpu_quota_us)),
            ]
        case "memory":
            # Both ways round: the one must never be above the other, and a group may have held another VM.
            return [
                ("memory.memsw.limit_in_bytes", "-1"),
                ("memory.limit_in_bytes", str(limits.memory_bytes)),
                ("memory.memsw.limit_in_bytes", str(limits.memory_bytes)),
            ]
        case _:
            return [("pids.max", str(limits.threads))]


def find(mountinfo: str | None = None) -> Cgroups:
    """The hierarchies of this host, made ready: ``microvm`` exists in each and hands its controllers down."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    usable: list[Hierarchy] = []
    obstacles: list[str] = []
    taken: set[str] = set()
    for hierarchy in mounted(text):
        free = tuple(name for name in hierarchy.controllers if name not in taken)
        if not free:
            continue
        chosen = msgspec.structs.replace(hierarchy, controllers=free)
        try:
            _make_ready(chosen)
        except OSError as error:
            names = ", ".join(free)
            obstacles.append(f"{names} at {hierarchy.path} cannot be used ({error.strerror})")
            continue
        taken.update(free)
        usable.append(chosen)
    return Cgroups(hierarchies=tuple(usable), obstacles=tuple(obstacles))


def mounted(mountinfo: str) -> list[Hierarchy]:
    """The hierarchies in a mount table that have a controller of ours, version 2 first."""
    found: list[Hierarchy] = []
    for line in mountinfo.splitlines():
        place, _, device = line.partition(" - ")
        kind, _, options = device.partition(" ")
        path = Path(place.split()[4].replace("\\040", " "))
        if kind == "cgroup2":
            names = _read_words(path / "cgroup.controllers")
            found.insert(0, Hierarchy(path, unified=True, controllers=_ours(names, _WANTED)))
        elif kind == "cgroup":
            names = options.split()[-1].split(",")
            found.append(Hierarchy(path, unified=False, controllers=_ours(names, _NEEDED)))
    return [hierarchy for hierarchy in found if hierarchy.controllers]


def _ours(names: Iterable[str], wanted: Sequence[str]) -> tuple[str, ...]:
    present = set(names)
    return tuple(name for name in wanted if name in present)


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _make_ready(hierarchy: Hierarchy) -> None:
    top = hierarchy.path / GROUP
    top.mkdir(exist_ok=True)
    if hierarchy.unified:
        wanted = "+" + " +".join(hierarchy.controllers)
        for directory in (hierarchy.path, top):
            if not set(hierarchy.controllers) <= set(_read_words(directory / "cgroup.subtree_control")):
                (directory / "cgroup.subtree_control").write_text(wanted)
    if "cpu" in hierarchy.controllers:
        name, weight = _ALL_VMS_UNIFIED if hierarchy.unified else _ALL_VMS_VERSION_1
        (top / name).write_text(weight)
