"""The books of an engine's VMs: a reading of each now and then, what each end teaches, and ends that nobody saw.

Readings are spread evenly: each VM is read once in half a minute, one at a time, so that the last one before a crash
is recent and nothing happens in bursts.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from vmm_core import console, evidence
from vmm_core.errors import VmmError
from vmm_core.machine import ExitCause, VmExit, VmRecord
from vmm_core.record import RECORD, host_boot
from vmm_core.vm import RunningVm
from vmm_core.working_set import WorkingSets

READ_EVERY_SECONDS = 30.0
_ENDINGS_KEPT = 256


class Ledger:
    """Kept by the engine of ``data_dir``. ``vms`` are those it owns at the moment."""

    def __init__(self, data_dir: Path, vms: Callable[[], Sequence[RunningVm]]) -> None:
        self.working_sets = WorkingSets(data_dir)
        self._vms = vms
        self._reading: asyncio.Task[None] | None = None
        self._lessons: set[asyncio.Task[None]] = set()
        self._endings: OrderedDict[str, VmExit] = OrderedDict()

    def opened(self, vm: RunningVm) -> None:
        """A VM is the engine's from now on."""
        self._endings.pop(vm.id, None)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_on(), name="ledger")

    def closed(self, vm: RunningVm) -> None:
        """A VM is gone. The peak of a fork in which something ran teaches what its template needs."""
        ended, template = vm.ended, vm.record.template or vm.record.parent
        if ended is None or ended.usage is None or template is None or not vm.worked:
            return
        lesson = asyncio.create_task(self._learn(template, ended.usage.peak_bytes), name="lesson")
        self._lessons.add(lesson)
        lesson.add_done_callback(self._lessons.discard)

    def saw(self, vm_id: str, found: VmExit) -> None:
        """A VM ended in the middle of its adoption, before anybody owned it: how its VMM ended."""
        self._endings[vm_id] = found

    def found_dead(self, directory: Path) -> None:
        """A VM that ended while nobody owned it is about to be removed: keep what its directory still tells."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            record = msgspec.json.decode((directory / RECORD).read_bytes(), type=VmRecord)
            text, tail = console.text(directory), console.tail(directory)
            seen = self._endings.pop(record.id, None)
            found = _unseen(record) if seen is None or seen.cause in ("unknown", "vmm_killed") else seen
            self._endings[record.id] = evidence.tell(found, None, console=text, tail=tail, usage=found.usage)
            while len(self._endings) > _ENDINGS_KEPT:
                self._endings.popitem(last=False)

    def ending(self, vm_id: str) -> VmExit | None:
        """How a VM ended that this engine found dead; the last 256 of them are remembered."""
        return self._endings.get(vm_id)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        await asyncio.gather(*self._lessons, return_exceptions=True)

    async def _read_on(self) -> None:
        while True:
            for vm in self._vms() or (None,):
                await asyncio.sleep(READ_EVERY_SECONDS / max(1, len(self._vms())))
                if vm is not None and vm.ended is None:
                    with contextlib.suppress(VmmError, OSError):
                        await vm.usage()

    async def _learn(self, template: str, peak_bytes: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lesson is lost, the next one will do
            await asyncio.to_thread(self.working_sets.learn, template, peak_bytes)


def _unseen(record: VmRecord) -> VmExit:
    cause: ExitCause = "unknown"
    reason = "the VMM ended while no service ran, so nobody saw how"
    if record.host_boot != host_boot():
        reason = "this host was restarted while the VM ran"
    elif record.expires_at <= time.time():
        cause, reason = "expired", "its time to live passed while no service ran"
    return VmExit(kind="expired" if cause == "expired" else "vanished", cause=cause, reason=reason)
