"""What every database must do for the store. SQLite here; ``MICROVM_TEST_DATABASE_URL`` adds another one.

The named queries are the only way to the database, so what holds here holds for the service.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from runner_service.domain import Bake, BakeStep, Ending, Host, Job, Push, Repository, Runner, TimelineRow
from runner_service.store import bake_queries as bq
from runner_service.store import job_search
from runner_service.store import queries as q
from runner_service.store import queue_queries as qq
from runner_service.store.schema import HEAD, metadata
from runner_service.store.store import Store, StoreError, sqlite_url
from vmm_core.machine import VmEvent, VmExit, VmUsage

pytestmark = pytest.mark.anyio

URLS = ["sqlite", *filter(None, [os.environ.get("MICROVM_TEST_DATABASE_URL")])]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=URLS)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    url = sqlite_url(tmp_path / "store.db") if request.param == "sqlite" else request.param
    async with Store.open(url) as opened:
        if request.param != "sqlite":
            async with opened.writing() as db:
                for table in metadata.sorted_tables:
                    if table.name != "locks":
                        await db.execute(sa.delete(table))
        yield opened


def job(number: int, **more: object) -> Job:
    values: dict[str, object] = {
        "id": f"github-{number}", "forge": "github", "forge_job_id": str(number), "owner": "o", "repo": "r",
        "scope_kind": "repository", "scope_path": "o/r", "labels": ("microvm",), "state": "queued", "event_at": float(number),  # noqa: E501
        "updated_at": float(number), "group_key": "g",
    }  # fmt: skip
    return Job(**(values | more))  # pyright: ignore


def runner(number: int, **more: object) -> Runner:
    values: dict[str, object] = {
        "id": f"r{number}", "forge": "github", "scope_kind": "repository", "scope_path": "o/r", "labels": ("microvm", "linux"),  # noqa: E501
        "group_key": "g", "template": "t", "memory_mib": 512, "state": "forking", "state_at": 1.0, "deadline": 2.0,
        "created_at": float(number), "event_at": 1.5, "host": "h", "lease_owner": "h", "lease_until": 10.0,
    }  # fmt: skip
    return Runner(**(values | more))  # pyright: ignore


def delivery(guid: str) -> dict[str, object]:
    return {
        "id": guid,
        "forge": "github",
        "event": "workflow_job",
        "action": "queued",
        "hook_id": "1",
        "received_at": 1.25,
        "payload": b"{}",
    }


async def test_a_delivery_is_stored_once_and_known_until_it_is_processed(store: Store) -> None:
    async with store.writing() as db:
        assert await q.put_deliveries(db, [delivery("a")]) == ["stored"]
        assert await q.put_deliveries(db, [delivery("b")]) == ["stored"]
    async with store.writing() as db:
        assert await q.put_deliveries(db, [delivery("a")]) == ["known"]
        rows = await q.pending_deliveries(db, 10)
        assert [row.id for row in rows] == ["a", "b"] and rows[0].payload == b"{}"
        await q.close_deliveries(db, {rows[0].seq: "job"}, 2.0)
    async with store.writing() as db:
        assert await q.put_deliveries(db, [delivery("a")]) == ["done"]
        assert [row.id for row in await q.pending_deliveries(db, 10)] == ["b"]


async def test_jobs_come_back_as_they_were_saved(store: Store) -> None:
    first = job(1, conclusion="success", created_at=0.5, runner_name="r1", labels=("microvm", "ünïcode"))
    async with store.writing() as db:
        await q.save_jobs(db, [first, job(2)])
        await q.save_jobs(db, [job(2, state="completed")])
    async with store.reading() as db:
        found = await q.jobs_by_id(db, ["github-1", "github-2", "github-3"])
        assert found["github-1"] == first and found["github-2"].state == "completed"
        assert await job_search.find(db, "1") == await job_search.find(db, "github-1") == first
        assert await job_search.find(db, "3") is None
        assert [one.id for one in await q.list_jobs(db, limit=1)] == ["github-2"]
        assert [one.id for one in await q.list_jobs(db, limit=9, state="queued")] == ["github-1"]


async def test_demand_is_counted_per_group_without_what_no_template_serves(store: Store) -> None:
    async with store.writing() as db:
        await q.save_jobs(
            db,
            [
                job(1), job(2), job(3, group_key="h"), job(4, group_key=None), job(5, state="waiting"),
                job(6, repo="s"), job(7, group_key=None, template="t"),
            ],
        )  # fmt: skip
        await q.add_runners(db, [runner(1, job_id="github-1")])
    async with store.reading() as db:
        rows = sorted(await qq.waiting(db), key=lambda row: (row.group, row.repo))
        assert rows == [
            qq.Waiting("g", "o", "r", 2, 1.0), qq.Waiting("g", "o", "s", 1, 6.0), qq.Waiting("h", "o", "r", 1, 3.0),
        ]  # fmt: skip
        # Those that wait for a runner: the first job has one.
        assert [one.id for one in await qq.oldest_jobs(db, rows[0], 5)] == ["github-2"]
        assert [one.id for one in await qq.newest_jobs(db, "o", "r", {"g", "h"}, 2)] == [
            "github-3",
            "github-2",
        ]
        assert {one.id for one in await qq.heads(db, 9)} == {"github-2", "github-3", "github-6"}
        assert {one.id for one in await qq.heads(db, 2)} == {"github-2", "github-3"}
        assert [one.id for one in await qq.held_jobs(db, 9)] == ["github-7"]
        assert await qq.repositories_of(db, ["github-6", "github-9"]) == {"github-6": "o/s"}
        assert [one.id for one in await q.unserved_jobs(db, 10)] == ["github-4"]


async def test_runners_that_ended_without_a_job_are_counted_by_the_job_they_were_made_for(
    store: Store,
) -> None:
    def ended(number: int, job_id: str, **more: object) -> Runner:
        values = {"state": "gone", "code": "runner_exited", "ended_at": float(number), "job_id": job_id}
        return runner(number, **(values | more))

    rows = [ended(n, "github-1", code="late_idle" if n % 2 else "runner_exited") for n in range(1, 7)]
    rows += [ended(n, "github-2") for n in (10, 11)]
    rows += [ended(n, "github-2", **more) for n, more in enumerate(
        ({"serving_job_id": "github-9"}, {"code": "cancelled"}, {"state": "retiring"}), 20
    )]  # fmt: skip
    async with store.writing() as db:
        await q.save_jobs(db, [job(1), job(2), job(3, state="completed")])
        await q.add_runners(db, [*rows, *(ended(n, "github-3") for n in range(30, 40))])
    async with store.reading() as db:
        found = await qq.fruitless_jobs(db, since=2.0, least=3, limit=9)
    assert found == [qq.Fruitless("github-1", "g", "o", "r", 5, 6.0)]


async def test_a_step_is_persisted_only_from_the_state_it_began_in_and_by_who_holds_the_lease(
    store: Store,
) -> None:
    async with store.writing() as db:
        await q.add_runners(db, [runner(1)])
        await q.set_runner_facts(db, "r1", serving_job_id="github-1")
    async with store.writing() as db:
        line = TimelineRow(at=1.0, job_id="github-1", runner_id="r1", step="registering")

        def step(was: str, owner: str) -> q.Step:
            values = {"state": "registering"}
            return q.Step(runner_id="r1", was=was, owner=owner, values=values, lines=[line])

        wrong = [step("idle", "h"), step("forking", "other")]
        assert await q.step_runners(db, wrong) == [None, None]
        assert await q.timeline_of_job(db, "github-1") == []
        first, again = await q.step_runners(db, [step("forking", "h"), step("forking", "h")])
    assert first is not None and first.state == "registering" and first.serving_job_id == "github-1"
    assert first.labels == ("microvm", "linux") and again is None
    async with store.reading() as db:
        assert await q.runner(db, "r1") == first
        assert await q.timeline_of_job(db, "github-1") == [line]


async def test_leases_are_renewed_and_those_that_ran_out_here_are_taken_over(store: Store) -> None:
    async with store.writing() as db:
        rows = [
            runner(1), runner(2, lease_owner="x", lease_until=10.0), runner(3, lease_owner="x", lease_until=90.0),
            runner(4, host="other", lease_owner="other", lease_until=1.0), runner(5, state="gone"),
            runner(6, state="wanted", host=None, lease_owner=None, lease_until=None),
        ]  # fmt: skip
        await q.add_runners(db, rows)
        held = await q.renew_leases(db, "h", 50.0, 80.0)
    assert sorted(one.id for one in held) == ["r1", "r2"]
    assert {one.lease_until for one in held} == {80.0} and {one.lease_owner for one in held} == {"h"}


async def test_facts_are_not_written_on_what_is_gone(store: Store) -> None:
    async with store.writing() as db:
        await q.add_runners(db, [runner(1, state="gone", vm_id="v1"), runner(2, vm_id="v2")])
        await q.set_runner_facts(db, "r1", cancelled_at=1.0)
        assert await q.kill_runner_of_vm(db, "v1", 5.0) is None
        assert await q.kill_runner_of_vm(db, "v2", 5.0) == "r2"
    async with store.reading() as db:
        one, two = await q.runner(db, "r1"), await q.runner(db, "r2")
        assert one is not None and one.cancelled_at is None and two is not None and two.killed_at == 5.0
        assert [r.id for r in await q.active_runners(db)] == ["r2"]
        assert await q.runner_counts(db) == {"forking": 1}


async def test_runners_of_jobs_are_those_made_for_them_and_those_that_served_them(store: Store) -> None:
    async with store.writing() as db:
        await q.add_runners(
            db, [runner(1, job_id="a"), runner(2, job_id="b", serving_job_id="a"), runner(3, job_id="c")]
        )
    async with store.reading() as db:
        assert [r.id for r in await q.runners_of_job(db, "a")] == ["r2", "r1"]
        found = await q.runners_of_jobs(db, ["a", "b"])
    assert {key: [r.id for r in rows] for key, rows in found.items()} == {"a": ["r2", "r1"], "b": ["r2"]}


async def test_the_timeline_keeps_its_order(store: Store) -> None:
    rows = [
        TimelineRow(at=at, job_id="a", runner_id=None, step=step, ms=1.0)
        for at, step in ((2.0, "y"), (1.0, "x"), (2.0, "z"))
    ]
    async with store.writing() as db:
        await q.add_timeline(db, rows)
    async with store.reading() as db:
        assert [row.step for row in await q.timeline_of_job(db, "a")] == ["x", "y", "z"]


async def test_a_host_is_saved_again_and_forgotten_when_silent(store: Store) -> None:
    async with store.writing() as db:
        await q.save_host(db, Host("h", 4, 1024), 100.0)
        await q.save_host(db, Host("h", 8, 2048, draining=True), 200.0)
    async with store.reading() as db:
        assert await q.live_hosts(db, 150.0) == [Host("h", 8, 2048, draining=True)]
        assert await q.live_hosts(db, 250.0) == []


async def test_only_what_is_over_is_forgotten(store: Store) -> None:
    async with store.writing() as db:
        await q.save_jobs(db, [job(1, state="completed"), job(2), job(3, state="completed", updated_at=99.0)])
        await q.add_runners(
            db, [runner(1, state="gone", ended_at=1.0), runner(2), runner(3, state="gone", ended_at=99.0)]
        )
        await q.put_deliveries(db, [delivery("a")])
        await q.forget(db, 50.0)
    async with store.reading() as db:
        assert sorted(one.id for one in await q.list_jobs(db, limit=9)) == ["github-2", "github-3"]
        assert await q.runner(db, "r1") is None and await q.runner(db, "r3") is not None
        assert len(await q.pending_deliveries(db, 9)) == 1


async def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError):
        async with store.writing() as db:
            await q.save_jobs(db, [job(1)])
            raise RuntimeError
    await store.warm_up()
    async with store.reading() as db:
        assert await q.list_jobs(db, limit=9) == [] and await q.active_runners(db) == []


async def test_work_whose_caller_is_cancelled_is_finished_and_costs_no_connection(store: Store) -> None:
    for number in range(60):
        calls = [
            asyncio.create_task(
                store.write(lambda db, n=number * 3 + i: q.put_deliveries(db, [delivery(f"guid-{n}")]))
            )
            for i in range(3)
        ]
        await asyncio.sleep(0.0002 * (number % 12))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    await store.settle()
    async with asyncio.timeout(1):
        await store.write(lambda db: q.put_deliveries(db, [delivery("last")]))
        assert len(await store.read(lambda db: q.pending_deliveries(db, 1000))) > 1


async def test_a_reader_sees_one_moment_whatever_is_written_meanwhile(store: Store) -> None:
    async with store.reading() as db:
        assert await q.list_jobs(db, limit=5) == []
        await store.write(lambda writer: q.save_jobs(writer, [job(1)]))
        assert await q.list_jobs(db, limit=5) == []
    async with store.reading() as db:
        assert len(await q.list_jobs(db, limit=5)) == 1


async def test_deciders_take_turns(store: Store) -> None:
    order: list[str] = []

    async def decide(name: str) -> None:
        async with store.writing() as db:
            await q.lock_scheduler(db, name, 1.0)
            order.append(f"{name} in")
            await asyncio.sleep(0.01)
            order.append(f"{name} out")

    await asyncio.gather(*(decide(str(number)) for number in range(4)))
    assert all(order[i].split()[0] == order[i + 1].split()[0] for i in range(0, 8, 2))


async def test_the_migrations_make_the_tables_of_the_schema(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with store.writing() as db:
        assert await db.run_sync(differences) == []
        assert await db.run_sync(lambda c: MigrationContext.configure(c).get_current_revision()) == HEAD


def first_version(path: Path, row: Runner) -> None:
    """A database as the first version made and filled it: by its own migration, with the columns it had."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    migrations = resources.files("runner_service.store") / "migrations"
    config.set_main_option("script_location", str(migrations))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    with engine.begin() as connection:
        table = sa.Table("runners", sa.MetaData(), autoload_with=connection)
        values = msgspec.structs.asdict(row)
        connection.execute(sa.insert(table), {column.name: values[column.name] for column in table.columns})
    engine.dispose()


