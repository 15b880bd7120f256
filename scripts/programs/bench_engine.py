"""Measures the engine in depth beside the floor: jail and slots, live forks, freeze, density, soak, attacks."""

import asyncio
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
from rich.progress import Progress

from scripts.programs.attacks import ATTACKS, neighbour_ms
from scripts.programs.measure import (
    MIB,
    Tick,
    at_rest,
    measure_forks,
    measure_forks_at_once,
    open_files,
    percentile,
)
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot
from vmm_core.network.slots import Slot, SlotPool
from vmm_core.vm import RunningVm

DENSE = 32
PRIVATE_MIB = 45
_OWN_MIB = 8  # of which so much is what an idle fork and the process that holds the rest have of their own
# What is asked of each figure; the table shows it beside what was measured.
LIMITS: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
    "jail.fork_ratio": ("≤ 1.3", lambda _: 1.3),
    "slots.handout_p99_ms": ("≤ 1", lambda _: 1.0),
    "fork8.ratio": ("≤ 1.25", lambda _: 1.25),
    "live_fork.pause_ms": ("≤ 200", lambda _: 200.0),
    "live_fork.child_ratio": ("≤ 1.5", lambda _: 1.5),
    "freeze.ms": ("≤ 200", lambda _: 200.0),
    "density.private_dirty_mib": ("≤ 12", lambda _: 12.0),
    "destroy.p50_ms": ("≤ 100", lambda _: 100.0),
    "soak.fd_growth": ("0", lambda _: 0.0),
    "soak.thread_growth": ("0", lambda _: 0.0),
    "soak.namespace_growth": ("0", lambda _: 0.0),
    "attack.neighbour_p99_ratio": ("≤ 3", lambda _: 3.0),
}


class Plan(msgspec.Struct, frozen=True):
    """How many times each thing is measured."""

    forks: int
    at_once: int
    slots: int
    live: int
    destroys: int
    cycles: int
    latencies: int


FULL = Plan(forks=60, at_once=9, slots=200, live=5, destroys=30, cycles=500, latencies=40)
QUICK = Plan(forks=20, at_once=4, slots=60, live=2, destroys=10, cycles=40, latencies=12)


