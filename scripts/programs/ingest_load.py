"""A load of signed deliveries over real connections: ``python -m scripts.programs.ingest_load``.

It reads a ``Load`` from its input and writes ``Answers`` to its output, both JSON.
A process of its own and as little work as HTTP/1.1 allows, so that what is measured is the server. All deliveries are
made and signed before the clock starts.
"""

import asyncio
import gc
import resource
import socket
import sys
import time
import uuid
from pathlib import Path

import msgspec

from github_webhook.signatures import sign
from tests.standins.github_model import Job, Repository, Run
from tests.standins.github_shapes import Shapes

_LATE = 120.0
_HEAD = (
    "POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: */*\r\ncontent-type: application/json\r\n"
    "user-agent: GitHub-Hookshot/bench\r\nx-github-delivery: {guid}\r\nx-github-event: workflow_job\r\n"
    "x-github-hook-id: 109948940\r\nx-github-hook-installation-target-id: 1\r\n"
    "x-github-hook-installation-target-type: repository\r\nx-hub-signature-256: {signature}\r\n"
    "content-length: {length}\r\n\r\n"
)
_JOB_ID = 40_000_000_000


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """``count`` deliveries over ``connections``; each carries one at a time. With as many of both, all come at once."""

    port: int
    path: str
    secret: str
    connections: int
    count: int


class Answers(msgspec.Struct, frozen=True):
    """What came of it.

    ``ms``: of each delivery to the last byte of its answer, the first of a connection with the time to connect.
    """

    seconds: float
    ms: list[float]
    statuses: dict[int, int]
    cpu_seconds: float


def payloads(count: int) -> list[bytes]:
    """Events ``workflow_job`` in GitHub's shape and size, each of another job."""
    shapes = Shapes("https://api.github.com", "https://github.com")
    repository = Repository(1, "octo-organization", "octo-repository", Path(), True, "main")
    commit = {"message": "Update"}
    run = Run(
        30_000_000_000, 1, repository, "f" * 40, "refs/heads/main", "main", "push", "CI",
        ".github/workflows/ci.yml", commit, 1_767_225_600.0,
    )  # fmt: skip
    found: list[bytes] = []
    for number in range(count):
        job = Job(
            _JOB_ID + number, run, "test", "test (3.11)", ["self-hosted", "microvm"], {}, 1, 1_767_225_600.0
        )
        found.append(msgspec.json.encode(shapes.workflow_job_event(job, "queued", 12345678)))
    return found


def requests(load: Load) -> list[bytes]:
    """The deliveries as they go over the wire."""
    return [
        _HEAD.format(
            path=load.path, guid=uuid.uuid4(), signature=sign(body, load.secret), length=len(body)
        ).encode()
        + body
        for body in payloads(load.count)
    ]


class _Connection(asyncio.Protocol):
    """Sends one request after the other, each when the answer to the one before is complete."""

    def __init__(self, sender: "_Sender") -> None:
        self._sender = sender
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._begun = sender.started

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return
        self._buffer = b""
        now = time.perf_counter()
        self._sender.answered(int(head[9:12]), now - self._begun)
        self._begun = now
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc  # whatever ended it, what was not answered is counted
        self._sender.lost()

    def _next(self) -> None:
        assert self._transport is not None
        request = self._sender.next()
        if request is None:
            self._transport.close()
        else:
            self._transport.write(request)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line[:15].lower() == b"content-length:":
            return int(line[15:])
    raise ValueError("an answer without its length")


class _Sender:
    def __init__(self, waiting: list[bytes], connections: int) -> None:
        self._waiting = waiting
        self._open = connections
        self.ms: list[float] = []
        self.statuses: dict[int, int] = {}
        self.done = asyncio.Event()
        self.started = time.perf_counter()

    def next(self) -> bytes | None:
        return self._waiting.pop() if self._waiting else None

    def answered(self, status: int, seconds: float) -> None:
        self.ms.append(seconds * 1e3)
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def lost(self) -> None:
        self._open -= 1
        if self._open == 0:
            self.done.set()


async def send(load: Load) -> Answers:
    """Raises OSError when the server is not there, ValueError for no HTTP, TimeoutError after two minutes."""
    waiting = requests(load)
    loop = asyncio.get_running_loop()
    gc.disable()
    cpu = time.process_time()
    sender = _Sender(waiting, load.connections)
    async with asyncio.timeout(_LATE):
        await asyncio.gather(
            *(
                loop.create_connection(lambda: _Connection(sender), "127.0.0.1", load.port)
                for _ in range(load.connections)
            )
        )
        await sender.done.wait()
    seconds = time.perf_counter() - sender.started
    return Answers(seconds, sender.ms, sender.statuses, time.process_time() - cpu)


def main() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(send(load))))
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
