"""The host's side of the channel: what an engine asks of the agent in one guest. The guest is hostile.

Every request has a deadline, every stream a window, every reply a type; a guest that breaks the protocol
loses the channel (GuestProtocolError) and nothing else happens to the host.
"""

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import msgspec

from vmm_core.errors import BadRequest, GuestError, GuestProtocolError, GuestTimeout
from vmm_core.guest import wire
from vmm_core.guest.link import Link, abandon, connect
from vmm_core.guest.process import Inflow, Outflow, Process
from vmm_core.guest.wire import Hello, Revived
from vmm_core.machine import GuestFile

__all__ = ["Channel", "Hello", "Process", "Revive", "Revived"]

INLINE_FILES = 30_000  # bytes of files that travel inside the start request itself
MAX_FILE = 256 << 10
START_TIMEOUT = 30.0
_EXEC_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Revive(msgspec.Struct, frozen=True):
    """What a fork is told before anything may run in it.

    ``token`` names the VM instance: a later host process that says hello with the same one needs no second
    revive. ``machine_id``: 32 hexadecimal digits. ``hosts``: name → address, into /etc/hosts; ``resolver``: whom
    to ask for other names, "" for nobody. ``entropy`` (64 bytes), ``boot_id`` (a UUID) and ``time_ns`` (Unix) are
    taken afresh when left out, at the moment of sending.
    """

    token: str
    hostname: str
    machine_id: str
    hosts: Mapping[str, str] = {}
    resolver: str = ""
    entropy: bytes | None = None
    boot_id: str | None = None
    time_ns: int | None = None

    def __repr__(self) -> str:
        return f"Revive(hostname={self.hostname!r}, machine_id={self.machine_id!r})"


