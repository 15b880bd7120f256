"""One connection to a guest agent: frames in and out, bounded, with a guest that may be hostile.

    open ──byte stream ends──► lost (ChannelClosed)
    open ──guest breaks the protocol──► lost (GuestProtocolError); the connection is aborted
    open ──close()──► lost (ChannelClosed)

Every frame has to bring something on: answer a pending request or move a stream forward. Frames that do not
(garbage, leftovers of an earlier connection, repetitions) are dropped on a budget, and a flood ends the link.
"""

import asyncio
import fcntl
import secrets
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from vmm_core import sockets
from vmm_core.errors import (
    BadRequest,
    ChannelClosed,
    GuestError,
    GuestProtocolError,
    GuestRefused,
    GuestTimeout,
)
from vmm_core.guest import wire

T = TypeVar("T", bound=msgspec.Struct)
Receiver = Callable[[int, bytes], bool]  # (frame type, payload) → whether it brought something on

USELESS_FRAMES = 512  # a second, and at most so many at once
USELESS_BYTES = 2 << 20
_SETTLE_SECONDS = 0.02
UNSENT_BYTES = 8 << 20  # a guest that reads nothing at all

_ENCODER = msgspec.json.Encoder()
_VERDICT = msgspec.json.Decoder(wire.Verdict)


class Budget:
    """How much useless input is tolerated: a token bucket of frames and one of bytes."""

    def __init__(self, now: float) -> None:
        self._then = now
        self._frames = float(USELESS_FRAMES)
        self._bytes = float(USELESS_BYTES)
        self.frames = 0
        self.bytes = 0

    def spend(self, now: float, frames: int, size: int) -> None:
        passed, self._then = now - self._then, now
        self._frames = min(USELESS_FRAMES, self._frames + passed * USELESS_FRAMES) - frames
        self._bytes = min(USELESS_BYTES, self._bytes + passed * USELESS_BYTES) - size
        self.frames += frames
        self.bytes += size
        if self._frames < 0 or self._bytes < 0:
            raise GuestProtocolError(
                f"the guest floods its channel: {self.frames} useless frames, {self.bytes} useless bytes"
            )


def offset_of(payload: bytes) -> int:
    if len(payload) < wire.OFFSET.size:
        raise GuestProtocolError("the guest sent a stream frame without an offset")
    offset: int = wire.OFFSET.unpack_from(payload)[0]
    return offset


