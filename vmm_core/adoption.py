"""Takes over VMs whose service has ended, and clears away those that ended with it.

lock free ─► record ─► VMM alive (pid and start time, this boot of the host) ─► hello ─► slot ─► adopted
               │              │                                                  └ silent: left alone until its TTL
               └── none ──────┴── dead, expired, frozen ──► cleared, its ending kept
"""

import contextlib
import functools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from vmm_core.berths import Berths
from vmm_core.console import Console
from vmm_core.drivers.base import CONSOLE_SOCKET, Driver, Place
from vmm_core.errors import BadRequest, GuestError, GuestTimeout, VmDied, VmmError
from vmm_core.guest.channel import Channel
from vmm_core.ledger import Ledger
from vmm_core.machine import ForkTimings, VmRecord
from vmm_core.record import host_boot, read_record
from vmm_core.start import REVIVE_SECONDS, unless_dead
from vmm_core.vm import Parts, end_processes_in, remove_tree


class Adoption:
    """``is_frozen`` tells of a VM id whether a whole frozen snapshot of it exists."""

    def __init__(
        self,
        driver: Driver,
        ledger: Ledger,
        berths: Callable[[], Awaitable[Berths]],
        is_frozen: Callable[[str], bool],
    ) -> None:
        self._driver = driver
        self._ledger = ledger
        self._berths = berths
        self._is_frozen = is_frozen

    async def adopt_or_clear(self, directory: Path, lock: int) -> Parts | None:
        """What the VM in ``directory`` is made of, or None: it is cleared away, or not ours to end.

        Keeps ``lock`` for an adopted VM, closes it otherwise.
        """
        try:
            parts = await self._adopt(directory, lock)
        except (GuestTimeout, BadRequest, OSError, msgspec.DecodeError):
            os.close(lock)  # slow, its slot another's, or not readable to this release: not ours to end
            return None
        except BaseException:
            os.close(lock)
            raise
        if parts is None:
            await self.clear_dead(directory)
            os.close(lock)
        return parts

    async def clear_dead(self, directory: Path) -> None:
        """Keep how a VM ended that nobody watched, then remove what is left of it."""
        self._ledger.found_dead(directory)
        await self.clear(directory)

    async def clear(self, directory: Path) -> None:
        """Remove what a VM left whose process has ended."""
        end_processes_in(directory)
        with contextlib.suppress(OSError, VmmError):
            slot = None
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                slot = read_record(directory).slot
            await (await self._berths()).clear(directory, slot)
        remove_tree(directory)

    async def _adopt(self, directory: Path, lock: int) -> Parts | None:
        """None when it is dead, expired or was never finished."""
        try:
            record = read_record(directory)
        except FileNotFoundError:
            return None
        if record.host_boot != host_boot():
            return None  # it ended with the host; its pid is somebody else's by now
        place = Place(id=record.id, directory=directory, network=record.machine.network)
        driver_vm = self._driver.adopt(place, record.pid, record.start_ticks)
        if driver_vm is None:
            return None
        try:
            # Both a VM and frozen: a freeze or a thaw was cut short, and what is frozen is whole.
            if record.expires_at <= time.time() or self._is_frozen(record.id):
                await driver_vm.kill()
                return None
            channel = await Channel.connect(driver_vm.agent_socket)
            try:
                await unless_dead(driver_vm, channel.hello(record.id, timeout=REVIVE_SECONDS))
                release = await self._adopt_berth(record, directory)
            except BaseException:
                await channel.close()
                raise
        except (GuestTimeout, BadRequest):
            await driver_vm.detach()  # slow is not dead
            raise
        except (GuestError, VmDied):
            await driver_vm.kill()
            self._ledger.saw(record.id, await driver_vm.wait())
            return None
        return Parts(
            record=record,
            directory=directory,
            driver_vm=driver_vm,
            channel=channel,
            capture=Console(directory, CONSOLE_SOCKET),
            lock=lock,
            release=release,
            timings=ForkTimings(),
        )

    async def _adopt_berth(self, record: VmRecord, directory: Path) -> Callable[[], Awaitable[None]]:
        """Hold the slot of a VM that outlived its service; what gives it back."""
        berths = await self._berths()
        slot = None
        if record.slot is not None:
            slot = await berths.adopt(record.slot, directory, record.machine.network)
        return functools.partial(berths.release, slot)
