"""Starts VMs: fresh ones from a kernel and a disk, clones from a snapshot. A start that fails leaves nothing.

berth ─► place (directory, lock) ─► disk ─► memory ─► VMM ─► channel ─► revive ─► record
          each undone, last first, when a later one fails; the network is opened beside the VMM's start
"""

import asyncio
import contextlib
import errno
import functools
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from vmm_core.berths import Berth, Berths
from vmm_core.console import Console, tail
from vmm_core.disk import Pool, clone_file
from vmm_core.drivers.base import CONSOLE_SOCKET, DISK, STATE, Driver, Place, Vm
from vmm_core.errors import BootFailed, GuestError, HostUnfit, PoolFull, VmDied
from vmm_core.guest.channel import Channel, Revive
from vmm_core.machine import Accel, BootImage, ForkTimings, Identity, MachineSpec, Network, Snapshot, VmRecord
from vmm_core.network.addresses import RESOLVER
from vmm_core.network.egress import virtual_hosts
from vmm_core.record import host_boot, new_identity, try_lock, write_record
from vmm_core.residents import Residents
from vmm_core.vm import Parts, remove_tree

BOOT_SECONDS = 120.0
REVIVE_SECONDS = 30.0

T = TypeVar("T")


class Order(msgspec.Struct, frozen=True):
    """What is to be started. ``disk`` is cloned; ``fresh`` machines boot, the others are clones."""

    machine: MachineSpec
    accel: Accel
    identity: Identity
    disk: Path
    ttl: float
    metadata: Mapping[str, str]
    parent: str | None = None
    template: str | None = None
    fresh: bool = False
    owner: str | None = None


