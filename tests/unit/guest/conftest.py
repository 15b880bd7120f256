"""A real agent as a subprocess, by socket or behind a relay that behaves like QEMU's character device."""

import asyncio
import os
import pty
import signal
import socket
import sys
import tty
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from vmm_core.guest import agent
from vmm_core.guest.channel import Channel, Revive

HERE = Path(__file__).parent
TOKEN = "token-1"
REVIVE = Revive(TOKEN, "fork-1", "0123456789abcdef" * 2, {"forge.test": "10.0.2.2"})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class Agent:
    """A running agent: its process, its record of calls, and how to connect to it."""

    def __init__(self, record: Path, process: asyncio.subprocess.Process) -> None:
        self.record = record
        self.socket = record / "agent.sock"
        self.process = process

    def calls(self) -> list[list[object]]:
        import json

        path = self.record / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @asynccontextmanager
    async def channel(self, *, revive: bool = True) -> AsyncIterator[Channel]:
        channel = await Channel.connect(self.socket)
        try:
            if revive:
                await channel.revive(REVIVE)
            yield channel
        finally:
            await channel.close()

    def cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


@asynccontextmanager
async def run_agent(
    record: Path, *options: str, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None
) -> AsyncIterator[Agent]:
    record.mkdir(parents=True, exist_ok=True)
    process = await asyncio.create_subprocess_exec(
        *prefix,
        sys.executable,
        "-I",
        "-S",
        str(HERE / "agent_under_test.py"),
        agent.__file__,
        str(record),
        *(options or ("--listen", str(record / "agent.sock"))),
        env={"PATH": os.environ["PATH"], **(env or {})},
        preexec_fn=_as_of_init,
    )
    try:
        yield Agent(record, process)
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
        await asyncio.wait_for(process.wait(), 10)


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Agent]:
    async with run_agent(tmp_path / "g") as running:
        yield running


class Relay:
    """QEMU's side of a port: one client at a time, guest bytes without a client are discarded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.master, self._slave = pty.openpty()
        tty.setraw(self.master)
        tty.setraw(self._slave)
        self.guest_path = os.ttyname(self._slave)
        self.discarded = 0
        self._client: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Relay":
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen(1)
        for sock in (self._server,):
            sock.setblocking(False)
        os.set_blocking(self.master, False)
        self._tasks = [asyncio.create_task(self._from_host()), asyncio.create_task(self._from_guest())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        if self._client:
            self._client.close()
        os.close(self.master)
        os.close(self._slave)

    async def _readable(self, fd: int) -> None:
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)

    async def _from_host(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self._server)
            client.setblocking(False)
            self._client = client
            while True:
                try:
                    data = await loop.sock_recv(client, 4096)
                except OSError:
                    data = b""
                if not data:
                    break
                while data:
                    try:
                        data = data[os.write(self.master, data) :]
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
            self._client = None
            client.close()

    async def _from_guest(self) -> None:
        while True:
            await self._readable(self.master)
            with suppress(BlockingIOError):
                data = os.read(self.master, 4096)
                client = self._client
                while data and client is not None and client is self._client:
                    try:
                        data = data[client.send(data) :]
                    except BlockingIOError:
                        await asyncio.sleep(0.001)
                    except OSError:
                        break
                self.discarded += len(data)


def _as_of_init() -> None:
    """In a guest nothing is ignored from the start, whatever this run was started with (nohup, a shell's "&")."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
