"""A client of the QEMU Machine Protocol: commands in, answers out, what the VMM says by itself kept; all of it bounded.

    open ── the VMM ends, says what is no QMP, or reads nothing ──► failed ──► closed
    open ── close() ──► closed

Source: QEMU's qmp-spec.txt. The connection stays open as long as the VM lives, and a VMM may have been taken over
by its guest, so what it sends is untrusted: one message is at most 256 KiB; the last 32 events are kept, each cut to
a line; and it is read at the pace of a token bucket (a message costs its bytes and 256 more), so that a flood waits
in the VMM's own socket and costs us a thousand messages a second. An idle monitor costs nothing. Every command
has a deadline.
"""

import asyncio
import json
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from vmm_core import sockets
from vmm_core.errors import VmmProtocolError
from vmm_core.machine import VmEvent

MESSAGE_LIMIT = 256 << 10
EVENTS_KEPT = 32
NAME_LIMIT, DETAIL_LIMIT = 64, 240
BURST_BYTES = 1 << 20
BYTES_PER_SECOND = 256 << 10
MESSAGE_COST = 256
_UNSENT_LIMIT = 256 << 10
_LAST_WORDS = 32 << 10
_PAUSE_SECONDS = 0.25

Json = dict[str, Any]
OnEvent = Callable[[str, Json], None]


