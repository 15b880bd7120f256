"""Things built once and kept under a key: one builder at a time, complete or absent, bounded in number.

    <root>/<kind>/<key>/          a finished entry: immutable, appears by one rename
    <root>/<kind>/.building-<key> where it is being built, under the lock of its key
    <root>/locks/<kind>-<key>     flock; freed by the kernel when its holder dies, so a lock never goes stale

Whoever holds a key's lock owns its ``.building-`` directory: one found there was left by a dead builder.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

from images.errors import BuildFailed

_BUILDING = ".building-"
_POLL_S = 0.2
_WAIT_S = 3600.0
_KEEP = 8


class Cache:
    """``root`` is created. Kinds and keys are file names. ``keep`` entries of a kind stay, the last used."""

    def __init__(self, root: Path, *, keep: int = _KEEP) -> None:
        self.root = root
        self._keep = keep

    def find(self, kind: str, key: str) -> Path | None:
        """The finished entry, marked as used now; None when there is none."""
        path = self.root / kind / key
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    async def get(
        self,
        kind: str,
        key: str,
        build: Callable[[Path], Awaitable[None]],
        *,
        waiting: Callable[[], None] | None = None,
    ) -> Path:
        """The entry, built now if it is missing. ``build`` fills the empty directory it is given.

        ``waiting`` is called once when another process is building the same key.
        """
        if found := self.find(kind, key):
            return found
        async with self.locked(f"{kind}-{key}", waiting=waiting):
            if found := self.find(kind, key):
                return found
            self.sweep()
            temporary = self.root / kind / f"{_BUILDING}{key}"
            await asyncio.to_thread(_empty, temporary)
            try:
                await build(temporary)
                await asyncio.to_thread(_settle, temporary)
                temporary.rename(self.root / kind / key)
            except BaseException:
                await asyncio.to_thread(_remove, temporary)
                raise
            await asyncio.to_thread(self._prune, kind, key)
            return self.root / kind / key

    @contextlib.asynccontextmanager
    async def locked(self, name: str, *, waiting: Callable[[], None] | None = None) -> AsyncGenerator[None]:
        """Hold the lock of that name, across processes. Raises BuildFailed after an hour of waiting."""
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _WAIT_S
            said = False
            while not _try_lock(descriptor):
                if waiting is not None and not said:
                    said = True
                    waiting()
                if time.monotonic() > deadline:
                    raise BuildFailed(
                        f"another process has held {locks / name} for an hour; end it and try again"
                    )
                await asyncio.sleep(_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def is_free(self, name: str) -> bool:
        """Whether nobody holds the lock of that name."""
        try:
            descriptor = os.open(self.root / "locks" / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            return _try_lock(descriptor)
        finally:
            os.close(descriptor)

    def sweep(self) -> list[Path]:
        """Remove what dead builders left and return it. Living builders hold their lock."""
        removed: list[Path] = []
        for path in self.root.glob(f"*/{_BUILDING}*"):
            name = f"{path.parent.name}-{path.name.removeprefix(_BUILDING)}"
            descriptor = os.open(self.root / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if _try_lock(descriptor):
                    _remove(path)
                    removed.append(path)
            finally:
                os.close(descriptor)
        return removed

    def _prune(self, kind: str, newest: str) -> None:
        entries = [path for path in (self.root / kind).iterdir() if not path.name.startswith(".")]
        entries.sort(key=lambda path: (path.name == newest, path.stat().st_mtime), reverse=True)
        for path in entries[self._keep :]:
            doomed = path.with_name(f"{_BUILDING}{path.name}")
            path.rename(doomed)  # first out of sight in one step: half an entry must never be found
            _remove(doomed)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(directory: Path) -> None:
    """Remove a tree, but never through a mount: what is behind one is not ours to delete."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    inside = [mount for mount in mounts if mount.startswith(f"{directory.resolve()}/")]
    if inside:
        raise BuildFailed(
            f"{inside[0]} is mounted inside a directory to be removed. Unmount it and try again"
        )
    shutil.rmtree(directory, ignore_errors=True)


def _empty(directory: Path) -> None:
    _remove(directory)
    directory.mkdir(parents=True)


def _settle(directory: Path) -> None:
    """Everything on disk before the rename makes it visible."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_file() or path.is_dir():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
