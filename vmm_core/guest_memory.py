"""The memory of a running machine, read from outside: what its VMM has of its own, and the file all else is in.

A clone maps its parent's sealed memory privately, so a page it wrote is an anonymous page of its VMM, which
/proc/PID/pagemap tells (Linux Documentation/admin-guide/mm/pagemap.rst). A machine that booted writes to its
file itself. The VMM may have been taken over by its guest: what /proc tells of it is checked before it is used.
"""

import array
import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Generator
from pathlib import Path

from vmm_core.disk import data_extents
from vmm_core.errors import VmDied, VmmProtocolError
from vmm_core.memory import (
    MEMFD_NAME,
    PAGE,
    Ranges,
    copy_data,
    copy_ranges,
    fresh_memory,
    in_shares,
    seal,
    write_changes,
)

_IOVECS = 1024  # IOV_MAX
_BATCH_BYTES = 1 << 20  # in one call: a buffer that stays in the processor's cache
# The top byte of a pagemap entry: bit 63 present, bit 62 swapped, bit 61 a page of a file or shared memory.
_PRIVATE = bytes(int(bool(top & 0xC0) and not top & 0x20) for top in range(256))
_RUN = re.compile(b"\x01+")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...([ps]) ([0-9a-f]+) \S+ (\d+)\s+/memfd:" + MEMFD_NAME)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class GuestMemory:
    """The memory of the machine that the VMM ``pid`` runs. ``file`` is the memfd that it maps.

    ``shared``: the machine writes to the file itself (it booted); else to pages of its own.
    """

    def __init__(
        self, pid: int, size: int, file: int, areas: tuple[tuple[int, int, int], ...], shared: bool
    ) -> None:
        self.pid = pid
        self.size = size
        self.file = file
        self.shared = shared
        self._areas = areas  # (offset in the memory, length, address in the VMM)

    @classmethod
    @contextlib.contextmanager
    def of(cls, pid: int, size: int) -> Generator["GuestMemory"]:
        """Find it. Raises VmDied when the VMM is gone, VmmProtocolError when it maps something else than it should."""
        try:
            areas, inode, shared = _areas(pid, size)
            file = _open_mapped(pid, inode, size)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise VmDied(f"the VMM {pid} ended while its memory was looked for") from error
        except PermissionError as error:
            raise VmmProtocolError(
                f"the memory of the VMM {pid} cannot be read: {error.strerror}; run as root"
            ) from error
        try:
            yield cls(pid, size, file, areas, shared)
        finally:
            os.close(file)

    def changes(self) -> Ranges:
        """What the file alone does not tell a copy made earlier: private pages, or all data of a shared file."""
        if self.shared:
            return data_extents(self.file, self.size)
        found: Ranges = []
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            for offset, length, address in self._areas:
                entries = os.pread(pagemap.fileno(), length // PAGE * 8, address // PAGE * 8)
                if len(entries) != length // PAGE * 8:
                    raise VmDied(f"the VMM {self.pid} ended while its pages were counted")
                for run in _RUN.finditer(entries[7::8].translate(_PRIVATE)):
                    found.append((offset + run.start() * PAGE, offset + run.end() * PAGE))
        return found

    def private_bytes(self) -> int:
        return sum(end - start for start, end in self.changes())

    def copy(self, ranges: Ranges, target: int) -> None:
        """Copy ``ranges`` to the same places in the file ``target``. Of one instant only while it is stopped."""
        if self.shared:
            copy_ranges(self.file, target, ranges)
        else:
            in_shares(ranges, lambda share: self._copy_private(share, target))

    def copy_changes(self, ranges: Ranges, image: int) -> Ranges:
        """Bring ``image``, which has what the file holds, up to this memory: pages of ``ranges`` that differ.

        A page the machine wrote and that is as before is not written, one of zeros becomes a hole. Returns what was
        different. Of one instant only while it is stopped.
        """
        found: Ranges = []
        with mmap.mmap(self.file, self.size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as base:

            def work(share: Ranges) -> None:
                for start, piece in self._pieces(share):
                    found.extend(write_changes(image, piece, start, base))

            in_shares(ranges, work)
        return sorted(found)

    def _copy_private(self, ranges: Ranges, target: int) -> None:
        for start, piece in self._pieces(ranges):
            os.pwrite(target, piece, start)

    def _pieces(self, ranges: Ranges) -> Generator[tuple[int, memoryview]]:
        """What the machine has at each place; a piece is good until the next is asked for."""
        buffer = bytearray(_BATCH_BYTES)
        view = memoryview(buffer)
        place = ctypes.c_char.from_buffer(buffer)
        for batch in _batches(ranges):
            self._read(batch, ctypes.addressof(place))
            at = 0
            for start, end in batch:
                yield start, view[at : at + end - start]
                at += end - start

    def _read(self, batch: Ranges, target: int) -> None:
        """Read ranges one behind the other to the address ``target`` (process_vm_readv(2))."""
        size = sum(end - start for start, end in batch)
        ours, theirs = array.array("Q", (target, size)), array.array("Q")
        for start, end in batch:
            theirs.extend((self._address(start), end - start))
        got = _libc.process_vm_readv(
            ctypes.c_int(self.pid),
            ctypes.c_void_p(ours.buffer_info()[0]), ctypes.c_ulong(1),
            ctypes.c_void_p(theirs.buffer_info()[0]), ctypes.c_ulong(len(batch)),
            ctypes.c_ulong(0),
        )  # fmt: skip
        if got != size:
            why = os.strerror(ctypes.get_errno()) if got < 0 else f"{got} of {size} bytes"
            raise VmmProtocolError(f"the memory of the VMM {self.pid} cannot be read: {why}")

    def _address(self, offset: int) -> int:
        for start, length, address in self._areas:
            if start <= offset < start + length:
                return address + offset - start
        raise VmmProtocolError(f"the VMM {self.pid} maps nothing at {offset:#x} of its memory")


class Copy:
    """A copy of a machine's memory in the making: ``before`` the pause what its file holds, ``during`` it the rest.

    ``image``: a file, open, that has the first part already; only what differs is written. Else it is a memfd.
    ``ranges`` are what ``during`` has written. The descriptor is this one's until ``finished``.
    """

    def __init__(self, memory: GuestMemory, image: int | None = None) -> None:
        self._memory = memory
        self._sparse = image is not None
        self._fd = fresh_memory(memory.size) if image is None else image
        self.ranges: Ranges = []

    def before(self) -> None:
        copy_data(self._memory.file, self._fd, self._memory.size)

    def during(self) -> None:
        ranges = self._memory.changes()
        if self._sparse:
            self.ranges = self._memory.copy_changes(ranges, self._fd)
        else:
            self._memory.copy(ranges, self._fd)
            self.ranges = ranges

    def finished(self) -> int:
        """The whole copy, sealed when it is a memfd; its descriptor is the caller's."""
        if not self._sparse:
            seal(self._fd)
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _areas(pid: int, size: int) -> tuple[tuple[tuple[int, int, int], ...], int, bool]:
    found: list[tuple[int, int, int]] = []
    kinds: set[tuple[int, str]] = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = _LINE.match(line)
        if match is not None:
            start, end, offset = int(match[1], 16), int(match[2], 16), int(match[4], 16)
            found.append((offset, end - start, start))
            kinds.add((int(match[5]), match[3]))
    found.sort()
    whole = [0, *(offset + length for offset, length, _ in found)] == [*(at for at, _, _ in found), size]
    if len(kinds) != 1 or not whole:
        raise VmmProtocolError(
            f"the VMM {pid} does not map its machine's memory once and whole: destroy that VM"
        )
    ((inode, kind),) = kinds
    return tuple(found), inode, kind == "s"


def _open_mapped(pid: int, inode: int, size: int) -> int:
    """The mapped memfd, through a descriptor the VMM holds of it."""
    directory = Path(f"/proc/{pid}/fd")
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if not str(entry.readlink()).startswith(f"/memfd:{MEMFD_NAME}"):
                continue
            fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(fd)
            if (status.st_ino, status.st_size) == (inode, size):
                return fd
            os.close(fd)
    raise VmmProtocolError(
        f"the VMM {pid} holds no descriptor of its machine's memory: it cannot be forked live"
    )


def _batches(ranges: Ranges) -> Generator[Ranges]:
    """Ranges cut into calls: at most _IOVECS of them and _BATCH_BYTES in all."""
    batch: Ranges = []
    room = _BATCH_BYTES
    for first, end in ranges:
        start = first
        while start < end:
            stop = min(end, start + room)
            batch.append((start, stop))
            room -= stop - start
            start = stop
            if room == 0 or len(batch) == _IOVECS:
                yield batch
                batch, room = [], _BATCH_BYTES
    if batch:
        yield batch
