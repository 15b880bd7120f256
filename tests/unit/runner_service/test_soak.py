"""Many jobs through a service that is killed at random, over events that are repeated, reordered and partly lost.

The seed is part of the test's name; a failing one is replayed with ``-k seed``.
"""

import asyncio
import random
from pathlib import Path

import msgspec
import pytest

from runner_service.domain import JobEvent
from tests.unit.runner_service.world import RUNNERS, World

pytestmark = pytest.mark.anyio
LABELS = (("microvm",), ("self-hosted", "microvm"), ("microvm-1cpu-512mb",))
JOBS = 40
KILLS = 5


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def unreliable(chance: random.Random, world: World):
    """Pick-ups and ends are lost now and then (nobody may need them); everything is repeated and shuffled."""

    def mangle(event: JobEvent) -> list[JobEvent]:
        if event.state != "queued" and event.conclusion != "cancelled" and chance.random() < 0.2:
            return []
        chance.shuffle(world.outbox)
        return [event] * (2 if chance.random() < 0.2 else 1)

    return mangle


@pytest.mark.parametrize("seed", range(3))
async def test_every_job_runs_once_and_nothing_is_left(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    world = World(tmp_path, runners=msgspec.structs.replace(RUNNERS, max_vms=6, idle_limit_s=2))
    world.mangle = unreliable(chance, world)
    left = JOBS
    for kill in range(KILLS + 1):
        last = kill == KILLS
        world.kill_at = None if last else len(world.effects) + chance.randint(20, 200)
        async with world.running():
            while left and not world.dead.is_set():
                world.forge.queue(
                    chance.choice(LABELS), repo=chance.choice(("o/a", "o/b")), seconds=chance.random() * 0.1
                )
                left -= 1
                if chance.random() < 0.1:
                    world.forge.cancel(chance.choice(list(world.forge.jobs.values())))
                await asyncio.sleep(chance.random() * 0.02)
            if last:
                await world.until_quiet(40)
            else:
                await asyncio.wait_for(world.dead.wait(), 20)
    for job in world.forge.jobs.values():
        assert job.runs == (0 if job.conclusion == "cancelled" else 1), job
        assert job.conclusion in ("success", "cancelled"), job
    assert world.host.launches <= 3 * JOBS
    await world.host.close()
