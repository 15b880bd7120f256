"""Berths are prepared ahead, for the shape that is asked for, and not while forks need the CPUs."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from vmm_core import berths as module
from vmm_core.berths import READY, Berths
from vmm_core.cgroup import Limits
from vmm_core.jail import CellSpec, Jailer
from vmm_core.machine import MachineSpec

pytestmark = pytest.mark.anyio


class FakeCell:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = True

    def fit(self, limits: Limits) -> None:
        self.limits = limits

    async def discard(self) -> None:
        self.waiting = False


class FakeJailer:
    """What makes cells, without a process: each takes one turn of the loop."""

    def __init__(self) -> None:
        self.made: list[FakeCell] = []

    async def prepare(self, spec: CellSpec) -> FakeCell:
        await asyncio.sleep(0)
        self.made.append(FakeCell(spec.limits))
        return self.made[-1]


@pytest.fixture
def jailer() -> FakeJailer:
    return FakeJailer()


@pytest.fixture
def berths(jailer: FakeJailer) -> Berths:
    return Berths(cast("Jailer", jailer), None, kvm=False)


async def until(said: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not said():
            await asyncio.sleep(0.001)


async def test_successors_are_prepared_ahead(berths: Berths, jailer: FakeJailer) -> None:
    await berths.take(MachineSpec(), Path("/vm"))
    await until(lambda: len(jailer.made) == READY + 1)
    await asyncio.sleep(0.02)
    assert len(jailer.made) == READY + 1
    await berths.close()
    assert sum(cell.waiting for cell in jailer.made) == 1  # the one that was taken


async def test_one_of_another_shape_is_fitted(berths: Berths, jailer: FakeJailer) -> None:
    await berths.take(MachineSpec(), Path("/vm"))
    await until(lambda: len(jailer.made) == READY + 1)
    berth = await berths.take(MachineSpec(memory_mib=1024), Path("/vm"))
    assert cast("FakeCell", berth.cell).limits.memory_mib == berth.limits.memory_mib == 1024
    assert berth.cell in jailer.made[1:]
    await berths.close()


async def test_a_burst_has_the_cpus_to_itself(berths: Berths, jailer: FakeJailer) -> None:
    await berths.take(MachineSpec(), Path("/vm"))
    await until(lambda: len(jailer.made) == READY + 1)
    async with berths.starting():
        for _ in range(READY):
            await berths.take(MachineSpec(), Path("/vm"))
        await asyncio.sleep(0.02)
        assert len(jailer.made) == READY + 1  # of its own, none was made meanwhile
        await berths.take(MachineSpec(), Path("/vm"))  # who finds none has one made
        assert len(jailer.made) == READY + 2
    await until(lambda: len(jailer.made) == 2 * READY + 2)
    await berths.close()


async def test_a_burst_without_end_does_not_starve_its_successors(
    berths: Berths, jailer: FakeJailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.005)
    async with berths.starting():
        await berths.take(MachineSpec(), Path("/vm"))
        await until(lambda: len(jailer.made) == READY + 1)
    await berths.close()


async def test_one_that_ended_as_it_waited_is_not_handed_out(berths: Berths, jailer: FakeJailer) -> None:
    await berths.take(MachineSpec(), Path("/vm"))
    await until(lambda: len(jailer.made) == READY + 1)
    jailer.made[1].waiting = False
    berth = await berths.take(MachineSpec(), Path("/vm"))
    assert berth.cell is jailer.made[2]
    await berths.close()
