"""The host's side against a guest that breaks the protocol in every way it can.

The guest is played straight into the link, so that thousands of cases run in seconds. Whatever it sends,
only the engine's own errors come out, what the host holds stays bounded, and nobody waits for ever.
"""

import asyncio
import math
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_core.errors import ChannelClosed, GuestError, GuestProtocolError, GuestRefused, GuestTimeout
from vmm_core.guest import wire
from vmm_core.guest.channel import Channel, Process, Revive
from vmm_core.guest.limits import Share
from vmm_core.guest.link import Link

REVIVE = Revive("t", "h", "0" * 32)


class Wire(asyncio.Transport):
    """A transport whose other end is the test."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = wire.Decoder()
        self.sent: list[tuple[int, int, bytes]] = []
        self.aborted = False
        self.stuck = 0
        self.paused = False
        self.link: Link | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += self.decoder.feed(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.stuck

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.aborted = True
        assert self.link is not None
        asyncio.get_running_loop().call_soon(self.link.connection_lost, None)

    close = abort


class Hostile:
    """A guest under the test's control, and the channel that talks to it."""

    def __init__(self, share: Share | None = None) -> None:
        self.link = Link(share or Share(0.0, turn=math.inf, burst=math.inf))  # without pauses, for brevity
        self.wire = Wire()
        self.wire.link = self.link
        self.link.connection_made(self.wire)
        self.channel = Channel(self.link)

    def say(self, kind: int, stream: int, payload: bytes) -> None:
        self.link.data_received(wire.encode(kind, stream, payload))

    def data(self, stream: int, offset: int, data: bytes) -> None:
        self.say(wire.DATA, stream, wire.OFFSET.pack(offset) + data)

    def requests(self) -> list[tuple[int, dict[str, object]]]:
        return [
            (stream, msgspec.json.decode(payload))
            for kind, stream, payload in self.wire.sent
            if kind == wire.REQUEST
        ]

    def acks(self, stream: int) -> list[int]:
        return [
            wire.OFFSET.unpack(payload)[0]
            for kind, number, payload in self.wire.sent
            if kind == wire.ACK and number == stream
        ]

    async def started(self, name: str = "e", **options: object) -> Process:
        task = asyncio.create_task(self.channel.start(name, ["x"], **options))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        number, _ = self.requests()[-1]
        stdin = b"0" if options.get("stdin") else b"null"
        self.say(
            wire.REPLY,
            number,
            b'{"ok":true,"pid":5,"stdout":0,"stderr":0,"stdin":%s,"stdin_written":%s}' % (stdin, stdin),
        )
        return await task


def against(play: Callable[[Hostile], Awaitable[None]], share: Callable[[], Share] | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await play(Hostile(share and share()))

    asyncio.run(main())


numbers = st.one_of(st.integers(0, 12), st.integers(0, 2**32 - 1))
offsets = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1))
json_ish = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
        ["ok", "error", "message", "pid", "stdout", "stderr", "stdin", "code", "signal", "timed_out", "size",
         "agent_version", "revived", "execs", "clock_step_ns", "boot_id"]), inner, max_size=8),
    max_leaves=12,
)  # fmt: skip
payloads = st.one_of(
    st.binary(max_size=60),
    json_ish.map(msgspec.json.encode),
    st.builds(lambda offset, data: wire.OFFSET.pack(offset) + data, offsets, st.binary(max_size=40)),
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_a_guest_answers_only_our_errors_come_out(data: st.DataObject) -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started(stdin=True)
        channel = guest.channel
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(coroutine)  # type: ignore[arg-type]
            for coroutine in (
                channel.hello("t", timeout=1),
                channel.revive(REVIVE, timeout=1),
                channel.start("f", ["y"]),
                channel.attach("g", stdout_from=3),
                channel.get("/f", max_bytes=100, timeout=1),
                channel.put("/f", b"x" * 1000, timeout=1),
                process.collect(timeout=1, max_bytes=50),
            )
        ]
        await asyncio.sleep(0)
        known = sorted({stream for _, stream, _ in guest.wire.sent} | set(guest.link.streams))
        for _ in range(data.draw(st.integers(0, 12))):
            number = data.draw(st.sampled_from(known) | numbers)
            kind = data.draw(
                st.sampled_from([wire.REPLY, wire.DATA, wire.EOF, wire.ACK, wire.EXIT]) | numbers
            )
            guest.say(kind & 0xFF, number, data.draw(payloads))
            if data.draw(st.booleans()):
                guest.link.data_received(data.draw(st.binary(max_size=60)))
            if data.draw(st.booleans()):
                await asyncio.sleep(0)
        guest.link.connection_lost(None)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert not isinstance(outcome, BaseException) or isinstance(outcome, GuestError), outcome

    against(play)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_garbage_alone_never_disturbs_a_waiting_request(blocks: list[bytes]) -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.hello("t", timeout=5))
        await asyncio.sleep(0)
        for block in blocks:
            guest.link.data_received(block)
        guest.say(
            wire.REPLY, guest.requests()[0][0], b'{"ok":true,"agent_version":"1","revived":true,"execs":[]}'
        )
        assert (await task).revived

    against(play)


