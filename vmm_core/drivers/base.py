"""What the engine asks of a hypervisor: ``Driver`` starts VMMs, ``Vm`` is one of them."""

from pathlib import Path
from typing import Protocol

import msgspec

from vmm_core.machine import Accel, BootImage, EgressRule, MachineSpec, VmExit


class DriverInfo(msgspec.Struct, frozen=True):
    """What a driver is and can do on this host. ``cpu_model`` names the CPU a snapshot is tied to."""

    name: str
    version: str
    binary: str


class Place(msgspec.Struct, frozen=True):
    """Where a VM lives: its directory (holding ``disk.img``) and what its network is open to."""

    id: str
    directory: Path
    allow: tuple[EgressRule, ...] = ()


class Saved(msgspec.Struct, frozen=True):
    """The files of a snapshot as a driver wrote them, with what a restore must match."""

    argv_digest: str
    cpu_model: str
    vmm_version: str


class Vm(Protocol):
    """One VMM process and the machine in it."""

    @property
    def pid(self) -> int: ...
    @property
    def start_ticks(self) -> int: ...
    @property
    def agent_socket(self) -> Path: ...

    async def save(self, directory: Path) -> Saved:
        """Stop the machine for good and write ``memory.img``, ``state.bin`` and ``disk.img`` to ``directory``."""
        ...

    async def wait(self) -> VmExit:
        """How the VMM ended, once it has."""
        ...

    async def kill(self) -> None:
        """End the VMM now; returns when its memory is back. Safe to call again."""
        ...

    async def detach(self) -> None:
        """Forget the VMM and leave it running."""
        ...


class Driver(Protocol):
    @property
    def info(self) -> DriverInfo: ...

    async def boot(self, place: Place, machine: MachineSpec, image: BootImage, accel: Accel) -> Vm:
        """Start a fresh machine; returns when its VMM runs, before the guest has booted."""
        ...

    async def restore(self, place: Place, machine: MachineSpec, accel: Accel, memory: int, state: Path) -> Vm:
        """Start a clone from the sealed memory ``memory`` (a descriptor) and the device state; it runs on by itself."""
        ...

    def adopt(self, place: Place, pid: int, start_ticks: int) -> Vm | None:
        """Take over a VMM that another process started; None when it has ended."""
        ...

    def snapshot_fits(self, machine: MachineSpec, accel: Accel, saved: Saved) -> str | None:
        """Why a snapshot cannot be restored here, in one sentence; None when it can."""
        ...
