"""The guest's side of the channel: one file, standard library only, PID 1 or a service.

A connection, as the agent sees it:

    silent ──hello──► known (same token as the last revive) or unknown (only revive, quiesce, poweroff)
    silent, unknown ──revive──► known            entropy, clock, identity; then everything is allowed
    known ──quiesce──► unknown                   the bake snapshots the machine now
    any ──host vanishes, or the next hello──► silent; commands run on, unacknowledged output is kept
    any ──the VM is forked or frozen while it runs, unasked──► as it was, until the copy's host says revive

The last one means that nothing here may count on ``quiesce``: a copy has the sessions, half-sent frames and
half-done transfers of another host in its memory, and ``revive`` must leave only commands and their outputs.

A command: running ──its first process ends──► exited ──both outputs end──► kept until forgotten.

Everything is edge-triggered and nothing is periodic: an idle agent burns no CPU and dirties no page,
because many idle forks share one host. A virtio-serial port reports POLLIN|POLLHUP for as long as no
host is connected (Linux drivers/char/virtio_console.c), so a level-triggered loop would spin.

Runs on Python ≥ 3.9 as ``python3 -I -S agent.py [--init] [--port PATH | --listen PATH]``.
"""
# pathlib and contextlib are not worth their start-up time: software emulation runs Python ~15 times slower.
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH106, PTH108, PTH110, PTH112, PTH120, PTH208, PTH211, SIM105, S103, S108

from __future__ import annotations

import binascii
import ctypes
import errno
import fcntl
import gc
import json
import mmap
import os
import pwd
import select
import signal
import stat
import struct
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

    Message = dict[str, Any]
    Frame = tuple[int, int, bytes]

VERSION = "1"

# ---------------------------------------------------------------------------------------------- frames
# SLIP (RFC 1055) around [type u8][stream u32 BE][payload][crc32 u32 BE], END before and after. The host
# imports these definitions (wire.py), so there is only one of each.

REQUEST, REPLY, DATA, EOF, ACK, EXIT = 1, 2, 3, 4, 5, 6
END, ESC = b"\xc0", b"\xdb"
ESC_END, ESC_ESC = b"\xdb\xdc", b"\xdb\xdd"
HEADER, CRC, OFFSET = struct.Struct(">BI"), struct.Struct(">I"), struct.Struct(">Q")
MAX_PAYLOAD = 64 << 10
MAX_BODY = HEADER.size + MAX_PAYLOAD + CRC.size
MAX_ENCODED = 2 * MAX_BODY
WINDOW = 256 << 10  # bytes of one stream on their way or unacknowledged, in either direction
CHUNK = 31 << 10  # of stream data in a frame: the driver takes at most 32 KiB in one write
STDIN, STDOUT, STDERR = 0, 1, 2  # added to the stream number of a command


def encode(kind: int, stream: int, payload: bytes) -> bytes:
    """One frame as it goes over the wire."""
    body = HEADER.pack(kind, stream) + payload
    body += CRC.pack(binascii.crc32(body))
    return END + body.replace(ESC, ESC_ESC).replace(END, ESC_END) + END


class Decoder:
    """Bytes in, frames out. What is no frame is dropped and counted (``bad`` frames, ``garbage`` bytes).

    Holds at most MAX_ENCODED bytes. Any END starts afresh, so it does not matter what came before.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._held = 0
        self.bad = 0
        self.garbage = 0

    def feed(self, data: bytes) -> list[Frame]:
        pieces = data.split(END)
        last = pieces.pop()
        frames: list[Frame] = []
        for piece in pieces:
            if piece:
                self._hold(piece)
            if self._held:
                frame = self._take()
                if frame is not None:
                    frames.append(frame)
        if last:
            self._hold(last)
        # A frame brings one delimiter of its own on each side; more of them carry nothing.
        self.garbage += max(0, pieces.count(b"") - len(frames) - 1)
        return frames

    def _hold(self, piece: bytes) -> None:
        self._held += len(piece)
        if self._held <= MAX_ENCODED:
            self._buffer += piece
        else:
            self._buffer.clear()  # too long to be a frame: only its length is kept, until the next END
            self.garbage += self._held - MAX_ENCODED
            self._held = MAX_ENCODED + 1

    def _take(self) -> Frame | None:
        raw, held = bytes(self._buffer), self._held
        self._buffer.clear()
        self._held = 0
        if held <= MAX_ENCODED:
            body = raw.replace(ESC_END, END).replace(ESC_ESC, ESC)
            size = len(body) - CRC.size
            if HEADER.size <= size <= MAX_BODY - CRC.size:
                content = body[:size]
                if CRC.pack(binascii.crc32(content)) == body[size:]:
                    kind, stream = HEADER.unpack_from(content)
                    return kind, stream, content[HEADER.size :]
        self.bad += 1
        self.garbage += held
        return None


# ---------------------------------------------------------------------------------------------- limits

QUEUE = 64 << 10  # bytes waiting for the port before streams stop adding to them
QUEUE_HARD = 1 << 20  # … before requests are not read any more
ZYGOTE_USER = "runner"
UMASK = 0o022
MAX_PROCESSES = 16 << 10  # of one command, where memory allows for more
EXEC_WAIT = 5.0  # seconds a process may take to become its command; nothing else is done meanwhile
MAX_EXECS = 128
MAX_ENDED = 64  # ended commands kept, oldest forgotten first
LINGER = 2.0  # seconds a left-over background process may still add to a command's output
READ = 64 << 10
MARKER = "MICROVM_EXEC"  # in every command's environment: finds what escaped its session
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class RefusedError(Exception):
    """The answer is no; ``reason`` is a stable word, the text a sentence."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def refuse_os(what: str, error: OSError) -> RefusedError:
    name = errno.errorcode.get(error.errno or 0, "EIO")
    return RefusedError(name, f"{what}: {error.strerror or error}")


# ---------------------------------------------------------------------------------------------- system


def overwrite(path: str, data: bytes) -> None:
    """Replace a small file's content in place: no new block, no rename, the least work for ext4."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.lseek(fd, 0, os.SEEK_END) > len(data):  # a cold fstat costs milliseconds in a fresh fork
            os.ftruncate(fd, len(data))
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


class Resident:
    """A small file on tmpfs, mapped: to rewrite it costs one system call and no file system's code."""

    SIZE = 16 << 10

    def __init__(self, path: str, mode: int = 0o644) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        os.ftruncate(self.fd, self.SIZE)
        self.map = mmap.mmap(self.fd, self.SIZE)

    def write(self, data: bytes) -> None:
        os.ftruncate(self.fd, len(data))
        self.map[: len(data)] = data

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Groups:
    """A cgroup for all commands and one in it for each.

    A fork bomb meets its command's limit, so that others can start, and has its command's share of the
    processors. To kill a group takes one write, and no process in it is quick enough to get away.
    """

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit = path, limit
        self.left: list[str] = []  # forgotten while a background process ran on
        self._made = 0

    def make(self) -> Group:
        self.left = [path for path in self.left if not remove_group(path)]
        self._made += 1
        group = Group(f"{self.path}/{self._made}", self.left)
        os.mkdir(group.path)
        overwrite(f"{group.path}/pids.max", b"%d" % self.limit)
        return group


