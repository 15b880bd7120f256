"""Forks beside the floor: what every suite of the bench measures with."""

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

from scripts.programs.floor import Floor
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot, VmUsage

AT_ONCE = 8
MIB = 1 << 20
_LOOKS, _LOOK_SECONDS, _REST_SECONDS = 4, 0.15, 60.0
Tick = Callable[[str], None]

T = TypeVar("T")


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the samples lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


async def at_rest(look: Callable[[], T]) -> T:
    """What ``look`` finds once nothing changes any more: an engine prepares berths in the background."""
    found, same = look(), 0
    async with asyncio.timeout(_REST_SECONDS):
        while same < _LOOKS:
            await asyncio.sleep(_LOOK_SECONDS)
            now = look()
            found, same = now, same + 1 if now == found else 0
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def measure_forks(engine: Engine, parent: Snapshot, count: int, tick: Tick) -> dict[str, float]:
    """Single forks and restores by hand, in turn."""
    floor = Floor(parent, engine.staging)
    ours: list[float] = []
    theirs: list[float] = []
    try:
        for number in range(count + 2):
            started = time.perf_counter()
            async with engine.fork(parent):
                elapsed = (time.perf_counter() - started) * 1e3
            by_hand = await asyncio.to_thread(floor.restore_ms)
            if number >= 2:  # the first ones warm the page cache of both
                ours.append(elapsed)
                theirs.append(by_hand)
            tick("fork beside the floor")
    finally:
        floor.close()
    p50, floor_p50 = statistics.median(ours), statistics.median(theirs)
    return {
        "fork.p50_ms": p50,
        "fork.p99_ms": percentile(ours, 99),
        "fork.floor_p50_ms": floor_p50,
        "fork.ratio": p50 / floor_p50,
    }


async def measure_forks_at_once(
    engine: Engine, parent: Snapshot, rounds: int, tick: Tick
) -> dict[str, float]:
    """Eight forks begun together, and eight restores by hand; then what the eight idle forks cost."""
    floor = Floor(parent, engine.staging)
    ours: list[float] = []
    theirs: list[float] = []
    usages: list[VmUsage] = []
    try:
        for _ in range(rounds):
            await at_rest(open_files)
            async with AsyncExitStack() as forks:
                started = time.perf_counter()
                vms = await asyncio.gather(
                    *(forks.enter_async_context(engine.fork(parent)) for _ in range(AT_ONCE))
                )
                ours.append((time.perf_counter() - started) * 1e3)
                usages = [await vm.usage() for vm in vms]
            await at_rest(open_files)  # what ours leaves to be taken back must not weigh on the floor
            theirs.append(await asyncio.to_thread(floor.restore_at_once_ms, AT_ONCE))
            tick("eight at once beside the floor")
    finally:
        floor.close()
    return {
        "fork8.total_ms": statistics.median(ours),
        "fork8.floor_ms": statistics.median(theirs),
        "guest.private_dirty_mib": statistics.mean(usage.private_dirty_bytes for usage in usages) / MIB,
        "guest.pss_mib": statistics.mean(usage.pss_bytes for usage in usages) / MIB,
    }
