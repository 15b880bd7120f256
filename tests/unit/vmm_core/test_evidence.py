"""How an end is told: by the kernel's word on the VMM, what it said by itself, what the guest printed."""

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core import evidence
from vmm_core.machine import VmEvent, VmExit, VmUsage


def _event(name: str, detail: str = "") -> VmEvent:
    return VmEvent(1.0, name, detail)


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("guest-shutdown", "guest_poweroff"),
        ("guest-reset", "guest_reboot"),
        ("guest-panic", "guest_panic"),
        ("host-signal", "vmm_killed"),
        ("host-qmp-quit", "vmm_exited"),
        ("host-error", "vmm_crashed"),
        ("never-heard-of", "vmm_exited"),
    ],
)
def test_a_vmm_that_exits_tells_why_by_its_shutdown_event(reason: str, cause: str) -> None:
    events = [_event("RESUME"), _event("SHUTDOWN", f"guest=true reason={reason}")]
    told = evidence.of_vmm(0, events=events)
    assert (told.kind, told.code, told.cause) == ("exited", 0, cause)
    assert told.events == tuple(events)
    assert told.reason


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGSYS])
def test_a_fault_is_a_crash_and_carries_the_last_words(number: signal.Signals) -> None:
    told = evidence.of_vmm(-number, said="assertion\nfailed " * 100)
    assert (told.kind, told.signal, told.cause) == ("signaled", number, "vmm_crashed")
    assert number.name in told.reason
    assert told.reason.endswith("assertion failed")
    assert len(told.reason) < 500


@pytest.mark.parametrize("number", [9, 15, 1, 40, 64])
def test_any_other_signal_was_sent(number: int) -> None:
    told = evidence.of_vmm(-number, events=[_event("SHUTDOWN", "reason=guest-shutdown")])
    assert (told.cause, told.signal) == ("vmm_killed", number)


def test_a_status_and_an_unknown_end_are_told_as_such() -> None:
    assert evidence.of_vmm(3, said="bad option").reason == "the VMM exited with status 3; it said: bad option"
    unknown = evidence.of_vmm(None)
    assert (unknown.kind, unknown.cause, unknown.code, unknown.signal) == ("vanished", "unknown", None, None)
    adopted = evidence.of_vmm(None, events=[_event("SHUTDOWN", "reason=guest-shutdown")])
    assert adopted.cause == "guest_poweroff"


def test_a_full_disk_is_the_cause_whatever_signal_ended_it() -> None:
    told = evidence.of_vmm(-9, disk_full=True)
    assert told.cause == "disk_full"
    assert "pool" in told.reason


PANIC = """[    1.0] boot line
[   18.0] sysrq: Trigger a crash
[   18.1] Kernel panic - not syncing: sysrq triggered crash
[   18.2] Call Trace:
"""


def test_a_panic_on_the_console_is_the_cause_of_a_reset() -> None:
    found = evidence.of_vmm(0, events=[_event("SHUTDOWN", "guest=true reason=guest-reset")])
    told = evidence.tell(found, None, console=PANIC, tail=PANIC)
    assert told.cause == "guest_panic"
    assert told.reason == "the guest's kernel panicked: sysrq triggered crash"
    assert "Call Trace" in told.panic
    assert "sysrq: Trigger" in told.panic


def test_a_guest_that_prints_a_panic_cannot_make_a_kill_of_ours_its_own_death() -> None:
    found = evidence.of_vmm(-9)
    assert evidence.tell(found, None, console=PANIC).cause == "vmm_killed"
    ordered = VmExit(kind="destroyed", cause="destroyed", reason="destroyed by its owner")
    told = evidence.tell(found, ordered, console=PANIC, usage=VmUsage(cpu_seconds=1.0))
    assert (told.kind, told.cause, told.reason) == ("destroyed", "destroyed", "destroyed by its owner")
    assert told.usage == VmUsage(cpu_seconds=1.0)


def test_the_kernels_word_makes_a_kill_an_out_of_memory() -> None:
    told = evidence.tell(evidence.of_vmm(-9), None, oom="the kernel killed it")
    assert (told.cause, told.reason) == ("out_of_memory", "the kernel killed it")
    crashed = evidence.tell(evidence.of_vmm(-11), None, oom="the kernel killed it")
    assert crashed.cause == "vmm_crashed"


