"""A repository at a commit → what it locks → the key of its dependencies.

The key does not parse a lock file: it is the digest of what the files say, byte for byte but for their line
endings, so a file that no tool could read has a key as well (its install is what fails). Equal keys mean: the
same base, the same runner, the same files at the same places, the same ``.microvm.yml``.
"""

import hashlib
import posixpath
from collections.abc import Sequence
from pathlib import Path

import msgspec

from images.ecosystems import is_vendored, kind, kind_of
from images.git_objects import LINK, SUBMODULE, Entry, content, entries, follow, reading, size
from images.globs import covers

# Raise it when the same repository is to get another key.
_FORMAT = 1
# Line endings are looked at in files up to this size, as long as all of them together are not more than that;
# what is larger counts by git's own digest of it, line endings and all.
_MAX_FILE = 8 << 20
_MAX_CONTENT = 32 << 20


class LockFile(msgspec.Struct, frozen=True):
    """``digest`` is ``text:`` and the SHA-256 of the content with line endings of one byte, or ``git:`` and the
    blob's (a submodule's: its commit's) id. ``kind`` is a row of the table of ecosystems, ``submodule``, or
    ``link`` for a symbolic link that leads to no file of the repository. ``size`` in bytes."""

    path: str
    kind: str
    digest: str
    size: int = 0

    @property
    def directory(self) -> str:
        return posixpath.dirname(self.path)


class Inventory(msgspec.Struct, frozen=True):
    """What a commit locks, sorted by path. A path that is not UTF-8 has its odd bytes as ``\\xff``."""

    commit: str
    files: tuple[LockFile, ...]


def inventory(mirror: Path, commit: str) -> Inventory:
    """What is locked at a commit of a bare mirror. Blocks, some 100 ms with 20,000 files: call it on a thread.

    Vendored directories are left out. A submodule counts by its commit, which stands for every lock file in
    it; a link to a file in the repository counts by what that file says.
    Raises MirrorDamaged (also for a commit that is not here) or RepositoryTooLarge.
    """
    with reading(mirror) as git:
        found = sorted(entries(git, commit, _counts), key=lambda entry: entry.path)
        links = [entry for entry in found if entry.mode == LINK]
        targets = (
            dict(zip(links, follow(git, commit, [entry.path for entry in links]), strict=True))
            if links
            else {}
        )
        left = _MAX_CONTENT
        files: list[LockFile] = []
        for entry in found:
            path = entry.path.decode(errors="backslashreplace")
            blob = targets.get(entry, entry.id)
            if entry.mode == SUBMODULE or blob is None:
                name = "link" if blob is None else "submodule"
                files.append(LockFile(path=path, kind=name, digest=f"git:{entry.id}"))
                continue
            length = size(git, blob)
            digest = f"git:{blob}"
            if length <= min(_MAX_FILE, left):
                left -= length
                digest = text_digest(content(git, blob))
            files.append(LockFile(path=path, kind=_kind(entry), digest=digest, size=length))
        return Inventory(commit=commit, files=tuple(files))


def _counts(mode: bytes, path: bytes) -> bool:
    return not is_vendored(path) if mode == SUBMODULE else kind_of(path) is not None


def _kind(entry: Entry) -> str:
    row = kind_of(entry.path)
    assert row is not None  # noqa: S101  # _counts asked the same
    return row.name


def text_digest(data: bytes) -> str:
    """The same for a text with line endings of Unix and of Windows. Binary files, which hold a zero, as they are."""
    text = data if b"\0" in data else data.replace(b"\r\n", b"\n")
    return f"text:{hashlib.sha256(text).hexdigest()}"


def within(files: Sequence[LockFile], paths: Sequence[str]) -> tuple[LockFile, ...]:
    """The files at or below ``paths`` (directories or globs of them, see images.globs), and the toolchain files
    above them, which hold there as well. No ``paths``: all."""
    if not paths:
        return tuple(files)
    return tuple(
        file for file in files if any(covers(path, file.directory, above=_inherited(file)) for path in paths)
    )


def _inherited(file: LockFile) -> bool:
    row = kind(file.kind)
    return row is not None and row.inherited


def dependency_key(
    *,
    base_digest: str,
    runner: str | None,
    inventory: Inventory,
    config: bytes | None,
    paths: Sequence[str] = (),
) -> str:
    """64 hexadecimal digits. ``base_digest`` of the base template, ``runner`` its runner's version, ``config``
    the repository's ``.microvm.yml`` as the default branch has it, ``paths`` what that narrows the files to."""
    words = (
        _FORMAT,
        base_digest,
        runner,
        None if config is None else text_digest(config),
        sorted((file.path, file.digest) for file in within(inventory.files, paths)),
    )
    return hashlib.sha256(msgspec.json.encode(words)).hexdigest()
