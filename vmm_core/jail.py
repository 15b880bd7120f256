"""Cells: processes prepared ahead that have given every right away and wait to become a VMM.

    Jailer.open ──► one small process (jailer.py) ── prepare ──► Cell, waiting ── run ──► VmmProcess
                                                                    └── discard, or the end of this process ──► gone

A cell has namespaces of its own (mount, PID, IPC, UTS, network), a read-only root with the VMM's files and nothing
else, its own uid, control groups and rlimits, no capability and a system call filter. Where the host does not give
the rights for that, ``jailed`` is False, ``why`` says what is missing, and cells are plain processes.
"""

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmm_core import cgroup, seccomp, vmm_root
from vmm_core.cgroup import Cgroups, Limits
from vmm_core.errors import BadRequest, HostUnfit, VmmError, VmmMissing
from vmm_core.jailer_link import ANSWER_SECONDS, JailerEnded, Link, end_child, reap_left, receive, send
from vmm_core.process import VmmProcess, new_log, start_ticks

_AT_ONCE = 16
_ENVIRONMENT = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"}
_NAMESPACES = Path("/run/netns")
_NOBODY = 65534
_PROBES = 1_000_000_000  # above every slot
_FILES = 512
_LEAST_FILE_BYTES = 64 << 20

T = TypeVar("T")


class CellSpec(msgspec.Struct, frozen=True):
    """What a cell is made for. ``number`` names its control groups; ``uid`` is its uid and gid, no other VM's.

    ``netns`` is a network namespace under /run/netns; None: an empty one of its own. ``kvm`` gives it /dev/kvm.
    """

    number: int
    uid: int
    limits: Limits
    netns: str | None = None
    kvm: bool = False


class Cell:
    """A prepared process. It becomes a VMM once, or ends."""

    def __init__(self, owner: "Jailer", spec: CellSpec, process: VmmProcess, sock: socket.socket) -> None:
        self._owner = owner
        self._number = spec.number
        self._limits = spec.limits
        self._process = process
        self._sock = sock

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def start_ticks(self) -> int:
        return self._process.start_ticks

    @property
    def waiting(self) -> bool:
        """Whether it can still be run."""
        return self._process.running and self._sock.fileno() >= 0

    async def settle(self) -> None:
        """Wait until it has entered its jail. HostUnfit says which step failed. Part of ``prepare``."""
        said, _ = await receive(self._sock)
        if said is None or "error" in said:
            what = "it ended" if said is None else said["error"]
            raise HostUnfit(f"a cell for a VMM could not be made: {what} {self._process.log_text()}".strip())

    def fit(self, limits: Limits) -> None:
        """Give a cell that waits other limits than it was prepared with. HostUnfit when the kernel refuses."""
        self._limits = limits
        try:
            if self._owner.jailed:
                self._owner.cgroups.apply(self._number, limits)
        except OSError as error:
            raise HostUnfit(f"the limits of a cell could not be changed: {error}") from error

    async def run(
        self, argv: Sequence[str], *, fds: Sequence[int] = (), deadline: float, cwd: Path | str = "/"
    ) -> VmmProcess:
        """Become ``argv``; returns when the program has been started. The cell is spent, also when this raises.

        ``fds[i]`` is the program's descriptor 3 + i, whatever its number here; it has no others but 0–2 (nothing,
        nothing, its log). ``deadline`` (Unix seconds) is when the jailer kills it, should nobody have done so before.
        ``cwd`` counts for a plain cell only. Raises VmmMissing, HostUnfit, BadRequest.
        """
        try:
            order = {
                "argv": list(argv),
                "env": _ENVIRONMENT,
                "cwd": str(cwd),
                "rlimits": _rlimits(self._limits) if self._owner.jailed else {"CORE": 0},
            }
            await self._owner.watch(self._process, deadline)
            await send(self._sock, order, fds)
            async with asyncio.timeout(ANSWER_SECONDS):
                said, _ = await receive(self._sock)
            if said is not None:
                raise VmmMissing(f"{argv[0]} cannot be started: {said.get('error')}")
            self._sock.close()
        except BaseException as error:
            await self.discard()
            if isinstance(error, OSError):
                raise HostUnfit(f"the cell of {argv[0]} ended before it was used: {error}") from error
            raise
        return self._process

    async def discard(self) -> None:
        """End it; nothing of it is left. Safe to call again."""
        self._sock.close()
        await self._process.end()
        self._process.close()


