"""Deliveries and steps that share a transaction: each has its own answer, and none is answered before its commit."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection

from github_webhook.errors import ReceiverBusy
from runner_service import inbox
from runner_service.store import group as grouping
from runner_service.store import queries as q
from runner_service.store.group import Group, GroupFullError
from runner_service.store.store import Store, sqlite_url
from tests.unit.runner_service.world import Delivery, Killed

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store.open(sqlite_url(tmp_path / "store.db")) as opened:
        yield opened


class Begun:
    """Transactions of a store, counted; ``fault`` is raised before the commit, once; ``hold`` keeps commits back."""

    def __init__(self, store: Store) -> None:
        self.count = 0
        self.fault: BaseException | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self._store = store

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncGenerator[AsyncConnection]:
        self.count += 1
        async with self._store.writing() as db:
            yield db
            await self.hold.wait()
            fault, self.fault = self.fault, None
            if fault is not None:
                raise fault


def row(guid: str, **more: object) -> dict[str, object]:
    return {
        "id": guid, "forge": "github", "event": "workflow_job", "action": None, "hook_id": None,
        "received_at": 1.0, "payload": b"{}", **more,
    }  # fmt: skip


async def stored(store: Store) -> list[str]:
    return [one.id for one in await store.read(lambda db: q.pending_deliveries(db, 1000))]


async def test_those_that_come_meanwhile_share_a_transaction_and_keep_their_order(store: Store) -> None:
    begun = Begun(store)
    group = Group(begun.writing, q.put_deliveries)
    guids = [f"guid-{number}" for number in range(100)]
    assert await asyncio.gather(*(group.do(row(guid)) for guid in guids)) == ["stored"] * 100
    assert begun.count <= 2
    assert await stored(store) == guids


async def test_nobody_is_answered_before_the_commit(store: Store) -> None:
    begun = Begun(store)
    group = Group(begun.writing, q.put_deliveries)
    begun.hold.clear()
    calls = [asyncio.create_task(group.do(row(f"guid-{number}"))) for number in range(3)]
    await asyncio.sleep(0.05)
    assert not any(call.done() for call in calls)
    assert await stored(store) == []
    begun.hold.set()
    await asyncio.gather(*calls)
    assert len(await stored(store)) == 3


async def test_each_has_its_own_answer(store: Store) -> None:
    group = store.grouped(q.put_deliveries)
    await group.do(row("old"))
    await group.do(row("done"))
    async with store.writing() as db:
        (_, done) = await q.pending_deliveries(db, 10)
        await q.close_deliveries(db, {done.seq: "job"}, 2.0)
    calls = (group.do(row(guid)) for guid in ("new", "old", "done", "new"))
    assert await asyncio.gather(*calls) == ["stored", "known", "done", "known"]


async def test_one_that_fails_fails_alone(store: Store) -> None:
    group = store.grouped(q.put_deliveries)
    rows = [row("a"), row("bad", event=None), row("b")]
    answers = await asyncio.gather(*(group.do(one) for one in rows), return_exceptions=True)
    assert answers[0] == answers[2] == "stored"
    assert isinstance(answers[1], IntegrityError)
    assert await stored(store) == ["a", "b"]


async def test_a_database_that_cannot_be_used_is_told_to_all_and_the_next_ones_are_served(
    store: Store,
) -> None:
    begun = Begun(store)
    group = Group(begun.writing, q.put_deliveries)
    begun.fault = OperationalError("COMMIT", {}, sqlite3.OperationalError("database or disk is full"))
    calls = [group.do(row(f"guid-{number}")) for number in range(5)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [OperationalError] * 5
    assert begun.count == 1
    assert await group.do(row("next")) == "stored"
    assert await stored(store) == ["next"]


async def test_killed_before_the_commit_nothing_is_stored_and_nobody_is_answered(store: Store) -> None:
    begun = Begun(store)
    group = Group(begun.writing, q.put_deliveries)
    begun.fault = Killed()
    calls = [asyncio.create_task(group.do(row(f"guid-{number}"))) for number in range(3)]
    await asyncio.wait(calls, timeout=5)
    assert [type(call.exception()) for call in calls] == [Killed] * 3
    assert await stored(store) == []
    with contextlib.suppress(Killed):
        await group.settle()


async def test_what_is_asked_for_is_done_though_the_caller_leaves(store: Store) -> None:
    begun = Begun(store)
    group = Group(begun.writing, q.put_deliveries)
    begun.hold.clear()
    calls = [asyncio.create_task(group.do(row(f"guid-{number}"))) for number in range(3)]
    await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    begun.hold.set()
    await group.settle()
    assert len(await stored(store)) == 3


async def test_only_so_many_may_wait(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "MOST_WAITING", 3)
    group = store.grouped(q.put_deliveries)
    answers = await asyncio.gather(
        *(group.do(row(f"guid-{number}")) for number in range(5)), return_exceptions=True
    )
    assert answers[:3] == ["stored"] * 3
    assert [type(answer) for answer in answers[3:]] == [GroupFullError] * 2


async def test_grouped_reads_see_what_was_committed_before_they_were_asked(store: Store) -> None:
    reads = 0

    async def known(db: AsyncConnection, guids: Sequence[str]) -> list[bool]:
        nonlocal reads
        reads += 1
        found = {one.id for one in await q.pending_deliveries(db, 1000)}
        return [guid in found for guid in guids]

    writes, group = store.grouped(q.put_deliveries), store.grouped_reads(known)
    assert await asyncio.gather(*(group.do(f"guid-{number}") for number in range(20))) == [False] * 20
    assert reads == 1
    for number in range(20):
        await writes.do(row(f"guid-{number}"))
        assert await group.do(f"guid-{number}")


async def test_the_inbox_refuses_what_it_cannot_hold(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "MOST_WAITING", 3)
    woken: list[None] = []
    box = inbox.StoreInbox(store, "github", lambda: woken.append(None))
    answers = await asyncio.gather(
        *(box.store(Delivery(f"guid-{number}", b"{}", 1.0)) for number in range(5)), return_exceptions=True
    )
    assert answers[:3] == ["stored"] * 3
    assert [type(answer) for answer in answers[3:]] == [ReceiverBusy] * 2
    assert await box.store(Delivery("guid-9", b"{}", 1.0)) == "stored"
    assert len(woken) == 4


async def test_a_lock_held_by_another_process_does_not_hold_up_the_loop(store: Store, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "store.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        call = asyncio.create_task(store.grouped(q.put_deliveries).do(row("a")))
        longest = 0.0
        for _ in range(30):
            at = time.perf_counter()
            await asyncio.sleep(0.01)
            longest = max(longest, time.perf_counter() - at)
        assert not call.done()
        assert longest < 3.0  # not the ten seconds for which the lock is waited for
        other.execute("ROLLBACK")
    assert await asyncio.wait_for(call, 5) == "stored"


async def test_a_commit_is_synced_to_the_disk(store: Store) -> None:
    async with store.writing() as db:
        assert (await db.exec_driver_sql("PRAGMA synchronous")).scalar() == 2  # FULL
        assert (await db.exec_driver_sql("PRAGMA journal_mode")).scalar() == "wal"
