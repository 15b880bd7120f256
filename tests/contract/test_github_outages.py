"""The stand-in runner when something is wrong: a forge that is away or loses answers, and the exit codes."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.standins.github_world import (
    OWNER,
    REPO,
    SCOPE,
    ForgeWorld,
    forge_world,
    workflow_of,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ForgeWorld]:
    async with forge_world(tmp_path) as made:
        yield made


def alive(marker: str) -> list[str]:
    """Processes whose environment holds ``marker``."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                if marker.encode() in (directory / "environ").read_bytes():
                    found.append((directory / "cmdline").read_text())
            except OSError:
                continue
    return found


# -- a forge in trouble --------------------------------------------------------------------------


async def test_the_forge_is_away_when_the_runner_starts(world: ForgeWorld) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    registration = await world.github.generate_jit_config(SCOPE, name="warm-up", labels=["x"])
    assert registration.runner_id
    world.forge.fault("POST /_standin/session", drop="before", times=3)
    world.forge.fault("POST /_standin/session", status=503, times=2)
    runner = await world.runner()
    await world.forge.wait_for(run.jobs[0])
    assert await runner.exit() == 0
    assert "Retrying until reconnected" in runner.text


async def test_the_forge_goes_away_and_comes_back_while_idle(world: ForgeWorld) -> None:
    runner = await world.runner()
    await world.until_online(runner)
    await world.forge.pause()
    await asyncio.sleep(0.5)
    await world.forge.resume()
    run = await world.forge.queue_run(OWNER, REPO)
    await world.forge.wait_for(run.jobs[0])
    assert await runner.exit() == 0


async def test_the_forge_goes_away_and_comes_back_in_the_middle_of_a_job(tmp_path: Path) -> None:
    gate, over = tmp_path / "gate", tmp_path / "over"
    workflow = workflow_of(
        f"echo first; while [ ! -e {gate} ]; do sleep 0.05; done; echo while-away; touch {over}"
    )
    async with forge_world(tmp_path, workflow) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner()
        await world.forge.wait_for_log(run.jobs[0], "\nfirst\n")
        await world.forge.pause()
        gate.touch()
        async with asyncio.timeout(10):
            while not over.exists():
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        await world.forge.resume()
        done = await world.forge.wait_for(run.jobs[0])
        assert await runner.exit() == 0
        assert done.conclusion == "success"
        assert world.forge.log(done.id).count("\nwhile-away\n") == 1


@pytest.mark.parametrize(
    "route",
    [
        "GET /_standin/session/*/message",
        "POST /_standin/jobs/*/acquire",
        "POST /_standin/jobs/*/log",
        "POST /_standin/jobs/*/complete",
    ],
)
async def test_lost_answers_change_nothing(world: ForgeWorld, route: str) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    lost = world.forge.fault(route, drop="after", times=2)
    broken = world.forge.fault(route, status=502, times=1)
    runner = await world.runner()
    done = await world.forge.wait_for(run.jobs[0])
    assert await runner.exit() == 0
    assert done.conclusion == "success" and lost.hits == 2
    assert broken.hits == 1 or route.endswith("message")
    assert world.forge.log(done.id).count("good morning\n") == 1
    assert [s.action for s in world.forge.webhooks.sent] == ["queued", "in_progress", "completed"]


async def test_a_job_handed_to_nobody_is_queued_again(world: ForgeWorld) -> None:
    """A runner that took the message and died before it acquired the job."""
    world.forge.actions.times.pick_up = 0.5
    run = await world.forge.queue_run(OWNER, REPO)
    dead = world.forge.actions.register(
        "repository", OWNER, REPO, "dead", ["microvm", "self-hosted"], "_work"
    )
    world.forge.actions.open_session(dead, "2.329.0")
    assert dead.job is run.jobs[0]
    world.forge.actions.close_session(dead)
    runner = await world.runner("alive")
    done = await world.forge.wait_for(run.jobs[0])
    assert done.runner_name == "alive" and await runner.exit() == 0


# -- exit codes ----------------------------------------------------------------------------------


async def test_not_configured(world: ForgeWorld) -> None:
    runner = await world.runner()
    for name in (".runner", ".credentials", ".credentials_rsaparams"):
        broken = world.tmp / f"broken{name}"
        subprocess.run(["cp", "-r", runner.root, broken], check=True)
        (broken / name).unlink()
        done = subprocess.run(
            [broken / "bin/Runner.Listener", "run"], capture_output=True, timeout=10, check=False
        )
        assert done.returncode == 1 and b"Not configured" in done.stdout and name.encode() in done.stdout


async def test_the_registration_is_gone(world: ForgeWorld) -> None:
    runner = await world.runner()
    await world.until_online(runner)
    assert await world.github.delete_runner(SCOPE, runner.id) == "deleted"
    assert await runner.exit() == 1


async def test_a_registration_too_old_to_be_used(world: ForgeWorld) -> None:
    world.forge.actions.times.registration = -1.0
    runner = await world.runner()
    assert await runner.exit() == 1
    assert "expired" in runner.text


async def test_a_session_conflict(world: ForgeWorld) -> None:
    world.forge.fault("POST /_standin/session", status=409, times=None)
    runner = await world.runner(STANDIN_RUNNER_CONFLICT_SECONDS="0.3")
    assert await runner.exit() == 5


async def test_a_deprecated_version(world: ForgeWorld) -> None:
    world.forge.actions.minimum_version = (99,)
    runner = await world.runner()
    assert await runner.exit() == 7
    assert "deprecated" in runner.text


async def test_hooks(world: ForgeWorld) -> None:
    hook = world.tmp / "hook.sh"
    hook.write_text('echo "hook in $GITHUB_REPOSITORY"; [ -z "$HOOK_FAILS" ]\n')
    for name, fails, conclusion in (("ok", "", "success"), ("bad", "1", "failure")):
        run = await world.forge.queue_run(OWNER, REPO)
        env = {"ACTIONS_RUNNER_HOOK_JOB_STARTED": str(hook), "ACTIONS_RUNNER_HOOK_JOB_COMPLETED": str(hook)}
        runner = await world.runner(name, HOOK_FAILS=fails, **env)
        done = await world.forge.wait_for(run.jobs[0])
        assert await runner.exit() == 0
        assert done.conclusion == conclusion
        assert world.forge.log(done.id).count(f"hook in {OWNER}/{REPO}\n") == 2
        assert ("good morning" in world.forge.log(done.id)) == (conclusion == "success")
        assert [s["name"] for s in done.steps][1] == "Set up runner"
