"""The life of a runner over stand-ins: the usual way, every other way out, and a kill at every effect."""

import asyncio
import time
from pathlib import Path

import pytest

from github_webhook.errors import Forbidden, RateLimited, Unavailable
from runner_service.domain import Held, Runner
from runner_service.store import queries as q
from tests.standins.engine import FakeMachine, Write
from tests.standins.forge import ForgeJob
from tests.unit.runner_service.world import RUNNERS, World, until
from vmm_core.errors import PoolFull
from vmm_core.machine import VmExit

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_job_runs_once_and_nothing_remains(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=0.3)
        await world.until_quiet()
        story = await service.story(job.id)
    assert job.conclusion == "success" and job.runs == 1
    assert world.host.launches == 1 and world.forge.registrations == 1
    steps = [line.step for line in story.timeline]
    for step in ("queued", "wanted", "placed", "forking", "forked", "registered", "started", "registering", "idle",
                 "busy", "in progress", "completed", "retiring", "destroyed", "gone"):  # fmt: skip
        assert step in steps, step
    assert steps.index("forking") < steps.index("started") < steps.index("gone")
    assert story.job.state == "completed" and story.runners[0].exit_code == 0
    log = (tmp_path / "logs" / f"{story.job.runner}.log").read_bytes()
    assert log == b"Connected\nListening for Jobs\nhello from the job\ndone\n"


async def test_more_jobs_than_room_wait_with_a_reason_and_all_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        jobs = [world.forge.queue(seconds=0.15) for _ in range(10)]
        await asyncio.sleep(0.1)
        assert len(world.host.machines) <= RUNNERS.max_vms
        waits = [(await service.story(job.id)).job.waits_for or "" for job in jobs]
        assert any("capacity" in wait for wait in waits)
        await world.until_quiet()
    assert [job.runs for job in jobs] == [1] * 10


