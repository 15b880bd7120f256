"""A cell, from its birth to its exec: it enters its jail, gives every right away, and waits to become a VMM.

    born ──► cgroups, network, /proc ──► own uid, no capability ──► filter ──► "ready" ──► {argv} ──► exec
                                                                            └── end of file ──► exit

Standard library only: this runs in a process of its own (see ``jailer.py``).
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import resource
import signal
import socket
import struct
from base64 import b64decode
from typing import Any, NoReturn

from vmm_core.kernel import (
    CLONE_NEWCGROUP,
    CLONE_NEWNET,
    CLONE_NEWNS,
    FD_LIMIT,
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_SECCOMP,
    PR_SET_SECUREBITS,
    SYS_CAPSET,
    SYS_PIVOT_ROOT,
    Refused,
    check,
    libc,
    mount,
    name_process,
    prctl,
    receive,
    require,
    syscall,
)

# noroot, no_setuid_fixup, keep_caps off, no_cap_ambient_raise; each locked.
_SECUREBITS = 0b11101111


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
        check(libc.unshare(CLONE_NEWNS), "a mount namespace of its own (needs CAP_SYS_ADMIN)")
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        self._lock_root(root)
        mount(root, root, None, MS_BIND)
        flags = MS_NOSUID | MS_NODEV | MS_RDONLY
        mount("none", root, None, MS_REMOUNT | MS_BIND | flags)
        self._mount_devices(root, kvm=False)
        if self.kvm:
            self._mount_devices(root, kvm=True)
        os.chdir(root)
        check(syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
        check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
        os.chdir("/")

    @staticmethod
    def _lock_root(root: str) -> None:
        # Left open for as long as this process lives: a root that nobody holds goes when another one is built.
        fcntl.flock(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), fcntl.LOCK_SH)

    @staticmethod
    def _mount_devices(root: str, *, kvm: bool) -> None:
        """Nodes of our own, whatever the modes of the host's: QEMU wants null and urandom."""
        target = f"{root}/dev"
        mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NOEXEC, "mode=755,size=64k,nr_inodes=16")
        nodes = {"null": (1, 3), "urandom": (1, 9)}
        if kvm:
            nodes["kvm"] = (10, 232)
        for name, (major, minor) in nodes.items():
            os.mknod(f"{target}/{name}", 0o020666, os.makedev(major, minor))
            os.chmod(f"{target}/{name}", 0o666)  # noqa: PTH101, S103
        mount("none", target, None, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NOEXEC | MS_RDONLY)


class Cell:
    """The order for one cell. ``fds``: its log, then the network namespace where one is named."""

    def __init__(self, order: dict[str, Any], fds: list[int]) -> None:
        require(order, fds)
        self.uid: int = order["uid"]
        self.kvm: bool = order["kvm"]
        self.cgroups: list[dict[str, Any]] = order["cgroups"]
        self.log = fds[0]
        self.netns = fds[1] if len(fds) > 1 else None


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
    libc.unshare(CLONE_NEWCGROUP)
    if cell.netns is not None:
        check(libc.setns(cell.netns, CLONE_NEWNET), "its network namespace")
    socket.sethostname("vm")
    mount_proc()
    if jail.kvm and not cell.kvm:
        check(libc.umount2(b"/dev", MNT_DETACH), "umount of /dev/kvm")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")  # before the service, when the host has no memory left
    os.umask(0o077)
    drop_rights(cell.uid)


def mount_proc() -> None:
    """Of its own processes alone: QEMU opens its memory as /proc/self/fd/N."""
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    try:
        mount("proc", "/proc", "proc", flags, "hidepid=invisible,subset=pid")
    except Refused:
        mount("proc", "/proc", "proc", flags, "hidepid=2")  # before Linux 5.8


def drop_rights(uid: int) -> None:
    for capability in range(64):
        if prctl(PR_CAPBSET_DROP, capability) < 0:
            if ctypes.get_errno() != errno.EINVAL:
                raise Refused(f"capability {capability} cannot be dropped")
            break
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    check(prctl(PR_SET_SECUREBITS, _SECUREBITS), "securebits")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    # Version 3 of the header, this thread; all three sets empty.
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    check(syscall(SYS_CAPSET, header, ctypes.create_string_buffer(24)), "capset")


def restrict(jail: Jail) -> None:
    """No new privileges, and the filter: from here on no way back."""
    check(prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
    code = ctypes.create_string_buffer(jail.filter, len(jail.filter))
    pointer = ctypes.addressof(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(jail.filter) // 8, pointer), 16)
    check(prctl(PR_SET_SECCOMP, 2, program), "the system call filter")


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
