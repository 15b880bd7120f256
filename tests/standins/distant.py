"""The fake host behind a socket: what runs on it outlives a service that gets a real SIGKILL.

``HostServer`` lives in the test's process, beside the host. ``DistantEngine`` is the engine of a service in another
process: the same calls, sent over. When the connection breaks, what the service had under way is broken off with it,
as a launch is when its process dies. Both ends are ours: what goes over is pickled.
"""

import asyncio
import contextlib
import os
import pickle
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner_service.domain import Parent, Template
from tests.standins.engine import FakeEngine, FakeHost, FakeProcess, FakeVm
from vmm_core.errors import UnknownVm
from vmm_core.machine import ExecResult, ForkTimings, GuestFile, Output, VmExit, VmRecord

SOCKET = "host.sock"
_LENGTH = struct.Struct("!I")


class HostServer:
    """Serves ``host`` on a socket in ``directory``; each connection is a process of its own."""

    def __init__(self, host: FakeHost, directory: Path) -> None:
        self.host = host
        self.path = directory / SOCKET
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "HostServer":
        self._server = await asyncio.start_unix_server(self._connected, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        hold = _Hold(self.host)
        calls: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                number, name, args, kwargs = await _read(reader)
                if name == "cancel":
                    if number in calls:
                        calls[number].cancel()
                    continue
                calls[number] = asyncio.create_task(_answer(writer, number, hold, name, args, kwargs))
                calls[number].add_done_callback(lambda _, number=number: calls.pop(number))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            under_way = list(calls.values())
            for call in under_way:
                call.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            writer.transport.abort()


async def _answer(
    writer: asyncio.StreamWriter, number: int, hold: "_Hold", name: str, args: Any, kwargs: Any
) -> None:
    try:
        done: Any = await getattr(hold, name)(*args, **kwargs)
        answer = (number, True, done)
    except Exception as error:
        answer = (number, False, error)
    except asyncio.CancelledError:
        answer = (number, False, InterruptedError())
    if not writer.is_closing():
        writer.write(_frame(answer))


class _Hold:
    """One process's hold on the host."""

    def __init__(self, host: FakeHost) -> None:
        self._engine = FakeEngine(host)
        self._vms: dict[str, FakeVm] = {}

    async def launch(self, parent: str, **more: Any) -> tuple[VmRecord, ForkTimings]:
        return self._keep(await self._engine.launch(parent, **more))

    async def adopt(self) -> list[tuple[VmRecord, ForkTimings]]:
        return [self._keep(vm) for vm in await self._engine.adopt()]

    def _keep(self, vm: FakeVm) -> tuple[VmRecord, ForkTimings]:
        self._vms[vm.id] = vm
        return vm.record, vm.timings

    async def records(self) -> list[VmRecord]:
        return self._engine.records()

    async def ending(self, vm_id: str) -> VmExit | None:
        return self._engine.ending(vm_id)

    async def destroy(self, vm_id: str) -> None:
        await self._engine.destroy(vm_id)

    async def wait(self, vm_id: str) -> VmExit:
        return await self._vms[vm_id].wait()

    async def destroy_own(self, vm_id: str) -> None:
        await self._vms[vm_id].destroy()

    async def start(self, vm_id: str, argv: Sequence[str], **more: Any) -> None:
        await self._vms[vm_id].start(argv, **more)

    async def attach(self, vm_id: str, exec_id: str) -> None:
        await self._vms[vm_id].attach(exec_id)

    async def output(self, vm_id: str, exec_id: str, offset: int) -> Output | None:
        process = FakeProcess(self._vms[vm_id]._machine.commands[exec_id], offset)
        return await anext(process.output(), None)

    async def exit(self, vm_id: str, exec_id: str) -> ExecResult:
        return await FakeProcess(self._vms[vm_id]._machine.commands[exec_id], 0).wait()


class DistantEngine:
    """What the daemon uses of an engine. ``open`` has the signature of the real one's, as far as it is used."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.staging = path.parent
        self._path = path
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._last = 0
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, data_dir: Path, **_more: Any) -> AsyncGenerator["DistantEngine"]:
        path = data_dir / SOCKET
        engine = cls(path, *await asyncio.open_unix_connection(path))
        try:
            yield engine
        finally:
            engine._receiving.cancel()
            engine._writer.close()

    async def launch(self, parent: str, **more: Any) -> "DistantVm":
        return DistantVm(self, *await self.call("launch", parent, **more))

    async def adopt(self) -> list["DistantVm"]:
        return [DistantVm(self, *kept) for kept in await self.call("adopt")]

    async def destroy(self, vm_id: str) -> None:
        await self.call("destroy", vm_id)

    async def prewarm(self, parent: str) -> None:
        pass

    def vms(self) -> list[Any]:
        return []

    def frozen(self) -> list[Any]:
        return []

    def records(self) -> list[VmRecord]:
        return self._at_once("records")

    def ending(self, vm_id: str) -> VmExit | None:
        return self._at_once("ending", vm_id)

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self._last += 1
        number = self._last
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(_frame((number, name, args, kwargs)))
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # As the real engine: what was broken off is undone before the caller goes on.
            self._writer.write(_frame((number, "cancel", (), {})))
            with contextlib.suppress(Exception):
                done = await waiting
                if name == "launch":
                    await self.call("destroy", done[0].id)
            raise
        finally:
            del self._waiting[number]

    def _at_once(self, name: str, *args: Any) -> Any:
        """For the two that the real engine reads from files: a connection of its own, waited for."""
        with socket.socket(socket.AF_UNIX) as own:
            own.settimeout(30)
            own.connect(str(self._path))
            own.sendall(_frame((0, name, args, {})))
            with own.makefile("rb") as stream:
                (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
                _, _, done = pickle.loads(stream.read(length))
        return done

    async def _receive(self) -> None:
        try:
            while True:
                number, fine, done = await _read(self._reader)
                waiting = self._waiting.get(number)
                if waiting is None or waiting.done():
                    continue
                if fine:
                    waiting.set_result(done)
                else:
                    waiting.set_exception(done)
        except (asyncio.IncompleteReadError, ConnectionError):
            # The machine is gone, and nothing that ran on it is there any more.
            os._exit(9)


class DistantVm:
    def __init__(self, engine: DistantEngine, record: VmRecord, timings: ForkTimings) -> None:
        self._engine = engine
        self.record = record
        self.timings = timings

    @property
    def id(self) -> str:
        return self.record.id

    async def start(
        self, argv: Sequence[str], *, exec_id: str, files: Sequence[GuestFile] = (), **_more: Any
    ) -> "DistantProcess":
        await self._engine.call("start", self.id, argv, exec_id=exec_id, files=files)
        return DistantProcess(self._engine, self.id, exec_id, 0)

    async def attach(self, exec_id: str, *, stdout_from: int = 0, stderr_from: int = 0) -> "DistantProcess":
        await self._engine.call("attach", self.id, exec_id)
        return DistantProcess(self._engine, self.id, exec_id, stdout_from)

    async def wait(self) -> VmExit:
        return await self._engine.call("wait", self.id)

    async def destroy(self) -> None:
        with contextlib.suppress(UnknownVm):
            await self._engine.call("destroy_own", self.id)


class DistantProcess:
    def __init__(self, engine: DistantEngine, vm_id: str, exec_id: str, offset: int) -> None:
        self._engine = engine
        self._which = (vm_id, exec_id)
        self._offset = offset

    async def output(self) -> AsyncIterator[Output]:
        while (piece := await self._engine.call("output", *self._which, self._offset)) is not None:
            self._offset = piece.offset + len(piece.data)
            yield piece

    async def wait(self, *, timeout: float | None = None) -> ExecResult:
        async with asyncio.timeout(timeout):
            return await self._engine.call("exit", *self._which)


class FixedCatalog:
    """The ``Catalog`` of a host that has these templates and nothing else."""

    found: tuple[Template, ...] = ()

    def __init__(self, engine: DistantEngine) -> None:
        del engine

    def templates(self) -> Sequence[Template]:
        return self.found

    def parents(self) -> Sequence[Parent]:
        return ()

    def has(self, digest: str) -> bool:
        return False

    def withdrawn(self, name: str) -> frozenset[str]:
        return frozenset()

    def touch(self, digest: str) -> None:
        pass

    async def prune(self, *, budget_bytes: int | None, keep: int) -> None:
        pass


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def _frame(what: Mapping[str, Any] | tuple[Any, ...]) -> bytes:
    data = pickle.dumps(what)
    return _LENGTH.pack(len(data)) + data
