"""Twenty jobs in real VMs while events get lost, VMs and the service are killed, jobs cancelled: none is unaccounted.

The seed is told when it fails; ``MICROVM_TEST_SEED`` plays that one.
"""

import asyncio
import contextlib
import os
import random
import secrets
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from scripts.programs.stage import Stage
from tests.acceptance.conftest import queue, vms
from tests.standins.github_state import Job
from tests.standins.github_webhooks import Unruly
from vmm_core.engine import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
SEED = int(os.environ.get("MICROVM_TEST_SEED", "0")) or secrets.randbelow(1_000_000) + 1
KINDS = ("hello",) * 13 + ("identity",) * 3 + ("hold",) * 4
KILLS = 5
DEATHS = 4
SECONDS = 170.0


@pytest.fixture(scope="module")
def limits() -> Mapping[str, float]:
    """A runner that waits for a job that is over already does not wait long."""
    return {"exit_grace_s": 5.0, "retire_limit_s": 60.0, "idle_limit_s": 15.0, "online_limit_s": 60.0}


class Play:
    """What is done to the stage, and what came of it."""

    def __init__(self, stage: Stage, engine: Engine) -> None:
        self.stage = stage
        self.engine = engine
        self.chance = random.Random(SEED)
        self.jobs: dict[int, tuple[str, Job]] = {}
        self.killed: set[str] = set()
        self.asked: set[int] = set()

    async def queue_jobs(self) -> None:
        kinds = list(KINDS)
        self.chance.shuffle(kinds)
        for kind in kinds:
            job = await queue(self.stage, kind)
            self.jobs[job.id] = (kind, job)
            await asyncio.sleep(self.chance.random())

    async def kill_service(self) -> None:
        chance = random.Random(f"kills {SEED}")
        for _ in range(KILLS):
            await asyncio.sleep(1 + chance.random() * 6)
            await self.stage.kill()
            await asyncio.sleep(chance.random())
            await self.stage.start()

    async def kill_vms(self) -> None:
        chance = random.Random(f"deaths {SEED}")
        for _ in range(DEATHS):
            await asyncio.sleep(2 + chance.random() * 4)
            running = vms(self.engine)
            if running:
                record = running[chance.choice(sorted(running))]
                self.killed.add(record.metadata["runner_id"])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record.pid, signal.SIGKILL)

    async def cancel(self) -> None:
        """Every job that would hold on for minutes is cancelled somewhen; so are two others, wherever they are."""
        chance = random.Random(f"cancels {SEED}")
        for number in range(len(KINDS)):
            await asyncio.sleep(1 + chance.random() * 2)
            open_ = [(kind, job) for kind, job in self.jobs.values() if job.status != "completed"]
            wanted = [job for kind, job in open_ if kind == "hold" or number in (4, 9)]
            if wanted:
                job = chance.choice(wanted)
                self.asked.add(job.id)
                with contextlib.suppress(Exception):
                    self.stage.forge.actions.cancel(job.run)

    async def remind(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.stage.forge.webhooks.remind("queued", 3.0)

    async def over(self) -> None:
        """Every job is over, here and there, and no runner is left."""
        waiting = {number: job for number, (_, job) in self.jobs.items()}

        async def ended(job: Job) -> bool:
            story = await self.stage.story(job)
            gone = story and all(runner["state"] == "gone" for runner in story["runners"])
            unheard = not story and job.conclusion == "cancelled"
            return job.status == "completed" and bool(
                unheard or (gone and story["job"]["state"] == "completed")
            )

        while waiting:
            for number, job in list(waiting.items()):
                if await ended(job):
                    del waiting[number]
            self._cancel_holding()
            await asyncio.sleep(0.5)

    def _cancel_holding(self) -> None:
        for kind, job in self.jobs.values():
            if kind == "hold" and job.status != "completed" and job.id not in self.asked:
                self.asked.add(job.id)
                self.stage.forge.actions.cancel(job.run)


def wrong(
    kind: str, job: Job, story: Mapping[str, Any], killed: set[str], cancelled: bool, log: str
) -> str | None:
    """What is not true of how a job ended, or of what is told of it."""
    if not story:
        return None if job.conclusion == "cancelled" and not job.runner_name else "never heard of"
    if (story["job"]["state"], story["job"]["conclusion"]) != ("completed", job.conclusion):
        return f"{job.conclusion}, and told as {story['job']['state']} {story['job']['conclusion']}"
    if job.conclusion == "cancelled":
        return None if cancelled else "cancelled by nobody"
    if job.conclusion == "failure":
        codes = [runner["code"] for runner in story["runners"] if runner["id"] == job.runner_name]
        died = job.runner_name in killed and codes and codes[0] in ("vm_died", "vm_lost", "channel_lost")
        return None if died else f"failed on {job.runner_name}, whose end is told as {codes}"
    ran = log.count("\nhello from microvm-") if kind == "hello" else log.count("\nid=")
    return None if job.conclusion == "success" and ran == 1 else f"{job.conclusion}, ran {ran} times"


async def test_twenty_jobs_in_vms_are_all_accounted_for(stage: Stage, engine: Engine) -> None:
    play = Play(stage, engine)
    stage.forge.webhooks.mishaps.unruly = Unruly(random.Random(f"events {SEED}"), late=1.0)
    try:
        async with asyncio.timeout(SECONDS):
            reminding = asyncio.create_task(play.remind())
            await asyncio.gather(play.queue_jobs(), play.kill_service(), play.kill_vms(), play.cancel())
            stage.forge.webhooks.mishaps.unruly = None
            await play.over()
    except TimeoutError:
        open_ = {number: job.status for number, (_, job) in play.jobs.items() if job.status != "completed"}
        pytest.fail(f"seed {SEED}: not over after {SECONDS:.0f} s: {open_}\n{stage.log_tail()}")
    finally:
        stage.forge.webhooks.mishaps.unruly = None
        reminding.cancel()
    found: dict[int, str] = {}
    for number, (kind, job) in play.jobs.items():
        story = await stage.story(job)
        what = wrong(kind, job, story, play.killed, number in play.asked, stage.forge.log(number))
        if what is not None:
            found[number] = what
    assert not found, f"seed {SEED}: {found}"
    assert not vms(engine)