class Channel:
    """One connection to one agent. Any number of tasks may use it.

    What a hostile guest can make the host hold: 0.4 MiB of input nobody has looked at or asked for, 512 KiB a
    command (a window each of stdout and stderr; ``Process.collect`` its ``max_bytes`` besides), ``max_bytes`` and
    256 KiB a ``get``, 8 MiB of requests it does not read. Of the event loop's time it gets turns of about 0.1 ms,
    and an eighth while it has more to say; 2,048 frames or 2 MiB that mean nothing end the channel.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    @classmethod
    async def connect(cls, path: Path, *, timeout: float = 10.0) -> Self:
        """Connect to the agent port's Unix socket, which may appear only while we wait (``timeout`` s).

        Then comes ``hello`` or ``revive``, before anything else. The path may be of any length.
        Raises GuestTimeout, ChannelClosed.
        """
        return cls(await connect(path, timeout))

    @property
    def closed(self) -> bool:
        return self._link.error is not None

    @property
    def useless(self) -> tuple[int, int]:
        """Frames and bytes the guest sent that meant nothing, since the connection began."""
        return self._link.useless

    # -------------------------------------------------------- the machine

    async def hello(self, token: str, *, timeout: float = 10.0) -> Hello:
        """Begin: the agent forgets the connection before. Commands may follow if it says ``revived``."""
        return await self._link.ask(wire.HelloRequest(token), wire.Hello, timeout)

    async def revive(self, revive: Revive, *, timeout: float = 5.0) -> Revived:
        """Begin, and give a fork its own entropy, clock and names; one frame each way. Opens the gate.

        In a copy of a running machine the answer names its commands: ``attach`` to them from ``None``. With the
        ``machine_id`` it had (a thawed machine) it keeps its ssh host keys. What programs have drawn from the
        system's entropy before cannot be taken back: two copies of a running TLS library share its state.
        """
        request = wire.ReviveRequest(
            token=revive.token,
            entropy=revive.entropy or secrets.token_bytes(64),
            time_ns=revive.time_ns or time.time_ns(),
            hostname=revive.hostname,
            machine_id=revive.machine_id,
            boot_id=revive.boot_id or str(uuid.uuid4()),
            hosts=dict(revive.hosts),
            resolver=revive.resolver,
        )
        return await self._link.ask(request, wire.Revived, timeout)

    async def quiesce(self, *, blanks: Sequence[str] = (), timeout: float = 30.0) -> None:
        """Before a snapshot: sync, forget commands and token. Raises GuestRefused while a command runs.

        ``blanks`` are paths on a tmpfs of the guest: files of mode 600 that are made now, for the user ``runner``,
        so that giving them their content at the start of the first command costs next to nothing.
        """
        await self._link.ask(wire.QuiesceRequest(blanks=tuple(blanks)), wire.Done, timeout)

    async def poweroff(self, *, timeout: float = 5.0) -> None:
        """Ask for a clean end. The answer comes first, then the machine goes."""
        await self._link.ask(wire.PoweroffRequest(), wire.Done, timeout)

    # -------------------------------------------------------- commands

    async def start(
        self,
        exec_id: str,
        argv: Sequence[str],
        *,
        user: str = "runner",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        files: Sequence[GuestFile] = (),
    ) -> Process:
        """Start a command, or join the one that already has this id. ``cwd`` defaults to the user's home.

        ``files`` are written first, owned by ``user``. ``timeout`` s after its start the command and all it
        started are killed. Raises BadRequest for what cannot be asked, GuestRefused for what the guest
        cannot do: unknown user, no such program, disk full.
        """
        checked_id(exec_id)
        check_command(argv, env or {}, files)
        inline = sum(len(file.data) for file in files) <= INLINE_FILES
        if not inline:
            for file in files:
                await self.put(file.path, file.data, mode=file.mode, user=user)
        process = Process(self._link, exec_id, timeout=timeout)
        request = wire.StartRequest(
            exec=exec_id,
            stream=process.stream,
            argv=tuple(argv),
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=stdin,
            timeout_s=timeout,
            files=tuple(wire.WireFile(file.path, file.data, file.mode) for file in files) if inline else (),
        )
        return await self._begin(process, request, None, None)

    async def attach(
        self, exec_id: str, *, stdout_from: int | None = 0, stderr_from: int | None = 0
    ) -> Process:
        """Go on with a command that an earlier connection started: outputs from these offsets, no gap.

        ``None`` means the oldest byte the agent still has, that is the first unacknowledged one: what the host of
        a parent had acknowledged before the copy was made is not in the copy.
        Raises GuestRefused: ``unknown_exec``, or ``bad_offset`` for bytes that were acknowledged before.
        """
        process = Process(self._link, checked_id(exec_id))
        request = wire.AttachRequest(exec_id, process.stream, stdout_from, stderr_from)
        return await self._begin(process, request, stdout_from, stderr_from)

    async def _begin(
        self, process: Process, request: wire.Message, stdout: int | None, stderr: int | None
    ) -> Process:
        def accept(attached: wire.Attached) -> None:
            process.begin(attached, stdout, stderr)

        try:
            await self._link.ask(request, wire.Attached, START_TIMEOUT, accept)
        except BaseException:
            process.release()
            raise
        return process

    # -------------------------------------------------------- files

    async def put(
        self,
        path: str,
        data: bytes | AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        user: str = "runner",
        timeout: float = 60.0,
    ) -> None:
        """Write a file; it appears under its name when it is complete, or not at all.

        Missing directories are made and belong to ``user``. Raises GuestRefused for a path that is a
        directory or device, a full disk, an unknown user.
        """
        changed = asyncio.Event()
        stream = self._link.number()
        flow = Outflow(self._link, stream, changed)
        self._link.streams[stream] = lambda kind, payload: kind == wire.ACK and flow.on_ack(payload)
        self._link.waiters.add(changed)
        size: asyncio.Future[wire.Size] | None = None
        feeding: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(timeout):
                size = self._link.submit(wire.PutRequest(path, stream, mode & 0o7777, user), wire.Size)
                size.add_done_callback(lambda _: changed.set())
                feeding = asyncio.create_task(self._feed(flow, data, changed))
                # a refusal, or the channel's end, must not wait for a slow source of data
                await asyncio.wait((feeding, size), return_when=asyncio.FIRST_COMPLETED)
                if feeding.done():
                    await feeding
                written = (await size).size
        except TimeoutError:
            raise GuestTimeout(f"put {path}: not written within {timeout:g} s") from None
        finally:
            self._link.waiters.discard(changed)
            self._link.streams.pop(stream, None)
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait((feeding,))
            if size is not None:
                self._cancel(size, stream)
        if written != flow.sent:
            raise GuestProtocolError(f"put {path}: the guest says {written} bytes of {flow.sent}")

    async def _feed(self, flow: Outflow, data: bytes | AsyncIterable[bytes], changed: asyncio.Event) -> None:
        async for chunk in chunks(data):
            rest = memoryview(chunk)
            while rest:
                before = len(rest)
                changed.clear()
                rest = flow.push(rest)
                await self._link.drain()
                if len(rest) == before:
                    await changed.wait()
        flow.end()

    def _cancel(self, reply: asyncio.Future[wire.Size], stream: int) -> None:
        """Nobody waits for this transfer any more: an end at an impossible offset makes the agent drop it."""
        if not reply.done() and self._link.error is None:
            with suppress(GuestError):
                self._link.send(wire.EOF, stream, wire.OFFSET.pack((1 << 64) - 1))
        abandon(reply)

    async def get(self, path: str, *, max_bytes: int = 16 << 20, timeout: float = 60.0) -> bytes:
        """Read a regular file. Raises GuestRefused for anything else and for more than ``max_bytes``."""
        changed = asyncio.Event()
        stream = self._link.number()
        flow = Inflow(self._link, stream, changed)
        flow.begin(0)
        self._link.streams[stream] = flow.on_frame
        data = bytearray()
        size: asyncio.Future[wire.Size] | None = None
        try:
            async with asyncio.timeout(timeout):
                size = self._link.submit(wire.GetRequest(path, stream, max_bytes), wire.Size)
                size.add_done_callback(lambda _: changed.set())
                while not size.done():
                    changed.clear()
                    self._absorb(flow, data, max_bytes)
                    await changed.wait()
                self._absorb(flow, data, max_bytes)
                told = (await size).size
        except TimeoutError:
            raise GuestTimeout(f"get {path}: not read within {timeout:g} s") from None
        finally:
            self._link.let_go(stream, flow.expected)
            if size is not None:
                self._cancel(size, stream)
        if not flow.ended or told != len(data):
            raise GuestProtocolError(f"get {path}: the guest says {told} bytes and sent {len(data)}")
        return bytes(data)

    def _absorb(self, flow: Inflow, data: bytearray, max_bytes: int) -> None:
        data += flow.take(flow.size)
        if len(data) > max_bytes:
            error = GuestProtocolError(f"the guest sends more than the {max_bytes} bytes asked for")
            self._link.fail(error)
            raise error
        flow.acknowledge()

    # -------------------------------------------------------- the pause

    @asynccontextmanager
    async def still(self) -> AsyncGenerator[None]:
        """Within, nothing moves between host and guest: the machine's memory may be copied. It should be short."""
        try:
            await self._link.hold()
            yield
        finally:
            self._link.release()

    # -------------------------------------------------------- the end

    async def wait_closed(self) -> None:
        """Until the byte stream has ended, however: ``close``, the VM's end, a protocol error."""
        await asyncio.shield(self._link.closed)

    async def close(self) -> None:
        """Let go of the guest; its commands run on. What waits on this channel gets ChannelClosed."""
        self._link.close()
        try:
            async with asyncio.timeout(1.0):
                await self.wait_closed()
        except TimeoutError:  # a guest that does not read must not hold us up
            self._link.abort()
            await self.wait_closed()


def checked_id(exec_id: str) -> str:
    if not _EXEC_ID.fullmatch(exec_id):
        raise BadRequest(f"command id {exec_id[:80]!r}: 1 to 64 of A-Z a-z 0-9 . _ - are possible")
    return exec_id


def check_command(argv: Sequence[str], env: Mapping[str, str], files: Sequence[GuestFile]) -> None:
    if not argv or not argv[0]:
        raise BadRequest("a command needs at least the name of its program")
    if any("\0" in word for word in (*argv, *env, *env.values())):
        raise BadRequest("a command's arguments and environment cannot contain NUL")
    if any("=" in name or not name for name in env):
        raise BadRequest("an environment variable's name cannot be empty or contain '='")
    for file in files:
        if len(file.data) > MAX_FILE:
            raise BadRequest(f"{file.path}: {len(file.data)} bytes; at most {MAX_FILE} are possible")


async def chunks(data: bytes | AsyncIterable[bytes]) -> AsyncIterable[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    async for chunk in data:
        yield chunk
