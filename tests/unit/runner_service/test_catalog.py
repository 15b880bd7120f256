"""The host's catalog as decisions see it: templates for labels, parents for their repository, memory as learned."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from runner_service.catalog import EngineCatalog
from tests.unit.images.catalog_world import digest_of, open_catalog, parent, template
from vmm_core.working_set import READINGS_NEEDED, WorkingSets

pytestmark = pytest.mark.anyio
MAIN = "octo-org/hello@main"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def learn(sets: WorkingSets, name: str, mib: int) -> None:
    for _ in range(READINGS_NEEDED):
        sets.learn(name, mib << 20)


def test_a_repositorys_parent_is_no_template_that_a_label_could_name(tmp_path: Path) -> None:
    images = open_catalog(tmp_path)
    template(images, "t")
    images.promote("python-ci", digest_of("t"), "")
    sets = WorkingSets(tmp_path)
    engine = SimpleNamespace(
        snapshots=images.store, pool=images.store._pool, ledger=SimpleNamespace(working_sets=sets)
    )
    catalog = EngineCatalog(engine)  # pyright: ignore
    assert [t.name for t in catalog.templates()] == ["python-ci"] and catalog.parents() == []
    for word in "ab":
        parent(images, word, owner="octo-org")
        images.promote(MAIN, digest_of(word), "baked")
    assert [t.name for t in catalog.templates()] == ["python-ci"]
    (found,) = catalog.parents()
    assert (found.name, found.digest, found.key, found.base) == (MAIN, digest_of("b"), "key-b", "python-ci")
    assert (found.repository, found.owner, found.branch) == ("octo-org/hello", "octo-org", "main")
    assert catalog.has(digest_of("a")) and not catalog.has("f" * 64)
    images.rollback(MAIN)
    assert catalog.withdrawn(MAIN) == {digest_of("b")} and catalog.parents()[0].digest == digest_of("a")


def test_a_parents_forks_need_what_was_learned_of_them_else_of_their_base(tmp_path: Path) -> None:
    images = open_catalog(tmp_path)
    parent(images, "a", owner="octo-org", machine=_machine(1024))
    images.promote(MAIN, digest_of("a"), "baked")
    sets = WorkingSets(tmp_path)
    engine = SimpleNamespace(
        snapshots=images.store, pool=images.store._pool, ledger=SimpleNamespace(working_sets=sets)
    )
    catalog = EngineCatalog(engine)  # pyright: ignore

    def need() -> int:
        return catalog.parents()[0].machine.need_mib

    assert need() == 1024
    learn(sets, "python-ci", 100)
    of_base = need()
    assert of_base < 200
    learn(sets, "octo-org/hello", 400)
    assert of_base < 400 < need() < 1024


async def test_pruning_keeps_so_many_versions_and_its_failure_is_no_ones_end(tmp_path: Path) -> None:
    images = open_catalog(tmp_path)
    for word in "abc":
        parent(images, word, owner="octo-org")
        images.promote(MAIN, digest_of(word), "baked")
    for word in "abc":
        _idle(images.store.load(digest_of(word)).path)
    engine = SimpleNamespace(
        snapshots=images.store,
        pool=images.store._pool,
        ledger=SimpleNamespace(working_sets=WorkingSets(tmp_path)),
    )
    catalog = EngineCatalog(engine)  # pyright: ignore
    await catalog.prune(budget_bytes=None, keep=0)  # refused, and told in the log
    assert len(images.store.list()) == 3
    await catalog.prune(budget_bytes=None, keep=2)
    assert {one.digest for one in images.store.list()} == {digest_of("b"), digest_of("c")}


def _machine(mib: int):
    from vmm_core.machine import MachineSpec

    return MachineSpec(memory_mib=mib)


def _idle(path: Path) -> None:
    import os
    import time

    os.utime(path, (time.time() - 3600,) * 2)
