"""Passes over a real store, without VMs: who is given a runner, what the others are told, and what a pass reads."""

import contextlib
import itertools
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from runner_service import demand
from runner_service.decide import Decider, Decision, Rules
from runner_service.domain import Host, Ignored, Job, JobEvent, Runner, Scope, Template
from runner_service.limits import Limits
from runner_service.store import queries as q
from runner_service.store.store import Store, sqlite_url
from scripts.programs import bench_reconcile

pytestmark = pytest.mark.anyio
NOW = 1_000_000.0
TEMPLATE = Template("t", "d" * 64, ("microvm-8gb",), 512, "/opt/actions-runner")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Desk:
    """A decider over a store with one host; time stands still unless ``now`` is moved."""

    def __init__(
        self, store: Store, *, room: int, limits: Limits, organization: str | None, cpus: int
    ) -> None:
        self.store = store
        self.now = NOW
        self.host = Host("host-1", room, 1 << 20, cpus=cpus)
        self.templates = [TEMPLATE]
        self.decider = Decider(
            Rules(
                service="host-1", default_template="t", extra_labels=(), name_prefix="m", fork_limit=60,
                limits=limits,
            ),
            interpret=lambda row: Ignored(row.id),
            scope_of=lambda event: (
                Scope("organization", organization)
                if organization
                else Scope("repository", f"{event.owner}/{event.repo}")
            ),
            templates=lambda: self.templates,
            parents=lambda: [],
            clock=lambda: self.now,
        )  # fmt: skip
        self._numbers = iter(range(1, 10_000))

    def queued(
        self, repository: str, jobs: int = 1, labels: tuple[str, ...] = ("microvm",)
    ) -> list[JobEvent]:
        owner, _, repo = repository.partition("/")
        return [
            JobEvent(
                forge="github", forge_job_id=str(next(self._numbers)), owner=owner, repo=repo, state="queued",
                labels=labels, seen_at=self.now + n / 1000,
            )
            for n in range(jobs)
        ]  # fmt: skip

    async def turn(
        self, *events: list[JobEvent], look_again: bool = False, **brakes: demand.Brake
    ) -> Decision:
        """A pass that hears of ``events``."""
        await self.store.write(lambda db: q.save_host(db, self.host, self.now))
        heard = [event for some in events for event in some]
        return await self.store.write(
            lambda db: self.decider.decide(db, observed=lambda: heard, brakes=brakes, look_again=look_again)
        )

    async def runners(self) -> list[Runner]:
        return await self.store.read(q.active_runners)

    async def jobs(self) -> dict[str, Job]:
        return {job.id: job for job in await self.store.read(lambda db: q.list_jobs(db, limit=10_000))}

    async def homes(self) -> Counter[str]:
        """The repositories whose jobs have runners."""
        jobs = await self.jobs()
        found = [jobs[r.job_id or ""] for r in await self.runners() if r.cancelled_at is None]
        return Counter(f"{job.owner}/{job.repo}" for job in found)

    async def end(self, runner: Runner, *, code: str = "completed", served: bool = True) -> list[JobEvent]:
        """Its VM and registration are gone; the event of its job's end, when it served one."""
        values = {"state": "gone", "ended_at": self.now, "code": code}
        if served:
            values["serving_job_id"] = runner.job_id
        step = q.Step(runner_id=runner.id, was=runner.state, owner="host-1", values=values)
        await self.store.write(lambda db: q.step_runners(db, [step]))
        if not served:
            return []
        job = (await self.jobs())[runner.job_id or ""]
        return [
            JobEvent(
                forge="github", forge_job_id=job.forge_job_id, owner=job.owner, repo=job.repo, state="completed",
                labels=job.labels, seen_at=self.now, runner_name=runner.id, conclusion="success",
            )
        ]  # fmt: skip

    async def told(self) -> list[str]:
        return [job.waits_for for job in (await self.jobs()).values() if job.waits_for is not None]


@contextlib.asynccontextmanager
async def desk(
    path: Path, *, room: int = 4, limits: Limits | None = None, organization: str | None = None, cpus: int = 0
) -> AsyncGenerator[Desk]:
    async with Store.open(sqlite_url(path / "service.db")) as store:
        yield Desk(store, room=room, limits=limits or Limits(), organization=organization, cpus=cpus)