# ------------------------------------------------------------------ floods


def flood(guest: Hostile, block: bytes, times: int) -> bool:
    for _ in range(times):
        guest.link.data_received(block)
        if guest.wire.aborted:
            return True
    return False


@pytest.mark.parametrize(
    "block",
    [
        b"noise without an end " * 3000,
        (b"\xc0noise" * 10_000),
        wire.encode(wire.REPLY, 1, b"{}") * 1000,
        wire.encode(wire.DATA, 1, bytes(8) + b"x") * 1000,
        wire.encode(wire.EXIT, 1, b"{}") * 1000,
        wire.encode(99, 1, b"") * 1000,
        wire.encode(wire.REQUEST, 1, b'{"op":"hello"}') * 1000,
        wire.encode(wire.REPLY, 1, b"\0" * wire.MAX_PAYLOAD) * 3,
    ],
    ids=["no-end", "short-bad-frames", "replies", "data", "exits", "unknown-type", "requests", "large"],
)
def test_a_flood_ends_the_channel(block: bytes) -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.hello("t", timeout=10))
        await asyncio.sleep(0)
        assert flood(guest, block, 200)
        with pytest.raises(GuestProtocolError, match="floods"):
            await task
        with pytest.raises(GuestProtocolError):
            await guest.channel.hello("t")
        await guest.channel.wait_closed()

    against(play)


def test_repeating_what_was_valid_once_is_a_flood_too() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started(stdin=True)
        await process.write(b"x" * 100)
        guest.say(wire.ACK, process.stream, wire.OFFSET.pack(100))
        assert flood(guest, wire.encode(wire.ACK, process.stream, wire.OFFSET.pack(100)), 3000)

    against(play)


def test_leftovers_of_an_earlier_connection_are_tolerated() -> None:
    async def play(guest: Hostile) -> None:
        stale = wire.encode(wire.DATA, 1, bytes(8) + b"x" * wire.CHUNK)
        guest.link.data_received(stale[500:] + stale * 8 + wire.encode(wire.REPLY, 7, b'{"ok":true}'))
        task = asyncio.create_task(guest.channel.hello("t", timeout=5))
        await asyncio.sleep(0)
        guest.say(
            wire.REPLY, guest.requests()[0][0], b'{"ok":true,"agent_version":"1","revived":false,"execs":[]}'
        )
        assert not (await task).revived

    against(play)


# ------------------------------------------------------------------ lies about streams


Script = list[tuple[int, int, bytes]]


def out(offset: int, data: bytes) -> tuple[int, int, bytes]:
    return wire.DATA, wire.STDOUT, wire.OFFSET.pack(offset) + data


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ([out(1, b"x")], "jumps"),
        ([out(0, b"abc"), out(2, b"x")], "jumps"),
        ([out(0, b"abc"), out(0, b"abc")], "jumps"),
        ([out(2**64 - 1, b"x")], "jumps"),
        ([(wire.DATA, wire.STDOUT, b"short")], "without an offset"),
        ([(wire.EOF, wire.STDOUT, wire.OFFSET.pack(5))], "jumps"),
        ([(wire.EOF, wire.STDOUT, wire.OFFSET.pack(0)), out(0, b"x")], "after the end"),
        ([out(n * 30_000, bytes(30_000)) for n in range(9)], "window"),
        ([(wire.ACK, wire.STDIN, wire.OFFSET.pack(1))], "acknowledges byte 1 of 0"),
        ([(wire.EXIT, 0, b"")], "malformed"),
        ([(wire.EXIT, 0, b'{"code":"0","signal":null,"timed_out":false}')], "malformed"),
        ([(wire.EXIT, 0, b'{"code":99999999999999999999999,"signal":null,"timed_out":false}')], "malformed"),
        ([(wire.EXIT, 0, b"[" * 60_000)], "malformed"),
    ],
)
def test_a_lie_about_a_stream_ends_the_channel(script: Script, what: str) -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started(stdin=True)
        waiting = asyncio.create_task(process.wait())
        await asyncio.sleep(0)
        for kind, number, payload in script:
            guest.say(kind, process.stream + number, payload)
        with pytest.raises(GuestProtocolError, match=what):
            await waiting
        assert guest.wire.aborted

    against(play)