async def test_a_database_of_the_first_version_keeps_its_rows(tmp_path: Path) -> None:
    first_version(tmp_path / "old.db", runner(1))
    url = sqlite_url(tmp_path / "old.db")
    async with Store.open(url) as opened:
        assert await opened.read(q.active_runners) == [runner(1)]
        assert await opened.read(lambda db: q.endings_of(db, ["r1"])) == {}


async def test_what_a_vm_cost_and_how_it_ended_comes_back_as_it_was(store: Store) -> None:
    usage = VmUsage(cpu_seconds=1.25, peak_bytes=1 << 40)
    ended = VmExit(kind="signaled", signal=9, cause="vmm_killed", events=(VmEvent(1.0, "STOP"),), usage=usage)
    async with store.writing() as db:
        await q.add_runners(db, [runner(1), runner(2)])
        step = q.Step(runner_id="r1", was="forking", owner="h", values={"usage": usage})
        (stepped,) = await q.step_runners(db, [step])
        assert stepped is not None
        assert stepped.usage == usage
        for at in (5.0, 6.0):
            await q.keep_endings(db, [Ending("r1", at, ended)])
    async with store.reading() as db:
        assert [one.usage for one in await q.active_runners(db)] == [usage, None]
        assert await q.endings_of(db, ["r1", "r2"]) == {"r1": Ending("r1", 6.0, ended)}
    async with store.writing() as db:
        await q.forget(db, 6.5)
        assert await q.endings_of(db, ["r1"]) == {}


