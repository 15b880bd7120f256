"""Guest memory as files: fresh ones for a boot, sparse images on disk, sealed parents that no VMM can change.

    image on disk ──load_sealed──► sealed memfd ◄──mapped privately── VMMs

An image goes with its sums, one for every 64 KiB: what was cut or damaged on disk is found when it is loaded.
"""

import array
import ctypes
import fcntl
import mmap
import os
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

from vmm_core.disk import data_extents
from vmm_core.errors import SnapshotInvalid

# The name of the mapping in /proc/PID/smaps; accounting finds guest memory by it.
MEMFD_NAME = "microvm-memory"
PAGE = 4096
SUM_CHUNK = 64 << 10
_CHUNK = 1 << 20
_ZERO_PAGE = bytes(PAGE)
_ZERO_CHUNK = bytes(_CHUNK)
_ZERO_SUM = zlib.crc32(bytes(SUM_CHUNK))

ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)

# Byte ranges (start, end) of a machine's memory, in order, whole pages.
Ranges = list[tuple[int, int]]


def fresh_memory(size: int) -> int:
    """A memfd of ``size`` bytes for a machine that boots. The caller closes the descriptor."""
    fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def seal(fd: int) -> None:
    """Nobody can write, grow, shrink or unseal it any more. No writable mapping of it may exist."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)


def save_sparse(source: int, target: Path) -> int:
    """Write the memory ``source`` to ``target`` with every zero page left out as a hole.

    Returns the bytes of data written. The machine must be stopped.
    """
    size = os.fstat(source).st_size
    with target.open("xb", buffering=0) as file:
        file.truncate(size)
        written = write_ranges(source, data_extents(source, size), file.fileno())
        os.fsync(file.fileno())
    return written


def write_ranges(source: int, ranges: Iterable[tuple[int, int]], target: int) -> int:
    """Bring ``ranges`` of the image ``target`` up to ``source``; zero pages become holes. Returns the bytes written."""
    written = 0
    for start, end in ranges:
        for offset in range(start, end, _CHUNK):
            chunk = os.pread(source, min(_CHUNK, end - offset), offset)
            written += _write_pages(target, chunk, offset)
    return written


def _write_pages(fd: int, chunk: bytes, offset: int) -> int:
    """Write the runs of non-zero pages of ``chunk`` at ``offset`` and punch holes for the others."""
    if chunk == _ZERO_CHUNK[: len(chunk)]:
        _punch(fd, offset, len(chunk))
        return 0
    written = run = 0
    zero = _is_zero(chunk, 0)
    for position in range(PAGE, len(chunk) + PAGE, PAGE):
        last = position >= len(chunk)
        if last or _is_zero(chunk, position) != zero:
            if zero:
                _punch(fd, offset + run, position - run)
            else:
                os.pwrite(fd, memoryview(chunk)[run:position], offset + run)
                written += position - run
            run, zero = position, not zero
    return written


def _is_zero(chunk: bytes, position: int) -> bool:
    # The first bytes tell it of most pages without a copy.
    return chunk[position] == 0 and chunk[position : position + PAGE] == _ZERO_PAGE


def _punch(fd: int, offset: int, length: int) -> None:
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def load_sealed(image: Path, size: int, sums: bytes | None = None) -> int:
    """Load a memory image into a memfd that nobody can write, grow, shrink or unseal any more.

    Clones map it privately: its pages are shared until written. The caller closes the descriptor;
    the pages live as long as any VMM maps them. Raises SnapshotInvalid when the image has another size
    or, with its ``sums``, other content.
    """
    fd = fresh_memory(size)
    try:
        with image.open("rb", buffering=0) as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise SnapshotInvalid(
                    f"memory image {image} has {actual} bytes where its manifest says {size}: bake the template again"
                )
            with mmap.mmap(fd, size) as mapping, memoryview(mapping) as view:
                extents = data_extents(file.fileno(), size)
                read_ranges(file.fileno(), extents, view)
                if sums is not None:
                    _verify(image, view, extents, sums)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_ranges(source: int, ranges: Iterable[tuple[int, int]], target: memoryview) -> None:
    """Read byte ranges of a file to the same places in ``target``. SnapshotInvalid when it ends before they do."""
    for start, end in ranges:
        offset = start
        while offset < end:
            count = os.preadv(source, [target[offset : min(offset + _CHUNK, end)]], offset)
            if count == 0:
                raise SnapshotInvalid("the memory image ended early: bake the template again")
            offset += count


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────


def sums_of(fd: int, size: int) -> bytes:
    """The sums of a memory of ``size`` bytes: 4 for every 64 KiB, zero for zeros, so that holes and zeros are one."""
    sums = array.array("I", bytes(size // SUM_CHUNK * 4))
    if size:
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as view:
            for number in _chunks_of(data_extents(fd, size)):
                sums[number] = _sum(view, number)
    return _little_endian(sums).tobytes()


def _verify(image: Path, view: memoryview, extents: Ranges, sums: bytes) -> None:
    expected = array.array("I")
    if len(sums) == len(view) // SUM_CHUNK * 4:
        expected.frombytes(sums)
    else:
        raise SnapshotInvalid(f"the sums of {image} are cut short: bake the template again")
    found = array.array("I", bytes(len(sums)))
    for number in _chunks_of(extents):
        found[number] = _sum(view, number)
    if found != _little_endian(expected):
        at = next(number for number, value in enumerate(expected) if found[number] != value)
        raise SnapshotInvalid(
            f"memory image {image} is damaged from byte {at * SUM_CHUNK} on: it is not what was saved; "
            "remove it, and bake the template again"
        )


def _sum(view: memoryview, number: int) -> int:
    return zlib.crc32(view[number * SUM_CHUNK : (number + 1) * SUM_CHUNK]) ^ _ZERO_SUM


def _chunks_of(extents: Ranges) -> Iterable[int]:
    done = 0
    for start, end in extents:
        first = max(done, start // SUM_CHUNK)
        done = -(-end // SUM_CHUNK)
        yield from range(first, done)


def _little_endian(sums: "array.array[int]") -> "array.array[int]":
    if sys.byteorder == "big":
        sums.byteswap()
    return sums
