"""The service's end of ``builder_process.py``: starts it when first needed, and again when it ended."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from vmm_core.errors import SlotsUnavailable

MAX_AT_ONCE = 32
_START_SECONDS = 20.0
_SECONDS = 5.0
_SECONDS_EACH = 1.0
MAX_MESSAGE = 1 << 16
_ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    "from vmm_core.network.builder_process import main; main(int(sys.argv[2]))"
)


class Request(msgspec.Struct):
    do: str
    numbers: list[int]
    mbit: int = 0


class Reply(msgspec.Struct):
    """``done`` are the slots served, one descriptor each where the request gives any; ``failed`` says why not."""

    done: list[int] = []
    failed: dict[int, str] = {}
    fatal: str = ""


class _BuilderEnded(SlotsUnavailable):
    """The process is gone, by no fault of the request."""


class Builder:
    """Lays and tears out slots in a process of its own. One request at a time; each has a deadline."""

    _environment: ClassVar[dict[str, str]] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the process ahead of the first request. Raises SlotsUnavailable when it can not work here."""
        async with self._turn:
            await self._ensure()

    async def build(self, numbers: Sequence[int]) -> tuple[dict[int, int], dict[int, str]]:
        """Lay slots: number → descriptor of its tap, and number → why it failed."""
        reply, fds = await self._call(Request("build", list(numbers)))
        return dict(zip(reply.done, fds, strict=True)), reply.failed

    async def remove(self, numbers: Sequence[int]) -> None:
        """Tear slots out, gone or not, and make the kernel forget their connections."""
        for start in range(0, len(numbers), MAX_AT_ONCE):
            await self._call(Request("remove", list(numbers[start : start + MAX_AT_ONCE])))

    async def limit(self, number: int, mbit: int) -> None:
        """Limit both directions of a slot to ``mbit`` Mbit/s; 0 lifts the limit."""
        reply, _ = await self._call(Request("limit", [number], mbit))
        _expect(reply, number, "its bandwidth can not be limited")

    async def ipv6(self, number: int) -> None:
        """Give a slot IPv6 as well, and announce it to the guest (again, when it has it)."""
        reply, _ = await self._call(Request("ipv6", [number]))
        _expect(reply, number, "it can not have IPv6")

    async def tap(self, number: int) -> int:
        """A new descriptor of the slot's tap (it must not be open elsewhere)."""
        reply, fds = await self._call(Request("tap", [number]))
        _expect(reply, number, "its tap can not be opened")
        return fds[0]

    async def close(self) -> None:
        """End the process; what it laid stays."""
        async with self._turn:
            await self._end()

    async def _call(self, request: Request) -> tuple[Reply, list[int]]:
        async with self._turn:
            if self._process is not None and self._process.poll() is not None:
                await self._end()  # killed while it had nothing to do
            try:
                return await self._ask(request)
            except _BuilderEnded:
                # Every request may be made twice: what the first try left is found and replaced.
                return await self._ask(request)

    async def _ask(self, request: Request) -> tuple[Reply, list[int]]:
        channel = await self._ensure()
        try:
            async with asyncio.timeout(_SECONDS + _SECONDS_EACH * len(request.numbers)):
                channel.send(msgspec.json.encode(request))
                return await self._receive(channel)
        except BaseException as error:
            # Also when cancelled: the answer of this request must not be taken for the next one's.
            await self._end()
            what = f"the slot builder did not {request.do} {len(request.numbers)} slots"
            if isinstance(error, (ConnectionError, TimeoutError, msgspec.DecodeError)):
                kind = _BuilderEnded if isinstance(error, ConnectionError) else SlotsUnavailable
                raise kind(f"{what} ({error or 'no answer in time'}); it is started again") from error
            raise

    async def _ensure(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            self._socket = ours
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, str(_ROOT), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=self._environment,
            )
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._receive(ours)
        except BaseException as error:
            await self._end()
            if isinstance(error, (OSError, TimeoutError)):
                raise SlotsUnavailable(
                    f"the slot builder did not start: {error or 'no answer in time'}"
                ) from error
            raise
        return ours

    @staticmethod
    async def _receive(channel: socket.socket) -> tuple[Reply, list[int]]:
        loop = asyncio.get_running_loop()
        readable = loop.create_future()
        loop.add_reader(channel, lambda: readable.done() or readable.set_result(None))
        try:
            await readable
        finally:
            loop.remove_reader(channel)
        data, fds, _, _ = socket.recv_fds(channel, MAX_MESSAGE, MAX_AT_ONCE)
        try:
            if not data:
                raise _BuilderEnded("the slot builder ended; see the kernel's log for a reason")
            reply = msgspec.json.decode(data, type=Reply)
            if reply.fatal:
                raise SlotsUnavailable(f"the slot builder failed: {reply.fatal}")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        for fd in fds:
            os.set_inheritable(fd, False)
        return reply, fds

    async def _end(self) -> None:
        channel, process = self._socket, self._process
        self._socket = self._process = None
        if channel is not None:
            channel.close()
        if process is None:
            return
        # It ends by itself when the channel closes; a request under way is finished first.
        for _ in range(100):
            if process.poll() is not None:
                return
            await asyncio.sleep(0.02)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)


def _expect(reply: Reply, number: int, what: str) -> None:
    if number not in reply.done:
        raise SlotsUnavailable(f"slot {number}: {what}: {reply.failed.get(number, 'no reason given')}")
