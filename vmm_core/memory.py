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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vmm_core.disk import data_extents, write_back
from vmm_core.errors import SnapshotInvalid

# The name of the mapping in /proc/PID/smaps; accounting finds guest memory by it.
MEMFD_NAME = "microvm-memory"
PAGE = 4096
SUM_CHUNK = 64 << 10
_CHUNK = 1 << 20
_THREADS = 4
_WRITE_BACK = 8 << 20  # so much at a time is on its way to storage while more is prepared
_GLANCE = 32
_ZERO_PAGE = bytes(PAGE)
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
    written = begun = 0
    for start, end in ranges:
        for offset in range(start, end, _CHUNK):
            chunk = os.pread(source, min(_CHUNK, end - offset), offset)
            written += write_pages(target, chunk, offset)
            if written - begun >= _WRITE_BACK:
                begun = written
                write_back(target, wait=False)
    return written


def write_pages(fd: int, chunk: bytes | memoryview, offset: int) -> int:
    """Write the runs of non-zero pages of ``chunk`` at ``offset`` and punch holes for the others."""
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


def write_changes(fd: int, chunk: memoryview, offset: int, base: mmap.mmap) -> Ranges:
    """Write those pages of ``chunk`` that differ from ``base`` at ``offset``, as ``write_pages``. Returns where."""
    changed: Ranges = []
    for position in range(0, len(chunk), PAGE):
        at = offset + position
        # The first bytes tell it of most pages without a copy.
        if (
            bytes(chunk[position : position + _GLANCE]) != base[at : at + _GLANCE]
            or bytes(chunk[position : position + PAGE]) != base[at : at + PAGE]
        ):
            if changed and changed[-1][1] == at:
                changed[-1] = (changed[-1][0], at + PAGE)
            else:
                changed.append((at, at + PAGE))
    for start, end in changed:
        write_pages(fd, chunk[start - offset : end - offset], start)
    return changed


def _is_zero(chunk: bytes | memoryview, position: int) -> bool:
    # The first byte tells it of most pages without a copy.
    return chunk[position] == 0 and bytes(chunk[position : position + PAGE]) == _ZERO_PAGE


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
            copy_data(file.fileno(), fd, size, sums)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def copy_data(source: int, target: int, size: int, sums: bytes | None = None) -> None:
    """Copy what the file ``source`` holds to ``target``, a fresh memory; with ``sums``, only if it fits them."""
    extents = data_extents(source, size)
    expected = None if sums is None else _parse(sums, size)
    if expected is not None:
        _require_data(expected, extents)
    in_shares(extents, lambda share: _copy_share(source, target, share, expected))


def copy_ranges(source: int, target: int, ranges: Ranges) -> None:
    """Copy byte ranges of one memory to the same places in another."""
    in_shares(ranges, lambda share: _copy_share(source, target, share, None))


def in_shares(ranges: Ranges, work: Callable[[Ranges], None]) -> None:
    """Have about equal shares of the ranges worked on by threads at once."""
    shares = _shares(ranges)
    if len(shares) <= 1:
        for share in shares:
            work(share)
        return
    with ThreadPoolExecutor(len(shares), "memory") as threads:
        for done in [threads.submit(work, share) for share in shares]:
            done.result()


def _copy_share(source: int, target: int, extents: Ranges, expected: "array.array[int] | None") -> None:
    """Through one small buffer that stays in the processor's cache, and is summed while it is there."""
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    at = -1  # the piece of the file in the buffer
    for start, end in extents:
        offset = start
        while offset < end:
            piece = offset // _CHUNK * _CHUNK
            if piece != at:
                length = _read_piece(source, view, piece)
                at = piece
                if expected is not None:
                    _verify(view[:length], piece, expected)
            stop = min(end, piece + _CHUNK)
            os.pwrite(target, view[offset - piece : stop - piece], offset)
            offset = stop


def _read_piece(source: int, view: memoryview, piece: int) -> int:
    length = min(_CHUNK, os.fstat(source).st_size - piece)
    read_ranges(source, [(piece, piece + length)], view, -piece)
    return length