def test_data_before_the_start_was_answered_ends_the_channel() -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.start("e", ["x"]))
        await asyncio.sleep(0)
        stream = guest.requests()[0][1]["stream"]
        assert isinstance(stream, int)
        guest.data(stream + wire.STDOUT, 0, b"early")
        with pytest.raises(GuestProtocolError, match="before the start"):
            await task

    against(play)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"null",
        b"[]",
        b'{"ok":1}',
        b'{"ok":true}',
        b'{"ok":true,"agent_version":1,"revived":true,"execs":[]}',
        b'{"ok":true,"agent_version":"1","revived":"yes","execs":[]}',
        b'{"ok":true,"agent_version":"1","revived":true,"execs":[1]}',
        b'{"ok":true,"agent_version":"\xff","revived":true,"execs":[]}',
        b'{"ok":true,"x":' + b"[" * 60_000,
        b'{"ok":true,"x":' + b'{"x":' * 12_000,
        b"1" * 60_000,
    ],
)
def test_a_malformed_reply_ends_the_channel(reply: bytes) -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.hello("t", timeout=5))
        await asyncio.sleep(0)
        guest.say(wire.REPLY, guest.requests()[0][0], reply)
        with pytest.raises(GuestProtocolError, match="malformed"):
            await task

    against(play)


def test_an_attach_that_goes_on_elsewhere_ends_the_channel() -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.attach("e", stdout_from=10))
        await asyncio.sleep(0)
        reply = b'{"ok":true,"pid":1,"stdout":9,"stderr":0,"stdin":null,"stdin_written":null}'
        guest.say(wire.REPLY, guest.requests()[0][0], reply)
        with pytest.raises(GuestProtocolError, match="another offset"):
            await task

    against(play)


def test_a_get_that_sends_too_much_or_counts_wrong_ends_the_channel() -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.get("/f", max_bytes=10, timeout=5))
        await asyncio.sleep(0)
        stream = guest.requests()[0][1]["stream"]
        assert isinstance(stream, int)
        guest.data(stream, 0, b"x" * 11)
        with pytest.raises(GuestProtocolError, match="more than the 10 bytes"):
            await task

    async def count(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.get("/f", timeout=5))
        await asyncio.sleep(0)
        number, request = guest.requests()[0]
        assert isinstance(request["stream"], int)
        guest.data(request["stream"], 0, b"abc")
        guest.say(wire.EOF, request["stream"], wire.OFFSET.pack(3))
        guest.say(wire.REPLY, number, b'{"ok":true,"size":4}')
        with pytest.raises(GuestProtocolError, match="says 4 bytes and sent 3"):
            await task

    against(play)
    against(count)


def test_a_refusal_s_text_is_cut_and_cleaned() -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.hello("t", timeout=5))
        await asyncio.sleep(0)
        text = "\x1b[31mred\r\nnext" + "y" * 5000
        reply = msgspec.json.encode({"ok": False, "error": "a\nb" * 200, "message": text})
        guest.say(wire.REPLY, guest.requests()[0][0], reply)
        with pytest.raises(GuestRefused) as caught:
            await task
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400

    against(play)


# ------------------------------------------------------------------ bounds


