"""A VMM process: started in a session of its own, watched through a pidfd, named by pid and start time."""

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vmm_core.errors import VmmMissing, VmmProtocolError
from vmm_core.machine import VmUsage

_LOG_CAP = 64 << 10
_DEATH_SECONDS = 30.0


class VmmProcess:
    """A running (or ended) VMM, our child or adopted. ``log_text`` is what it said on stderr, capped.

    Its standard error is a memfd of fixed size: a VMM can write 64 KiB and no more, no pipe ties it to us,
    and no file on disk grows.
    """

    def __init__(self, pid: int, start_ticks: int, pidfd: int, log_fd: int | None, *, child: bool) -> None:
        self.pid = pid
        self.start_ticks = start_ticks
        self._pidfd = pidfd
        self._log_fd = log_fd
        self._child = child
        # What the kernel says it used in all, once it has ended; None for an adopted one.
        self.final_usage: VmUsage | None = None
        self._ended = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        cwd: Path,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> "VmmProcess":
        """Start ``argv``. Raises VmmMissing when the program is not there or may not be run."""
        log_fd = new_log()
        try:
            child = subprocess.Popen(
                argv,
                cwd=cwd,
                pass_fds=pass_fds,
                stdin=stdin,
                stdout=stdout,
                stderr=log_fd,
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL": "C"},
            )
        except OSError as error:
            os.close(log_fd)
            if error.errno in (errno.ENOENT, errno.EACCES):
                raise VmmMissing(f"{argv[0]} cannot be started: {error.strerror}") from error
            raise
        # The pidfd reaps it; Popen must neither wait for it nor warn about it.
        child.returncode = 0
        pidfd = -1
        try:
            pidfd = os.pidfd_open(child.pid)
            return cls(child.pid, start_ticks(child.pid) or 0, pidfd, log_fd, child=True)
        except BaseException:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            for fd in (log_fd, pidfd):
                if fd >= 0:
                    os.close(fd)
            raise

    @classmethod
    def adopt(cls, pid: int, ticks: int) -> "VmmProcess | None":
        """Watch a VMM another process started; None when it is gone or the pid is somebody else's now."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            # Gone, or the number is a thread's now (ENOENT on new kernels, EINVAL on older ones).
            if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
                return None
            raise
        if start_ticks(pid) != ticks:
            os.close(pidfd)
            return None
        log_fd = None
        with contextlib.suppress(OSError):
            log_fd = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_CLOEXEC)
        return cls(pid, ticks, pidfd, log_fd, child=False)

    @property
    def pidfd(self) -> int:
        """Its pidfd, which stays ours; -1 when this is closed."""
        return self._pidfd

    @property
    def running(self) -> bool:
        return not self._ended.done()

    async def wait(self) -> int | None:
        """The wait status when it has ended: ≥ 0 an exit code, < 0 a signal; None for an adopted one (unknown)."""
        return await asyncio.shield(self._ended)

    def signal(self, number: int) -> None:
        if self.running and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def end(self) -> None:
        """Kill it and wait until the kernel has taken everything back. VmmProtocolError when it does not die."""
        self.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(_DEATH_SECONDS):
                await self.wait()
        except TimeoutError:
            raise VmmProtocolError(
                f"the VMM {self.pid} does not die within {_DEATH_SECONDS:.0f} s of SIGKILL"
            ) from None

    def log_text(self) -> str:
        if self._log_fd is None:
            return ""
        text = os.pread(self._log_fd, _LOG_CAP, 0).rstrip(b"\0").decode(errors="replace")
        return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)

    def close(self) -> None:
        """Stop watching; the process is left alone."""
        if self._pidfd >= 0:
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._log_fd is not None:
            os.close(self._log_fd)
            self._log_fd = None

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        status: int | None = None
        if self._child:
            with contextlib.suppress(ChildProcessError):
                _, raw, used = os.wait4(self.pid, os.WNOHANG)
                status = os.waitstatus_to_exitcode(raw)
                self.final_usage = VmUsage(
                    cpu_seconds=used.ru_utime + used.ru_stime,
                    disk_read_bytes=used.ru_inblock * 512,
                    disk_write_bytes=used.ru_oublock * 512,
                )
        if not self._ended.done():
            self._ended.set_result(status)


def new_log() -> int:
    """A standard error for a VMM: a memfd of 64 KiB that can neither grow nor shrink."""
    log_fd = os.memfd_create("microvm-vmm-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(log_fd, _LOG_CAP)
        fcntl.fcntl(log_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    except BaseException:
        os.close(log_fd)
        raise
    return log_fd


def start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat: clock ticks from host boot to the start of the process; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the name in parentheses and may hold spaces and parentheses itself.
    return int(stat.rpartition(")")[2].split()[19])
