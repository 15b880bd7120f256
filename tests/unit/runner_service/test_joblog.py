"""The job log: no gap and no byte twice, whenever the writer is killed; capped; readable while it grows."""

import asyncio
import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_service import joblog
from runner_service.joblog import JobLog, JobLogs
from vmm_core.machine import Output

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Cut(Exception):
    """The writer was killed here."""


class DyingLog(JobLog):
    """Dies in the middle of its n-th write, after some of the bytes."""

    def __init__(self, path: Path, *, limit: int, dies_at: int, after: int) -> None:
        super().__init__(path, limit=limit)
        self.left = dies_at
        self.after = after

    def _write(self, data: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            super()._write(data[: self.after])
            raise Cut
        super()._write(data)


pieces = st.lists(
    st.tuples(st.sampled_from(("stdout", "stderr")), st.binary(min_size=1, max_size=20)), max_size=20
)


@settings(max_examples=60, deadline=None)
@given(pieces, st.integers(1, 20), st.integers(0, 20))
async def test_killed_in_the_middle_of_any_write_both_streams_go_on_exactly(
    tmp_path_factory: pytest.TempPathFactory, output: list[tuple[str, bytes]], dies_at: int, after: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "r.log"
    whole = {
        name: b"".join(data for stream, data in output if stream == name) for name in ("stdout", "stderr")
    }
    first = DyingLog(path, limit=1 << 20, dies_at=dies_at, after=after)
    sent = {"stdout": 0, "stderr": 0}
    written = b""
    try:
        for stream, data in output:
            first.append(Output(stream, sent[stream], data))  # pyright: ignore
            sent[stream] += len(data)
            written += data
    except Cut:
        pass
    second = JobLog(path, limit=1 << 20)
    # The guest sends on from where the new writer says; counting both, nothing is lost or doubled.
    assert second.offsets["stdout"] + second.offsets["stderr"] == path.stat().st_size
    for stream in ("stdout", "stderr"):
        rest = whole[stream][second.offsets[stream] :]
        if rest:
            second.append(Output(stream, second.offsets[stream], rest))  # pyright: ignore
    second.close()
    assert sorted(path.read_bytes()) == sorted(whole["stdout"] + whole["stderr"])
    assert path.read_bytes().startswith(written[: path.stat().st_size])


def append(log: JobLog, data: bytes, stream: str = "stdout") -> None:
    log.append(Output(stream, log.offsets[stream], data))  # pyright: ignore


async def test_a_piece_sent_again_is_written_once(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "r.log", limit=100)
    log.append(Output("stdout", 0, b"hello "))
    log.append(Output("stdout", 0, b"hello "))
    log.append(Output("stdout", 3, b"lo world"))
    assert (tmp_path / "r.log").read_bytes() == b"hello world"


async def test_a_log_is_capped_and_says_so_once(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "r.log", limit=10)
    for _ in range(5):
        append(log, b"123456")
    log.close()
    text = (tmp_path / "r.log").read_bytes()
    assert text.startswith(b"1234561234") and text.count(b"truncated") == 1
    again = JobLog(tmp_path / "r.log", limit=10)
    assert again.offsets["stdout"] == 30
    append(again, b"more")
    assert (tmp_path / "r.log").read_bytes() == text


async def test_a_full_disk_costs_the_log_a_told_gap_and_never_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = JobLog(tmp_path / "r.log", limit=1000)
    write, pwrite, room, told = os.write, os.pwrite, [8], []

    def full(fd: int, data: bytes) -> int:
        if fd != log._file:
            return write(fd, data)
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(joblog.os, "write", full)
    monkeypatch.setattr(joblog.log, "warning", lambda *_, **more: told.append(more))
    append(log, b"12345")
    append(log, b"67890")
    append(log, b"lost")
    assert log.offsets["stdout"] == 14 and len(told) == 1
    room[0] = 500
    append(log, b"back", "stderr")
    text = (tmp_path / "r.log").read_bytes()
    assert text.startswith(b"12345678\n[output is missing") and text.endswith(b"]\nback")
    # After a crash now, both streams go on where they were.
    assert JobLog(tmp_path / "r.log", limit=1000).offsets == log.offsets == {"stdout": 14, "stderr": 4}

    def nothing(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(joblog.os, "pwrite", nothing)
    append(log, b"nor this")
    monkeypatch.setattr(joblog.os, "pwrite", pwrite)
    log.close()
    assert (tmp_path / "r.log").read_bytes().count(b"missing here") == 2 and len(told) == 1


async def test_a_closed_log_writes_nothing_more(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "r.log", limit=10)
    log.close()
    # Its descriptor's number may be another file's by now.
    victim = (tmp_path / "victim").open("wb")
    log.append(Output("stdout", 0, b"stray"))
    victim.close()
    assert (tmp_path / "victim").read_bytes() == b""


async def test_following_sees_everything_until_the_end(tmp_path: Path) -> None:
    logs = JobLogs(tmp_path, limit=1 << 20)
    log = logs.open("r")
    append(log, b"one\n")
    seen: list[bytes] = []

    async def follow() -> None:
        seen.extend([piece async for piece in logs.read("r", follow=True)])

    task = asyncio.create_task(follow())
    for text in (b"two\n", b"three\n"):
        await asyncio.sleep(0.01)
        append(log, text, "stderr")
    await asyncio.sleep(0.01)
    append(log, b"four\n")
    logs.close("r")
    await asyncio.wait_for(task, 2)
    assert b"".join(seen) == b"one\ntwo\nthree\nfour\n"
    assert [piece async for piece in logs.read("r", offset=4)] == [b"two\nthree\nfour\n"]
    assert [piece async for piece in logs.read("unknown", follow=True)] == []


async def test_old_logs_are_pruned_but_not_open_ones(tmp_path: Path) -> None:
    logs = JobLogs(tmp_path, limit=100)
    append(logs.open("open"), b"x")
    append(logs.open("old"), b"x")
    logs.close("old")
    logs.prune(before=1e12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["open.log", "open.pos"]
