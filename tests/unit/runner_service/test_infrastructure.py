"""Death of infrastructure: told apart from a job that failed, and run once more, never twice."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from github_webhook.errors import Forbidden, NotFound
from runner_service.domain import Job
from runner_service.infrastructure import Ask, Over, code_of, next_step, not_worth
from runner_service.views import Story
from tests.standins.forge import ForgeJob
from tests.unit.runner_service.world import RUNNERS, Service, World, until
from vmm_core.machine import ExecResult, VmExit

pytestmark = pytest.mark.anyio
KILLED = VmExit(
    kind="signaled", signal=9, cause="vmm_killed", reason="the VMM was killed by signal 9 (SIGKILL)"
)
AGAIN = msgspec.structs.replace(RUNNERS, rerun_on_infra_failure=("O/*",), retire_limit_s=1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# ── what it was ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        ("out_of_memory", "infra_host_memory"),
        ("disk_full", "infra_disk_full"),
        ("guest_panic", "infra_guest_panic"),
        ("guest_poweroff", "infra_guest_poweroff"),
        ("vmm_killed", "infra_vmm_killed"),
        ("vmm_crashed", "infra_vmm_crashed"),
        ("unknown", "infra_vm_lost"),
    ],
)
def test_how_the_vm_ended_gives_the_code(cause: str, code: str) -> None:
    ending = VmExit(kind="exited", cause=cause)  # pyright: ignore[reportArgumentType]
    assert code_of("vm_died", ending) == code
    assert code_of("vm_lost", ending) == code


def test_what_the_job_or_an_operator_did_is_no_failure_of_infrastructure() -> None:
    destroyed = VmExit(kind="destroyed", cause="destroyed")
    for code in ("runner_exited", "completed", "killed", "cancelled", "late_busy", "late_idle", "ok"):
        assert code_of(code, None) is None
        assert code_of(code, destroyed, ExecResult(code=1)) is None


def test_a_runner_killed_in_its_guest_and_a_guest_out_of_memory_are() -> None:
    short = VmExit(kind="destroyed", cause="destroyed", guest_oom="Out of memory: Killed process 7 (cc1)")
    killed = ExecResult(code=137, signal=9)
    assert code_of("runner_exited", None, killed) == "infra_runner_killed"
    assert code_of("runner_exited", short, killed) == "infra_guest_oom"
    assert code_of("runner_exited", short, ExecResult(code=0)) == "infra_guest_oom"
    assert code_of("channel_lost", None) == "infra_channel_lost"
    assert code_of("vm_lost", None) == "infra_vm_lost"


def test_what_would_happen_again_is_not_worth_a_rerun() -> None:
    for code in ("infra_guest_oom", "infra_guest_poweroff", "infra_guest_reboot", "infra_vm_expired"):
        assert not_worth(code)
    for code in (
        "infra_vmm_killed",
        "infra_host_memory",
        "infra_disk_full",
        "infra_guest_panic",
        "infra_vm_lost",
    ):
        assert not_worth(code) is None


def job(number: int, *, attempt: int = 1, state: str = "completed", conclusion: str | None = "failure",
        runner: str | None = "microvm-1") -> Job:  # fmt: skip
    return Job(
        id=f"github-{number}", forge="github", forge_job_id=str(number), owner="o", repo="r",
        scope_kind="repository", scope_path="o/r", labels=("microvm",), state=state,  # pyright: ignore[reportArgumentType]
        event_at=float(number), updated_at=0.0, name="test", run_id="9", run_attempt=attempt,
        conclusion=conclusion, runner_name=runner,
    )  # fmt: skip


def test_the_next_step_of_a_rerun() -> None:
    failed = job(1)
    assert next_step(failed, []) == Ask(failed)
    assert next_step(failed, [failed]) == Ask(failed)
    carried = job(2, attempt=2)
    assert next_step(failed, [failed, carried]) == Ask(carried), (
        "another job of the run was run again meanwhile"
    )
    again = job(3, attempt=2, state="queued", conclusion=None, runner=None)
    answer = next_step(failed, [failed, again])
    assert isinstance(answer, Over) and (answer.outcome, answer.job) == ("done", again)
    answer = next_step(job(1, conclusion="success"), [])
    assert isinstance(answer, Over) and answer.outcome == "needless"


_jobs = st.builds(
    job,
    st.integers(2, 9),
    attempt=st.integers(1, 4),
    state=st.sampled_from(["queued", "in_progress", "completed"]),
    conclusion=st.sampled_from([None, "success", "failure"]),
    runner=st.sampled_from([None, "microvm-1", "microvm-2"]),
)


@given(st.lists(_jobs, max_size=6))
def test_nothing_is_asked_for_a_job_that_runs_again_or_succeeded(attempts: list[Job]) -> None:
    failed = job(1)
    step = next_step(failed, attempts)
    latest = max([failed.run_attempt, *(one.run_attempt for one in attempts)])
    if isinstance(step, Ask):
        assert step.job.run_attempt == latest
        assert step.job.conclusion != "success"
        assert step.job is failed or (
            step.job.state == "completed" and step.job.runner_name == failed.runner_name
        )
    else:
        assert step.job is None or step.job.run_attempt > failed.run_attempt


# ── the whole way ────────────────────────────────────────────────────────────────────────────────


async def killed_under(world: World, job: ForgeJob, how: VmExit = KILLED) -> None:
    """The VM that runs ``job`` ends."""
    await until(lambda: job.runs or (job.runner and job.state == "in_progress"))
    (machine,) = [
        one for one in world.host.machines.values() if one.record.metadata["runner_id"] == job.runner
    ]
    machine.end(how)


async def told(service: Service, job: str, step: str, seconds: float = 10.0) -> Story:
    """The job's story once it has a line of this step."""
    async with asyncio.timeout(seconds):
        while True:
            story = await service.story(job)
            if any(line.step == step for line in story.timeline):
                return story
            await asyncio.sleep(0.02)


