"""What is known of a VM's end: who or what ended it, in one sentence, with what the VMM, the guest and the kernel said.

    the VMM's status and events ──► of_vmm ──┐
    the console, read to its end ───────────►├──► tell ──► VmExit
    the kernel's out-of-memory killer ──────►┘

Events and console are the word of a possibly hostile VMM and guest. They decide only how the end of their own VM is
told, and what is kept of them is capped. How the process ended is the kernel's word.
"""

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from vmm_core.cgroup import oom_kills_in
from vmm_core.machine import ExitCause, VmEvent, VmExit, VmUsage

PANIC_BYTES = 4096
_BEFORE_PANIC = 1024
_REASON_CHARS = 300
_PANIC, _NOT_SYNCING = "Kernel panic - ", "not syncing: "
_GUEST_OOM = ("Out of memory: Killed process", "Memory cgroup out of memory: Killed process",
              "Out of memory and no killable processes")  # fmt: skip

_BY_SHUTDOWN: dict[str, tuple[ExitCause, str]] = {
    "guest-shutdown": ("guest_poweroff", "the guest powered itself off"),
    "guest-reset": ("guest_reboot", "the guest rebooted, which ends a VM"),
    "guest-panic": ("guest_panic", "the guest's kernel panicked"),
    "host-signal": ("vmm_killed", "the VMM was asked to end by a signal from this host"),
    "host-qmp-quit": ("vmm_exited", "the VMM was told to quit through its monitor"),
    "host-error": ("vmm_crashed", "the VMM gave up on an error of its own"),
}
_FAULTS = {
    signal.SIGSEGV: "an invalid memory access",
    signal.SIGBUS: "memory that the host could not give",
    signal.SIGABRT: "a failed assertion",
    signal.SIGILL: "an illegal instruction",
    signal.SIGFPE: "an arithmetic fault",
    signal.SIGTRAP: "a trap",
    signal.SIGSYS: "a system call that its sandbox forbids",
    signal.SIGXFSZ: "its limit of file size",
    signal.SIGXCPU: "its limit of CPU time",
}


# ── the VMM ──────────────────────────────────────────────────────────────────────────────────────


def of_vmm(
    status: int | None,
    *,
    said: str = "",
    events: Sequence[VmEvent] = (),
    disk_full: bool = False,
    usage: VmUsage | None = None,
) -> VmExit:
    """The end of a VMM by its wait status (≥ 0 exit code, < 0 signal, None unknown), events and last words.

    ``disk_full``: it was ended by us because it had stopped its guest on a full disk.
    """
    kind = "vanished" if status is None else "signaled" if status < 0 else "exited"
    cause, reason = _cause(status, events, disk_full=disk_full)
    words = " ".join(said.split())[-_REASON_CHARS:]
    if words and cause in ("vmm_crashed", "vmm_exited", "unknown"):
        reason = f"{reason}; it said: {words}"
    return VmExit(
        kind=kind,
        code=status if status is not None and status >= 0 else None,
        signal=-status if status is not None and status < 0 else None,
        reason=reason,
        cause=cause,
        events=tuple(events),
        usage=usage,
    )


def _cause(status: int | None, events: Sequence[VmEvent], *, disk_full: bool) -> tuple[ExitCause, str]:
    if disk_full:
        return "disk_full", (
            "the host's disk pool was full: a write of the guest could not be done, so its VM was ended; "
            "remove templates, end VMs, or enlarge the pool's disk"
        )
    if status is not None and status < 0:
        return _signaled(-status)
    shutdown = next((event for event in reversed(events) if event.name == "SHUTDOWN"), None)
    if shutdown is not None:
        words = (word for word in shutdown.detail.split() if word.startswith("reason="))
        why = next(words, "").removeprefix("reason=")
        if why in _BY_SHUTDOWN:
            return _BY_SHUTDOWN[why]
    if status is None:
        return "unknown", "the VMM ended while no process of ours was its parent, so its status is unknown"
    if status == 0:
        return "vmm_exited", "the VMM exited without telling why"
    return "vmm_exited", f"the VMM exited with status {status}"


def _signaled(number: int) -> tuple[ExitCause, str]:
    fault = next((what for fault, what in _FAULTS.items() if fault == number), None)
    name = next((known.name for known in signal.Signals if known == number), None)
    shown = f"signal {number}" if name is None else f"signal {number} ({name})"
    if fault is not None:
        return "vmm_crashed", f"the VMM crashed with {shown}: {fault}"
    return "vmm_killed", f"the VMM was killed by {shown}, not sent by this engine"


# ── the guest ────────────────────────────────────────────────────────────────────────────────────


