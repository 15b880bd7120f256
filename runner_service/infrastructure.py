"""When infrastructure failed under a job, and whether the job is worth running once more. Pure.

A job that failed is the job's own affair; one whose machine went away under it is not. Which of the two it was is
known here, from how the VM ended, and stays true whatever the forge concludes later (it sees a lost runner only).
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from runner_service.domain import Job
from vmm_core.machine import ExecResult, ExitCause, VmExit

GUEST_OOM = "infra_guest_oom"
_BY_CAUSE: dict[ExitCause, str] = {
    "out_of_memory": "infra_host_memory",
    "disk_full": "infra_disk_full",
    "guest_panic": "infra_guest_panic",
    "guest_poweroff": "infra_guest_poweroff",
    "guest_reboot": "infra_guest_reboot",
    "vmm_killed": "infra_vmm_killed",
    "vmm_crashed": "infra_vmm_crashed",
    "vmm_exited": "infra_vmm_exited",
    "expired": "infra_vm_expired",
}
_BY_CODE = {
    "channel_lost": "infra_channel_lost",
    "runner_lost": "infra_runner_lost",
    "host_stopped": "infra_host_stopped",
}
# The same job on the same machine would end the same way.
_OWN_DOING = {
    "infra_guest_poweroff": "the job (or something it started) powered its machine off",
    "infra_guest_reboot": "the job (or something it started) rebooted its machine, which ends it",
    GUEST_OOM: "the job needs more memory than its machine has: ask for a larger one by label",
    "infra_vm_expired": "the VM's time to live had passed",
}


def code_of(code: str, ending: VmExit | None, process: ExecResult | None = None) -> str | None:
    """The stable ``infra_*`` code of a runner that retires with ``code``; None when its infrastructure did not fail.

    ``ending`` is how its VM ended, ``process`` how the runner's process did, as far as known.
    """
    if code in _BY_CODE:
        return _BY_CODE[code]
    if code in ("vm_died", "vm_lost"):
        return _BY_CAUSE.get(ending.cause, "infra_vm_lost") if ending is not None else "infra_vm_lost"
    if code in ("runner_exited", "runner_failed") and process is not None and process.signal is not None:
        # The runner ends by itself; within the guest only its kernel or the job kills it.
        return GUEST_OOM if ending is not None and ending.guest_oom else "infra_runner_killed"
    if code in ("runner_exited", "completed") and ending is not None and ending.guest_oom:
        return GUEST_OOM
    return None


def sentence(code: str, reason: str) -> str:
    """What the job's timeline and row say."""
    return f"{code}: {reason or 'its machine went away'}; the job itself did not end this"


def not_worth(code: str) -> str | None:
    """Why a job whose infrastructure failed with ``code`` is not run again; None when it is worth it."""
    return _OWN_DOING.get(code)


class Ask(msgspec.Struct, frozen=True):
    """Ask the forge to run this job again: the one that failed, or what a later attempt carried over of it."""

    job: Job


class Over(msgspec.Struct, frozen=True):
    """Nothing to ask for (any more). ``job`` is the one that runs or ran again, if one does."""

    outcome: Literal["done", "needless"]
    why: str
    job: Job | None = None


def next_step(failed: Job, attempts: Sequence[Job]) -> Ask | Over:
    """What to do about a failed job, given all jobs of its name in its run.

    A re-run gives a job a new id under the same run and name, with a higher attempt. The jobs that did not run again
    are carried over under new ids as well: told by the runner, which is still the old one.
    """
    newest = max([failed, *attempts], key=lambda job: (job.run_attempt, job.event_at, job.id == failed.id))
    if newest.conclusion == "success":
        why = "it had succeeded" if newest.id == failed.id else f"it succeeded as job {newest.id}"
        return Over("needless", why)
    if newest.run_attempt == failed.run_attempt:
        return Ask(failed)
    if newest.state == "completed" and newest.runner_name == failed.runner_name:
        return Ask(newest)
    return Over("done", f"it runs again as job {newest.id} (attempt {newest.run_attempt})", newest)
