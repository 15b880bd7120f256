"""Jobs no webhook tells of: without any way in from outside, and with every delivery lost."""

import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from scripts.programs.stage import FILES, Stage, step_at
from tests.acceptance.conftest import TIMES, eventually, gone, queue, steps, told
from tests.acceptance.jobs import JOBS
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot

pytestmark = pytest.mark.anyio

LIMITS = {"exit_grace_s": 10.0, "retire_limit_s": 60.0}


@contextlib.asynccontextmanager
async def stage_of(engine: Engine, **github: str | float) -> AsyncIterator[Stage]:
    opening = Stage.open(
        engine, files={**FILES, **JOBS}, limits=LIMITS, times=TIMES, max_vms=4, github=github
    )
    async with opening as stage:
        yield stage


async def test_without_webhooks_a_job_runs_all_the_same(engine: Engine, template: Snapshot) -> None:
    del template
    async with stage_of(engine, ingress="poll", poll_s=2.0) as stage:
        assert (await stage.http.post("/webhooks/github", content=b"{}")).status_code == 404
        job = await queue(stage, "hello")
        story = await gone(stage, job)
        assert job.conclusion == story["job"]["conclusion"] == "success", stage.log_tail()
        assert "found by a poll" in told(story, "queued")
        assert set(steps(story)) >= {"forked", "started", "completed", "deregistered", "destroyed"}
        assert not stage.forge.actions.runners
        metrics = (await stage.http.get("/metrics")).text
        assert 'microvm_jobs_found_total{via="poll"} 1.0' in metrics
        assert {sent.status_code for sent in stage.forge.webhooks.sent} == {502}


async def test_with_every_delivery_lost_jobs_are_found_in_time(engine: Engine, template: Snapshot) -> None:
    del template
    async with stage_of(engine, poll_s=5.0) as stage:
        stage.forge.webhooks.mishaps.lose = 1_000_000
        # The repository was never heard of: the credentials reach it.
        job = await queue(stage, "hello")
        queued_at = time.time()
        await eventually(lambda: job.status == "completed", "the job to run")
        story = await gone(stage, job)
        assert job.conclusion == story["job"]["conclusion"] == "success", stage.log_tail()
        found_at = step_at(story, "queued")
        assert found_at is not None and found_at - queued_at < 30.0
        # What it costs to look on when nothing happens: nothing.
        (token,) = stage.forge.rest.tokens.values()
        calls, left = len(stage.forge.calls), token.hour.remaining
        await eventually(lambda: len(stage.forge.calls) >= calls + 6, "two more looks")
        assert left - token.hour.remaining <= 4, "unchanged listings are answered with 304"
