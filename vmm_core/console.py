"""Captures a VM's serial console into a file that cannot grow past its cap, whatever the guest prints."""

import asyncio
import contextlib
from pathlib import Path

from vmm_core import sockets

CAP_BYTES = 256 << 10
# A guest that floods its console is read this slowly, and its serial port waits.
BYTES_PER_SECOND = 256 << 10
_CHUNK = 16 << 10
TAIL_BYTES = 4096
LOOKBACK_BYTES = 64 << 10
LOG, OLD_LOG = "console.log", "console.log.1"
# After this line come registers and a stack, which push it out of any short tail.
_PANIC = "Kernel panic - "
_CONNECT_SECONDS = 10.0
_GAP = b"\n[console output is missing here: the host's disk was full]\n"


class Console:
    """Reads the console socket in ``directory`` into ``console.log``; at the cap the file becomes ``console.log.1``.

    A full disk costs the log what did not fit, and goes on as soon as there is room.
    """

    def __init__(self, directory: Path, socket_name: str) -> None:
        self._directory = directory
        self._gap = False
        self._hurry = asyncio.Event()
        self._task = asyncio.create_task(self._capture(socket_name), name="console")

    async def finish(self, timeout: float) -> None:
        """The VMM has ended: read what it left in the socket without a pause, but no longer than ``timeout``."""
        self._hurry.set()
        await asyncio.wait({self._task}, timeout=timeout)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _capture(self, socket_name: str) -> None:
        try:
            sock = await sockets.connect(self._directory / socket_name, timeout=_CONNECT_SECONDS)
        except OSError:  # or the time-out: a VM without a console is a VM still
            return
        loop = asyncio.get_running_loop()
        with sock, contextlib.suppress(OSError):
            while data := await loop.sock_recv(sock, _CHUNK):
                self._append(data)
                await self._pause(len(data) / BYTES_PER_SECOND)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    def _append(self, data: bytes) -> None:
        path = self._directory / LOG
        try:
            with path.open("ab", buffering=0) as file:
                if self._gap:
                    file.write(_GAP)
                    self._gap = False
                self._gap = file.write(data) < len(data)
                full = file.tell() >= CAP_BYTES
            if full:
                path.replace(self._directory / OLD_LOG)
        except OSError:
            self._gap = True


def text(directory: Path, limit: int = LOOKBACK_BYTES) -> str:
    """The last ``limit`` bytes the guest printed, without control characters (the text is the guest's: hostile)."""
    data = b""
    for name in (LOG, OLD_LOG):
        with contextlib.suppress(OSError):
            data = (directory / name).read_bytes()[-limit:] + data
        if len(data) >= limit:
            break
    found = data[-limit:].decode(errors="replace")
    return "".join(char for char in found if char.isprintable() or char == "\n")


def tail(directory: Path) -> str:
    """The last 4 KiB of ``text``."""
    return text(directory, TAIL_BYTES)


def last_words(text: str, limit: int) -> str:
    """What of a console's tail tells most in ``limit`` characters: from a kernel's panic on, else the end of it."""
    at = text.rfind(_PANIC)
    return f"{text[at : at + limit]}…" if at >= 0 else f"…{text[-limit:]}"