class Group:
    """The cgroup of one command."""

    CLONE3, CLONE_INTO_CGROUP = 435, 1 << 33  # Linux 5.7; the number is the same on every architecture
    ARGUMENTS = struct.Struct("=11Q")  # struct clone_args
    libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, path: str, left: list[str]) -> None:
        self.path, self._left = path, left

    def fork(self) -> int:
        """As os.fork, with the child born in here: moving it in later waits for every processor's grace period."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            values = self.ARGUMENTS.pack(self.CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, fd)
            pid = self.libc.syscall(self.CLONE3, values, ctypes.c_size_t(len(values)))
            if pid < 0:
                raise OSError(ctypes.get_errno(), "clone3")
            return int(pid)
        finally:
            os.close(fd)

    def kill(self) -> None:
        try:
            overwrite(f"{self.path}/cgroup.kill", b"1")
        except OSError as error:  # Linux < 5.14
            log(f"cgroup.kill: {error}")

    def remove(self) -> None:
        if not remove_group(self.path):
            self._left.append(self.path)


def remove_group(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


class System:
    """The calls that change the whole machine, apart from the rest so that tests can replace them.

    What ``revive`` needs is opened once and stays open, so that forks find it open.
    """

    RNDADDENTROPY = 0x40085203
    RNDRESEEDCRNG = 0x5207
    BOOT_ID = "/proc/sys/kernel/random/boot_id"
    MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND = 2, 4, 8, 4096

    def __init__(self) -> None:
        self.root = ""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._entropy = self._hostname = -1
        self._residents: dict[str, Resident] = {}
        self.groups: Groups | None = None  # as an init, where the kernel has cgroup v2

    def call(self, name: str, *args: object) -> int:
        """A libc function that answers -1 and errno on failure. Raises OSError."""
        result: int = getattr(self._libc, name)(*args)
        if result == -1:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}")
        return result

    def add_entropy(self, seed: bytes) -> None:
        """Mix in and reseed; without the second call the generator goes on as in every other fork."""
        if self._entropy < 0:
            self._entropy = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._entropy, self.RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(self._entropy, self.RNDRESEEDCRNG)

    def set_clock(self, time_ns: int) -> int:
        """Set the wall clock (Unix ns); answers the step in ns."""
        step = time_ns - time.time_ns()
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)
        return step

    def set_hostname(self, name: str) -> None:
        self.set_kernel_hostname(name)
        self.rewrite("/etc/hostname", name.encode() + b"\n")

    def set_kernel_hostname(self, name: str) -> None:
        if self._hostname < 0:
            self._hostname = os.open("/proc/sys/kernel/hostname", os.O_WRONLY | os.O_CLOEXEC)
        os.pwrite(self._hostname, name.encode(), 0)

    def set_machine_id(self, machine_id: str) -> None:
        self.rewrite("/etc/machine-id", machine_id.encode() + b"\n")

    def set_resolver(self, address: str) -> None:
        """Whom to ask for names beyond /etc/hosts; nobody for ""."""
        text = f"nameserver {address}\noptions timeout:2 attempts:2\n" if address else ""
        self.rewrite("/etc/resolv.conf", text.encode())

    def set_hosts(self, text: str) -> None:
        self.rewrite("/etc/hosts", text.encode())

    def set_boot_id(self, boot_id: str) -> None:
        """The kernel's boot id is the same in every fork and read-only: a file of ours lies over it."""
        if self.BOOT_ID not in self._residents:
            self.make_resident(self.BOOT_ID)
        self.rewrite(self.BOOT_ID, boot_id.encode() + b"\n")

    def rewrite(self, path: str, data: bytes) -> None:
        resident = self._residents.get(path)
        if resident is not None:
            resident.write(data)
        else:
            overwrite(self.root + path, data)

    def make_resident(self, path: str) -> None:
        """Lay a mapped file of tmpfs over ``path``: rewriting it takes a fraction of the time."""
        directory = self.root + "/run/microvm"
        os.makedirs(directory, exist_ok=True)
        name = f"{directory}/{path.rpartition('/')[2]}"
        resident = Resident(name)
        if path != self.BOOT_ID and not os.path.exists(self.root + path):
            overwrite(self.root + path, b"")
        self.mount(name, path if path == self.BOOT_ID else self.root + path, "", self.MS_BIND)
        self._residents[path] = resident

    def prepare(self) -> None:
        """As an init, once: open and lay out what ``revive`` will need.

        On a tmpfs of its own: a write to a mapping finds no room on a full one, and that ends the process.
        """
        try:
            os.makedirs(self.root + "/run/microvm", exist_ok=True)
            flags = self.MS_NOSUID | self.MS_NODEV | self.MS_NOEXEC
            self.mount("tmpfs", self.root + "/run/microvm", "tmpfs", flags, "mode=755,size=1m")
        except OSError as error:
            log(f"mount /run/microvm: {error}")
        self._entropy = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
        self._hostname = os.open("/proc/sys/kernel/hostname", os.O_WRONLY | os.O_CLOEXEC)
        for path in ("/etc/hostname", "/etc/machine-id", "/etc/hosts", "/etc/resolv.conf", self.BOOT_ID):
            try:
                kept = b"" if path == self.BOOT_ID else read_small(self.root + path)
            except OSError:
                kept = b""
            try:
                self.make_resident(path)
            except OSError as error:
                log(f"{path} stays on disk: {error}")
            else:
                self.rewrite(path, kept)

    def mount(self, source: str, target: str, fstype: str, flags: int, options: str = "") -> None:
        names = source.encode(), target.encode(), fstype.encode()
        self.call("mount", *names, ctypes.c_ulong(flags), options.encode())

    def ssh_keys(self) -> list[str]:
        directory = self.root + "/etc/ssh"
        names = os.listdir(directory) if os.path.isdir(directory) else []
        return [f"{directory}/{name}" for name in names if name.startswith("ssh_host_") and "_key" in name]

    def make_ssh_keys(self) -> None:
        """In the background; new ones for what ``revive`` removed."""
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            plan = Plan(["ssh-keygen", "-A", "-f", self.root or "/"], {"PATH": PATH}, "/", Owner("root"))
            spawn(plan, (null, null, null))
        except RefusedError as refusal:
            log(f"no new ssh host keys: {refusal}")
        finally:
            os.close(null)

    def sync(self) -> None:
        os.sync()

    def trim_heap(self) -> None:
        trim = getattr(self._libc, "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)

    def adopt_orphans(self) -> None:
        """As a service: be the parent of what commands leave behind (PR_SET_CHILD_SUBREAPER)."""
        self.call("prctl", 36, 1, 0, 0, 0)

    def shield(self) -> None:
        """From what commands do to memory: never the OOM killer's victim, nor paged out piece by piece.

        MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT: nothing is read in beforehand, so forks share what they did.
        """
        try:
            overwrite("/proc/self/oom_score_adj", b"-1000")
            self.call("mlockall", 1 | 2 | 4)
        except OSError as error:
            log(f"commands can press the agent out of memory: {error}")

    def come_first(self) -> None:
        """Before every command, however many there are: the host's word must be heard. Children start as usual."""
        try:
            policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
        except OSError as error:
            log(f"commands can keep the agent waiting: {error}")

    def make_groups(self) -> int:
        """As an init: bound the number of processes; answers that of all commands together.

        The kernel's maximum is an eighth of memory in kernel stacks. A process needs as much again at least.
        """
        most = min(int(read_small(f"/proc/sys/kernel/{name}")) for name in ("threads-max", "pid_max"))
        total = most // 2
        base, path = "/sys/fs/cgroup", "/sys/fs/cgroup/commands"
        try:
            overwrite(f"{base}/cgroup.subtree_control", b"+pids +cpu")
            os.mkdir(path)
            overwrite(f"{path}/cgroup.subtree_control", b"+pids +cpu")
            overwrite(f"{path}/pids.max", b"%d" % total)
        except OSError as error:
            log(f"commands get no cgroups: {error}")
        else:
            self.groups = Groups(path, min(MAX_PROCESSES, total * 3 // 4))
        return total

    def poweroff(self) -> None:
        os.sync()
        for how in (0x4321FEDC, 0x01234567):  # RB_POWER_OFF; RB_AUTOBOOT, which -no-reboot turns into an end
            try:
                self.call("reboot", ctypes.c_int(how))
            except OSError as error:
                log(f"reboot: {error}")


def log(text: str) -> None:
    """To the console. Never what a command said or was given."""
    try:
        os.write(2, f"agent: {text}\n".encode())
    except OSError:
        pass


# ---------------------------------------------------------------------------------------------- streams


class Source:
    """Bytes from a pipe or a file to the host: kept in ``ring`` until acknowledged, at most WINDOW.

    ``base`` counts acknowledged bytes, ``sent`` the bytes given to this connection. When the ring is full
    the descriptor is not read: whoever writes into the pipe has to wait, and nothing is lost.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.ring = bytearray()
        self.base = 0
        self.sent = 0
        self.stream: int | None = None  # None: no host listens
        self.readable = True
        self.ended = False  # no more bytes will be added
        self.eof_sent = False
        self.discard = False  # ended for the host, but a background process still holds the pipe

    @property
    def total(self) -> int:
        return self.base + len(self.ring)

    def pull(self) -> bool:
        """Read once if there is room. True: call again, there may be more."""
        room = READ if self.discard else min(READ, WINDOW - len(self.ring))
        if self.fd < 0 or not self.readable or room <= 0:
            return False
        try:
            data = os.read(self.fd, room)
        except BlockingIOError:
            self.readable = False
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
        elif not self.discard:
            self.ring += data
        return bool(data)

    def push(self, agent: Agent) -> bool:
        """Queue what the host has not got. True: there is more, but the queue was full.

        Small pieces wait here rather than in the queue while the port takes nothing, and travel together then.
        """
        if self.stream is None:
            return False
        while self.sent < self.total:
            if agent.queue and (not agent.port_writable or len(agent.queue) >= QUEUE):
                return True
            start = self.sent - self.base
            chunk = bytes(self.ring[start : start + CHUNK])
            agent.send(DATA, self.stream, OFFSET.pack(self.sent) + chunk)
            self.sent += len(chunk)
        if self.ended and not self.eof_sent:
            agent.send(EOF, self.stream, OFFSET.pack(self.total))
            self.eof_sent = True
        return False

    def acknowledge(self, offset: int) -> None:
        if self.base < offset <= self.sent:
            del self.ring[: offset - self.base]
            self.base = offset

    def attach(self, stream: int, offset: int) -> None:
        self.sent = self.total
        self.acknowledge(offset)
        self.stream, self.sent, self.eof_sent = stream, offset, False

    def close(self) -> None:
        self.ended = True
        if self.fd >= 0:
            os.close(self.fd)  # a closed descriptor leaves the epoll set by itself
            self.fd = -1


class Feed:
    """Bytes from the host into a command's standard input; the host keeps to WINDOW unwritten bytes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.buffer = bytearray()
        self.received = 0
        self.written = 0
        self.acked = 0
        self.ending = False
        self.writable = True

    def add(self, offset: int, data: bytes) -> None:
        if offset == self.received and len(self.buffer) + len(data) <= 2 * WINDOW:
            self.received += len(data)
            if self.fd < 0:
                self.written = self.received  # the command does not read any more
            else:
                self.buffer += data

    def flush(self) -> None:
        while self.fd >= 0 and self.buffer and self.writable:
            try:
                count = os.write(self.fd, self.buffer[:READ])
            except BlockingIOError:
                self.writable = False
            except OSError:
                self.close()
            else:
                del self.buffer[:count]
                self.written += count
        if self.fd >= 0 and self.ending and not self.buffer:
            self.close()

    def close(self) -> None:
        self.buffer.clear()
        self.written = self.received
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Upload:
    """A file being written beside its destination; it takes its name only when it is complete."""

    def __init__(self, path: str, owner: Owner, mode: int) -> None:
        self.path, self.owner, self.mode = path, owner, mode & 0o7777
        self.received = 0
        self.request = 0
        check_target(path)
        make_parents(path, owner)
        self.temporary = f"{os.path.dirname(path)}/.{os.urandom(8).hex()}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(self.temporary, flags, 0o600)

    def write(self, offset: int, data: bytes) -> None:
        if offset != self.received:
            raise RefusedError("bad_offset", f"{self.path}: expected offset {self.received}, got {offset}")
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]
        self.received += len(data)

    def commit(self) -> None:
        os.fchown(self.fd, self.owner.uid, self.owner.gid)
        os.fchmod(self.fd, self.mode)
        os.rename(self.temporary, self.path)
        os.close(self.fd)

    def abandon(self) -> None:
        try:
            os.close(self.fd)
        except OSError:
            pass
        try:
            os.unlink(self.temporary)
        except OSError:
            pass


class Download:
    """A regular file on its way to the host, at most ``limit`` bytes."""

    def __init__(self, path: str, limit: int, stream: int, request: int) -> None:
        self.path, self.limit, self.request = path, limit, request
        # O_NONBLOCK: opening a fifo must not wait for its writer
        self.source = Source(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
        self.source.stream = stream
        status = os.fstat(self.source.fd)
        if not stat.S_ISREG(status.st_mode):
            self.source.close()
            raise RefusedError("not_regular", f"{path} is not a regular file")
        if status.st_size > limit:
            self.source.close()
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError("too_large", f"{self.path} has more than the {self.limit} bytes asked for")

    def pull(self) -> bool:
        more = self.source.pull()
        if self.source.total > self.limit:
            raise self._too_large()
        if not more and self.source.fd >= 0 and not self.source.readable:
            raise RefusedError("not_regular", f"{self.path} has no end that can be read now")
        return more


# ------------------------------------------------------------------------------------- files and users


class Owner:
    """A user of the guest, as files and processes need it."""

    def __init__(self, name: str) -> None:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise RefusedError("no_such_user", f"the guest has no user {name!r}") from None
        self.name, self.uid, self.gid, self.home = name, entry.pw_uid, entry.pw_gid, entry.pw_dir
        self.groups = os.getgrouplist(name, entry.pw_gid)
        if os.geteuid() not in (0, self.uid):
            raise RefusedError("not_permitted", f"the agent does not run as root and cannot become {name!r}")


def check_target(path: str) -> None:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise RefusedError("bad_path", f"{path!r} is not an absolute path of a file")
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise RefusedError("not_regular", f"{path} exists and is not a regular file")


def make_parents(path: str, owner: Owner) -> None:
    """Missing directories are made and belong to the user; existing ones stay as they are."""
    parent = os.path.dirname(path)
    if os.path.isdir(parent):
        return
    make_parents(parent, owner)
    os.mkdir(parent, 0o755)
    os.chown(parent, owner.uid, owner.gid)


def write_file(path: str, data: bytes, owner: Owner, mode: int) -> None:
    """A file for the command about to start: nobody reads it yet, so a new one is written in place.

    That is half the work of a file that takes its name when complete.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode & 0o7777) if path.startswith("/") else -1
    except (OSError, ValueError):
        fd = -1
    if fd < 0:  # it exists, or its directory does not, or it is no path: the thorough way knows what to say
        replace_file(path, data, owner, mode)
        return
    try:
        os.fchown(fd, owner.uid, owner.gid)
        if mode & UMASK:
            os.fchmod(fd, mode & 0o7777)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def replace_file(path: str, data: bytes, owner: Owner, mode: int) -> None:
    upload = Upload(path, owner, mode)
    try:
        upload.write(0, data)
        upload.commit()
    except BaseException:
        upload.abandon()
        raise


# ---------------------------------------------------------------------------------------------- commands


class Exec:
    """One command: its first process, the outputs, the input, and how it ended."""

    def __init__(
        self, ident: str, pid: int, out: int, err: int, feed: int | None, group: Group | None
    ) -> None:
        self.id = ident
        self.pid = pid
        self.group = group
        self.out, self.err = Source(out), Source(err)
        self.feed = None if feed is None else Feed(feed)
        self.stream: int | None = None
        self.deadline: float | None = None  # of the time-out while it runs, of the linger afterwards
        self.code: int | None = None
        self.signal: int | None = None
        self.timed_out = False
        self.exit_sent = False

    @property
    def running(self) -> bool:
        return self.code is None

    @property
    def sources(self) -> tuple[Source, Source]:
        return self.out, self.err

    def detach(self) -> None:
        self.stream = self.out.stream = self.err.stream = None

    def ended(self, status: int) -> None:
        if os.WIFSIGNALED(status):
            self.signal = os.WTERMSIG(status)
            self.code = 128 + self.signal
        else:
            self.code = os.WEXITSTATUS(status)
        if self.timed_out:
            self.code = 124
        if self.feed is not None:
            self.feed.close()
        self.deadline = time.monotonic() + LINGER

    def cut_off(self) -> bool:
        """The linger is over: what is in the pipes still counts, what background processes add does not.

        True: both outputs have ended now.
        """
        for source in self.sources:
            if not source.ended and not source.readable:
                source.ended = source.discard = True
        return self.out.ended and self.err.ended

    def close(self) -> None:
        for source in self.sources:
            source.close()
        if self.feed is not None:
            self.feed.close()
        if self.group is not None:
            self.group.remove()


def process_table() -> dict[int, tuple[str, int, int, int]]:
    """pid → (state, parent, group, session) of every process."""
    table: dict[int, tuple[str, int, int, int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = read_small(f"/proc/{name}/stat").rpartition(b")")[2].split()
            except OSError:
                continue
            table[int(name)] = (fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]))
    return table


def read_small(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 256 << 10)
    finally:
        os.close(fd)


def members(command: Exec) -> set[int]:
    """Living processes of a command: its session and group, their descendants, what carries its mark."""
    table = process_table()
    mark = f"\0{MARKER}={command.id}\0".encode()
    found: set[int] = set()
    for pid, (state, _, group, session) in table.items():
        if pid == os.getpid() or state == "Z":
            continue
        if command.pid in (group, session):
            found.add(pid)
            continue
        try:
            if mark in b"\0" + read_small(f"/proc/{pid}/environ"):
                found.add(pid)
        except OSError:
            pass
    grown = True
    while grown:
        children = {pid for pid, entry in table.items() if entry[1] in found and entry[0] != "Z"} - found
        found |= children
        grown = bool(children)
    return found


def kill_members(command: Exec) -> None:
    """SIGKILL until no new process turns up (a fork bomb gets a bounded number of rounds).

    Looked for before the first is killed, because that breaks the chain of parents; then the group at
    once, or a shell would live to report the death of its child. A cgroup needs no looking: thousands of
    processes that fork would hold it up.
    """
    if command.group is not None:
        command.group.kill()
    seen: set[int] = set()
    for _ in range(20):
        fresh = members(command) - seen
        if not fresh:
            return
        if not seen and command.running:
            send_signal(os.killpg, command.pid, signal.SIGKILL)
        for pid in fresh:
            send_signal(os.kill, pid, signal.SIGKILL)
        seen |= fresh


def send_signal(how: Callable[[int, int], None], target: int, number: int) -> None:
    try:
        how(target, number)
    except ProcessLookupError:
        pass


class Plan:
    """A command that is about to start."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: str, owner: Owner) -> None:
        self.argv, self.env, self.cwd, self.owner = argv, env, cwd, owner


def spawn(plan: Plan, stdio: tuple[int, int, int], group: Group | None = None) -> int:
    """Start a process in a session of its own as its owner; answers its pid. Raises RefusedError, OSError."""
    report, tell = os.pipe()
    try:
        pid = os.fork() if group is None else group.fork()
        if pid == 0:
            become(plan.owner, stdio, tell, lambda: plan)
    except OSError:
        os.close(report)
        raise
    finally:
        os.close(tell)
    await_exec(report, pid, plan)
    return pid


def await_exec(report: int, pid: int, plan: Plan) -> None:
    """The child tells through a close-on-exec pipe why it is not the command. Raises RefusedError."""
    try:
        # a directory on a file system that hangs, or no memory: it must not take the agent with it
        if not select.select([report], [], [], EXEC_WAIT)[0]:
            send_signal(os.kill, pid, signal.SIGKILL)
            text = f"{plan.argv[0]} in {plan.cwd} has not started within {EXEC_WAIT:g} s"
            raise RefusedError("exec_failed", text)
        trouble = os.read(report, 4096)
    finally:
        os.close(report)
    if trouble:
        os.waitpid(pid, 0)
        stage, _, code = trouble.decode().partition(" ")
        places = {"cwd": f"working directory {plan.cwd}", "exec": plan.argv[0]}
        what = places.get(stage, f"user {plan.owner.name}")
        raise RefusedError("exec_failed", f"{what}: {os.strerror(int(code))}")


def become(owner: Owner, stdio: tuple[int, int, int], tell: int, command: Callable[[], Plan]) -> NoReturn:
    """In the child: become the owner, learn the command (a zygote waits for it), turn into it."""
    stage = "user"
    try:
        os.setsid()
        for wanted, fd in enumerate(stdio):
            os.dup2(fd, wanted)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.umask(UMASK)
        try:
            overwrite("/proc/self/oom_score_adj", b"0")
        except OSError:
            pass
        if os.geteuid() == 0:
            os.setgroups(owner.groups)
            os.setresgid(owner.gid, owner.gid, owner.gid)
            os.setresuid(owner.uid, owner.uid, owner.uid)
        plan = command()
        stage = "cwd"
        os.chdir(plan.cwd)
        stage = "exec"
        os.execvpe(plan.argv[0], plan.argv, plan.env)  # noqa: S606
    except (OSError, ValueError, TypeError) as error:
        code = error.errno if isinstance(error, OSError) else errno.EINVAL
        os.write(tell, f"{stage} {code or errno.EIO}".encode())
    finally:
        os._exit(127)


class Zygote:
    """A process that is a user's next command already, but for the command itself.

    Made before a snapshot, so every fork has one: to start its first command takes a write and an execve. The
    fork, the user, the session and the pipes are paid for. (Under emulation they cost more than the rest.)
    """

    READY = b"\n"

    def __init__(self, owner: Owner, group: Group | None) -> None:
        self.owner = owner
        out, out_child = os.pipe()
        err, err_child = os.pipe()
        self._report, tell = os.pipe()
        orders, self._order = os.pipe()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        children = (out_child, err_child, tell, orders, null)
        try:
            pid = os.fork() if group is None else group.fork()
            if pid == 0:
                os.close(self._order)  # or it would never see that nobody writes
                become(owner, (null, out_child, err_child), tell, lambda: self._wait(orders, tell))
        finally:
            for fd in children:
                os.close(fd)
        self.command = Exec("", pid, out, err, None, group)
        if os.read(self._report, 1) != self.READY:
            self.discard()
            raise OSError(errno.ECHILD, "the prepared process did not come up")

    def _wait(self, orders: int, tell: int) -> Plan:
        self._rehearse()
        os.write(tell, self.READY)
        plan = self._read(orders)
        if plan is None:
            os._exit(0)  # never needed
        return plan

    def _rehearse(self) -> None:
        """Go the way of an order once, up to a program that is not there. The memory this writes to is this process's
        own afterwards; in a fork, where time counts, it would have to be copied first, page by page."""
        for _ in range(2):
            orders, order = os.pipe()
            os.write(
                order,
                self._encode(Plan(["/nowhere/program"], dict.fromkeys("ABCDEF", "x" * 40), "/", self.owner)),
            )
            os.close(order)
            plan = self._read(orders)
            os.close(orders)
            try:
                if plan is not None:
                    os.chdir(plan.cwd)
                    os.execvpe(plan.argv[0], plan.argv, plan.env)  # noqa: S606
            except OSError:
                pass

    def _encode(self, plan: Plan) -> bytes:
        return json.dumps({"argv": plan.argv, "env": plan.env, "cwd": plan.cwd}).encode()

    def _read(self, orders: int) -> Plan | None:
        pieces: list[bytes] = []
        while piece := os.read(orders, READ):
            pieces.append(piece)
        if not pieces:
            return None
        message: Message = json.loads(b"".join(pieces))
        return Plan(message["argv"], message["env"], message["cwd"], self.owner)

    def run(self, plan: Plan) -> None:
        """Become ``plan``; works once. Raises RefusedError as ``spawn``, OSError when the process is gone."""
        order = self._encode(plan)
        sent = 0
        while sent < len(order):
            sent += os.write(self._order, order[sent:])
        os.close(self._order)
        self._order = -1
        report, self._report = self._report, -1
        await_exec(report, self.command.pid, plan)

    def discard(self) -> None:
        """Close all that is open of it; an unused one ends by that."""
        for fd in (self._order, self._report):
            if fd >= 0:
                os.close(fd)
        self.command.close()


# ---------------------------------------------------------------------------------------------- agent


class Agent:
    """The loop: one port, any number of commands, one thread."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.port = -1
        self.listener: Any = None
        self.queue = bytearray()  # encoded frames on their way to the host
        self.port_readable = self.port_writable = False
        self.decoder = Decoder()
        self.token: str | None = None  # of the last revive
        self.known = False  # this connection has shown that token
        self.execs: dict[str, Exec] = {}
        self.zygote: Zygote | None = None
        self.blanks: dict[str, Resident] = {}  # files of ZYGOTE_USER, mode 600, for the first command
        self.untouched = True  # no command has run since they were made
        self.uploads: dict[int, Upload] = {}
        self.downloads: dict[int, Download] = {}
        self.feeds: dict[int, Feed] = {}
        self.outputs: dict[int, Source] = {}
        self.child_ended = False
        self.machine_id = ""  # of the last revive since quiesce: empty in a fork that was made ready for it
        self.has_ssh_keys = bool(system.ssh_keys())  # not looked up in revive of such a fork
        self.make_ssh_keys = False
        self.leaving = False
        self.epoll = select.epoll()
        self.watched: dict[int, Callable[[int], None]] = {}
        self.handlers: dict[str, Callable[[int, Message], Message | None]] = {
            "hello": self.on_hello,
            "revive": self.on_revive,
            "quiesce": self.on_quiesce,
            "poweroff": self.on_poweroff,
            "exec.start": self.on_start,
            "exec.attach": self.on_attach,
            "exec.kill": self.on_kill,
            "exec.forget": self.on_forget,
            "put": self.on_put,
            "get": self.on_get,
        }
        self.open_to_all = {"hello", "revive", "quiesce", "poweroff"}

    # ------------------------------------------------------------ the loop

    def run(self) -> None:
        """Until poweroff. An unexpected exception ends the agent, and a PID 1 its machine: loudly."""
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, on_signal)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self.watch(wake, select.EPOLLIN, lambda _: self.drain_wakeups(wake))
        self.child_ended = True  # as PID 1, some may have ended already
        gc.freeze()
        while True:
            busy = self.work()
            if self.leaving and not self.queue:
                self.system.poweroff()
                return
            for fd, events in self.epoll.poll(0 if busy else self.next_deadline()):
                handler = self.watched.get(fd)
                if handler is not None:
                    handler(events)

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self.watched[fd] = handler
        self.epoll.register(fd, events | select.EPOLLET)

    def drain_wakeups(self, fd: int) -> None:
        self.child_ended = True
        try:
            while os.read(fd, 512):
                pass
        except BlockingIOError:
            pass

    def next_deadline(self) -> float | None:
        deadlines = [command.deadline for command in self.execs.values() if command.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def work(self) -> bool:
        """Everything that can be done without waiting. True: there is more of it."""
        if self.child_ended:
            self.reap()
        busy = self.read_port()
        self.check_deadlines()
        for command in tuple(self.execs.values()):
            busy |= self.pump(command)
        for stream in tuple(self.downloads):
            busy |= self.pump_download(stream)
        self.write_port()
        if self.make_ssh_keys and not self.queue:
            self.make_ssh_keys = False
            self.system.make_ssh_keys()
        return (busy and self.port_writable) or self.can_read_on()

    def can_read_on(self) -> bool:
        """Whether some pipe or the port has more and there is room for it."""
        if self.port >= 0 and self.port_readable and len(self.queue) < QUEUE_HARD:
            return True
        return any(
            source.readable and source.fd >= 0 and (source.discard or len(source.ring) < WINDOW)
            for command in self.execs.values()
            for source in command.sources
        )

    def reap(self) -> None:
        self.child_ended = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for command in self.execs.values():
                if command.pid == pid and command.running:
                    command.ended(status)

    def check_deadlines(self) -> None:
        for command in self.execs.values():
            if command.deadline is None:
                continue
            now = time.monotonic()
            if command.deadline > now:
                continue
            if command.running:
                command.timed_out = True
                command.deadline = None
                kill_members(command)
            else:
                # one that is held up by its host is looked at again
                command.deadline = None if command.cut_off() else now + LINGER

    def pump(self, command: Exec) -> bool:
        more = False
        for source in command.sources:
            more |= source.pull()
            more |= source.push(self)
        if command.deadline is not None and not command.running and command.out.ended and command.err.ended:
            command.deadline = None
        feed, stream = command.feed, command.stream
        if feed is not None:
            feed.flush()
            if stream is not None and feed.written > feed.acked:
                feed.acked = feed.written
                self.send(ACK, stream + STDIN, OFFSET.pack(feed.acked))
        if stream is not None and not command.running and not command.exit_sent:
            command.exit_sent = True
            result = {"code": command.code, "signal": command.signal, "timed_out": command.timed_out}
            self.send(EXIT, stream, json.dumps(result).encode())
        return more

    def pump_download(self, stream: int) -> bool:
        download = self.downloads[stream]
        try:
            more = download.pull()
        except RefusedError as refusal:
            self.end_download(stream)
            self.refuse(download.request, refusal)
            return False
        more |= download.source.push(self)
        if download.source.eof_sent:
            self.end_download(stream)
            self.reply(download.request, {"size": download.source.total})
        return more

    def end_download(self, stream: int) -> None:
        self.downloads.pop(stream).source.close()
        self.outputs.pop(stream, None)

    # ------------------------------------------------------------ the port

    def use_port(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.port = fd
        self.port_readable = self.port_writable = True
        self.watch(fd, select.EPOLLIN | select.EPOLLOUT, self.on_port)

    def use_listener(self, listener: Any) -> None:
        """A listening socket instead of a port: the newest connection is the host."""
        listener.setblocking(False)
        self.listener = listener
        self.watch(listener.fileno(), select.EPOLLIN, lambda _: self.accept())

    def accept(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except BlockingIOError:
                return
            self.drop_port()
            self.use_port(connection.detach())

    def drop_port(self) -> None:
        self.host_gone()
        if self.listener is not None and self.port >= 0:
            del self.watched[self.port]
            os.close(self.port)
            self.port = -1

    def on_port(self, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            self.port_readable = True
        if events & select.EPOLLOUT:
            self.port_writable = True

    def read_port(self) -> bool:
        if not self.port_readable or self.port < 0 or len(self.queue) >= QUEUE_HARD:
            return False
        try:
            data = os.read(self.port, READ)
        except BlockingIOError:
            self.port_readable = False
            return False
        except OSError:
            data = b""
        if not data:
            # A virtio port reads as ended while the driver has not yet heard that a host is there, which after a
            # restore can be later than the host's first frame: what was answered to that frame must stay queued.
            # A host that is really gone is forgotten when the next one says hello.
            self.port_readable = False
            if self.listener is not None:
                self.drop_port()
            return False
        for kind, stream, payload in self.decoder.feed(data):
            self.on_frame(kind, stream, payload)
        return True

    def write_port(self) -> None:
        while self.queue and self.port_writable and self.port >= 0:
            try:
                count = os.write(self.port, self.queue[: 32 << 10])
            except BlockingIOError:
                self.port_writable = False
            except OSError:
                self.drop_port()
                return
            else:
                del self.queue[:count]

    def host_gone(self) -> None:
        """Forget what belongs to the connection; commands and their unacknowledged output stay."""
        self.known = False
        self.queue.clear()
        self.feeds.clear()
        self.outputs.clear()
        for command in self.execs.values():
            command.detach()
        while self.uploads:
            self.uploads.popitem()[1].abandon()
        for stream in tuple(self.downloads):
            self.end_download(stream)

    def send(self, kind: int, stream: int, payload: bytes) -> None:
        self.queue += encode(kind, stream, payload)

    def reply(self, request: int, answer: Message) -> None:
        answer["ok"] = True
        self.send(REPLY, request, json.dumps(answer).encode())

    def refuse(self, request: int, refusal: RefusedError) -> None:
        answer = {"ok": False, "error": refusal.reason, "message": str(refusal)[:500]}
        self.send(REPLY, request, json.dumps(answer).encode())

    # ------------------------------------------------------------ frames

    def on_frame(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == REQUEST:
            self.on_request(stream, payload)
            return
        if kind not in (DATA, EOF, ACK) or len(payload) < OFFSET.size:
            return
        (offset,) = OFFSET.unpack_from(payload)
        if kind == ACK:
            source = self.outputs.get(stream)
            if source is not None:
                source.acknowledge(offset)
        elif stream in self.feeds:
            feed = self.feeds[stream]
            if kind == DATA:
                feed.add(offset, payload[OFFSET.size :])
            else:
                feed.ending = True
        elif stream in self.uploads:
            self.on_upload(stream, kind, offset, payload)
        elif kind == EOF and stream in self.downloads:  # the host does not want it any more
            self.end_download(stream)

    def on_request(self, request: int, payload: bytes) -> None:
        what = "request"
        try:
            message: Message = json.loads(payload)
            what = message["op"]
            handler = self.handlers.get(what)
            if handler is None:
                raise RefusedError("unknown_op", f"this agent (version {VERSION}) has no {what!r}")
            if not self.known and what not in self.open_to_all:
                raise RefusedError("not_revived", f"{what} before revive with this connection's token")
            answer = handler(request, message)
            if answer is not None:
                self.reply(request, answer)
        except RefusedError as refusal:
            self.refuse(request, refusal)
        except OSError as error:
            self.refuse(request, refuse_os(what, error))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            # only the class: the text could repeat what the request carried
            self.refuse(request, RefusedError("bad_request", f"{what}: {type(error).__name__}"))

    def on_hello(self, _: int, message: Message) -> Message:
        token: str = message["token"]
        self.begin(token)
        return {"agent_version": VERSION, "revived": self.known, "execs": list(self.execs)}

    def begin(self, token: str) -> None:
        """A new host: whatever the last one was promised is void."""
        self.host_gone()
        self.known = self.token is not None and token == self.token

    def on_revive(self, _: int, message: Message) -> Message:
        """The measured path of every fork: no import, no subprocess, no fork.

        Also the first word in the copy of a running machine, with a new identity or, thawed, with its own: then
        what identifies it beyond this request stays. Deadlines of commands count the time the machine has run.
        """
        self.begin(message["token"])
        self.token = None  # a revive that fails half-way leaves the gate shut
        self.known = False
        system = self.system
        system.add_entropy(binascii.a2b_base64(message["entropy"]))
        step = system.set_clock(message["time_ns"])
        name: str = message["hostname"]
        system.set_hostname(name)
        system.set_machine_id(message["machine_id"])
        hosts: dict[str, str] = message["hosts"]
        lines = [f"127.0.0.1 localhost {name}", "::1 localhost ip6-localhost"]
        lines += [f"{address} {host}" for host, address in hosts.items()]
        system.set_hosts("\n".join(lines) + "\n")
        system.set_resolver(message["resolver"])
        boot_id: str = message["boot_id"]
        system.set_boot_id(boot_id)
        thawed, copied = self.machine_id == message["machine_id"], bool(self.machine_id)
        if not thawed and (self.has_ssh_keys or copied):
            keys = system.ssh_keys()
            for path in keys:
                os.unlink(path)
            self.make_ssh_keys |= bool(keys)  # once the answer is out
        self.machine_id = message["machine_id"]
        self.token = message["token"]
        self.known = True
        return {"clock_step_ns": step, "boot_id": boot_id, "execs": list(self.execs)}

    def on_quiesce(self, _: int, message: Message) -> Message:
        """Make the machine fit to be forked: nothing of this connection's work is left in memory."""
        running = [command.id for command in self.execs.values() if command.running]
        if running:
            raise RefusedError("busy", f"still running: {', '.join(running[:5])}")
        self.token, self.machine_id = None, ""
        self.host_gone()
        for command in self.execs.values():
            command.close()
        self.execs.clear()
        self.queue, self.decoder = bytearray(), Decoder()
        self.has_ssh_keys = bool(self.system.ssh_keys())
        self.system.sync()
        gc.collect()
        gc.freeze()
        self.system.trim_heap()
        self.make_zygote()
        self.make_blanks(message["blanks"])
        return {}

    def drop_zygote(self, zygote: Zygote) -> None:
        self.zygote = None
        for source in zygote.command.sources:
            self.watched.pop(source.fd, None)
        zygote.discard()

    def make_blanks(self, paths: list[str]) -> None:
        """Files on tmpfs that the first command of every fork gets its content in: made and mapped beforehand.

        Only the first: a command could fill that tmpfs or cut such a file off, and the write would end the agent.
        """
        while self.blanks:
            self.blanks.popitem()[1].close()
        self.untouched = True
        for path in paths:
            owner = Owner(ZYGOTE_USER)
            blank = Resident(path, 0o600)
            os.fchown(blank.fd, owner.uid, owner.gid)
            blank.write(b"")
            self.blanks[path] = blank

    def make_group(self) -> Group | None:
        groups = self.system.groups
        return None if groups is None else groups.make()

    def make_zygote(self) -> None:
        """The first command of every fork shall find its process made."""
        if self.zygote is not None:
            self.drop_zygote(self.zygote)
        try:
            self.zygote = Zygote(Owner(ZYGOTE_USER), self.make_group())
            self.enroll(self.zygote.command)
        except (OSError, RefusedError) as error:
            log(f"no process is prepared for {ZYGOTE_USER}: {error}")

    def on_poweroff(self, _: int, __: Message) -> Message:
        self.leaving = True
        return {}

    # ------------------------------------------------------------ commands

    def on_start(self, _: int, message: Message) -> Message:
        ident: str = message["exec"]
        existing = self.execs.get(ident)
        if existing is not None:
            return self.attach(existing, message["stream"], None, None)
        self.make_room()
        user: str = message["user"]
        # Looking a user up reads files: a prepared process's owner is known already.
        ready = self.zygote
        owner = ready.owner if ready is not None and ready.owner.name == user else Owner(user)
        for file in message["files"]:
            fits = self.untouched and user == ZYGOTE_USER and file["mode"] == 0o600
            blank = self.blanks.get(file["path"]) if fits else None
            data = binascii.a2b_base64(file["data"])
            if blank is not None and len(data) <= Resident.SIZE:
                blank.write(data)
            else:
                write_file(file["path"], data, owner, file["mode"])
        env = {
            "PATH": PATH,
            "HOME": owner.home,
            "USER": owner.name,
            "LOGNAME": owner.name,
            "LANG": "C.UTF-8",
            MARKER: ident,
        }
        env.update(message["env"])
        cwd: str = message["cwd"] or (owner.home if os.path.isdir(owner.home) else "/")
        command = self.launch(ident, Plan(message["argv"], env, cwd, owner), bool(message["stdin"]))
        self.untouched = False
        if message["timeout_s"] is not None:
            command.deadline = time.monotonic() + message["timeout_s"]
        self.execs[ident] = command
        return self.attach(command, message["stream"], 0, 0)

    def launch(self, ident: str, plan: Plan, with_stdin: bool) -> Exec:
        ready = self.zygote
        if ready is not None and ready.owner is plan.owner and not with_stdin:
            self.zygote = None
            try:
                ready.run(plan)
            except OSError:
                self.drop_zygote(ready)
                log("the prepared process was gone")
            except RefusedError:
                self.drop_zygote(ready)
                raise
            else:
                ready.command.id = ident
                return ready.command
        return self.launch_anew(ident, plan, with_stdin)

    def launch_anew(self, ident: str, plan: Plan, with_stdin: bool) -> Exec:
        group = self.make_group()
        out, out_child = os.pipe()
        err, err_child = os.pipe()
        feed: int | None = None
        if with_stdin:
            in_child, feed = os.pipe()
        else:
            in_child = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            pid = spawn(plan, (in_child, out_child, err_child), group)
        except BaseException:
            for fd in (out, err) if feed is None else (out, err, feed):
                os.close(fd)
            if group is not None:
                group.remove()
            raise
        finally:
            for fd in (in_child, out_child, err_child):
                os.close(fd)
        return self.enroll(Exec(ident, pid, out, err, feed, group))

    def enroll(self, command: Exec) -> Exec:
        """Watch the pipes of a command that runs."""
        for source in command.sources:
            os.set_blocking(source.fd, False)
            self.watch(source.fd, select.EPOLLIN, readable_setter(source))
        if command.feed is not None:
            os.set_blocking(command.feed.fd, False)
            self.watch(command.feed.fd, select.EPOLLOUT, writable_setter(command.feed))
        return command

    def make_room(self) -> None:
        ended = [command for command in self.execs.values() if not command.running]
        for command in ended[: max(0, len(ended) - MAX_ENDED + 1)]:
            self.forget(command)
        if len(self.execs) >= MAX_EXECS:
            raise RefusedError("too_many", f"{MAX_EXECS} commands run already")

    def on_attach(self, _: int, message: Message) -> Message:
        command = self.find(message)
        return self.attach(command, message["stream"], message["stdout_from"], message["stderr_from"])

    def attach(self, command: Exec, stream: int, out_from: int | None, err_from: int | None) -> Message:
        """Send both outputs from these offsets on (None: from the oldest byte still kept)."""
        offsets: list[int] = []
        for source, wanted in ((command.out, out_from), (command.err, err_from)):
            offset = source.base if wanted is None else wanted
            if not source.base <= offset <= source.total:
                text = f"{command.id}: offset {offset} is not within {source.base}…{source.total}"
                raise RefusedError("bad_offset", text)
            offsets.append(offset)
        if command.stream is not None:
            for old in (command.stream + STDIN, command.stream + STDOUT, command.stream + STDERR):
                self.feeds.pop(old, None)
                self.outputs.pop(old, None)
        command.stream, command.exit_sent = stream, False
        command.out.attach(stream + STDOUT, offsets[0])
        command.err.attach(stream + STDERR, offsets[1])
        self.outputs[stream + STDOUT] = command.out
        self.outputs[stream + STDERR] = command.err
        stdin: int | None = None
        if command.feed is not None:
            self.feeds[stream + STDIN] = command.feed
            stdin = command.feed.received
            command.feed.acked = command.feed.written
        return {
            "pid": command.pid,
            "stdout": offsets[0],
            "stderr": offsets[1],
            "stdin": stdin,
            "stdin_written": None if command.feed is None else command.feed.written,
        }

    def find(self, message: Message) -> Exec:
        command = self.execs.get(message["exec"])
        if command is None:
            raise RefusedError("unknown_exec", f"no command {message['exec']!r} here")
        return command

    def on_kill(self, _: int, message: Message) -> Message:
        command = self.find(message)
        number = int(message["signal"])
        if number == signal.SIGKILL:
            kill_members(command)
        else:
            send_signal(os.killpg, command.pid, number)
        return {}

    def on_forget(self, _: int, message: Message) -> Message:
        command = self.find(message)
        if command.running:
            raise RefusedError("busy", f"{command.id} is still running")
        self.forget(command)
        return {}

    def forget(self, command: Exec) -> None:
        command.close()
        del self.execs[command.id]
        if command.stream is not None:
            self.feeds.pop(command.stream + STDIN, None)
            self.outputs.pop(command.stream + STDOUT, None)
            self.outputs.pop(command.stream + STDERR, None)

    # ------------------------------------------------------------ files

    def on_put(self, request: int, message: Message) -> None:
        upload = Upload(message["path"], Owner(message["user"]), message["mode"])
        upload.request = request
        self.uploads[message["stream"]] = upload

    def on_upload(self, stream: int, kind: int, offset: int, payload: bytes) -> None:
        upload = self.uploads[stream]
        try:
            if kind == DATA:
                upload.write(offset, payload[OFFSET.size :])
                self.send(ACK, stream, OFFSET.pack(upload.received))
                return
            if offset != upload.received:
                raise RefusedError("bad_offset", f"{upload.path}: {upload.received} of {offset} bytes came")
            check_target(upload.path)
            upload.commit()
        except (RefusedError, OSError) as error:
            del self.uploads[stream]
            upload.abandon()
            refusal = refuse_os(upload.path, error) if isinstance(error, OSError) else error
            self.refuse(upload.request, refusal)
        else:
            del self.uploads[stream]
            self.reply(upload.request, {"size": upload.received})

    def on_get(self, request: int, message: Message) -> None:
        stream: int = message["stream"]
        download = Download(message["path"], message["max_bytes"], stream, request)
        self.downloads[stream] = download
        self.outputs[stream] = download.source


def on_signal(_: int, __: object) -> None:
    """The wake-up pipe has the news; without a handler there would be none."""


def readable_setter(source: Source) -> Callable[[int], None]:
    def set_readable(_: int) -> None:
        source.readable = True

    return set_readable


def writable_setter(feed: Feed) -> Callable[[int], None]:
    def set_writable(_: int) -> None:
        feed.writable = True

    return set_writable


# ---------------------------------------------------------------------------------------------- start


def set_up_machine(system: System) -> None:
    """What an init does before anything else can run: file systems, limits, network."""
    import resource  # noqa: PLC0415  (only an init needs it)

    common = System.MS_NOSUID | System.MS_NOEXEC
    for source, target, fstype, flags, options in (
        ("proc", "/proc", "proc", common | System.MS_NODEV, ""),
        ("sysfs", "/sys", "sysfs", common | System.MS_NODEV, ""),
        ("devtmpfs", "/dev", "devtmpfs", System.MS_NOSUID, "mode=755"),
        ("devpts", "/dev/pts", "devpts", common, "mode=620,gid=5,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "tmpfs", System.MS_NOSUID | System.MS_NODEV, "mode=1777"),
        ("tmpfs", "/run", "tmpfs", System.MS_NOSUID | System.MS_NODEV, "mode=755,size=20%"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", common | System.MS_NODEV, ""),
    ):
        try:
            if not os.path.isdir(target):
                os.mkdir(target, 0o755)
            system.mount(source, target, fstype, flags, options)
        except OSError as error:
            if error.errno != errno.EBUSY:  # the initramfs may have mounted it already
                log(f"mount {target}: {error}")
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")
    os.makedirs("/run/lock", exist_ok=True)
    os.chmod("/run/lock", 0o1777)
    os.makedirs("/tmp", exist_ok=True)
    os.chmod("/tmp", 0o1777)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 524288))
    processes = system.make_groups()
    resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))  # the kernel's own is half of that
    for number in (signal.SIGINT, signal.SIGTERM):  # init is not ended by a signal
        signal.signal(number, signal.SIG_IGN)
    system.prepare()
    system.come_first()
    set_up_network()


def set_up_network() -> None:
    """lo, and eth0 as every slot has it: 10.0.2.15/24 through 10.0.2.2. By ioctl: images need no iproute2."""
    import socket  # noqa: PLC0415  (only an init needs it)

    def address(text: str) -> bytes:
        return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))

    def interface(name: str, value: bytes) -> bytes:
        return struct.pack("16s24s", name.encode(), value)

    up = struct.pack("H", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
    control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        for name, ip, mask in (("lo", "127.0.0.1", "255.0.0.0"), ("eth0", "10.0.2.15", "255.255.255.0")):
            if not os.path.isdir(f"/sys/class/net/{name}"):
                continue
            fcntl.ioctl(control, 0x8916, interface(name, address(ip)))  # SIOCSIFADDR
            fcntl.ioctl(control, 0x891C, interface(name, address(mask)))  # SIOCSIFNETMASK
            fcntl.ioctl(control, 0x8914, interface(name, up))  # SIOCSIFFLAGS
            if name == "eth0":  # struct rtentry: pad, dst, gateway, genmask, flags RTF_UP|RTF_GATEWAY
                anywhere = address("0.0.0.0")
                route = struct.pack("@L16s16s16sH", 0, anywhere, address("10.0.2.2"), anywhere, 0x3)
                fcntl.ioctl(control, 0x890B, route.ljust(120, b"\0"))  # SIOCADDRT
    except OSError as error:
        log(f"network: {error}")
    finally:
        control.close()


def find_port(wait: float = 30.0) -> str:
    """The device of the virtio-serial port named ``agent``; its name arrives a moment after its driver."""
    base = "/sys/class/virtio-ports"
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        for port in os.listdir(base) if os.path.isdir(base) else ():
            try:
                name = read_small(f"{base}/{port}/name").strip()
            except OSError:
                continue
            if name == b"agent" and os.path.exists(f"/dev/{port}"):
                return f"/dev/{port}"
        time.sleep(0.005)
    raise SystemExit("agent: no virtio-serial port named agent")


def open_port(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def main(argv: Iterable[str], system: System | None = None) -> None:
    os.umask(UMASK)
    options = list(argv)
    while os.open("/dev/null" if os.path.exists("/dev/null") else "/", os.O_RDONLY) <= 2:
        pass  # 0, 1 and 2 must not become pipes of ours
    system = system or System()
    agent = Agent(system)
    if "--init" in options:
        set_up_machine(system)
    elif os.getpid() != 1:
        system.adopt_orphans()
    system.shield()
    if "--listen" in options:
        import socket  # noqa: PLC0415  (virtio-serial needs none)

        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(options[options.index("--listen") + 1])
        listener.listen(4)
        agent.use_listener(listener)
    else:
        path = options[options.index("--port") + 1] if "--port" in options else find_port()
        agent.use_port(open_port(path))
    agent.run()


if __name__ == "__main__":
    main(sys.argv[1:])
