"""Failures of infrastructure and frozen VMs in the database: what is noted once, found, changed and forgotten."""

import pytest

from runner_service.infrastructure import GUEST_OOM
from runner_service.store import frozen_queries as fq
from runner_service.store import infra_queries as iq
from runner_service.store import queries as q
from runner_service.store.frozen_queries import KeptVm
from runner_service.store.infra_queries import InfraFailure
from runner_service.store.store import Store
from tests.contract.test_store import job, runner, store  # noqa: F401

pytestmark = pytest.mark.anyio


def failure(number: int, **more: object) -> InfraFailure:
    values: dict[str, object] = {
        "job_id": f"github-{number}", "runner_id": f"r{number}", "at": 1.0, "code": "infra_vm_lost", "reason": "lost",
        "rerun": "wanted", "next_at": 5.0, "deadline": 99.0,
    }  # fmt: skip
    return InfraFailure(**(values | more))  # pyright: ignore


async def found(store: Store, since: float) -> list[tuple[str, str]]:  # noqa: F811
    pairs = await store.read(lambda db: iq.unnoticed(db, since, 10))
    return sorted((one.id, lost.id) for one, lost in pairs)


async def test_what_is_not_noted_yet_is_found_however_it_is_known(store: Store) -> None:  # noqa: F811
    jobs = [job(number, state="in_progress", updated_at=10.0) for number in range(1, 8)]
    jobs[1] = job(2, state="completed", conclusion="success", updated_at=10.0)
    jobs[5] = job(6, state="completed", conclusion="failure", updated_at=100.0, runner_id="r6")
    runners = [
        runner(1, state="retiring", serving_job_id="github-1", infra="infra_vm_lost"),
        runner(2, state="retiring", serving_job_id="github-2", infra="infra_vm_lost"),
        runner(3, state="gone", ended_at=50.0, serving_job_id="github-3", infra="infra_disk_full"),
        runner(4, state="gone", ended_at=50.0, serving_job_id="github-4"),
        # In the guest something ran out of memory: only if the job failed was it that.
        runner(5, state="gone", ended_at=50.0, serving_job_id="github-5", infra=GUEST_OOM),
        # The event that names it came when it was gone for long.
        runner(6, state="gone", ended_at=1.0, infra="infra_vmm_killed"),
        runner(7, state="idle", infra=None, serving_job_id="github-7"),
    ]
    async with store.writing() as db:
        await q.save_jobs(db, jobs)
        await q.add_runners(db, runners)
    assert await found(store, 0.0) == [("github-1", "r1"), ("github-3", "r3"), ("github-6", "r6")]
    assert await found(store, 60.0) == [("github-1", "r1"), ("github-6", "r6")]
    async with store.writing() as db:
        assert await iq.note(db, failure(1))
        assert not await iq.note(db, failure(1, code="infra_other"))
    assert await found(store, 60.0) == [("github-6", "r6")]
    assert (await store.read(lambda db: iq.failures_of(db, ["github-1", "x"])))["github-1"] == failure(1)


async def test_a_rerun_is_due_changed_by_one_and_known_to_its_followers(store: Store) -> None:  # noqa: F811
    same = {"name": "test", "run_id": "9", "updated_at": 20.0}
    async with store.writing() as db:
        await q.save_jobs(
            db, [job(1, **same), job(2, run_attempt=2, **same), job(3, name="other", run_id="9")]
        )
        await iq.note(db, failure(1))
    assert await store.read(lambda db: iq.due_reruns(db, 4.0, 10)) == []
    ((due, died),) = await store.read(lambda db: iq.due_reruns(db, 5.0, 10))
    assert (due, died.id) == (failure(1), "github-1")
    async with store.writing() as db:
        mine = await iq.change(db, due, {"tries": 1, "next_at": 50.0})
        assert mine is not None and mine.tries == 1
        assert await iq.change(db, due, {"tries": 1}) is None, "somebody was quicker"
    assert [one.id for one in await store.read(lambda db: iq.attempts_of(db, died))] == [
        "github-1",
        "github-2",
    ]
    async with store.reading() as db:
        assert await iq.was_rerun(db, job(2, run_attempt=2, **same)) == "github-1"
        assert await iq.was_rerun(db, job(3, name="other", run_id="9")) is None
        assert await iq.was_rerun(db, died) is None
    async with store.writing() as db:
        await iq.change(db, mine, {"rerun": "needless"})
        assert await iq.was_rerun(db, job(2, run_attempt=2, **same)) is None
        await q.forget(db, 2.0)
        assert await iq.failures_of(db, ["github-1"]) == {}


def kept(number: int, **more: object) -> KeptVm:
    values: dict[str, object] = {
        "id": f"vm-{number}", "host": "h", "job_id": f"github-{number}", "runner_id": "r", "repository": "o/r",
        "owner": "o", "folder": "/w", "state": "freezing", "created_at": float(number), "expires_at": 100.0,
    }  # fmt: skip
    return KeptVm(**(values | more))  # pyright: ignore


async def test_a_kept_vm_goes_from_state_to_state_and_is_forgotten_when_removed(store: Store) -> None:  # noqa: F811
    async with store.writing() as db:
        for one in (kept(1), kept(2), kept(3, host="other")):
            await fq.begin(db, one)
        await fq.begin(db, kept(2, expires_at=200.0))
        frozen = await fq.change(db, "vm-2", ("freezing",), state="frozen", digest="d", bytes=5 << 32)
        assert frozen == kept(2, expires_at=200.0, state="frozen", digest="d", bytes=5 << 32)
        assert await fq.change(db, "vm-2", ("freezing",), state="removed") is None
    async with store.reading() as db:
        assert [one.id for one in await fq.kept_on(db, "h")] == ["vm-1", "vm-2"]
        assert [one.id for one in await fq.list_kept(db, 2)] == ["vm-3", "vm-2"]
        assert await fq.find(db, "github-2") == frozen == await fq.find(db, "vm-2")
        assert await fq.find(db, "vm-9") is None
    async with store.writing() as db:
        await fq.change(db, "vm-2", ("frozen",), state="removed", removed_at=7.0, why="its time had passed")
        assert [one.id for one in await fq.kept_on(db, "h")] == ["vm-1"]
        gone = await fq.find(db, "github-2")
        assert gone is not None and gone.why == "its time had passed"
        await q.forget(db, 8.0)
        assert await fq.find(db, "vm-2") is None
        assert await fq.find(db, "vm-1") is not None, "what is there is never forgotten"