class Qmp(asyncio.Protocol):
    """One QMP connection. ``send`` queues a command without waiting, ``execute`` waits for its answer.

    ``on_event`` hears every event's name and data as they come (both untrusted), within the pace above.
    """

    def __init__(self, sock: socket.socket, on_event: OnEvent | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_event = on_event
        self._transport: asyncio.Transport | None = None
        self._next_id = 0
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._failure: str | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._events: deque[VmEvent] = deque(maxlen=EVENTS_KEPT)
        self._buffer = bytearray()
        self._searched = 0
        self._allowance = float(BURST_BYTES)
        self._paid_at = self._loop.time()
        self._resuming: asyncio.TimerHandle | None = None
        self._last = False

    @classmethod
    async def connect(cls, path: Path, *, on_event: OnEvent | None = None, timeout: float = 10.0) -> "Qmp":
        """Connect to a listening socket; the greeting is not waited for, commands may be pipelined."""
        try:
            sock = await sockets.connect(path, timeout=timeout)
        except OSError as error:
            raise VmmProtocolError(f"no connection to QEMU's monitor: {error}") from error
        try:
            _, qmp = await asyncio.get_running_loop().create_unix_connection(
                lambda: cls(sock, on_event), sock=sock
            )
        except BaseException:
            sock.close()
            raise
        return qmp

    @property
    def events(self) -> tuple[VmEvent, ...]:
        """The last events, oldest first; the same one in a row is kept once, with its latest time."""
        return tuple(self._events)

    def send(self, command: str, **arguments: Any) -> asyncio.Future[Any]:
        """Queue ``command``; the future holds its ``return`` value or VmmProtocolError."""
        future: asyncio.Future[Any] = self._loop.create_future()
        # Answers nobody waits for must not be reported as forgotten exceptions.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._failure is not None or self._transport is None:
            future.set_exception(VmmProtocolError(f"QEMU's monitor is closed: {self._failure}"))
            return future
        self._next_id += 1
        message: Json = {"execute": command, "id": self._next_id}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._pending[self._next_id] = future
        self._transport.write(json.dumps(message).encode() + b"\n")
        if self._transport.get_write_buffer_size() > _UNSENT_LIMIT:
            self._fail("it does not read what it is sent")
        return future

    async def execute(self, command: str, *, timeout: float = 10.0, **arguments: Any) -> Any:
        """Run ``command``; its ``return`` value. VmmProtocolError on an error, silence or a closed monitor."""
        try:
            async with asyncio.timeout(timeout):
                return await self.send(command, **arguments)
        except TimeoutError:
            raise VmmProtocolError(f"QEMU did not answer {command} within {timeout:.0f} s") from None

    async def lend(self, name: str, fd: int) -> None:
        """Hand a descriptor to QEMU, which knows it as ``name`` from then on (``getfd``)."""
        await self._hand(fd, "getfd", {"fdname": name})

    async def add(self, fd: int) -> int:
        """Hand a descriptor to QEMU, which can open it as ``/dev/fdset/N``; N is returned (``add-fd``)."""
        answer = await self._hand(fd, "add-fd", {})
        number = cast("Json", answer).get("fdset-id") if isinstance(answer, dict) else None
        if not isinstance(number, int):
            raise VmmProtocolError("QEMU did not say where it put a descriptor")
        return number

    async def _hand(self, fd: int, command: str, arguments: Json) -> Any:
        """A command with a descriptor (SCM_RIGHTS); its ``return`` value."""
        request = json.dumps({"execute": command, "arguments": arguments, "id": 0}).encode()
        answer = self._loop.create_future()
        try:
            async with asyncio.timeout(10):
                while self._transport is not None and self._transport.get_write_buffer_size():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                if self._failure is not None:
                    raise VmmProtocolError(f"QEMU's monitor is closed: {self._failure}")
                self._pending[0] = answer
                # Past the transport's buffer, which is empty now: only the socket itself can carry descriptors.
                socket.send_fds(self._sock, [request + b"\n"], [fd])
                return await answer
        except TimeoutError:
            raise VmmProtocolError("QEMU did not take a descriptor within 10 s") from None
        except OSError as error:
            raise VmmProtocolError(f"QEMU did not take a descriptor: {error.strerror}") from error

    async def last_words(self, timeout: float) -> None:
        """The VMM has ended: read what it left in the socket, of a flood only the end, for at most ``timeout``."""
        self._last = True
        if self._resuming is not None:
            self._resuming.cancel()
            self._resume()
        await asyncio.wait({self._ended}, timeout=timeout)

    async def close(self) -> None:
        self._fail("closed")
        await asyncio.wait({self._ended}, timeout=1.0)

    # ── what comes in ────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.send("qmp_capabilities")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._last:
            self._work()
        elif len(self._buffer) > 2 * _LAST_WORDS:
            self._forget_early_words()

    def eof_received(self) -> None:
        """The last words are worked off past the pace: they tell most, and they are few."""
        self._last = True
        self._forget_early_words()
        self._work()

    def _forget_early_words(self) -> None:
        if len(self._buffer) > _LAST_WORDS:
            start = self._buffer.find(b"\n", len(self._buffer) - _LAST_WORDS)
            del self._buffer[: start + 1 or len(self._buffer)]
            self._searched = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(str(exc) if exc is not None else "the connection ended")
        if not self._ended.done():
            self._ended.set_result(None)

    def _work(self) -> None:
        """Take whole messages from the buffer as long as the allowance lasts; then stop reading for a moment."""
        self._earn()
        while self._failure is None and (self._last or self._allowance > 0):
            end = self._buffer.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._buffer)
                if self._searched > MESSAGE_LIMIT:
                    self._fail(f"a message of more than {MESSAGE_LIMIT >> 10} KiB")
                return
            self._allowance -= end + MESSAGE_COST
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            self._take(line)
        if self._failure is None and self._resuming is None and self._transport is not None:
            self._transport.pause_reading()
            self._resuming = self._loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._resuming = None
        if self._transport is not None and self._failure is None:
            self._transport.resume_reading()
            if not self._last:
                self._work()

    def _earn(self) -> None:
        now = self._loop.time()
        self._allowance = min(float(BURST_BYTES), self._allowance + (now - self._paid_at) * BYTES_PER_SECOND)
        self._paid_at = now

    def _take(self, line: bytes) -> None:
        try:
            self._receive(msgspec.json.decode(line))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            self._fail("a message that is no JSON, or none that can be read")

    def _receive(self, message: object) -> None:
        if not isinstance(message, dict):
            self._fail("a message that is no object")
            return
        answer = cast("Json", message)
        if "event" in answer:
            self._note(answer["event"], answer.get("data"))
            return
        number = answer.get("id")
        future = self._pending.pop(number, None) if type(number) is int else None
        if future is None or future.done():
            return
        if "return" in answer:
            future.set_result(answer["return"])
        else:
            what = printable(answer.get("error", "without a reason"), 300)
            future.set_exception(VmmProtocolError(f"QEMU refused: {what}"))

    def _note(self, name: object, data: object) -> None:
        facts = cast("Json", data) if isinstance(data, dict) else {}
        event = VmEvent(time.time(), printable(name, NAME_LIMIT), _detail(facts))
        if self._events and (self._events[-1].name, self._events[-1].detail) == (event.name, event.detail):
            self._events.pop()
        self._events.append(event)
        if self._on_event is not None and isinstance(name, str):
            self._on_event(name, facts)

    def _fail(self, why: str) -> None:
        if self._failure is not None:
            return
        self._failure = why
        if self._resuming is not None:
            self._resuming.cancel()
        self._buffer.clear()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(VmmProtocolError(f"QEMU's monitor closed: {why}"))
        if self._transport is not None:
            self._transport.abort()


def printable(value: object, limit: int) -> str:
    """``value`` in at most ``limit`` characters of one line, without control characters."""
    # Cut before it is looked at: the value may be large, and repr of a nested one larger.
    text = value[:limit] if isinstance(value, str) else str(value)[:limit]
    return "".join(char if char.isprintable() else "?" for char in text)


def _detail(facts: Json) -> str:
    """The plain facts of an event as ``key=value``; what is nested or too long is left out."""
    words: list[str] = []
    length = 0
    for key, value in list(facts.items())[:16]:
        if not isinstance(value, str | int | float):
            continue
        shown = str(value).lower() if isinstance(value, bool) else value
        word = f"{printable(key, 40)}={printable(shown, 120)}"
        length += len(word) + 1
        if length > DETAIL_LIMIT:
            break
        words.append(word)
    return " ".join(words)
