"""The small process that makes cells: run as ``python -I -S jailer.py FD``, never imported by the engine.

    start: one message of settings ──► own mount namespace, the VMM's read-only root ──► answer
    "cell": clone(CLONE_PARENT, new namespaces) ──► the cell drops every right and waits on its own socket
            one message {argv} with descriptors ──► exec; end of file (its engine is gone) ──► exit
    "watch": remember (pidfd, deadline); kill at the deadline, should the engine not have done so
    end of file (the engine is gone): live on until nothing is watched any more

Single-threaded, standard library only, so that a clone is safe and small. Cells are children of the engine's
process, which alone waits for them. The engine is trusted; a VMM has no way to talk to this process: the socket of
its cell goes to the engine and is closed by the exec.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from base64 import b64decode
from typing import Any, NoReturn

MESSAGE_LIMIT = 128 << 10
FD_LIMIT = 250
WATCH_LIMIT = 32768
_OVERDUE = 10.0
_LONGEST_SLEEP = 30.0

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 0x2
_CLONE_PARENT = 0x8000
_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
_CLONE_NEWIPC, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
_CLONE_INTO_CGROUP = 0x200000000
_SYS_CLONE, _SYS_CAPSET, _SYS_PIVOT_ROOT, _SYS_CLONE3 = 56, 126, 155, 435
_PR_SET_NAME, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 15, 22, 24, 28
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
# noroot, no_setuid_fixup, keep_caps off, no_cap_ambient_raise; each locked.
_SECUREBITS = 0b11101111

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
    prctl(_PR_SET_NAME, ctypes.create_string_buffer(name.encode()))


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    options = None if data is None else data.encode()
    check(libc.mount(*arguments, ctypes.c_ulong(flags), options), f"mount {kind or source} on {target}")


class Jail:
    """What every cell of this jailer shares. ``cgroups`` are open directories of cgroup hierarchies."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.root: str | None = settings["root"]
        self.files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.files[1], self.files[1]))
        self.cgroups: list[int] = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in settings["cgroups"]]
        self.exec_address: int = settings["exec_address"]
        self.kvm: bool = settings["kvm"]
        self.filter = b64decode(settings["filter"])
        if self.root is not None:
            self._map_exec_page()
            self._enter_root(self.root)

    def _map_exec_page(self) -> None:
        libc.mmap.restype = ctypes.c_void_p
        fixed_noreplace = 0x100000
        found = libc.mmap(
            ctypes.c_void_p(self.exec_address), ctypes.c_size_t(mmap.PAGESIZE),
            mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_noreplace,
            -1, ctypes.c_long(0),
        )  # fmt: skip
        if found != self.exec_address:
            raise Refused("no memory at the address that may exec")

    def _enter_root(self, root: str) -> None:
        """A mount namespace that holds the VMM's root and nothing else, so a cell's copy of it costs nothing
        and no mount of the host (the disk pool, say) is kept busy by us."""
        check(libc.unshare(_CLONE_NEWNS), "a mount namespace of its own (needs CAP_SYS_ADMIN)")
        mount("none", "/", None, _MS_REC | _MS_PRIVATE)
        self._lock_root(root)
        mount(root, root, None, _MS_BIND)
        flags = _MS_NOSUID | _MS_NODEV | _MS_RDONLY
        mount("none", root, None, _MS_REMOUNT | _MS_BIND | flags)
        self._mount_devices(root, kvm=False)
        if self.kvm:
            self._mount_devices(root, kvm=True)
        os.chdir(root)
        check(syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
        check(libc.umount2(b".", _MNT_DETACH), "umount of the old root")
        os.chdir("/")

    @staticmethod
    def _lock_root(root: str) -> None:
        # Left open for as long as this process lives: a root that nobody holds goes when another one is built.
        fcntl.flock(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH)

    @staticmethod
    def _mount_devices(root: str, *, kvm: bool) -> None:
        """Nodes of our own, whatever the modes of the host's: QEMU wants null and urandom."""
        target = f"{root}/dev"
        mount("tmpfs", target, "tmpfs", _MS_NOSUID | _MS_NOEXEC, "mode=755,size=64k,nr_inodes=16")
        nodes = {"null": (1, 3), "urandom": (1, 9)}
        if kvm:
            nodes["kvm"] = (10, 232)
        for name, (major, minor) in nodes.items():
            os.mknod(f"{target}/{name}", 0o020666, os.makedev(major, minor))
            os.chmod(f"{target}/{name}", 0o666)  # noqa: PTH101, S103
        mount("none", target, None, _MS_REMOUNT | _MS_BIND | _MS_NOSUID | _MS_NOEXEC | _MS_RDONLY)


class Cell:
    """The order for one cell. ``fds``: its log, then the network namespace where one is named."""

    def __init__(self, order: dict[str, Any], fds: list[int]) -> None:
        require(order, fds)
        self.uid: int = order["uid"]
        self.kvm: bool = order["kvm"]
        self.cgroups: list[dict[str, Any]] = order["cgroups"]
        self.log = fds[0]
        self.netns = fds[1] if len(fds) > 1 else None


# ── the jailer ───────────────────────────────────────────────────────────────────────────────────


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


def clone(jail: Jail, cell: Cell) -> int:
    """Fork a child of our parent, in namespaces of its own when jailed. Returns twice, like fork."""
    flags = _CLONE_PARENT
    if jail.root is None:
        return check(syscall(_SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0), "clone")
    flags |= _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC | _CLONE_NEWUTS
    if cell.netns is None:
        flags |= _CLONE_NEWNET
    born_in = next((group for group in cell.cgroups if group["unified"]), None)
    if born_in is not None:
        fd = make_cgroup(jail, born_in)
        try:
            # Born in its cgroup: no migration, which would wait for every CPU. With CLONE_PARENT the signal is ours.
            words = (flags | _CLONE_INTO_CGROUP, 0, 0, 0, 0, 0, 0, 0, 0, 0, fd)
            arguments = ctypes.create_string_buffer(struct.pack("=11Q", *words), 88)
            return check(syscall(_SYS_CLONE3, arguments, 88), "clone3 into its cgroup")
        finally:
            os.close(fd)
    return check(
        syscall(_SYS_CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0),
        "clone with namespaces of its own (needs CAP_SYS_ADMIN)",
    )


def make_cgroup(jail: Jail, group: dict[str, Any]) -> int:
    """Make (or find) one cgroup directory and set its limits; the open directory."""
    root = jail.cgroups[int(group["root"])]
    with contextlib.suppress(FileExistsError):
        os.mkdir(group["path"], 0o755, dir_fd=root)
    directory = os.open(group["path"], os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
    try:
        for name, value in group["set"]:
            write_at(directory, name, value)
    except BaseException:
        os.close(directory)
        raise
    return directory


def write_at(directory: int, name: str, value: str) -> None:
    fd = os.open(name, os.O_WRONLY, dir_fd=directory)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise Refused(f"cgroup {name} = {value}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(fd)


# ── a cell ───────────────────────────────────────────────────────────────────────────────────────


def live(sock: socket.socket, jail: Jail, cell: Cell) -> NoReturn:
    """Everything a cell does, from its birth to its exec or exit."""
    status = 1
    try:
        name_process("microvm-cell")
        os.dup2(cell.log, 2)
        if jail.root is not None:
            confine(jail, cell)
        else:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_NOFILE, jail.files)
        sock = apart(sock)
        if jail.root is not None:
            restrict(jail)
        sock.send(b"{}")
        order, fds = receive(sock)
        if order is not None:
            require(order, fds)
            take_places(fds)
            execute(jail, order)
        status = 0
    except BaseException as error:  # noqa: BLE001 - told to the engine, whatever it was
        with contextlib.suppress(OSError):
            sock.send(json.dumps({"error": f"{error}"[:1000]}).encode())
    os._exit(status)


def confine(jail: Jail, cell: Cell) -> None:
    """The steps that need rights. The last of them gives every right away."""
    os.setsid()
    for group in cell.cgroups:
        if not group["unified"]:
            directory = make_cgroup(jail, group)
            write_at(directory, "tasks", "0")  # of one thread, its own: the kernel need not stop the others
            os.close(directory)
    # What /proc shows of cgroups starts at its own.
    libc.unshare(_CLONE_NEWCGROUP)
    if cell.netns is not None:
        check(libc.setns(cell.netns, _CLONE_NEWNET), "its network namespace")
    socket.sethostname("vm")
    mount_proc()
    if jail.kvm and not cell.kvm:
        check(libc.umount2(b"/dev", _MNT_DETACH), "umount of /dev/kvm")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")  # before the service, when the host has no memory left
    os.umask(0o077)
    drop_rights(cell.uid)


def mount_proc() -> None:
    """Of its own processes alone: QEMU opens its memory as /proc/self/fd/N."""
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    try:
        mount("proc", "/proc", "proc", flags, "hidepid=invisible,subset=pid")
    except Refused:
        mount("proc", "/proc", "proc", flags, "hidepid=2")  # before Linux 5.8


def drop_rights(uid: int) -> None:
    for capability in range(64):
        if prctl(_PR_CAPBSET_DROP, capability) < 0:
            if ctypes.get_errno() != errno.EINVAL:
                raise Refused(f"capability {capability} cannot be dropped")
            break
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    check(prctl(_PR_SET_SECUREBITS, _SECUREBITS), "securebits")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # Version 3 of the header, this thread; all three sets empty.
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    check(syscall(_SYS_CAPSET, header, ctypes.create_string_buffer(24)), "capset")


def restrict(jail: Jail) -> None:
    """No new privileges, and the filter: from here on no way back."""
    check(prctl(_PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    code = ctypes.create_string_buffer(jail.filter, len(jail.filter))
    pointer = ctypes.addressof(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(jail.filter) // 8, pointer), 16)
    check(prctl(_PR_SET_SECCOMP, 2, program), "the system call filter")


def apart(sock: socket.socket) -> socket.socket:
    """The same socket at a number that no descriptor of the program will have."""
    moved = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, 3 + FD_LIMIT)
    os.closerange(3, moved)
    os.closerange(moved + 1, 1 << 20)
    return socket.socket(fileno=moved)


def take_places(fds: list[int]) -> None:
    """Descriptor i of the message becomes 3 + i; every other one closes at the exec."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + len(fds)) for fd in fds]
    for index, fd in enumerate(high):
        os.dup2(fd, 3 + index)


def set_limits(limits: dict[str, int]) -> None:
    """Last of all, because there is no way back up, and who prepares a cell may not know yet what it is for."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(which)[1]
        lower = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (lower, lower))


def execute(jail: Jail, order: dict[str, Any]) -> None:
    """Become the program. Returns only by raising."""
    argv, env = [text.encode() for text in order["argv"]], order["env"]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    set_limits(order["rlimits"])
    if jail.root is None:
        os.chdir(order["cwd"])
        os.execve(argv[0], argv, env)  # noqa: S606
    if len(argv[0]) >= mmap.PAGESIZE:
        raise Refused("a path that is too long")
    ctypes.memmove(jail.exec_address, argv[0] + b"\0", len(argv[0]) + 1)
    arguments = (ctypes.c_char_p * (len(argv) + 1))(*argv, None)
    pairs = [f"{name}={value}".encode() for name, value in env.items()]
    environment = (ctypes.c_char_p * (len(pairs) + 1))(*pairs, None)
    libc.execve(ctypes.c_void_p(jail.exec_address), arguments, environment)
    raise Refused(f"{order['argv'][0]}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    name_process("microvm-jailer")
    serve(socket.socket(fileno=int(sys.argv[1])))
