"""Host programs are run with a deadline, and their failures carry their last words."""

import asyncio
import time
from pathlib import Path

import pytest

from images import commands
from images.errors import BuildFailed

pytestmark = pytest.mark.anyio


async def test_output_and_lines():
    lines: list[str] = []
    output = await commands.run(
        ["sh", "-c", "cat; echo one >&2; printf 'two\\rthree' >&2"],
        timeout=10,
        doing="x",
        stdin=b"in",
        on_line=lines.append,
    )
    assert output == b"in"
    assert lines == ["one", "two", "three"]


async def test_a_failure_names_status_and_last_lines():
    with pytest.raises(BuildFailed) as caught:
        await commands.run(["sh", "-c", "seq 100 >&2; exit 3"], timeout=10, doing="count")
    assert caught.value.message == "could not count: sh exited with status 3"
    assert caught.value.output == tuple(str(n) for n in range(81, 101))


async def test_a_missing_program_names_the_package(monkeypatch):
    monkeypatch.setattr(commands.shutil, "which", lambda *_, **__: None)
    with pytest.raises(BuildFailed, match="apt-get install e2fsprogs"):
        commands.require("mkfs.ext4")


async def test_the_deadline_takes_the_children_along(tmp_path):
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(BuildFailed, match=r"not done after 0\.3 s"):
        await commands.run(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout=0.3, doing="x")
    assert time.monotonic() - started < 5
    assert await gone(int(pid_file.read_text()))


async def test_cancelling_ends_the_program(tmp_path):
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(
        commands.run(["sh", "-c", f"echo $$ > {pid_file}; sleep 60"], timeout=60, doing="x")
    )
    for _ in range(200):
        if pid_file.exists() and pid_file.read_text():
            break
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await gone(int(pid_file.read_text()))


async def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        await asyncio.sleep(0.02)
    return False
