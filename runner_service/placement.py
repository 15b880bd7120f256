"""Which host takes one more VM, or why none does. Pure.

A host's ``memory_mib`` and ``cpus`` are what may be promised of it: overcommit is in them already.
"""

from collections.abc import Sequence

import msgspec

from runner_service.domain import Host

_MEMORY = "[runners] memory_mib, [limits] memory_overcommit"


class NoRoom(msgspec.Struct, frozen=True):
    """No host takes it; ``reason`` is one sentence with the numbers and the setting."""

    code: str
    reason: str


def place(need_mib: int, vcpus: int, hosts: Sequence[Host]) -> Host | NoRoom:
    """The host with most free memory that has room for one VM of ``need_mib`` MiB and ``vcpus`` vCPUs."""
    open_hosts = [h for h in hosts if not h.draining]
    if not open_hosts:
        if not hosts:
            return NoRoom("no_host", "capacity: no host")
        return NoRoom("draining", "draining: every host is draining")
    fitting = [h for h in open_hosts if h.vms < h.max_vms and _fits(need_mib, vcpus, h)]
    if fitting:
        return max(fitting, key=lambda h: (h.memory_mib - h.used_mib, h.name))
    able = [h for h in open_hosts if h.max_vms and need_mib <= h.memory_mib]
    if not able:
        most = max((h.memory_mib for h in open_hosts), default=0)
        reason = f"it needs {need_mib} MiB of memory and the largest host offers {most} MiB"
        return NoRoom("too_large", f"capacity: {reason} ({_MEMORY})")
    roomy = [h for h in able if h.vms < h.max_vms]
    if not roomy:
        vms, most = sum(h.vms for h in able), sum(h.max_vms for h in able)
        return NoRoom("max_vms", f"capacity: {vms} of {most} VMs in use ([runners] max_vms)")
    free = max(h.memory_mib - h.used_mib for h in roomy)
    if need_mib > free:
        reason = f"it needs {need_mib} MiB of memory and {max(free, 0)} MiB are free"
        return NoRoom("memory", f"capacity: {reason} ({_MEMORY})")
    idle = max(h.cpus - h.vcpus for h in roomy if h.used_mib + need_mib <= h.memory_mib)
    reason = f"it needs {vcpus} vCPUs and {max(idle, 0)} are free where there is memory for it"
    return NoRoom("cpu", f"capacity: {reason} ([limits] cpu_overcommit)")


def largest(need_mib: int, hosts: Sequence[Host]) -> str:
    """The host that could soonest take a VM of that size: of those large enough, the one with most free memory."""
    able = [h for h in hosts if not h.draining and h.max_vms and need_mib <= h.memory_mib]
    return max(able, key=lambda h: (h.memory_mib - h.used_mib, h.name)).name


def after(host: Host, need_mib: int, vcpus: int) -> Host:
    """``host`` with one more VM of ``need_mib`` MiB and ``vcpus`` vCPUs promised."""
    return msgspec.structs.replace(
        host, vms=host.vms + 1, used_mib=host.used_mib + need_mib, vcpus=host.vcpus + vcpus
    )


def _fits(need_mib: int, vcpus: int, host: Host) -> bool:
    """An empty host takes a VM of any number of vCPUs: nobody else could want them."""
    cpus = not host.cpus or not host.vms or host.vcpus + vcpus <= host.cpus
    return cpus and host.used_mib + need_mib <= host.memory_mib
