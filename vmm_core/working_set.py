"""How much memory a fork of each template really comes to need, learned from those that ended.

One JSON file in the data directory, shared by every process that uses it: read and replaced as a whole under a lock,
so a crash leaves the old one or the new one. A file that cannot be read is as good as none, and is written anew.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Generator
from pathlib import Path

import msgspec

FILE, LOCK = "working_sets.json", "working_sets.lock"
TEMPLATES_KEPT = 256
READINGS_KEPT = 64
# Fewer than these say too little: the nominal size is promised.
READINGS_NEEDED = 5
# What a fork is promised above what 95 of 100 like it needed.
MARGIN, MARGIN_MIB = 1.25, 32
_KEY_CHARS = 128
_FILE_LIMIT = 4 << 20
_MOST_MIB = 1 << 24


class Learned(msgspec.Struct, frozen=True):
    """Of one template: the most private memory (MiB, guest and VMM) of its last ended forks, oldest first."""

    peaks_mib: tuple[int, ...]
    updated_at: float


class WorkingSets:
    """The working sets of one data directory. All methods block for as long as a small file takes."""

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir
        self._seen: tuple[int, int] | None = None
        self._learned: dict[str, Learned] = {}

    def need_mib(self, template: str, nominal_mib: int) -> int:
        """What one more fork of ``template`` is expected to take of the host's memory; never more than nominal."""
        learned = self._current().get(template[:_KEY_CHARS])
        if learned is None or len(learned.peaks_mib) < READINGS_NEEDED:
            return nominal_mib
        return min(nominal_mib, int(percentile(learned.peaks_mib, 0.95) * MARGIN) + MARGIN_MIB)

    def learn(self, template: str, peak_bytes: int) -> None:
        """A fork of ``template`` ended that had at most so much memory of its own. Raises OSError on a full disk."""
        if peak_bytes <= 0:
            return  # it was never read
        peak = min(_MOST_MIB, -(-peak_bytes >> 20))
        with self._locked():
            known = dict(_read(self._directory / FILE))
            before = known.get(template[:_KEY_CHARS])
            peaks = (*(before.peaks_mib if before is not None else ()), peak)[-READINGS_KEPT:]
            known[template[:_KEY_CHARS]] = Learned(peaks, time.time())
            newest = sorted(known.items(), key=lambda one: one[1].updated_at)[-TEMPLATES_KEPT:]
            draft = self._directory / f".{FILE}"
            draft.write_bytes(msgspec.json.encode(dict(newest)))
            draft.replace(self._directory / FILE)

    def _current(self) -> dict[str, Learned]:
        """What the file says; read again only when it is another one."""
        with contextlib.suppress(OSError):
            stat = (self._directory / FILE).stat()
            if (stat.st_ino, stat.st_mtime_ns) != self._seen:
                self._learned = _read(self._directory / FILE)
                self._seen = (stat.st_ino, stat.st_mtime_ns)
        return self._learned

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        fd = os.open(self._directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def percentile(values: tuple[int, ...], share: float) -> int:
    """The smallest of ``values`` that at least ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def _read(path: Path) -> dict[str, Learned]:
    with contextlib.suppress(OSError, msgspec.MsgspecError, ValueError, RecursionError):
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(_FILE_LIMIT), type=dict[str, Learned])
        return {
            name: one
            for name, one in found.items()
            if one.peaks_mib and all(0 < peak <= _MOST_MIB for peak in one.peaks_mib)
        }
    return {}
