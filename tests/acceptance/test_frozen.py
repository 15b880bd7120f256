"""Jobs that fail and VMs that die, with real VMs: what is kept is looked into and removed; what is lost runs again."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import pytest

from scripts.programs.stage import Stage
from tests.acceptance.conftest import PATIENCE, eventually, gone, queue, running, steps, told, vms
from tests.standins.github_state import Job
from vmm_core.engine import Engine

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("none_frozen", "nothing_left")]


@pytest.fixture(scope="module")
def frozen() -> Mapping[str, object]:
    return {"repositories": ["octo-org/*"], "ttl_h": 1.0, "most": 2}


@pytest.fixture(scope="module")
def limits() -> Mapping[str, Any]:
    return {"exit_grace_s": 10.0, "retire_limit_s": 60.0, "rerun_on_infra_failure": ["Octo-Org/*"]}


@pytest.fixture
async def none_frozen(stage: Stage, engine: Engine) -> AsyncIterator[None]:
    """What a test keeps is removed with it, whatever else it is about."""
    yield
    for one in (await stage.http.get("/frozen")).json():
        await stage.http.post(f"/frozen/{one['id']}/remove")
    await eventually(lambda: not engine.frozen(), "no frozen VM")


class Ended(NamedTuple):
    code: int
    out: str
    error: str


async def microvm(stage: Stage, *arguments: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runner_service.cli", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(PATIENCE):
        out, error = await process.communicate()
    assert b"Traceback" not in error, error.decode()
    return Ended(process.returncode or 0, out.decode(), error.decode())


async def shell(stage: Stage, job: str, *command: str, options: tuple[str, ...] = ()) -> Ended:
    return await microvm(stage, "shell", "--config", str(stage.config), *options, job, "--", *command)


async def kept(stage: Stage, name: str = "leaves") -> tuple[Job, dict[str, Any]]:
    """A job that failed and whose VM is frozen."""
    job = await queue(stage, name)
    story = await gone(stage, job)
    assert job.conclusion == "failure"
    assert "frozen" in steps(story), story["timeline"]
    return job, story


async def test_a_failed_jobs_vm_is_kept_looked_into_and_removed(stage: Stage, engine: Engine) -> None:
    config = ("--config", str(stage.config))
    job, story = await kept(stage)
    assert f"microvm shell {story['job']['id']}" in told(story, "frozen")
    assert not vms(engine)
    assert not stage.forge.actions.runners, "deregistered before it was frozen"
    (one,) = json.loads((await microvm(stage, "frozen", "--json", *config)).out)
    (frozen,) = engine.frozen()
    assert (one["id"], one["job_id"], one["state"]) == (frozen.id, story["job"]["id"], "frozen")
    assert one["digest"] == frozen.digest
    assert engine.snapshots.load(frozen.digest).manifest.owner == "octo-org"
    assert frozen.id in (await microvm(stage, "frozen", *config)).out

    # By the forge's id, by ours, by the VM's: the job's files and its memory, as its user, and no network.
    read = await shell(stage, str(job.id), "cat", "evidence", "/dev/shm/mark")
    assert read == (0, "what the job left\nin memory\n", "")
    assert (await shell(stage, story["job"]["id"], "id", "-un")).out == "runner\n"
    assert (await shell(stage, one["id"], "id", "-un", options=("--user", "root"))).out == "root\n"
    assert (await shell(stage, str(job.id), "sh", "-c", "exit 7")).code == 7
    reach = f"timeout 5 bash -c 'echo > /dev/tcp/forge.test/{stage.forge.port}'"
    assert (await shell(stage, str(job.id), "sh", "-c", reach)).code != 0
    opened = await shell(stage, str(job.id), "sh", "-c", reach, options=("--network",))
    assert opened.code == 0, opened.error

    # A copy's changes are its own, the frozen one is still there, and everything is written down.
    await shell(stage, str(job.id), "rm", "evidence")
    assert (await shell(stage, str(job.id), "cat", "evidence")).code == 0
    assert not vms(engine)
    log = json.loads((await microvm(stage, "audit", "--json", *config)).out)
    actions = [row["action"] for row in log if row["target"] == frozen.id]
    assert actions[-1] == "frozen.freeze" and actions.count("frozen.shell") >= 8

    removed = await microvm(stage, "frozen", "rm", frozen.id, *config)
    assert removed.code == 0, removed.error
    assert not engine.frozen()
    assert not (engine.pool.snapshots / frozen.digest).exists()
    late = await shell(stage, str(job.id), "true")
    assert late.code == 1
    assert "was removed" in late.error and "operator" in late.error


async def test_what_cannot_be_opened_is_a_sentence(stage: Stage) -> None:
    job = await queue(stage, "hello")
    await gone(stage, job)
    fine = await shell(stage, str(job.id), "true")
    assert (fine.code, "succeeded" in fine.error) == (1, True), fine.error
    unknown = await shell(stage, "no-such-job", "true")
    assert (unknown.code, "no-such-job" in unknown.error) == (1, True)
    missing = await microvm(stage, "frozen", "rm", "vm-none", "--config", str(stage.config))
    assert (missing.code, "vm-none" in missing.error) == (1, True)
    assert (await stage.http.post("/frozen/vm-none/remove")).status_code == 404


async def test_on_a_terminal_it_is_a_shell(stage: Stage, engine: Engine) -> None:
    job, _ = await kept(stage)
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "runner_service.cli", "shell", "--config", str(stage.config), str(job.id),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    screen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 4096):
                screen.extend(data)

    reading = asyncio.create_task(asyncio.to_thread(read))
    try:
        await eventually(lambda: b"$" in screen, "a prompt")
        os.write(ours, b"tty; cat evidence; exit 5\r")
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 5
    finally:
        if process.returncode is None:
            process.kill()
        await reading
        os.close(ours)
    assert b"/dev/pts/" in screen and b"what the job left" in screen, screen.decode()
    await eventually(lambda: not vms(engine), "the copy is gone")


async def test_beyond_the_limit_the_oldest_goes(stage: Stage, engine: Engine) -> None:
    first, _ = await kept(stage)
    for _ in range(2):
        await kept(stage, "fails")
    await eventually(lambda: len(engine.frozen()) == 2, "two are left")
    gone_by_then = await shell(stage, str(first.id), "true")
    assert "limit of 2" in gone_by_then.error


async def test_a_vm_killed_under_its_job_is_infrastructure_and_the_job_runs_once_more(
    stage: Stage, engine: Engine
) -> None:
    job = await queue(stage, "hold")
    story = await running(stage, job)
    os.kill(vms(engine)[story["job"]["vm"]].pid, signal.SIGKILL)
    story = await stage.until(job, lambda story: story["job"]["infra"] is not None, "infrastructure")
    assert story["job"]["infra"]["code"] == "infra_vmm_killed"
    assert "signal 9" in told(story, "infrastructure")
    await stage.forge.wait_for(job, "completed", 60)
    await eventually(lambda: len(job.run.jobs) == 2, "the job is run again")
    again = job.run.latest[0]
    second = await running(stage, again)
    os.kill(vms(engine)[second["job"]["vm"]].pid, signal.SIGKILL)
    second = await stage.until(again, lambda story: "not re-run" in steps(story), "not run a second time")
    await stage.forge.wait_for(again, "completed", 60)
    first = await stage.until(
        job, lambda story: story["job"]["infra"]["rerun"] == "done", "the re-run is known"
    )
    assert first["job"]["conclusion"] == "failure"
    assert first["job"]["infra"]["code"] == "infra_vmm_killed", "what the forge says later changes nothing"
    assert first["job"]["infra"]["rerun_job"] == second["job"]["id"]
    why = await microvm(stage, "why", str(job.id), "--config", str(stage.config))
    assert "infrastructure failed, not the job: infra_vmm_killed" in why.out
    await asyncio.sleep(1)
    assert len(job.run.jobs) == 2
    assert not engine.frozen(), "a VM that died is no VM to keep"


async def test_at_its_time_everything_is_gone_also_when_no_service_ran_then(
    stage: Stage, engine: Engine
) -> None:
    text = stage.config.read_text()
    await stage.stop()
    stage.config.write_text(text.replace("ttl_h = 1.0", f"ttl_h = {20 / 3600:.5f}"))
    await stage.start()
    try:
        job, _ = await kept(stage)
        (frozen,) = engine.frozen()
        await stage.stop()
        await asyncio.sleep(max(0.0, frozen.expires_at - time.time()) + 0.5)
        await stage.start()
        assert (await stage.http.get("/frozen")).json() == []
        assert not engine.frozen()
        await eventually(lambda: not (engine.pool.snapshots / frozen.digest).exists(), "its files are gone")
        late = await shell(stage, str(job.id), "true")
        assert "its time had passed" in late.error
    finally:
        await stage.stop()
        stage.config.write_text(text)
        await stage.start()
