"""The relay of one allowed connection: both ways at once, ends passed on, never more than its share."""

import asyncio
import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmm_core.network import relay

pytestmark = pytest.mark.anyio
SIZE = 40 << 20  # more than all the socket buffers on the way hold


@contextlib.asynccontextmanager
async def relayed(
    port: int, directory: Path
) -> AsyncIterator[tuple[socket.socket, asyncio.subprocess.Process]]:
    ours, theirs = socket.socketpair()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", relay.__file__, "127.0.0.1", str(port), str(directory),
        stdin=theirs, stdout=theirs,
    )  # fmt: skip
    theirs.close()
    ours.setblocking(False)
    try:
        yield ours, process
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_two_sides_that_both_only_write_first_do_not_block_each_other(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"s" * SIZE)
        await writer.drain()
        got = await reader.read(-1)
        writer.write(b"%d" % len(got))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 16)
    async with server, relayed(server.sockets[0].getsockname()[1], tmp_path) as (guest, process):
        reader, writer = await asyncio.open_connection(sock=guest)

        async def send() -> None:
            writer.write(b"g" * SIZE)
            await writer.drain()
            writer.write_eof()

        async with asyncio.timeout(30):
            _, answer = await asyncio.gather(send(), reader.read(-1))
            assert answer == b"s" * SIZE + b"%d" % SIZE
            assert await process.wait() == 0
        writer.close()


async def test_a_destination_that_refuses_ends_the_connection(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with relayed(port, tmp_path) as (guest, process):
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(guest, 10) == b""
            assert await process.wait() == 1


async def test_a_guest_cannot_have_more_relays_than_its_share(tmp_path: Path) -> None:
    taken: list[int] = []
    try:
        for place in range(relay.LIMIT):
            fd = os.open(tmp_path / f"relay.{place}", os.O_RDWR | os.O_CREAT)
            fcntl.flock(fd, fcntl.LOCK_EX)
            taken.append(fd)
        async with relayed(1, tmp_path) as (_, process):
            assert await asyncio.wait_for(process.wait(), 10) == 1
        os.close(taken.pop())
        assert relay.take_place(str(tmp_path))
    finally:
        for fd in taken:
            os.close(fd)
