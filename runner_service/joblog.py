"""The log of one runner: both output streams in one capped file, resumable to the byte after a crash.

Beside ``<runner>.log`` stands ``<runner>.pos``: the file's size and both stream offsets before the piece being
written, and which stream that piece is of. It is written first. So after SIGKILL at any moment the file's size says
how much of the last piece arrived, and the offsets to continue from are exact: no gap, no byte twice.

A full disk costs the log what did not fit, never the job. The service's log says so once; the job's own log says it
where the gap is, if there is room again before it ends.
"""

import asyncio
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import structlog

from vmm_core.machine import Output

log = structlog.get_logger("joblog")
_POSITION = struct.Struct("<QQQB")
_STREAMS = ("stdout", "stderr")
_READ = 64 << 10
_GAP = b"\n[output is missing here: the host's disk was full]\n"


class JobLog:
    """The writing side.

    ``offsets`` are the bytes of each stream that are done with: in the file, past its cap, or lost to a full disk.
    """

    def __init__(self, path: Path, *, limit: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = path
        self.limit = limit
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags | os.O_APPEND, 0o600)
        self._position = os.open(path.with_suffix(".pos"), flags, 0o600)
        self.size = os.fstat(self._file).st_size
        self.offsets = self._recover()
        self._changed = asyncio.Event()
        self.closed = False
        self.failed = False
        self._gap = False

    def append(self, piece: Output) -> bytes:
        """Write a piece of output; what of it was new is returned. Past the cap it is counted and dropped."""
        if self.closed:
            # The descriptor's number may be another file's by now.
            return b""
        known = self.offsets[piece.stream]
        data = piece.data[max(0, known - piece.offset) :] if piece.offset < known else piece.data
        if not data:
            return b""
        start = max(known, piece.offset)
        self.offsets[piece.stream] = start
        stream = _STREAMS.index(piece.stream)
        self._tell_gap(stream)
        room = self.limit - self.size
        if not self._note(stream):
            self._gap = True
        elif room > 0:
            self._write(data[:room])
            if len(data) > room:
                self._write(f"\n[truncated: this log is capped at {self.limit} bytes]\n".encode())
        self.offsets[piece.stream] = start + len(data)
        if len(data) > room:
            self._note(stream)
        self._wake()
        return data

    def close(self) -> None:
        """End of the log: followers read to its end and stop."""
        if not self.closed:
            self._tell_gap(0)
            self.closed = True
            os.close(self._file)
            os.close(self._position)
            self._wake()

    async def changed(self, timeout: float) -> None:
        """Wait for the next piece, the end of the log, or ``timeout`` seconds."""
        event = self._changed
        if self.closed:
            return
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    def _write(self, data: bytes) -> None:
        """Append; what a full disk does not take is a gap."""
        rest = memoryview(data)
        try:
            while rest:
                written = os.write(self._file, rest)
                self.size += written
                rest = rest[written:]
        except OSError as error:
            self._gap = True
            self._fail(error)

    def _tell_gap(self, stream: int) -> None:
        """Say where output is missing. Noted as if it stood there already: it is none of the stream's bytes."""
        if self._gap and self.size < self.limit and self._note(stream, len(_GAP)):
            self._gap = False
            self._write(_GAP)

    def _note(self, stream: int, ahead: int = 0) -> bool:
        """Write down where we are, ``ahead`` bytes on; False when the disk does not take even that."""
        record = _POSITION.pack(self.size + ahead, self.offsets["stdout"], self.offsets["stderr"], stream)
        try:
            os.pwrite(self._position, record, 0)
        except OSError as error:
            self._fail(error)
            return False
        return True

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            log.warning("joblog_not_written", path=self.path.name, error=error.strerror)
        self.failed = True

    def _recover(self) -> dict[str, int]:
        record = os.pread(self._position, _POSITION.size, 0)
        if len(record) < _POSITION.size:
            # Nothing was ever noted: whatever the file holds is not ours to account for.
            return {"stdout": 0, "stderr": 0}
        size, stdout, stderr, stream = _POSITION.unpack(record)
        offsets = {"stdout": stdout, "stderr": stderr}
        offsets[_STREAMS[stream]] += max(0, self.size - size)
        return offsets


class JobLogs:
    """All logs of one data directory: ``<directory>/<runner>.log``."""

    def __init__(self, directory: Path, *, limit: int) -> None:
        self.directory = directory
        self.limit = limit
        self._open: dict[str, JobLog] = {}
        self._opened = asyncio.Event()
        self.ending = False

    def open(self, runner_id: str) -> JobLog:
        """The log to write to; the same one while it is open."""
        joblog = self._open.get(runner_id)
        if joblog is None or joblog.closed:
            joblog = self._open[runner_id] = JobLog(self.path(runner_id), limit=self.limit)
            event, self._opened = self._opened, asyncio.Event()
            event.set()
        return joblog

    def close(self, runner_id: str) -> None:
        joblog = self._open.pop(runner_id, None)
        if joblog is not None:
            joblog.close()

    def end(self) -> None:
        """The service stops: followers end now."""
        self.ending = True
        for runner_id in list(self._open):
            self.close(runner_id)
        self._opened.set()

    async def opened(self, timeout: float) -> None:
        """Wait until any runner's log begins, or ``timeout`` seconds."""
        event = self._opened
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            return

    def path(self, runner_id: str) -> Path:
        return self.directory / f"{runner_id}.log"

    def remove(self, runner_id: str) -> None:
        """Forget a log that is no longer kept."""
        self.close(runner_id)
        for suffix in (".log", ".pos"):
            self.path(runner_id).with_suffix(suffix).unlink(missing_ok=True)

    def prune(self, before: float) -> None:
        """Remove logs last written before ``before`` (Unix seconds)."""
        for path in self.directory.glob("*.log"):
            if path.stem not in self._open and path.stat().st_mtime < before:
                self.remove(path.stem)

    async def read(self, runner_id: str, *, offset: int = 0, follow: bool = False) -> AsyncIterator[bytes]:
        """The bytes of a log from ``offset`` on; with ``follow`` until the runner has ended."""
        path = self.path(runner_id)
        while True:
            joblog = self._open.get(runner_id)
            pieces = _pieces(path, offset)
            for piece in pieces:
                offset += len(piece)
                yield piece
            if pieces:
                continue
            if not follow or joblog is None or joblog.closed:
                return
            if joblog.size <= offset:
                await joblog.changed(15.0)


def _pieces(path: Path, offset: int) -> list[bytes]:
    """What can be read now, at most 16 pieces at once so that one reader does not hold up everything else."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            pieces = [file.read(_READ) for _ in range(16)]
    except FileNotFoundError:
        return []
    return [piece for piece in pieces if piece]
