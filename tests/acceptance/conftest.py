"""The product as its users meet it: real VMs, the service as its own process, real git, real HTTP.

A stage (stand-in GitHub and service) is shared by the tests of a module; each test brings its own jobs.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from scripts.programs.leftovers import Leftovers
from scripts.programs.stage import FILES, Stage, step_at
from tests.acceptance.jobs import JOBS
from tests.standins.github_state import Job, Times
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot, VmRecord

T = TypeVar("T")
# What a slow machine under load may take for what takes a second elsewhere.
PATIENCE = 120.0
# Short where GitHub is slow, so that a test of a lost runner does not wait ten minutes. A poll of a VM that was killed
# stays open: its end tells nobody.
TIMES = Times(session=5.0, lost_runner=5.0, poll=5.0, pick_up=15.0)


@pytest.fixture(scope="session")
async def engine(data_dir: Path) -> AsyncIterator[Engine]:
    async with Engine.open(data_dir) as opened:
        yield opened


@pytest.fixture(scope="session")
async def template(engine: Engine) -> Snapshot:
    """The shipped github-runner recipe with the stand-in runner in it, baked once for all runs."""
    snapshot = (await Stage.prepare(engine, progress=lambda _event: None)).snapshot
    await engine.prewarm(snapshot)
    return snapshot


@pytest.fixture(scope="module")
def limits() -> Mapping[str, float]:
    """Deadlines of the service in this module; a module that needs shorter ones overrides this."""
    return {"exit_grace_s": 10.0, "retire_limit_s": 60.0}


@pytest.fixture(scope="module")
def max_vms() -> int:
    """Capacity of the service in this module; a module that must not meet it overrides this."""
    return 8


@pytest.fixture(scope="module")
def bakes() -> Mapping[str, float] | None:
    """Settings of the service's bakes in this module; None: none are made."""
    return None


@pytest.fixture(scope="module")
def frozen() -> Mapping[str, object]:
    """Settings of the VMs of failed jobs that are kept in this module; by default none are."""
    return {}


@pytest.fixture(scope="module")
async def stage(
    engine: Engine,
    template: Snapshot,
    limits: Mapping[str, float],
    max_vms: int,
    bakes: Mapping[str, float] | None,
    frozen: Mapping[str, object],
) -> AsyncIterator[Stage]:
    del template  # jobs are forked from it
    opening = Stage.open(
        engine,
        files={**FILES, **JOBS},
        limits=limits,
        times=TIMES,
        max_vms=max_vms,
        bakes=bakes,
        frozen=frozen,
    )
    async with opening as opened:
        yield opened


@pytest.fixture
async def nothing_left(engine: Engine, stage: Stage) -> AsyncIterator[None]:
    """After the test the host and the forge are as before it, with the service still running."""
    before = Leftovers.look(engine)
    yield
    left: list[str] = []

    def clean() -> bool:
        left[:] = Leftovers.look(engine).since(before)
        left.extend(f"registration: {runner.name}" for runner in stage.forge.actions.runners.values())
        return not left

    # Others on this host may come and go; what this test left stays.
    with contextlib.suppress(TimeoutError):
        await eventually(clean, "nothing left")
    assert not left


async def eventually(met: Callable[[], Any], what: str, *, timeout: float = PATIENCE) -> Any:
    """The first true answer of ``met``. TimeoutError that names ``what`` was waited for."""
    deadline = time.monotonic() + timeout
    while not (answer := met()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for: {what}")
        await asyncio.sleep(0.05)
    return answer


async def eventually_async(met: Callable[[], Awaitable[T]], what: str, *, timeout: float = PATIENCE) -> T:
    """As ``eventually``, for what has to be asked for."""
    deadline = time.monotonic() + timeout
    while not (answer := await met()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for: {what}")
        await asyncio.sleep(0.25)
    return answer


async def queue(stage: Stage, name: str, repository: str = "hello") -> Job:
    """Queue the job ``name`` of jobs.py."""
    run = await stage.forge.queue_run("octo-org", repository, workflow=f".github/workflows/{name}.yml")
    return run.jobs[0]


async def gone(stage: Stage, job: Job) -> dict[str, Any]:
    """The job's story once its runner is gone."""
    return await stage.until(job, lambda story: step_at(story, "gone") is not None, "gone")


async def running(stage: Stage, job: Job) -> dict[str, Any]:
    """The job's story once its steps run in a VM."""
    return await stage.until(
        job, lambda story: story["job"]["state"] == "in_progress" and story["job"]["vm"], "running"
    )


def steps(story: Mapping[str, Any]) -> list[str]:
    return [row["step"] for row in story["timeline"]]


def told(story: Mapping[str, Any], step: str) -> str:
    """The reasons of all rows of this step, joined."""
    return " | ".join(row["reason"] for row in story["timeline"] if row["step"] == step)


def vms(engine: Engine) -> dict[str, VmRecord]:
    """The VMs of the service under test, by id."""
    return {record.id: record for record in engine.records() if "runner_id" in record.metadata}