def test_one_byte_frames_cost_no_more_than_their_window() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started()
        offsets = {wire.STDOUT: 0, wire.STDERR: 0}
        blocks: list[bytes] = []
        for _ in range(20_000):
            for number in (wire.STDOUT, wire.STDERR):
                payload = wire.OFFSET.pack(offsets[number]) + b"x"
                blocks.append(wire.encode(wire.DATA, process.stream + number, payload))
                offsets[number] += 1
        tracemalloc.start()
        for block in blocks:
            guest.link.data_received(block)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1 << 20
        assert not guest.wire.aborted
        for number in (wire.STDOUT, wire.STDERR):
            guest.say(wire.EOF, process.stream + number, wire.OFFSET.pack(20_000))
        total = sum([len(piece.data) async for piece in process.output()])
        assert total == 40_000

    against(play)


def test_acknowledgements_follow_consumption_not_arrival() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started()
        for n in range(8):
            guest.data(process.stream + wire.STDOUT, n * 30_000, bytes(30_000))
        assert guest.acks(process.stream + wire.STDOUT) == []
        seen = 0
        output = process.output()
        while seen < 240_000:
            piece = await anext(output)
            assert all(acked <= seen for acked in guest.acks(process.stream + wire.STDOUT))
            seen = piece.offset + len(piece.data)
        with suppress(TimeoutError):
            await asyncio.wait_for(anext(output), 0.01)
        assert guest.acks(process.stream + wire.STDOUT)[-1] >= 240_000 - wire.WINDOW // 4

    against(play)


def test_input_stops_at_the_window_and_goes_on_with_acknowledgements() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started(stdin=True)
        writing = asyncio.create_task(process.write(bytes(3 * wire.WINDOW)))

        def sent() -> int:
            frames = [frame for frame in guest.wire.sent if frame[:2] == (wire.DATA, process.stream)]
            return sum(len(payload) - 8 for _, _, payload in frames)

        for n in range(1, 3):
            await asyncio.sleep(0.01)
            assert sent() == n * wire.WINDOW
            assert not writing.done()
            guest.say(wire.ACK, process.stream, wire.OFFSET.pack(n * wire.WINDOW))
        await writing
        assert sent() == 3 * wire.WINDOW

    against(play)


def test_a_guest_that_never_answers_meets_every_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm_core.guest.process.GRACE", 0.05)
    monkeypatch.setattr("vmm_core.guest.channel.START_TIMEOUT", 0.05)

    async def play(guest: Hostile) -> None:
        process = await guest.started(timeout=0.05)
        channel = guest.channel
        for attempt in (
            channel.hello("t", timeout=0.02),
            channel.revive(REVIVE, timeout=0.02),
            channel.quiesce(timeout=0.02),
            channel.poweroff(timeout=0.02),
            channel.get("/f", timeout=0.02),
            channel.put("/f", b"x", timeout=0.02),
            channel.start("n", ["x"]),
            channel.attach("n"),
            process.wait(timeout=0.02),
            process.wait(),
            process.kill(),
            process.forget(),
            process.collect(timeout=0.02),
        ):
            with pytest.raises(GuestTimeout):
                await attempt
        assert len(guest.link.streams) == 3  # only the started command is still listened to
        assert len(guest.link.waiters) == 1

    against(play)


def test_a_guest_that_reads_nothing_is_given_up() -> None:
    async def play(guest: Hostile) -> None:
        guest.wire.stuck = 100 << 20
        with pytest.raises(GuestProtocolError, match="has not read"):
            await guest.channel.hello("t")

    against(play)


def test_the_end_of_the_stream_reaches_everybody_who_waits() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started(stdin=True)

        async def consume() -> None:
            async for _ in process.output():
                pass

        tasks: Iterable[asyncio.Task[object]] = [
            asyncio.create_task(coroutine)  # type: ignore[arg-type]
            for coroutine in (
                guest.channel.hello("t"), guest.channel.get("/f"), guest.channel.put("/f", bytes(10**6)),
                process.wait(), consume(), process.write(bytes(10**6)), process.collect(), process.kill(),
            )
        ]  # fmt: skip
        await asyncio.sleep(0.01)
        guest.link.connection_lost(ConnectionResetError("reset"))
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert [type(outcome) for outcome in outcomes] == [ChannelClosed] * len(outcomes)

    against(play)


async def test_a_flooding_guest_over_a_real_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(b"junk" * 20_000)
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, path)
    channel = await Channel.connect(path)
    with pytest.raises(GuestProtocolError):
        await channel.hello("t", timeout=10)
    await asyncio.wait_for(channel.wait_closed(), 5)
    assert channel.closed
    server.close()
