"""Measures what a fork costs beside the floor, a cold boot, and the service from event to runner."""

import statistics
import time
from collections.abc import Callable

import msgspec
from rich.progress import Progress

from images.bake import root_disk
from scripts.programs.measure import AT_ONCE, MIB, Tick, measure_forks, measure_forks_at_once, percentile
from scripts.programs.stage import Stage, runner_recipe
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot

# What is asked of each figure; the table shows it beside what was measured.
LIMITS: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
    "fork.ratio": ("≤ 1.3", lambda _: 1.3),
    "fork.p99_ms": ("≤ 2.5 × p50", lambda figures: 2.5 * figures["fork.p50_ms"]),
    "event_to_runner.p50_ms": ("≤ fork p50 + 60", lambda figures: figures["fork.p50_ms"] + 60),
    "guest.private_dirty_mib": ("≤ 12", lambda _: 12.0),
    "service.rss_mib": ("≤ 150", lambda _: 150.0),
}


class Plan(msgspec.Struct, frozen=True):
    """How many times each thing is measured."""

    forks: int
    at_once: int
    boots: int
    events: int


FULL = Plan(forks=60, at_once=5, boots=5, events=30)
QUICK = Plan(forks=24, at_once=2, boots=2, events=12)


async def measure_boots(engine: Engine, plan: Plan, tick: Tick) -> dict[str, float]:
    recipe = runner_recipe(engine.data_dir)
    image = await root_disk(engine, recipe, progress=lambda _event: None)
    times: list[float] = []
    for _ in range(plan.boots):
        started = time.perf_counter()
        async with engine.boot(image, recipe.machine):
            times.append((time.perf_counter() - started) * 1e3)
        tick("cold boot")
    return {"boot.cold_ms": statistics.median(times)}


async def measure_service(engine: Engine, plan: Plan, tick: Tick) -> dict[str, float]:
    """The service as a process of its own, driven by signed events from the stand-in GitHub."""
    async with Stage.open(engine, max_vms=AT_ONCE) as stage:
        times: list[float] = []
        for number in range(plan.events + 2):
            elapsed = await stage.event_to_runner_ms()
            if number >= 2:
                times.append(elapsed)
            tick("event to runner")
        rss = await stage.rss_with_vms(AT_ONCE)
        tick("service memory")
    return {
        "event_to_runner.p50_ms": statistics.median(times),
        "event_to_runner.p99_ms": percentile(times, 99),
        "service.rss_mib": rss / MIB,
    }


async def measure(engine: Engine, parent: Snapshot, progress: Progress, *, quick: bool) -> dict[str, float]:
    plan = QUICK if quick else FULL
    task = progress.add_task("measuring", total=plan.forks + 2 + plan.at_once + plan.boots + plan.events + 3)

    def tick(what: str) -> None:
        progress.update(task, advance=1, description=what)

    return {
        **await measure_forks(engine, parent, plan.forks, tick),
        **await measure_forks_at_once(engine, parent, plan.at_once, tick),
        **await measure_boots(engine, plan, tick),
        **await measure_service(engine, plan, tick),
    }
