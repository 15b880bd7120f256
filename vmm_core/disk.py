"""The disk pool: a directory whose files are cloned by sharing blocks until written.

    open_pool(DIR) ── DIR's file system reflinks ────────────────► DIR/pool is a plain directory   "reflink"
                 ├─── root, loop devices and mkfs.xfs at hand ───► DIR/pool.xfs mounted on DIR/pool "xfs-loop"
                 └─── otherwise ─────────────────────────────────► DIR/pool, files copied sparsely  "copy"

The loop pool is mounted by the first process that opens it and unmounted by the last one that
leaves, unless a VM that outlives them still has its disk open there.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import struct
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Literal

import msgspec

from vmm_core import program
from vmm_core.errors import HostUnfit, PoolFull, VmmMissing

PoolKind = Literal["reflink", "xfs-loop", "copy"]

FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_EXTENT_SHARED = 0x2000
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2  # not written out yet: it has no place
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_FS_XFLAG_COWEXTSIZE = 0x10000
_FSXATTR = struct.Struct(
    "=IIIII8s"
)  # linux/fs.h: flags, extent size, extents, project, copy-on-write extent size

# Below this much free room nothing new is started: what runs still needs to write.
RESERVE_BYTES = 256 << 20
LOOP_POOL_MIN = 2 << 30
LOOP_POOL_MAX = 1 << 40
_COPY_CHUNK = 4 << 20
_EXTENT_BATCHES = 64
_EXTENTS = 1024  # of one batch
_FIEMAP = struct.Struct("=QQIIII")  # linux/fiemap.h: start, length, flags, mapped, room, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_COPY_NOTE = "every fork copies its disk; use XFS or btrfs, or run as root with xfsprogs and loop devices"

_libc = ctypes.CDLL(None, use_errno=True)
_NO_REFLINK = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}


class Pool(msgspec.Struct, frozen=True):
    """An open pool. ``note`` says in one sentence what a lesser kind costs; empty for the best."""

    root: Path
    kind: PoolKind
    note: str = ""

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def names(self) -> Path:
        return self.root / "names"

    @property
    def vms(self) -> Path:
        return self.root / "vms"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    def free_bytes(self) -> int:
        """Bytes that can still be written: of the pool, and of the file system a loop pool lies on."""
        free = _free(self.root)
        return min(free, _free(self.root.parent)) if self.kind == "xfs-loop" else free

    def require_room(self, needed: int = 0) -> None:
        """Raise PoolFull unless ``needed`` bytes and the reserve fit."""
        free = self.free_bytes()
        if free < needed + RESERVE_BYTES:
            raise PoolFull(
                f"the disk pool {self.root} has {free >> 20} MiB free, but {(needed + RESERVE_BYTES) >> 20} MiB "
                "are needed: remove templates (microvm templates), end VMs (microvm kill), or enlarge its disk"
            )


def _free(path: Path) -> int:
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def clone_file(source: Path, target: Path) -> Literal["reflink", "copy"]:
    """Make ``target`` (must not exist) a copy of ``source`` sharing its blocks; sparse copy where that fails.

    Raises PoolFull when there is no room. Nothing is left behind on failure.
    """
    try:
        with source.open("rb") as src, target.open("xb") as dst:
            try:
                fcntl.ioctl(dst.fileno(), FICLONE, src.fileno())
            except OSError as error:
                if error.errno not in _NO_REFLINK:
                    raise
                _copy_sparse(src.fileno(), dst.fileno())
                return "copy"
            return "reflink"
    except FileExistsError:
        raise
    except OSError as error:
        target.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PoolFull(
                f"no room to clone {source.name} into {target.parent}: {error.strerror}"
            ) from error
        raise


def data_extents(fd: int, size: int) -> list[tuple[int, int]]:
    """The (start, end) byte ranges of ``fd`` that hold data, holes left out."""
    extents: list[tuple[int, int]] = []
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            raise
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        extents.append((start, position))
    return extents


def write_back(fd: int, *, wait: bool) -> None:
    """Begin to bring a file's data to storage; with ``wait``, all of it. It is not durable yet (sync_file_range(2))."""
    flags = 7 if wait else 2  # WAIT_BEFORE | WRITE | WAIT_AFTER, or WRITE
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(flags))


