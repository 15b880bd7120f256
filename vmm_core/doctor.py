"""What this host offers for microVMs, fact by fact, with what to do about each lack."""

import os
from pathlib import Path

import msgspec

from vmm_core import accel
from vmm_core.cgroup import Cgroups
from vmm_core.disk import LOOP_POOL_MIN, RESERVE_BYTES, open_pool
from vmm_core.drivers.base import DriverInfo
from vmm_core.drivers.qemu import find_qemu
from vmm_core.errors import VmmError
from vmm_core.jail import Jailer
from vmm_core.machine import BootImage
from vmm_core.network import host
from vmm_core.network.addresses import SLOTS

_LOW_MEMORY_MIB = 1024


class Finding(msgspec.Struct, frozen=True):
    """``ok`` is True, False (VMs cannot run, or not safely), or None (they run, but less well)."""

    name: str
    ok: bool | None
    detail: str
    advice: str = ""


async def check(data_dir: Path) -> list[Finding]:
    """Every finding about this host and this data directory (its pool is made and mounted if need be)."""
    qemu, driver = _qemu()
    return [
        qemu,
        *([] if driver is None else [await _acceleration(driver, data_dir)]),
        await _pool(data_dir),
        _memory(),
        _rights(),
        await _network(),
        *([_cgroup(None)] if driver is None else await _jail(driver, data_dir)),
    ]


def _qemu() -> tuple[Finding, DriverInfo | None]:
    try:
        info = find_qemu()
    except VmmError as error:
        return Finding("vmm", False, str(error), "apt-get install qemu-system-x86"), None
    return Finding("vmm", True, f"QEMU {info.version} ({info.binary})"), info


async def _acceleration(driver: DriverInfo, data_dir: Path) -> Finding:
    obstacle = accel.kvm_obstacle()
    if obstacle is not None:
        return Finding(
            "acceleration", None, f"software emulation: {obstacle}", "jobs run, about ten times slower"
        )
    image = _any_kernel(data_dir)
    if image is None:
        return Finding(
            "acceleration",
            None,
            "/dev/kvm is there; not yet tried, for want of a kernel",
            "bake a template: microvm bake minimal",
        )
    choice = await accel.choose(driver, image, data_dir / "cache" / "accel.json")
    if choice.accel == "kvm":
        return Finding("acceleration", True, f"KVM: {choice.why}")
    return Finding(
        "acceleration",
        None,
        f"software emulation: {choice.why}",
        "use a host with real or nested virtualization for speed",
    )


def _any_kernel(data_dir: Path) -> BootImage | None:
    """A kernel some bake left in the cache, newest first."""
    for kernel in sorted(
        data_dir.glob("cache/**/vmlinux"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        initrd = kernel.with_name("initrd.img")
        if initrd.exists():
            return BootImage(kernel=kernel, initrd=initrd, disk=Path(os.devnull))
    return None


async def _pool(data_dir: Path) -> Finding:
    try:
        async with open_pool(data_dir) as pool:
            free = pool.free_bytes()
            detail = f"{pool.root}: {_KINDS[pool.kind]}, {free >> 20} MiB free"
            if free < RESERVE_BYTES:
                return Finding(
                    "pool", False, detail, "remove templates or enlarge the disk: nothing new is started"
                )
            if pool.kind == "copy":
                return Finding("pool", None, detail, pool.note)
            if free < LOOP_POOL_MIN:
                return Finding("pool", None, detail, "room for few VMs only")
            return Finding("pool", True, detail)
    except VmmError as error:
        return Finding("pool", False, str(error))


_KINDS = {
    "reflink": "shares blocks",
    "xfs-loop": "shares blocks on an XFS of its own in a loop file",
    "copy": "cannot share blocks, every fork copies its disk",
}


def _memory() -> Finding:
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(facts[key].split()[0]) >> 10 for key in ("MemAvailable", "MemTotal"))
    detail = f"{available} of {total} MiB available"
    if available < _LOW_MEMORY_MIB:
        return Finding("memory", None, detail, "room for few VMs only")
    return Finding("memory", True, detail)


def _rights() -> Finding:
    if os.geteuid() == 0:
        return Finding("rights", True, "root")
    return Finding(
        "rights", None, f"uid {os.geteuid()}", "without root: no loop pool, no bakes, no slots, no jails"
    )


async def _network() -> Finding:
    why = await host.usable()
    if why is None:
        return Finding(
            "network",
            True,
            f"slots: up to {SLOTS} VMs with a namespace, a tap and firewall rules each; every egress policy",
        )
    return Finding(
        "network",
        None,
        f"user-mode, because {why}: VMs are closed but for the hosts a template or a fork names, each a relayed "
        "TCP port; no 'internet', no addresses, no limit of bandwidth",
        "give the service the rights for slots: run it as root with nftables and /dev/net/tun",
    )


async def _jail(driver: DriverInfo, data_dir: Path) -> list[Finding]:
    """Tried out with a cell that is made and thrown away."""
    jailer = await Jailer.open(data_dir, driver.binary)
    try:
        if not jailer.jailed:
            advice = (
                "run the service as root: a guest that takes its VMM over then holds nothing but its own VM"
            )
            return [Finding("jail", None, jailer.describe(), advice), _cgroup(None)]
        return [Finding("jail", True, jailer.describe()), _cgroup(jailer.cgroups)]
    finally:
        await jailer.close()


def _cgroup(groups: Cgroups | None) -> Finding:
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    if groups is None or groups.missing:
        detail = groups.describe() if groups is not None else "VMs run in the control group of the service"
        return Finding("cgroup", None, detail, "VMs share what is not limited: keep [runners] max_vms low")
    if not unified:
        advice = "boot the host with cgroup v2 for limits of I/O and of memory that are exact"
        return Finding("cgroup", None, groups.describe(), advice)
    return Finding("cgroup", True, groups.describe())