async def test_a_limit_holds_names_itself_and_lets_others_by(tmp_path: Path) -> None:
    limits = Limits(repositories={"octo-org/*": 2}, labels={"microvm-8gb": 1})
    async with desk(tmp_path, room=8, limits=limits) as at:
        await at.turn(at.queued("octo-org/hello", 4), at.queued("acme/web", 3, ("microvm-8gb",)))
        assert await at.homes() == {"octo-org/hello": 2, "acme/web": 1}
        assert sorted(await at.told()) == [
            'limit: 1 of 1 VMs with the label microvm-8gb are in use ([limits.labels] "microvm-8gb")',
            'limit: 2 of 2 VMs of octo-org/hello are in use ([limits.repositories] "octo-org/*")',
        ]
        # Told once, however many passes find the same.
        assert not (await at.turn()).reasons
        first = (await at.runners())[0]
        ended = await at.end(first)
        await at.turn(ended)
        assert await at.homes() == {"octo-org/hello": 2, "acme/web": 1}
        assert first.id not in {runner.id for runner in await at.runners()}


async def test_the_next_free_vm_is_for_the_repository_that_had_none(tmp_path: Path) -> None:
    async with desk(tmp_path, room=3) as at:
        await at.turn(at.queued("acme/matrix", 200))
        at.now += 60
        await at.turn(at.queued("octo-org/hello"))
        assert await at.homes() == {"acme/matrix": 3}
        assert "capacity: 3 of 3 VMs in use ([runners] max_vms)" in await at.told()
        ended = await at.end((await at.runners())[0])
        await at.turn(ended)
        assert await at.homes() == {"acme/matrix": 2, "octo-org/hello": 1}
        # Who has a runner waits for nothing else any more.
        assert all(job.waits_for is None for job in (await at.jobs()).values() if job.repo == "hello")


async def test_the_oldest_jobs_of_a_repository_come_first_and_each_gets_one_runner(tmp_path: Path) -> None:
    async with desk(tmp_path, room=3) as at:
        events = at.queued("o/r", 9)
        await at.turn(list(reversed(events)))
        await at.turn()
        assert sorted(r.job_id or "" for r in await at.runners()) == [event.job_id for event in events[:3]]


async def test_vcpus_are_counted_with_their_overcommit(tmp_path: Path) -> None:
    async with desk(tmp_path, room=8, cpus=2) as at:
        await at.turn(at.queued("o/r", 5))
        assert len(await at.runners()) == 2
        assert "([limits] cpu_overcommit)" in (await at.told())[0]


async def test_a_full_queue_keeps_the_longest_out_and_loses_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path, room=2, limits=Limits(most_queued=6)) as at:
        await at.turn(at.queued("acme/matrix", 20))
        await at.turn(at.queued("octo-org/hello"))
        jobs = await at.jobs()
        outside = [job for job in jobs.values() if job.group_key is None]
        assert len(outside) == 15 and {job.repo for job in outside} == {"matrix"}
        assert all("([limits] most_queued)" in (job.waits_for or "") for job in outside)
        # The newest stand outside, the oldest come in again.
        assert {job.id for job in outside} == {f"github-{n}" for n in range(6, 21)}
        ran: list[str] = []
        for _ in range(60):
            at.now += 10
            # What is outside comes in when it is looked at, and gets its runner in the pass after that.
            ended = [await at.end(runner) for runner in await at.runners()]
            ran += [event.job_id for some in ended for event in some]
            await at.turn(*ended)
        assert sorted(ran) == sorted(jobs) and len(ran) == 21
        assert ran.index("github-21") <= 4


async def test_a_job_outside_the_queue_may_be_cancelled_or_run_all_the_same(tmp_path: Path) -> None:
    async with desk(tmp_path, room=1, limits=Limits(most_queued=1)) as at:
        one, two, three = at.queued("o/r", 3)
        await at.turn([one, two, three])
        (runner,) = await at.runners()
        # The forge gives the runner to a job that stands outside; another one there is cancelled.
        taken = msgspec.structs.replace(three, state="in_progress", runner_name=runner.id)
        cancelled = msgspec.structs.replace(two, state="completed", conclusion="cancelled")
        await at.turn([taken, cancelled])
        states = {job.id: job.state for job in (await at.jobs()).values()}
        assert states == {one.job_id: "queued", two.job_id: "completed", three.job_id: "in_progress"}
        await at.turn(await at.end((await at.runners())[0]))
        assert [r.job_id for r in await at.runners()] == [one.job_id]


async def test_runners_of_an_organization_count_for_the_repositories_they_were_made_for(
    tmp_path: Path,
) -> None:
    limits = Limits(per_repository=2)
    async with desk(tmp_path, room=8, limits=limits, organization="o") as at:
        await at.turn(at.queued("o/a", 5), at.queued("o/b", 1))
        assert await at.homes() == {"o/a": 2, "o/b": 1}
        # b's job is cancelled: its runner is one that a's jobs may have, so that nobody needs another one.
        job = next(job for job in (await at.jobs()).values() if job.repo == "b")
        cancelled = [
            JobEvent(
                forge="github", forge_job_id=job.forge_job_id, owner="o", repo="b", state="completed",
                labels=job.labels, seen_at=at.now, conclusion="cancelled",
            )
        ]  # fmt: skip
        await at.turn(cancelled)
        assert len(await at.runners()) == 3 and not [r for r in await at.runners() if r.cancelled_at]


