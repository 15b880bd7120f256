"""Snapshots on disk: a directory per digest, published atomically, with names that point at them.

    staging/<random>/ filled ──► manifest.json written last ──► renamed to snapshots/<digest>/
    names/<name> is a symbolic link to a digest, replaced by rename

What is not in ``snapshots/`` under its digest with a manifest does not exist, whatever crashed.
"""

import contextlib
import difflib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Generator
from pathlib import Path

import msgspec

from vmm_core.disk import Pool
from vmm_core.errors import BadRequest, SnapshotInvalid, UnknownTemplate
from vmm_core.machine import Manifest, Snapshot

MANIFEST = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{16,64}")


class SnapshotStore:
    """The published snapshots of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @contextlib.contextmanager
    def draft(self) -> Generator[Path]:
        """A directory to fill; gone at the end unless ``publish`` moved it away."""
        path = self._pool.staging / f"snapshot-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, draft: Path, manifest: Manifest) -> Snapshot:
        """Make the files in ``draft`` the snapshot ``manifest.digest``. Who comes second gets the first one's."""
        if not _DIGEST.fullmatch(manifest.digest):
            raise BadRequest(f"{manifest.digest!r} is no digest: 16 to 64 hexadecimal digits")
        target = self._pool.snapshots / manifest.digest
        _write_durably(draft / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        _sync_directory(draft)
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
        _sync_directory(target.parent)
        return self.load(manifest.digest)

    def load(self, digest: str) -> Snapshot:
        """The snapshot of exactly this digest. UnknownTemplate, or SnapshotInvalid when files are missing or cut."""
        path = self._pool.snapshots / digest
        try:
            manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
        except FileNotFoundError:
            raise UnknownTemplate(f"there is no template {digest}: see microvm templates") from None
        except msgspec.DecodeError as error:
            raise SnapshotInvalid(
                f"the manifest of {path} cannot be read ({error}): bake the template again"
            ) from error
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
            + f": make it with microvm bake {ref}"
        )

    def names(self) -> dict[str, str]:
        """Every name and the digest it stands for."""
        found: dict[str, str] = {}
        for path in self._pool.names.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_symlink() and not path.name.startswith("."):
                    found[path.name] = path.readlink().name
        return found

    def set_name(self, name: str, digest: str) -> None:
        """Let ``name`` stand for ``digest`` from now on; one rename, so it never stands for nothing."""
        if not _NAME.fullmatch(name):
            raise BadRequest(
                f"{name!r} is no template name: lower-case letters, digits, '.', '_' and '-', at most 100"
            )
        self.load(digest)
        draft = self._pool.names / f".{name}.{uuid.uuid4().hex[:8]}"
        draft.symlink_to(Path("..") / "snapshots" / digest)
        draft.replace(self._pool.names / name)

    def list(self) -> list[Snapshot]:
        """Every readable snapshot, newest first."""
        found: list[Snapshot] = []
        for path in self._pool.snapshots.iterdir():
            with contextlib.suppress(SnapshotInvalid, UnknownTemplate):
                found.append(self.load(path.name))
        return sorted(found, key=lambda snapshot: snapshot.manifest.created_at, reverse=True)

    def remove(self, digest: str) -> None:
        """Delete a snapshot and its names. Forks under way keep what they have open."""
        target = self._pool.snapshots / digest
        if not (_DIGEST.fullmatch(digest) and target.is_dir()):
            raise UnknownTemplate(f"there is no template {digest}: see microvm templates")
        for name, meaning in self.names().items():
            if meaning == digest:
                (self._pool.names / name).unlink(missing_ok=True)
        self._bury(target)

    def sweep(self) -> None:
        """Remove what killed processes left half-made or half-removed."""
        for path in self._pool.staging.iterdir():
            maker = re.fullmatch(r"snapshot-(\d+)-[0-9a-f]{8}", path.name)
            if path.name.startswith("removed-") or (maker and not Path(f"/proc/{maker[1]}").exists()):
                shutil.rmtree(path, ignore_errors=True)

    def _bury(self, target: Path) -> None:
        # Out of sight first: a removal that is cut short leaves rubbish in staging, never half a snapshot.
        grave = self._pool.staging / f"removed-{uuid.uuid4().hex[:8]}"
        target.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def file_sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != MANIFEST}


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
