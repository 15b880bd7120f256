"""One bake as a process of its own: ``microvm bake --repo … --json --credential-stdin``, and what it answers.

stdin   the credential as JSON, or nothing; the only place where it ever is
stdout  one JSON object: what was made (exit 0), or which step failed, why, and what to do (exit 1)
stderr  progress, a line a step: the log

It leads a process group of its own, at low priority, and is ended with it: at its deadline, and when the service
stops. Should the service be killed, the kernel tells it to end; what survives that is known by pid and start.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence

import msgspec

from runner_service.domain import BakeStep
from runner_service.joblog import JobLog
from vmm_core.machine import Output
from vmm_core.process import start_ticks

_ANSWER_BYTES = 4 << 20
_LINE_BYTES = 64 << 10
_TERM_SECONDS = 10.0
_MESSAGE_CHARS = 4000
_OUTPUT_LINES, _OUTPUT_CHARS = 100, 500


class Baked(msgspec.Struct, frozen=True):
    """A parent was made, or found to be there already."""

    name: str
    digest: str
    key: str
    commit: str
    cache_hit: bool = False
    incremental: bool = False
    seconds: float = 0.0
    steps: tuple[BakeStep, ...] = ()


class Failed(msgspec.Struct, frozen=True):
    """No parent was made. ``again``: another try may do better. ``output`` holds the last lines of the step."""

    code: str
    message: str
    step: str | None = None
    advice: str = ""
    output: tuple[str, ...] = ()
    again: bool = True


class _Refusal(msgspec.Struct):
    error: str
    message: str
    step: str | None = None
    advice: str = ""
    output: tuple[str, ...] = ()


_STEP = re.compile(rb"([a-z][a-z0-9 ._-]{0,79}): ")
# What a repository says wrongly stays wrong until it says otherwise.
_FINAL = frozenset({"recipe_invalid", "bad_request", "wrong_use"})


class BakeProcess:
    """A running bake. ``pid`` leads its group; ``ticks`` tells it from a later process of that number."""

    def __init__(self, process: asyncio.subprocess.Process, joblog: JobLog) -> None:
        self._process = process
        self._log = joblog
        self._step: str | None = None
        self.pid = process.pid
        self.ticks = start_ticks(process.pid) or 0

    @classmethod
    async def start(
        cls, argv: Sequence[str], joblog: JobLog, *, nice: int, environ: Mapping[str, str]
    ) -> "BakeProcess":
        """Start ``argv``; it waits for its credential. Raises OSError."""
        low = ["nice", "-n", str(nice)] if shutil.which("nice") else []
        # SIGTERM, not SIGKILL: it has a VM to destroy.
        tied = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        process = await asyncio.create_subprocess_exec(
            *tied, *low, *argv,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            start_new_session=True, env=dict(environ), limit=_LINE_BYTES,
        )  # fmt: skip
        return cls(process, joblog)

    async def finish(self, credential: bytes, *, limit: float) -> Baked | Failed:
        """Give it its credential and wait for its answer, ``limit`` seconds at most. Cancelled, it is ended too."""
        answer = b""
        try:
            async with asyncio.timeout(limit):
                answer, _, _ = await asyncio.gather(
                    self._read_answer(), self._keep_log(), self._tell(credential)
                )
                code = await self._process.wait()
        except TimeoutError:
            await self.end()
            return Failed(
                "timed_out",
                f"the bake took longer than its limit of {limit:.0f} s and was ended",
                step=self._step,
                advice="See which step hangs in its log; a bake that needs longer needs a larger [bakes] limit_s.",
            )
        finally:
            await self.end()
        return self._read(code, answer)

    async def end(self) -> None:
        """End it and all it started: politely, then not."""
        if self._process.returncode is None:
            signal_group(self.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TERM_SECONDS):
                    await self._process.wait()
        # What it left behind, if anything, is of its group.
        signal_group(self.pid, signal.SIGKILL)
        if self._process.returncode is None:
            await self._process.wait()

    async def _tell(self, credential: bytes) -> None:
        stdin = self._process.stdin
        assert stdin is not None, "it was started with a pipe"  # noqa: S101
        # It may have ended already: its answer says why.
        with contextlib.suppress(ConnectionError):
            stdin.write(credential)
            await stdin.drain()
        with contextlib.suppress(ConnectionError):
            stdin.close()
            await stdin.wait_closed()

    async def _read_answer(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None, "it was started with a pipe"  # noqa: S101
        kept = bytearray()
        while piece := await stdout.read(_LINE_BYTES):
            kept += piece[: max(0, _ANSWER_BYTES - len(kept))]
        return bytes(kept)

    async def _keep_log(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None, "it was started with a pipe"  # noqa: S101
        while piece := await stderr.read(_LINE_BYTES):
            self._log.append(Output("stderr", self._log.offsets["stderr"], piece))
            told = _STEP.match(piece.rstrip().rpartition(b"\n")[2])
            if told is not None:
                self._step = told[1].decode()

    def _read(self, code: int, answer: bytes) -> Baked | Failed:
        if code == 0:
            try:
                return msgspec.json.decode(answer, type=Baked)
            except msgspec.DecodeError as error:
                return Failed(
                    "answer_invalid", f"the bake ended well, but what it made is not understood: {error}"
                )
        if code == 2:
            return Failed("wrong_use", "the bake's command line was refused: see its log", again=False)
        if code < 0:
            return Failed("killed", f"the bake was ended by signal {-code}", step=self._step)
        try:
            said = msgspec.json.decode(answer, type=_Refusal)
        except msgspec.DecodeError:
            return Failed(
                "bake_broken",
                f"the bake ended with exit code {code} and did not say why: see its log",
                step=self._step,
            )
        return Failed(
            said.error,
            said.message[:_MESSAGE_CHARS],
            step=said.step,
            advice=said.advice[:_MESSAGE_CHARS],
            output=tuple(line[:_OUTPUT_CHARS] for line in said.output[-_OUTPUT_LINES:]),
            again=said.error not in _FINAL,
        )


async def end_survivor(pid: int, ticks: int) -> bool:
    """End the group of a bake that outlived its service; False when it is gone (or the pid is another's by now)."""
    if start_ticks(pid) != ticks:
        return False
    signal_group(pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TERM_SECONDS):
            while start_ticks(pid) == ticks:  # noqa: ASYNC110 - nobody tells: it is no child of ours
                await asyncio.sleep(0.05)
    if start_ticks(pid) == ticks:
        signal_group(pid, signal.SIGKILL)
    return True


def signal_group(pid: int, number: int) -> None:
    """Signal the group that ``pid`` leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def credential_bytes(username: str, password: str) -> bytes:
    """What the process reads from stdin."""
    return msgspec.json.encode({"username": username, "password": password})
