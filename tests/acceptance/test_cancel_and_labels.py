"""Cancelled jobs, and labels: which are ours, which are not, and which we cannot serve and say so."""

import asyncio
import sys

import pytest

from scripts.programs.stage import Stage
from tests.acceptance.conftest import eventually, gone, queue, running, steps, told, vms
from vmm_core.engine import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


async def test_cancelled_before_pick_up_the_runner_is_given_up(stage: Stage, engine: Engine) -> None:
    stage.forge.fault("POST */_standin/session", status=500)  # so that it cannot be picked up
    job = await queue(stage, "hello")
    await stage.until(job, lambda story: "forked" in steps(story), "forked")
    stage.forge.actions.cancel(job.run)
    story = await gone(stage, job)
    assert job.conclusion == "cancelled"
    assert (story["job"]["state"], story["job"]["conclusion"]) == ("completed", "cancelled")
    assert "deregistered" in steps(story)
    assert "destroyed" in steps(story)
    assert story["runners"][0]["code"] == "cancelled"
    assert not vms(engine)
    stage.forge.faults.clear()


async def test_cancelled_at_once_leaves_nothing(stage: Stage) -> None:
    job = await queue(stage, "hello")
    stage.forge.actions.cancel(job.run)
    story = await stage.until(job, lambda story: story["job"]["state"] == "completed", "completed")
    await stage.until(job, lambda story: all(one["state"] == "gone" for one in story["runners"]), "gone")
    assert story["job"]["conclusion"] == "cancelled"
    assert "busy" not in steps(story)


async def test_cancelled_while_running_the_job_stops_and_the_machine_goes(stage: Stage) -> None:
    job = await queue(stage, "hold")
    await running(stage, job)
    await stage.forge.wait_for_log(job, "holding", 60)
    stage.forge.actions.cancel(job.run)
    story = await gone(stage, job)
    assert job.conclusion == "cancelled"
    assert story["job"]["conclusion"] == "cancelled"
    assert "The operation was canceled" in (await stage.http.get(f"/jobs/{job.id}/log")).text


async def test_a_job_that_is_not_ours_is_ignored(stage: Stage, engine: Engine) -> None:
    job = await queue(stage, "foreign")
    await stage.forge.webhooks.settled()
    (sent,) = [one for one in stage.forge.webhooks.sent if f'"id":{job.id},' in one.body.decode()]
    assert sent.status_code in (200, 202)
    # One that is ours comes after it: once that is known, this one was looked at.
    ours = await queue(stage, "hello")
    await gone(stage, ours)
    assert 'microvm_events_total{outcome="foreign"}' in (await stage.http.get("/metrics")).text
    assert (await stage.http.get(f"/jobs/{job.id}")).status_code == 404
    assert f"{job.id}" not in {one["id"] for one in (await stage.http.get("/jobs")).json()}
    assert not vms(engine)
    stage.forge.actions.cancel(job.run)
    await stage.forge.webhooks.settled()
    assert (await stage.http.get(f"/jobs/{job.id}")).status_code == 404


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nosuch", "no template for label 'microvm-nosuch'"), ("unknown", "the label 'gpu' beside 'microvm'")],
)
async def test_labels_nothing_serves_get_a_reason(
    stage: Stage, engine: Engine, name: str, reason: str
) -> None:
    job = await queue(stage, name)
    story = await stage.until(job, lambda story: story["job"]["waits_for"], "a reason")
    assert reason in story["job"]["waits_for"]
    assert reason in told(story, "not served")
    assert story["runners"] == []
    assert not vms(engine)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runner_service.cli", "why", str(job.id), "--config", str(stage.config),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert reason in " ".join(out.decode().split())
    stage.forge.actions.cancel(job.run)
    story = await stage.until(job, lambda story: story["job"]["state"] == "completed", "completed")
    assert story["job"]["waits_for"] is None


async def test_labels_beside_ours_and_names_of_templates_are_served(stage: Stage) -> None:
    companions, named = await queue(stage, "companions"), await queue(stage, "named")
    for job in (companions, named):
        story = await gone(stage, job)
        assert job.conclusion == "success"
        assert story["job"]["template"] == "github-runner"
    await eventually(lambda: not stage.forge.actions.runners, "no registration")
