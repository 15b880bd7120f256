"""Snapshots on disk: a directory per digest, published atomically, with names that point at them.

    staging/<random>/ filled ──► manifest.json written last ──► renamed to snapshots/<digest>/
    staging/<random>/ disk and devices ──place──► snapshots/<digest>/, held ──► memory, then its manifest

What is not in ``snapshots/`` under its digest with a manifest does not exist, whatever crashed. Who uses a
snapshot that no record tells of yet holds it: a shared lock on its directory. What VMs, other snapshots or
holders stand on is not removed.
"""

import contextlib
import difflib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import msgspec

from vmm_core.disk import Pool, private_bytes
from vmm_core.drivers.base import MEMORY, STATE, SUMS
from vmm_core.errors import BadRequest, SnapshotInUse, SnapshotInvalid, UnknownTemplate
from vmm_core.machine import Manifest, Snapshot
from vmm_core.memory import load_sealed
from vmm_core.names import Names, check_name
from vmm_core.record import read_records

MANIFEST = "manifest.json"
_CHECKED_BYTES = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{16,64}")


class SnapshotStore:
    """The published snapshots of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._names = Names(pool.names)

    @contextlib.contextmanager
    def draft(self) -> Generator[Path]:
        """A directory to fill; gone at the end unless ``publish`` moved it away."""
        path = self._pool.staging / f"snapshot-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        path.mkdir(mode=0o700)
        held = _lock(path, fcntl.LOCK_SH)  # tells it from one whose maker has ended
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            if held is not None:
                os.close(held)

    def publish(self, draft: Path, manifest: Manifest, *, durable: Collection[str] = ()) -> Snapshot:
        """Make the files in ``draft`` the snapshot ``manifest.digest``. Who comes second gets the first one's.

        ``durable`` names files that are on storage already.
        """
        if not _DIGEST.fullmatch(manifest.digest):
            raise BadRequest(f"{manifest.digest!r} is no digest: 16 to 64 hexadecimal digits")
        target = self._pool.snapshots / manifest.digest
        for path in draft.iterdir():
            if path.name not in durable:
                sync(path)
        _write_durably(draft / MANIFEST, _encode(_sealed(draft, manifest)))
        sync(draft)
        try:
            draft.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            try:
                return self.load(manifest.digest)
            except SnapshotInvalid:
                self._bury(target)  # a damaged one must not stand in the way of its own replacement
                draft.rename(target)
        sync(target.parent)
        return self.load(manifest.digest)

    def place(self, draft: Path, digest: str) -> tuple[Path, int]:
        """Give a draft its place before it is whole: unseen until ``complete``. Held by the descriptor returned."""
        fd = _lock(draft, fcntl.LOCK_SH)
        if fd is None:
            raise BadRequest(f"{draft} is held by another process")
        target = self._pool.snapshots / digest
        try:
            draft.rename(target)
        except BaseException:
            os.close(fd)
            raise
        return target, fd

    def complete(self, manifest: Manifest) -> Snapshot:
        """From now on what was placed under this digest exists."""
        target = self._pool.snapshots / manifest.digest
        for path in target.iterdir():
            sync(path)
        self._rewrite(target, manifest)
        sync(target.parent)
        return self.load(manifest.digest)

    def abandon(self, digest: str) -> None:
        """Remove what was placed and will not be completed."""
        target = self._pool.snapshots / digest
        if target.is_dir() and not (target / MANIFEST).exists():
            self._bury(target)

    def _rewrite(self, target: Path, manifest: Manifest) -> None:
        with self.draft() as draft:
            _write_durably(draft / MANIFEST, _encode(_sealed(target, manifest)))
            (draft / MANIFEST).replace(target / MANIFEST)
            sync(target)

    def hold(self, digest: str, *, alone: bool = False) -> int | None:
        """Keep a snapshot from being removed until the descriptor is closed. None: it is being removed, or gone.

        ``alone``: nobody else may hold it either.
        """
        return _lock(self._pool.snapshots / digest, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)

    @contextlib.contextmanager
    def kept(self, digest: str) -> Generator[None]:
        """Within, nobody removes this snapshot. UnknownTemplate when somebody does right now, or has."""
        held = self.hold(digest)
        if held is None:
            raise UnknownTemplate(f"template {digest[:12]} is being removed or thawed: take another")
        try:
            yield
        finally:
            os.close(held)

    def load(self, digest: str) -> Snapshot:
        """The snapshot of exactly this digest. UnknownTemplate, or SnapshotInvalid when files are missing or cut."""
        path = self._pool.snapshots / digest
        try:
            words = (path / MANIFEST).read_bytes()
            manifest = msgspec.json.decode(words, type=Manifest)
        except FileNotFoundError:
            raise UnknownTemplate(f"there is no template {digest}: see microvm templates") from None
        except msgspec.DecodeError as error:
            raise SnapshotInvalid(
                f"the manifest of {path} cannot be read ({error}): bake the template again"
            ) from error
        if manifest.digest != digest or (manifest.seal and manifest.seal != _seal(words)):
            raise SnapshotInvalid(
                f"the manifest of {path} is not the one that was written for digest {digest[:12]}: "
                "remove it, and bake the template again"
            )
        for name, size in manifest.files.items():
            try:
                actual = (path / name).stat().st_size
            except FileNotFoundError:
                actual = -1
            if actual != size:
                raise SnapshotInvalid(
                    f"{name} of template {digest[:12]} "
                    + ("is missing" if actual < 0 else f"has {actual} bytes where its manifest says {size}")
                    + ": bake the template again"
                )
        return Snapshot(path=path, manifest=manifest)

    def resolve(self, ref: str) -> Snapshot:
        """A snapshot by name, digest, or the first eight or more digits of one."""
        names = self.names()
        if ref in names:
            return self.load(names[ref])
        if _DIGEST.fullmatch(ref) and (self._pool.snapshots / ref).exists():
            return self.load(ref)
        if re.fullmatch(r"[0-9a-f]{8,63}", ref):
            matches = [path.name for path in self._pool.snapshots.iterdir() if path.name.startswith(ref)]
            if len(matches) == 1:
                return self.load(matches[0])
        close = difflib.get_close_matches(ref, names, n=3)
        known = ", ".join(close or sorted(names)[:10])
        raise UnknownTemplate(
            f"there is no template {ref!r}"
            + (f" (there is: {known})" if known else " (none is baked yet)")
            + f": make it with microvm bake {'--repo URL' if '@' in ref else ref}"
        )

    def names(self) -> dict[str, str]:
        """Every name and the digest it stands for."""
        return self._names.all()

    def set_name(self, name: str, digest: str) -> None:
        """Let ``name``, a template's or ``owner/repo@branch``, stand for ``digest`` from now on, and never for nothing.

        Raises BadRequest when that is no name, and what ``load`` raises.
        """
        check_name(name)
        self.load(digest)
        self._names.set(name, digest)

    def unset_name(self, name: str) -> None:
        """Let ``name`` stand for nothing. What it stood for stays."""
        self._names.unset(name)

    def private_bytes(self, digest: str) -> int:
        """Bytes of the pool that this snapshot alone holds: what its removal gives back. Blocking: it reads extents.

        What it shares with its base, with snapshots that stand on it or with the disks of VMs is not counted. The
        blocks of a file that has just been removed may count as shared for some tenths of a second more.
        """
        return sum(private_bytes(path) for path in self.load(digest).path.iterdir())

    def frozen(self) -> list[Snapshot]:
        """Every VM that was stopped into a snapshot, oldest first."""
        found = [snapshot for snapshot in self.list() if snapshot.manifest.frozen is not None]
        return found[::-1]

    def users(self, digest: str) -> list[str]:
        """What stands on a snapshot: VMs by their records, frozen VMs and other snapshots by their manifests."""
        found = [f"VM {record.id}" for record in read_records(self._pool.vms) if record.parent == digest]
        for snapshot in self.list():
            manifest = snapshot.manifest
            if manifest.base == digest:
                found.append(
                    f"snapshot {manifest.digest[:12]}"
                    if manifest.frozen is None
                    else f"frozen VM {manifest.frozen.id}"
                )
        return found

    def list(self) -> list[Snapshot]:
        """Every readable snapshot, newest first."""
        found: list[Snapshot] = []
        for path in self._pool.snapshots.iterdir():
            with contextlib.suppress(SnapshotInvalid, UnknownTemplate):
                found.append(self.load(path.name))
        return sorted(found, key=lambda snapshot: snapshot.manifest.created_at, reverse=True)

    def remove(self, digest: str) -> None:
        """Delete a snapshot and its names.

        Raises UnknownTemplate when there is none, SnapshotInUse, naming them, when VMs or snapshots stand on it, or
        forks of it are under way.
        """
        target = self._pool.snapshots / digest
        if not (_DIGEST.fullmatch(digest) and target.is_dir()):
            raise UnknownTemplate(f"there is no template {digest}: see microvm templates")
        held = self.hold(digest, alone=True)
        users = self.users(digest) if held is not None else ["a fork that is under way"]
        try:
            if users:
                shown = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
                raise SnapshotInUse(
                    f"snapshot {digest[:12]} cannot be removed: {shown} stand on it; end them first "
                    "(microvm kill), or wait for them"
                )
            self._names.forget(digest)
            self._bury(target)
        finally:
            if held is not None:
                os.close(held)

    def retire(self, snapshot: Snapshot) -> None:
        """Nobody shall thaw it any more. ``tidy`` removes it, unless VMs or snapshots stand on it."""
        manifest = msgspec.structs.replace(snapshot.manifest, frozen=None, ephemeral=True)
        self._rewrite(snapshot.path, manifest)

    def tidy(self) -> None:
        """Remove ephemeral snapshots that nothing stands on any more, and their own bases with them."""
        found = True
        while found:
            found = False
            for snapshot in self.list():
                if snapshot.manifest.ephemeral:
                    with contextlib.suppress(SnapshotInUse, UnknownTemplate):
                        self.remove(snapshot.digest)
                        found = True

    def sweep(self) -> None:
        """Remove what killed processes left half-made or half-removed."""
        for path in self._pool.staging.iterdir():
            maker = re.fullmatch(r"snapshot-(\d+)-[0-9a-f]{8}", path.name)
            if path.name.startswith("removed-") or (maker and not Path(f"/proc/{maker[1]}").exists()):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._pool.snapshots.iterdir():
            if not (path / MANIFEST).exists() and (held := _lock(path, fcntl.LOCK_EX)) is not None:
                self._bury(path)  # placed, and never completed
                os.close(held)
        self.tidy()

    def _bury(self, target: Path) -> None:
        # Out of sight first: a removal that is cut short leaves rubbish in staging, never half a snapshot.
        grave = self._pool.staging / f"removed-{uuid.uuid4().hex[:8]}"
        target.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def load_memory(snapshot: Snapshot) -> int:
    """The sealed memory of a snapshot whose files are what was saved. Blocking: it reads all of it.

    Raises SnapshotInvalid, naming the file that is not.
    """
    manifest = snapshot.manifest
    for name, expected in manifest.checks.items():
        if _check(snapshot.path / name) != expected:
            raise SnapshotInvalid(
                f"{name} of snapshot {manifest.digest[:12]} is not what was saved: remove it, bake the template again"
            )
    sums = (snapshot.path / SUMS).read_bytes() if SUMS in manifest.checks else None
    return load_sealed(snapshot.path / MEMORY, manifest.machine.memory_mib << 20, sums)


def file_sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != MANIFEST}


def _sealed(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest with the digests of the small files beside it and one of its own."""
    small = [name for name in (STATE, SUMS) if manifest.files.get(name, _CHECKED_BYTES + 1) <= _CHECKED_BYTES]
    checks = {name: _check(directory / name) for name in small}
    manifest = msgspec.structs.replace(manifest, checks=checks)
    return msgspec.structs.replace(manifest, seal=_seal(msgspec.json.encode(manifest)))


def _seal(words: bytes) -> str:
    """Over what is written, not over what this release understands of it."""
    facts = msgspec.json.decode(words, type=dict[str, Any])
    facts.pop("seal", None)
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()


def _check(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)


def _lock(directory: Path, kind: int) -> int | None:
    """A lock on a directory that is still there once it is ours; None when it is not, or another has it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        if directory.stat().st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
