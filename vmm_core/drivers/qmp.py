"""A client of the QEMU Machine Protocol: commands in, answers out, everything bounded.

Source: QEMU's qmp-spec.txt. A VMM may have been taken over by its guest, so what it sends is
untrusted: one line is at most 1 MiB, events are passed over, every command has a deadline.
"""

import asyncio
import json
import socket
from typing import Any, cast

from vmm_core.errors import VmmProtocolError

_LINE_LIMIT = 1 << 20

Json = dict[str, Any]


class Qmp:
    """One QMP connection. ``send`` queues a command without waiting, ``execute`` waits for its answer."""

    def __init__(
        self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._sock = sock
        self._reader = reader
        self._writer = writer
        self._next_id = 0
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._failure: str | None = None
        self._task = asyncio.create_task(self._read(), name="qmp-read")
        self.send("qmp_capabilities")

    @classmethod
    async def connect(cls, path: str, *, timeout: float = 10.0) -> "Qmp":
        """Connect to a listening socket; the greeting is not waited for, commands may be pipelined."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(sock, path)
                reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_LINE_LIMIT)
        except (OSError, TimeoutError) as error:
            sock.close()
            raise VmmProtocolError(f"no connection to QEMU's monitor: {error or 'time-out'}") from error
        return cls(sock, reader, writer)

    def send(self, command: str, **arguments: Any) -> asyncio.Future[Any]:
        """Queue ``command``; the future holds its ``return`` value or VmmProtocolError."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Answers nobody waits for must not be reported as forgotten exceptions.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._failure is not None:
            future.set_exception(VmmProtocolError(f"QEMU's monitor is closed: {self._failure}"))
            return future
        self._next_id += 1
        message: Json = {"execute": command, "id": self._next_id}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._pending[self._next_id] = future
        self._writer.write(json.dumps(message).encode() + b"\n")
        return future

    async def execute(self, command: str, *, timeout: float = 10.0, **arguments: Any) -> Any:
        """Run ``command``; its ``return`` value. VmmProtocolError on an error, silence or a closed monitor."""
        try:
            async with asyncio.timeout(timeout):
                return await self.send(command, **arguments)
        except TimeoutError:
            raise VmmProtocolError(f"QEMU did not answer {command} within {timeout:.0f} s") from None

    async def lend(self, name: str, fd: int) -> None:
        """Hand a descriptor to QEMU, which knows it as ``name`` from then on (``getfd``, over SCM_RIGHTS)."""
        await self._writer.drain()
        request = json.dumps({"execute": "getfd", "arguments": {"fdname": name}, "id": 0}).encode()
        answer = self._pending[0] = asyncio.get_running_loop().create_future()
        # Past the stream's buffer, which is empty between commands: only the socket itself can carry descriptors.
        socket.send_fds(self._sock, [request + b"\n"], [fd])
        try:
            async with asyncio.timeout(10):
                await answer
        except TimeoutError:
            raise VmmProtocolError("QEMU did not take a descriptor within 10 s") from None

    async def close(self) -> None:
        self._task.cancel()
        self._writer.close()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._receive(json.loads(line))
            self._fail("the connection ended")
        except (OSError, ValueError, RecursionError) as error:
            self._fail(str(error))
        finally:
            self._fail("closed")
            self._writer.close()

    def _receive(self, message: object) -> None:
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        answer = cast("Json", message)
        number = answer.get("id", 0)
        if "event" in answer or not isinstance(number, int):
            return
        future = self._pending.pop(number, None)
        if future is None or future.done():
            return
        if "return" in answer:
            future.set_result(answer["return"])
        elif "error" in answer:
            future.set_exception(VmmProtocolError(f"QEMU refused: {str(answer['error'])[:300]}"))

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(VmmProtocolError(f"QEMU's monitor closed: {why}"))
