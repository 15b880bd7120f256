"""The system calls a VMM may make: a BPF filter that a cell installs before it runs the VMM.

What is not listed does not exist for a VMM (ENOSYS, which libraries know how to do without); what no VMM of good
will ever asks for ends it. QEMU's own sandbox comes on top. x86-64 only.
"""

import errno
import platform
import struct

_LD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_CLONE_THREAD = 0x00010000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

# PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_SET_SECCOMP, PR_SET_TIMERSLACK, PR_MCE_KILL, PR_SET_NO_NEW_PRIVS
# and PR_SET_VMA.
_PRCTLS = (15, 16, 21, 22, 29, 33, 38, 0x53564D41)

# Numbers: asm/unistd_64.h.
_EXECVE, _CLONE, _PRCTL, _IOCTL = 59, 56, 157, 16
_ALLOWED = {
    # files and descriptors it was given (or that lie in its root)
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "dup": 32,
    "dup2": 33, "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "readlink": 89, "umask": 95, "statfs": 137, "fstatfs": 138,
    "getdents64": 217, "fadvise64": 221, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "sync_file_range": 277, "fallocate": 285, "dup3": 292, "pipe2": 293,
    "preadv": 295, "pwritev": 296, "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332,
    "close_range": 436, "faccessat2": 439,
    # memory
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
    "mlock": 149, "munlock": 150, "get_mempolicy": 239, "set_mempolicy": 238, "mbind": 237,
    "memfd_create": 319, "pkey_alloc": 330, "pkey_free": 331, "pkey_mprotect": 329, "membarrier": 324,
    # signals, threads, waiting
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "sched_yield": 24, "exit": 60, "exit_group": 231, "futex": 202,
    "set_tid_address": 218, "set_robust_list": 273, "get_robust_list": 274, "rseq": 334, "tgkill": 234,
    "tkill": 200, "arch_prctl": 158, "sched_getaffinity": 204, "sched_getparam": 143,
    "sched_getscheduler": 145, "sched_get_priority_max": 146, "sched_get_priority_min": 147,
    "restart_syscall": 219, "seccomp": 317, "getcpu": 309, "futex_waitv": 449,
    "epoll_create": 213, "epoll_wait": 232, "epoll_ctl": 233, "epoll_pwait": 281, "epoll_create1": 291,
    "epoll_pwait2": 441, "signalfd": 282, "signalfd4": 289, "eventfd": 284, "eventfd2": 290,
    "io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209, "io_cancel": 210,
    "io_pgetevents": 333,
    # clocks and timers
    "pause": 34, "nanosleep": 35, "getitimer": 36,
    "setitimer": 38, "gettimeofday": 96, "time": 201, "timer_create": 222,
    "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "timerfd_create": 283,
    "timerfd_settime": 286, "timerfd_gettime": 287,
    # sockets it was given: none can be made, connected or bound
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "listen": 50, "getsockname": 51,
    "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "accept": 43, "accept4": 288, "recvmmsg": 299,
    "sendmmsg": 307,
    # who and where am I
    "getpid": 39, "getppid": 110, "gettid": 186, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getresuid": 118, "getresgid": 120, "getgroups": 115, "getpgrp": 111, "getpgid": 121, "getsid": 124,
    "uname": 63, "getrlimit": 97, "prlimit64": 302, "getrusage": 98, "times": 100, "sysinfo": 99, "capget": 125,
    "getpriority": 140, "getrandom": 318,
}  # fmt: skip
_REFUSED = {"socket": 41, "socketpair": 53, "connect": 42, "bind": 49}
_FATAL = {
    "fork": 57, "vfork": 58, "execveat": 322, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "pidfd_getfd": 438, "kcmp": 312, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442, "unshare": 272, "setns": 308, "mknod": 133, "mknodat": 259, "setuid": 105,
    "setgid": 106, "setreuid": 113, "setregid": 114, "setgroups": 116, "setresuid": 117, "setresgid": 119,
    "capset": 126, "bpf": 321, "perf_event_open": 298, "add_key": 248, "request_key": 249, "keyctl": 250,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "init_module": 175, "finit_module": 313,
    "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320, "reboot": 169, "swapon": 167,
    "swapoff": 168, "iopl": 172, "ioperm": 173, "settimeofday": 164, "clock_settime": 227, "acct": 163,
    "quotactl": 179, "syslog": 103, "modify_ldt": 154,
}  # fmt: skip


