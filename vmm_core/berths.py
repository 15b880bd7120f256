"""Berths: the places VMs run in. A berth is a numbered slot of the host and a cell that waits in it.

    prepared ahead ──take──► a VM's ──give_back──► cell and groups gone, slot scrubbed, used again

On a host without the rights for slots and jails a berth is a plain process on the host's own network
(``microvm doctor`` says what is missing).
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec

from vmm_core import processes
from vmm_core.cgroup import Limits
from vmm_core.errors import HostUnfit, VmmError
from vmm_core.jail import Cell, CellSpec, Jailer
from vmm_core.machine import MachineSpec, Network
from vmm_core.network import host, user
from vmm_core.network.addresses import Slot
from vmm_core.network.slots import SlotPool

READY = 8
_SLOTS_AHEAD = 4
# Forks under way shall not share the CPUs with the preparation of their successors: those wait, but not for ever.
_PATIENCE_SECONDS = 3.0
_UNJAILED_UID = 65534


class Berth(msgspec.Struct, frozen=True):
    """Where one VM runs. ``slot`` is None for a plain process; ``tap`` is a descriptor of the slot's, while wired."""

    cell: Cell
    limits: Limits
    slot: Slot | None = None
    tap: int | None = None


class Berths:
    """Hands berths out and takes them back. Made by ``open_berths``."""

    def __init__(self, jailer: Jailer, slots: SlotPool | None, *, kvm: bool) -> None:
        self.jailer = jailer
        self.slots = slots
        self._kvm = kvm
        self._ready: deque[Berth] = deque()
        self._usual: Limits | None = None
        self._filling: asyncio.Task[None] | None = None
        self._starting = 0
        self._calmed = asyncio.Event()
        self._calmed.set()

    def check(self, network: Network) -> None:
        """Raise BadRequest, naming what is wrong, unless a VM here can have this network."""
        if self.slots is None:
            user.check(network)
        else:
            self.slots.check(network)

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncGenerator[None]:
        """A VM starts within: what is not needed at once waits a little."""
        self._starting += 1
        self._calmed.clear()
        try:
            yield
        finally:
            self._starting -= 1
            if not self._starting:
                self._calmed.set()

    async def take(self, machine: MachineSpec, owner: Path) -> Berth:
        """A berth for the VM in the directory ``owner``, from those prepared where there is one. Raises HostUnfit."""
        berth = await self._take(limits_of(machine))
        if self.slots is not None and berth.slot is not None:
            self.slots.assign(berth.slot, str(owner))
        return berth

    async def adopt(self, number: int, owner: Path, network: Network) -> Slot | None:
        """The slot of a VM that outlived its service. Raises BadRequest when it is not that VM's."""
        return None if self.slots is None else await self.slots.adopt(number, str(owner), network)

    @contextlib.asynccontextmanager
    async def wired(self, berth: Berth, network: Network) -> AsyncGenerator[Berth]:
        """The berth with a descriptor of its slot's tap, for a VMM to be started with."""
        if self.slots is None or berth.slot is None or network.mode == "none":
            yield berth
            return
        tap = await self.slots.tap_fd(berth.slot)
        try:
            yield msgspec.structs.replace(berth, tap=tap)
        finally:
            os.close(tap)

    async def open(self, berth: Berth, network: Network) -> None:
        """Let what runs there reach what ``network`` says, and nothing else."""
        if self.slots is not None and berth.slot is not None:
            await self.slots.open_to(berth.slot, network)

    async def give_back(self, berth: Berth) -> None:
        """Nothing runs in it any more, or nothing ever did."""
        await berth.cell.discard()
        await self.release(berth.slot)

    async def release(self, slot: Slot | None) -> None:
        """Give the slot of an ended VM back, with its control groups."""
        if slot is None:
            return
        with contextlib.suppress(OSError, TimeoutError):
            await self.jailer.cgroups.remove(slot.number)
        if self.slots is not None:
            await self.slots.give_back(slot)

    async def clear(self, owner: Path, number: int | None) -> None:
        """End what still runs for the VM in ``owner``, which nobody owns, and give its slot back.

        ``number`` is the slot its record names; None: it has none, so all claims are looked at.
        """
        if self.slots is None:
            return
        for claimed in self.slots.claimed_for(str(owner)) if number is None else [number]:
            place = await self.slots.adopt(claimed, str(owner))
            await processes.end(await asyncio.to_thread(processes.of_uid, place.uid))
            await self.release(place)

    async def close(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        await asyncio.gather(*(self.give_back(berth) for berth in self._ready), return_exceptions=True)
        self._ready.clear()

    async def _take(self, limits: Limits) -> Berth:
        self._usual = limits
        self._fill_soon()
        while self._ready:
            berth = self._ready.popleft()
            if berth.cell.waiting:
                if berth.limits != limits:
                    berth.cell.fit(limits)
                return msgspec.structs.replace(berth, limits=limits)
            await self.give_back(berth)
        return await self._prepare(limits)

    async def _prepare(self, limits: Limits) -> Berth:
        if self.slots is None:
            cell = await self.jailer.prepare(CellSpec(number=0, uid=_UNJAILED_UID, limits=limits))
            return Berth(cell=cell, limits=limits)
        slot = await self.slots.take()
        try:
            spec = CellSpec(number=slot.number, uid=slot.uid, limits=limits, netns=slot.netns, kvm=self._kvm)
            cell = await self.jailer.prepare(spec)
        except BaseException:
            await self.release(slot)
            raise
        return Berth(cell=cell, limits=limits, slot=slot)

    def _fill_soon(self) -> None:
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill(), name="berths")

    async def _fill(self) -> None:
        """Prepare berths of the usual shape, one after the other. A failure is left for ``take`` to tell."""
        with contextlib.suppress(VmmError):
            while self._usual is not None and len(self._ready) < READY:
                await self._calm()
                self._ready.append(await self._prepare(self._usual))

    async def _calm(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._calmed.wait()


@contextlib.asynccontextmanager
async def open_berths(
    data_dir: Path,
    program: str,
    *,
    kvm: bool,
    slots: bool | None = None,
    resolvers: Sequence[str] | None = None,
) -> AsyncGenerator[Berths]:
    """The berths of this host for VMMs of ``program``. ``slots``: whether to use network slots and jails
    (None: where the host can; True: HostUnfit where it cannot)."""
    async with contextlib.AsyncExitStack() as stack:
        why = "plain processes were asked for" if slots is False else await host.usable()
        jailer = await Jailer.open(data_dir, program, unless=why)
        stack.push_async_callback(jailer.close)
        if why is None and not jailer.jailed:
            why = jailer.why
        if why is not None and slots:
            raise HostUnfit(f"network slots and jails cannot be used on this host: {why}")
        pool = (
            None
            if why is not None
            else await stack.enter_async_context(SlotPool.open(_SLOTS_AHEAD, resolvers=resolvers))
        )
        berths = Berths(jailer, pool, kvm=kvm)
        try:
            yield berths
        finally:
            await berths.close()


def limits_of(machine: MachineSpec) -> Limits:
    return Limits(vcpus=machine.vcpus, memory_mib=machine.memory_mib, disk_mib=machine.disk_mib)
