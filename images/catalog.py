"""The templates and parents of a data directory: what each name means, has meant, and may mean again.

    <data>/catalog/lock           flock: one process at a time changes what follows
    <data>/catalog/history/       what each name has meant (images.history)
    <data>/catalog/pinned/DIGEST  an empty file for each snapshot that is never pruned
    <pool>/snapshots/DIGEST       its modification time is that of its last use

Whoever is killed in between leaves the old name or the new one, and history follows the name. All methods block.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Generator, Mapping
from pathlib import Path

import msgspec

from images.errors import CatalogBusy, NoEarlierVersion
from images.history import Action, Histories, Row, effective, versions, withdrawn
from vmm_core.disk import Pool
from vmm_core.engine import Engine
from vmm_core.errors import BadRequest, SnapshotInvalid, UnknownTemplate
from vmm_core.machine import MachineSpec, Manifest, Snapshot
from vmm_core.names import check_name
from vmm_core.snapshot import SnapshotStore, sync

# Labels of a manifest. A parent's: what it was made from.
REPOSITORY, BRANCH, COMMIT, KEY = "repository", "branch", "commit", "key"
BASE, BASE_DIGEST, BAKED_FROM = "base", "base.digest", "baked.from"
RECIPE, LOCKFILES, TOOLS = "recipe", "lockfiles", "tools"
# And what every template has.
TEMPLATE = "template"

_LOCK_S = 30.0
_WHY_CHARS = 200


class Template(msgspec.Struct, frozen=True):
    """A name and what it means now.

    ``labels`` are the GitHub labels it serves; ``runner`` the version of the actions/runner inside, ``runner_dir``
    its directory in the guest and ``runner_files`` where the files of its configuration are to be written, all
    three None without one. Times in Unix seconds; ``size_bytes`` is what its files would take unshared,
    holes left out. ``owner`` and all after it are those of a repository's parent, None of any other template:
    ``commit`` and ``key`` (of its dependencies) what it was made for, ``base`` what it was forked from.
    """

    name: str
    digest: str
    created_at: float
    last_used_at: float
    machine: MachineSpec
    labels: tuple[str, ...]
    runner: str | None
    runner_dir: str | None
    runner_files: str | None
    description: str
    size_bytes: int
    owner: str | None = None
    repository: str | None = None
    branch: str | None = None
    commit: str | None = None
    key: str | None = None
    base: str | None = None
    base_digest: str | None = None


def templates(source: Engine | SnapshotStore) -> list[Template]:
    """Every named template, by name. Names whose snapshot is gone are left out."""
    store = source.snapshots if isinstance(source, Engine) else source
    by_digest = {snapshot.digest: snapshot for snapshot in store.list()}
    return [
        template_of(name, by_digest[digest])
        for name, digest in sorted(store.names().items())
        if digest in by_digest
    ]


def template_of(name: str, snapshot: Snapshot) -> Template:
    manifest = snapshot.manifest
    labels = manifest.labels
    return Template(
        name=name,
        digest=snapshot.digest,
        created_at=manifest.created_at,
        last_used_at=last_used(snapshot),
        machine=manifest.machine,
        labels=tuple(label for label in labels.get("labels", "").split(",") if label),
        runner=labels.get("runner.version"),
        runner_dir=labels.get("runner.dir"),
        runner_files=labels.get("runner.files"),
        description=labels.get("description", ""),
        size_bytes=sum(manifest.files.values()),
        owner=manifest.owner,
        repository=labels.get(REPOSITORY),
        branch=labels.get(BRANCH),
        commit=labels.get(COMMIT),
        key=labels.get(KEY),
        base=labels.get(BASE),
        base_digest=labels.get(BASE_DIGEST),
    )


def last_used(snapshot: Snapshot) -> float:
    """When it was last forked or promoted, else when it was made; Unix seconds."""
    try:
        return snapshot.path.stat().st_mtime
    except FileNotFoundError:  # removed meanwhile
        return snapshot.manifest.created_at


class Catalog:
    """The catalog of one pool."""

    def __init__(self, source: Engine | Pool) -> None:
        self.pool = source.pool if isinstance(source, Engine) else source
        self.store = SnapshotStore(self.pool)
        self._directory = self.pool.root.parent / "catalog"
        self._histories = Histories(self._directory / "history")
        self._pins = self._directory / "pinned"

    # ── names ────────────────────────────────────────────────────────────────────────────────────

    def promote(self, name: str, digest: str, why: str) -> Row:
        """Let ``name`` mean ``digest`` from now on; ``why`` is one line for its history.

        Raises UnknownTemplate and SnapshotInvalid for what cannot be forked, BadRequest for no name, or one of
        another repository; then, and when it is killed, the name means what it meant. CatalogBusy after 30 s.
        """
        check_name(name)
        with self.locked():
            snapshot = self.store.load(digest)
            _require_fitting(name, snapshot.manifest)
            names = self.store.names()
            rows = self.rows(name, names)
            if rows and rows[-1].digest == digest:
                if names.get(name) == digest:
                    self.touch(digest)
                    return rows[-1]
                rows = rows[:-1]  # the name is gone since: this is when it begins again
            return self._turn(name, rows, _row(snapshot, "promote", why), names)

    def rollback(self, name: str, why: str = "") -> Row:
        """Let ``name`` mean the version before this one, of those that still exist. A promotion of this one undoes it.

        Raises UnknownTemplate when there never was such a name, NoEarlierVersion. CatalogBusy after 30 s.
        """
        with self.locked():
            names = self.store.names()
            rows = self.rows(name, names)
            if not rows:
                self.store.resolve(name)
                raise BadRequest(f"{name!r} is a digest: say which name shall be rolled back")
            now = names.get(name)
            earlier = [digest for digest in reversed(versions(rows)) if digest != now]
            for digest in earlier:
                with contextlib.suppress(UnknownTemplate, SnapshotInvalid):
                    snapshot = self.store.load(digest)
                    said = why or f"back from {now[:12] if now is not None else 'nothing'}"
                    return self._turn(name, rows, _row(snapshot, "rollback", said), names)
        raise NoEarlierVersion(
            f"{name} has no earlier version to go back to"
            + (f": the {len(earlier)} there were have been removed" if earlier else "")
            + "; bake it again, or promote another snapshot (microvm templates promote)"
        )

    def history(self, name: str) -> tuple[Row, ...]:
        """What ``name`` has meant, newest first. UnknownTemplate when there never was such a name."""
        rows = self.rows(name, self.store.names())
        if not rows:
            self.store.resolve(name)
        return rows[::-1]

    def withdrawn(self, name: str) -> frozenset[str]:
        """The digests ``name`` was rolled back from: nothing but an order of the operator should promote them again."""
        return withdrawn(self.rows(name, self.store.names()))

    def parents(self, repository: str) -> list[Template]:
        """A repository's parents, newest first, also of names that mean another by now; not those rolled back from."""
        names = self.store.names()
        found: list[Template] = []
        bad: dict[str, frozenset[str]] = {}
        for snapshot in self.store.list():
            labels = snapshot.manifest.labels
            if labels.get(REPOSITORY) == repository:
                name = made_as(snapshot.manifest)
                if name not in bad:
                    bad[name] = withdrawn(self.rows(name, names))
                if snapshot.digest not in bad[name]:
                    found.append(template_of(name, snapshot))
        return found

    def rows(self, name: str, names: Mapping[str, str]) -> tuple[Row, ...]:
        """What ``name`` has meant, oldest first, by what the ``names`` of the store mean now."""
        now: Row | None = None
        if name in names:
            with contextlib.suppress(UnknownTemplate, SnapshotInvalid):
                snapshot = self.store.load(names[name])
                why = "named by somebody who kept no history"
                now = msgspec.structs.replace(_row(snapshot, "found", why), at=snapshot.manifest.created_at)
        return effective(self._histories.read(name), now)

    def _turn(self, name: str, rows: tuple[Row, ...], row: Row, names: Mapping[str, str]) -> Row:
        # Killed in between: a row that the name does not bear out has never been. A name that meant nothing before
        # bears out nothing, so there it comes first, and its row is found.
        is_new = name not in names
        if is_new:
            self.store.set_name(name, row.digest)
        self._histories.write(name, (*rows, row), named=[*names, name])
        if not is_new:
            self.store.set_name(name, row.digest)
        self.touch(row.digest)
        return row

    # ── use ──────────────────────────────────────────────────────────────────────────────────────

    def touch(self, digest: str) -> None:
        """It is used now. Some microseconds, not durable; nothing when there is no such snapshot."""
        held = self.store.hold(digest)
        if held is not None:
            try:
                os.utime(held)
            finally:
                os.close(held)

    def pin(self, digest: str) -> None:
        """Never prune it. UnknownTemplate when there is none."""
        with self.locked():
            self.store.load(digest)
            self._pins.mkdir(exist_ok=True, mode=0o700)
            (self._pins / digest).touch(mode=0o600)
            sync(self._pins)

    def unpin(self, digest: str) -> None:
        """It may be pruned again."""
        with self.locked():
            if digest in self.pinned():
                (self._pins / digest).unlink()
                sync(self._pins)

    def tidy(self) -> None:
        """Forget the pins of what is gone."""
        with self.locked():
            for digest in self.pinned() - {snapshot.digest for snapshot in self.store.list()}:
                (self._pins / digest).unlink(missing_ok=True)

    def pinned(self) -> frozenset[str]:
        """Digests, also of what is gone."""
        try:
            return frozenset(path.name for path in self._pins.iterdir())
        except FileNotFoundError:
            return frozenset()

    @contextlib.contextmanager
    def locked(self) -> Generator[None]:
        """Nobody else changes the catalog meanwhile. CatalogBusy after 30 s."""
        self._directory.mkdir(exist_ok=True, mode=0o700)
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for(fd, self._directory / "lock")
            yield
        finally:
            os.close(fd)


