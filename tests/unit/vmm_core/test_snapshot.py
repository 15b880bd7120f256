"""Snapshots on disk: whole or not there, what was written or refused, and kept while something stands on them."""

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from vmm_core.disk import Pool
from vmm_core.errors import SnapshotInUse, SnapshotInvalid, UnknownTemplate
from vmm_core.machine import Frozen, MachineSpec, Manifest, VmRecord
from vmm_core.record import write_record
from vmm_core.snapshot import SnapshotStore, file_sizes, load_memory

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = Pool(root=tmp_path / "pool", kind="copy")
    for part in (pool.snapshots, pool.names, pool.vms, pool.staging):
        part.mkdir(parents=True)
    return pool


@pytest.fixture
def store(pool: Pool) -> SnapshotStore:
    return SnapshotStore(pool)


def manifest(digest: str, **changes: object) -> Manifest:
    whole = Manifest(
        digest=digest, created_at=1.0, machine=MachineSpec(memory_mib=1), accel="tcg", vmm_version="7.2.0",
        cpu_model="max", argv_digest="0" * 64, files={},
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


def record(vm_id: str, parent: str | None) -> VmRecord:
    return VmRecord(
        id=vm_id, pid=1, start_ticks=1, machine=MachineSpec(), accel="tcg", parent=parent, template=None,
        created_at=1.0, expires_at=2.0,
    )  # fmt: skip


def publish(store: SnapshotStore, digest: str, **changes: object) -> Path:
    with store.draft() as draft:
        (draft / "state.bin").write_bytes(b"devices")
        (draft / "memory.img").write_bytes(bytes(1 << 20))
        (draft / "memory.sums").write_bytes(bytes(64))
        files = file_sizes(draft)
        return store.publish(draft, manifest(digest, files=files, **changes)).path


def stand_on(pool: Pool, parent: str, vm_id: str = "vm-1") -> Path:
    directory = pool.vms / vm_id
    directory.mkdir()
    write_record(directory, record(vm_id, parent))
    return directory


def test_a_manifest_that_was_changed_is_refused_by_name(store: SnapshotStore) -> None:
    path = publish(store, A)
    words = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(words.replace('"cpu_model": "max"', '"cpu_model": "min"'))
    with pytest.raises(SnapshotInvalid, match=f"not the one that was written for digest {A[:12]}"):
        store.load(A)


def test_a_snapshot_under_another_digest_is_refused(store: SnapshotStore) -> None:
    path = publish(store, A)
    path.rename(path.with_name(B))
    with pytest.raises(SnapshotInvalid, match="not the one"):
        store.load(B)


def test_a_manifest_with_words_of_a_later_release_still_fits_its_seal(store: SnapshotStore) -> None:
    path = publish(store, A)
    facts = msgspec.json.decode((path / "manifest.json").read_bytes())
    assert facts["seal"]
    from vmm_core.snapshot import _seal  # pyright: ignore[reportPrivateUsage]

    facts["invented_later"] = {"x": 1}
    facts["seal"] = _seal(msgspec.json.encode(facts))
    (path / "manifest.json").write_bytes(msgspec.json.encode(facts))
    assert store.load(A).digest == A


def test_a_manifest_of_an_earlier_release_has_no_seal_and_is_read(store: SnapshotStore) -> None:
    path = publish(store, A)
    facts = msgspec.json.decode((path / "manifest.json").read_bytes())
    for later in ("seal", "checks", "state", "base", "ephemeral", "frozen"):
        del facts[later]
    (path / "manifest.json").write_bytes(msgspec.json.encode(facts))
    loaded = store.load(A)
    assert (loaded.manifest.state, loaded.manifest.base) == ("migration", None)
    os.close(load_memory(loaded))


@pytest.mark.parametrize("name", ["state.bin", "memory.sums"])
def test_a_small_file_that_was_changed_is_found_when_the_memory_is_loaded(
    store: SnapshotStore, name: str
) -> None:
    path = publish(store, A)
    os.close(load_memory(store.load(A)))
    data = bytearray((path / name).read_bytes())
    data[0] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(SnapshotInvalid, match=f"{name} of snapshot {A[:12]}"):
        load_memory(store.load(A))


def test_a_parent_is_not_removed_while_a_vm_stands_on_it(store: SnapshotStore, pool: Pool) -> None:
    publish(store, A)
    store.set_name("parent", A)
    directory = stand_on(pool, A)
    with pytest.raises(SnapshotInUse, match="vm-1 stand on it"):
        store.remove(A)
    assert store.resolve("parent").digest == A
    shutil.rmtree(directory)
    store.remove(A)
    with pytest.raises(UnknownTemplate):
        store.load(A)


def test_a_parent_is_not_removed_while_a_snapshot_or_a_frozen_vm_stands_on_it(store: SnapshotStore) -> None:
    publish(store, A)
    publish(store, B, base=A)
    frozen = Frozen(digest=C, record=record("vm-cold", B), frozen_at=1.0, expires_at=2.0)
    publish(store, C, base=B, frozen=frozen)
    with pytest.raises(SnapshotInUse, match=f"snapshot {B[:12]}"):
        store.remove(A)
    with pytest.raises(SnapshotInUse, match="frozen VM vm-cold"):
        store.remove(B)
    for digest in (C, B, A):
        store.remove(digest)
    assert store.list() == []


def test_who_holds_a_snapshot_keeps_it(store: SnapshotStore) -> None:
    publish(store, A)
    held = store.hold(A)
    assert held is not None
    also = store.hold(A)
    assert also is not None, "several may hold one"
    assert store.hold(A, alone=True) is None
    with pytest.raises(SnapshotInUse, match="under way"):
        store.remove(A)
    os.close(held)
    os.close(also)
    store.remove(A)
    assert store.hold(A) is None


def test_an_ephemeral_snapshot_goes_with_the_last_that_stood_on_it_and_its_bases_with_it(
    store: SnapshotStore, pool: Pool
) -> None:
    publish(store, A, ephemeral=True)
    publish(store, B, base=A, ephemeral=True)
    directory = stand_on(pool, B)
    store.tidy()
    assert {snapshot.digest for snapshot in store.list()} == {A, B}
    shutil.rmtree(directory)
    store.tidy()
    assert store.list() == []
    assert list(pool.staging.iterdir()) == []


def test_tidying_leaves_what_is_not_ephemeral(store: SnapshotStore) -> None:
    publish(store, A)
    store.tidy()
    assert [snapshot.digest for snapshot in store.list()] == [A]


def test_a_retired_frozen_vm_goes_unless_something_stands_on_it(store: SnapshotStore, pool: Pool) -> None:
    frozen = Frozen(digest=A, record=record("vm-cold", None), frozen_at=1.0, expires_at=2.0)
    publish(store, A, frozen=frozen)
    directory = stand_on(pool, A)
    store.retire(store.load(A))
    store.tidy()
    assert store.frozen() == []
    assert [snapshot.digest for snapshot in store.list()] == [A]
    shutil.rmtree(directory)
    store.tidy()
    assert store.list() == []


def test_what_is_placed_does_not_exist_until_it_is_complete(store: SnapshotStore, pool: Pool) -> None:
    with store.draft() as draft:
        (draft / "state.bin").write_bytes(b"devices")
        path, held = store.place(draft, A)
        assert path == pool.snapshots / A
        with pytest.raises(UnknownTemplate):
            store.load(A)
        store.sweep()
        assert path.exists(), "it is held"
        (path / "memory.img").write_bytes(b"")
        store.complete(manifest(A, files=file_sizes(path)))
        assert store.load(A).manifest.checks.keys() == {"state.bin"}
        os.close(held)
    assert list(pool.staging.iterdir()) == []


def test_what_was_placed_by_one_that_died_is_swept(store: SnapshotStore, pool: Pool) -> None:
    with store.draft() as draft:
        path, held = store.place(draft, A)
    os.close(held)  # as the kernel does when a process ends
    store.sweep()
    assert not path.exists()


def test_what_will_not_be_completed_is_abandoned_and_nothing_else(store: SnapshotStore) -> None:
    whole = publish(store, B)
    with store.draft() as draft:
        path, held = store.place(draft, A)
        store.abandon(A)
        os.close(held)
    store.abandon(B)
    assert not path.exists()
    assert whole.exists()
