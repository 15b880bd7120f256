"""Machines that are stopped into snapshots, as parents or frozen: durably, or they run on.

booted ──its VMM writes its state, its memory is written whole──► snapshot; it is ended in any case
forked ──paused──► what it changed, in a clone of the image it was forked from ──► snapshot ──► still paused
          on any failure it runs on
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from vmm_core.capture import Image, Threads, capture, make_durable, pool_full, resume, write_image, write_sums
from vmm_core.disk import Pool
from vmm_core.drivers.base import SUMS
from vmm_core.machine import MachineSpec, Manifest, Snapshot
from vmm_core.snapshot import SnapshotStore
from vmm_core.vm import RunningVm


class Stops:
    """Stops machines of one engine. Whoever asks sees to it that a machine is stopped once, and is not cancelled.

    ``manifest`` tells what is in the directory it is given, once the files are there.
    """

    def __init__(
        self,
        pool: Pool,
        snapshots: SnapshotStore,
        threads: Threads,
        require: Callable[[MachineSpec, int], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._snapshots = snapshots
        self._threads = threads
        self._require = require

    async def booted(self, vm: RunningVm, manifest: Callable[[Path], Manifest]) -> Snapshot:
        """One that booted has no memory but its own."""
        self._pool.require_room(vm.record.machine.memory_mib << 20)
        with self._snapshots.draft() as draft, pool_full(f"the memory and disk of {vm.id}"):
            await vm.driver_vm.save(draft)
            return await self._threads.urgent(lambda: self._snapshots.publish(draft, manifest(draft)))

    async def forked(
        self, vm: RunningVm, image: Image | None, manifest: Callable[[Path], Manifest], *, exact: bool
    ) -> Snapshot:
        """One that was forked, from what ``image`` has (None: that is nowhere, so it is written whole).

        ``exact``: see ``capture``.
        """
        self._pool.require_room()

        def require(memory_mib: int) -> Awaitable[None]:
            return self._require(vm.record.machine, memory_mib)

        with self._snapshots.draft() as draft:
            captured = await capture(
                vm, draft, self._threads, into=image, exact=exact, run_on=False, require=require
            )

            def write() -> None:
                write_image(captured, image, draft)
                make_durable(draft)

            def publish() -> Snapshot:
                made = manifest(draft)
                return self._snapshots.publish(draft, made, durable=made.files.keys() - {SUMS})

            try:
                self._pool.require_room(captured.private_bytes)
                await asyncio.gather(
                    self._threads.urgent(write),
                    self._threads.urgent(lambda: write_sums(captured, image, draft)),
                    vm.read(),  # its last reading takes as long as the rest of its end, and it stands still now
                )
                with pool_full("its manifest"):
                    snapshot = await self._threads.urgent(publish)
            except BaseException:
                await resume(vm)
                raise
            finally:
                captured.close()
        vm.keep_reading()
        return snapshot
