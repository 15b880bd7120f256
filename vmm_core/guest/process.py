"""A command in the guest, as the host drives it: its outputs, its input, its end.

Nothing the guest sends is believed without a check: offsets have to continue where the last byte ended,
at most WINDOW unconsumed bytes may come, and nothing after the end.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Literal

import msgspec

from vmm_core.errors import ChannelClosed, GuestProtocolError, GuestTimeout
from vmm_core.guest import wire
from vmm_core.guest.link import Link, offset_of, printable
from vmm_core.machine import ExecResult, Output

StreamName = Literal["stdout", "stderr"]

PIECE = 64 << 10  # largest piece of output handed out
LEAST = 4 << 10  # bytes of input in a frame, but for the last
ACK_EVERY = wire.WINDOW // 4
GRACE = 10.0  # seconds the host waits longer than the agent should
SEGMENTS = 256  # of remembered interleaving of stdout and stderr

_EXIT = msgspec.json.Decoder(wire.Exit)


class Inflow:
    """Bytes of one stream from the guest: in order, at most WINDOW of them unconsumed."""

    def __init__(self, link: Link, stream: int, changed: asyncio.Event) -> None:
        self._link = link
        self._stream = stream
        self._changed = changed
        self._buffer = bytearray()
        self._start: int | None = None  # offset of the buffer's first byte; None: nothing was promised yet
        self._acked = 0
        self.ended = False

    @property
    def offset(self) -> int:
        return self._start or 0

    @property
    def size(self) -> int:
        return len(self._buffer)

    @property
    def expected(self) -> int:
        """Bytes the guest may still send without another acknowledgement."""
        return 0 if self.ended else wire.WINDOW - (self.offset + len(self._buffer) - self._acked)

    def begin(self, offset: int) -> None:
        self._start = self._acked = offset

    def on_frame(self, kind: int, payload: bytes) -> bool:
        offset = offset_of(payload)
        if self._start is None or self.ended:
            raise GuestProtocolError("the guest sent stream data before the start or after the end")
        received = self._start + len(self._buffer)
        if offset != received:
            raise GuestProtocolError(f"the guest's stream jumps from offset {received} to {offset}")
        if kind == wire.EOF:
            self.ended = True
        elif kind == wire.DATA:
            size = len(payload) - wire.OFFSET.size
            if received + size - self._acked > wire.WINDOW:
                raise GuestProtocolError("the guest sent more than its window allows")
            if size == 0:
                return False
            self._buffer += memoryview(payload)[wire.OFFSET.size :]
        else:
            return False
        self._changed.set()
        return True

    def take(self, limit: int) -> bytes:
        data = bytes(self._buffer[:limit])
        del self._buffer[: len(data)]
        self._start = self.offset + len(data)
        return data

    def acknowledge(self) -> None:
        """What was taken is consumed. Told to the guest now and then, not for every piece."""
        if not self.ended and self.offset - self._acked >= ACK_EVERY:
            self._acked = self.offset
            self._link.send(wire.ACK, self._stream, wire.OFFSET.pack(self._acked))


class Outflow:
    """Bytes of one stream to the guest: at most WINDOW of them unacknowledged."""

    def __init__(self, link: Link, stream: int, changed: asyncio.Event) -> None:
        self._link = link
        self._stream = stream
        self._changed = changed
        self._acked = 0
        self.sent = 0
        self.ended = False

    @property
    def room(self) -> int:
        return wire.WINDOW - (self.sent - self._acked)

    def begin(self, sent: int, acked: int) -> None:
        if not 0 <= acked <= sent <= acked + 2 * wire.WINDOW:
            raise GuestProtocolError("the guest's account of a command's input is impossible")
        self.sent, self._acked = sent, acked

    def on_ack(self, payload: bytes) -> bool:
        offset = offset_of(payload)
        if offset > self.sent:
            raise GuestProtocolError(f"the guest acknowledges byte {offset} of {self.sent}")
        if offset <= self._acked:
            return False
        self._acked = offset
        self._changed.set()
        return True

    def push(self, data: memoryview) -> memoryview:
        """Send what there is room for; answers the rest.

        A guest that acknowledges byte by byte does not get frames of a byte.
        """
        count = min(self.room, wire.CHUNK, len(data))
        if count > 0 and (count == len(data) or count >= LEAST):
            self._link.send(wire.DATA, self._stream, wire.OFFSET.pack(self.sent) + data[:count])
            self.sent += count
            return data[count:]
        return data

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._link.send(wire.EOF, self._stream, wire.OFFSET.pack(self.sent))


class Process:
    """A command in the guest. Made by ``Channel.start`` and ``Channel.attach``.

    ``output`` is for one consumer. ``timeout`` is the command's own; the agent ends it then, and the
    host stops waiting GRACE seconds later in case the agent does not.
    """

    def __init__(self, link: Link, exec_id: str, *, timeout: float | None = None) -> None:
        self.id = exec_id
        self.pid = 0
        self.stream = link.number()
        self._link = link
        self._changed = asyncio.Event()
        self._flows: dict[StreamName, Inflow] = {
            "stdout": Inflow(link, self.stream + wire.STDOUT, self._changed),
            "stderr": Inflow(link, self.stream + wire.STDERR, self._changed),
        }
        self._order: deque[tuple[StreamName, int]] = deque()
        self._stdin: Outflow | None = None
        self._exit: wire.Exit | None = None
        self._timeout = timeout
        self._deadline: float | None = None
        link.streams[self.stream + wire.STDIN] = self._on_control
        link.streams[self.stream + wire.STDOUT] = self._receiver("stdout")
        link.streams[self.stream + wire.STDERR] = self._receiver("stderr")
        link.waiters.add(self._changed)

    # -------------------------------------------------------- what the guest sends

    def begin(self, attached: wire.Attached, stdout: int | None, stderr: int | None) -> None:
        """The agent's answer to start or attach; ``None`` accepts any offset."""
        if stdout not in (None, attached.stdout) or stderr not in (None, attached.stderr):
            raise GuestProtocolError("the guest goes on at another offset than was asked for")
        self.pid = attached.pid
        self._flows["stdout"].begin(attached.stdout)
        self._flows["stderr"].begin(attached.stderr)
        if attached.stdin is not None:
            self._stdin = Outflow(self._link, self.stream + wire.STDIN, self._changed)
            self._stdin.begin(attached.stdin, attached.stdin_written or 0)
        if self._timeout is not None:
            self._deadline = asyncio.get_running_loop().time() + self._timeout + GRACE

    def _receiver(self, name: StreamName) -> Callable[[int, bytes], bool]:
        flow = self._flows[name]

        def receive(kind: int, payload: bytes) -> bool:
            before = flow.size
            useful = flow.on_frame(kind, payload)
            if flow.size > before:
                self._remember(name, flow.size - before)
            return useful

        return receive

    def _remember(self, name: StreamName, size: int) -> None:
        """Keep the order of arrival, coarser when it would cost too much memory."""
        order = self._order
        for back in (1, 2) if len(order) >= SEGMENTS else (1,):
            if order and order[-back][0] == name:
                order[-back] = name, order[-back][1] + size
                return
        order.append((name, size))

    def _on_control(self, kind: int, payload: bytes) -> bool:
        if kind == wire.ACK and self._stdin is not None:
            return self._stdin.on_ack(payload)
        if kind != wire.EXIT or self._exit is not None:
            return False
        try:
            self._exit = _EXIT.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise GuestProtocolError(f"malformed exit of a command: {printable(str(error))}") from None
        self._changed.set()
        return True

    # -------------------------------------------------------- what the caller does

    async def output(self) -> AsyncIterator[Output]:
        """Pieces of both streams (≤ 64 KiB) in the order they came, until both have ended.

        Asking for the next piece acknowledges the one before, so nothing is lost if the consumer dies
        while it works on one. Not asking stops the command when its window (256 KiB a stream) is full.
        Raises what the channel was lost for; GuestTimeout when the command's time-out passed unnoticed.
        """
        while True:
            piece = self._next_piece()
            if piece is not None:
                yield piece
                if self._link.error is None:
                    self._flows[piece.stream].acknowledge()
            elif all(flow.ended for flow in self._flows.values()):
                return
            else:
                await self._change()

    def _next_piece(self) -> Output | None:
        if not self._order:
            return None
        name, size = self._order.popleft()
        flow = self._flows[name]
        if size > PIECE:
            self._order.appendleft((name, size - PIECE))
        offset = flow.offset
        return Output(name, offset, flow.take(min(size, PIECE)))

    async def write(self, data: bytes) -> None:
        """Into the command's input. What comes after its end is dropped, as a closed pipe would."""
        flow = self._stdin
        if flow is None or flow.ended:
            raise ChannelClosed(f"{self.id} was started without input, or its input was closed")
        rest = memoryview(data)
        while rest and self._exit is None:
            before = len(rest)
            rest = flow.push(rest)
            await self._link.drain()
            if len(rest) == before:
                await self._change()

    async def close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.end()

    async def wait(self, *, timeout: float | None = None) -> ExecResult:
        """How the command ended (no output). Raises GuestTimeout after ``timeout`` s; it runs on then."""
        try:
            async with asyncio.timeout(timeout):
                while self._exit is None:
                    await self._change()
        except TimeoutError:
            raise GuestTimeout(f"{self.id} has not ended within {timeout:g} s") from None
        end = self._exit
        return ExecResult(code=end.code, signal=end.signal, timed_out=end.timed_out)

    async def kill(self, signal: int = 9) -> None:
        """9 ends everything the command started, others go to its process group."""
        await self._link.ask(wire.KillRequest(self.id, signal), wire.Done, GRACE)

    async def forget(self) -> None:
        """The agent may drop the ended command's status and output. Raises GuestRefused while it runs."""
        await self._link.ask(wire.ForgetRequest(self.id), wire.Done, GRACE)
        self.release()

    async def collect(self, *, max_bytes: int = 8 << 20, timeout: float | None = None) -> ExecResult:
        """All output and the end, then forget. Keeps ``max_bytes`` of both streams together, reads on and
        drops the rest (``truncated``). After ``timeout`` s the command is killed and ``timed_out`` is set."""
        kept: dict[StreamName, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        dropped = late = False

        async def read() -> None:
            nonlocal dropped
            async for piece in self.output():
                room = max_bytes - len(kept["stdout"]) - len(kept["stderr"])
                kept[piece.stream].extend(piece.data[: max(room, 0)])
                dropped |= len(piece.data) > room

        try:
            async with asyncio.timeout(timeout):
                await read()
                result = await self.wait()
        except TimeoutError:
            late = True
            await self.kill()
            try:
                async with asyncio.timeout(GRACE):
                    result = await self.wait()
                    await read()
            except TimeoutError:
                raise GuestTimeout(f"{self.id} was killed and has not ended within {GRACE:g} s") from None
        await self.forget()
        return ExecResult(
            code=124 if late else result.code,
            stdout=bytes(kept["stdout"]),
            stderr=bytes(kept["stderr"]),
            signal=result.signal,
            timed_out=late or result.timed_out,
            truncated=dropped,
        )

    def release(self) -> None:
        """Take no more frames for this command. Its output stops the command once its window is full."""
        self._link.let_go(self.stream + wire.STDIN, wire.WINDOW)  # its end, acknowledgements
        self._link.let_go(self.stream + wire.STDOUT, self._flows["stdout"].expected)
        self._link.let_go(self.stream + wire.STDERR, self._flows["stderr"].expected)
        self._link.waiters.discard(self._changed)

    async def _change(self) -> None:
        """Wait for anything to happen. Raises what the link was lost for, GuestTimeout at the deadline."""
        self._link.check()
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._changed.wait()
        except TimeoutError:
            raise GuestTimeout(
                f"{self.id}: the guest did not end it within its {self._timeout:g} s + {GRACE:g} s"
            ) from None
        self._link.check()
