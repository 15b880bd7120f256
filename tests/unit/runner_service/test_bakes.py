"""Bakes by the service itself, over a program that keeps to the contract of ``microvm bake``; jobs meanwhile."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runner_service.domain import Bake, Push
from runner_service.store import bake_queries as bq
from runner_service.views import Story
from tests.standins.bake_program import runs
from tests.unit.runner_service.world import BAKES, SECRET, TEMPLATE, Service, World, parent, until
from vmm_core.process import start_ticks

pytestmark = pytest.mark.anyio
REPO = "octo-org/hello"
C1, C2, C3 = "1" * 40, "2" * 40, "3" * 40


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def orders(world: World, *given: dict[str, Any]) -> None:
    (world.directory / "bake.json").write_text(json.dumps(given))


def started(world: World) -> list[dict[str, Any]]:
    file = world.directory / "started"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def bakes(service: Service) -> list[Bake]:
    """Oldest first."""
    return (await service.store.read(lambda db: bq.list_bakes(db, limit=100)))[::-1]


async def bake_in(service: Service, *states: str, seconds: float = 20.0, number: int = -1) -> Bake:
    """The newest bake as soon as it is in one of these states."""
    async with asyncio.timeout(seconds):
        while True:
            found = await bakes(service)
            if len(found) > (number if number >= 0 else 0) and found[number].state in states:
                return found[number]
            await asyncio.sleep(0.02)


def used(world: World, repo: str = REPO) -> Any:
    """A first job, after which the repository is watched."""
    return world.forge.queue(repo=repo)


def told(story: Story) -> list[str]:
    return [line.reason for line in story.timeline if line.step == "parent"]


async def test_a_push_bakes_a_parent_and_the_next_job_is_forked_from_it(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    async with world.running() as service:
        await world.push(REPO, "main", C1, "locks")
        await asyncio.sleep(0.3)
        assert await bakes(service) == []  # nobody has ever run a job of it here
        first = used(world)
        baked = await bake_in(service, "done", "failed")
        await world.until_quiet()
        assert baked.state == "done" and baked.why == "main has no parent yet" and baked.attempts == 1
        assert baked.incremental and [step.step for step in baked.steps] == ["fetch", "install"]
        job = world.forge.queue(repo="Octo-Org/Hello", head_sha=C1, head_branch="main")
        await world.until_quiet()
        story = await service.story(job.id)
        assert told(await service.story(first.id))[0].startswith("no parent yet: template github-runner")
    assert told(story) == [f"{REPO}@main {baked.digest[:12]}: exact key of commit {C1[:12]}"]  # pyright: ignore
    assert story.runners[0].parent == f"{REPO}@main" and story.runners[0].template == "github-runner"
    assert baked.digest in world.host.touched and world.host.pruned == [(None, 3), (None, 3)]
    (start,) = started(world)
    # The credential is on its standard input and nowhere else.
    assert json.loads(start["stdin"]) == {"username": "x-access-token", "password": SECRET}
    assert SECRET not in json.dumps([start["argv"], start["environ"]])
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in (tmp_path / "logs").rglob("*.*"))
    log = (tmp_path / "logs" / "bakes" / f"{baked.id}.log").read_text()
    assert "attempt 1: main has no parent yet" in log and "install: npm ci" in log


async def test_many_pushes_are_one_bake_a_key(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    orders(world, {"seconds": 0.5})
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "locks")
        await bake_in(service, "baking")
        for number in range(40):
            await world.push(REPO, "main", f"{number:040x}", f"locks {number // 20}")
        await world.push(REPO, "main", C2, "locks 2")
        await until(lambda: any(p.key.startswith("locks 2 ") for p in world.host.parents), 20)
        await bake_in(service, "done")
        found = await bakes(service)
    by_key = [bake.key for bake in found if bake.state == "done"]
    assert len(by_key) == len(set(by_key)) and by_key[-1].startswith("locks 2 ")
    assert len(started(world)) == len(by_key) <= 4
    assert all(bake.state in ("done", "superseded") for bake in found)


async def test_a_bake_that_fails_is_tried_again_then_kept_with_its_output_and_the_old_parent_stays(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, bakes=BAKES)
    refusal = {"error": "bake_failed", "step": "install", "message": "npm ci ended with 1", "advice": "Look at it.",
               "output": ["a\x1b[2J", "ERR!"]}  # fmt: skip
    orders(world, {}, {"answer": refusal}, {"answer": refusal})
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "old")
        old = await bake_in(service, "done")
        await world.push(REPO, "main", C2, "new")
        failed = await bake_in(service, "failed")
        job = world.forge.queue(repo=REPO, head_sha=C2, head_branch="main")
        await world.until_quiet()
        story = await service.story(job.id)
        await asyncio.sleep(1.0)
        assert len(await bakes(service)) == 2  # polled again, and not tried again: nothing has changed
        assert service.metrics.bakes.labels("failed")._value.get() == 1  # pyright: ignore
    assert failed.attempts == 2 and failed.code == "bake_failed" and failed.output == ("a\x1b[2J", "ERR!")
    assert (failed.step, failed.message, failed.advice) == ("install", "npm ci ended with 1", "Look at it.")
    (reason,) = told(story)
    assert reason.startswith(
        f"{REPO}@main {old.digest[:12]}: newest parent of its branch; the bake of key new on"
    )  # pyright: ignore
    assert "failed at step install: npm ci ended with 1 (microvm bakes log 2)" in reason


@pytest.mark.parametrize(
    ("order", "code", "attempts"),
    [
        ({"answer": "not json", "exit": 1}, "bake_broken", 2),
        ({"answer": "not json", "exit": 0}, "answer_invalid", 2),
        ({"answer": "", "exit": 2}, "wrong_use", 1),
        (
            {"answer": {"error": "recipe_invalid", "message": ".microvm.yml:3: warm: …"}, "exit": 1},
            "recipe_invalid",
            1,
        ),
    ],
)
async def test_every_way_to_break_the_contract_is_told(
    tmp_path: Path, order: dict[str, Any], code: str, attempts: int
) -> None:
    world = World(tmp_path, bakes=BAKES)
    orders(world, order)
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "locks")
        failed = await bake_in(service, "failed")
    assert (failed.code, failed.attempts) == (code, attempts) and failed.message


async def test_a_bake_that_never_ends_is_ended_with_all_it_started(tmp_path: Path) -> None:
    limits = msgspec.structs.replace(BAKES, limit_s=1.5, attempts=1)
    world = World(tmp_path, bakes=limits)
    orders(world, {"seconds": 60, "spawn": True})
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "locks")
        failed = await bake_in(service, "failed")
    assert (
        failed.code == "timed_out" and failed.step == "install" and "limit of 2 s" in (failed.message or "")
    )
    child = int((tmp_path / "child").read_text())
    await until(lambda: not runs(child))


async def test_a_service_that_stops_ends_its_bake_and_the_next_one_begins_it_again(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    orders(world, {"seconds": 60, "spawn": True}, {})
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "locks")
        await until((tmp_path / "child").exists, 20)
        await world.until_quiet()
        for task in service._tasks:
            task.cancel()
        await asyncio.gather(*service._tasks, return_exceptions=True)
        (row,) = await bakes(service)
        assert (row.state, row.attempts, row.pid) == ("queued", 0, None)
    assert not runs(int((tmp_path / "child").read_text()))
    async with world.running() as service:
        baked = await bake_in(service, "done")
    assert baked.attempts == 1 and len(started(world)) == 2


async def test_what_a_killed_service_left_baking_is_ended_and_begun_again(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    survivor = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "locks")
        await bake_in(service, "done")
        await world.until_quiet()
        await service.store.write(
            lambda db: bq.step_bake(
                db, 1, was="done",
                values={"state": "baking", "pid": survivor.pid, "start_ticks": start_ticks(survivor.pid)},
            )
        )  # fmt: skip
    reaping = asyncio.create_task(asyncio.to_thread(survivor.wait))
    async with world.running() as service:
        assert (await bake_in(service, "done", number=0)).attempts == 1
    assert await reaping == -signal.SIGTERM
    assert len(started(world)) == 2


async def test_a_bake_does_not_outlive_a_killed_service(tmp_path: Path) -> None:
    """The kernel tells it to end, before any next service could."""
    orders_file = tmp_path / "bake.json"
    orders_file.write_text(json.dumps([{"seconds": 60}]))
    program = f"""