def panic_text(console: str) -> str:
    """The last kernel panic on a console, from a little before it; empty when there is none."""
    at = console.rfind(_PANIC)
    if at < 0:
        return ""
    start = max(0, at - _BEFORE_PANIC)
    if start > 0:
        start = console.find("\n", start, at) + 1 or start
    return console[start : start + PANIC_BYTES]


def guest_oom(console: str) -> str:
    """The last line by which a guest's kernel told that it ran out of memory; empty when there is none."""
    at = max(console.rfind(words) for words in _GUEST_OOM)
    return "" if at < 0 else console[at : at + _REASON_CHARS].partition("\n")[0]


# ── the whole story ──────────────────────────────────────────────────────────────────────────────


def tell(
    found: VmExit,
    verdict: VmExit | None,
    *,
    console: str = "",
    tail: str = "",
    oom: str | None = None,
    usage: VmUsage | None = None,
) -> VmExit:
    """The end of a VM. ``found`` is how its VMM ended, ``verdict`` what we had decided beforehand, if anything;
    ``oom`` is the kernel's word that it killed the VMM for want of memory."""
    told = verdict or found
    cause, reason = told.cause, told.reason
    panic = panic_text(console)
    short_of_memory = guest_oom(console)
    if verdict is None and cause in ("guest_reboot", "guest_panic", "unknown") and panic:
        words = panic[panic.rfind(_PANIC) :].partition("\n")[0]
        cause, reason = (
            "guest_panic",
            f"the guest's kernel panicked: {words.removeprefix(_PANIC).removeprefix(_NOT_SYNCING)[:200]}",
        )
    elif verdict is None and oom is not None and cause in ("vmm_killed", "unknown"):
        cause, reason = "out_of_memory", oom
    return msgspec.structs.replace(
        told,
        cause=cause,
        reason=reason,
        code=found.code,
        signal=found.signal,
        console_tail=tail,
        panic=panic,
        guest_oom=short_of_memory,
        events=found.events,
        usage=usage,
    )


# ── the host's memory ────────────────────────────────────────────────────────────────────────────


class OomWitness:
    """Watches the kernel's counts of processes killed for want of memory, from a VM's start to its end.

    The kernel's log names the process. Where it cannot be read, a count that rose since the last ``look`` is
    the next best: that of the VM's own cgroup, if it has one, or of the whole host.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._since = time.monotonic()
        self._sources = oom_counters(pid)
        self._counts: dict[Path, int] = {}
        self.look()

    def look(self) -> None:
        """Take the counts of now as what was before the end."""
        self._counts = {path: count for path in self._sources if (count := oom_kills_in(path)) is not None}

    def testimony(self, log: Path = Path("/dev/kmsg")) -> str | None:
        """Why the kernel killed it, in one sentence; None when it did not, as far as can be told. Blocking."""
        line = _logged(log, self._pid, self._since)
        if line is not None:
            limited = "cgroup" in line.partition("Killed")[0]
            whose = "it reached the memory limit of its cgroup" if limited else "the host ran out of memory"
            return f"the kernel killed the VMM because {whose}"
        for path, before in self._counts.items():
            if (oom_kills_in(path) or 0) > before:
                return "the host ran out of memory and the kernel killed a process, most likely this VMM"
        return None


def oom_counters(pid: int) -> list[Path]:
    """The files that count out-of-memory kills: of the process's own memory cgroup (v2 or v1), and of the host."""
    found: list[Path] = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            inside = path.lstrip("/")
            if controllers == "" and inside:
                found.append(Path("/sys/fs/cgroup") / inside / "memory.events")
            elif controllers == "memory" and inside:
                found.append(Path("/sys/fs/cgroup/memory") / inside / "memory.oom_control")
    return [*found, Path("/proc/vmstat")]


def _logged(log: Path, pid: int, since: float) -> str | None:
    """The kernel's own line about killing ``pid`` for memory after ``since`` (CLOCK_MONOTONIC), or None."""
    wanted = f"Killed process {pid} ("
    with contextlib.suppress(OSError):
        fd = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return next((line for line in _records(fd, since) if wanted in line), None)
        finally:
            os.close(fd)
    return None


def _records(fd: int, since: float) -> Iterable[str]:
    """The messages of /dev/kmsg after ``since``; a record is ``priority,number,microseconds,flags;message``."""
    for _ in range(100_000):
        try:
            record = os.read(fd, 8192).decode(errors="replace")
        except OSError as error:
            if error.errno == errno.EPIPE:  # overwritten as it was read: the next one is there
                continue
            return
        if not record:
            return
        head, _, message = record.partition(";")
        fields = head.split(",")
        # Half a second of grace: the log's clock is not exactly ours.
        if len(fields) > 2 and fields[2].isdecimal() and int(fields[2]) / 1e6 >= since - 0.5:
            yield message
