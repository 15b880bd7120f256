"""Which parents' memories stay resident."""

import os
from pathlib import Path

import pytest

from vmm_core import residents
from vmm_core.machine import MachineSpec, Manifest, Snapshot
from vmm_core.residents import Residents

pytestmark = pytest.mark.anyio

MIB = 1 << 20


def parent(number: int) -> Snapshot:
    manifest = Manifest(f"{number:064x}", 1.0, MachineSpec(), "tcg", "q", "c", "a", {})
    return Snapshot(Path("/nowhere"), manifest)


async def test_as_many_as_fit_stay_the_last_forked_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(snapshot: Snapshot) -> int:
        loaded.append(snapshot.digest)
        fd = os.memfd_create("parent")
        os.ftruncate(fd, 512 * MIB)
        os.pwrite(fd, bytes(MIB), 0)  # holes count for nothing
        return fd

    monkeypatch.setattr(residents, "load_memory", load)
    held = Residents(most_bytes=3 * MIB)
    one, two, three, four = (parent(number) for number in range(4))
    for snapshot in (one, two, three, one, four, one, two):
        await held.memory_of(snapshot)
    # The fourth pushed the second one out, which then pushed out the third; the first was always in use.
    assert loaded == [snapshot.digest for snapshot in (one, two, three, four, two)]
    await held.close()


async def test_one_that_is_larger_than_all_there_is_stays_while_it_is_the_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(_: Snapshot) -> int:
        fd = os.memfd_create("parent")
        os.pwrite(fd, bytes(2 * MIB), 0)
        return fd

    monkeypatch.setattr(residents, "load_memory", load)
    held = Residents(most_bytes=MIB)
    assert await held.memory_of(parent(1)) == await held.memory_of(parent(1))
    await held.close()
