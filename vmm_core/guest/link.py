"""One connection to a guest agent: frames in and out, bounded, with a guest that may be hostile.

    open ──byte stream ends──► lost (ChannelClosed)
    open ──guest breaks the protocol──► lost (GuestProtocolError); the connection is aborted
    open ──close()──► lost (ChannelClosed)

Every frame has to bring something on: answer a pending request or move a stream forward. Frames that do not
(garbage, leftovers of an earlier connection, repetitions) are dropped on a budget, and a flood ends the link.
Frames that do are worked on by turns: a guest with much to say is not read while its turn is over, so that its
bytes wait in the guest and other guests' links go on (limits.py).

A link holds at most MAX_HELD bytes of input that nobody has asked for, and UNSENT_BYTES of output.
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
from vmm_core.guest.limits import Budget, Share, next_stop

T = TypeVar("T", bound=msgspec.Struct)
Receiver = Callable[[int, bytes], bool]  # (frame type, payload) → whether it brought something on

_SETTLE_SECONDS = 0.02
UNSENT_BYTES = 8 << 20  # a guest that reads nothing at all
READ_BYTES = 256 << 10  # most that asyncio's transports hand over at once
MAX_HELD = READ_BYTES + wire.MAX_ENCODED  # what is not looked at yet, and the beginning of a frame
LET_GO = 512  # streams nobody listens to any more that are remembered

_ENCODER = msgspec.json.Encoder()
_VERDICT = msgspec.json.Decoder(wire.Verdict)


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

    def __init__(self, share: Share | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = wire.Decoder()
        self._input = b""  # received; looked at up to ``_seen``
        self._seen = 0
        self._share = share or Share(self._loop.time())
        self._resting: asyncio.TimerHandle | None = None
        self._budget = Budget(self._loop.time())
        self._pending: dict[int, tuple[Callable[[bytes], None], Callable[[GuestError], None]]] = {}
        self._next = secrets.randbelow(1 << 30) << 2
        self._counted = (0, 0)
        self._writable = asyncio.Event()
        self._writable.set()
        self._held: bytearray | None = None
        self.streams: dict[int, Receiver] = {}
        self._let_go: dict[int, int] = {}  # stream nobody listens to any more → bytes it may still bring
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
        if self.error is None:
            self._input = self._input[self._seen :] + data
            self._seen = 0
            if self._resting is None:
                self._take_turn()

    def _take_turn(self) -> None:
        """Look at input until the turn is over; nothing is read while some is left or the guest has to wait."""
        self._resting = None
        self._share.begin()
        try:
            while self._seen < len(self._input) and self.error is None:
                start, self._seen = self._seen, next_stop(self._input, self._seen)
                self._look_at(self._input[start : self._seen])
                if self._share.over:
                    break
        except GuestProtocolError as error:
            self.fail(error)
        if self.error is not None:
            return
        if self._seen == len(self._input):
            self._input, self._seen = b"", 0
        pause = self._share.end(self._loop.time())
        if self._input or pause:
            self._resting = self._loop.call_later(pause, self._take_turn)
        self._read_or_wait()

    def _read_or_wait(self) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._resting is None and self._held is None:
            transport.resume_reading()
        else:
            transport.pause_reading()

    def _look_at(self, data: bytes) -> None:
        decoder = self._decoder
        frames = decoder.feed(data)
        if (decoder.bad, decoder.garbage) != self._counted:
            bad, garbage = self._counted
            self._counted = decoder.bad, decoder.garbage
            # what is not even a broken frame costs a look all the same
            self._waste(max(decoder.bad - bad, 1), decoder.garbage - garbage)
        for kind, stream, payload in frames:
            if not self._dispatch(kind, stream, payload):
                self._waste(1, len(payload))

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
            return self._drop(kind, stream, payload) if receiver is None else receiver(kind, payload)
        return False

    def let_go(self, stream: int, room: int) -> None:
        """Listen to a stream no more; the ``room`` bytes the guest may still send are not held against it."""
        self.streams.pop(stream, None)
        if room > 0:
            self._let_go[stream] = room
            if len(self._let_go) > LET_GO:
                del self._let_go[next(iter(self._let_go))]

    def _drop(self, kind: int, stream: int, payload: bytes) -> bool:
        """Whether this was to be expected of a stream that was let go."""
        room = self._let_go.pop(stream, 0)
        size = len(payload) - wire.OFFSET.size
        if kind == wire.DATA and 0 < size < room:
            self._let_go[stream] = room - size
        return 0 < room >= size

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
        if self._held is None and self._transport is not None and not self._transport.is_closing():
            self._held = bytearray()
            self._read_or_wait()
            deadline = self._loop.time() + _SETTLE_SECONDS
            while _unread(self._transport) and self._loop.time() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def release(self) -> None:
        held, self._held = self._held, None
        if self._transport is not None and not self._transport.is_closing():
            self._read_or_wait()
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
        self._input, self._seen = b"", 0
        if self._resting is not None:
            self._resting.cancel()
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
