"""What a jailer and its cells ask of the kernel that Python has no words for, and messages with descriptors.

Standard library only: this runs in a process of its own (see ``jailer.py``).
"""

import array
import contextlib
import ctypes
import json
import os
import socket
from typing import Any

MESSAGE_LIMIT = 128 << 10
FD_LIMIT = 250

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 0x2
CLONE_PARENT = 0x8000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
CLONE_INTO_CGROUP = 0x200000000
SYS_CLONE, SYS_CAPSET, SYS_PIVOT_ROOT, SYS_CLONE3 = 56, 126, 155, 435
PR_SET_NAME, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 15, 22, 24, 28
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4

# Keeps the GIL: nothing of Python runs between the clone and its two returns.
libc = ctypes.PyDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Refused(Exception):
    """A step of the kernel's that did not work; told to the engine in one sentence."""


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise Refused(f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: Any) -> int:
    return libc.syscall(
        number, *(ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments)
    )


def prctl(option: int, *arguments: Any) -> int:
    padded = [*arguments, 0, 0, 0, 0][:4]
    return libc.prctl(option, *(ctypes.c_ulong(word) if isinstance(word, int) else word for word in padded))


def name_process(name: str) -> None:
    """What ``ps`` and ``top`` show."""
    prctl(PR_SET_NAME, ctypes.create_string_buffer(name.encode()))


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    options = None if data is None else data.encode()
    check(libc.mount(*arguments, ctypes.c_ulong(flags), options), f"mount {kind or source} on {target}")


def receive(sock: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its descriptors (close-on-exec); None at the end of file.

    Descriptors are lost where this process may open no more: whoever needs them counts.
    """
    room = socket.CMSG_SPACE(FD_LIMIT * 4)
    try:
        data, ancillary, flags, _ = sock.recvmsg(MESSAGE_LIMIT, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # The other end went without reading all we said. Told once; what it said before is still to be read.
        data, ancillary, flags, _ = sock.recvmsg(MESSAGE_LIMIT, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % 4])
    if not data:
        return None, []
    if flags & socket.MSG_TRUNC:
        raise Refused("a message that is too long")
    return json.loads(data), list(fds)


def require(order: dict[str, Any], fds: list[int]) -> None:
    if len(fds) != order["fds"]:
        raise Refused(f"{len(fds)} of {order['fds']} descriptors came: too many are open")


def answer(sock: socket.socket, message: dict[str, Any], *fds: int) -> None:
    with contextlib.suppress(OSError):  # an engine that is gone is seen as the end of file
        socket.send_fds(sock, [json.dumps(message).encode()], list(fds))
