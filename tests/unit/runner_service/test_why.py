"""Why a job waits or where its time went: the summary, its current wait, and the many ways to name a job."""

import asyncio
from pathlib import Path

import httpx
import msgspec
import pytest

from github_webhook.errors import RateLimited
from runner_service import views
from runner_service.commands.service import print_story
from runner_service.store import job_search
from tests.unit.runner_service.test_api import client
from tests.unit.runner_service.world import RUNNERS, Service, World, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def phases(story: views.Story) -> list[str]:
    return [span.phase for span in story.summary.spans]


async def test_a_finished_job_tells_where_its_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path)
    world.host.fork_seconds = 0.1
    async with world.running() as service:
        job = world.forge.queue(seconds=0.3)
        await world.until_quiet()
        story = await service.story(job.id)
    summary = story.summary
    assert summary.over and summary.wait is None
    assert phases(story)[:2] == ["deciding", "forking"] and phases(story)[-2:] == ["running", "cleanup"]
    by = {span.phase: span.seconds for span in summary.spans}
    assert by["forking"] >= 0.1 and by["running"] >= 0.3
    assert summary.seconds == pytest.approx(story.timeline[-1].at - story.timeline[0].at)
    assert summary.ready_seconds == pytest.approx(summary.seconds - by["running"] - by["cleanup"])
    print_story(story)
    told = capsys.readouterr().out
    assert "success" in told and "in all" in told and "forked" in told and "before it ran" in told
    assert "waits for:" not in told


async def test_a_job_that_waits_for_room_knows_since_when_its_place_and_what_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path, runners=msgspec.structs.replace(RUNNERS, max_vms=1))
    async with world.running() as service:
        first = world.forge.queue(seconds=3)
        await until(lambda: first.runs)
        second, third = world.forge.queue(), world.forge.queue()
        await asyncio.sleep(0.4)
        story, last = await service.story(second.id), await service.story(third.id)
        wait = story.summary.wait
        assert wait is not None and not story.summary.over
        assert (wait.place, wait.among) == (1, 2) and last.summary.wait is not None
        assert last.summary.wait.place == 2
        assert "max_vms" in wait.ends and wait.seconds > 0.1
        print_story(story)
        told = capsys.readouterr().out
        assert (
            f"waits for: {wait.what}" in told
            and "place:     1 of 2" in told
            and f"ends when: {wait.ends}" in told
        )
        first.seconds = 0
        world.host.machines[next(iter(world.host.machines))].commands["runner"].task.cancel()


async def test_a_label_nobody_serves_is_named_as_the_wait(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(("microvm-nope",))
        wait = (await service.story(job.id)).summary.wait
    assert wait is not None and wait.code == "no_template" and "bake" in wait.ends and wait.place is None


async def test_a_rate_limit_is_named_as_the_wait(tmp_path: Path) -> None:
    import time

    world = World(tmp_path)
    world.forge.faults["register"] = [RateLimited("wait", status=429, retry_at=time.time() + 60)]
    async with world.running() as service:
        job = world.forge.queue()
        async with asyncio.timeout(5):
            while (
                wait := (await service.story(job.id)).summary.wait
            ) is None or wait.code != RateLimited.code:
                await asyncio.sleep(0.02)
        assert wait.what.startswith(RateLimited.code) and "next try" in wait.what


async def test_a_runner_that_is_online_while_the_forge_holds_the_job_back_is_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue()
        world.forge._assign = lambda: None  # pyright: ignore[reportPrivateUsage]  # the forge sleeps
        async with asyncio.timeout(5):
            while (wait := (await service.story(job.id)).summary.wait) is None or wait.code != "forge":
                await asyncio.sleep(0.02)
        assert wait.what == "a job from the forge" or "idle" in wait.what
        assert "which is online" in wait.ends
        del world.forge._assign
        world.forge._assign()  # pyright: ignore[reportPrivateUsage]
        await world.until_quiet()


async def named(service: Service, ref: str) -> str | None:
    found = await service.store.read(lambda db: job_search.find(db, ref))
    return None if found is None else found.id


async def test_a_job_has_many_names_and_a_wrong_one_is_told_near_ones(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        old = world.forge.queue(repo="Octo/app")
        await world.until_quiet()
        new = world.forge.queue(repo="Octo/app", seconds=0.5)
        await until(lambda: new.runs)
        story = await service.story(new.id)
        assert story.job.runner is not None
        for ref in (
            new.id, f"github-{new.id}", "octo/APP", f"octo/app#job {new.id}", f"octo/app#{new.id}", story.job.runner,
            f"https://github.com/octo/app/actions/runs/7/job/{new.id}?pr=1",
        ):  # fmt: skip
            assert await named(service, ref) == f"github-{new.id}", ref
        assert await named(service, f"octo/app#job {old.id}") == f"github-{old.id}"
        for ref in (
            "",
            "octo/other",
            "octo/app#nope",
            "https://github.com/octo/app/actions/runs/99",
            "x" * 9999,
            "\0",
        ):
            assert await named(service, ref) is None, ref
        await the_api_tells(http, f"github-{new.id}")
        await world.until_quiet()


async def the_api_tells(http: httpx.AsyncClient, job: str) -> None:
    assert (await http.get("/why", params={"job": "octo/app"})).json()["job"]["id"] == job
    assert (await http.get(f"/jobs/{job}")).json()["summary"]["spans"]
    wrong = await http.get("/why", params={"job": "octo/ap"})
    assert wrong.status_code == 404 and "did you mean Octo/app" in wrong.json()["detail"]
    assert "did you mean" in (await http.get("/jobs/githb-1")).json()["detail"]
    assert (await http.get("/why")).status_code == 400