def copy_exactly(fd: int) -> None:
    """Let a clone take no more blocks for what is written to it than it needs. It is written to more slowly then.

    XFS takes 128 KiB at first for a page, and keeps what is left of it: a third of a memory image
    (ioctl_xfs_fsgetxattr(2), cowextsize). Other file systems have no such setting and need none.
    """
    attributes = bytearray(_FSXATTR.size)
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, attributes)
        flags, extent, extents, project, _, rest = _FSXATTR.unpack(attributes)
        wanted = _FSXATTR.pack(
            flags | _FS_XFLAG_COWEXTSIZE, extent, extents, project, os.fstat(fd).st_blksize, rest
        )
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, wanted)


def _copy_sparse(source: int, target: int) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in data_extents(source, size):
        offset = start
        while offset < end:
            chunk = os.pread(source, min(_COPY_CHUNK, end - offset), offset)
            if not chunk:
                raise OSError(errno.EIO, "the file shrank while it was copied")
            os.pwrite(target, chunk, offset)
            offset += len(chunk)


def private_bytes(path: Path) -> int:
    """Bytes of blocks that only this file holds. What ``extents`` does not place counts as its own."""
    placed, rest = extents(path)
    return rest + sum(length for _, length, shared in placed if not shared)


def extents(path: Path) -> tuple[list[tuple[int, int, bool]], int]:
    """Where a file's blocks are: (offset on the device, bytes, whether other files share them), by FIEMAP.

    And the bytes beyond those: all of them where the file system does not tell. A guest can break its disk into a
    million extents: those past the first 65,536 are not asked for.
    """
    found: list[tuple[int, int, bool]] = []
    start = loose = 0
    with path.open("rb") as file:
        for _ in range(_EXTENT_BATCHES):
            buffer = bytearray(_FIEMAP.pack(start, 2**64 - 1 - start, 0, 0, _EXTENTS, 0))
            buffer += bytes(_EXTENTS * _EXTENT.size)
            try:
                fcntl.ioctl(file.fileno(), FS_IOC_FIEMAP, buffer)
            except OSError:
                return [], path.stat().st_blocks * 512
            mapped = struct.unpack_from("=I", buffer, 20)[0]
            if mapped == 0:
                return found, loose
            last = False
            entries = memoryview(buffer)[_FIEMAP.size : _FIEMAP.size + mapped * _EXTENT.size]
            for logical, physical, length, flags in _EXTENT.iter_unpack(entries):
                if flags & FIEMAP_EXTENT_UNKNOWN:
                    loose += length
                else:
                    found.append((physical, length, bool(flags & FIEMAP_EXTENT_SHARED)))
                start = logical + length
                last = bool(flags & FIEMAP_EXTENT_LAST)
            if last:
                return found, loose
    return found, max(loose, path.stat().st_blocks * 512 - sum(length for _, length, _ in found))


