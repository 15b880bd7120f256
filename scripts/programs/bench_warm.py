"""Measures what a repository's warm parent saves: two real repositories, each job with and without it.

A job is measured from the fork of its machine to the end of its first test, through the service and a runner. What a
child snapshot needs is counted: the blocks of its disk and the pages of its memory that differ from its base's.
"""

import asyncio
import contextlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
from rich.progress import Progress

from images.lockfiles import dependency_key, inventory
from images.mirror import fetch_mirror
from images.warm import WarmBaked, bake_repository
from images.warm_plan import Request
from scripts.programs.measure import Tick
from scripts.programs.stage import OWNER, TEMPLATE, Stage, git, make_repository, step_at
from tests.acceptance.samples import sample
from tests.standins.github_state import Job
from vmm_core.drivers.base import DISK, MEMORY
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot

# What is asked of each figure; the table shows it beside what was measured.
LIMITS: dict[str, tuple[str, Callable[[dict[str, float]], float]]] = {
    "warm.python_speedup": ("≥ 10", lambda _: 10.0),
    "warm.node_speedup": ("≥ 10", lambda _: 10.0),
    "warm.fork_ratio": ("≤ 1.15", lambda _: 1.15),
    "warm.rebake_ratio": ("≤ 0.5", lambda _: 0.5),
    "warm.child_bytes_ratio": ("≤ 1.15", lambda _: 1.15),
    "warm.key_ms": ("≤ 300", lambda _: 300.0),
}
# What the first test's end looks like in the job's log.
_TESTED = {"python": "1 passed", "node": "pass 1"}
_JOB_SECONDS = 1500.0
_FILES = 20_000
# The dependency that is there once and not before: no other of the sample's needs it.
_CHANGED = "humanize=="
_BLOCK = 4096
_CHUNK = 4 << 20


class Plan(msgspec.Struct, frozen=True):
    """How many times each thing is measured."""

    cold: int
    warm: int
    forks: int
    keys: int


FULL = Plan(cold=2, warm=6, forks=30, keys=9)
QUICK = Plan(cold=1, warm=3, forks=12, keys=5)


