"""A guest with much to say, or with nothing to say at length, beside one that answers as it should.

The guests are processes of their own, so that only what they cost this event loop is measured.
"""

import asyncio
import math
import sys
import time
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from vmm_core.errors import ChannelClosed, GuestProtocolError
from vmm_core.guest import agent, limits, link, wire
from vmm_core.guest.channel import Channel, Process
from vmm_core.guest.limits import Budget, Share, next_stop

from .test_hostile_guest import Hostile, against

GUEST = """
import importlib.util, json, socket, sys
spec = importlib.util.spec_from_file_location("agent", sys.argv[1])
agent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(agent)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen(1)
kind = sys.argv[3]
connection = listener.accept()[0]
decoder = agent.Decoder()

def say(*frame):
    connection.sendall(agent.encode(*frame))

def requests():
    while data := connection.recv(1 << 16):
        for kind, stream, payload in decoder.feed(data):
            if kind == agent.REQUEST:
                yield stream, json.loads(payload)

for number, request in requests():
    if kind == "good":
        say(agent.REPLY, number, b'{"ok":true,"agent_version":"1","revived":true,"execs":[]}')
        continue
    if kind == "useful":  # never ending output, a byte a frame, as fast as the host takes it
        stream = request["stream"]
        say(agent.REPLY, number, b'{"ok":true,"pid":5,"stdout":0,"stderr":0,"stdin":null,"stdin_written":null}')
        connection.setblocking(False)
        sent = acked = 0
        while True:
            while sent < acked + agent.WINDOW:
                count = min(4096, acked + agent.WINDOW - sent)
                block = b"".join(
                    agent.encode(agent.DATA, stream + 1, agent.OFFSET.pack(n) + b"x") for n in range(sent, sent + count)
                )
                connection.setblocking(True)
                connection.sendall(block)
                connection.setblocking(False)
                sent += count
            connection.setblocking(True)
            for k, s, payload in decoder.feed(connection.recv(1 << 16)):
                if k == agent.ACK:
                    acked = agent.OFFSET.unpack(payload)[0]
    block = {
        "junk": b"junk" * 20000,
        "ends": agent.END * 80000,
        "bad": b"\\xc0n" * 40000,
        "acks": agent.encode(agent.ACK, number, bytes(8)) * 4000,
        "exits": agent.encode(agent.EXIT, number, b"{}") * 4000,
    }[kind]
    while True:
        connection.sendall(block)
"""


@asynccontextmanager
async def peer(directory: Path, kind: str) -> AsyncGenerator[Channel]:
    path = directory / f"{kind}.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-S",
        "-c",
        GUEST,
        agent.__file__,
        str(path),
        kind,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        channel = await Channel.connect(path)
        yield channel
        await channel.close()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def round_trips(channel: Channel, count: int) -> list[float]:
    """Sorted, in seconds."""
    taken: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await channel.hello("t")
        taken.append(time.perf_counter() - began)
        await asyncio.sleep(0.0005)
    return sorted(taken)


def p99(taken: list[float]) -> float:
    return taken[math.ceil(len(taken) * 0.99) - 1]


async def test_a_neighbour_waits_little_for_a_guest_that_never_stops_talking(tmp_path: Path) -> None:
    async with peer(tmp_path, "good") as good, peer(tmp_path, "useful") as flooding:
        await round_trips(good, 200)
        process = await flooding.start("e", ["x"])
        seen = 0

        async def consume() -> None:
            nonlocal seen
            async for piece in process.output():
                seen += len(piece.data)

        # The host is not ours alone: the best of a few attempts is what this code makes possible.
        ratios: list[float] = []
        share = 0.0
        for _ in range(4):
            before = await round_trips(good, 300)
            spent = time.thread_time()
            reading = asyncio.create_task(consume())
            began = time.perf_counter()
            during = await round_trips(good, 300)
            share = (time.thread_time() - spent) / (time.perf_counter() - began)
            reading.cancel()
            await asyncio.wait((reading,))
            await asyncio.sleep(0.1)
            ratios.append(p99(during) / p99(before))
            if ratios[-1] <= 3:
                break
        assert min(ratios) <= 3, (ratios, share)
        assert seen > 10_000, "it was heard all the same"
        assert not flooding.closed


