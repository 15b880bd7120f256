"""Captures a VM's serial console into a file that cannot grow past its cap, whatever the guest prints."""

import asyncio
import contextlib
import socket
from pathlib import Path

from vmm_core.drivers.base import short_path

CAP_BYTES = 256 << 10
# A guest that floods its console is read this slowly, and its serial port waits.
BYTES_PER_SECOND = 256 << 10
_CHUNK = 16 << 10
TAIL_BYTES = 4096
LOG, OLD_LOG = "console.log", "console.log.1"
# After this line come registers and a stack, which push it out of any short tail.
_PANIC = "Kernel panic - "


class Console:
    """Reads the console socket in ``directory`` into ``console.log``; at the cap the file becomes ``console.log.1``."""

    def __init__(self, directory: Path, socket_name: str) -> None:
        self._directory = directory
        self._task = asyncio.create_task(self._capture(socket_name), name="console")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _capture(self, socket_name: str) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
            sock.setblocking(False)
            with short_path(self._directory / socket_name) as address:
                await loop.sock_connect(sock, address)
            while data := await loop.sock_recv(sock, _CHUNK):
                self._append(data)
                await asyncio.sleep(len(data) / BYTES_PER_SECOND)

    def _append(self, data: bytes) -> None:
        path = self._directory / LOG
        with path.open("ab") as file:
            file.write(data)
            full = file.tell() >= CAP_BYTES
        if full:
            path.replace(self._directory / OLD_LOG)


def tail(directory: Path) -> str:
    """The last 4 KiB the guest printed, without control characters (the text is the guest's: hostile)."""
    data = b""
    for name in (LOG, OLD_LOG):
        with contextlib.suppress(OSError):
            data = (directory / name).read_bytes()[-TAIL_BYTES:] + data
        if len(data) >= TAIL_BYTES:
            break
    text = data[-TAIL_BYTES:].decode(errors="replace")
    return "".join(char for char in text if char.isprintable() or char == "\n")


def last_words(text: str, limit: int) -> str:
    """What of a console's tail tells most in ``limit`` characters: from a kernel's panic on, else the end of it."""
    at = text.rfind(_PANIC)
    return f"{text[at : at + limit]}…" if at >= 0 else f"…{text[-limit:]}"
