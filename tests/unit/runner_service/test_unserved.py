"""Jobs that no template serves: the newest are looked at, the oldest given up when the forge has."""

import time
from pathlib import Path

import pytest

from runner_service.domain import Job
from runner_service.store import queries as q
from tests.unit.runner_service.world import World, until

pytestmark = pytest.mark.anyio
HOUR = 3600.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def job(name: str, state: str, hours: float) -> Job:
    return Job(
        id=f"github-{name}", forge="github", forge_job_id=name, owner="o", repo="r", scope_kind="repository",
        scope_path="o/r", labels=("microvm", "no-such-machine"), state=state,  # pyright: ignore
        event_at=time.time() - hours * HOUR, updated_at=time.time() - hours * HOUR,
    )  # fmt: skip


async def test_what_the_forge_has_given_up_is_given_up_and_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    rows = [
        job("1", "queued", 26),
        job("2", "queued", 1),
        job("3", "waiting", 26),
        job("4", "waiting", 32 * 24),
    ]
    async with world.running() as service:
        async with service.store.writing() as db:
            await q.save_jobs(db, rows)
        service.scheduler._looked_again = 0.0
        service.scheduler.wake()
        await until(lambda: service.scheduler._looked_again)
        stories = [await service.story(row.id) for row in rows]
    assert [story.job.state for story in stories] == ["completed", "queued", "waiting", "completed"]
    assert stories[0].job.conclusion == "stale"
    assert [line.step for line in stories[0].timeline] == ["aged out"]
    assert "26 h" in stories[0].timeline[0].reason
    # An approval may take 30 days: the job must still be served when it comes.
    assert stories[2].job.conclusion is None


async def test_the_newest_are_never_starved(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, service.store.writing() as db:
        await q.save_jobs(db, [job(str(n), "queued", n / 100) for n in range(300)])
        found = await q.unserved_jobs(db, 200)
    assert found[0].forge_job_id == "0" and len(found) == 200
