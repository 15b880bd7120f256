"""Guest memory as files: fresh ones for a boot, sparse images on disk, sealed parents that no VMM can change."""

import fcntl
import mmap
import os
from pathlib import Path

from vmm_core.disk import data_extents
from vmm_core.errors import SnapshotInvalid

# The name of the mapping in /proc/PID/smaps; accounting finds guest memory by it.
MEMFD_NAME = "microvm-memory"
PAGE = 4096
_CHUNK = 1 << 20
_ZERO_CHUNK = bytes(_CHUNK)
_ZERO = memoryview(_ZERO_CHUNK)

ALL_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def fresh_memory(size: int) -> int:
    """A memfd of ``size`` bytes for a machine that boots. The caller closes the descriptor."""
    fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def save_sparse(source: int, target: Path) -> int:
    """Write the memory ``source`` to ``target`` with every zero page left out as a hole.

    Returns the bytes of data written. The machine must be stopped.
    """
    size = os.fstat(source).st_size
    written = 0
    with target.open("xb", buffering=0) as file:
        file.truncate(size)
        for start, end in data_extents(source, size):
            for offset in range(start, end, _CHUNK):
                chunk = os.pread(source, min(_CHUNK, end - offset), offset)
                if chunk != _ZERO_CHUNK[: len(chunk)]:
                    written += _write_pages(file.fileno(), chunk, offset)
        os.fsync(file.fileno())
    return written


def _write_pages(fd: int, chunk: bytes, offset: int) -> int:
    """Write the runs of non-zero pages of ``chunk`` at ``offset``; returns the bytes written."""
    view = memoryview(chunk)
    written = 0
    run = None
    for position in range(0, len(chunk) + PAGE, PAGE):
        page = view[position : position + PAGE]
        if len(page) > 0 and page != _ZERO[: len(page)]:
            run = position if run is None else run
        elif run is not None:
            os.pwrite(fd, view[run:position], offset + run)
            written += position - run
            run = None
    return written


def load_sealed(image: Path, size: int) -> int:
    """Load a memory image into a memfd that nobody can write, grow, shrink or unseal any more.

    Clones map it privately: its pages are shared until written. The caller closes the descriptor;
    the pages live as long as any VMM maps them. Raises SnapshotInvalid when the image has another size.
    """
    fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with image.open("rb", buffering=0) as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise SnapshotInvalid(
                    f"memory image {image} has {actual} bytes where its manifest says {size}: bake the template again"
                )
            os.ftruncate(fd, size)
            with mmap.mmap(fd, size) as mapping, memoryview(mapping) as view:
                for start, end in data_extents(file.fileno(), size):
                    _read_into(file.fileno(), view, start, end)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, ALL_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read_into(fd: int, view: memoryview, start: int, end: int) -> None:
    offset = start
    while offset < end:
        count = os.preadv(fd, [view[offset : min(offset + _CHUNK, end)]], offset)
        if count == 0:
            raise SnapshotInvalid("the memory image ended early: bake the template again")
        offset += count