async def measure_jail(engine: Engine, parent: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """Forks with slot and jail, one by one and eight at once, beside QEMU alone."""
    single = await measure_forks(engine, parent, plan.forks, tick)
    at_once = await measure_forks_at_once(engine, parent, plan.at_once, tick)
    return {
        "jail.fork_p50_ms": single["fork.p50_ms"],
        "jail.fork_p99_ms": single["fork.p99_ms"],
        "jail.floor_p50_ms": single["fork.floor_p50_ms"],
        "jail.fork_ratio": single["fork.ratio"],
        "fork8.total_ms": at_once["fork8.total_ms"],
        "fork8.floor_ms": at_once["fork8.floor_ms"],
        "fork8.ratio": at_once["fork8.total_ms"] / at_once["fork8.floor_ms"],
    }


async def write_private(vm: RunningVm, mib: int) -> None:
    """Let a process of the guest hold ``mib`` MiB that differ from its parent's, and touch no more than those."""
    program = (
        f"import mmap, os, time\nheld, block = mmap.mmap(-1, {mib} << 20), os.urandom(1 << 20)\n"
        f"for _ in range({mib}): held.write(block)\n"
        "print('held', flush=True)\nwhile True: time.sleep(3600)\n"
    )
    process = await vm.start(["/usr/bin/python3", "-I", "-S", "-c", program], exec_id="hold")
    async for _ in process.output():
        break
    process.release()


async def measure_live(engine: Engine, parent: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """Live forks, freezes and thaws of a VM that has changed."""
    pauses: list[float] = []
    privates: list[float] = []
    children: list[float] = []
    freezes: list[float] = []
    thaws: list[float] = []
    normal: list[float] = []
    for _ in range(plan.live):
        started = time.perf_counter()
        async with engine.fork(parent):
            normal.append((time.perf_counter() - started) * 1e3)
        async with engine.fork(parent) as vm:
            await write_private(vm, PRIVATE_MIB - _OWN_MIB)
            privates.append((await vm.usage()).private_dirty_bytes / MIB)
            for child in await vm.fork_many(2, ttl=300):
                pauses.append(child.timings.pause_ms)
                await child.destroy()
            async with vm.fork() as child:
                children.append(child.timings.total_ms)
            started = time.perf_counter()
            await vm.freeze()
            freezes.append((time.perf_counter() - started) * 1e3)
        started = time.perf_counter()
        thawed = await engine.thaw(vm.id)
        thaws.append((time.perf_counter() - started) * 1e3)
        await thawed.destroy()
        tick("live fork, freeze, thaw")
    return {
        "live_fork.pause_ms": statistics.median(pauses),
        "live_fork.private_mib": statistics.median(privates),
        "live_fork.child_ratio": statistics.median(children) / statistics.median(normal),
        "freeze.ms": statistics.median(freezes),
        "thaw.ms": statistics.median(thaws),
    }


async def measure_slots(_engine: Engine, _parent: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """A pool of its own: how fast slots are prepared from nothing, and how long a hand-out takes."""
    handouts: list[float] = []
    started = time.perf_counter()
    async with SlotPool.open(plan.slots) as pool:
        while pool.ready < plan.slots:
            await asyncio.sleep(0.005)
        elapsed = time.perf_counter() - started
        taken: list[Slot] = []
        for _ in range(plan.slots):
            begun = time.perf_counter()
            taken.append(await pool.take())
            handouts.append((time.perf_counter() - begun) * 1e3)
        for slot in taken:
            await pool.give_back(slot)
    tick("slots")
    return {
        "slots.handout_p99_ms": percentile(handouts, 99),
        "slots.prepared_per_s": plan.slots / elapsed,
    }


async def measure_density(engine: Engine, parent: Snapshot, tick: Tick) -> dict[str, float]:
    """Thirty-two idle forks of one parent at once: what each costs, and the growth of the sum."""
    async with AsyncExitStack() as stack:
        vms: list[RunningVm] = []
        sums: list[float] = []
        for _ in range(DENSE // 8):
            vms += await asyncio.gather(
                *(stack.enter_async_context(engine.fork(parent, ttl=600)) for _ in range(8))
            )
            sums.append(sum([(await vm.usage()).pss_bytes for vm in vms]) / MIB)
            tick("density")
        usages = [await vm.usage() for vm in vms]
    return {
        "density.forks": float(len(usages)),
        "density.private_dirty_mib": max(usage.private_dirty_bytes for usage in usages) / MIB,
        "density.pss_mib": sums[-1],
        "density.pss_growth_mib": (sums[-1] - sums[0]) / (DENSE - 8),
    }


async def measure_destroy(engine: Engine, parent: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    times: list[float] = []
    for _ in range(plan.destroys):
        vm = await engine.launch(parent)
        started = time.perf_counter()
        await vm.destroy()
        times.append((time.perf_counter() - started) * 1e3)
    tick("destroy")
    return {"destroy.p50_ms": statistics.median(times)}


def _rss_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def measure_soak(engine: Engine, parent: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """Fork and destroy again and again, three at a time: what of this process and its pool grows."""

    async def cycle() -> None:
        async with engine.fork(parent):
            pass

    async def look() -> tuple[int, int, int, float, int]:
        files = await at_rest(open_files)
        gc.collect()
        room = os.statvfs(engine.pool.root)  # of the pool itself, whatever else its host's disk is used for
        namespaces = len(list(Path("/run/netns").glob("*"))) if Path("/run/netns").is_dir() else 0
        return files, threading.active_count(), namespaces, _rss_mib(), room.f_bfree * room.f_frsize

    for _ in range(
        max(6, plan.cycles // 10)
    ):  # until caches and pools are as full as they get, that of the loop's threads as well
        await asyncio.gather(*(cycle() for _ in range(3)))
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(32)))
    before = await look()
    for done in range(0, plan.cycles, 3):
        await asyncio.gather(*(cycle() for _ in range(min(3, plan.cycles - done))))
        if done % 30 == 0:
            tick("soak")
    files, threads, namespaces, rss, free = (
        now - then for now, then in zip(await look(), before, strict=True)
    )
    return {
        "soak.cycles": float(plan.cycles),
        "soak.rss_growth_mib": rss,
        "soak.fd_growth": files,
        "soak.thread_growth": threads,
        "soak.namespace_growth": namespaces,
        "soak.pool_growth_mib": -free / MIB,
    }


async def measure_attacks(engine: Engine, parent: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """The worst that any attack does to a neighbour."""
    figures: dict[str, float] = {}
    for name in ATTACKS:
        before, during = await neighbour_ms(engine, parent, name, plan.latencies)
        figures[f"attack.{name.replace(' ', '_')}_ratio"] = percentile(during, 99) / percentile(before, 99)
        tick(f"attack: {name}")
    return {**figures, "attack.neighbour_p99_ratio": max(figures.values())}


async def measure(engine: Engine, parent: Snapshot, progress: Progress, *, quick: bool) -> dict[str, float]:
    plan = QUICK if quick else FULL
    total = plan.forks + 2 + plan.at_once + 1 + plan.live + DENSE // 8 + 1 + plan.cycles // 30 + len(ATTACKS)
    task = progress.add_task("measuring", total=total)

    def tick(what: str) -> None:
        progress.update(task, advance=1, description=what)

    figures: dict[str, float] = {}
    for measurement in (measure_jail, measure_slots, measure_live):
        figures |= await measurement(engine, parent, plan, tick)
    figures |= await measure_density(engine, parent, tick)
    for measurement in (measure_destroy, measure_soak, measure_attacks):
        figures |= await measurement(engine, parent, plan, tick)
    return figures