async def test_several_processes_may_migrate_at_once(tmp_path: Path) -> None:
    async def start() -> None:
        async with Store.open(sqlite_url(tmp_path / "one.db")) as opened, opened.reading() as db:
            await q.runner_counts(db)

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, start()) for _ in range(4)))


async def test_reading_neither_makes_nor_changes_a_database(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no database"):
        async with Store.open(sqlite_url(tmp_path / "none.db"), read_only=True):
            pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "other.db").touch()
    with pytest.raises(StoreError, match="version none"):
        async with Store.open(sqlite_url(tmp_path / "other.db"), read_only=True):
            pass


async def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "new.db")
    async with Store.open(url) as opened, opened.writing() as db:
        await db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="newer"):
        async with Store.open(url):
            pass


async def test_a_file_that_is_no_database_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreError, match=r"x\.db"):
        async with Store.open(sqlite_url(tmp_path / "x.db")):
            pass


def bake(**more: object) -> Bake:
    values: dict[str, object] = {
        "id": 0, "host": "h", "forge": "github", "repository": "o/r", "branch": "main", "commit": "c1", "key": "k1",
        "base": "t", "base_digest": "b", "state": "queued", "why": "w", "created_at": 1.0, "due_at": 1.0,
    }  # fmt: skip
    return Bake(**(values | more))  # pyright: ignore