class Jailer:
    """The engine's side of the jailer process. Made by ``open``; another process is started should one end."""

    def __init__(self, root: Path | None, cgroups: Cgroups) -> None:
        self.root = root
        self.cgroups = cgroups
        self.why = ""
        self._link: Link | None = None
        self._starting = asyncio.Lock()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[Cell]] = set()
        self._watched: dict[int, tuple[VmmProcess, float]] = {}
        self._restarting: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, data_dir: Path, program: Path | str, *, unless: str | None = None) -> "Jailer":
        """A jailer for cells that will run ``program`` (a path; /usr/bin/qemu-system-x86_64).

        ``unless`` is a reason for plain cells on any host.
        Whether it can jail is found by making one cell. Raises HostUnfit when not even plain cells can be made.
        """
        reap_left()
        why = unless or _obstacle()
        if why is None:
            root = await asyncio.to_thread(vmm_root.build, data_dir, Path(program))
            cgroups = await asyncio.to_thread(cgroup.find)
            # A host whose control groups fail is still worth a jail without them.
            for groups in (cgroups, Cgroups((), obstacles=(*cgroups.obstacles, "cells cannot join them"))):
                opened = cls(root, groups)
                why = await opened._try_out()
                if why is None:
                    return opened
        opened = cls(None, Cgroups(()))
        opened.why = why or ""
        await opened._connected()
        return opened

    @property
    def jailed(self) -> bool:
        return self.root is not None

    def describe(self) -> str:
        """One sentence for ``doctor``."""
        if not self.jailed:
            return f"VMMs run with the rights of the service: {self.why}"
        return (
            "each VMM has its own uid, namespaces, root and system call filter; limits: "
            + self.cgroups.describe()
        )

    async def prepare(self, spec: CellSpec) -> Cell:
        """A cell that has entered its namespaces and given its rights away. HostUnfit says which step failed."""
        task = asyncio.create_task(self._prepare(spec), name=f"cell-{spec.number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                await asyncio.wait({task}, timeout=ANSWER_SECONDS)
                if task.done() and task.exception() is None:
                    await task.result().discard()
            raise

    async def watch(self, process: VmmProcess, deadline: float) -> None:
        """Let the jailer kill ``process`` at ``deadline`` (Unix seconds): a VMM of ours or an adopted one.

        Again with another deadline: changes it. It holds whether this process lives then or not.
        """
        for pid in [pid for pid, (known, _) in self._watched.items() if not known.running]:
            del self._watched[pid]
        self._watched[process.pid] = (process, deadline)
        message = {"do": "watch", "pid": process.pid, "deadline": deadline}
        await self._ask(lambda link: link.send(message, [process.pidfd]))

    async def close(self) -> None:
        """Let go of the jailer: it ends at once, or after the last VM it watches. Waiting cells must be discarded."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        link, self._link = self._link, None
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        if link is not None:
            await link.close(wait=not any(process.running for process, _ in self._watched.values()))
        reap_left()

    async def _try_out(self) -> str | None:
        """Make one cell and discard it; what is missing, in one sentence, or None."""
        number = _PROBES + secrets.randbelow(_PROBES)
        try:
            limits = Limits(vcpus=1, memory_mib=64)
            await (await self._prepare(CellSpec(number=number, uid=_NOBODY, limits=limits))).discard()
        except VmmError as error:
            await self.close()
            return str(error)
        finally:
            with contextlib.suppress(OSError, TimeoutError):
                await self.cgroups.remove(number)
        return None

    async def _prepare(self, spec: CellSpec) -> Cell:
        order = self._order(spec)
        async with self._room:
            try:
                cell = await self._born(spec, order)
            except OSError as error:
                raise HostUnfit(f"a cell for a VMM could not be made: {error}") from error
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await cell.settle()
            except BaseException as error:
                await cell.discard()
                if isinstance(error, OSError):
                    raise HostUnfit(f"a cell for a VMM could not be made: {error!r}") from error
                raise
            return cell

    async def _born(self, spec: CellSpec, order: dict[str, Any]) -> Cell:
        """A cell that has not yet said whether it could enter its jail."""
        with contextlib.ExitStack() as stack:
            log = new_log()
            stack.callback(os.close, log)
            fds = [log]
            if spec.netns is not None and self.jailed:
                fds.append(_open_namespace(spec.netns))
                stack.callback(os.close, fds[1])
            pid, sock = await self._ask(lambda link: link.ask(order, fds))
            try:
                return Cell(self, spec, _our_child(pid, os.dup(log)), sock)
            except BaseException:
                sock.close()
                end_child(pid)
                raise

    def _order(self, spec: CellSpec) -> dict[str, Any]:
        if spec.uid <= 0:
            raise BadRequest(
                f"uid {spec.uid} is none a VMM may have: name one that nothing else on the host has"
            )
        return {
            "uid": spec.uid,
            "kvm": spec.kvm,
            "cgroups": self.cgroups.plan(spec.number, spec.limits),
        }

    async def _ask(self, question: Callable[["Link"], Awaitable[T]]) -> T:
        """Ask the jailer; once more should it just have ended."""
        try:
            return await question(await self._connected())
        except JailerEnded:
            return await question(await self._connected())

    def _lost(self, _: object) -> None:
        """The jailer has ended by itself. The VMs that run need another one now, not with the next cell."""
        if self._link is not None and any(process.running for process, _ in self._watched.values()):
            self._restarting = asyncio.create_task(self._restart(), name="jailer-restart")

    async def _restart(self) -> None:
        # Should this fail as well, the next cell tries again, and says what is wrong.
        with contextlib.suppress(VmmError):
            await self._connected()

    async def _connected(self) -> "Link":
        """The jailer process, started (again) where there is none; it then hears of every VM that runs."""
        async with self._starting:
            if self._link is None or not self._link.alive:
                if self._link is not None:
                    await self._link.close(wait=True)
                self._link = await Link.start(self.root, self.cgroups, self._lost)
                for process, deadline in self._watched.values():
                    if process.running and process.pidfd >= 0:
                        message = {"do": "watch", "pid": process.pid, "deadline": deadline}
                        await self._link.send(message, [process.pidfd])
            return self._link


def _obstacle() -> str | None:
    if os.geteuid() != 0:
        return f"uid {os.geteuid()} has no right to make namespaces and other uids: run the service as root"
    return seccomp.obstacle()


def _rlimits(limits: Limits) -> dict[str, int]:
    return {
        "CORE": 0,
        "NOFILE": _FILES,
        "NPROC": limits.threads,
        "FSIZE": max(limits.disk_mib << 20, _LEAST_FILE_BYTES),
        "MEMLOCK": 64 << 10,
        "MSGQUEUE": 0,
        "RTPRIO": 0,
        # Second to the control group, and all there is without one: what it may map to write.
        "DATA": limits.memory_bytes + (4 << 30),
    }


def _open_namespace(name: str) -> int:
    try:
        return os.open(_NAMESPACES / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostUnfit(f"the network namespace {name} cannot be opened: {error.strerror}") from error


def _our_child(pid: int, log: int) -> VmmProcess:
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        return VmmProcess(pid, start_ticks(pid) or 0, pidfd, log, child=True)
    except BaseException:
        for fd in (pidfd, log):
            if fd >= 0:
                os.close(fd)
        raise
