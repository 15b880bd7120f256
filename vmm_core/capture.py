"""One instant of a running machine, taken in one short pause: its memory, its devices and its disk.

before: what its memory file holds is copied, its disk is brought to storage   (it runs)
pause:  private pages → devices → disk, by sharing its blocks                  (it stands still)
after:  it runs on, or stays paused, as asked; on any failure it runs on
"""

import asyncio
import contextlib
import errno
import os
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from vmm_core.disk import clone_file, copy_exactly, data_extents, write_back
from vmm_core.drivers.base import DISK, MEMORY, STATE, SUMS
from vmm_core.errors import PoolFull, VmDied, VmmError
from vmm_core.guest_memory import Copy, GuestMemory
from vmm_core.machine import VmExit
from vmm_core.memory import Ranges, sums_of, sums_with, write_ranges
from vmm_core.snapshot import sync
from vmm_core.vm import RunningVm

T = TypeVar("T")

_BACKGROUND_NICE = 19
_RESUMES, _RESUME_PAUSE = 3, 0.1


class Captured(msgspec.Struct, frozen=True):
    """The memory of that instant (a descriptor, the caller's), which ranges of it are the machine's own, and for how
    long it stood still. Its devices and its disk are files.

    ``base``: a descriptor, the caller's too, of the memory that all but the private ranges came from, where
    ``memory`` is the image ``memory.img`` of the draft; -1 where it is a sealed memory by itself.
    """

    memory: int
    base: int
    size: int
    private: Ranges
    pause_ms: float

    @property
    def private_bytes(self) -> int:
        return sum(end - start for start, end in self.private)

    def close(self) -> None:
        for fd in (self.memory, self.base):
            if fd >= 0:
                os.close(fd)


class Image(msgspec.Struct, frozen=True):
    """A memory image on disk that others can be made of, with its sums (None for one of an earlier release)."""

    path: Path
    sums: Path | None


class Threads:
    """Threads of our own: a machine that stands still waits for nobody, and nobody waits for what is written later."""

    def __init__(self) -> None:
        self._urgent = ThreadPoolExecutor(4, "capture")
        self._patient = ThreadPoolExecutor(1, "capture-write", _be_nice)

    async def urgent(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._urgent, work)

    async def patient(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._patient, work)

    def close(self) -> None:
        self._urgent.shutdown(wait=False)
        self._patient.shutdown(wait=False)


async def capture(
    vm: RunningVm,
    draft: Path,
    threads: Threads,
    *,
    into: Image | None,
    exact: bool,
    run_on: bool,
    require: Callable[[int], Awaitable[None]],
) -> Captured:
    """Capture ``vm``; its devices and disk go to ``draft``. Not to be cancelled: the machine would stand still.

    The memory is one to run from or, ``into`` a clone of that image, a file of the draft, which takes no more than it
    needs of the pool (``exact``) or is written quickly. ``require`` is told
    beforehand how many MiB it takes. Raises what that raises, PoolFull, VmDied, VmmProtocolError; the machine runs on.
    """
    disk = vm.directory / DISK
    with GuestMemory.of(vm.record.pid, vm.record.machine.memory_mib << 20) as guest:
        image = (
            None if into is None or guest.shared else await threads.urgent(lambda: _clone(into, draft, exact))
        )
        with contextlib.closing(Copy(guest, image)) as copy:
            if image is None:
                shared = os.fstat(guest.file).st_blocks * 512
                await require((shared + await threads.urgent(guest.private_bytes)) >> 20)
                await asyncio.gather(threads.urgent(lambda: _write_back(disk)), threads.urgent(copy.before))
            async with vm.channel.still():
                began = time.perf_counter()
                try:
                    await vm.driver_vm.pause()
                    # The memory first: what the VMM still puts into it belongs to devices that are saved later.
                    with pool_full("its memory"):
                        await threads.urgent(copy.during)
                    with pool_full("its devices and disk"):
                        await vm.driver_vm.save_devices(draft)
                        await threads.urgent(lambda: clone_file(disk, draft / DISK))
                except BaseException:
                    with contextlib.suppress(VmmError):
                        await resume(vm)
                    raise
                if run_on:
                    await resume(vm)
                pause_ms = (time.perf_counter() - began) * 1e3
            base = -1 if image is None else os.dup(guest.file)
            return Captured(copy.finished(), base, guest.size, copy.ranges, pause_ms)


async def resume(vm: RunningVm) -> None:
    """Let a paused machine go on. One that can not is ended: it would stand still for ever. Raises VmDied then."""
    for left in reversed(range(_RESUMES)):
        try:
            await vm.driver_vm.resume()
        except VmmError as error:
            if left == 0:
                vm.end_as(
                    VmExit(kind="destroyed", cause="unknown", reason=f"it could not be resumed: {error}")
                )
                await vm.driver_vm.kill()
                raise VmDied(f"VM {vm.id} was ended because it could not be resumed: {error}") from error
            await asyncio.sleep(_RESUME_PAUSE)
        else:
            return


def write_image(captured: Captured, base: Image | None, directory: Path) -> None:
    """Write ``memory.img``, which shares the blocks of ``base``, to ``directory``, where it is not. Blocking."""
    if captured.base >= 0:
        return
    image = directory / MEMORY
    ranges = captured.private
    with pool_full("its memory"):
        if base is not None:
            fd = _clone(base, directory, exact=True)
        else:
            fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            ranges = data_extents(captured.memory, captured.size)
        try:
            os.ftruncate(fd, captured.size)
            write_ranges(captured.memory, ranges, fd)
        finally:
            os.close(fd)


def write_sums(captured: Captured, base: Image | None, directory: Path) -> None:
    if captured.base < 0:
        sums = sums_of(captured.memory, captured.size)
    else:
        known = base.sums.read_bytes() if base and base.sums else sums_of(captured.base, captured.size)
        sums = sums_with(known, captured.base, captured.memory, captured.private)
    with pool_full("its memory"):
        (directory / SUMS).write_bytes(sums)


def make_durable(directory: Path) -> None:
    """Bring the memory, the disk and the devices to storage, the most first: what follows it waits for little."""
    with pool_full("its memory"):
        for name in (MEMORY, DISK, STATE):
            sync(directory / name)


@contextlib.contextmanager
def pool_full(what: str) -> Generator[None]:
    """A full disk is told as what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PoolFull(
                f"the disk pool has no room for {what}: remove templates (microvm templates), end VMs "
                "(microvm kill), or enlarge its disk"
            ) from error
        raise


def _clone(base: Image, draft: Path, exact: bool) -> int:
    clone_file(base.path, draft / MEMORY)
    fd = os.open(draft / MEMORY, os.O_RDWR | os.O_CLOEXEC)
    if exact:
        copy_exactly(fd)
    return fd


def _write_back(disk: Path) -> None:
    """Sharing a file's blocks waits for what is not on storage yet: the most of it shall not be waited for paused."""
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_back(fd, wait=True)
    finally:
        os.close(fd)


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICE)
