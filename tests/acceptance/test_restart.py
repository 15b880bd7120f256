"""The service is killed or stopped in the middle of a job and started again: neither job nor VM is lost."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from scripts.programs.stage import Stage
from tests.acceptance.conftest import PATIENCE, eventually, gone, queue, running, steps, told, vms
from tests.acceptance.jobs import PRINTED
from tests.standins.github_state import Job
from vmm_core.engine import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


@asynccontextmanager
async def following(stage: Stage, job: Job) -> AsyncIterator["asyncio.Task[tuple[bytes, bytes]]"]:
    """``microvm logs -f`` as its own process; the task ends with it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runner_service.cli", "logs", "-f", str(job.id), "--config", str(stage.config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    reading = asyncio.create_task(process.communicate())
    try:
        yield reading
    finally:
        if process.returncode is None:
            process.kill()
        await asyncio.gather(reading, return_exceptions=True)


async def _reached(stage: Stage, job: Job, line: int) -> None:
    await stage.forge.wait_for_log(job, f"line {line}\n", PATIENCE)


async def test_a_job_outlives_sigkill_and_stop_of_the_service_and_its_log_has_no_gap(
    stage: Stage, engine: Engine
) -> None:
    job = await queue(stage, "lines")
    story = await running(stage, job)
    (vm,) = vms(engine).values()
    assert story["job"]["vm"] == vm.id
    async with following(stage, job) as followed:
        await _reached(stage, job, 20)
        await stage.kill()
        await _reached(stage, job, 60)  # written while nobody listens
        await stage.start()
        adopted = await running(stage, job)
        assert adopted["job"]["vm"] == vm.id
        assert vms(engine) == {vm.id: vm}

        await _reached(stage, job, 110)
        await stage.stop()
        assert stage.service.returncode == 0
        assert vms(engine) == {vm.id: vm}
        await _reached(stage, job, 140)
        await stage.start()

        story = await gone(stage, job)
        assert job.conclusion == "success", stage.log_tail()
        async with asyncio.timeout(PATIENCE):
            out, error = await followed
    log = (await stage.http.get(f"/jobs/{job.id}/log")).text
    assert PRINTED in log, "a gap, or something twice"
    assert log.rstrip().endswith("Succeeded")
    assert out.decode() == log, error
    assert steps(story).count("adopted") == 2
    assert vm.id in told(story, "adopted")
    assert len(story["runners"]) == 1
    assert not vms(engine)


@pytest.mark.parametrize("step", ["placed", "forked", "started", "idle"])
async def test_killed_while_the_runner_starts_the_job_still_runs_once(
    stage: Stage, engine: Engine, step: str
) -> None:
    job = await queue(stage, "hello")
    await stage.until(job, lambda story: step in steps(story), step)
    await stage.kill()
    await stage.start()
    story = await gone(stage, job)
    assert job.conclusion == "success", stage.log_tail()
    await stage.until(job, lambda story: all(one["state"] == "gone" for one in story["runners"]), "all gone")
    assert story["job"]["conclusion"] == "success"
    assert stage.forge.log(job.id).count("\nhello from microvm-") == 1
    assert not vms(engine)


async def test_a_job_that_ends_while_the_service_is_down_is_told_afterwards(
    stage: Stage, engine: Engine
) -> None:
    job = await queue(stage, "hello")
    await stage.until(job, lambda story: "started" in steps(story), "started")
    await stage.kill()
    await stage.forge.wait_for(job, "completed", PATIENCE)
    await stage.start()
    story = await gone(stage, job)
    assert story["job"]["conclusion"] == "success"
    assert "completed with result: Succeeded" in (await stage.http.get(f"/jobs/{job.id}/log")).text
    assert not vms(engine)


async def test_an_event_lost_while_the_service_is_down_counts_when_it_is_redelivered(stage: Stage) -> None:
    await stage.kill()
    job = await queue(stage, "hello")
    await stage.forge.webhooks.settled()
    (lost,) = [sent for sent in stage.forge.webhooks.sent if f'"id":{job.id},' in sent.body.decode()]
    assert lost.status_code == 502
    await stage.start()
    assert not await stage.story(job)
    stage.forge.webhooks.redeliver(lost.guid)
    await gone(stage, job)
    assert job.conclusion == "success"


async def test_a_vm_that_died_while_the_service_was_down_is_told(stage: Stage, engine: Engine) -> None:
    job = await queue(stage, "hold")
    await running(stage, job)
    (vm,) = vms(engine).values()
    await stage.kill()
    await engine.destroy(vm.id)
    await stage.start()
    story = await gone(stage, job)
    assert "did not survive" in told(story, "retiring")
    await eventually(lambda: job.status == "completed", "the forge gives the job up")


async def test_a_second_service_on_the_same_data_is_refused(stage: Stage) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runner_service.cli", "serve", "--config", str(stage.config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 2
    assert out.decode().startswith("microvm: another service runs on")
    assert "Traceback" not in out.decode()
    assert (await stage.http.get("/healthz")).status_code == 200
