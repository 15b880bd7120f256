"""An in-memory hypervisor with the part of the engine's API that the control plane uses.

``FakeHost`` is the machine: what runs on it outlives every ``FakeEngine``, as VMs outlive the service. A command
whose program is known (``host.programs``) runs as a task that writes to its streams; output is kept for ``attach``.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Literal

from runner_service.domain import Parent, Template
from vmm_core.errors import ChannelClosed, GuestRefused, UnknownTemplate, UnknownVm, VmDied, WrongOwner
from vmm_core.machine import (
    EgressRule,
    ExecResult,
    ForkTimings,
    Frozen,
    GuestFile,
    MachineSpec,
    Output,
    VmExit,
    VmRecord,
    VmUsage,
)

Write = Callable[[bytes], None]
Program = Callable[["FakeMachine", dict[str, bytes], Write], Awaitable[int]]
Gate = Callable[[str], None]


class FakeHost:
    """The machine, its templates, and what its guests can run: program name → coroutine."""

    def __init__(self, templates: Sequence[Template] = ()) -> None:
        self.templates = list(templates)
        # What the names of parents mean, and what they meant before: it can still be forked.
        self.parents: list[Parent] = []
        self.replaced: list[Parent] = []
        self.snapshots: set[str] = set()
        self.withdrawn: dict[str, frozenset[str]] = {}
        self.touched: list[str] = []
        self.pruned: list[tuple[int | None, int]] = []
        self.machines: dict[str, FakeMachine] = {}
        self.programs: dict[str, Program] = {}
        self.launches = 0
        self.fork_seconds = 0.001
        self.fork_errors: list[BaseException] = []
        self.endings: dict[str, VmExit] = {}
        self.usage = VmUsage(cpu_seconds=1.5, peak_bytes=64 << 20)
        self.guest_oom = ""
        self.frozen: dict[str, Frozen] = {}
        self.freeze_errors: list[BaseException] = []
        self.frozen_bytes = 10 << 20
        self._numbers = itertools.count(1)

    def next_id(self) -> str:
        return f"vm-{next(self._numbers):04d}"

    async def close(self) -> None:
        for machine in list(self.machines.values()):
            machine.end(VmExit(kind="destroyed"))
        await asyncio.sleep(0)


class FakeMachine:
    """A VM: its record, its commands, its end."""

    def __init__(self, host: FakeHost, record: VmRecord) -> None:
        self.host = host
        self.record = record
        self.commands: dict[str, FakeCommand] = {}
        self.ended: asyncio.Future[VmExit] = asyncio.get_running_loop().create_future()

    def end(self, how: VmExit) -> None:
        """The VM is over, whoever decided it."""
        self.host.machines.pop(self.record.id, None)
        for command in self.commands.values():
            command.task.cancel()
            command.changed()
        if not self.ended.done():
            self.ended.set_result(how)


class FakeCommand:
    """A command in a VM, as the guest agent keeps it: output and exit stay until the VM ends."""

    def __init__(self, machine: FakeMachine, program: Program, files: dict[str, bytes]) -> None:
        self.machine = machine
        self.stdout = bytearray()
        self.exit: ExecResult | None = None
        self._waiting: set[asyncio.Event] = set()
        self.task = asyncio.create_task(self._run(program, files))

    async def _run(self, program: Program, files: dict[str, bytes]) -> None:
        code = await program(self.machine, files, self.write)
        self.exit = ExecResult(code=code)
        self.changed()

    def write(self, data: bytes) -> None:
        self.stdout += data
        self.changed()

    def changed(self) -> None:
        for event in self._waiting:
            event.set()

    async def change(self) -> None:
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            if self.machine.ended.done():
                raise ChannelClosed("the VM ended")
            await event.wait()
            if self.machine.ended.done():
                raise ChannelClosed("the VM ended")
        finally:
            self._waiting.discard(event)


class FakeProcess:
    """One connection's view of a command."""

    def __init__(self, command: FakeCommand, offset: int) -> None:
        self._command = command
        self._offset = offset

    async def output(self) -> AsyncIterator[Output]:
        command = self._command
        while True:
            data = bytes(command.stdout[self._offset : self._offset + 4096])
            if data:
                yield Output("stdout", self._offset, data)
                self._offset += len(data)
            elif command.exit is not None:
                return
            else:
                await command.change()

    async def wait(self, *, timeout: float | None = None) -> ExecResult:
        async with asyncio.timeout(timeout):
            while self._command.exit is None:
                await self._command.change()
        return self._command.exit

    async def kill(self, signal: int = 9) -> None:
        self._command.task.cancel()
        self._command.exit = ExecResult(code=128 + signal, signal=signal)
        self._command.changed()


