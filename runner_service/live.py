"""What this process holds of one runner besides its row: the VM, the runner process, its log, and what they told."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

import structlog

from runner_service.domain import Runner, TimelineRow, timeline
from runner_service.joblog import JobLog
from runner_service.ports import GuestProcess, RunnerVm
from vmm_core.errors import VmmError
from vmm_core.machine import ExecResult, VmExit

log = structlog.get_logger("runner")
EXEC_ID = "runner"
# What actions/runner prints once it is connected and waits for its job.
LISTENING = b"Listening for Jobs"
_WATCHED_BYTES = 256 << 10
_DEATH_SECONDS = 3.0
_REST_SECONDS = 2.0


class Live:
    """The in-memory side of a runner. Nothing here is needed after a crash: the row and the VM tell it again."""

    def __init__(self, runner_id: str) -> None:
        self.runner_id = runner_id
        self.vm: RunnerVm | None = None
        self.process: GuestProcess | None = None
        self.exit: ExecResult | None = None
        self.ended: VmExit | None = None
        # The same, or what was found of a VM that ended unseen: to be written down with the next transition.
        self.ending: VmExit | None = None
        self.ending_kept = False
        self.repository: str | None = None
        self.vm_since: float | None = None
        self.lost: str | None = None
        self.lost_code = "vm_lost"
        self.listening = False
        self.looks = 0
        self.said: str | None = None
        # How its job ended, once that was asked for.
        self.verdict: str | None = None
        self.retry_at: float | None = None
        self.changes: dict[str, Any] = {}
        self.lines: list[TimelineRow] = []
        self._woken = asyncio.Event()
        self._tail = b""
        self._watched = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def note(self, runner: Runner, at: float, step: str, reason: str, waits_for: str | None = None) -> None:
        """Keep a timeline row; it is written with the next transition."""
        self.lines.append(timeline(runner, at, step, reason, waits_for))

    def wake(self) -> None:
        """Something changed: the runner's task shall look again."""
        self._woken.set()

    async def woken(self, until: float) -> None:
        """Wait for ``wake`` or the clock."""
        try:
            async with asyncio.timeout(max(0.0, until - time.time())):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()

    def take_vm(self, vm: RunnerVm) -> None:
        """Own ``vm`` from now on, and hear of its end."""
        self.vm = vm
        self.vm_since = vm.record.created_at
        self._tasks["vm"] = asyncio.create_task(self._watch_vm(vm), name=f"vm-{self.runner_id}")

    def lose(self, reason: str, code: str = "vm_lost") -> None:
        """The VM or the process is not there any more, as found after a restart."""
        self.lost, self.lost_code = reason, code
        self.wake()

    def follow(self, process: GuestProcess, joblog: JobLog) -> None:
        """Copy the process's output to its log until it ends; then ``exit`` is known."""
        self.process = process
        self._tasks["log"] = asyncio.create_task(self._pump(process, joblog), name=f"log-{self.runner_id}")

    def beside(self, work: Coroutine[None, None, None]) -> None:
        """Do something that nothing waits for and whose failure costs nothing; it ends when watching stops."""
        task = self._tasks["beside"] = asyncio.create_task(work, name=f"beside-{self.runner_id}")
        task.add_done_callback(_tell_failure)

    async def stop(self) -> None:
        """Stop watching; the VM is left as it is."""
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_vm(self, vm: RunnerVm) -> None:
        self.ended = self.ending = await vm.wait()
        self.wake()

    async def _pump(self, process: GuestProcess, joblog: JobLog) -> None:
        copying = asyncio.create_task(self._copy(process, joblog), name=f"copy-{self.runner_id}")
        try:
            result = await process.wait()
            # What the job left running in the background may hold the streams open: the rest gets a moment only.
            await asyncio.wait({copying}, timeout=_REST_SECONDS)
            self.exit = result
        except VmmError as error:
            await self._channel_broke(error)
        finally:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)
        self.wake()

    async def _copy(self, process: GuestProcess, joblog: JobLog) -> None:
        async for piece in process.output():
            self._look_for_sign(joblog.append(piece))

    def _look_for_sign(self, data: bytes) -> None:
        """Before any job ran, the runner's own first words say that it is online."""
        if self.listening or self._watched > _WATCHED_BYTES:
            return
        self._watched += len(data)
        seen = self._tail + data
        self._tail = seen[-len(LISTENING) :]
        if LISTENING in seen:
            self.listening = True
            self.wake()

    async def _channel_broke(self, error: VmmError) -> None:
        """A dying VM breaks its channel first: its death is the better reason, if it comes soon."""
        watch = self._tasks.get("vm")
        if watch is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait({watch}, timeout=_DEATH_SECONDS)
        if self.ended is None and self.exit is None:
            log.warning("channel_lost", runner=self.runner_id, error=str(error))
            self.lose(f"the channel to the guest broke: {error}", "channel_lost")


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("beside_failed", error=str(task.exception()))
