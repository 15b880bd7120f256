"""VMs and guests that go wrong: the job's timeline says so, and the host gets everything back."""

import asyncio
import os
import signal
from collections.abc import Mapping

import pytest

from scripts.programs.stage import Stage
from tests.acceptance.conftest import gone, queue, running, steps, told, vms
from vmm_core.engine import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def limits() -> Mapping[str, float]:
    """A runner that never comes online, or is never let go, ends in seconds."""
    return {"online_limit_s": 4.0, "retire_limit_s": 60.0, "log_limit_mib": 1}


async def test_a_vmm_killed_in_the_middle_is_told_and_everything_is_given_back(
    stage: Stage, engine: Engine
) -> None:
    job = await queue(stage, "hold")
    story = await running(stage, job)
    os.kill(vms(engine)[story["job"]["vm"]].pid, signal.SIGKILL)
    story = await gone(stage, job)
    assert told(story, "retiring").startswith("the VM ended: ")
    assert "signal 9" in told(story, "retiring")
    ending = story["runners"][0]["ending"]
    assert (ending["cause"], ending["signal"]) == ("vmm_killed", 9)
    assert "RESUME" in [event["name"] for event in ending["events"]]
    assert story["job"]["usage"]["cpu_seconds"] > 0
    assert story["runners"][0]["code"] == "vm_died"
    assert "destroyed" in steps(story)
    assert not vms(engine)
    # The forge notices that its runner is lost, and says how the job ended.
    await stage.forge.wait_for(job, "completed", 60)
    assert job.conclusion == "failure"


async def test_a_guest_that_panics_is_told_with_its_last_words(stage: Stage, engine: Engine) -> None:
    job = await queue(stage, "panic")
    story = await gone(stage, job)
    assert story["runners"][0]["code"] == "vm_died"
    assert "Kernel panic" in told(story, "retiring"), story["timeline"]
    ending = story["runners"][0]["ending"]
    assert ending["cause"] == "guest_panic"
    assert "Call Trace" in ending["panic"]
    metrics = (await stage.http.get("/metrics")).text
    assert 'microvm_vm_ends_total{cause="guest_panic"} 1.0' in metrics
    assert f'microvm_repository_cpu_seconds_total{{repository="{story["job"]["repository"]}"}}' in metrics
    assert "\nbefore\n" in (await stage.http.get(f"/jobs/{job.id}/log")).text
    assert not vms(engine)
    await stage.forge.wait_for(job, "completed", 60)


async def test_a_job_that_fills_its_disk_fails_and_says_so(stage: Stage, engine: Engine) -> None:
    job = await queue(stage, "fill")
    story = await gone(stage, job)
    assert job.conclusion == "failure"
    assert "No space left on device" in (await stage.http.get(f"/jobs/{job.id}/log")).text
    assert "failure" in told(story, "completed")
    assert not vms(engine)


async def test_a_runner_that_never_comes_online_ends_by_its_deadline(stage: Stage, engine: Engine) -> None:
    fault = stage.forge.fault("POST */_standin/session", status=500, times=None)
    job = await queue(stage, "hello")
    story = await gone(stage, job)
    assert story["runners"][0]["code"] == "late_registering"
    assert "did not come online within 4 s" in told(story, "retiring")
    assert "deregistered" in steps(story)
    assert "destroyed" in steps(story)
    # The job is still wanted: with the fault over, the next runner takes it.
    fault.times = fault.hits
    await stage.forge.wait_for(job, "completed", 120)
    assert job.conclusion == "success"
    await stage.until(job, lambda story: all(one["state"] == "gone" for one in story["runners"]), "all gone")


async def test_a_log_flood_is_cut_at_its_cap_and_costs_the_job_nothing(stage: Stage) -> None:
    job = await queue(stage, "flood")
    await gone(stage, job)
    assert job.conclusion == "success"
    log = (await stage.http.get(f"/jobs/{job.id}/log")).content
    assert (1 << 20) <= len(log) < (1 << 20) + 200
    assert b"[truncated: this log is capped at 1048576 bytes]" in log
    assert stage.forge.log(job.id).count("flood-end") >= 1


async def test_an_operator_kills_a_vm_and_the_runner_is_retired(stage: Stage, engine: Engine) -> None:
    job = await queue(stage, "hold")
    story = await running(stage, job)
    answer = await stage.http.post(f"/vms/{story['job']['vm']}/kill")
    assert answer.status_code == 202
    story = await gone(stage, job)
    assert "killed by an operator" in told(story, "retiring")
    assert not vms(engine)
    unknown = await stage.http.post("/vms/nosuch/kill")
    assert (unknown.status_code, unknown.json()["title"]) == (404, "UnknownVm")
    await stage.forge.wait_for(job, "completed", 60)


async def test_other_jobs_do_not_notice_that_a_vm_died(stage: Stage, engine: Engine) -> None:
    victim, neighbour = await queue(stage, "hold"), await queue(stage, "hold")
    (story, other) = await asyncio.gather(running(stage, victim), running(stage, neighbour))
    os.kill(vms(engine)[story["job"]["vm"]].pid, signal.SIGKILL)
    await gone(stage, victim)
    assert (await stage.story(neighbour))["job"]["vm"] == other["job"]["vm"]
    assert neighbour.status == "in_progress"
    stage.forge.actions.cancel(neighbour.run)
    await gone(stage, neighbour)
    assert neighbour.conclusion == "cancelled"
    await stage.forge.wait_for(victim, "completed", 60)