async def test_one_bake_a_key_is_under_way_whoever_asks_for_it(store: Store) -> None:
    first, *rest = await asyncio.gather(
        *(store.write(lambda db, n=n: bq.queue_bake(db, bake(commit=f"c{n}"))) for n in range(8))
    )
    made = [one for one in (first, *rest) if one is not None]
    assert len(made) == 1 and made[0].id > 0
    (row,) = await store.read(lambda db: bq.list_bakes(db, limit=9))
    assert row.commit in {f"c{n}" for n in range(8)}
    # Baking, it is under way too; on another host, of another key, or once it is over, it is not.
    await store.write(lambda db: bq.step_bake(db, row.id, was="queued", values={"state": "baking"}))
    assert await store.write(lambda db: bq.queue_bake(db, bake(branch="dev"))) is None
    assert await store.write(lambda db: bq.queue_bake(db, bake(host="other"))) is not None
    await store.write(
        lambda db: bq.step_bake(db, row.id, was="baking", values={"state": "failed", "ended_at": 3.0})
    )
    assert await store.write(lambda db: bq.queue_bake(db, bake())) is not None


async def test_a_queued_bake_gets_the_newer_commit_and_another_key_takes_its_place(store: Store) -> None:
    async with store.writing() as db:
        old = await bq.queue_bake(db, bake())
        assert await bq.queue_bake(db, bake(commit="c2")) is None
        elsewhere = await bq.queue_bake(db, bake(branch="dev", key="k0"))
        new = await bq.queue_bake(db, bake(commit="c3", key="k2"))
        assert old is not None and new is not None and elsewhere is not None
        rows = {one.id: one for one in await bq.list_bakes(db, limit=9)}
        assert (rows[old.id].state, rows[old.id].commit) == ("superseded", "c2")
        assert rows[new.id].state == rows[elsewhere.id].state == "queued"
        assert [one.id for one in await bq.due_bakes(db, "h", 1.0, 9)] == [elsewhere.id, new.id]
        assert await bq.due_bakes(db, "h", 0.5, 9) == [] and await bq.next_due(db, "h") == 1.0
        assert await bq.next_due(db, "other") is None


