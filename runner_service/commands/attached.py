"""``microvm run``: a command in a fresh fork with this process's stdin, stdout and stderr, byte for byte.

SIGINT and SIGTERM end the command and the VM; nothing is left in any case.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path

import msgspec

from vmm_core.console import last_words
from vmm_core.engine import Engine
from vmm_core.errors import ChannelClosed
from vmm_core.guest.channel import Process
from vmm_core.machine import Output
from vmm_core.vm import RunningVm

_TTL = 86400.0
_PIECE = 64 << 10
_QUEUED = 8
_END_SECONDS = 5.0


class Wish(msgspec.Struct, frozen=True):
    """What to run, where, and as whom. ``timeout`` in seconds."""

    template: str
    argv: tuple[str, ...]
    user: str = "runner"
    cwd: str | None = None
    env: Mapping[str, str] = {}
    timeout: float | None = None
    timings: bool = False


async def run(data_dir: Path, wish: Wish) -> int:
    """Fork, run, destroy; the command's exit code, or 128+N when signal N ended us. Raises VmmError."""

    async def work() -> int:
        async with Engine.open(data_dir) as engine:
            return await _run(engine, wish)

    return await interruptible(work())


async def interruptible(work: Coroutine[None, None, int]) -> int:
    """What ``work`` answers, or 128+N when signal N ended it; its clean-up is waited for."""
    asked: list[int] = []
    task = asyncio.current_task()

    def stop(number: int) -> None:
        asked.append(number)
        if task is not None:
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    try:
        return await work
    except asyncio.CancelledError:
        if not asked:
            raise
        return 128 + asked[0]
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


async def _run(engine: Engine, wish: Wish) -> int:
    async with engine.fork(wish.template, ttl=_TTL, metadata={"purpose": "run"}) as vm:
        if wish.timings:
            t = vm.timings
            parts = f"disk {t.disk_ms:.1f}, start {t.spawn_ms:.1f}, revive {t.revive_ms:.1f}"
            sys.stderr.write(f"microvm: forked in {t.total_ms:.1f} ms ({parts})\n")
        process = await vm.start(
            wish.argv,
            exec_id="run",
            user=wish.user,
            env=wish.env,
            cwd=wish.cwd,
            stdin=True,
            timeout=wish.timeout,
        )
        return await passed_through(vm, process)


async def passed_through(vm: RunningVm, process: Process) -> int:
    """The exit code of a command that gets our input and whose output is ours. Raises ChannelClosed, VmmError."""
    feeding = asyncio.create_task(_feed(process), name="stdin")
    try:
        return await _attached(vm, process)
    except ChannelClosed as closed:
        raise await _reason(vm, closed) from None
    except (asyncio.CancelledError, BrokenPipeError):
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_END_SECONDS):
                await process.kill()
        raise
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _attached(vm: RunningVm, process: Process) -> int:
    """Copy the output until both streams end, then the exit code. The VM's death ends it too."""
    copying = asyncio.create_task(_copy(process), name="output")
    dying = asyncio.create_task(vm.wait(), name="vm")
    try:
        await asyncio.wait({copying, dying}, return_when=asyncio.FIRST_COMPLETED)
        if not copying.done():
            raise ChannelClosed(f"the VM ended: {dying.result().reason}")
        await copying
        return (await process.wait()).code
    finally:
        for task in (copying, dying):
            task.cancel()
        await asyncio.gather(copying, dying, return_exceptions=True)


async def _copy(process: Process) -> None:
    async for piece in process.output():
        _write(piece)


def _write(piece: Output) -> None:
    fd = 1 if piece.stream == "stdout" else 2
    rest = memoryview(piece.data)
    while rest:
        rest = rest[os.write(fd, rest) :]


async def _reason(vm: RunningVm, closed: ChannelClosed) -> Exception:
    try:
        async with asyncio.timeout(2.0):
            ended = await vm.wait()
    except TimeoutError:
        return closed
    tail = f"; console: {last_words(ended.console_tail, 500)}" if ended.console_tail else ""
    return ChannelClosed(f"the VM ended: {ended.reason}{tail}")


async def _feed(process: Process) -> None:
    """Pass our stdin on. A thread reads it, because it may be a file, a terminal, or blocked for ever."""
    pieces: asyncio.Queue[bytes] = asyncio.Queue(_QUEUED)
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(Exception):
            while True:
                data = os.read(0, _PIECE)
                asyncio.run_coroutine_threadsafe(pieces.put(data), loop).result()
                if not data:
                    return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lambda: pieces.put_nowait(b"") if not pieces.full() else None)

    # A daemon: a read that never returns must not keep us from exiting.
    threading.Thread(target=read, name="stdin", daemon=True).start()
    with contextlib.suppress(ChannelClosed):
        while data := await pieces.get():
            await process.write(data)
        await process.close_stdin()
