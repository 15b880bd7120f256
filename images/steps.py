"""The steps of a bake: each with its name, its time and its failure, and those that are commands in the guest."""

import contextlib
import secrets
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence

from images.errors import BakeFailed, BuildFailed
from images.events import Progress, Step
from images.plan import settle_program
from images.schema import WarmStep
from vmm_core.errors import GuestError, VmFailed
from vmm_core.machine import ExecResult
from vmm_core.vm import RunningVm

_TAIL_LINES = 20
_MOST_LINE = 2000
_PAGE_CACHE_PERCENT = 40
_SETTLE_SECONDS = 300.0


class Steps:
    """The steps of one bake, in order."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._times: list[tuple[str, float]] = []

    @property
    def times(self) -> tuple[tuple[str, float], ...]:
        """Name and seconds of each step that was done."""
        return tuple(self._times)

    @contextlib.contextmanager
    def step(self, name: str) -> Generator[Step]:
        """One step; a part that could not be built is told as the step's failure (BakeFailed)."""
        started = time.monotonic()
        try:
            yield Step(name, self._progress)
        except BuildFailed as error:
            raise BakeFailed(
                name,
                error.message,
                advice="Correct that and bake again; what is finished is kept.",
                output=error.output,
            ) from error
        self._times.append((name, time.monotonic() - started))


class GuestWork:
    """Commands in the machine that is being baked: their lines are passed on, the last ones kept for the error."""

    def __init__(self, vm: RunningVm, steps: Steps) -> None:
        self.vm = vm
        self._steps = steps
        # A fork still knows the commands its parent ran.
        self._prefix = f"bake-{secrets.token_hex(4)}"
        self._execs = 0

    async def script(self, kind: str, wanted: WarmStep, *, advice: str, cwd: str | None = None) -> list[str]:
        """Run one script of a recipe as the step ``kind: name``; its last lines. Raises BakeFailed with ``advice``."""
        name, argv = f"{kind}: {wanted.name}", ["/bin/sh", "-eu", "-c", wanted.run]
        return await self.command(
            name, argv, user=wanted.user, env=wanted.env, timeout=wanted.timeout, advice=advice, cwd=cwd
        )

    async def command(
        self,
        name: str,
        argv: Sequence[str],
        *,
        timeout: float,
        advice: str,
        user: str = "runner",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> list[str]:
        """Run a command as the step ``name``; its last lines. Raises BakeFailed with ``advice``."""
        with self._steps.step(name) as step:
            step(f"{name.rpartition(': ')[2]} (as {user}, at most {timeout:g} s)")
            result, tail = await self.run(step, argv, user=user, env=env, timeout=timeout, cwd=cwd)
            if result.timed_out:
                raise BakeFailed(
                    step.name,
                    f"it was not done after {timeout:g} s",
                    advice=f"Make it quicker, or raise its time-out. {advice}",
                    status=result.code,
                    output=tail,
                )
            if result.code != 0:
                raise BakeFailed(
                    step.name,
                    f"its command exited with status {result.code}",
                    advice=advice,
                    status=result.code,
                    output=tail,
                )
            return tail

    async def settle(self, page_cache: Sequence[str]) -> None:
        """Fill the page cache with the files of these globs, then zero what memory is free."""
        with self._steps.step("settle") as step:
            step("filling the page cache and zeroing free memory")
            argv = ["/usr/bin/python3", "-I", "-S", "-c", settle_program().decode(), str(_PAGE_CACHE_PERCENT)]
            result, tail = await self.run(step, [*argv, *page_cache], user="root", timeout=_SETTLE_SECONDS)
            if result.code != 0:
                raise BakeFailed(
                    "settle",
                    f"it exited with status {result.code}",
                    advice="Give the machine more memory.",
                    output=tail,
                )

    async def run(
        self,
        step: Step,
        argv: Sequence[str],
        *,
        timeout: float,
        user: str = "runner",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
    ) -> tuple[ExecResult, list[str]]:
        """A command's end and its last lines. BakeFailed when the machine does not survive it."""
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._execs += 1
        try:
            process = await self.vm.start(
                argv, exec_id=f"{self._prefix}-{self._execs}", user=user, env=env, cwd=cwd, timeout=timeout
            )
            pending = {"stdout": b"", "stderr": b""}
            async for piece in process.output():
                *lines, rest = (pending[piece.stream] + piece.data).replace(b"\r", b"\n").split(b"\n")
                pending[piece.stream] = rest[-4096:]
                for line in lines:
                    _tell(line, tail, step)
            for line in pending.values():
                _tell(line, tail, step)
            return await process.wait(timeout=60), list(tail)
        except (VmFailed, GuestError) as error:
            raise BakeFailed(
                step.name,
                str(error),
                advice="The machine did not survive the step: has it enough memory?",
                output=tail,
            ) from error


def _tell(line: bytes, tail: deque[str], step: Step) -> None:
    text = line.decode(errors="replace").rstrip()
    clean = "".join(char if char.isprintable() or char == "\t" else "?" for char in text)[:_MOST_LINE]
    if clean:
        tail.append(clean)
        step.log(clean)