def obstacle() -> str | None:
    """Why there is no filter for this host, in one sentence; None when there is one."""
    if platform.machine() == "x86_64":
        return None
    return f"the system call filter is written for x86_64, and this host is {platform.machine()}"


def program(exec_address: int) -> bytes:
    """The filter, as ``struct sock_filter[]``.

    ``execve`` works from one place only: with its path at ``exec_address``, which the cell knows and the program
    it starts does not. A wrong guess is fatal, so the one exec of a cell is its last.
    """
    code = [
        *(_statement(_LD, 4), _jump(_JEQ, _ARCH_X86_64, 1, 0), _statement(_RET, _KILL_PROCESS)),
        *(_statement(_LD, 0), _jump(_JGE, _X32_BIT, 0, 1), _statement(_RET, _KILL_PROCESS)),
        *_case(_EXECVE, _when_pointer(exec_address)),
        # Threads, no processes. clone3 keeps its flags in memory, where no filter sees them: libc does without.
        *_case(_CLONE, _if_flag(_low(0), _CLONE_THREAD, errno.EPERM)),
        *_case(_PRCTL, _unless_one_of(_low(0), _PRCTLS, errno.EPERM)),
        *_case(_IOCTL, _if_one_of(_low(1), (_TIOCSTI, _TIOCLINUX), errno.EPERM)),
    ]  # fmt: skip
    for number in _ALLOWED.values():
        code += _case(number, [_statement(_RET, _ALLOW)])
    for number in _REFUSED.values():
        code += _case(number, _return_errno(errno.EACCES))
    for number in _FATAL.values():
        code += _case(number, [_statement(_RET, _KILL_PROCESS)])
    code += _return_errno(errno.ENOSYS)
    return b"".join(code)


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _low(argument: int) -> int:
    """The offset of the low half of an argument in ``struct seccomp_data``."""
    return 16 + 8 * argument


def _case(number: int, body: list[bytes]) -> list[bytes]:
    """Run ``body`` (which returns) for one system call. Its number is in the accumulator, before and after."""
    return [_jump(_JEQ, number, 0, len(body)), *body]


def _return_errno(number: int) -> list[bytes]:
    return [_statement(_RET, _ERRNO | number)]


def _when_pointer(address: int) -> list[bytes]:
    return [
        _statement(_LD, _low(0)),
        _jump(_JEQ, address & 0xFFFFFFFF, 0, 3),
        _statement(_LD, _low(0) + 4),
        _jump(_JEQ, address >> 32, 0, 1),
        _statement(_RET, _ALLOW),
        _statement(_RET, _KILL_PROCESS),
    ]


def _if_flag(offset: int, flag: int, error: int) -> list[bytes]:
    return [
        _statement(_LD, offset),
        _jump(_JSET, flag, 1, 0),
        *_return_errno(error),
        _statement(_RET, _ALLOW),
    ]


def _unless_one_of(offset: int, values: tuple[int, ...], error: int) -> list[bytes]:
    tests = [_jump(_JEQ, value, len(values) - index, 0) for index, value in enumerate(values)]
    return [_statement(_LD, offset), *tests, *_return_errno(error), _statement(_RET, _ALLOW)]


def _if_one_of(offset: int, values: tuple[int, ...], error: int) -> list[bytes]:
    tests = [_jump(_JEQ, value, len(values) - index, 0) for index, value in enumerate(values)]
    return [_statement(_LD, offset), *tests, _statement(_RET, _ALLOW), *_return_errno(error)]
