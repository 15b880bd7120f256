"""The audit log in the database: every row as it was written, newest first, on every database."""

import os
import time

import pytest

from runner_service import audit
from runner_service.store.store import Store
from tests.contract.test_store import store  # noqa: F401

pytestmark = pytest.mark.anyio


async def test_actions_are_kept_as_they_were_recorded(store: Store) -> None:  # noqa: F811
    before = time.time()
    await store.write(lambda db: audit.record(db, who="ops", action="vm.kill", target="vm-1"))
    await store.write(
        lambda db: audit.record(
            db, who="ops", action="template.prune", details={"freed_mib": 7}, outcome="not there", at=5.0
        )
    )
    newest, oldest = await store.read(lambda db: audit.entries(db, limit=10))
    assert (newest.action, newest.details, newest.outcome, newest.at) == (
        "template.prune", {"freed_mib": 7}, "not there", 5.0,
    )  # fmt: skip
    assert (oldest.who, oldest.action, oldest.target, oldest.outcome) == ("ops", "vm.kill", "vm-1", "done")
    assert before <= oldest.at <= time.time() and newest.seq > oldest.seq
    assert await store.read(lambda db: audit.entries(db, limit=1)) == [newest]


async def test_what_a_stranger_sent_is_cut(store: Store) -> None:  # noqa: F811
    long = "x" * 100_000
    await store.write(lambda db: audit.record(db, who=long, action="vm.kill", target=long, outcome=long))
    (row,) = await store.read(lambda db: audit.entries(db, limit=10))
    assert len(row.who) == len(row.target) == len(row.outcome) == 500


def test_local_users_are_named() -> None:
    assert audit.local(0) == "local uid 0 (root)"
    assert audit.local(4_000_123) == "local uid 4000123"
    assert audit.local().startswith(f"local uid {os.getuid()}")