@contextlib.asynccontextmanager
async def open_pool(data_dir: Path) -> AsyncGenerator[Pool]:
    """Open (making and mounting it where needed) the pool of ``data_dir``.

    Raises HostUnfit when the directory cannot be made or written, PoolFull when its disk is full.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        users = os.open(data_dir / "pool.users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(data_dir, error) from error
    try:
        async with _turn(data_dir):
            fcntl.flock(users, fcntl.LOCK_SH)
            pool = await _prepare(data_dir)
            # Held open, so that nobody's umount can take it away from under us.
            held = os.open(pool.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if pool.kind == "xfs-loop" and os.fstat(held).st_dev == data_dir.stat().st_dev:
                raise HostUnfit(f"the pool {pool.root} was unmounted as it was opened: try again")
            yield pool
        finally:
            os.close(held)
            if pool.kind == "xfs-loop":
                async with _turn(data_dir):
                    _leave(pool, users)
    finally:
        os.close(users)


def _unusable(data_dir: Path, error: OSError) -> HostUnfit:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PoolFull(f"the disk of the data directory {data_dir} is full: free some room")
    return HostUnfit(
        f"the data directory {data_dir} cannot be used: {error.strerror}; run as root, "
        "or name a directory you own with MICROVM_DATA_DIR"
    )


@contextlib.asynccontextmanager
async def _turn(data_dir: Path, deadline: float = 120.0) -> AsyncGenerator[None]:
    """One process at a time mounts or unmounts the pool of ``data_dir``."""
    fd = os.open(data_dir / "pool.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            async with asyncio.timeout(deadline):
                await _lock_exclusive(fd)
        except TimeoutError:
            raise HostUnfit(f"another process has held {data_dir}/pool.lock for {deadline:.0f} s") from None
        yield
    finally:
        os.close(fd)


async def _lock_exclusive(fd: int) -> None:
    pause = 0.002
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)
        else:
            return


async def _prepare(data_dir: Path) -> Pool:
    root = data_dir / "pool"
    try:
        root.mkdir(exist_ok=True, mode=0o711)
        if root.is_mount():
            pool = Pool(root=root, kind="xfs-loop" if (data_dir / "pool.xfs").exists() else "reflink")
        elif not (data_dir / "pool.xfs").exists() and _reflinks(root):
            pool = Pool(root=root, kind="reflink")
        elif not (data_dir / "pool.xfs").exists() and _in_use(root):
            pool = Pool(
                root=root, kind="copy", note=f"{root} cannot share blocks and is in use already: {_COPY_NOTE}"
            )
        else:
            pool = await _loop_pool(data_dir, root)
        for part in (pool.snapshots, pool.names, pool.vms, pool.staging):
            part.mkdir(exist_ok=True, mode=0o711)
    except OSError as error:
        raise _unusable(data_dir, error) from error
    return pool


def _in_use(root: Path) -> bool:
    """Whether a plain directory holds templates or VMs, which a mount would hide."""
    return any(path.is_dir() and any(path.iterdir()) for path in (root / "snapshots", root / "vms"))


def _reflinks(directory: Path) -> bool:
    source, target = directory / ".reflink-a", directory / ".reflink-b"
    try:
        source.write_bytes(b"x" * 4096)
        with source.open("rb") as src, target.open("wb") as dst:
            fcntl.ioctl(dst.fileno(), FICLONE, src.fileno())
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    else:
        return True
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


async def _loop_pool(data_dir: Path, root: Path) -> Pool:
    """Mount (making it first where missing) an XFS on a sparse loop file; a plain directory where that fails."""
    image = data_dir / "pool.xfs"
    problem = _loop_obstacle(image)
    if problem is None:
        if not image.exists():
            problem = await _make_loop_image(image)
        if problem is None:
            problem = await _run(
                "mount", "-t", "xfs", "-o", "loop,noatime,discard,nosuid,nodev,nouuid", str(image), str(root)
            )
        if problem is None:
            return Pool(root=root, kind="xfs-loop")
    if image.exists():
        raise HostUnfit(f"the pool image {image} exists but cannot be mounted: {problem}")
    return Pool(
        root=root,
        kind="copy",
        note=f"{root} cannot share blocks, so {_COPY_NOTE} ({problem})",
    )


def _loop_obstacle(image: Path) -> str | None:
    if os.geteuid() != 0:
        return "mounting a loop file needs root"
    if not Path("/dev/loop-control").exists():
        return "no /dev/loop-control"
    if not image.exists() and shutil.which("mkfs.xfs") is None:
        return "mkfs.xfs is not installed (package xfsprogs)"
    return None


async def _make_loop_image(image: Path) -> str | None:
    free = _free(image.parent)
    # Three quarters of what is free: the rest of the host keeps room, also when the pool is full.
    size = min(free * 3 // 4, LOOP_POOL_MAX) // (1 << 20) * (1 << 20)
    if size < LOOP_POOL_MIN:
        raise PoolFull(
            f"the disk of the data directory has {free >> 20} MiB free; a pool needs "
            f"{LOOP_POOL_MIN * 4 // 3 >> 20} MiB: free some room or name another directory"
        )
    draft = image.with_suffix(".draft")
    draft.unlink(missing_ok=True)
    with draft.open("xb") as file:
        file.truncate(size)
    problem = await _run("mkfs.xfs", "-q", "-m", "reflink=1", str(draft))
    if problem is None:
        draft.rename(image)
    else:
        draft.unlink(missing_ok=True)
    return problem


def _leave(pool: Pool, users: int) -> None:
    """Unmount when no other process and no VM uses the pool; a busy mount stays, the next one out takes it."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    # Not on a thread: were we cancelled, it would go on after the turn is somebody else's.
    _libc.umount2(os.fsencode(pool.root), 0)


async def _run(*argv: str) -> str | None:
    """Run a system tool; its complaint as one line, or None when it succeeded."""
    try:
        ended = await program.run(argv, timeout=60)
    except VmmMissing:
        return f"{argv[0]} is not installed"
    except TimeoutError:
        return f"{argv[0]} took longer than 60 s"
    if ended.status == 0:
        return None
    return " ".join(ended.errors.split())[:300] or f"{argv[0]} exited with {ended.status}"