async def test_a_vm_that_dies_under_its_job_is_told_as_infrastructure_whatever_the_forge_says_later(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, runners=msgspec.structs.replace(RUNNERS, retire_limit_s=1))
    world.forge.sees_lost_runners = False
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await killed_under(world, job)
        story = await told(service, job.id, "infrastructure")
        assert story.job.infra is not None and story.job.infra.code == "infra_vmm_killed"
        assert "SIGKILL" in story.job.infra.reason
        assert story.job.infra.rerun == "off"
        world.forge.lose(job, "cancelled")
        await world.until_quiet()
        story = await service.story(job.id)
        text = generate_latest(service.metrics.registry).decode()
    assert (story.job.conclusion, story.job.infra and story.job.infra.code) == (
        "cancelled",
        "infra_vmm_killed",
    )
    assert 'microvm_infra_failures_total{code="infra_vmm_killed"} 1.0' in text
    lines = [line.reason for line in story.timeline if line.step == "infrastructure"]
    assert len(lines) == 1 and lines[0].startswith("infra_vmm_killed: ")
    assert len(world.forge.jobs) == 1


async def test_a_job_that_fails_by_itself_is_no_infrastructure(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    async with world.running() as service:
        job = world.forge.queue(fails=True)
        await world.until_quiet()
        await asyncio.sleep(0.3)
        story = await service.story(job.id)
    assert (story.job.conclusion, story.job.infra) == ("failure", None)
    assert len(world.forge.jobs) == 1


async def test_a_guest_out_of_memory_is_told_if_the_job_failed_and_not_run_again(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.host.guest_oom = "Out of memory: Killed process 7 (cc1)"
    async with world.running() as service:
        failing, passing = world.forge.queue(fails=True), world.forge.queue()
        await world.until_quiet()
        story = await told(service, failing.id, "infrastructure")
        await asyncio.sleep(0.3)
        other = await service.story(passing.id)
    assert story.job.infra is not None and story.job.infra.code == "infra_guest_oom"
    assert story.job.infra.rerun == "off" and "memory" in story.job.infra.rerun_why
    assert other.job.infra is None
    assert len(world.forge.jobs) == 2


async def test_it_is_run_once_more_when_its_run_is_over_and_never_a_second_time(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.forge.sees_lost_runners = False
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await killed_under(world, job)
        await told(service, job.id, "re-run")
        await asyncio.sleep(0.3)
        assert len(world.forge.jobs) == 1, "its run is not over"
        world.forge.lose(job)
        await until(lambda: len(world.forge.jobs) == 2, 10)
        (again,) = [one for one in world.forge.jobs.values() if one is not job]
        await killed_under(world, again)
        story = await told(service, again.id, "not re-run")
        assert story.job.infra is not None and story.job.infra.rerun == "off"
        assert f"github-{job.id}" in story.job.infra.rerun_why
        world.forge.lose(again)
        await world.until_quiet()
        await asyncio.sleep(0.3)
        first = await service.story(job.id)
    assert len(world.forge.jobs) == 2
    assert first.job.infra is not None
    assert (first.job.infra.rerun, first.job.infra.rerun_job) == ("done", f"github-{again.id}")
    waits = [line.waits_for for line in first.timeline if line.step == "re-run"]
    assert "its run to be over" in waits
    assert any(f"job github-{job.id} once more" in line.reason for line in story.timeline)


async def test_two_jobs_of_one_run_that_died_are_both_run_again(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    async with world.running() as service:
        first, second = world.forge.queue(seconds=30), world.forge.queue(seconds=30, run="91")
        assert first.run == second.run == "91"
        await until(lambda: first.runs and second.runs)
        for job in (first, second):
            job.seconds = 0.05
            await killed_under(world, job)
        await told(service, first.id, "infrastructure")
        await world.until_quiet(20)
        await until(lambda: sum(one.conclusion == "success" for one in world.forge.attempts("91")) == 2, 20)
    names = [one.name for one in world.forge.jobs.values() if one.runs]
    assert sorted(names) == sorted([first.name, second.name] * 2)


async def test_a_runner_that_died_before_its_job_was_taken_needs_no_rerun(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.host.fork_errors = []
    async with world.running() as service:
        world.host.programs["Runner.Listener"] = _silent
        job = world.forge.queue()
        await until(lambda: world.host.machines)
        await asyncio.sleep(0.1)
        (machine,) = world.host.machines.values()
        world.host.programs["Runner.Listener"] = world.forge.program
        machine.end(KILLED)
        await world.until_quiet(20)
        story = await service.story(job.id)
    assert (job.conclusion, story.job.infra, len(world.forge.jobs)) == ("success", None, 1)
    assert world.host.launches == 2


async def _silent(*_: object) -> int:
    await asyncio.sleep(60)
    return 0


async def test_a_forge_that_refuses_is_told_once_and_asked_until_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.forge.faults["rerun"] = [Forbidden("no", status=403) for _ in range(500)]
    async with world.running() as service:
        service.reruns._ask_limit = 1.0
        job = world.forge.queue(seconds=30)
        await killed_under(world, job)
        story = await told(service, job.id, "not re-run")
        await world.until_quiet()
    assert story.job.infra is not None and story.job.infra.rerun == "given_up"
    assert [line.reason for line in story.timeline].count("no") == 1
    assert len(world.forge.faults["rerun"]) < 499


async def test_a_run_that_is_gone_is_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.forge.faults["rerun"] = [NotFound("there is no such run", status=404)]
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await killed_under(world, job)
        story = await told(service, job.id, "not re-run")
        await world.until_quiet()
    assert story.job.infra is not None and story.job.infra.rerun == "given_up"
    assert len(world.forge.jobs) == 1


async def test_a_job_of_a_cancelled_run_is_not_run_again(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.forge.sees_lost_runners = False
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await killed_under(world, job)
        await told(service, job.id, "infrastructure")
        world.forge.lose(job, "cancelled")
        story = await told(service, job.id, "not re-run")
        await world.until_quiet()
    assert story.job.infra is not None and story.job.infra.rerun == "needless"
    assert len(world.forge.jobs) == 1


async def test_a_pick_up_that_is_heard_of_after_the_runner_is_gone_is_noted_too(tmp_path: Path) -> None:
    world = World(tmp_path, runners=AGAIN)
    world.forge.sees_lost_runners = False
    world.mangle = lambda event: [event] if event.state == "queued" else []
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await killed_under(world, job)
        async with asyncio.timeout(10):
            while not (story := await service.story(job.id)).runners or story.runners[0].state != "gone":
                await asyncio.sleep(0.02)
        world.mangle = lambda event: [event]
        world.forge.lose(job)
        story = await told(service, job.id, "infrastructure")
        await until(lambda: len(world.forge.jobs) == 2, 10)
        for one in world.forge.jobs.values():
            one.seconds = 0.01
        await asyncio.sleep(0)
    assert story.job.infra is not None and story.job.infra.code == "infra_vmm_killed"


@pytest.mark.parametrize("lost_answer", [False, True])
async def test_killed_at_any_moment_the_job_is_run_again_exactly_once(
    tmp_path: Path, lost_answer: bool
) -> None:
    async for world, job in killed_worlds(tmp_path, lost_answer=lost_answer):
        ran = [one for one in world.forge.jobs.values() if one.runs]
        assert len(ran) == 2, world.effects
        assert {one.name for one in ran} == {job.name}


async def killed_worlds(tmp_path: Path, *, lost_answer: bool) -> AsyncIterator[tuple[World, ForgeJob]]:
    """Worlds whose service was killed at each effect from the death of the VM to the end of the re-run."""
    number = 0
    while True:
        (tmp_path / str(number)).mkdir()
        world = World(tmp_path / str(number), runners=AGAIN)
        if lost_answer:
            world.forge.lost_answers.add("rerun")
        async with world.running() as service:
            job = world.forge.queue(seconds=30)
            await told(service, job.id, "busy")
            await killed_under(world, job)
            job.seconds = 0.01
            world.kill_at = len(world.effects) + 1 + number
            await _settled(world)
            died = world.dead.is_set()
        world.kill_at = None
        if died:
            async with world.running():
                await _settled(world)
        yield world, job
        if not died:
            return
        number += 4 if lost_answer else 3


async def _settled(world: World) -> None:
    """Until the job ran again and all is quiet, or the service is killed."""
    deadline = time.monotonic() + 15
    while not world.dead.is_set() and time.monotonic() < deadline:
        again = [one for one in world.forge.jobs.values() if one.attempt > 1]
        if again and not await world.left():
            await asyncio.sleep(0.15)
            return
        await world.flush()
        await asyncio.sleep(0.02)
