"""The main job, played once and told step by step: ``python -m scripts.programs.demo``.

A signed event of a job with ``runs-on: microvm`` becomes a microVM of its own, forked from a warm parent;
the job's steps run in it, its log streams, and nothing remains. Then the same job without the parent.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from images.bake import bake_machine, root_disk
from images.errors import ImageError
from images.events import BakeEvent
from scripts.programs.leftovers import Leftovers
from scripts.programs.stage import FILES, Stage, StageError, runner_recipe, step_at
from tests.standins.github_state import Job
from vmm_core import accounting
from vmm_core.engine import Engine
from vmm_core.errors import VmDied, VmmError
from vmm_core.machine import VmUsage
from vmm_core.vm import RunningVm

# The steps of the job's story the table tells, in order, with what each means.
STEPS = {
    "queued": "signed event verified and stored",
    "placed": "a host promised the room",
    "registered": "just-in-time registration made (at the same time as the fork)",
    "forked": "VM forked from the warm parent and revived",
    "started": "runner process runs in the guest",
    "idle": "runner online",
    "busy": "the forge gave it the job",
    "completed": "job completed",
    "retiring": "runner leaves",
    "destroyed": "VM destroyed",
    "gone": "nothing left of it",
}
# What a workflow without warm dependencies does: a virtual environment, and what requirements.txt names.
INSTALL = """
cd ~/work
python3 -m venv --without-pip --system-site-packages ~/venv
~/venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
"""
JOB = """
cd ~/work
. ~/venv/bin/activate
python --version
python -m pytest -q
"""


class Shown(msgspec.Struct):
    """What the demo has found out; the figures of ``--json``."""

    timeline: dict[str, float] = {}
    warm_ms: float = 0.0
    cold_ms: float = 0.0
    cold_boot_ms: float = 0.0
    cold_install_ms: float = 0.0
    cold_job_ms: float = 0.0
    private_mib: float = 0.0
    pss_mib: float = 0.0
    bake_s: float = 0.0
    bake_cached: bool = False
    leftovers: list[str] = []


class Demo:
    """The scenes, in order. ``console`` is for people; the figures are in ``shown``."""

    def __init__(self, data_dir: Path, console: Console) -> None:
        self.data_dir = data_dir
        self.console = console
        self.shown = Shown()

    async def play(self) -> Shown:
        async with Engine.open(self.data_dir) as engine:
            self._title("This host")
            self.console.print(f"  {engine.info.vmm}, pool: {engine.info.pool}")
            for note in engine.info.notes:
                self.console.print(f"  [dim]{note}[/dim]")
            self._title("A warm parent")
            await self._bake(engine)
            self._title("One job, from its signed event to its end")
            before = Leftovers.look(engine)
            async with Stage.open(engine) as stage:
                await engine.prewarm("github-runner")
                job = await stage.queue()
                story = await self._follow(stage, engine, job)
                self._tell(story)
                # The service still runs: what is looked for is what the job left, not what a stop cleans up.
                self.shown.leftovers = await Leftovers.lasting(engine, before)
            self._title("The same job without the warm parent")
            await self._cold(engine)
        self._sum_up()
        return self.shown

    def _title(self, text: str) -> None:
        self.console.rule(f"[bold]{text}", align="left")

    # ── the parent ───────────────────────────────────────────────────────────────────────────────

    async def _bake(self, engine: Engine) -> None:
        with self._progress() as progress:
            task = progress.add_task("baking github-runner", total=None)
            baked = await Stage.prepare(engine, progress=shown_on(progress, task))
        self.shown.bake_s, self.shown.bake_cached = baked.seconds, baked.cache_hit
        how = "found, baked earlier from the same inputs" if baked.cache_hit else "baked"
        self.console.print(
            f"  template github-runner {baked.snapshot.digest[:12]}: {how} in {baked.seconds:.1f} s"
        )
        for name, seconds in baked.steps:
            self.console.print(f"    [dim]{name:<12} {seconds:6.1f} s[/dim]")

    def _progress(self) -> Progress:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console, transient=True)

    # ── the job ──────────────────────────────────────────────────────────────────────────────────

    async def _follow(self, stage: Stage, engine: Engine, job: Job) -> dict[str, Any]:
        """Show the job's log and steps as they come, and what its VM costs while it runs."""
        log = asyncio.create_task(self._stream_log(stage, job))
        costs = asyncio.create_task(self._watch_costs(engine))
        try:
            told: set[str] = set()
            with self._progress() as progress:
                task = progress.add_task("waiting for the job", total=None)

                def look(story: dict[str, Any]) -> bool:
                    for row in story["timeline"]:
                        key = f"{row['step']} {row['reason']}"
                        if key not in told:
                            told.add(key)
                            at, step = f"{row['ms'] or 0:8.0f} ms", f"{row['step']:<11}"
                            progress.console.print(
                                f"  [cyan]{at}[/cyan]  [bold]{step}[/bold] {row['reason']}"
                            )
                    progress.update(task, description=f"the job is {story['job']['state']}")
                    return step_at(story, "gone") is not None

                story = await stage.until(job, look, "gone")
            await asyncio.wait({log}, timeout=10)
        finally:
            for running in (log, costs):
                running.cancel()
            await asyncio.gather(log, costs, return_exceptions=True)
        if job.conclusion != "success":
            raise StageError(
                f"the job ended as {job.conclusion}\n{stage.forge.log(job.id)}\n{stage.log_tail()}"
            )
        return story

    async def _stream_log(self, stage: Stage, job: Job) -> None:
        """The runner's output out of the guest, live through the service's API."""
        while not await stage.story(job):
            await asyncio.sleep(0.02)
        async with stage.http.stream(
            "GET", f"/jobs/{job.id}/log", params={"follow": "true"}, timeout=None
        ) as answer:
            async for line in answer.aiter_lines():
                self.console.print(f"  [green]│[/green] {escape(line)}", highlight=False)

    async def _watch_costs(self, engine: Engine) -> None:
        """Keep the last measure of the job's VM, taken while it lives."""
        while True:
            for record in engine.records():
                if "runner_id" in record.metadata:
                    try:
                        usage = await asyncio.to_thread(accounting.usage, record.pid, Path(os.devnull))
                    except VmDied:
                        continue  # it ended between two looks
                    self._keep(usage)
            await asyncio.sleep(0.1)

    def _keep(self, usage: VmUsage) -> None:
        self.shown.private_mib = max(self.shown.private_mib, usage.private_dirty_bytes / 2**20)
        self.shown.pss_mib = max(self.shown.pss_mib, usage.pss_bytes / 2**20)

    def _tell(self, story: dict[str, Any]) -> None:
        origin = step_at(story, "queued") or 0.0
        for step in STEPS:
            at = step_at(story, step)
            if at is not None:
                self.shown.timeline[step] = (at - origin) * 1e3
        ran = self.shown.timeline
        self.shown.warm_ms = ran.get("completed", ran["gone"])

    # ── without the parent ───────────────────────────────────────────────────────────────────────

    async def _cold(self, engine: Engine) -> None:
        """Boot the same root disk, install what the repository needs in the guest, run the same steps."""
        recipe = runner_recipe(engine.data_dir)
        with self._progress() as progress:
            task = progress.add_task("cold boot", total=None)
            image = await root_disk(engine, recipe, progress=shown_on(progress, task))
            machine = await bake_machine(recipe)
            progress.update(task, description="cold boot", total=None)
            started = time.perf_counter()
            async with engine.boot(image, machine) as vm:
                booted = time.perf_counter()
                progress.update(task, description="installing the dependencies in the guest")
                for name, text in FILES.items():
                    await vm.put(f"/home/runner/work/{name}", text.encode())
                await self._run(vm, INSTALL)
                installed = time.perf_counter()
                progress.update(task, description="the job's steps")
                await self._run(vm, JOB)
                ended = time.perf_counter()
        self.shown.cold_boot_ms = (booted - started) * 1e3
        self.shown.cold_install_ms = (installed - booted) * 1e3
        self.shown.cold_job_ms = (ended - installed) * 1e3
        self.shown.cold_ms = (ended - started) * 1e3

    async def _run(self, vm: RunningVm, script: str) -> None:
        result = await vm.exec(["/bin/bash", "-eu", "-c", script], timeout=300)
        if result.code != 0:
            raise StageError(
                f"the cold job failed: {(result.stdout + result.stderr).decode(errors='replace')[-2000:]}"
            )

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def _sum_up(self) -> None:
        shown = self.shown
        table = Table("step", "at ms", "took ms", "", title="The job's way")
        previous = 0.0
        for step, at in sorted(shown.timeline.items(), key=lambda item: item[1]):
            table.add_row(step, f"{at:.0f}", f"{at - previous:.0f}", STEPS[step])
            previous = at
        self.console.print(table)
        compare = Table("", "ms", title="What the warm parent saves")
        compare.add_row("event → job completed, forked from the warm parent", f"{shown.warm_ms:.0f}")
        compare.add_row("the same without it", f"{shown.cold_ms:.0f}")
        compare.add_row("  cold boot", f"{shown.cold_boot_ms:.0f}")
        compare.add_row("  installing the dependencies in the guest", f"{shown.cold_install_ms:.0f}")
        compare.add_row("  the job's steps", f"{shown.cold_job_ms:.0f}")
        self.console.print(compare)
        self.console.print(
            f"Memory of the job's VM: {shown.private_mib:.1f} MiB its own at the most "
            f"(PSS {shown.pss_mib:.1f} MiB, shared pages counted in part)"
        )
        if shown.leftovers:
            self.console.print("[red]Left behind:[/red]")
            for line in shown.leftovers:
                self.console.print(f"  {line}")
        else:
            self.console.print(
                "[green]Nothing remains[/green]: no process, mount, namespace, device, disk or socket of the job"
            )


def shown_on(progress: Progress, task: Any) -> Callable[[BakeEvent], None]:
    """Bake events as the description of a progress bar."""

    def show(event: BakeEvent) -> None:
        total = None if event.fraction is None else 1.0
        progress.update(
            task,
            description=f"{event.step}: {event.message}"[:72],
            total=total,
            completed=event.fraction or 0,
        )

    return show


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("MICROVM_TEST_DATA", "/var/tmp/microvm-tests")),
        help="where templates are kept between runs (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    console = Console()
    try:
        shown = asyncio.run(Demo(options.data_dir, console).play())
    except (StageError, httpx.HTTPError, VmmError, ImageError) as error:
        console.print(f"[red]the demo failed:[/red] {escape(str(error))}", highlight=False)
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(msgspec.to_builtins(shown), indent=2) + "\n")
    return 1 if shown.leftovers else 0


if __name__ == "__main__":
    sys.exit(main())