def printable(text: str, limit: int = 300) -> str:
    """Text a guest made up, fit for a log line."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


class Link(asyncio.Protocol):
    """The connection itself. Requests and streams are numbered afresh from a random start."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = wire.Decoder()
        self._budget = Budget(self._loop.time())
        self._pending: dict[int, tuple[Callable[[bytes], None], Callable[[GuestError], None]]] = {}
        self._next = secrets.randbelow(1 << 30) << 2
        self._counted = (0, 0)
        self._writable = asyncio.Event()
        self._writable.set()
        self._held: bytearray | None = None
        self.streams: dict[int, Receiver] = {}
        self.waiters: set[asyncio.Event] = set()  # set when the link is lost
        self.error: GuestError | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @property
    def useless(self) -> tuple[int, int]:
        """Frames and bytes dropped so far."""
        return self._budget.frames, self._budget.bytes

    def check(self) -> None:
        """Raise what the link was lost for, if it was."""
        if self.error is not None:
            raise fresh(self.error)

    # -------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # What a Unix socket gives; other loops' transports share its methods, not its class.
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(ChannelClosed("the byte stream to the guest ended" + (f": {exc}" if exc else "")))
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        if self.error is not None:
            return
        decoder = self._decoder
        try:
            frames = decoder.feed(data)
            if (decoder.bad, decoder.garbage) != self._counted:
                bad, garbage = self._counted
                self._counted = decoder.bad, decoder.garbage
                self._waste(decoder.bad - bad, decoder.garbage - garbage)
            for kind, stream, payload in frames:
                if not self._dispatch(kind, stream, payload):
                    self._waste(1, len(payload))
        except GuestProtocolError as error:
            self.fail(error)

    # -------------------------------------------------------- frames

    def _waste(self, frames: int, size: int) -> None:
        self._budget.spend(self._loop.time(), frames, size)

    def _dispatch(self, kind: int, stream: int, payload: bytes) -> bool:
        if kind == wire.REPLY:
            pending = self._pending.get(stream)
            if pending is None:
                return False
            pending[0](payload)  # if it raises, the request stays pending and gets the link's error
            del self._pending[stream]
            return True
        if kind in (wire.DATA, wire.EOF, wire.ACK, wire.EXIT):
            receiver = self.streams.get(stream)
            return receiver is not None and receiver(kind, payload)
        return False

    def send(self, kind: int, stream: int, payload: bytes) -> None:
        """Queue one frame. Raises what the link was lost for."""
        self.check()
        if self._transport is None or self._transport.is_closing():
            raise ChannelClosed("the channel to the guest is closed")
        if self._transport.get_write_buffer_size() + len(self._held or b"") > UNSENT_BYTES:
            error = GuestProtocolError(f"the guest has not read {UNSENT_BYTES >> 20} MiB of requests")
            self.fail(error)
            raise error
        frame = wire.encode(kind, stream, payload)
        if self._held is None:
            self._transport.write(frame)
        else:
            self._held += frame

    async def drain(self) -> None:
        """Wait until the transport takes more; the caller sets the deadline."""
        if not self._writable.is_set():
            await self._writable.wait()
            self.check()

    async def hold(self) -> None:
        """Until ``release`` nothing more goes to the guest, and nothing is taken from it.

        Its port is a queue in its memory that the VMM writes to even while the machine is stopped: a copy of that
        memory is whole only while nothing moves. Returns when the VMM has read what was sent before, or soon.
        """
        if self._held is None and self._transport is not None:
            self._held = bytearray()
            self._transport.pause_reading()
            deadline = self._loop.time() + _SETTLE_SECONDS
            while _unread(self._transport) and self._loop.time() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def release(self) -> None:
        held, self._held = self._held, None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
            if held:
                self._transport.write(bytes(held))

    # -------------------------------------------------------- requests

    def number(self) -> int:
        """Four numbers in a row that this connection has not used lately; the first of them."""
        self._next = (self._next + 4) & 0xFFFFFFFC
        return self._next

    def submit(
        self, request: wire.Message, reply: type[T], accept: Callable[[T], None] | None = None
    ) -> asyncio.Future[T]:
        """Send a request. The future holds its reply, or GuestRefused, or what the link was lost for.

        ``accept`` runs at once when the reply comes, before any later frame is looked at.
        """
        name = str(request.__struct_config__.tag)
        payload = encode_request(name, request)
        number = self.number()
        future: asyncio.Future[T] = self._loop.create_future()

        def answer(content: bytes) -> None:
            outcome = decode_reply(name, content, reply)
            if future.done():
                return
            if isinstance(outcome, GuestRefused):
                future.set_exception(outcome)
                return
            if accept is not None:
                accept(outcome)
            future.set_result(outcome)

        def lose(error: GuestError) -> None:
            if not future.done():
                future.set_exception(error)

        self.send(wire.REQUEST, number, payload)
        self._pending[number] = answer, lose
        future.add_done_callback(lambda _: self._pending.pop(number, None))
        return future

    async def ask(
        self,
        request: wire.Message,
        reply: type[T],
        timeout: float,
        accept: Callable[[T], None] | None = None,
    ) -> T:
        """``submit`` and wait. Raises GuestTimeout as well."""
        future = self.submit(request, reply, accept)
        try:
            async with asyncio.timeout(timeout):
                await self.drain()
                return await future
        except TimeoutError:
            name = str(request.__struct_config__.tag)
            raise GuestTimeout(f"{name}: no answer from the guest within {timeout:g} s") from None
        finally:
            abandon(future)

    # -------------------------------------------------------- the end

    def fail(self, error: GuestError) -> None:
        """Lose the link for this reason, at once and for everybody who waits."""
        self._lose(error)
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Lose the link after what is queued has gone out."""
        self._lose(ChannelClosed("the channel to the guest was closed"))
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _lose(self, error: GuestError) -> None:
        if self.error is not None:
            return
        self.error = error
        for _, lose in tuple(self._pending.values()):
            lose(fresh(error))
        self._pending.clear()
        self._writable.set()
        for event in self.waiters:
            event.set()


def fresh(error: GuestError) -> GuestError:
    """The same error once more: one exception object must not be raised in two tasks."""
    return type(error)(*error.args)


def abandon(future: asyncio.Future[T]) -> None:
    """The caller does not wait any more, and no "exception was never retrieved" shall be logged."""
    if not future.cancel() and not future.cancelled():
        future.exception()


def _unread(transport: asyncio.Transport) -> bool:
    """Whether something sent has not been read at the other end (SIOCOUTQ; unix(7))."""
    sock = transport.get_extra_info("socket")
    if sock is None or transport.get_write_buffer_size():
        return sock is not None
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return False
    return int.from_bytes(answer, sys.byteorder) > 0


def encode_request(name: str, request: wire.Message) -> bytes:
    try:
        payload = _ENCODER.encode(request)
    except (TypeError, ValueError) as error:  # a lone surrogate, an integer out of range
        raise BadRequest(f"{name}: cannot be put into a request: {type(error).__name__}") from None
    if len(payload) > wire.MAX_PAYLOAD:
        raise BadRequest(
            f"{name}: the request has {len(payload)} bytes and {wire.MAX_PAYLOAD} are possible; "
            "put long arguments into a file"
        )
    return payload


def decode_reply(name: str, payload: bytes, reply: type[T]) -> T | GuestRefused:
    try:
        verdict = _VERDICT.decode(payload)
        if verdict.ok:
            return msgspec.json.decode(payload, type=reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise GuestProtocolError(f"{name}: the guest's reply is malformed: {printable(str(error))}") from None
    return GuestRefused(f"{printable(verdict.error, 40)}: {printable(verdict.message)}")


async def connect(path: Path, timeout: float) -> Link:
    """Connect to the agent's socket, which may appear only in a moment. Or ChannelClosed, GuestTimeout."""
    try:
        sock = await sockets.connect(path, timeout=timeout)
    except TimeoutError as error:
        raise GuestTimeout(f"connecting to {path.name}: {error}") from None
    except OSError as error:
        raise ChannelClosed(f"connecting to {path.name}: {error.strerror}") from None
    _, link = await asyncio.get_running_loop().create_unix_connection(Link, sock=sock)
    return link