import asyncio, pathlib, sys
from runner_service.bake_process import BakeProcess
from runner_service.joblog import JobLog
from tests.standins.repositories import bake_command
async def main():
    place = pathlib.Path({str(tmp_path)!r})
    log = JobLog(place / "1.log", limit=1 << 20)
    process = await BakeProcess.start([*bake_command(place), "--name", "a/b"], log, nice=7, environ=dict())
    asyncio.create_task(process.finish(b"", limit=60))
    await asyncio.sleep(60)
asyncio.run(main())
"""
    service = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    try:
        await until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text(), 30)
        start = json.loads((tmp_path / "started").read_text())
        assert start["nice"] == min(19, os.nice(0) + 7)
        ticks = start_ticks(start["pid"])
        assert ticks is not None
    finally:
        service.kill()
        service.wait()
    await until(lambda: start_ticks(start["pid"]) != ticks, 10)


async def test_a_pull_request_from_a_fork_gets_the_default_branchs_parent_not_that_of_a_branch_of_its_name(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, bakes=BAKES)
    world.host.parents = [parent(f"{REPO}@main", "k-main"), parent(f"{REPO}@dev", "k-dev")]
    await world.push(REPO, "main", C1, "a")
    world.repositories.push(REPO, "dev", C2, "b")
    async with world.running() as service:
        await world.flush()
        await until(lambda: "look" in world.repositories.asked)
        theirs = world.forge.queue(repo=REPO, head_sha=C3, head_branch="dev")
        ours = world.forge.queue(repo=REPO, head_sha=C2, head_branch="dev")
        await world.until_quiet()
        stories = [await service.story(job.id) for job in (theirs, ours)]
    assert [story.runners[0].parent for story in stories] == [f"{REPO}@main", f"{REPO}@dev"]
    assert "is not on the branch 'dev' of the repository itself" in told(stories[0])[0]
    assert f"on_branch {C3} dev" in world.repositories.asked


async def test_a_pushed_commit_is_known_to_be_the_repositorys_own_without_asking(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=msgspec.structs.replace(BAKES, poll_s=0))
    world.host.parents = [parent(f"{REPO}@main", "k-main"), parent(f"{REPO}@dev", "k-main")]
    async with world.running() as service:
        await world.push(REPO, "main", C1, "a")
        await world.push(REPO, "dev", C2, "a")
        await until(lambda: world.repositories.asked)
        job = world.forge.queue(repo=REPO, head_sha=C2, head_branch="dev")
        await world.until_quiet()
        story = await service.story(job.id)
    assert story.runners[0].parent == f"{REPO}@dev"
    assert not any(question.startswith("on_branch") for question in world.repositories.asked)


async def test_what_one_parent_was_worth_is_told_without_waiting_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=msgspec.structs.replace(BAKES, poll_s=0))
    world.host.parents = [parent(f"{REPO}@main", f"a on {TEMPLATE.digest[:4]}")]
    async with world.running() as service:
        await world.push(REPO, "main", C1, "a")
        await until(lambda: f"keys {C1}" in world.repositories.asked)
        await asyncio.sleep(0.2)
        world.repositories.push(REPO, "main", C2, "a")
        async with service.store.writing() as db:
            await bq.save_head(
                db,
                Push(forge="github", owner="octo-org", repo="hello", branch="main", commit=C2, seen_at=1e10),
            )
        world.repositories.delay = 0.5
        job = world.forge.queue(repo=REPO, head_sha=C2, head_branch="main", seconds=2)
        await until(lambda: job.runs)
        assert f"keys {C2}" not in world.repositories.asked[:-1]
        await world.until_quiet()
        story = await service.story(job.id)
    first, second = told(story)
    assert "newest parent of its branch" in first and f"exact key of commit {C2[:12]}" in second
    steps = [line.step for line in story.timeline]
    assert steps.index("started") < len(steps) - 1 - steps[::-1].index("parent")


async def test_a_mirror_that_is_slow_costs_a_job_its_best_parent_and_no_more(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=msgspec.structs.replace(BAKES, choice_limit_s=0.2))
    world.host.parents = [parent(f"{REPO}@main", "k-main"), parent(f"{REPO}@dev", "k-dev")]
    async with world.running() as service:
        await world.push(REPO, "main", C1, "a")
        await until(lambda: world.repositories.asked)
        await asyncio.sleep(0.3)
        world.repositories.delay = 30.0
        job = world.forge.queue(repo=REPO, head_sha=C3, head_branch="dev")
        await world.until_quiet()
        story = await service.story(job.id)
    assert story.runners[0].parent == f"{REPO}@main" and "is not known to be on a branch" in told(story)[0]


@pytest.mark.parametrize("how", ["vanished", "wrong owner"])
async def test_a_parent_that_cannot_be_forked_any_more_costs_nothing_but_a_line(
    tmp_path: Path, how: str
) -> None:
    world = World(tmp_path)
    world.host.parents = [parent(f"{REPO}@main", "k-main")]
    async with world.running() as service:
        chosen = service.chooser.choose

        async def then_it_goes(job_id: str, base: Any) -> Any:
            found = await chosen(job_id, base)
            theirs = [msgspec.structs.replace(p, owner="other") for p in world.host.parents]
            world.host.parents = theirs if how == "wrong owner" else []
            return found

        service.flow._choose = then_it_goes
        async with service.store.writing() as db:
            await bq.save_repository(db, world.repository(REPO, "main"))
        job = world.forge.queue(repo=REPO, head_sha=C1, head_branch="main")
        await world.until_quiet()
        story = await service.story(job.id)
        assert service.metrics.parents.labels("gone")._value.get() == 1  # pyright: ignore
    assert job.runs == 1 and world.host.launches == 1 and story.runners[0].parent is None
    assert [line.split(":")[0] for line in told(story)] == [f"{REPO}@main digest of oc", "fallback"]


async def test_a_repository_that_cannot_be_looked_at_is_told_and_holds_up_no_other(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    async with world.running() as service:
        world.repositories.push("o/good", "main", C1, "a")
        world.write_keys()
        used(world, "o/bad")
        used(world, "o/good")
        await bake_in(service, "done")
        await world.until_quiet()
        job = world.forge.queue(repo="o/bad")
        await world.until_quiet()
        story = await service.story(job.id)
    assert told(story) == [
        "no parent yet: template github-runner; the repository cannot be looked at: o/bad: there is no such repository"
    ]


async def test_a_lost_push_is_found_by_looking_and_another_base_bakes_anew(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "a")
        await bake_in(service, "done", number=0)
        world.repositories.push(REPO, "main", C2, "b")
        world.write_keys()
        second = await bake_in(service, "done", number=1)
        assert second.key.startswith("b on")
        world.host.templates = [msgspec.structs.replace(TEMPLATE, digest="e" * 64)]
        world.write_keys()
        third = await bake_in(service, "done", number=2)
    assert third.why == "the template github-runner is another one now" and third.base_digest == "e" * 64


async def test_a_bake_is_due_again_only_after_its_pause(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=msgspec.structs.replace(BAKES, retry_s=1.0))
    orders(world, {"answer": "", "exit": 1}, {})
    async with world.running() as service:
        used(world)
        await world.push(REPO, "main", C1, "a")
        await bake_in(service, "baking")
        again = await bake_in(service, "queued")
        assert again.due_at >= (again.started_at or 0) + 0.75 and again.code == "bake_broken"
        assert (await bake_in(service, "done")).attempts == 2
