"""The agent behind a byte stream without connections, as a virtio-serial port is one."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from vmm_core.errors import GuestTimeout
from vmm_core.guest import wire
from vmm_core.guest.channel import Channel

from .conftest import REVIVE, TOKEN, Relay, run_agent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent changes users, as root does")


@asynccontextmanager
async def connected(relay: Relay) -> AsyncIterator[Channel]:
    channel = await Channel.connect(relay.path)
    try:
        yield channel
    finally:
        await channel.close()


async def test_a_new_host_process_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    """The first host vanishes with frames half-written in both directions."""
    got = bytearray()
    async with Relay(tmp_path / "s") as relay, run_agent(tmp_path / "g", "--port", relay.guest_path):
        async with connected(relay) as channel:
            await channel.revive(REVIVE)
            process = await channel.start("job", ["seq", "1", "200000"], user="root", cwd="/")
            async for piece in process.output():
                got += piece.data
                if len(got) > 200_000:
                    break
        for n in range(3):
            with socket.socket(socket.AF_UNIX) as killed:
                killed.connect(str(relay.path))
                killed.sendall(
                    wire.encode(wire.REQUEST, 4, b'{"op":"hello","token":"' + b"x" * 5000)[: 50 + n]
                )
                await asyncio.sleep(0.05)
            async with connected(relay) as channel:
                assert (await channel.hello(TOKEN)).execs == ("job",)
                process = await channel.attach("job", stdout_from=len(got))
                start = len(got)
                async for piece in process.output():
                    got += piece.data
                    if len(got) - start > 200_000:
                        break
        async with connected(relay) as channel:
            await channel.hello(TOKEN)
            process = await channel.attach("job", stdout_from=len(got))
            async for piece in process.output():
                got += piece.data
            assert (await process.wait(timeout=5)).code == 0
    assert bytes(got) == b"".join(b"%d\n" % n for n in range(1, 200001))


async def test_garbage_from_the_host_does_not_disturb_the_agent(tmp_path: Path) -> None:
    async with Relay(tmp_path / "s") as relay, run_agent(tmp_path / "g", "--port", relay.guest_path) as agent:
        with socket.socket(socket.AF_UNIX) as noise:
            noise.connect(str(relay.path))
            for junk in (
                os.urandom(50_000),
                wire.encode(wire.REQUEST, 4, b"[" * 30_000),
                wire.encode(wire.REQUEST, 8, b'{"op":["hello"]}'),
                wire.encode(wire.REQUEST, 12, b'{"op":"hello"}'),
                wire.encode(wire.REQUEST, 16, b'{"op":"exec.start"}'),
                wire.encode(wire.REQUEST, 16, b"\xff"),
                wire.encode(wire.REQUEST, 16, b"7"),
                wire.encode(wire.DATA, 99, b"short"),
                wire.encode(77, 99, b"unknown type"),
                b"\xc0" * 1000,
            ):
                noise.sendall(junk)
                await asyncio.sleep(0.02)
        async with connected(relay) as channel:
            assert not (await channel.hello(TOKEN)).revived
            await channel.revive(REVIVE)
            process = await channel.start("a", ["echo", "fine"], user="root", cwd="/")
            assert (await process.collect(timeout=5)).stdout == b"fine\n"
        assert agent.process.returncode is None


async def test_a_second_client_waits_until_the_first_has_gone(tmp_path: Path) -> None:
    """As behind QEMU: it can connect, but is heard only later."""
    async with (
        Relay(tmp_path / "s") as relay,
        run_agent(tmp_path / "g", "--port", relay.guest_path),
        connected(relay) as first,
        connected(relay) as second,
    ):
        await first.revive(REVIVE)
        with pytest.raises(GuestTimeout):
            await second.hello(TOKEN, timeout=0.2)
        await first.close()
        assert (await second.hello(TOKEN)).revived


async def test_a_channel_connects_to_a_long_path_that_appears_late(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    connecting = asyncio.create_task(Channel.connect(directory / "agent.sock", timeout=5))
    await asyncio.sleep(0.05)
    descriptor = os.open(directory, os.O_PATH)
    server = await asyncio.start_unix_server(lambda _, __: None, f"/proc/self/fd/{descriptor}/agent.sock")
    channel = await connecting
    await channel.close()
    server.close()
    os.close(descriptor)
    with pytest.raises(GuestTimeout, match=r"nowhere\.sock"):
        await Channel.connect(tmp_path / "nowhere.sock", timeout=0.05)


async def test_a_port_that_reads_as_ended_still_carries_the_answer(tmp_path: Path) -> None:
    """After a restore the driver may hear of the host later than of the host's first frame: until then a read
    finds that frame and then an end, and the answer has to stay queued. (Dropped, the fork hung for ever.)"""
    import json
    import sys

    from vmm_core.guest import agent

    from .conftest import HERE

    ours, theirs = socket.socketpair()
    with ours, theirs:
        record = tmp_path / "g"
        record.mkdir()
        ours.sendall(agent.encode(agent.REQUEST, 1, json.dumps({"op": "hello", "token": "t"}).encode()))
        ours.shutdown(socket.SHUT_WR)
        theirs.setblocking(False)
        with suppress(BlockingIOError):  # no room to write until the host is heard of
            while True:
                theirs.send(agent.END * 4096)
        theirs.setblocking(True)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(HERE / "agent_under_test.py"), agent.__file__, str(record),
            "--port", f"/dev/fd/{theirs.fileno()}", "--as-is", pass_fds=[theirs.fileno()],
        )  # fmt: skip
        try:
            await asyncio.sleep(1.0)  # both reads have happened, nothing could be written
            ours.settimeout(10)
            decoder, frames = agent.Decoder(), []
            while not frames:
                frames += decoder.feed(await asyncio.to_thread(ours.recv, 1 << 20))
            assert [(kind, stream) for kind, stream, _ in frames] == [(agent.REPLY, 1)]
        finally:
            process.kill()
            await process.wait()