@pytest.mark.parametrize("kind", ["junk", "ends", "bad", "acks", "exits"])
async def test_a_guest_with_nothing_to_say_is_cut_off_while_a_neighbour_goes_on(
    tmp_path: Path, kind: str
) -> None:
    async with peer(tmp_path, "good") as good, peer(tmp_path, kind) as flooding:
        await round_trips(good, 100)
        attack = asyncio.create_task(flooding.hello("t", timeout=20))
        longest, began = 0.0, time.perf_counter()
        while not attack.done():
            longest = max(longest, (await round_trips(good, 1))[0])
        assert isinstance(attack.exception(), GuestProtocolError)
        assert time.perf_counter() - began < 10
        frames, size = flooding.useless
        assert frames <= limits.USELESS_FRAMES + 500
        assert size <= limits.USELESS_BYTES + (1 << 20)
        assert longest < 0.2, "no block of it held the loop up"


# ------------------------------------------------------------------ one guest's turn


def test_the_rest_of_a_block_waits_for_the_next_turn_and_nothing_is_read_meanwhile() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started()
        block = b"".join(
            wire.encode(wire.DATA, process.stream + wire.STDOUT, wire.OFFSET.pack(n) + b"x")
            for n in range(10_000)
        )
        guest.link.data_received(block)
        assert guest.wire.paused
        first = process._flows["stdout"].size  # pyright: ignore[reportPrivateUsage]
        assert 0 < first < 2000
        turns = 0
        while guest.wire.paused:
            turns += 1
            await asyncio.sleep(0.001)
        assert turns > 10
        guest.say(wire.EOF, process.stream + wire.STDOUT, wire.OFFSET.pack(10_000))
        guest.say(wire.EOF, process.stream + wire.STDERR, wire.OFFSET.pack(0))
        assert sum([len(piece.data) async for piece in process.output()]) == 10_000

    against(play, lambda: Share(asyncio.get_running_loop().time()))


def test_what_was_held_back_is_forgotten_with_the_link() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started()
        block = b"".join(
            wire.encode(wire.DATA, process.stream + wire.STDOUT, wire.OFFSET.pack(n) + b"x")
            for n in range(10_000)
        )
        guest.link.data_received(block)
        held = process._flows["stdout"].size  # pyright: ignore[reportPrivateUsage]
        guest.link.close()
        await asyncio.sleep(0.02)
        assert process._flows["stdout"].size == held  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(ChannelClosed):
            await process.wait()

    against(play, lambda: Share(asyncio.get_running_loop().time()))


def test_a_turn_goes_on_until_its_time_is_over_and_a_pause_follows_the_burst() -> None:
    share = Share(0.0, turn=0.002, rate=0.5, burst=0.01)
    paused = 0.0
    for _ in range(10):
        share.begin()
        while not share.over:
            pass
        paused = share.end(0.0)
    assert 0.02 <= paused < 0.06  # 20 ms of work, of which 10 are free, at half the time
    share.begin()
    assert share.end(1.0) == 0.0


def test_a_piece_to_look_at_is_bounded_in_bytes_and_frames() -> None:
    tiny = wire.encode(wire.ACK, 1, bytes(8)) * 10_000
    stop = next_stop(tiny, 0)
    assert len(wire.Decoder().feed(tiny[:stop])) == limits.STEP_FRAMES
    assert next_stop(bytes(1 << 20), 5) == 5 + limits.STEP_BYTES
    assert next_stop(b"abc", 1) == 3
    assert next_stop(wire.END * 5, 0) == 5


def test_a_trickle_of_leftovers_is_tolerated_for_ever_and_a_stream_of_them_is_not() -> None:
    budget = Budget(0.0)
    for second in range(10_000):
        budget.spend(float(second), limits.USELESS_FRAMES_PER_S, 1000)
    with pytest.raises(GuestProtocolError, match="floods"):
        for tick in range(100_000):
            budget.spend(10_000 + tick / 20, 1, 0)  # 20 a second


