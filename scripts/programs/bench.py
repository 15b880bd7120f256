"""Measures what things cost beside the floor, and prints a table: ``python -m scripts.programs.bench``.

fork     forks, eight at once, from an event to a runner in the guest
engine   jails and slots, live forks, freezing, density, a soak, attacks
warm     jobs from their repository's warm parent
control  deliveries taken, a pass over 10,000 jobs, jobs a second through the whole life of a runner; no VM

Every figure of ours is taken in turn with the floor's in the same run, so that a busy or slow machine
weighs on both. Times are milliseconds, memory is MiB.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from images.errors import ImageError
from images.events import BakeEvent
from scripts.programs import bench_control, bench_engine, bench_fork, bench_warm
from scripts.programs.bench_ingest import IngestError
from scripts.programs.bench_jobs import JobsError
from scripts.programs.stage import Stage, StageError
from vmm_core.engine import Engine
from vmm_core.errors import VmmError

# Each has LIMITS, and ``measure(engine, parent, progress, quick=…)`` or, when it needs no VM, ``measure(data_dir, …)``.
SUITES: dict[str, ModuleType] = {
    "fork": bench_fork,
    "engine": bench_engine,
    "warm": bench_warm,
    "control": bench_control,
}


async def run(data_dir: Path, suite: ModuleType, console: Console, *, quick: bool) -> dict[str, float]:
    figures: dict[str, float]
    if suite is bench_control:
        with Progress(console=console, transient=True) as progress:
            figures = await bench_control.measure(data_dir, progress, quick=quick)
        return _rounded(figures)
    async with Engine.open(data_dir) as engine:
        with Progress(console=console, transient=True) as progress:
            baking = progress.add_task("baking", total=None)

            def show(event: BakeEvent) -> None:
                progress.update(baking, description=f"{event.step}: {event.message}"[:70])

            parent = (await Stage.prepare(engine, progress=show)).snapshot
            progress.remove_task(baking)
            figures = await suite.measure(engine, parent, progress, quick=quick)
    return _rounded(figures)


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 3) for key, value in figures.items()}


def show(figures: dict[str, float], suite: ModuleType, console: Console) -> None:
    table = Table("figure", "measured", "asked for", title="microvm bench")
    for key, value in figures.items():
        wanted, limit = suite.LIMITS.get(key, ("", None))
        met = "" if limit is None else " ✓" if _met(value, wanted, limit(figures)) else " ✗"
        table.add_row(key, f"{value:.2f}", f"{wanted}{met}")
    console.print(table)


def _met(value: float, wanted: str, limit: float) -> bool:
    return value >= limit if wanted.startswith("≥") else value <= limit


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=sorted(SUITES), default="fork", help="what to measure")
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
        figures = asyncio.run(run(options.data_dir, SUITES[options.suite], console, quick=options.quick))
    except (StageError, VmmError, ImageError, IngestError, JobsError, TimeoutError) as error:
        console.print(f"[red]the bench failed:[/red] {escape(str(error))}", highlight=False)
        return 1
    show(figures, SUITES[options.suite], Console())
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