def _wait_for(fd: int, path: Path) -> None:
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CatalogBusy(
                    f"another process has held {path} for {_LOCK_S:.0f} s: try again when it has ended"
                ) from None
            time.sleep(0.02)
        else:
            return


def _require_fitting(name: str, manifest: Manifest) -> None:
    """No repository is given another's parent, whatever it was asked for under."""
    repository, at, _ = name.partition("@")
    whose = manifest.labels.get(REPOSITORY)
    if whose != (repository if at else None):
        raise BadRequest(
            f"snapshot {manifest.digest[:12]} "
            + ("is no repository's parent" if whose is None else f"is a parent of {whose}")
            + f", so {name} cannot mean it"
        )


def made_as(manifest: Manifest) -> str:
    """The name it was baked for; empty for what is no template, such as a frozen VM."""
    labels = manifest.labels
    if manifest.frozen is not None or manifest.ephemeral:
        return ""
    if REPOSITORY in labels:
        return f"{labels[REPOSITORY]}@{labels.get(BRANCH, '')}"
    return labels.get(TEMPLATE, "")


def _row(snapshot: Snapshot, action: Action, why: str) -> Row:
    labels = snapshot.manifest.labels
    line = "".join(char if char.isprintable() else "?" for char in why)[:_WHY_CHARS]
    return Row(time.time(), snapshot.digest, action, line, labels.get(COMMIT), labels.get(KEY))