class FakeVm:
    """A VM as its owner sees it."""

    def __init__(self, machine: FakeMachine, gate: Gate) -> None:
        self._machine = machine
        self._gate = gate
        self.timings = ForkTimings(disk_ms=1.0, spawn_ms=20.0, revive_ms=30.0)

    @property
    def id(self) -> str:
        return self._machine.record.id

    @property
    def record(self) -> VmRecord:
        return self._machine.record

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
    ) -> FakeProcess:
        self._gate("before start")
        self._alive()
        program = self._machine.host.programs.get(argv[0].rsplit("/", 1)[-1])
        if program is None:
            raise GuestRefused(f"{argv[0]}: no such file")
        if exec_id not in self._machine.commands:
            content = {file.path.rsplit("/", 1)[-1]: file.data for file in files}
            self._machine.commands[exec_id] = FakeCommand(self._machine, program, content)
        self._gate("start")
        return FakeProcess(self._machine.commands[exec_id], 0)

    async def attach(self, exec_id: str, *, stdout_from: int = 0, stderr_from: int = 0) -> FakeProcess:
        self._gate("attach")
        self._alive()
        command = self._machine.commands.get(exec_id)
        if command is None:
            raise GuestRefused(f"no command {exec_id}")
        return FakeProcess(command, stdout_from)

    async def wait(self) -> VmExit:
        return await asyncio.shield(self._machine.ended)

    async def freeze(self, *, ttl: float = 7 * 86400.0) -> Frozen:
        self._gate("before freeze")
        self._alive()
        host, now = self._machine.host, time.time()
        if host.freeze_errors:
            raise host.freeze_errors.pop(0)
        frozen = Frozen(f"frozen-{self.id}", self.record, frozen_at=now, expires_at=now + ttl)
        host.frozen[self.id] = frozen
        # Published, and not ended yet: both exist for a moment, and after a crash the snapshot is the machine.
        self._gate("freeze published")
        reason = f"frozen as {frozen.digest}"
        self._machine.end(VmExit(kind="frozen", cause="frozen", reason=reason, usage=host.usage))
        self._gate("freeze")
        return frozen

    async def destroy(self) -> None:
        self._gate("before destroy")
        host = self._machine.host
        self._machine.end(
            VmExit(
                kind="destroyed",
                cause="destroyed",
                reason="destroyed by its owner",
                usage=host.usage,
                guest_oom=host.guest_oom,
            )
        )
        self._gate("destroy")

    def _alive(self) -> None:
        if self._machine.ended.done():
            raise VmDied(f"VM {self.id} ended")


class FakeEngine:
    """One process's hold on the host. ``gate`` hears of every effect, before and after, and may raise."""

    def __init__(self, host: FakeHost, gate: Gate = lambda _what: None) -> None:
        self.host = host
        self._gate = gate
        self._own: set[str] = set()

    async def launch(
        self,
        parent: str,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
        allow: Sequence[EgressRule] | None = None,
        hostname: str | None = None,
        owner: str | None = None,
    ) -> FakeVm:
        self._gate("before launch")
        parents = [*self.host.parents, *self.host.replaced]
        known = [*self.host.templates, *(warm.machine for warm in parents)]
        template = next((t for t in known if parent in (t.name, t.digest)), None)
        if template is None:
            raise UnknownTemplate(f"there is no template {parent!r}")
        whose = next((warm.owner for warm in parents if warm.digest == template.digest), None)
        if whose is not None and owner != whose:
            raise WrongOwner(f"{template.name} belongs to {whose}, it is not forked for {owner}")
        await asyncio.sleep(self.host.fork_seconds)
        if self.host.fork_errors:
            raise self.host.fork_errors.pop(0)
        now = time.time()
        record = VmRecord(
            id=self.host.next_id(),
            pid=1,
            start_ticks=1,
            machine=MachineSpec(),
            accel="tcg",
            parent=template.digest,
            template=template.name,
            created_at=now,
            expires_at=now + ttl,
            metadata=dict(metadata or {}),
        )
        machine = self.host.machines[record.id] = FakeMachine(self.host, record)
        self.host.launches += 1
        self._own.add(record.id)
        self._gate("launch")
        return FakeVm(machine, self._gate)

    async def adopt(self) -> list[FakeVm]:
        self._gate("adopt")
        for vm_id in self.host.frozen.keys() & self.host.machines.keys():
            self.host.machines[vm_id].end(VmExit(kind="frozen", cause="frozen", reason="frozen"))
        free = [machine for vm_id, machine in self.host.machines.items() if vm_id not in self._own]
        self._own |= {machine.record.id for machine in free}
        return [FakeVm(machine, self._gate) for machine in free]

    def records(self) -> list[VmRecord]:
        return [machine.record for machine in self.host.machines.values()]

    async def destroy(self, vm_id: str) -> None:
        self._gate("before destroy")
        machine = self.host.machines.get(vm_id)
        if machine is None:
            raise UnknownVm(f"there is no VM {vm_id}")
        machine.end(VmExit(kind="destroyed", reason="destroyed"))
        self._gate("destroy")

    def frozen(self) -> list[Frozen]:
        return list(self.host.frozen.values())

    async def discard(self, vm_id: str) -> None:
        self._gate("before discard")
        if self.host.frozen.pop(vm_id, None) is None:
            raise UnknownVm(f"there is no frozen VM {vm_id}")
        self._gate("discard")

    async def frozen_size(self, digest: str) -> int:
        del digest
        return self.host.frozen_bytes

    def ending(self, vm_id: str) -> VmExit | None:
        return self.host.endings.get(vm_id)

    async def prewarm(self, parent: str) -> None:
        self._gate("prewarm")

    def die(self, vm_id: str, kind: Literal["exited", "signaled"] = "signaled") -> None:
        """The VMM process ends by itself."""
        self.host.machines[vm_id].end(VmExit(kind=kind, signal=9, reason="the VMM was killed by signal 9"))
