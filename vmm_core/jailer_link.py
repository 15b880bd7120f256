"""The socket to the jailer process (jailer.py), and that process: started, asked for cells, left or ended."""

import asyncio
import base64
import contextlib
import errno
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vmm_core import kernel, seccomp
from vmm_core.cgroup import Cgroups
from vmm_core.errors import BadRequest, HostUnfit, VmmProtocolError
from vmm_core.process import VmmProcess

ANSWER_SECONDS = 30.0

# The jailer imports its own three modules of this package and nothing else of it: small, and quick to start.
LAUNCH = """
import sys, types
package = types.ModuleType("vmm_core")
package.__path__ = [sys.argv[1]]
sys.modules["vmm_core"] = package
from vmm_core.jailer import main
main(int(sys.argv[2]))
"""

# Jailers that were left to their VMs by an engine of this process: reaped when another one opens or closes.
_left: set[int] = set()


class JailerEnded(HostUnfit):
    """It was there, and is not any more."""


class Link:
    """One jailer process and the socket to it."""

    def __init__(self, process: VmmProcess, sock: socket.socket) -> None:
        self._process = process
        self._sock = sock
        self._asked: dict[int, asyncio.Future[tuple[int, socket.socket]]] = {}
        self._next = 0
        self._sending = asyncio.Lock()
        self._hearing: asyncio.Task[None] | None = None
        self._broken = False

    @classmethod
    async def start(cls, root: Path | None, cgroups: Cgroups, on_lost: Callable[[object], None]) -> "Link":
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            ours.setblocking(False)
            argv = [
                sys.executable,
                "-I",
                "-S",
                "-c",
                LAUNCH,
                str(Path(__file__).parent),
                str(theirs.fileno()),
            ]
            try:
                process = VmmProcess.spawn(argv, cwd=Path("/"), pass_fds=[theirs.fileno()])
            except BaseException:
                ours.close()
                raise
        link = cls(process, ours)
        try:
            await link.send(_settings(root, cgroups), [])
            async with asyncio.timeout(ANSWER_SECONDS):
                said, _ = await receive(ours)
            if said is None or "why" in said:
                raise HostUnfit(
                    f"the jailer did not start: {said['why'] if said else process.log_text()[-500:]}"
                )
        except BaseException as error:
            await link.close(wait=True)
            if isinstance(error, (OSError, TimeoutError)):
                raise HostUnfit(f"the jailer did not start: {error!r} {process.log_text()[-500:]}") from error
            raise
        link._hearing = asyncio.create_task(link._hear(), name="jailer")
        link._hearing.add_done_callback(on_lost)
        return link

    @property
    def alive(self) -> bool:
        return not self._broken and self._hearing is not None and not self._hearing.done()

    async def send(self, message: Mapping[str, Any], fds: Sequence[int]) -> None:
        async with self._sending:
            try:
                await send(self._sock, message, fds)
            except OSError as error:
                self._broken = True
                raise self._ended() from error

    async def ask(self, order: dict[str, Any], fds: Sequence[int]) -> tuple[int, socket.socket]:
        """Send the order for a cell; its pid and our end of its socket."""
        self._next += 1
        number = self._next
        future: asyncio.Future[tuple[int, socket.socket]] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            await self.send({**order, "do": "cell", "id": number}, fds)
            async with asyncio.timeout(ANSWER_SECONDS):
                return await future
        except TimeoutError:
            raise HostUnfit(f"the jailer made no cell within {ANSWER_SECONDS:.0f} s") from None
        finally:
            self._asked.pop(number, None)

    async def close(self, *, wait: bool) -> None:
        """Hang up. With ``wait`` it must end now; otherwise it lives on with the VMs it watches."""
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
        self._sock.close()
        if wait:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._process.wait()
            await self._process.end()
        elif self._process.running:
            _left.add(self._process.pid)
        self._process.close()

    async def _hear(self) -> None:
        try:
            while True:
                said, fds = await receive(self._sock)
                if said is None:
                    return
                self._take(said, fds)
        finally:
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(self._ended())

    def _ended(self) -> JailerEnded:
        return JailerEnded(f"the jailer has ended: {self._process.log_text()[-500:]}")

    def _take(self, said: dict[str, Any], fds: list[int]) -> None:
        future = self._asked.get(said.get("id", 0))
        if "error" in said:
            if future is not None and not future.done():
                future.set_exception(HostUnfit(f"a cell for a VMM could not be made: {said['error']}"))
        elif future is None or future.done():
            end_child(said["pid"])  # whoever asked has given up
            for fd in fds:
                os.close(fd)
        elif not fds:
            end_child(said["pid"])
            future.set_exception(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        else:
            sock = socket.socket(fileno=fds[0])
            sock.setblocking(False)
            future.set_result((said["pid"], sock))


def end_child(pid: int) -> None:
    """End a cell that nobody has a use for. It is our child and a moment old: this takes no time."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def reap_left() -> None:
    """Wait for the jailers that have ended since their engine let go of them."""
    for pid in list(_left):
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid
        if ended:
            _left.discard(pid)


def _settings(root: Path | None, cgroups: Cgroups) -> dict[str, Any]:
    # A page that nothing else is mapped at, and that nobody who does not know it will guess.
    address = 0x10_0000_0000 + secrets.randbelow(1 << 34) * 4096
    return {
        "root": None if root is None else str(root),
        "cgroups": [str(hierarchy.path) for hierarchy in cgroups.hierarchies],
        "exec_address": address,
        "filter": base64.b64encode(seccomp.program(address)).decode(),
        "kvm": Path("/dev/kvm").exists(),
    }


async def send(sock: socket.socket, message: Mapping[str, Any], fds: Sequence[int]) -> None:
    """One message and its descriptors. Raises BadRequest when it is too long, OSError when nobody is there."""
    data = json.dumps({**message, "fds": len(fds)}).encode()
    if len(data) > kernel.MESSAGE_LIMIT or len(fds) > kernel.FD_LIMIT:
        raise BadRequest(
            f"a command line of {len(data)} bytes with {len(fds)} descriptors: at most "
            f"{kernel.MESSAGE_LIMIT} and {kernel.FD_LIMIT}"
        )
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            socket.send_fds(sock, [data], list(fds))
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise VmmProtocolError(f"no message was taken within {ANSWER_SECONDS:.0f} s") from None
            await asyncio.sleep(0.002)
        else:
            return


async def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its descriptors; None at the end of file."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return kernel.receive(sock)
        except BlockingIOError:
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_reader(sock, _wake, ready)
            try:
                await ready
            finally:
                loop.remove_reader(sock)
        except (kernel.Refused, ValueError) as error:
            raise VmmProtocolError(f"a message that cannot be read: {error}") from error
        except ConnectionResetError:
            return None, []


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