async def test_a_bake_that_waits_for_another_try_gives_way_to_a_newer_one_of_its_branch(store: Store) -> None:
    async with store.writing() as db:
        old = await bq.queue_bake(db, bake())
        assert old is not None
        await bq.step_bake(db, old.id, was="queued", values={"state": "baking"})
        new = await bq.queue_bake(db, bake(key="k2"))
        await bq.step_bake(db, old.id, was="baking", values={"state": "queued", "attempts": 1})
        await bq.supersede(db, "h", 5.0)
        assert new is not None
        assert {one.id: one.state for one in await bq.list_bakes(db, limit=9)} == {
            old.id: "superseded",
            new.id: "queued",
        }
        assert [one.id for one in await bq.last_bakes(db, "h", "github", "o/r")] == [new.id]


async def test_a_bake_comes_back_as_it_was_saved(store: Store) -> None:
    steps = (BakeStep("fetch", 0.5),)
    async with store.writing() as db:
        made = await bq.queue_bake(db, bake(force=True))
        assert made is not None
        values = {
            "state": "failed", "pid": 1 << 21, "start_ticks": 1 << 40, "steps": steps, "output": ("ünïcode", "b"),
            "code": "bake_failed", "step": "install", "cache_hit": False, "ended_at": 9.0,
        }  # fmt: skip
        assert await bq.step_bake(db, made.id, was="baking", values=values) is None
        stepped = await bq.step_bake(db, made.id, was="queued", values=values)
        assert (
            stepped is not None
            and stepped.steps == steps
            and stepped.output == ("ünïcode", "b")
            and stepped.force
        )
        assert await bq.bake(db, made.id) == stepped and await bq.bake(db, made.id + 1) is None
        assert await bq.list_bakes(db, limit=9, repository="o/r") == [stepped]
        assert await bq.list_bakes(db, limit=9, repository="o/x") == [] and await bq.bake_counts(db) == {}
        await q.forget(db, 10.0)
        assert await bq.list_bakes(db, limit=9) == []