def read_ranges(source: int, ranges: Iterable[tuple[int, int]], target: memoryview, shift: int = 0) -> None:
    """Read byte ranges of a file to the same places, moved by ``shift``, in ``target``.

    SnapshotInvalid when it ends before they do.
    """
    for start, end in ranges:
        offset = start
        while offset < end:
            stop = min(offset + _CHUNK, end)
            count = os.preadv(source, [target[offset + shift : stop + shift]], offset)
            if count == 0:
                raise SnapshotInvalid("the memory image ended early: bake the template again")
            offset += count


def _shares(extents: Ranges) -> list[Ranges]:
    """The extents in about equal shares, one for each thread, cut where pieces are."""
    total = sum(end - start for start, end in extents)
    each = max(_CHUNK, -(-total // min(_THREADS, os.cpu_count() or 1)))
    shares: list[Ranges] = [[]]
    room = each
    for start, end in extents:
        at = start
        while at < end:
            if room <= 0:
                shares.append([])
                room = each
            stop = min(end, (at + room) // _CHUNK * _CHUNK + _CHUNK)
            shares[-1].append((at, stop))
            room -= stop - at
            at = stop
    return [share for share in shares if share]


# ── sums ─────────────────────────────────────────────────────────────────────────────────────────


def sums_of(fd: int, size: int) -> bytes:
    """The sums of a memory of ``size`` bytes: 4 for every 64 KiB, zero for zeros, so that holes and zeros are one."""
    return sums_with(array.array("I", bytes(size // SUM_CHUNK * 4)).tobytes(), fd, fd, data_extents(fd, size))


def sums_with(sums: bytes, base: int, changed: int, ranges: Ranges) -> bytes:
    """The sums of the memory ``base``, which are ``sums``, once its ``ranges`` are as they are in ``changed``."""
    found = _parse(sums, len(sums) // 4 * SUM_CHUNK)
    chunk = memoryview(bytearray(SUM_CHUNK))
    pending = iter(ranges)
    start, end = next(pending, (0, 0))
    for number in _chunks_of(ranges):
        first = number * SUM_CHUNK
        if base != changed:
            read_ranges(base, [(first, first + SUM_CHUNK)], chunk, -first)
            while start < first + SUM_CHUNK and start < end:
                read_ranges(changed, [(max(start, first), min(end, first + SUM_CHUNK))], chunk, -first)
                if end > first + SUM_CHUNK:
                    break
                start, end = next(pending, (0, 0))
        else:
            read_ranges(changed, [(first, first + SUM_CHUNK)], chunk, -first)
        found[number] = _sum(chunk)
    return _little_endian(found).tobytes()


def _parse(sums: bytes, size: int) -> "array.array[int]":
    if len(sums) != size // SUM_CHUNK * 4:
        raise SnapshotInvalid("the sums of a memory image are cut short: bake the template again")
    found = array.array("I")
    found.frombytes(sums)
    return _little_endian(found)


def _require_data(expected: "array.array[int]", extents: Ranges) -> None:
    """What shall not be zero must be there at all."""
    there = bytearray(len(expected))
    for number in _chunks_of(extents):
        there[number] = 1
    for number, value in enumerate(expected):
        if value and not there[number]:
            raise _damaged(number)


def _verify(piece: memoryview, offset: int, expected: "array.array[int]") -> None:
    for at in range(0, len(piece), SUM_CHUNK):
        number = (offset + at) // SUM_CHUNK
        if _sum(piece[at : at + SUM_CHUNK]) != expected[number]:
            raise _damaged(number)


def _damaged(number: int) -> SnapshotInvalid:
    return SnapshotInvalid(
        f"the memory image is damaged at byte {number * SUM_CHUNK}: it is not what was saved; "
        "remove it (and bake the template again)"
    )


def _sum(chunk: memoryview) -> int:
    return zlib.crc32(chunk) ^ _ZERO_SUM


def _chunks_of(extents: Ranges) -> Iterable[int]:
    done = 0
    for start, end in extents:
        first = max(done, start // SUM_CHUNK)
        done = max(done, -(-end // SUM_CHUNK))
        yield from range(first, done)


def _little_endian(sums: "array.array[int]") -> "array.array[int]":
    if sys.byteorder == "big":
        sums.byteswap()
    return sums
