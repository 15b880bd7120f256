"""A pool with snapshots that have the files and labels of templates and of repositories' parents."""

import hashlib
import os
from pathlib import Path

import msgspec

from images.catalog import Catalog
from vmm_core.disk import Pool, clone_file
from vmm_core.machine import MachineSpec, Manifest, Snapshot, VmRecord
from vmm_core.record import write_record
from vmm_core.snapshot import file_sizes

MIB = 1 << 20


def open_catalog(directory: Path) -> Catalog:
    pool = Pool(root=directory / "pool", kind="copy")
    for part in (pool.snapshots, pool.names, pool.vms, pool.staging):
        part.mkdir(parents=True, exist_ok=True)
    return Catalog(pool)


def digest_of(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def publish(
    catalog: Catalog,
    word: str,
    labels: dict[str, str],
    *,
    on: Snapshot | None = None,
    size: int = 4096,
    idle: float = 3600.0,
    **changes: object,
) -> Snapshot:
    """A snapshot of which ``size`` bytes are its own, the rest those of what it stands ``on``; last used long ago."""
    with catalog.store.draft() as draft:
        if on is not None:
            clone_file(on.path / "memory.img", draft / "memory.img")
        with (draft / "memory.img").open("r+b" if on is not None else "wb") as file:
            file.write(os.urandom(size))
        manifest = Manifest(
            digest=digest_of(word), created_at=1.0, machine=MachineSpec(memory_mib=1), accel="tcg",
            vmm_version="7.2.0", cpu_model="max", argv_digest="0" * 64, files=file_sizes(draft), labels=labels,
            base=None if on is None else on.digest,
        )  # fmt: skip
        snapshot = catalog.store.publish(draft, msgspec.structs.replace(manifest, **changes))
    rest(snapshot, idle)
    return snapshot


def template(catalog: Catalog, word: str, name: str = "python-ci", **more: object) -> Snapshot:
    return publish(catalog, word, {"template": name}, **more)  # pyright: ignore[reportArgumentType]


def parent(
    catalog: Catalog, word: str, repository: str = "octo-org/hello", branch: str = "main", **more: object
) -> Snapshot:
    labels = {
        "template": repository, "repository": repository, "branch": branch, "commit": digest_of(word)[:40],
        "key": f"key-{word}", "base": "python-ci", "baked.from": "base",
    }  # fmt: skip
    return publish(catalog, word, labels, **more)  # pyright: ignore[reportArgumentType]


def rest(snapshot: Snapshot, idle: float, now: float | None = None) -> None:
    """Let its last use be ``idle`` seconds ago."""
    import time

    at = (time.time() if now is None else now) - idle
    os.utime(snapshot.path, (at, at))


def stand_on(catalog: Catalog, digest: str, vm_id: str = "vm-1") -> Path:
    directory = catalog.pool.vms / vm_id
    directory.mkdir()
    record = VmRecord(
        id=vm_id, pid=1, start_ticks=1, machine=MachineSpec(), accel="tcg", parent=digest, template=None,
        created_at=1.0, expires_at=2.0,
    )  # fmt: skip
    write_record(directory, record)
    return directory