async def test_what_is_known_of_a_repository_is_only_added_to(store: Store) -> None:
    first = Repository(
        forge="github", name="o/r", owner="O", repo="R", seen_at=1.0, default_branch="main", moved_at=1.0
    )
    async with store.writing() as db:
        await bq.save_repository(db, first)
        await bq.set_trouble(db, "github", "o/r", "denied")
        await bq.save_repository(
            db, Repository(forge="github", name="o/r", owner="O", repo="R2", seen_at=2.0, used_at=2.0)
        )
        found = await bq.repository(db, "github", "o/r")
        assert found == Repository(
            forge="github", name="o/r", owner="O", repo="R2", seen_at=2.0, default_branch="main", moved_at=1.0,
            used_at=2.0, trouble="denied",
        )  # fmt: skip
        assert (
            await bq.list_repositories(db, 9) == [found] and await bq.repository(db, "github", "o/x") is None
        )
        await bq.set_trouble(db, "github", "o/r", None)
        await q.forget(db, 2.5)
        assert await bq.list_repositories(db, 9) == []


async def test_heads_and_keys_of_commits_are_kept_until_they_are_old(store: Store) -> None:
    push = Push(forge="github", owner="O", repo="R", branch="main", commit="c1", seen_at=5.0)
    async with store.writing() as db:
        await bq.save_head(db, push)
        await bq.save_head(db, push)
        await bq.save_keys(db, "github", "o/r", "c1", {"b1": "k1", "b2": "k2"}, 5.0)
        await bq.save_keys(db, "github", "o/r", "c1", {"b1": "k3"}, 6.0)
        assert await bq.is_head(db, "github", "o/r", "c1", "main")
        assert not await bq.is_head(db, "github", "o/r", "c1", "dev")
        assert await bq.keys_of(db, "github", "o/r", "c1") == {"b1": "k3", "b2": "k2"}
        await q.forget(db, 5.5)
        assert await bq.keys_of(db, "github", "o/r", "c1") == {"b1": "k3"}
        assert not await bq.is_head(db, "github", "o/r", "c1", "main")
