"""Who has which slot: one file a slot under /run/microvm/slots, shared by every engine of the host.

A file is created exclusively and locked (an open file description lock, so that others can ask without taking
it) for as long as its owner's process lives; the kernel drops the lock when that dies. The file stays, and says
which VM the slot is for: a VM that outlives its service keeps its slot, and the next process that adopts the VM
locks the file again. A file nobody locks belongs either to such a VM or to nobody; ``host.inhabited`` tells which.
"""

import fcntl
import os
import struct
from pathlib import Path

import msgspec

from vmm_core.errors import SlotsExhausted, SlotsUnavailable
from vmm_core.network.addresses import SLOTS

RUN_DIR = Path("/run/microvm")
_OWNER_BYTES = 4096
_WHOLE_FILE = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class _Content(msgspec.Struct):
    owner: str = ""


class Claims:
    """The slots this process holds. Claiming and writing an owner are a few operations on a memory file system."""

    def __init__(self, run_dir: Path = RUN_DIR) -> None:
        self._dir = run_dir / "slots"
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held: dict[int, int] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def new(self, count: int) -> list[int]:
        """Claim up to ``count`` free slots, lowest first. Raises SlotsExhausted when there is not one."""
        taken = set(self.numbers())
        found: list[int] = []
        for number in range(SLOTS):
            if len(found) == count:
                break
            if number not in taken and self._create(number):
                found.append(number)
        if not found and count:
            raise SlotsExhausted(
                f"all {SLOTS} network slots of this host are taken; destroy machines, or look with "
                "``microvm doctor`` for slots that nobody owns"
            )
        return found

    def take_over(self, number: int) -> bool:
        """Hold a claim whose file exists and nobody locks (or make it); False when another process holds it."""
        if number in self._held:
            return False
        return self._lock(number, os.O_CREAT)

    def owner(self, number: int) -> str | None:
        """Whom the slot is for, as written; "" for nobody yet, None when it is not claimed at all."""
        try:
            data = self._path(number).read_bytes()
        except FileNotFoundError:
            return None
        try:
            return msgspec.json.decode(data, type=_Content).owner if data else ""
        except msgspec.DecodeError:
            return ""

    def assign(self, number: int, owner: str) -> None:
        """Write down whom a held slot is for; survives this process."""
        data = msgspec.json.encode(_Content(owner))
        if len(data) > _OWNER_BYTES:
            raise SlotsUnavailable(f"slot {number}: the owner's name is longer than {_OWNER_BYTES} bytes")
        fd = self._held[number]
        # Never empty in between: the new text, then what the old one had beyond it.
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))

    def release(self, number: int) -> None:
        """Give a slot up: its file goes, then the lock."""
        fd = self._held.pop(number)
        self._path(number).unlink(missing_ok=True)
        os.close(fd)

    def leave(self) -> None:
        """Unlock all that is held and keep the files: the VMs live on."""
        while self._held:
            os.close(self._held.popitem()[1])

    def numbers(self) -> list[int]:
        """Every claimed slot of the host."""
        names = (entry.name for entry in self._dir.iterdir())
        return sorted(int(name) for name in names if name.isdecimal() and int(name) < SLOTS)

    def locked(self, number: int) -> bool:
        """Whether a living process (this one included) holds the slot."""
        if number in self._held:
            return True
        try:
            fd = os.open(self._path(number), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE)
        finally:
            os.close(fd)
        return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK

    def _create(self, number: int) -> bool:
        return self._lock(number, os.O_CREAT | os.O_EXCL)

    def _lock(self, number: int, flags: int) -> bool:
        path = self._path(number)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        except FileExistsError:
            return False
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
            # A reaper may have removed the file between our open and our lock.
            if not _same(fd, path):
                raise BlockingIOError
        except BlockingIOError:
            os.close(fd)
            return False
        self._held[number] = fd
        return True

    def _path(self, number: int) -> Path:
        return self._dir / str(number)


def _same(fd: int, path: Path) -> bool:
    mine = os.fstat(fd)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