async def test_a_stolen_runner_is_made_up_for(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.fork_seconds = 0.05
    async with world.running() as service:
        first = world.forge.queue(("microvm", "linux"), seconds=0.2)
        await asyncio.sleep(0.02)
        # Same group, queued later; the forge gives runners to whichever matches first.
        second = world.forge.queue(("microvm", "linux"), seconds=0.2)
        world.forge.jobs = {second.id: second, first.id: first}
        await world.until_quiet()
        told = [line.step for line in (await service.story(first.id)).timeline]
    assert first.runs == second.runs == 1
    assert world.host.launches == 2
    assert "runner taken" in told


async def test_a_runner_taken_by_a_job_that_no_event_told_of_is_no_failed_runner(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.fork_seconds = 0.05
    unheard: set[str] = set()
    world.mangle = lambda event: [] if event.forge_job_id in unheard else [event]
    async with world.running() as service:
        first = world.forge.queue()
        unheard.add(str(int(first.id) + 1))
        thief = world.forge.queue()
        world.forge.jobs = {thief.id: thief, first.id: first}
        await world.until_quiet()
        story = await service.story(first.id)
    assert thief.runs == first.runs == 1
    assert [runner.code for runner in story.runners] == ["runner_exited"] * 2
    assert "that no event told of yet" in (story.runners[1].reason or "")


async def test_a_runner_that_ends_well_without_a_job_is_a_failed_one(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def nothing(*_: object) -> int:
        return 0

    world.host.programs["Runner.Listener"] = nothing
    async with world.running() as service:
        job = world.forge.queue()
        async with asyncio.timeout(5):
            while not (runners := (await service.story(job.id)).runners) or runners[-1].code is None:
                await asyncio.sleep(0.01)
        assert runners[-1].code == "runner_failed"
        world.forge.cancel(job)
        await world.until_quiet()


async def test_a_runner_the_forge_shows_busy_covers_its_job_before_an_event_names_it(tmp_path: Path) -> None:
    """Late events: the job looks untaken, and its runner does not listen any more."""
    world = World(tmp_path)
    listener = world.host.programs["Runner.Listener"]
    world.host.programs["Runner.Listener"] = lambda machine, files, _write: listener(
        machine, files, lambda _data: None
    )
    world.mangle = lambda event: [] if event.state == "in_progress" else [event]
    world.forge.faults["job"] = [Unavailable("slow", retryable=True) for _ in range(3)]
    async with world.running() as service:
        job = world.forge.queue(seconds=4)
        await world.until_quiet(20)
        story = await service.story(job.id)
    assert any("online and busy" in line.reason for line in story.timeline)
    assert world.host.launches == 1 and len(story.runners) == 1, story.timeline


async def test_a_runner_that_took_an_unknown_job_leaves_its_own_to_another(tmp_path: Path) -> None:
    world = World(tmp_path)
    first = True

    async def program(machine: FakeMachine, files: dict[str, bytes], write: Write) -> int:
        """The first one is busy with something nobody ever tells of."""
        nonlocal first
        if not first:
            return await listener(machine, files, write)
        first = False
        runner = world.forge.runners[files[".runner"].decode()]
        stranger = ForgeJob("999", "o", "r", ("other",), state="in_progress", runner=runner.name)
        world.forge.jobs["999"] = stranger
        runner.online, runner.job = True, "999"
        await until(lambda: job.runs, 30)
        stranger.state, stranger.conclusion = "completed", "success"
        del world.forge.runners[runner.id]
        return 0

    listener, world.host.programs["Runner.Listener"] = world.host.programs["Runner.Listener"], program
    async with world.running() as service:
        job = world.forge.queue()
        await world.until_quiet(30)
        story = await service.story(job.id)
    assert job.runs == 1 and world.host.launches == 2
    assert any(line.step == "runner taken" for line in story.timeline)


async def test_a_job_cancelled_before_pick_up_releases_its_runner(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.fork_seconds = 0.1
    async with world.running() as service:
        job = world.forge.queue()
        async with asyncio.timeout(10):
            while not await service.runners():
                await asyncio.sleep(0.005)
        world.forge.cancel(job)
        await world.until_quiet()
        story = await service.story(job.id)
    assert job.runs == 0
    assert story.runners[0].code == "cancelled"


async def test_a_forge_that_says_busy_is_believed(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        # Every event about pick-up is lost: for us the runner is idle until its limit.
        world.runners = RUNNERS
        world.mangle = lambda event: [] if event.state == "in_progress" else [event]
        job = world.forge.queue(seconds=2.0)
        await until(lambda: job.runs, 20)
        assert job.state == "in_progress"
        (runner,) = await service.runners()
        from runner_service.store import queries as q

        async with service.store.writing() as db:
            await q.set_runner_facts(db, runner.id, cancelled_at=1.0)
        service.scheduler._lives[runner.id].wake()
        await world.until_quiet()
        story = await service.story(job.id)
    assert job.runs == 1 and job.conclusion == "success"
    assert any("forge says that a job runs" in line.reason for line in story.timeline)


async def test_lost_pick_up_and_completed_events_do_not_make_a_second_runner(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.mangle = lambda event: [event] if event.state == "queued" else []
    async with world.running() as service:
        job = world.forge.queue()
        await world.until_quiet()
        story = await service.story(job.id)
    assert world.host.launches == 1 and job.runs == 1
    assert story.job.conclusion == "success"


@pytest.mark.parametrize("step", ["register", "find", "deregister", "look", "job"])
async def test_a_forge_that_fails_for_a_while_is_asked_again(tmp_path: Path, step: str) -> None:
    world = World(tmp_path)
    world.forge.faults[step] = [Unavailable(f"{step}: 502", status=502, retryable=True)]
    async with world.running():
        job = world.forge.queue()
        await world.until_quiet()
    assert job.runs == 1


async def test_a_lost_registration_answer_is_replaced(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.forge.lost_answers.add("register")
    async with world.running():
        job = world.forge.queue()
        await world.until_quiet()
    assert job.runs == 1 and world.forge.registrations == 2 and world.host.launches == 1


async def test_a_refused_registration_is_told_and_braked_and_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.forge.faults["register"] = [Forbidden("no permission administration:write", status=403)]
    async with world.running() as service:
        job = world.forge.queue()
        async with asyncio.timeout(20):
            while "administration:write" not in ((await service.story(job.id)).job.waits_for or ""):
                await asyncio.sleep(0.01)
        await until(lambda: not world.host.machines and not world.forge.runners)
        story = await service.story(job.id)
        assert any("administration:write" in line.reason for line in story.timeline)
        await world.until_quiet()
    assert job.runs == 1


async def test_a_failed_runner_holds_its_group_back_from_the_moment_it_is_written_down(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.forge.faults["register"] = [Forbidden("no permission", status=403)]
    async with world.running() as service:
        do = service.scheduler._steps.do

        async def slow(step: q.Step) -> Runner | None:
            """A pass falls between the commit and what follows it."""
            after = await do(step)
            if step.values.get("state") == "retiring":
                service.scheduler.wake()
                await asyncio.sleep(0.5)
            return after

        service.scheduler._steps.do = slow  # type: ignore[method-assign]
        job = world.forge.queue()
        await world.until_quiet(20)
        story = await service.story(job.id)
    first, second = [line.at for line in story.timeline if line.step == "wanted"]
    failed = next(line.at for line in story.timeline if line.step == "retiring")
    assert first < failed and second - failed >= 0.9


async def test_a_rate_limit_holds_the_group_back_until_it_ends(tmp_path: Path) -> None:
    world = World(tmp_path)
    until = time.time() + 1.5
    world.forge.faults["register"] = [RateLimited("secondary rate limit", retry_at=until, status=403)]
    async with world.running():
        job = world.forge.queue()
        await world.until_quiet()
        assert time.time() >= until
    assert job.runs == 1


async def test_jobs_of_an_account_that_is_held_back_wait_for_that_without_a_vm(tmp_path: Path) -> None:
    world = World(tmp_path)
    reason = "forge_suspended: the installation of the App on o is suspended"
    until_ = time.time() + 60
    world.held = lambda scope: Held(until_, reason) if scope.path == "o/r" else None
    async with world.running() as service:
        held, other = world.forge.queue(), world.forge.queue(repo="p/q")
        await until(lambda: other.state == "completed")
        story = await service.story(held.id)
        assert held.state == "queued" and not story.runners
        assert (story.job.waits_for or "").startswith(reason)
        assert any("forge_suspended" in (line.waits_for or "") for line in story.timeline)
        # The event, or a probe, says that it is back.
        world.held = lambda _scope: None
        service.scheduler.wake()
        await world.until_quiet()
    assert held.runs == other.runs == 1


async def test_a_fork_that_fails_leaves_no_registration(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.fork_errors = [PoolFull("the pool is full: free some room")]
    async with world.running() as service:
        job = world.forge.queue()
        async with asyncio.timeout(10):
            while not any("pool is full" in line.reason for line in (await service.story(job.id)).timeline):
                await asyncio.sleep(0.01)
        # Deregistered at once; the next try comes a second later.
        await until(lambda: not world.forge.runners, 10)
        await world.until_quiet()
    assert job.runs == 1


async def test_a_vm_that_dies_is_told_and_given_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await until(lambda: job.runs)
        (machine,) = world.host.machines.values()
        machine.end(
            VmExit(kind="signaled", signal=9, reason="the VMM was killed by signal 9", console_tail="oops")
        )
        await world.until_quiet()
        story = await service.story(job.id)
    assert story.runners[0].code == "vm_died"
    assert "signal 9" in (story.runners[0].reason or "") and "oops" in (story.runners[0].reason or "")


async def test_a_runner_that_never_comes_online_is_ended_by_its_deadline(tmp_path: Path) -> None:
    import msgspec

    world = World(tmp_path, runners=msgspec.structs.replace(RUNNERS, online_limit_s=1))

    async def silent(*_: object) -> int:
        await asyncio.sleep(3600)
        return 0

    world.host.programs["Runner.Listener"] = silent
    async with world.running() as service:
        job = world.forge.queue()
        async with asyncio.timeout(10):
            while not (story := await service.story(job.id)).runners or not story.runners[-1].code:
                await asyncio.sleep(0.01)
        assert story.runners[-1].code == "late_registering"
        world.host.programs["Runner.Listener"] = world.forge.program
        await world.until_quiet(15)
    assert job.runs == 1


async def test_an_operator_ends_a_vm(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await until(lambda: job.runs)
        (vm_id,) = world.host.machines
        await asyncio.sleep(0.05)
        await service.scheduler.kill(vm_id)
        await world.until_quiet()
        story = await service.story(job.id)
    assert story.runners[0].code == "killed"


async def test_vms_that_no_row_owns_are_gone_after_two_passes(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        await service.engine.launch(
            "github-runner", metadata={"runner_id": "microvm-unknown", "service": "host-1"}
        )
        others = [{"purpose": "run"}, {"bake": "x"}, {"program": "of somebody else"}]
        for metadata in others:
            await service.engine.launch("github-runner", metadata=metadata)
        # Those of other programs are none of our business while these programs live.
        await until(lambda: [m.record.metadata for m in world.host.machines.values()] == others)
    async with world.running():
        # Left alone by their dead program; the engine ends the stranger's in time.
        await until(lambda: [m.record.metadata for m in world.host.machines.values()] == others[-1:], 20)
    await world.host.close()


async def test_a_service_that_stops_leaves_its_vms_and_goes_on_without_a_gap_in_the_log(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    async with world.running():
        job = world.forge.queue(seconds=0.6, output=b"x" * 10_000)
        await until(lambda: job.runs)
        await asyncio.sleep(0.05)
    assert len(world.host.machines) == 1
    async with world.running() as service:
        await world.until_quiet()
        story = await service.story(job.id)
    assert job.runs == 1 and world.host.launches == 1
    log = (tmp_path / "logs" / f"{story.job.runner}.log").read_bytes()
    assert log == b"Connected\nListening for Jobs\n" + b"x" * 10_000 + b"done\n"
    assert "adopted" in [line.step for line in story.timeline]


async def _effects_of_a_clean_run(directory: Path) -> int:
    world = World(directory)
    async with world.running():
        world.forge.queue()
        await world.until_quiet()
    return len(world.effects)


async def test_killed_at_any_effect_a_job_still_runs_once_and_nothing_leaks(tmp_path: Path) -> None:
    count = await _effects_of_a_clean_run(tmp_path / "clean")
    for number in range(1, count + 1):
        world = World(tmp_path / f"{number}")
        world.kill_at = number
        try:
            async with world.running():
                job = world.forge.queue(seconds=0.05)
                await world.until_quiet()
            at = world.effects[-1]
            world.kill_at = None
            async with world.running() as service:
                await world.until_quiet()
                story = await service.story(job.id)
        except AssertionError as error:
            raise AssertionError(f"killed at effect {number} ({world.effects[-1]}): {error}") from error
        assert job.runs == 1, f"killed at effect {number} ({at}): the job ran {job.runs} times"
        assert story.job.conclusion == "success", f"killed at effect {number} ({at})"
        if story.job.runner is not None:
            log = (tmp_path / f"{number}" / "logs" / f"{story.job.runner}.log").read_bytes()
            assert log == b"Connected\nListening for Jobs\nhello from the job\ndone\n", f"at {number} ({at})"
        await world.host.close()
