"""Which host takes one more VM, or why none does. Pure."""

from collections.abc import Sequence

import msgspec

from runner_service.domain import Host


class NoRoom(msgspec.Struct, frozen=True):
    """No host takes it; ``reason`` is one sentence with the numbers."""

    code: str
    reason: str


def place(need_mib: int, hosts: Sequence[Host]) -> Host | NoRoom:
    """The host with most free memory that has room for one VM of ``need_mib`` MiB."""
    open_hosts = [h for h in hosts if not h.draining]
    if not open_hosts:
        return NoRoom("draining", "capacity: every host is draining" if hosts else "capacity: no host")
    fitting = [h for h in open_hosts if h.vms < h.max_vms and h.used_mib + need_mib <= h.memory_mib]
    if fitting:
        return max(fitting, key=lambda h: (h.memory_mib - h.used_mib, h.name))
    if all(need_mib > h.memory_mib for h in open_hosts):
        largest = max(h.memory_mib for h in open_hosts)
        return NoRoom(
            "too_large", f"capacity: it needs {need_mib} MiB and the largest host offers {largest} MiB"
        )
    if all(h.vms >= h.max_vms for h in open_hosts):
        vms, most = sum(h.vms for h in open_hosts), sum(h.max_vms for h in open_hosts)
        return NoRoom("max_vms", f"capacity: {vms} of {most} VMs in use")
    free = max(h.memory_mib - h.used_mib for h in open_hosts)
    return NoRoom("memory", f"capacity: it needs {need_mib} MiB of memory and {max(free, 0)} MiB are free")


def after(host: Host, need_mib: int) -> Host:
    """``host`` with one more VM of ``need_mib`` MiB promised."""
    return msgspec.structs.replace(host, vms=host.vms + 1, used_mib=host.used_mib + need_mib)
