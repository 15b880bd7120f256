"""Runs programs of this host: output line by line, a deadline, and an end that takes their children along."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from images.errors import BuildFailed

_TAIL_LINES = 20
_LINE_LIMIT = 64 << 10
_TERM_GRACE_S = 10.0

# Debian package that brings a program, where the two names differ.
_PACKAGE_OF = {
    "mkfs.ext4": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "apt-get": "apt",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}


def require(program: str) -> str:
    """The path of a program. Raises BuildFailed that says which package brings it."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin")
    if path is None:
        package = _PACKAGE_OF.get(program, program)
        raise BuildFailed(f"{program} is not installed on this host. Install it: apt-get install {package}")
    return path


async def run(
    argv: Sequence[str],
    *,
    timeout: float,
    doing: str,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    inherit: Container[str] | None = None,
    pass_fds: Sequence[int] = (),
) -> bytes:
    """Run a program to its end and return its standard output.

    ``on_line`` gets every line of standard error as it comes. ``env`` is added to ours, or to the variables of
    ours that ``inherit`` names; ``pass_fds`` are open in the program as well. ``doing`` completes
    "could not …". The program is killed when we are, so that a dead bake leaves none running.
    Raises BuildFailed: program missing, non-zero exit (with its last lines), or ``timeout`` seconds over.
    """
    command = [require("setpriv"), "--pdeathsig", "KILL", "--", require(argv[0]), *argv[1:]]
    ours = {name: value for name, value in os.environ.items() if inherit is None or name in inherit}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**ours, "LC_ALL": "C.UTF-8", **(env or {})},
        cwd=cwd,
        pass_fds=pass_fds,
        limit=_LINE_LIMIT,
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        async with asyncio.timeout(timeout):
            output = await _communicate(process, stdin, tail, on_line)
    except TimeoutError:
        raise BuildFailed(
            f"could not {doing}: {argv[0]} was not done after {timeout:g} s", output=tail
        ) from None
    finally:
        await _end(process)
    if process.returncode != 0:
        raise BuildFailed(
            f"could not {doing}: {argv[0]} exited with status {process.returncode}", output=tail
        )
    return output


async def _communicate(
    process: asyncio.subprocess.Process,
    stdin: bytes | None,
    tail: deque[str],
    on_line: Callable[[str], None] | None,
) -> bytes:
    assert process.stdout is not None and process.stderr is not None  # noqa: S101  # both are pipes
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_feed(process, stdin))
        tasks.create_task(_follow(process.stderr, tail, on_line))
        output = tasks.create_task(process.stdout.read())
    await process.wait()
    return output.result()


async def _feed(process: asyncio.subprocess.Process, stdin: bytes | None) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(stdin or b"")
        await process.stdin.drain()
    process.stdin.close()


async def _follow(
    stream: asyncio.StreamReader, tail: deque[str], on_line: Callable[[str], None] | None
) -> None:
    pending = b""
    while chunk := await stream.read(_LINE_LIMIT):
        *lines, pending = (pending + chunk).replace(b"\r", b"\n").split(b"\n")
        pending = pending[-_LINE_LIMIT:]
        for line in [*lines]:
            _say(line, tail, on_line)
    _say(pending, tail, on_line)


def _say(line: bytes, tail: deque[str], on_line: Callable[[str], None] | None) -> None:
    text = line.decode(errors="replace").rstrip()
    if not text:
        return
    tail.append(text[:500])
    if on_line is not None:
        on_line(text)


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the whole group, a grace, then SIGKILL; nothing to do when it has ended by itself."""
    if process.returncode is not None:
        return
    for number, grace in ((signal.SIGTERM, _TERM_GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await process.wait()
                return