async def measure(engine: Engine, parent: Snapshot, progress: Progress, *, quick: bool) -> dict[str, float]:
    """All figures of the suite; ``parent`` is the template the repositories' parents are forks of."""
    plan = QUICK if quick else FULL
    task = progress.add_task("warm", total=2 * (plan.cold + plan.warm) + plan.forks + plan.keys + 5)

    def tick(what: str) -> None:
        progress.update(task, advance=1, description=what)

    figures: dict[str, float] = {}

    def tell(more: Mapping[str, float]) -> None:
        """Each is shown once it is known: all of them take long."""
        figures.update(more)
        for key, value in more.items():
            progress.console.print(f"{key} {value:.3f}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="microvm-warm-") as scratch:
        paths = {name: await make_repository(Path(scratch) / name, sample(name)) for name in _TESTED}
        for name, path in paths.items():
            cold, warm = await _jobs(engine, name, path, plan, tick)
            tell(
                {
                    f"warm.{name}_cold_s": cold,
                    f"warm.{name}_warm_s": warm,
                    f"warm.{name}_speedup": cold / warm,
                }
            )
        tell(await _rebake(engine, paths["python"], parent, plan, tick))
        tell(await _keys(Path(scratch), plan, tick))
    return figures


async def _jobs(engine: Engine, name: str, path: Path, plan: Plan, tick: Tick) -> tuple[float, float]:
    """Seconds of the repository's job from the template, and from its parent."""
    async with Stage.open(engine) as stage:
        await stage.forge.add_repository(path, owner=OWNER, name=name)
        cold = [await _job(stage, name, tick) for _ in range(plan.cold)]
    async with Stage.open(engine, bakes={"poll_s": 0}) as stage:
        await stage.forge.add_repository(path, owner=OWNER, name=name)
        async with _parent(engine, stage, name, path):
            tick(f"{name}: baked")
            warm = [await _job(stage, name, tick) for _ in range(plan.warm)]
    return statistics.median(cold), statistics.median(warm)


@contextlib.asynccontextmanager
async def _parent(engine: Engine, stage: Stage, name: str, path: Path) -> AsyncGenerator[WarmBaked]:
    """The parent of the repository while this holds."""
    request = Request(url=str(path), spelled=f"{OWNER}/{name}", template=TEMPLATE, server=stage.server)
    baked = await bake_repository(engine, request, progress=lambda _event: None, force=True)
    try:
        yield baked
    finally:
        await asyncio.to_thread(engine.snapshots.remove, baked.digest)


async def _job(stage: Stage, name: str, tick: Tick) -> float:
    """Seconds from the fork to the end of the first test."""
    run = await stage.forge.queue_run(OWNER, name, workflow=".github/workflows/ci.yml")
    job: Job = run.jobs[0]
    await stage.forge.wait_for_log(job, _TESTED[name], _JOB_SECONDS)
    ended = time.time()
    await stage.forge.wait_for(job, "completed", _JOB_SECONDS)
    story = await stage.until(job, lambda story: step_at(story, "gone") is not None, "gone")
    forking = step_at(story, "forking")
    if forking is None or job.conclusion != "success":
        raise RuntimeError(f"the job of {name} ended as {job.conclusion}:\n{stage.forge.log(job.id)}")
    tick(f"{name}: a job")
    return ended - forking


async def _rebake(engine: Engine, path: Path, base: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """A bake from the base, one after a dependency has changed, and what the first one's snapshot is like."""
    template = base.manifest.labels["template"]
    request = Request(url=str(path), spelled=f"{OWNER}/rebaked", template=template)
    lines = (path / "requirements.txt").read_text().splitlines()
    fewer = [line for line in lines if not line.startswith(_CHANGED)]
    if len(fewer) != len(lines) - 1:
        raise RuntimeError(f"the sample does not lock {_CHANGED}")
    _lock(path, fewer)
    first = await bake_repository(engine, request, progress=lambda _event: None, force=True)
    try:
        tick("a bake from the base")
        made = engine.snapshots.load(first.digest)
        figures = await _forks(engine, base, made, plan, tick)
        figures["warm.child_bytes_ratio"] = await asyncio.to_thread(_bytes_ratio, engine, made, base)
        _lock(path, lines)
        again = await bake_repository(engine, request, progress=lambda _event: None)
        tick("a bake after a change")
        await asyncio.to_thread(engine.snapshots.remove, again.digest)
    finally:
        await asyncio.to_thread(engine.snapshots.remove, first.digest)
    if not again.incremental:
        raise RuntimeError("the second bake did not start from the first one's parent")
    return {
        **figures,
        "warm.bake_s": first.seconds,
        "warm.rebake_s": again.seconds,
        "warm.rebake_ratio": again.seconds / first.seconds,
    }


def _lock(path: Path, lines: Sequence[str]) -> None:
    """Commit these locked packages."""
    (path / "requirements.txt").write_text("\n".join([*lines, ""]))
    git(path, "commit", "-qam", "lock")


async def _forks(engine: Engine, base: Snapshot, child: Snapshot, plan: Plan, tick: Tick) -> dict[str, float]:
    """Forks of the parent and of its base, in turn."""
    times: Mapping[str, list[float]] = {base.digest: [], child.digest: []}
    for number in range(plan.forks + 2):
        for snapshot in (base, child):
            started = time.perf_counter()
            async with engine.fork(snapshot, owner=OWNER):
                elapsed = (time.perf_counter() - started) * 1e3
            if number >= 2:
                times[snapshot.digest].append(elapsed)
        tick("a fork of each")
    ours, theirs = statistics.median(times[child.digest]), statistics.median(times[base.digest])
    return {"warm.fork_p50_ms": ours, "warm.base_fork_p50_ms": theirs, "warm.fork_ratio": ours / theirs}


def _bytes_ratio(engine: Engine, child: Snapshot, base: Snapshot) -> float:
    """Bytes of the pool only the child holds, by those of its blocks and pages that differ from its base's."""
    needed = sum(_differing(child.path / name, base.path / name) for name in (DISK, MEMORY))
    return engine.snapshots.private_bytes(child.digest) / needed


def _differing(own: Path, other: Path) -> int:
    """Bytes of the blocks that are not what the other file has there; holes are zeros."""
    count = 0
    with own.open("rb") as one, other.open("rb") as two:
        while left := one.read(_CHUNK):
            right = two.read(len(left)).ljust(len(left), b"\0")
            if left != right:
                count += sum(
                    left[at : at + _BLOCK] != right[at : at + _BLOCK] for at in range(0, len(left), _BLOCK)
                )
    return count * _BLOCK


async def _keys(scratch: Path, plan: Plan, tick: Tick) -> dict[str, float]:
    """The dependency key of a repository with 20,000 files, its mirror warm."""
    path = scratch / "large"
    subprocess.run(["git", "init", "-q", "-b", "main", path], check=True, timeout=60)
    words = ["commit refs/heads/main\ncommitter O <o@localhost> 1700000000 +0000\ndata 5\nfiles\n"]
    for number in range(_FILES):
        locked = number % 500 == 0
        name = f"package-{number // 100}/{'package-lock.json' if locked else f'file-{number}.py'}"
        text = f'{{"name": "p{number}"}}' if locked else f"value = {number}"
        words.append(f"M 644 inline {name}\ndata {len(text)}\n{text}\n")
    stream = "".join(words).encode()
    subprocess.run(["git", "fast-import", "--quiet"], input=stream, cwd=path, check=True, timeout=120)
    mirror = await fetch_mirror(scratch / "mirrors", str(path))
    commit = mirror.resolve().sha
    times: list[float] = []
    for number in range(plan.keys + 1):
        started = time.perf_counter()
        found = await asyncio.to_thread(inventory, mirror.path, commit)
        dependency_key(base_digest="0" * 64, runner="2.329.0", inventory=found, config=None)
        if number:
            times.append((time.perf_counter() - started) * 1e3)
        tick("key of a large repository")
    return {"warm.key_files": float(_FILES), "warm.key_ms": statistics.median(times)}