async def test_a_brake_holds_its_group_and_no_other(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        events = at.queued("o/a"), at.queued("o/b")
        await at.turn(*events)
        (held,) = [r for r in await at.runners() if r.scope_path == "o/a"]
        await at.end(held, code="register_failed", served=False)
        brake = demand.Brake(at.now + 5, "register_failed: no such permission", 1)
        await at.turn(**{held.group_key: brake})
        assert [r.scope_path for r in await at.runners()] == ["o/b"]
        assert await at.told() == ["register_failed: no such permission; next try in 5 s"]
        at.now += 6
        await at.turn(**{held.group_key: brake})
        assert len(await at.runners()) == 2


async def test_a_job_whose_runners_end_without_one_gets_them_ever_more_slowly(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        phantom = at.queued("o/r")
        await at.turn(phantom)
        made: list[float] = []
        # An hour and a half of runners that end at once, every time.
        for _ in range(5400 // 20):
            for runner in await at.runners():
                made.append(at.now)
                await at.end(runner, code="runner_exited", served=False)
            at.now += 20
            await at.turn()
        assert len([t for t in made if t < NOW + 3600]) <= 14
        assert len(made) <= 24
        assert "runners made for it ended without a job" in (await at.told())[0]
        # A real job of the same group is none the worse for it.
        real = at.queued("o/r")
        await at.turn(real)
        assert real[0].job_id in {r.job_id for r in await at.runners()}


async def test_a_template_that_vanished_is_told_to_all_and_comes_back(tmp_path: Path) -> None:
    async with desk(tmp_path, room=1) as at:
        await at.turn(at.queued("o/r", 3))
        at.templates = []
        await at.turn()
        assert len([told for told in await at.told() if "not there any more" in told]) == 2
        at.templates = [TEMPLATE]
        await at.turn(look_again=True)
        assert {job.group_key is not None for job in (await at.jobs()).values()} == {True}


async def test_a_runner_that_an_older_version_left_waiting_is_made_anew(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.turn(at.queued("o/r"))
        (runner,) = await at.runners()
        await at.store.write(
            lambda db: q.set_runner_facts(db, runner.id, state="wanted", host=None, lease_owner=None)
        )
        await at.turn()
        (anew,) = await at.runners()
        assert anew.id != runner.id and anew.state == "forking" and anew.job_id == runner.job_id


@pytest.mark.parametrize("room", [0, 20])
async def test_the_cost_of_a_pass_grows_no_faster_than_the_queue(tmp_path: Path, room: int) -> None:
    """Counted in steps of the database and calls of the program, which are the same on every machine."""
    costs: list[Counter[str]] = []
    for times in (1, 2, 4):
        async with Store.open(sqlite_url(tmp_path / f"{times}.db")) as store:
            await bench_reconcile.fill(store, 500 * times, 100 * times, 20, NOW)
            decider = bench_reconcile.a_decider(clock=lambda: NOW)
            await bench_reconcile.a_pass(store, decider)
            async with store.writing() as db:
                await q.save_host(db, Host("bench", 100 * times + room, 1 << 30), NOW)
            async with counting(store) as cost:
                decision = await bench_reconcile.a_pass(store, decider)
            assert len(decision.started) == room
            costs.append(cost)
    for less, more in itertools.pairwise(costs):
        for what in ("database steps", "calls"):
            assert more[what] <= 2.2 * less[what], (what, costs)
        # However long the queue is, as many questions are asked.
        assert more["statements"] == less["statements"] <= 12 + 20 * bool(room), costs


@contextlib.asynccontextmanager
async def counting(store: Store) -> AsyncGenerator[Counter[str]]:
    """What the transactions of ``store`` cost within the block."""
    cost: Counter[str] = Counter()

    def stepped() -> int:
        cost["database steps"] += 100
        return 0

    def called(_frame: object, event: str, _argument: object) -> None:
        cost["calls"] += event == "call"

    def executed(*_: object) -> None:
        cost["statements"] += 1

    async def count(each: Callable[[], int] | None) -> None:
        async with store.writing() as db:
            driver = (await db.get_raw_connection()).driver_connection
            assert driver is not None
            await driver.set_progress_handler(each, 100)

    await count(stepped)
    sa.event.listen(store._writer.sync_engine, "after_cursor_execute", executed)
    sys.setprofile(called)
    try:
        yield cost
    finally:
        sys.setprofile(None)
        sa.event.remove(store._writer.sync_engine, "after_cursor_execute", executed)
        await count(None)
