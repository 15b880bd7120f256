"""An agent in the copy of a running machine: its host is another one from one byte to the next, and says revive.

To the agent that is a port whose host never says goodbye: the old host's last frame ends anywhere, the agent's own
frames were read up to anywhere, and the next thing it hears is a new identity, or its own again.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm_core.errors import GuestRefused
from vmm_core.guest import agent, wire
from vmm_core.guest.channel import Channel, Revive
from vmm_core.guest.link import Link

from .conftest import HERE, run_agent, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent changes users, as root does")

LINES = b"".join(b"%d\n" % n for n in range(1, 20_001))


class Copied:
    """One agent on a port, and hosts that come and go without a word."""

    def __init__(self, record: Path, port: socket.socket) -> None:
        self.record, self.port = record, port
        self.decoder = wire.Decoder()
        self.waiting: deque[tuple[int, int, bytes]] = deque()
        self.number = 0
        port.settimeout(20)

    def send(self, kind: int, stream: int, payload: bytes) -> None:
        self.port.sendall(wire.encode(kind, stream, payload))

    def request(self, **message: object) -> bytes:
        self.number += 4
        return wire.encode(wire.REQUEST, self.number, json.dumps(message).encode())

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        while True:
            while self.waiting:
                yield self.waiting.popleft()
            self.waiting.extend(self.decoder.feed(self.port.recv(1 << 16)))

    def answer(self) -> dict[str, object]:
        number = self.number
        for kind, stream, payload in self.frames():
            if (kind, stream) == (wire.REPLY, number):
                answer: dict[str, object] = json.loads(payload)
                assert answer["ok"], answer
                return answer
        raise AssertionError

    def old_host(self, token: str) -> None:
        self.decoder = wire.Decoder()
        self.waiting.clear()
        request = wire.ReviveRequest(
            token=token, entropy=bytes(64), time_ns=1, hostname="old", machine_id="0" * 32, boot_id="old", hosts={},
            resolver="",
        )  # fmt: skip
        self.number += 4
        self.send(wire.REQUEST, self.number, msgspec.json.encode(request))
        self.answer()

    def start(self, ident: str, script: str, *, stdin: bool = False) -> int:
        stream = 1 << 20
        self.port.sendall(
            self.request(op="exec.start", exec=ident, stream=stream, argv=["/bin/sh", "-c", script], env={}, cwd="/",
                         user="root", stdin=stdin, timeout_s=None, files=[])
        )  # fmt: skip
        self.answer()
        return stream

    @contextmanager
    def new_host(self) -> Generator[socket.socket]:
        with socket.socket(fileno=os.dup(self.port.fileno())) as sock:
            yield sock


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copied]:
    record = tmp_path_factory.mktemp("copied")
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(HERE / "agent_under_test.py"), agent.__file__, str(record),
             "--port", f"/dev/fd/{theirs.fileno()}", "--as-is"],
            pass_fds=[theirs.fileno()],
        )  # fmt: skip
        theirs.close()
        try:
            yield Copied(record, ours)
        finally:
            process.kill()
            process.wait()


async def connect(sock: socket.socket) -> Channel:
    _, link = await asyncio.get_running_loop().create_unix_connection(Link, sock=sock)
    return Channel(link)


def revive(token: str, machine_id: str = "1" * 32) -> Revive:
    return Revive(token, "child", machine_id)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    token=st.integers(0, 10**9),
    acknowledged=st.integers(0, len(LINES)),
    lost=st.integers(0, 70_000),
    last=st.sampled_from(["hello", "put", "stdin", "kill", "ack"]),
    cut=st.integers(0, 400),
)
def test_no_byte_of_output_is_missing_or_twice_wherever_the_hosts_changed(
    copied: Copied, token: int, acknowledged: int, lost: int, last: str, cut: int
) -> None:
    copied.old_host(f"old-{token}")
    job = f"job-{copied.number}"
    stream = copied.start(job, "seq 1 20000; read word; echo got $word")
    # The old host reads up to somewhere, acknowledges up to somewhere …
    received = 0
    for kind, number, payload in copied.frames():
        if (kind, number) == (wire.DATA, stream + wire.STDOUT):
            received = wire.OFFSET.unpack_from(payload)[0] + len(payload) - wire.OFFSET.size
            if received >= acknowledged:
                break
    acknowledged = min(acknowledged, received)
    copied.send(wire.ACK, stream + wire.STDOUT, wire.OFFSET.pack(acknowledged))
    # … and vanishes within a frame of its own and one of the agent's.
    frame = {
        "hello": copied.request(op="hello", token="x" * 100),
        "put": copied.request(op="put", path="/nowhere/file", stream=8, mode=0o600, user="root"),
        "stdin": wire.encode(wire.DATA, stream, wire.OFFSET.pack(0) + b"\xc0\xdb" * 100),
        "kill": copied.request(op="exec.kill", exec=job, signal=9),
        "ack": wire.encode(wire.ACK, stream + wire.STDOUT, wire.OFFSET.pack(acknowledged)),
    }[last]
    copied.port.sendall(frame[: min(cut, len(frame) - 2)])
    copied.port.settimeout(0.01)
    try:
        while lost > 0:
            lost -= len(copied.port.recv(min(lost, 4096)))
    except TimeoutError:
        pass
    copied.port.settimeout(20)

    async def child() -> None:
        with copied.new_host() as sock:
            channel = await connect(sock)
            revived = await channel.revive(revive(f"new-{token}"))
            assert revived.execs[-1] == job
            process = await channel.attach(job, stdout_from=None, stderr_from=None)
            got = bytearray()
            async for piece in process.output():
                assert piece.offset == acknowledged + len(got)
                got += piece.data
            assert bytes(got) == (LINES + b"got\n")[acknowledged:]
            assert (await process.wait(timeout=5)).code == 0
            await process.forget()
            await channel.close()

    asyncio.run(child())


def test_half_done_transfers_of_the_old_host_leave_nothing(copied: Copied, tmp_path: Path) -> None:
    target, source = tmp_path / "up/target", tmp_path / "source"
    source.write_bytes(bytes(3_000_000))
    copied.old_host("a")
    copied.port.sendall(copied.request(op="put", path=str(target), stream=8, mode=0o600, user="root"))
    copied.send(wire.DATA, 8, wire.OFFSET.pack(0) + bytes(30_000))
    copied.port.sendall(copied.request(op="get", path=str(source), stream=12, max_bytes=1 << 30))
    for _, stream, _ in copied.frames():
        if stream == 12:
            break
    assert len(list(target.parent.iterdir())) == 1

    async def child() -> None:
        with copied.new_host() as sock:
            channel = await connect(sock)
            assert (await channel.revive(revive("b"))).execs == ()
            assert list(target.parent.iterdir()) == []
            # The numbers of the old host's transfers mean nothing any more.
            await channel.put(str(target), b"new", user="root")
            assert await channel.get(str(target)) == b"new"
            assert not channel.closed
            await channel.close()

    asyncio.run(child())


def test_input_goes_on_at_the_byte_the_command_has_had(copied: Copied) -> None:
    copied.old_host("a")
    stream = copied.start("cat", "cat", stdin=True)
    copied.send(wire.DATA, stream, wire.OFFSET.pack(0) + b"one\n")
    cut_off = wire.encode(wire.DATA, stream, wire.OFFSET.pack(4) + b"never whole\n")
    copied.port.sendall(cut_off[:-3])

    async def child() -> None:
        with copied.new_host() as sock:
            channel = await connect(sock)
            assert (await channel.revive(revive("b"))).execs == ("cat",)
            process = await channel.attach("cat", stdout_from=None, stderr_from=None)
            await process.write(b"two\n")
            await process.close_stdin()
            assert (await process.collect(timeout=5)).stdout == b"one\ntwo\n"
            await channel.close()

    asyncio.run(child())


def test_the_old_hosts_token_is_worth_nothing_in_the_copy_and_its_requests_go_unanswered(
    copied: Copied,
) -> None:
    copied.old_host("a")
    copied.port.sendall(copied.request(op="hello", token="a") * 200)  # answered into the copy's first moments

    async def child() -> None:
        with copied.new_host() as sock:
            channel = await connect(sock)
            await channel.revive(revive("b"))
            assert channel.useless[0] <= 201
            assert not (await channel.hello("a")).revived
            with pytest.raises(GuestRefused, match="not_revived"):
                await channel.attach("x")
            assert (await channel.hello("b")).revived
            await channel.close()

    asyncio.run(child())


async def test_small_pieces_that_nobody_read_come_together_to_the_next_host(tmp_path: Path) -> None:
    """A host that stands still while a command prints line by line: what is left over for the next is no flood."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        path = f"/dev/fd/{theirs.fileno()}"
        record = tmp_path / "g"
        record.mkdir()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(HERE / "agent_under_test.py"), agent.__file__, str(record),
            "--port", path, "--as-is", pass_fds=[theirs.fileno()],
        )  # fmt: skip
        try:
            old = Copied(record, ours)
            await asyncio.to_thread(old.old_host, "a")
            script = "i=0; while [ $i -lt 4000 ]; do echo $i; i=$((i+1)); done; echo done >&2; sleep 0.3"
            await asyncio.to_thread(old.start, "lines", script)
            await asyncio.sleep(1.5)
            with old.new_host() as sock:
                channel = await connect(sock)
                assert (await channel.revive(revive("b"))).execs == ("lines",)
                assert channel.useless[0] < 500
                job = await channel.attach("lines", stdout_from=None, stderr_from=None)
                result = await job.collect(timeout=20)
                assert result.stdout == b"".join(b"%d\n" % n for n in range(4000))
                await channel.close()
        finally:
            process.kill()
            await process.wait()


