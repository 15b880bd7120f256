"""One running VM as its owner sees it: run commands, move files, measure, wait for its end, destroy it.

live ──► VMM ends by itself, TTL passes, or destroy() ──► ended (an exit) ──► destroy() ──► nothing left
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from vmm_core import accounting, console, evidence
from vmm_core.drivers.base import DISK, Vm
from vmm_core.errors import ChannelClosed, VmDied
from vmm_core.guest.channel import Channel, Process
from vmm_core.machine import ExecResult, ForkTimings, Frozen, GuestFile, VmExit, VmRecord, VmUsage

_EXIT_GRACE = 2.0
_LAST_WORDS_SECONDS = 0.3
# Milliseconds, unless the host is overloaded.
_READING_SECONDS = 0.5


class Forks(Protocol):
    """What makes children of a running machine, and freezes it."""

    async def fork(
        self,
        vm: "RunningVm",
        count: int,
        *,
        ttl: float,
        metadata: Mapping[str, str] | None = None,
        hostname: str | None = None,
    ) -> "list[RunningVm]": ...

    async def freeze(self, vm: "RunningVm", ttl: float) -> Frozen: ...


class Parts(msgspec.Struct, frozen=True):
    """What a running VM is made of. ``release`` gives its berth back once its VMM has ended."""

    record: VmRecord
    directory: Path
    driver_vm: Vm
    channel: Channel
    capture: console.Console
    lock: int
    release: Callable[[], Awaitable[None]]
    timings: ForkTimings


class RunningVm:
    """A VM this process owns. Made by the engine only."""

    def __init__(self, parts: Parts, on_gone: Callable[["RunningVm"], None], live: "Forks") -> None:
        self.record = parts.record
        self.directory = parts.directory
        self.channel = parts.channel
        self.timings = parts.timings
        self.driver_vm = parts.driver_vm
        self._capture = parts.capture
        self._lock = parts.lock
        self._release = parts.release
        self._on_gone = on_gone
        self._live = live
        self._exec_count = 0
        self._worked = False
        self._read = False
        self._reading: VmUsage | None = None
        self._witness: evidence.OomWitness | None = None
        self._verdict: VmExit | None = None
        self._exit: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()
        self._destroying: asyncio.Task[None] | None = None
        self._watch = asyncio.create_task(self._watch_end(), name=f"watch-{parts.record.id}")

    @property
    def id(self) -> str:
        return self.record.id

    async def exec(
        self,
        argv: Sequence[str] | str,
        *,
        user: str = "runner",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes | None = None,
        timeout: float | None = None,
        max_bytes: int = 8 << 20,
    ) -> ExecResult:
        """Run a command to its end and keep at most ``max_bytes`` of its output. A string runs under ``/bin/sh -c``.

        Raises VmDied when the VM ends first, GuestRefused when the command cannot be started.
        """
        command = ["/bin/sh", "-c", argv] if isinstance(argv, str) else list(argv)
        self._exec_count += 1
        exec_id = f"exec-{os.getpid()}-{self._exec_count}"
        try:
            process = await self.start(
                command,
                exec_id=exec_id,
                user=user,
                env=env,
                cwd=cwd,
                stdin=stdin is not None,
                timeout=timeout,
            )
            feeding = asyncio.ensure_future(_feed(process, stdin))
            try:
                return await process.collect(max_bytes=max_bytes)
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
                process.release()
        except ChannelClosed as closed:
            raise await self._death(closed) from None

    async def start(
        self,
        argv: Sequence[str],
        *,
        exec_id: str,
        user: str = "runner",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        files: Sequence[GuestFile] = (),
    ) -> Process:
        """Start a command and stream it; ``exec_id`` names it for ``attach`` from this or a later process."""
        self._worked = True
        return await self.channel.start(
            exec_id, argv, user=user, env=env, cwd=cwd, stdin=stdin, timeout=timeout, files=files
        )

    async def attach(
        self, exec_id: str, *, stdout_from: int | None = 0, stderr_from: int | None = 0
    ) -> Process:
        """Take up the streams of a command that runs already, from these byte offsets on.

        ``None``: from the oldest byte the guest still has, which in a fork of a running machine is the first that
        its parent's host had not acknowledged.
        """
        self._worked = True
        return await self.channel.attach(exec_id, stdout_from=stdout_from, stderr_from=stderr_from)

    async def put(
        self, path: str, data: bytes | AsyncIterable[bytes], *, mode: int = 0o644, user: str = "runner"
    ) -> None:
        await self.channel.put(path, data, mode=mode, user=user)

    async def get(self, path: str, *, max_bytes: int = 16 << 20) -> bytes:
        return await self.channel.get(path, max_bytes=max_bytes)

    @contextlib.asynccontextmanager
    async def fork(
        self,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
        hostname: str | None = None,
    ) -> "AsyncGenerator[RunningVm]":
        """A child of this machine as it is now, destroyed at the end. Otherwise as ``fork_many``."""
        (child,) = await self._live.fork(self, 1, ttl=ttl, metadata=metadata, hostname=hostname)
        try:
            yield child
        finally:
            await child.destroy()

    async def fork_many(
        self, count: int, *, ttl: float = 3600.0, metadata: Mapping[str, str] | None = None
    ) -> "list[RunningVm]":
        """``count`` children in one short pause of this machine, which runs on. All of them, or none when this raises.

        They hold its processes, files and tmpfs; their names, boot ids, entropy and clocks are their own. Commands
        under way go on in each: ``attach`` to them. ``metadata`` is this machine's when left out.
        Raises PoolFull, HostOutOfMemory, VmDied, BadRequest, VmmProtocolError; this machine runs on in any case.
        """
        return await self._live.fork(self, count, ttl=ttl, metadata=metadata)

    async def freeze(self, *, ttl: float = 7 * 86400.0) -> Frozen:
        """Stop this machine into a snapshot that outlives service and host; ``Engine.thaw`` runs it again.

        It is kept for ``ttl`` seconds. When this raises (PoolFull, …) the machine runs on.
        """
        return await self._live.freeze(self, ttl)

    async def usage(self) -> VmUsage:
        """What it costs now. VmDied when it has ended; then ``wait`` tells what it cost in all."""
        record, disk = self.record, self.directory / DISK
        now = await asyncio.to_thread(accounting.usage, record.pid, disk, start_ticks=record.start_ticks)
        if self._witness is not None:
            self._witness.look()
        total = self._reading = accounting.total(self._reading, now) or now
        return total

    @property
    def worked(self) -> bool:
        """Whether anything was run in it."""
        return self._worked

    @property
    def last_usage(self) -> VmUsage | None:
        """The last reading, which costs nothing; None when it was never read."""
        return self._reading

    @property
    def ended(self) -> VmExit | None:
        """How it ended, if it has."""
        return self._exit.result() if self._exit.done() and not self._exit.cancelled() else None

    async def wait(self) -> VmExit:
        """How the VM ended, once it has: by itself, at its TTL, or because it was destroyed."""
        return await asyncio.shield(self._exit)

    async def destroy(self) -> None:
        """End the VM and give everything back. Safe to call again, and from several tasks at once."""
        self.end_as(VmExit(kind="destroyed", cause="destroyed", reason="destroyed by its owner"))
        if self._destroying is None or (self._destroying.done() and self._destroying.exception() is not None):
            self._destroying = asyncio.create_task(self._destroy(), name=f"destroy-{self.id}")
        await asyncio.shield(self._destroying)

    async def expire(self) -> None:
        """Destroy it because its time to live has passed."""
        self.end_as(VmExit(kind="expired", cause="expired", reason="its time to live has passed"))
        await self.destroy()

    async def detach(self) -> None:
        """Let go of a VM that shall outlive this process: everything of ours is closed, the VM runs on."""
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._capture.close()
        await self.channel.close()
        await self.driver_vm.detach()
        self._unlock()
        if not self._exit.done():
            self._exit.cancel()  # nobody here will hear of its end any more

    def end_as(self, verdict: VmExit) -> None:
        """Say beforehand how the coming end is to be told; the first word counts."""
        if self._verdict is None and not self._exit.done():
            self._verdict = verdict

    async def _watch_end(self) -> None:
        # Not before: a fork does not wait for what only its end needs.
        witness = self._witness = evidence.OomWitness(self.record.pid)
        found = await self.driver_vm.wait()
        await self._capture.finish(_LAST_WORDS_SECONDS)
        verdict = self._verdict
        oom = None
        if verdict is None and found.cause in ("vmm_killed", "unknown"):
            oom = await asyncio.to_thread(witness.testimony)
        if not self._exit.done():
            self._exit.set_result(
                evidence.tell(
                    found,
                    verdict,
                    console=console.text(self.directory),
                    tail=console.tail(self.directory),
                    oom=oom,
                    usage=accounting.total(self._reading, found.usage),
                )
            )

    async def read(self) -> None:
        """What its memory came to is known only while it lives; its end does not wait long for that."""
        with contextlib.suppress(VmDied, OSError, TimeoutError):
            async with asyncio.timeout(_READING_SECONDS):
                await self.usage()

    def keep_reading(self) -> None:
        """It stands still since it was read: its end takes no other reading."""
        self._read = True

    async def _destroy(self) -> None:
        if not self._watch.done() and not self._read:
            await self.read()
        await self.driver_vm.kill()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._capture.close()
        await self.channel.close()
        if self.record.slot is None and self.record.machine.network.allow:
            # Relays that wait for their destination.
            await asyncio.to_thread(end_processes_in, self.directory)
        await self._release()
        remove_tree(self.directory)
        self._unlock()
        self._on_gone(self)

    @property
    def being_destroyed(self) -> asyncio.Task[None] | None:
        """The destruction under way, which goes on when the one who asked for it was cancelled."""
        task = self._destroying
        return task if task is not None and not task.done() else None

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    async def _death(self, closed: BaseException) -> BaseException:
        """The channel broke: VmDied with the reason when the VM is ending, else what happened to the channel."""
        try:
            async with asyncio.timeout(_EXIT_GRACE):
                ended = await self.wait()
        except TimeoutError:
            return closed
        return VmDied(
            f"VM {self.id} ended: {ended.reason}"
            + (f"\nconsole: {console.last_words(ended.console_tail, 500)}" if ended.console_tail else "")
        )


def end_processes_in(directory: Path) -> None:
    """Kill what was started in a VM's directory: relays, or a VMM whose starter died before it wrote down its pid."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and entry.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                if (entry / "cwd").readlink() == directory:
                    os.kill(int(entry.name), signal.SIGKILL)


def remove_tree(directory: Path) -> None:
    """Remove a VM's directory: its files are few and flat, and a vanished one is no error."""
    shutil.rmtree(directory, ignore_errors=True)


async def _feed(process: Process, data: bytes | None) -> None:
    if data is None:
        return
    # A command may end without reading all it was given.
    with contextlib.suppress(ChannelClosed, BrokenPipeError):
        await process.write(data)
        await process.close_stdin()
