"""Measures what a fork costs beside the floor, and prints a table: ``python -m scripts.programs.bench``.

Every figure of ours is taken in turn with the floor's in the same run, so that a busy or slow machine
weighs on both. Times are milliseconds, memory is MiB.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from images.bake import root_disk
from images.errors import ImageError
from images.events import BakeEvent
from scripts.programs.floor import Floor
from scripts.programs.stage import Stage, StageError, runner_recipe
from vmm_core.engine import Engine
from vmm_core.errors import VmmError
from vmm_core.machine import Snapshot, VmUsage

AT_ONCE = 8
MIB = 1 << 20

# What the issue asks of each figure; the table shows it beside what was measured.
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


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of the samples lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


async def measure_forks(
    engine: Engine, parent: Snapshot, plan: Plan, tick: Callable[[str], None]
) -> dict[str, float]:
    """Single forks and restores by hand, in turn."""
    floor = Floor(parent, engine.staging)
    ours: list[float] = []
    theirs: list[float] = []
    try:
        for number in range(plan.forks + 2):
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
    engine: Engine, parent: Snapshot, plan: Plan, tick: Callable[[str], None]
) -> dict[str, float]:
    """Eight forks begun together, and eight restores by hand; then what the eight idle forks cost."""
    floor = Floor(parent, engine.staging)
    ours: list[float] = []
    theirs: list[float] = []
    usages: list[VmUsage] = []
    try:
        for _ in range(plan.at_once):
            async with AsyncExitStack() as forks:
                started = time.perf_counter()
                vms = await asyncio.gather(
                    *(forks.enter_async_context(engine.fork(parent)) for _ in range(AT_ONCE))
                )
                ours.append((time.perf_counter() - started) * 1e3)
                usages = [await vm.usage() for vm in vms]
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


async def measure_boots(engine: Engine, plan: Plan, tick: Callable[[str], None]) -> dict[str, float]:
    recipe = runner_recipe(engine.data_dir)
    image = await root_disk(engine, recipe, progress=lambda _event: None)
    times: list[float] = []
    for _ in range(plan.boots):
        started = time.perf_counter()
        async with engine.boot(image, recipe.machine):
            times.append((time.perf_counter() - started) * 1e3)
        tick("cold boot")
    return {"boot.cold_ms": statistics.median(times)}


async def measure_service(engine: Engine, plan: Plan, tick: Callable[[str], None]) -> dict[str, float]:
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


async def run(data_dir: Path, plan: Plan, console: Console) -> dict[str, float]:
    figures: dict[str, float] = {}
    async with Engine.open(data_dir) as engine:
        with Progress(console=console, transient=True) as progress:
            baking = progress.add_task("baking", total=None)

            def show(event: BakeEvent) -> None:
                progress.update(baking, description=f"{event.step}: {event.message}"[:70])

            parent = (await Stage.prepare(engine, progress=show)).snapshot
            progress.remove_task(baking)
            total = plan.forks + 2 + plan.at_once + plan.boots + plan.events + 3
            task = progress.add_task("measuring", total=total)

            def tick(what: str) -> None:
                progress.update(task, advance=1, description=what)

            figures |= await measure_forks(engine, parent, plan, tick)
            figures |= await measure_forks_at_once(engine, parent, plan, tick)
            figures |= await measure_boots(engine, plan, tick)
            figures |= await measure_service(engine, plan, tick)
    return {key: round(value, 3) for key, value in figures.items()}


def show(figures: dict[str, float], console: Console) -> None:
    table = Table("figure", "measured", "asked for", title="microvm bench")
    for key, value in figures.items():
        wanted, limit = LIMITS.get(key, ("", None))
        met = "" if limit is None else " ✓" if value <= limit(figures) else " ✗"
        table.add_row(key, f"{value:.2f}", f"{wanted}{met}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer samples, under 90 seconds when templates are baked"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as one flat JSON object")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("MICROVM_TEST_DATA", "/var/tmp/microvm-tests")),
        help="where templates are kept (default: that of the tests)",
    )
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        figures = asyncio.run(run(options.data_dir, QUICK if options.quick else FULL, console))
    except (StageError, VmmError, ImageError) as error:
        console.print(f"[red]the bench failed:[/red] {escape(str(error))}", highlight=False)
        return 1
    show(figures, Console())
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
