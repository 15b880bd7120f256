"""The small process that makes cells, and ends VMs at their deadline when their engine does not.

    start: one message of settings ──► own mount namespace, the VMM's read-only root ──► answer
    "cell": clone(CLONE_PARENT, new namespaces) ──► a cell (cell.py), whose socket goes to the engine
    "watch": remember (pidfd, deadline); kill at the deadline, should the engine not have done so
    end of file (the engine is gone): live on until nothing is watched any more

Single-threaded, standard library only, so that a clone is safe and small. Cells are children of the engine's
process, which alone waits for them. The engine is trusted; a VMM has no way to talk to this process: the socket of
its cell goes to the engine and is closed by the exec.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import time
from typing import Any

from vmm_core.cell import Cell, Jail, live, make_cgroup
from vmm_core.kernel import (
    CLONE_INTO_CGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    CLONE_PARENT,
    SYS_CLONE,
    SYS_CLONE3,
    Refused,
    answer,
    check,
    name_process,
    receive,
    syscall,
)

WATCH_LIMIT = 32768
_OVERDUE = 10.0
_LONGEST_SLEEP = 30.0


def main(fd: int) -> None:
    """The process: serve the engine at the other end of the socket ``fd``."""
    name_process("microvm-jailer")
    serve(socket.socket(fileno=fd))


def serve(control: socket.socket) -> None:
    jail = start(control)
    if jail is None:
        return
    watched: dict[int, tuple[int, float]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    orphaned = False
    while watched or not orphaned:
        ready = {fd for fd, _ in poll.poll(sleep_milliseconds(watched, orphaned))}
        # What has ended first: an order may give the number of a descriptor a new meaning.
        for fd in ready - {control.fileno()}:
            forget(watched, fd, poll)
        if control.fileno() in ready and not obey(control, jail, watched, poll):
            orphaned = True
            poll.unregister(control)
            control.close()
        kill_overdue(watched, orphaned)


def start(control: socket.socket) -> Jail | None:
    message, _ = receive(control)
    if message is None:
        return None
    try:
        jail = Jail(message)
    except (Refused, OSError) as error:
        answer(control, {"why": str(error)})
        return None
    answer(control, {"ready": True})
    return jail


def obey(
    control: socket.socket, jail: Jail, watched: dict[int, tuple[int, float]], poll: select.poll
) -> bool:
    """Take one message; False at the end of file."""
    message, fds = receive(control)
    if message is None:
        return False
    try:
        if message["do"] == "cell":
            make_cell(control, jail, message, fds)
        elif message["do"] == "watch":
            watch(watched, poll, message, fds)
    finally:
        for fd in fds:
            os.close(fd)
    return True


def make_cell(control: socket.socket, jail: Jail, order: dict[str, Any], fds: list[int]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            cell = Cell(order, fds)
            pid = clone(jail, cell)
        except (Refused, OSError, LookupError) as error:
            answer(control, {"id": order["id"], "error": str(error)})
            return
        if pid == 0:
            live(theirs, jail, cell)
        answer(control, {"id": order["id"], "pid": pid}, ours.fileno())


def watch(
    watched: dict[int, tuple[int, float]], poll: select.poll, message: dict[str, Any], fds: list[int]
) -> None:
    """Remember the process of this pidfd and its deadline, in place of what was known of that pid."""
    pid, deadline = int(message["pid"]), float(message["deadline"])
    if pid in watched:
        forget(watched, watched[pid][0], poll)
    if fds and len(watched) < WATCH_LIMIT:
        pidfd = fds.pop()
        watched[pid] = (pidfd, deadline)
        poll.register(pidfd, select.POLLIN)


def forget(watched: dict[int, tuple[int, float]], fd: int, poll: select.poll) -> None:
    poll.unregister(fd)
    for pid, (pidfd, _) in list(watched.items()):
        if pidfd == fd:
            del watched[pid]
            os.close(pidfd)


def kill_overdue(watched: dict[int, tuple[int, float]], orphaned: bool) -> None:
    # A living engine ends its VMs itself, and tells why; this is for one that hangs.
    now = time.time() - (0.0 if orphaned else _OVERDUE)
    for pidfd, deadline in watched.values():
        if deadline <= now:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def sleep_milliseconds(watched: dict[int, tuple[int, float]], orphaned: bool) -> int:
    """Until the next deadline, but not long: the wall clock may be stepped."""
    now = time.time() - (0.0 if orphaned else _OVERDUE)
    next_one = min((deadline for _, deadline in watched.values()), default=now + _LONGEST_SLEEP)
    return int(min(max(next_one - now, 0.05), _LONGEST_SLEEP) * 1000)


def clone(jail: Jail, cell: Cell) -> int:
    """Fork a child of our parent, in namespaces of its own when jailed. Returns twice, like fork."""
    flags = CLONE_PARENT
    if jail.root is None:
        return check(syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0), "clone")
    flags |= CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    if cell.netns is None:
        flags |= CLONE_NEWNET
    born_in = next((group for group in cell.cgroups if group["unified"]), None)
    if born_in is not None:
        fd = make_cgroup(jail, born_in)
        try:
            # Born in its cgroup: no migration, which would wait for every CPU. With CLONE_PARENT the signal is ours.
            words = (flags | CLONE_INTO_CGROUP, 0, 0, 0, 0, 0, 0, 0, 0, 0, fd)
            arguments = ctypes.create_string_buffer(struct.pack("=11Q", *words), 88)
            return check(syscall(SYS_CLONE3, arguments, 88), "clone3 into its cgroup")
        finally:
            os.close(fd)
    return check(
        syscall(SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0),
        "clone with namespaces of its own (needs CAP_SYS_ADMIN)",
    )
