"""Jobs without events: found by looks, learned of by questions; one owner's trouble is not another's."""

import asyncio
import time
from pathlib import Path

import pytest

from github_webhook.errors import Forbidden, NotFound, RateLimited, Unavailable
from runner_service.domain import JobEvent
from runner_service.doubts import GIVE_UP_AFTER
from tests.unit.runner_service.world import World, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes minutes at a forge takes moments here."""
    monkeypatch.setattr("runner_service.doubts.FIRST_PAUSE", 0.1)
    monkeypatch.setattr("runner_service.doubts.LONGEST_PAUSE", 0.3)
    monkeypatch.setattr("runner_service.doubts.LAG_SECONDS", 0.2)


def deaf(world: World) -> World:
    """No event ever arrives."""
    world.mangle = lambda _event: []
    world.poll_s = 0.2
    world.named = (("o", "r"),)
    return world


async def test_without_any_event_every_job_runs(tmp_path: Path) -> None:
    world = deaf(World(tmp_path))
    async with world.running() as service:
        jobs = [world.forge.queue(seconds=0.05) for _ in range(6)]
        await world.until_quiet(30)
        story = await service.story(jobs[0].id)
        found = service.metrics.registry.get_sample_value("microvm_jobs_found_total", {"via": "poll"})
    assert [job.runs for job in jobs] == [1] * 6
    assert {job.conclusion for job in jobs} == {"success"}
    assert found == 6
    queued = next(line for line in story.timeline if line.step == "queued")
    assert queued.reason == "no event came: found by a poll"
    told = " | ".join(line.reason for line in story.timeline if line.step in ("in progress", "completed"))
    assert "the forge said so when asked" in told


async def test_repositories_that_only_the_credentials_reach_are_found(tmp_path: Path) -> None:
    world = deaf(World(tmp_path))
    world.named = ()
    world.forge.in_reach = [("a", "one"), ("b", "two")]
    async with world.running():
        jobs = [world.forge.queue(repo="a/one"), world.forge.queue(repo="b/two")]
        await world.until_quiet(20)
    assert [job.runs for job in jobs] == [1, 1]


async def test_a_failed_look_at_what_the_credentials_reach_is_made_up_for_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner_service.polling._LOOK_LIMIT", 1.0)
    world = deaf(World(tmp_path))
    world.named = ()
    world.forge.in_reach = [("a", "one")]
    world.forge.faults["repositories a"] = [Unavailable("503", retryable=True)]
    async with world.running():
        world.forge.queue(repo="a/one")
        await world.until_quiet(20)
    assert not world.forge.faults["repositories a"]


async def test_a_job_whose_cancellation_was_lost_releases_its_runner(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.poll_s = 0.2
    world.mangle = lambda event: [] if event.conclusion == "cancelled" else [event]
    world.host.fork_seconds = 0.8
    async with world.running() as service:
        job = world.forge.queue()
        await service.story(job.id)
        await asyncio.sleep(0.3)
        world.forge.cancel(job)
        await world.until_quiet(20)
        story = await service.story(job.id)
    assert job.runs == 0
    assert story.job.conclusion == "cancelled"
    assert {runner.code for runner in story.runners} == {"cancelled"}


async def test_a_job_that_listings_leave_out_is_asked_about_and_stays(tmp_path: Path) -> None:
    """Lists lag behind events: that one does not show a job says nothing about it."""
    world = World(tmp_path)
    world.poll_s = 0.2
    world.host.fork_seconds = 1.0
    async with world.running():
        job = world.forge.queue()
        world.forge.unlisted.add(job.id)
        await until(lambda: job.id in world.forge.asked)
        await world.until_quiet(20)
    assert job.runs == 1


async def test_a_job_taken_elsewhere_is_learned_of(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.poll_s = 0.2
    world.host.fork_seconds = 5.0
    async with world.running() as service:
        job = world.forge.queue()
        await service.story(job.id)
        job.state, job.runner = "in_progress", "somebody-else"
        async with asyncio.timeout(10):
            while (await service.story(job.id)).job.state != "in_progress":
                await asyncio.sleep(0.05)
        # Its end is nobody's business here, and is learned of all the same.
        job.state, job.conclusion = "completed", "failure"
        async with asyncio.timeout(10):
            while (story := await service.story(job.id)).job.state != "completed":
                await asyncio.sleep(0.05)
        await world.until_quiet(20)
    assert story.job.conclusion == "failure" and job.runs == 0
    assert any("none of ours" in line.reason for line in story.timeline)


async def test_a_job_the_forge_knows_no_more_is_given_up_in_the_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.poll_s = 0.2
    async with world.running() as service:
        job = world.forge.queue(["microvm-no-such-template"])
        await service.story(job.id)
        del world.forge.jobs[job.id]
        async with asyncio.timeout(20):
            while (story := await service.story(job.id)).job.state != "completed":
                await asyncio.sleep(0.05)
    assert story.job.conclusion == "stale"
    assert any("knows no such job any more" in line.reason for line in story.timeline)
    assert world.forge.asked.count(job.id) == GIVE_UP_AFTER


async def test_one_owners_trouble_or_slowness_delays_no_other(tmp_path: Path) -> None:
    world = deaf(World(tmp_path))
    world.named = (("slow", "r"), ("broken", "r"), ("limited", "r"), ("fine", "r"))
    world.forge.delays["untaken slow"] = 30.0
    world.forge.faults["untaken broken"] = [Unavailable("no answer", retryable=True) for _ in range(1000)]
    world.forge.faults["untaken limited"] = [RateLimited("slow down", retry_at=time.time() + 3600)] * 1000
    async with world.running() as service:
        jobs = [world.forge.queue(repo="fine/r", seconds=0.01) for _ in range(3)]
        await world.until_quiet(20)
        assert [job.runs for job in jobs] == [1, 1, 1]
        limited = service.metrics.registry.get_sample_value(
            "microvm_polls_total", {"outcome": "forge_rate_limited"}
        )
        assert limited == 1, "nobody calls on until the forge's own time is over"


@pytest.mark.parametrize("error", [NotFound("gone", status=404), Forbidden("no right", status=403)])
async def test_one_repositorys_trouble_is_not_its_owners(tmp_path: Path, error: Exception) -> None:
    world = deaf(World(tmp_path))
    world.named = (("o", "gone"), ("o", "r"))
    world.forge.faults["untaken o/gone"] = [error] * 1000  # type: ignore[list-item]
    async with world.running() as service:
        for _ in range(3):
            job = world.forge.queue()
            await world.until_quiet(20)
            assert job.runs == 1
        assert service.poller._owners["o"].retry_at == 0.0
        assert len(world.forge.faults["untaken o/gone"]) >= 998, "it is looked at less and less often"


async def test_foreign_jobs_and_known_ones_are_no_news(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.poll_s = 0.2
    world.named = (("o", "r"),)
    observed: list[JobEvent] = []
    async with world.running() as service:
        world.forge.queue(["ubuntu-latest"])
        waits = world.forge.queue(["microvm-no-such-template"])
        await service.story(waits.id)
        observe = service.poller._observe
        service.poller._observe = lambda event: (observed.append(event), observe(event))[1]
        before = len(world.forge.looks)
        await until(lambda: len(world.forge.looks) > before + 3)
    assert observed == []
