"""Registrations and runners agree: phantoms are let go, vanished ones retire; jobs of a deleted repository end."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook.errors import Unavailable
from runner_service.domain import Listing, RemoteRunner, Runner, Scope
from runner_service.registrations import MISSING, Registrations, phantoms, vanished
from runner_service.store import queries as q
from tests.standins.engine import FakeMachine, Write
from tests.standins.forge import ForgeRunner
from tests.unit.runner_service.world import RUNNERS, Service, World, until

pytestmark = pytest.mark.anyio

SCOPE = Scope("repository", "o/r")
PATIENT = msgspec.structs.replace(RUNNERS, idle_limit_s=60.0, online_limit_s=60.0, job_limit_s=60.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def row(name: str, *, state: str = "gone", remote: str | None = None, serving: str | None = None) -> Runner:
    return Runner(
        id=name, forge="github", scope_kind="repository", scope_path="o/r", labels=("microvm",), group_key="g",
        template="t", memory_mib=1, state=state, state_at=0.0, deadline=9e9, created_at=0.0, event_at=0.0,  # type: ignore[arg-type]
        host="host-1", remote_id=remote, serving_job_id=serving, ended_at=time.time(),
    )  # fmt: skip


class Sweeps:
    """The sweeper of a service, with a clock of its own."""

    def __init__(self, world: World, service: Service) -> None:
        self.ahead = 0.0
        self.client = world.forge.client()
        self.looks: list[str] = []
        self.sweeper = Registrations(
            store=service.store,
            forges={"github": self.client},
            host="host-1",
            lose=service.scheduler.lose,
            observe=service.scheduler.observe,
            clock=lambda: time.time() + self.ahead,
        )

    async def once(self, *, after: float = 61.0) -> None:
        self.ahead += after
        await self.sweeper.sweep()


async def keep(service: Service, *rows: Runner) -> None:
    async with service.store.writing() as db:
        await q.add_runners(db, rows)


def registered(world: World, number: str, name: str, *, job: str | None = None) -> None:
    """A registration that the forge has, whoever made it."""
    world.forge.runners[number] = ForgeRunner(number, name, SCOPE, frozenset({"microvm"}), True, job)


async def test_a_registration_whose_runner_is_gone_is_let_go_when_it_is_seen_twice(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        await keep(service, row("microvm-dead"))
        registered(world, "900", "microvm-dead")
        sweeps = Sweeps(world, service)
        await sweeps.once()
        assert "900" in world.forge.runners, "once may be bad luck"
        await sweeps.once()
        assert "900" not in world.forge.runners


async def test_what_is_busy_unknown_or_alive_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path, runners=PATIENT)
    async with world.running() as service:
        await keep(service, row("microvm-dead"))
        job = world.forge.queue(seconds=60)
        await until(lambda: job.runs)
        registered(world, "900", "microvm-dead", job=job.id)
        registered(world, "901", "microvm-of-another-service")
        sweeps = Sweeps(world, service)
        for _ in range(4):
            await sweeps.once()
        assert {"900", "901"} < set(world.forge.runners) and len(world.forge.runners) == 3
        world.forge.runners.clear()
        job.seconds = 0
        for machine in list(world.host.machines.values()):
            await service.scheduler.kill(machine.record.id)
        await until(lambda: not world.host.machines)
        job.state = "completed"


async def test_a_runner_whose_registration_vanished_retires_and_its_job_gets_another(tmp_path: Path) -> None:
    world = World(tmp_path, runners=PATIENT)
    listener = world.host.programs["Runner.Listener"]
    deaf = True

    async def program(machine: FakeMachine, files: dict[str, bytes], write: Write) -> int:
        """Online, and cut off from the forge: it hears neither of jobs nor of its end."""
        if not deaf:
            return await listener(machine, files, write)
        write(b"Listening for Jobs\n")
        await asyncio.Event().wait()
        return 0

    world.host.programs["Runner.Listener"] = program
    async with world.running() as service:
        job = world.forge.queue()
        await state_of(service, "idle")
        world.forge.runners.clear()
        deaf = False
        sweeps = Sweeps(world, service)
        await sweeps.once()
        assert [r.state for r in await service.runners()] == ["idle"]
        await sweeps.once()
        await world.until_quiet(20)
        first = (await service.story(job.id)).runners[-1]
    assert first.code == "registration_gone" and "registration" in (first.reason or "")
    assert job.runs == 1 and not world.host.machines


async def test_a_listing_that_is_incomplete_or_behind_retires_nobody(tmp_path: Path) -> None:
    world = World(tmp_path, runners=PATIENT)
    async with world.running() as service:
        job = world.forge.queue(labels=("microvm",))
        job.state = "waiting"  # nobody takes it: the runner idles
        await state_of(service, "idle")
        sweeps = Sweeps(world, service)

        async def part(_scope: Scope) -> Listing:
            return Listing((), complete=False)

        async def behind(_scope: Scope) -> Listing:
            return Listing((), complete=True)

        for listing in (part, behind):
            sweeps.client.registrations = listing  # type: ignore[method-assign]
            for _ in range(4):
                await sweeps.once()
            assert [r.state for r in await service.runners()] == ["idle"]
        job.state = "queued"
        world.forge._assign()
        await world.until_quiet()


async def test_the_jobs_of_a_deleted_repository_are_closed_after_a_while_and_with_the_truth(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        other = world.forge.queue(repo="p/q")
        world.forge.deleted.add("o/r")
        job = world.forge.queue()
        await until(lambda: other.state == "completed", 20)
        await told(service, job.id, lambda story: any(r.code == "forge_not_found" for r in story.runners))
        sweeps = Sweeps(world, service)
        for _ in range(4):
            await sweeps.once()
        assert (await service.story(job.id)).job.state == "queued", "it may be back, or the token"
        await sweeps.once(after=MISSING)
        story = await told(service, job.id, lambda story: story.job.state == "completed")
        assert story.job.conclusion == "repository_gone"
        assert any("knows no o/r any more" in line.reason for line in story.timeline)
        job.state = "completed"
        await world.until_quiet(20)
        assert not world.forge.runners


async def test_one_owner_s_silence_delays_no_other_and_its_trouble_changes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        there = msgspec.structs.replace(row("microvm-there"), scope_path="slow/r")
        await keep(service, row("microvm-dead"), there)
        registered(world, "900", "microvm-dead")
        sweeps = Sweeps(world, service)
        asked: list[str] = []
        listing = sweeps.client.registrations

        async def registrations(scope: Scope) -> Listing:
            asked.append(scope.path)
            if scope.path == "slow/r":
                raise Unavailable("no complete answer within 10 s", retryable=True)
            return await listing(scope)

        sweeps.client.registrations = registrations  # type: ignore[method-assign]
        await sweeps.once()
        await sweeps.once()
        assert "900" not in world.forge.runners
        assert asked.count("slow/r") == 1, "not again before its time"


async def test_few_scopes_are_looked_at_in_one_round_and_all_of_them_in_turn(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        rows = [
            msgspec.structs.replace(row(f"microvm-{owner}-{n}"), scope_path=f"{owner}/r{n}")
            for owner in ("a", "b", "c", "d", "e")
            for n in range(10)
        ]
        await keep(service, *rows)
        sweeps = Sweeps(world, service)
        asked: list[str] = []

        async def registrations(scope: Scope) -> Listing:
            asked.append(scope.path)
            return Listing((), complete=True)

        sweeps.client.registrations = registrations  # type: ignore[method-assign]
        await sweeps.once()
        assert len(asked) == 10
        assert max(sum(path.startswith(owner) for path in asked) for owner in "abcde") <= 3
        for _ in range(12):
            await sweeps.once(after=1.0)
        assert len(asked) == len(set(asked)) == 50


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12), st.sets(st.integers(0, 9)))
def test_only_idle_registrations_of_gone_runners_are_phantoms(
    listed: list[tuple[int, bool]], gone: set[int]
) -> None:
    rows = {f"m-{n}": row(f"m-{n}", state="gone" if n in gone else "busy") for n in range(8)}
    remotes = [RemoteRunner(str(i), f"m-{n}", True, busy) for i, (n, busy) in enumerate(listed)]
    found = phantoms(remotes, rows)
    assert all(not one.busy and rows[one.name].state == "gone" for one in found)
    assert len(found) == sum(not busy and n in gone and n < 8 for n, busy in listed)


def test_a_runner_that_serves_a_job_has_not_vanished() -> None:
    mine = [
        row("waits", state="idle", remote="1"),
        row("serves", state="idle", remote="2", serving="github-1"),
        row("works", state="busy", remote="3"),
        row("unregistered", state="registering"),
        row("there", state="registering", remote="4"),
    ]
    listed = [RemoteRunner("4", "there", False, False)]
    assert [one.id for one in vanished(mine, listed, before=1.0)] == ["waits"]
    assert vanished(mine, listed, before=0.0) == [], "too young"


async def state_of(service: Service, state: str) -> None:
    async with asyncio.timeout(20):
        while [r.state for r in await service.runners()] != [state]:
            await asyncio.sleep(0.01)


async def told(service: Service, job: str, holds: Callable[..., bool]):  # type: ignore[no-untyped-def]
    async with asyncio.timeout(30):
        while not holds(story := await service.story(job)):
            await asyncio.sleep(0.02)
    return story
