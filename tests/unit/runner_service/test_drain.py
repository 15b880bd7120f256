"""Draining: no new work, running jobs finish, idle runners go; an order outlives restarts, the end of a service not."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_service import drain
from runner_service.domain import Host, Runner
from runner_service.stopping import Stopping, wind_down
from runner_service.store import host_queries as hq
from tests.unit.runner_service.world import Service, World, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def order(service: Service, at: float | None) -> None:
    assert await service.store.write(lambda db: hq.order_drain(db, "host-1", at))
    service.scheduler.wake()


async def host(service: Service) -> hq.HostState:
    (state,) = await service.store.read(hq.host_states)
    return state


async def waits_for(service: Service, job: str, what: str) -> None:
    async with asyncio.timeout(5):
        while what not in ((await service.story(job)).job.waits_for or ""):
            await asyncio.sleep(0.02)


async def test_a_draining_host_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        running = world.forge.queue(seconds=0.6)
        await until(lambda: running.runs)
        await order(service, time.time())
        waiting = world.forge.queue()
        await waits_for(service, waiting.id, "every host is draining")
        wait = (await service.story(waiting.id)).summary.wait
        assert wait is not None and wait.code == "draining" and "microvm drain --undo" in wait.ends
        async with asyncio.timeout(5):
            while not (await host(service)).drained:
                await asyncio.sleep(0.02)
        assert running.conclusion == "success" and waiting.runs == 0 and service.scheduler.draining
        assert not world.host.machines and not world.forge.runners
        await order(service, None)
        await world.until_quiet()
        assert waiting.runs == 1 and not (await host(service)).draining
    assert running.runs == 1


async def test_a_runner_without_a_job_is_let_go_and_one_that_got_it_stays(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        world.forge._assign = lambda: None  # pyright: ignore  # the forge gives no job
        idle = world.forge.queue()
        await until(lambda: any(r.online for r in world.forge.runners.values()))
        await order(service, time.time())
        await until(lambda: not world.host.machines and not world.forge.runners)
        story = await service.story(idle.id)
        assert [r.code for r in story.runners] == ["draining"]
        assert any(line.step == "released" and "host-1 is draining" in line.reason for line in story.timeline)
        del world.forge._assign  # pyright: ignore
        await order(service, None)
        await world.until_quiet()
    assert idle.runs == 1 and world.host.launches == 2


async def test_an_order_outlives_a_restart_and_repeating_it_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        await order(service, 1000.0)
        await order(service, 2000.0)
        assert (await host(service)).drain_ordered_at == 1000.0
    async with world.running() as service:
        job = world.forge.queue()
        await waits_for(service, job.id, "every host is draining")
        assert world.host.launches == 0
        await order(service, None)
        await world.until_quiet()
    assert job.runs == 1


async def test_an_unknown_host_is_no_host(tmp_path: Path) -> None:
    async with World(tmp_path).running() as service:
        assert not await service.store.write(lambda db: hq.order_drain(db, "nobody", 1.0))


async def test_a_service_that_ends_waits_for_its_jobs_within_the_grace_and_the_next_takes_new_ones(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=0.5)
        await until(lambda: job.runs)
        began = time.monotonic()
        await wind_down(service.scheduler, Stopping(), grace=10, vms="keep")
        assert time.monotonic() - began < 8 and job.conclusion == "success"
        assert service.scheduler.driven == 0 and (await host(service)).stopping
        late = world.forge.queue()
    async with world.running():
        await world.until_quiet()
    assert job.runs == late.runs == 1


async def test_a_second_signal_and_the_end_of_the_grace_hand_the_running_job_over(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=2.0)
        await until(lambda: job.runs)
        await wind_down(service.scheduler, Stopping(), grace=0.2, vms="keep")
        stopping = Stopping()
        asyncio.get_running_loop().call_later(0.2, stopping.signal)
        asyncio.get_running_loop().call_later(0.3, stopping.signal)
        began = time.monotonic()
        await wind_down(service.scheduler, stopping, grace=60, vms="keep")
        assert 0.2 < time.monotonic() - began < 1.5 and job.state == "in_progress"
    assert world.host.machines
    async with world.running():
        await world.until_quiet()
    assert job.runs == 1 and job.conclusion == "success" and world.host.launches == 1


async def test_no_grace_waits_for_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=1.5)
        await until(lambda: job.runs)
        began = time.monotonic()
        await wind_down(service.scheduler, Stopping(), grace=0, vms="keep")
        assert time.monotonic() - began < 1
    async with world.running():
        await world.until_quiet()
    assert job.runs == 1


async def test_vms_that_shall_not_outlive_the_service_are_ended_and_deregistered(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=60)
        await until(lambda: job.runs)
        await wind_down(service.scheduler, Stopping(), grace=0, vms="stop")
        assert not world.host.machines and not world.forge.runners and service.scheduler.driven == 0
        story = await service.story(job.id)
    assert story.runners[0].code == "host_stopped"


async def test_a_scheduler_that_cannot_end_holds_up_no_end() -> None:
    class Broken:
        driven = 1

        async def drain(self) -> None:
            raise OSError("the database is gone")

        async def emptied(self) -> None:
            raise OSError("no")

        async def end_vms(self) -> None:
            raise OSError("no")

    async with asyncio.timeout(5):
        await wind_down(Broken(), Stopping(), grace=30, vms="stop")


STATES = ("wanted", "forking", "registering", "idle", "busy", "retiring", "gone")
runners = st.lists(
    st.builds(
        Runner,
        id=st.uuids().map(str), forge=st.just("f"), scope_kind=st.just("repository"), scope_path=st.just("o/r"),
        labels=st.just(("x",)), group_key=st.just("g"), template=st.just("t"), memory_mib=st.just(1),
        state=st.sampled_from(STATES), state_at=st.just(0.0), deadline=st.just(9.0), created_at=st.just(0.0),
        event_at=st.just(0.0), host=st.sampled_from((None, "a", "b", "c")), serving_job_id=st.sampled_from((None, "j")),
        cancelled_at=st.sampled_from((None, 1.0)), killed_at=st.sampled_from((None, 1.0)),
    ),
    max_size=20,
)  # fmt: skip


@given(runners, st.booleans(), st.booleans())
def test_only_those_without_work_on_draining_hosts_are_let_go(have: list[Runner], a: bool, b: bool) -> None:
    hosts = [Host("a", 8, 1024, draining=a), Host("b", 8, 1024, draining=b)]
    gone = drain.without_work(have, hosts)
    draining = {one.name for one in hosts if one.draining}
    for runner in have:
        due = (
            runner.host in draining and runner.serving_job_id is None and runner.cancelled_at is None
            and runner.killed_at is None and runner.state in ("wanted", "forking", "registering", "idle")
        )  # fmt: skip
        assert (runner in gone) == due
    again = [
        msgspec.structs.replace(runner, cancelled_at=1.0) if runner in gone else runner for runner in have
    ]
    assert drain.without_work(again, hosts) == []