class Starter:
    """Starts the VMs of one engine. ``on_step`` hears the name of each step as it begins."""

    def __init__(
        self,
        pool: Pool,
        driver: Driver,
        residents: Residents,
        berths: Callable[[], Awaitable[Berths]],
        on_step: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._driver = driver
        self._residents = residents
        self._berths = berths
        self._on_step = on_step

    async def boot(
        self, image: BootImage, machine: MachineSpec, accel: Accel, ttl: float, metadata: Mapping[str, str]
    ) -> Parts:
        """A fresh machine. Raises BootFailed, with the end of its console, when it does not come up."""

        async def begin(place: Place, berth: Berth) -> Vm:
            _grow(place.directory / DISK, machine.disk_mib << 20)
            self._on_step("spawn")
            return await self._driver.boot(place, berth, machine, image, accel)

        order = Order(machine, accel, new_identity(), image.disk, ttl, metadata, fresh=True)
        return await self._start(order, begin)

    async def clone(self, snapshot: Snapshot, order: Order) -> Parts:
        """A clone of ``snapshot``, revived."""

        async def begin(place: Place, berth: Berth) -> Vm:
            self._on_step("memory")
            memory = await self._residents.memory_of(snapshot)
            self._on_step("spawn")
            state = snapshot.path / STATE
            return await self._driver.restore(
                place, berth, order.machine, order.accel, memory, state, snapshot.manifest.state
            )

        return await self._start(order, begin)

    async def _start(self, order: Order, begin: Callable[[Place, Berth], Awaitable[Vm]]) -> Parts:
        started = time.perf_counter()
        berths = await self._berths()
        async with berths.starting(), contextlib.AsyncExitStack() as undo:
            berth, opening = await self._take_berth(berths, order, undo)
            place, lock = self._new_place(order, undo)
            self._on_step("disk")
            await self._clone_disk(order.disk, place.directory / DISK)
            cloned = time.perf_counter()
            async with berths.wired(berth, order.machine.network) as wired:
                driver_vm = await begin(place, wired)
            undo.push_async_callback(driver_vm.kill)
            spawned = time.perf_counter()
            capture = _listen(place, undo) if order.fresh else None
            self._on_step("connect")
            channel = await unless_dead(driver_vm, Channel.connect(driver_vm.agent_socket))
            undo.push_async_callback(channel.close)
            self._on_step("revive")
            await self._revive(order, place, driver_vm, channel)
            await opening
            revived = time.perf_counter()
            self._on_step("record")
            record = self._record(order, place, berth, driver_vm)
            capture = capture or _listen(place, undo)
            self._on_step("done")
            undo.pop_all()
        return Parts(
            record=record,
            directory=place.directory,
            driver_vm=driver_vm,
            channel=channel,
            capture=capture,
            lock=lock,
            release=functools.partial(berths.release, berth.slot),
            timings=ForkTimings(
                disk_ms=(cloned - started) * 1e3,
                spawn_ms=(spawned - cloned) * 1e3,
                revive_ms=(revived - spawned) * 1e3,
                record_ms=(time.perf_counter() - revived) * 1e3,
            ),
        )

    async def _take_berth(
        self, berths: Berths, order: Order, undo: contextlib.AsyncExitStack
    ) -> tuple[Berth, asyncio.Future[None]]:
        """A place to run, and the opening of its network, which goes on beside the start of the VMM."""
        berth = await berths.take(order.machine, self._pool.vms / order.identity.id)
        undo.push_async_callback(berths.give_back, berth)
        opening = asyncio.ensure_future(berths.open(berth, order.machine.network))
        undo.push_async_callback(_abandon, opening)
        return berth, opening

    def _new_place(self, order: Order, undo: contextlib.AsyncExitStack) -> tuple[Place, int]:
        self._on_step("place")
        vm_id = order.identity.id
        directory, draft = self._pool.vms / vm_id, self._pool.staging / vm_id
        try:
            draft.mkdir(mode=0o700)
            undo.callback(remove_tree, draft)
            lock = try_lock(draft)
            if lock is None:
                raise HostUnfit(f"{draft} was taken by another process as it was made")
            undo.callback(os.close, lock)
            undo.callback(remove_tree, directory)
            # Locked before it can be seen: another process that adopts must not take it for an orphan.
            draft.rename(directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise PoolFull(
                    f"the disk pool {self._pool.root} is full: remove templates or end VMs"
                ) from error
            raise
        network, expires_at = order.machine.network, time.time() + order.ttl
        return Place(id=vm_id, directory=directory, network=network, expires_at=expires_at), lock

    async def _clone_disk(self, source: Path, target: Path) -> None:
        if self._pool.kind == "copy":
            await asyncio.to_thread(clone_file, source, target)
        else:
            clone_file(source, target)

    async def _revive(self, order: Order, place: Place, driver_vm: Vm, channel: Channel) -> None:
        revive = revival(order.identity, order.machine.network)
        if not order.fresh:
            await unless_dead(driver_vm, channel.revive(revive, timeout=REVIVE_SECONDS))
            return
        try:
            await unless_dead(driver_vm, channel.revive(revive, timeout=BOOT_SECONDS))
        except (GuestError, VmDied) as error:
            raise BootFailed(
                f"the machine did not come up: {error}\nconsole: …{tail(place.directory)}"
            ) from error

    def _record(self, order: Order, place: Place, berth: Berth, driver_vm: Vm) -> VmRecord:
        tied = self._driver.fingerprint(order.machine, order.accel)
        record = VmRecord(
            id=place.id,
            pid=driver_vm.pid,
            start_ticks=driver_vm.start_ticks,
            machine=order.machine,
            accel=order.accel,
            parent=order.parent,
            template=order.template,
            created_at=time.time(),
            expires_at=place.expires_at,
            metadata=dict(order.metadata),
            host_boot=host_boot(),
            hostname=order.identity.hostname,
            machine_id=order.identity.machine_id,
            boot_id=order.identity.boot_id,
            argv_digest=tied.argv_digest,
            cpu_model=tied.cpu_model,
            vmm_version=tied.vmm_version,
            slot=berth.slot.number if berth.slot is not None else None,
            owner=order.owner,
        )
        write_record(place.directory, record)
        return record


def revival(identity: Identity, network: Network) -> Revive:
    return Revive(
        token=identity.id,
        hostname=identity.hostname,
        machine_id=identity.machine_id,
        boot_id=identity.boot_id,
        hosts=virtual_hosts(network.allow),
        resolver=RESOLVER if network.mode == "internet" else "",
    )


async def unless_dead(driver_vm: Vm, answer: Awaitable[T]) -> T:
    """Wait for the guest's answer, but no longer than its VMM lives."""
    asking = asyncio.ensure_future(answer)
    dying = asyncio.ensure_future(driver_vm.wait())
    try:
        await asyncio.wait({asking, dying}, return_when=asyncio.FIRST_COMPLETED)
        if asking.done() and asking.exception() is None:
            return asking.result()
        # The channel often breaks an instant before the process is seen to end: the death is the better reason.
        await asyncio.wait({dying}, timeout=0.2)
        if dying.done():
            raise VmDied(f"the VM ended before it answered: {dying.result().reason}")
        return await asking
    finally:
        for task in (asking, dying):
            task.cancel()
        await asyncio.gather(asking, dying, return_exceptions=True)


def _listen(place: Place, undo: contextlib.AsyncExitStack) -> Console:
    capture = Console(place.directory, CONSOLE_SOCKET)
    undo.push_async_callback(capture.close)
    return capture


async def _abandon(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _grow(disk: Path, size: int) -> None:
    if disk.stat().st_size < size:
        os.truncate(disk, size)
