"""What the engine asks of a hypervisor: ``Driver`` starts VMMs, ``Vm`` is one of them."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import msgspec

from vmm_core.berths import Berth
from vmm_core.machine import Accel, BootImage, MachineSpec, Network, StateKind, VmExit

# The files of a snapshot, and the sockets in a VM's directory.
DISK, MEMORY, STATE, SUMS = "disk.img", "memory.img", "state.bin", "memory.sums"
AGENT_SOCKET, QMP_SOCKET, CONSOLE_SOCKET = "agent.sock", "qmp.sock", "console.sock"


@contextlib.contextmanager
def short_path(path: Path) -> Generator[str]:
    """An address for a Unix socket at ``path`` that fits 108 bytes, however long the path is."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


class DriverInfo(msgspec.Struct, frozen=True):
    """Which VMM a driver runs: its version as the VMM tells it, and the program's path."""

    name: str
    version: str
    binary: str


class Place(msgspec.Struct, frozen=True):
    """Where a VM lives: its directory (holding ``disk.img``), its network, and until when (Unix seconds)."""

    id: str
    directory: Path
    network: Network = Network()
    expires_at: float = 0.0


class Saved(msgspec.Struct, frozen=True):
    """The files of a snapshot as a driver wrote them, with what a restore must match."""

    argv_digest: str
    cpu_model: str
    vmm_version: str
    state: StateKind = "migration"


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

    async def pause(self) -> None:
        """Stop the machine for a moment; its memory, disk and devices stay as they are until ``resume``."""
        ...

    async def resume(self) -> None:
        """Let a paused machine go on; nothing happens to one that runs."""
        ...

    async def save_devices(self, directory: Path) -> None:
        """Write ``state.bin`` of a paused machine, its devices alone, to ``directory``. It may be resumed then."""
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

    async def boot(
        self, place: Place, berth: Berth, machine: MachineSpec, image: BootImage, accel: Accel
    ) -> Vm:
        """Start a fresh machine; returns when its VMM runs, before the guest has booted."""
        ...

    async def restore(
        self,
        place: Place,
        berth: Berth,
        machine: MachineSpec,
        accel: Accel,
        memory: int,
        state: Path,
        kind: StateKind,
    ) -> Vm:
        """Start a clone from the sealed memory ``memory`` (a descriptor) and the device state; it runs on by itself."""
        ...

    def adopt(self, place: Place, pid: int, start_ticks: int) -> Vm | None:
        """Take over a VMM that another process started; None when it has ended."""
        ...

    def fingerprint(self, machine: MachineSpec, accel: Accel) -> Saved:
        """What a snapshot of a machine started here and now will be tied to."""
        ...

    def snapshot_fits(self, machine: MachineSpec, accel: Accel, saved: Saved) -> str | None:
        """Why a snapshot cannot be restored here, in one sentence; None when it can."""
        ...
