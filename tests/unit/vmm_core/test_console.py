"""The console's log: capped, slow for floods, quick at the end, and alive after a full disk."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmm_core import console, sockets
from vmm_core.console import Console

pytestmark = pytest.mark.anyio


class Port:
    """The VMM's side of a serial port."""

    def __init__(self, directory: Path) -> None:
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(str(directory / "console.sock"))
        self.listening.listen(1)
        self.listening.setblocking(False)
        self.sock = self.listening

    async def accept(self) -> None:
        self.sock, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self.listening), 5)
        self.sock.setblocking(False)

    async def say(self, data: bytes) -> None:
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), 5)


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[Port]:
    served = Port(tmp_path)
    yield served
    served.sock.close()
    served.listening.close()


async def _printed(directory: Path, words: str) -> None:
    async with asyncio.timeout(5):
        while words not in console.text(directory):
            await asyncio.sleep(0.01)


async def test_what_the_guest_prints_is_there_without_control_characters(tmp_path: Path, port: Port) -> None:
    capture = Console(tmp_path, "console.sock")
    await port.accept()
    await port.say(b"hello\x1b[2J\x07 w\xff\xfeorld\r\n\xe2\x80\xaeevil\n")
    await _printed(tmp_path, "evil")
    assert console.tail(tmp_path).startswith("hello[2J w")
    assert not set(console.tail(tmp_path)) & set("\x1b\x07\r\u202e")
    await capture.close()


async def test_a_full_disk_costs_a_gap_and_no_more(tmp_path: Path, port: Port) -> None:
    capture = Console(tmp_path, "console.sock")
    await port.accept()
    await port.say(b"before\n")
    await _printed(tmp_path, "before")
    # A directory in its place refuses every write, as a full disk does, for root too.
    (tmp_path / console.LOG).rename(tmp_path / "kept")
    (tmp_path / console.LOG).mkdir()
    await port.say(b"lost\n")
    await asyncio.sleep(0.1)
    (tmp_path / console.LOG).rmdir()
    (tmp_path / "kept").rename(tmp_path / console.LOG)
    await port.say(b"after\n")
    await _printed(tmp_path, "after")
    text = console.text(tmp_path)
    assert "before" in text
    assert "lost" not in text
    assert "missing here" in text
    await capture.close()


async def test_a_real_full_disk_is_outlived(tmp_path: Path, port: Port) -> None:
    (tmp_path / console.LOG).symlink_to("/dev/full")
    capture = Console(tmp_path, "console.sock")
    await port.accept()
    await port.say(b"lost\n")
    await asyncio.sleep(0.1)
    (tmp_path / console.LOG).unlink()
    await port.say(b"found\n")
    await _printed(tmp_path, "found")
    await capture.close()


async def test_a_flood_is_slowed_and_never_outgrows_its_cap(tmp_path: Path, port: Port) -> None:
    capture = Console(tmp_path, "console.sock")
    await port.accept()
    began, sent = time.monotonic(), 0
    line = b"flood " * 10_000
    while time.monotonic() - began < 1.5:
        try:
            async with asyncio.timeout(0.1):
                await asyncio.get_running_loop().sock_sendall(port.sock, line)
                sent += len(line)
        except TimeoutError:
            continue
    kept = sum(
        (tmp_path / name).stat().st_size
        for name in (console.LOG, console.OLD_LOG)
        if (tmp_path / name).exists()
    )
    assert kept <= 2 * (console.CAP_BYTES + (16 << 10))
    assert sent < 4 * console.BYTES_PER_SECOND
    await capture.close()


async def test_at_the_end_the_rest_is_read_at_once(tmp_path: Path, port: Port) -> None:
    capture = Console(tmp_path, "console.sock")
    await port.accept()
    await port.say(b"x" * (100 << 10))
    await port.say(b"Kernel panic - not syncing: last words\n")
    port.sock.close()
    began = time.monotonic()
    await capture.finish(2.0)
    assert time.monotonic() - began < 0.3
    assert "last words" in console.tail(tmp_path)
    await capture.close()


async def test_finishing_does_not_wait_for_one_who_holds_the_port(tmp_path: Path, port: Port) -> None:
    capture = Console(tmp_path, "console.sock")
    await port.accept()
    began = time.monotonic()
    await capture.finish(0.1)
    assert time.monotonic() - began < 1.0
    await capture.close()


async def test_a_busy_server_is_connected_to_as_soon_as_it_has_room(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(tmp_path / "busy.sock"))
    listening.listen(0)
    listening.setblocking(False)
    first = await sockets.connect(tmp_path / "busy.sock", timeout=1.0)
    with pytest.raises(TimeoutError, match=r"for 0\.1 s"):
        await sockets.connect(tmp_path / "busy.sock", timeout=0.1)
    second = asyncio.create_task(sockets.connect(tmp_path / "busy.sock", timeout=5.0))
    await asyncio.sleep(0.05)
    accepted, _ = listening.accept()
    (await second).close()
    for sock in (first, accepted, listening):
        sock.close()


async def test_a_socket_may_be_far_down_and_come_late(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    coming = asyncio.create_task(sockets.connect(deep / "late.sock", timeout=5.0))
    await asyncio.sleep(0.02)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(deep, os.O_PATH)
    listening.bind(f"/proc/self/fd/{directory}/late.sock")
    listening.listen(1)
    (await coming).close()
    listening.close()
    os.close(directory)
