"""Connects to the Unix sockets of a VM, however long their paths are and however busy their server is."""

import asyncio
import os
import socket
from pathlib import Path


async def connect(path: Path, *, timeout: float) -> socket.socket:
    """A connected, non-blocking socket; it may appear, or its backlog have room, only in a moment.

    Raises TimeoutError, saying what kept it back, or OSError. By hand, because asyncio's ``sock_connect`` takes
    EAGAIN (the server's backlog is full) for a connection in progress, which then never is one.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    pause = 0.001
    while True:
        try:
            return _connect_now(path)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as error:
            if loop.time() + pause > deadline:
                raise TimeoutError(f"{error.strerror} for {timeout:g} s") from None
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.05)


def _connect_now(path: Path) -> socket.socket:
    """A socket path may be longer than the 107 bytes an address holds, so name it from its directory."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock
