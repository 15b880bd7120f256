"""What each name of a template has meant: rows on disk, one file a name, and what follows from them.

    promote A ──► promote B ──► promote C ──rollback──► B ──rollback──► A
    versions:   A         A B         A B C           A B (C withdrawn)   A (B, C withdrawn)

The row is written before the name changes, and what the name means decides: a change that was cut short in between
has never happened, and a name that was set by somebody else has a row from the next look on.
"""

import contextlib
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import msgspec

from vmm_core.snapshot import sync

ROWS_KEPT = 50
NAMES_KEPT = 4096
_MOST_BYTES = 1 << 20

Action = Literal["promote", "rollback", "found"]


class Row(msgspec.Struct, frozen=True):
    """From ``at`` (Unix seconds) on a name meant ``digest``. ``commit`` and ``key`` are those of a repository's parent.

    ``found``: nobody wrote down when and why.
    """

    at: float
    digest: str
    action: Action
    why: str
    commit: str | None = None
    key: str | None = None


class _File(msgspec.Struct, frozen=True):
    name: str
    rows: tuple[Row, ...]


def effective(rows: tuple[Row, ...], now: Row | None) -> tuple[Row, ...]:
    """What really happened, oldest first, given the row that a name means ``now`` would be found with."""
    if now is None or (rows and rows[-1].digest == now.digest):
        return rows
    if len(rows) > 1 and rows[-2].digest == now.digest:
        return rows[:-1]
    return (*rows, now)


def versions(rows: Collection[Row]) -> tuple[str, ...]:
    """The digests a name may go back to, oldest first, what it means now last: promotions add, rollbacks take off."""
    stack: list[str] = []
    for row in rows:
        if row.action == "rollback":
            while stack and stack[-1] != row.digest:
                stack.pop()
        if row.digest in stack:
            stack.remove(row.digest)
        stack.append(row.digest)
    return tuple(stack)


def withdrawn(rows: Collection[Row]) -> frozenset[str]:
    """The digests that were rolled back from and have not been promoted again."""
    return frozenset(row.digest for row in rows).difference(versions(rows))


class Histories:
    """The files, each replaced as a whole. Who writes holds the catalog's lock. One that cannot be read has no rows."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str) -> tuple[Row, ...]:
        """Oldest first."""
        found = _read(self._path(name))
        return found.rows if found is not None and found.name == name else ()

    def write(self, name: str, rows: tuple[Row, ...], *, named: Collection[str]) -> None:
        """The last 50 of ``rows``, durably. Beyond 4096 names, the oldest not ``named`` any more are forgotten."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(name)
        is_new = not path.exists()
        draft = path.with_name(f".{path.name}")
        draft.write_bytes(msgspec.json.encode(_File(name, rows[-ROWS_KEPT:])))
        sync(draft)
        draft.replace(path)
        sync(self._directory)
        if is_new:
            self._forget(named)

    def _forget(self, named: Collection[str]) -> None:
        files = [path for path in self._directory.iterdir() if not path.name.startswith(".")]
        if len(files) <= NAMES_KEPT:
            return
        needed = {self._path(name) for name in named}
        old = sorted((path for path in files if path not in needed), key=lambda path: path.stat().st_mtime)
        for path in old[: len(files) - NAMES_KEPT]:
            path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        # Not the name: a branch may be longer than a file name, and was chosen by who knows whom.
        return self._directory / f"{hashlib.sha256(name.encode()).hexdigest()[:40]}.json"


def _read(path: Path) -> _File | None:
    with (
        contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError),
        path.open("rb") as file,
    ):
        return msgspec.json.decode(file.read(_MOST_BYTES), type=_File)
    return None
