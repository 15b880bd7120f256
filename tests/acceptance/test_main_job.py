"""The main job: a signed event becomes a job in a VM of its own, its log streams, and nothing remains."""

import asyncio

import pytest

from scripts.programs.stage import Stage, step_at
from tests.acceptance.conftest import gone, queue, running, steps, told, vms
from tests.acceptance.jobs import PRINTED
from tests.standins.github_state import Job
from vmm_core.engine import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

# Fork and registration run at once, so their order is free; so is the order of what a finished job sets off.
ORDER = ["queued", "wanted", "placed", "forking", "registering", "idle", "busy", "retiring", "gone"]


async def test_a_signed_event_becomes_a_finished_job_and_nothing_remains(
    stage: Stage, engine: Engine
) -> None:
    job = await stage.queue()
    story = await gone(stage, job)
    log = (await stage.http.get(f"/jobs/{job.id}/log")).text
    assert job.conclusion == "success", f"{stage.forge.log(job.id)}\n{log}\n{stage.log_tail()}"

    found = steps(story)
    assert [step for step in found if step in ORDER] == ORDER
    assert set(found) >= {"forked", "registered", "started", "completed", "deregistered", "destroyed"}
    assert found.index("forking") < found.index("forked") < found.index("started") < found.index("destroyed")
    assert found.index("forking") < found.index("registered") < found.index("started")
    times = [row["at"] for row in story["timeline"]]
    assert times == sorted(times)
    assert all(row["reason"] or row["waits_for"] for row in story["timeline"])

    assert story["job"]["conclusion"] == "success"
    assert story["job"]["waits_for"] is None
    assert story["job"]["vm"] is None
    assert [runner["exit_code"] for runner in story["runners"]] == [0]
    assert "2 passed" in log
    assert "Job test completed with result: Succeeded" in log
    assert "2 passed" in stage.forge.log(job.id)
    assert not vms(engine)
    assert not stage.forge.actions.runners
    answers = {sent.status_code for sent in stage.forge.webhooks.sent}
    assert answers <= {200, 202}, answers


async def test_the_log_streams_while_the_job_runs_and_is_complete_at_the_end(stage: Stage) -> None:
    job = await queue(stage, "lines")
    await stage.until(job, lambda _story: True, "known")
    live = bytearray()
    early = b""
    async with asyncio.timeout(180):
        async with stage.http.stream("GET", f"/jobs/{job.id}/log?follow=true", timeout=None) as answer:
            assert answer.status_code == 200
            async for piece in answer.aiter_bytes():
                live += piece
                if job.status == "in_progress":
                    early = bytes(live)
    assert b"line 10\n" in early, "nothing came while the job ran"
    assert len(early) < len(live)
    assert PRINTED in live.decode()
    assert live.rstrip().endswith(b"Succeeded")
    await gone(stage, job)
    whole = await stage.http.get(f"/jobs/{job.id}/log")
    assert whole.content == bytes(live)
    assert whole.headers["content-type"].startswith("text/plain")
    # From any byte on, and again with follow when there is nothing more to come.
    rest = await stage.http.get(f"/jobs/{job.id}/log", params={"offset": 500, "follow": "true"})
    assert rest.content == bytes(live[500:])


async def test_four_jobs_at_once_run_in_four_machines(stage: Stage) -> None:
    jobs = [await queue(stage, "identity") for _ in range(4)]
    stories = [await gone(stage, job) for job in jobs]
    assert [job.conclusion for job in jobs] == ["success"] * 4
    identities = {
        line for job in jobs for line in stage.forge.log(job.id).splitlines() if line.startswith("id=")
    }
    assert len(identities) == 4
    assert len({story["job"]["runner"] for story in stories}) == 4
    forked = {told(story, "forked").split()[1] for story in stories}
    assert len(forked) == 4


async def test_a_failing_job_is_told_as_failed_and_its_machine_goes_all_the_same(stage: Stage) -> None:
    job = await queue(stage, "fails")
    story = await gone(stage, job)
    assert (job.conclusion, story["job"]["conclusion"]) == ("failure", "failure")
    assert "failure" in told(story, "completed")
    assert "exit code 3" in stage.forge.log(job.id)
    assert step_at(story, "destroyed") is not None


async def test_events_may_come_twice_late_and_in_the_wrong_order(stage: Stage) -> None:
    stage.forge.webhooks.mishaps.double = 3
    twice = await queue(stage, "hello")
    await gone(stage, twice)
    assert twice.conclusion == "success"

    first = len(stage.forge.webhooks.sent)
    late = await queue(stage, "hello")
    stage.forge.webhooks.mishaps.hold = True  # "queued" is on its way; the others are held back
    await stage.forge.wait_for(late, "completed", timeout=120)
    stage.forge.webhooks.release(reverse=True)
    story = await gone(stage, late)
    await stage.forge.webhooks.settled()
    assert story["job"]["state"] == "completed"
    # Once more, all of it: a job that is over does not begin again.
    for guid in {sent.guid for sent in stage.forge.webhooks.sent[first:]}:
        stage.forge.webhooks.redeliver(guid)
    await stage.forge.webhooks.settled()
    again = await stage.story(late)
    assert len(again["runners"]) == 1
    assert again["job"]["conclusion"] == "success"


async def test_a_runner_that_takes_another_job_leaves_none_behind(stage: Stage) -> None:
    """Registration does not pin a job: with two alike, each runner may take the other's. Both must end."""
    jobs: list[Job] = [await queue(stage, name) for name in ("hello", "hello", "companions", "named")]
    for job in jobs:
        await gone(stage, job)
    assert {job.conclusion for job in jobs} == {"success"}


async def test_what_runs_is_shown_and_counted(stage: Stage, engine: Engine) -> None:
    job = await queue(stage, "hold")
    story = await running(stage, job)
    shown = (await stage.http.get("/vms")).json()
    (vm,) = [one for one in shown if one["runner"] == story["job"]["runner"]]
    assert vm["job"] == story["job"]["id"]
    assert vm["id"] == story["job"]["vm"]
    assert vm["private_dirty_bytes"] > 0
    assert vm["pid"] == vms(engine)[vm["id"]].pid
    metrics = (await stage.http.get("/metrics")).text
    assert 'microvm_runners{state="busy"} 1.0' in metrics
    assert "microvm_vms 1.0" in metrics
    assert (await stage.http.get("/healthz")).json()["status"] == "ok"
    assert (await stage.http.get("/readyz")).json()["ready"] is True
    stage.forge.actions.cancel(job.run)
    await gone(stage, job)