async def test_a_copy_gets_new_ssh_host_keys_and_a_thawed_machine_keeps_its_own(tmp_path: Path) -> None:
    """Keys that were made after the machine was: no quiesce has seen them."""
    async with run_agent(tmp_path / "g") as guest:
        key = guest.record / "etc/ssh/ssh_host_ed25519_key"
        async with guest.channel(revive=False) as channel:
            await channel.revive(revive("a", "a" * 32))
            key.parent.mkdir()
            key.write_text("of the machine")
            await channel.revive(revive("a", "a" * 32))
            await asyncio.sleep(0.3)
            assert key.read_text() == "of the machine"
            await channel.revive(revive("b", "b" * 32))
            assert not key.exists() or key.read_text() != "of the machine"
            await until(key.exists, 20)


async def test_time_outs_of_commands_count_on_through_a_revive(tmp_path: Path) -> None:
    async with run_agent(tmp_path / "g") as guest:
        async with guest.channel() as channel:
            await channel.start("job", ["sleep", "100"], user="root", cwd="/", timeout=1.0)
        async with guest.channel(revive=False) as channel:
            far = Revive("t2", "h", "2" * 32, time_ns=4_000_000_000_000_000_000)  # the clock steps by decades
            assert (await channel.revive(far)).execs == ("job",)
            job = await channel.attach("job", stdout_from=None, stderr_from=None)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await job.wait()
            assert (await job.wait(timeout=5)).timed_out
