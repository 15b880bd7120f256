"""The templates of a data directory: named snapshots, as people and the control plane see them."""

import msgspec

from vmm_core.engine import Engine
from vmm_core.machine import MachineSpec, Snapshot
from vmm_core.snapshot import SnapshotStore


class Template(msgspec.Struct, frozen=True):
    """A name and what it means now.

    ``labels`` are the GitHub labels it serves; ``runner`` the version of the actions/runner inside, ``runner_dir``
    its directory in the guest and ``runner_files`` where the files of its configuration are to be written, all
    three None without one. ``created_at`` in Unix seconds; ``size_bytes`` is what its files would take unshared,
    holes left out.
    """

    name: str
    digest: str
    created_at: float
    machine: MachineSpec
    labels: tuple[str, ...]
    runner: str | None
    runner_dir: str | None
    runner_files: str | None
    description: str
    size_bytes: int


def templates(source: Engine | SnapshotStore) -> list[Template]:
    """Every named template, by name. Names whose snapshot is gone are left out."""
    store = source.snapshots if isinstance(source, Engine) else source
    by_digest = {snapshot.digest: snapshot for snapshot in store.list()}
    return [
        _template(name, by_digest[digest])
        for name, digest in sorted(store.names().items())
        if digest in by_digest
    ]


def _template(name: str, snapshot: Snapshot) -> Template:
    labels = snapshot.manifest.labels
    return Template(
        name=name,
        digest=snapshot.digest,
        created_at=snapshot.manifest.created_at,
        machine=snapshot.manifest.machine,
        labels=tuple(label for label in labels.get("labels", "").split(",") if label),
        runner=labels.get("runner.version"),
        runner_dir=labels.get("runner.dir"),
        runner_files=labels.get("runner.files"),
        description=labels.get("description", ""),
        size_bytes=sum(snapshot.manifest.files.values()),
    )
