"""Decides between KVM and software emulation by a real boot, because /dev/kvm can exist and not work."""

import asyncio
import hashlib
import os
import platform
import time
from pathlib import Path

import msgspec

from vmm_core.drivers.base import DriverInfo
from vmm_core.machine import Accel, BootImage
from vmm_core.process import VmmProcess, new_log

PROBE_SECONDS = 4.0
_LOOK_SECONDS = 0.02
_HEARD = b"Linux version"


class AccelChoice(msgspec.Struct, frozen=True):
    """Which acceleration this host gets, and why in one sentence. ``key`` is what the choice was made for."""

    accel: Accel
    why: str
    key: str


async def choose(driver: DriverInfo, image: BootImage, cache: Path) -> AccelChoice:
    """KVM when the kernel of ``image`` prints its first line under it within seconds; the answer is cached.

    The cache holds for this QEMU, host kernel and guest kernel.
    """
    obstacle = kvm_obstacle()
    if obstacle is not None:
        return AccelChoice(accel="tcg", why=obstacle, key="")
    key = _key(driver, image)
    known = cached(cache)
    if known is not None and known.key == key:
        return known
    heard = await _probe(driver, image)
    choice = AccelChoice(
        accel="kvm" if heard else "tcg",
        why="a kernel booted under KVM"
        if heard
        else f"/dev/kvm is there, but a kernel printed nothing under it within {PROBE_SECONDS:.0f} s",
        key=key,
    )
    cache.parent.mkdir(parents=True, exist_ok=True)
    draft = cache.with_suffix(f".{os.getpid()}")
    draft.write_bytes(msgspec.json.encode(choice))
    draft.replace(cache)
    return choice


def kvm_obstacle() -> str | None:
    """Why KVM cannot even be tried; None when it can."""
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm: virtualization is off in the firmware, or this is a VM without nesting"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no permission for /dev/kvm: run as root or join the group kvm"
    return None


def cached(cache: Path) -> AccelChoice | None:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=AccelChoice)
    except (OSError, msgspec.DecodeError):
        return None


def _key(driver: DriverInfo, image: BootImage) -> str:
    kernel = image.kernel.stat()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    facts = f"{driver.version} {platform.release()} {kernel.st_size} {boot}"
    return hashlib.sha256(facts.encode()).hexdigest()


async def _probe(driver: DriverInfo, image: BootImage) -> bool:
    said = new_log()
    try:
        process = VmmProcess.spawn(
            [
                driver.binary,
                *("-M", "microvm,x-option-roms=off,rtc=on,acpi=on"),
                *("-accel", "kvm", "-cpu", "host", "-m", "256M"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
                *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
                *("-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=t rdinit=/probe-only"),
            ],
            cwd=Path("/"),
            stdout=said,
        )
        try:
            return await _hears(process, said)
        finally:
            await process.end()
            process.close()
    finally:
        os.close(said)


async def _hears(process: VmmProcess, said: int) -> bool:
    deadline = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < deadline:
        ended = not process.running
        if _HEARD in os.pread(said, os.fstat(said).st_size, 0):
            return True
        if ended:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return False
