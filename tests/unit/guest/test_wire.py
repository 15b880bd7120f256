"""The frames: what goes in comes out, and a reader is in step again after anything."""

import tracemalloc

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.guest import agent, wire

awkward = st.lists(st.sampled_from([b"\xc0", b"\xdb", b"\xdc", b"\xdd", b"\xdb\xdc", b"x", b"\0"])).map(
    b"".join
)
payloads = st.binary(max_size=300) | awkward
frames = st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), payloads)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    pieces: list[bytes] = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(st.lists(frames, max_size=8), st.lists(st.integers(0, 40), max_size=30))
def test_frames_survive_any_chunking(sent: list[tuple[int, int, bytes]], sizes: list[int]) -> None:
    decoder = wire.Decoder()
    stream = b"".join(wire.encode(*frame) for frame in sent)
    got = [frame for piece in cut(stream, sizes) for frame in decoder.feed(piece)]
    assert got == sent
    assert (decoder.bad, decoder.garbage) == (0, 0)


@given(
    st.binary(max_size=400) | awkward, frames, st.integers(0, 500), st.lists(frames, min_size=1, max_size=5)
)
def test_after_garbage_and_a_partial_frame_valid_frames_are_decoded(
    garbage: bytes, partial: tuple[int, int, bytes], cut_at: int, sent: list[tuple[int, int, bytes]]
) -> None:
    """The resynchronisation law."""
    decoder = wire.Decoder()
    before = garbage + wire.encode(*partial)[:cut_at]
    got = (
        decoder.feed(before)
        + decoder.feed(wire.encode(*sent[0]))
        + [frame for one in sent[1:] for frame in decoder.feed(wire.encode(*one))]
    )
    assert got[-len(sent) :] == sent


@given(st.integers(1, 3), frames, st.integers(0, 8), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(_: int, frame: tuple[int, int, bytes], where: int, bit: int) -> None:
    encoded = bytearray(wire.encode(*frame))
    encoded[1 + where % (len(encoded) - 2)] ^= 1 << bit
    assert frame not in wire.Decoder().feed(bytes(encoded))


def test_the_largest_payload_fits_and_one_more_byte_does_not() -> None:
    for worst in (b"\xc0", b"\xdb", b"a"):
        decoder = wire.Decoder()
        assert decoder.feed(wire.encode(1, 2, worst * wire.MAX_PAYLOAD)) == [(1, 2, worst * wire.MAX_PAYLOAD)]
        assert decoder.feed(wire.encode(1, 2, worst * (wire.MAX_PAYLOAD + 1))) == []
        assert decoder.bad == 1
        assert decoder.feed(wire.encode(1, 2, b"next")) == [(1, 2, b"next")]


def test_endless_garbage_takes_no_memory() -> None:
    decoder = wire.Decoder()
    block = b"g" * 65536
    decoder.feed(block)
    tracemalloc.start()
    for _ in range(400):
        assert decoder.feed(block) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * wire.MAX_ENCODED
    assert decoder.garbage > 20_000_000
    assert decoder.feed(wire.encode(3, 4, b"ok")) == [(3, 4, b"ok")]


def test_empty_frames_and_rows_of_end_are_nothing() -> None:
    decoder = wire.Decoder()
    assert decoder.feed(b"\xc0" * 1000) == []
    assert decoder.bad == 0


def test_what_holds_secrets_does_not_show_them() -> None:
    file = wire.WireFile("/r/.credentials", b"hunter2", 0o600)
    request = wire.StartRequest("e", 4, ("x",), {}, None, "runner", False, None, (file,))
    assert "hunter2" not in repr(request)
    assert b'"op":"exec.start"' in msgspec.json.encode(request)


def test_a_flood_of_bare_delimiters_is_garbage() -> None:
    decoder = agent.Decoder()
    frame = agent.encode(agent.DATA, 1, b"x")
    assert len(decoder.feed(frame * 100)) == 100
    assert decoder.garbage == 0
    assert decoder.feed(agent.END * 1000) == []
    assert decoder.garbage >= 998