def test_the_guests_own_want_of_memory_is_kept() -> None:
    console = "x\n[9.0] Out of memory: Killed process 77 (python3) total-vm:1kB\nlater\n"
    told = evidence.tell(evidence.of_vmm(0), None, console=console)
    assert told.guest_oom == "Out of memory: Killed process 77 (python3) total-vm:1kB"
    assert evidence.guest_oom("all is well") == ""


@given(st.text(max_size=200), st.text(max_size=200), st.integers(0, 20_000))
def test_whatever_a_guest_prints_is_capped(before: str, after: str, padding: int) -> None:
    console = (
        before + "a" * padding + "Kernel panic - " + after * 50 + "Out of memory: Killed process" + after * 50
    )
    panic = evidence.panic_text(console)
    assert "Kernel panic - " in panic
    assert len(panic) <= evidence.PANIC_BYTES
    assert len(evidence.guest_oom(console)) <= 300
    assert "\n" not in evidence.guest_oom(console)
    assert len(evidence.tell(evidence.of_vmm(0), None, console=console).reason) < 600


@given(
    st.one_of(st.none(), st.integers(-64, 255)),
    st.lists(st.builds(VmEvent, st.floats(), st.text(), st.text())),
    st.text(),
)
def test_no_words_of_a_vmm_break_the_telling(status: int | None, events: list[VmEvent], said: str) -> None:
    told = evidence.of_vmm(status, said=said, events=events)
    assert told.reason
    assert evidence.tell(told, None, console=said).cause


# ── the host's memory ────────────────────────────────────────────────────────────────────────────


class _Kernel:
    """A kernel's counts and log as files."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = directory / "memory.events"
        self.log = directory / "kmsg"
        self.count(0)
        self.log.write_text("")
        monkeypatch.setattr(evidence, "oom_counters", self.counters)

    def counters(self, _pid: int) -> list[Path]:
        return [self.counts]

    def count(self, number: int) -> None:
        self.counts.write_text(f"low 0\nhigh 0\noom {number}\noom_kill {number}\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    return _Kernel(tmp_path, monkeypatch)


def test_a_rising_count_testifies_and_a_steady_one_does_not(kernel: _Kernel) -> None:
    witness = evidence.OomWitness(4242)
    assert witness.testimony(kernel.log) is None
    kernel.count(1)
    assert "ran out of memory" in (witness.testimony(kernel.log) or "")
    witness.look()
    assert witness.testimony(kernel.log) is None


@pytest.mark.parametrize(
    "text", ["", "oom_kill x\n", "oom_kill", "oom_kill 1 2\n", "\0\n", "oom_kill_disable 0\n"]
)
def test_a_count_that_cannot_be_read_says_nothing(kernel: _Kernel, text: str) -> None:
    kernel.counts.write_text(text)
    witness = evidence.OomWitness(4242)
    kernel.count(5)
    assert witness.testimony(kernel.log) is None


def test_the_kernels_log_names_the_process(kernel: _Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        "3,1,50,-;Out of memory: Killed process 4242 (qemu) before our time",
        "garbage",
        "3,2,x,-;Killed process 4242 (",
        "3,3,99000000,-;Memory cgroup out of memory: Killed process 42421 (other)",
        "3,4,99000000,-;Memory cgroup out of memory: Killed process 4242 (qemu-system-x86)",
    ]
    monkeypatch.setattr("time.monotonic", lambda: 98.0)
    witness = evidence.OomWitness(4242)

    def read(_fd: int, _count: int) -> bytes:
        return (records.pop(0) if records else "").encode()

    monkeypatch.setattr(evidence.os, "read", read)
    assert "limit of its cgroup" in (witness.testimony(kernel.log) or "")


def test_a_real_process_has_sources_and_no_testimony() -> None:
    assert Path("/proc/vmstat") in evidence.oom_counters(1)
    assert evidence.oom_counters(2**22 + 1) == [Path("/proc/vmstat")]
