"""The books of VMs: read now and then, closed with a lesson, and ends that nobody saw."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmm_core import ledger as module
from vmm_core.errors import VmDied
from vmm_core.ledger import Ledger
from vmm_core.machine import MachineSpec, VmExit, VmRecord, VmUsage
from vmm_core.record import host_boot

pytestmark = pytest.mark.anyio
MIB = 1 << 20


def _record(vm_id: str = "vm-1", **fields: Any) -> VmRecord:
    values: dict[str, Any] = {
        "id": vm_id, "pid": 1, "start_ticks": 1, "machine": MachineSpec(), "accel": "tcg", "parent": "d" * 64,
        "template": "python-ci", "created_at": 1.0, "expires_at": 9e9, "host_boot": host_boot(),
    }  # fmt: skip
    return VmRecord(**(values | fields))


class FakeVm:
    """The part of a RunningVm the ledger looks at."""

    def __init__(self, vm_id: str, *, worked: bool = True, fails: bool = False) -> None:
        self.id = vm_id
        self.record = _record(vm_id)
        self.worked = worked
        self.ended: VmExit | None = None
        self.readings = 0
        self._fails = fails

    async def usage(self) -> VmUsage:
        self.readings += 1
        if self._fails:
            raise VmDied("it ended")
        return VmUsage()


async def test_every_vm_is_read_in_turn_and_one_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_EVERY_SECONDS", 0.05)
    vms: list[Any] = [FakeVm("vm-1"), FakeVm("vm-2", fails=True), FakeVm("vm-3")]
    over = FakeVm("vm-4")
    over.ended = VmExit(kind="exited")
    looked_at = list(vms)
    vms.append(over)
    ledger = Ledger(tmp_path, lambda: vms)
    ledger.opened(vms[0])
    await asyncio.sleep(0.5)
    vms.clear()
    await asyncio.sleep(0.1)
    await ledger.close()
    assert over.readings == 0
    assert all(vm.readings >= 2 for vm in looked_at)


async def test_an_engine_without_vms_rests(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, list)
    ledger.opened(FakeVm("vm-1"))  # pyright: ignore[reportArgumentType]
    await asyncio.sleep(0.05)
    await ledger.close()


async def test_only_forks_that_worked_teach(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, list)
    for worked in (True, False):
        for _ in range(5):
            vm: Any = FakeVm("vm-1", worked=worked)
            vm.ended = VmExit(kind="destroyed", usage=VmUsage(peak_bytes=(40 if worked else 400) * MIB))
            ledger.closed(vm)
    unread: Any = FakeVm("vm-1")
    unread.ended = VmExit(kind="destroyed", usage=VmUsage(cpu_seconds=1.0))
    ledger.closed(unread)
    await ledger.close()
    assert ledger.working_sets.need_mib("python-ci", 512) == 82


def _left(directory: Path, record: VmRecord, console: str = "") -> Path:
    place = directory / record.id
    place.mkdir()
    (place / "vm.json").write_bytes(msgspec.json.encode(record))
    (place / "console.log").write_text(console)
    return place


async def test_an_end_that_nobody_saw_is_told_by_what_is_left(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, list)
    for record, kind, word in (
        (_record("vm-1"), "vanished", "no service ran"),
        (_record("vm-2", expires_at=2.0), "expired", "time to live"),
        (_record("vm-3", host_boot="another"), "vanished", "host was restarted"),
    ):
        ledger.found_dead(_left(tmp_path, record))
        told = ledger.ending(record.id)
        assert told is not None
        assert told.kind == kind
        assert word in told.reason
    ledger.found_dead(_left(tmp_path, _record("vm-4"), "Kernel panic - not syncing: alone"))
    told = ledger.ending("vm-4")
    assert told is not None
    assert told.cause == "guest_panic"
    ledger.saw("vm-5", VmExit(kind="signaled", cause="disk_full", reason="full"))
    ledger.found_dead(_left(tmp_path, _record("vm-5")))
    told = ledger.ending("vm-5")
    assert told is not None
    assert (told.cause, told.reason) == ("disk_full", "full")
    assert ledger.ending("never") is None


async def test_what_is_left_may_be_anything_and_only_so_much_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENDINGS_KEPT", 3)
    ledger = Ledger(tmp_path, list)
    ledger.found_dead(tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "vm.json").write_bytes(b"\xff{")
    ledger.found_dead(broken)
    for number in range(6):
        ledger.found_dead(_left(tmp_path, _record(f"vm-{number}")))
    assert [ledger.ending(f"vm-{number}") is None for number in range(6)] == [True] * 3 + [False] * 3
