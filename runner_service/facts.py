"""What is true of a runner before its next step, and what each reason to leave means. Pure."""

from collections.abc import Mapping

import msgspec

from runner_service.domain import Goto, Runner, RunnerState
from runner_service.live import Live
from runner_service.settings import Runners
from vmm_core.console import last_words
from vmm_core.machine import VmUsage

# Exit codes of Runner.Listener; 0 does not say that the job passed.
EXIT_MEANING = {0: "ended", 1: "was terminated", 2: "asks to be retried", 3: "is updating", 4: "is updating",
                5: "found its session taken", 7: "is too old for the forge"}  # fmt: skip

# Reasons to leave at once: what runs in the VM is over, or must be. All others ask the forge first, and believe it.
FORCED = frozenset(
    {
        "runner_exited", "runner_failed", "runner_lost", "completed", "killed",
        "vm_lost", "vm_died", "channel_lost", "late_busy", "host_stopped",
    }
)  # fmt: skip
BENIGN = frozenset(
    {
        "runner_exited",
        "completed",
        "killed",
        "cancelled",
        "draining",
        "host_stopped",
        "late_idle",
        "late_busy",
    }
)


class Limits(msgspec.Struct, frozen=True):
    """How long a runner may stay in each state, in seconds."""

    by_state: Mapping[RunnerState, float]
    exit_grace: float
    ttl: float

    @classmethod
    def of(cls, runners: Runners) -> "Limits":
        by_state: dict[RunnerState, float] = {
            "wanted": 0.0,
            "forking": runners.fork_limit_s,
            "registering": runners.online_limit_s,
            "idle": runners.idle_limit_s,
            "busy": runners.job_limit_s,
            "retiring": runners.retire_limit_s,
            "gone": 0.0,
        }
        # The engine ends the VM by itself after this, should the service never come back.
        ttl = sum(by_state.values()) + runners.exit_grace_s
        return cls(by_state, runners.exit_grace_s, ttl)


def facts(runner: Runner, live: Live, now: float) -> Goto | None:
    """What is true before the step and overrules it: killed, lost, cancelled, late."""
    if runner.state in ("retiring", "gone"):
        return None
    if runner.killed_at is not None:
        return Goto("retiring", "killed by an operator", "killed")
    if live.ended is not None:
        if live.exit is not None:
            # The process exited and then the VM ended: the exit is the better story, the handler tells it.
            return None
        tail = f"; console: {last_words(live.ended.console_tail, 300)}" if live.ended.console_tail else ""
        how = (live.ended.reason or live.ended.kind).rstrip(".")
        return Goto("retiring", f"the VM ended: {how}{tail}", "vm_died")
    # A job that runs shows that its registration was there: only its own end tells more.
    served = runner.state == "busy" or runner.serving_job_id is not None
    if live.lost is not None and not (served and live.lost_code == "registration_gone"):
        return Goto("retiring", live.lost, live.lost_code)
    if runner.cancelled_at is not None and runner.serving_job_id is None and runner.state != "busy":
        if runner.code == "draining":
            return Goto("retiring", "its host is draining and it has no job yet", "draining")
        return Goto("retiring", "no job needs it any more", "cancelled")
    if now >= runner.deadline:
        return late(runner)
    return None


def late(runner: Runner) -> Goto:
    """Lateness as a reason to retire."""
    seconds = runner.deadline - runner.state_at
    what = {
        "forking": f"not forked and registered within {seconds:.0f} s",
        "registering": f"the runner did not come online within {seconds:.0f} s",
        "idle": f"idle for {seconds:.0f} s without a job",
        "busy": f"the job took longer than its limit of {seconds:.0f} s",
    }
    return Goto("retiring", what.get(runner.state, f"late in state {runner.state}"), f"late_{runner.state}")


def spent(usage: VmUsage) -> str:
    """What a VM cost in all, as the end of a sentence."""
    mib = 1 << 20
    parts = [f"{usage.cpu_seconds:.1f} s of CPU"]
    if usage.peak_bytes:
        parts.append(f"{usage.peak_bytes / mib:.0f} MiB of memory of its own")
    parts.append(f"{usage.disk_write_bytes / mib:.0f} MiB written")
    if usage.net_sent_bytes or usage.net_received_bytes:
        parts.append(f"{(usage.net_sent_bytes + usage.net_received_bytes) / mib:.1f} MiB over the network")
    return f"; it took {', '.join(parts)}"