# ------------------------------------------------------------------ streams that were let go


def test_output_of_a_command_nobody_listens_to_any_more_is_no_flood() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started()
        guest.data(process.stream + wire.STDOUT, 0, b"seen")
        process.release()
        for offset in range(4, 20_000):
            guest.data(process.stream + wire.STDOUT, offset, b"x")
        guest.say(wire.EOF, process.stream + wire.STDERR, wire.OFFSET.pack(0))
        guest.say(wire.EXIT, process.stream, b'{"code":0,"signal":null,"timed_out":false}')
        assert guest.link.useless == (0, 0)
        assert not guest.wire.aborted

    against(play)


def test_but_no_more_than_its_window_of_it() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started()
        process.release()
        stream, size = process.stream + wire.STDOUT, 1000
        for n in range(wire.WINDOW // size + limits.USELESS_FRAMES - 50):
            guest.data(stream, n * size, bytes(size))
        assert not guest.wire.aborted
        for n in range(100):
            guest.data(stream, n, b"x" * 1000)
        assert guest.wire.aborted

    against(play)


def test_streams_that_were_let_go_are_forgotten_in_time() -> None:
    async def play(guest: Hostile) -> None:
        tracemalloc.start()
        for n in range(2000):
            (await guest.started(f"e{n}")).release()
            guest.wire.sent.clear()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1 << 20
        assert guest.link.streams == {}

    against(play)


# ------------------------------------------------------------------ memory


async def fill(guest: Hostile, process: Process) -> None:
    """All that a guest may send of one command, in the worst way."""
    offsets = {wire.STDOUT: 0, wire.STDERR: 0}
    while offsets[wire.STDERR] < wire.WINDOW:
        for number, offset in offsets.items():
            guest.data(process.stream + number, offset, b"x" * 64)
            offsets[number] = offset + 64


def test_the_memory_a_guest_can_take_is_what_channel_says() -> None:
    async def play(guest: Hostile) -> None:
        processes = [await guest.started(f"e{n}") for n in range(3)]
        guest.wire.sent.clear()
        tracemalloc.start()
        for process in processes:
            await fill(guest, process)
        guest.link.data_received(b"n" * link.READ_BYTES)
        held, _ = tracemalloc.get_traced_memory()
        assert held < len(processes) * (2 * wire.WINDOW * 9 // 8 + (64 << 10)) + link.MAX_HELD
        tracemalloc.stop()
        assert not guest.wire.aborted

    against(play)


@pytest.mark.parametrize(
    "word", [b"1" * 60_000, b"-" + b"9" * 60_000, b"1e999999", b"1." + b"0" * 60_000, b"-0.5"]
)
def test_numbers_no_machine_counts_in_end_the_channel(word: bytes) -> None:
    async def play(guest: Hostile) -> None:
        task = asyncio.create_task(guest.channel.attach("e"))
        await asyncio.sleep(0)
        reply = b'{"ok":true,"pid":%s,"stdout":0,"stderr":0,"stdin":null,"stdin_written":null}' % word
        began = time.thread_time()
        guest.say(wire.REPLY, guest.requests()[0][0], reply)
        assert time.thread_time() - began < 0.2
        with pytest.raises(GuestProtocolError, match="malformed"):
            await task

    against(play)


def test_a_guest_that_acknowledges_byte_by_byte_gets_no_frames_of_a_byte() -> None:
    async def play(guest: Hostile) -> None:
        process = await guest.started(stdin=True)
        writing = asyncio.create_task(process.write(bytes(2 * wire.WINDOW)))
        await asyncio.sleep(0.01)
        before = len(guest.wire.sent)
        for n in range(1, 20_000):
            guest.say(wire.ACK, process.stream, wire.OFFSET.pack(n))
            if n % 50 == 0:
                await asyncio.sleep(0)
        assert len(guest.wire.sent) - before <= 5
        writing.cancel()
        await asyncio.wait((writing,))

    against(play)
