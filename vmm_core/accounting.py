"""What a VM really costs: pages and blocks that are its own, apart from what it shares with its parent."""

import os
from pathlib import Path

from vmm_core.disk import private_bytes
from vmm_core.errors import VmDied
from vmm_core.machine import VmUsage
from vmm_core.memory import MEMFD_NAME

_FIELDS = ("Anonymous", "Pss", "Rss", "Private_Dirty")


def usage(pid: int, disk: Path) -> VmUsage:
    """Read the usage of the VMM ``pid``. Blocking: some milliseconds of /proc. VmDied when it is gone.

    Private guest memory is the mapping's anonymous pages: those the guest wrote since the fork. Its
    ``Private_Dirty`` would also count pages of the parent that only one clone has mapped so far.
    """
    try:
        guest, vmm = _mappings(pid)
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, IndexError) as error:
        raise VmDied(f"the VMM {pid} ended while its usage was read") from error
    ticks = os.sysconf("SC_CLK_TCK")
    return VmUsage(
        private_dirty_bytes=guest["Anonymous"],
        shared_bytes=guest["Rss"] - guest["Anonymous"],
        pss_bytes=guest["Pss"],
        vmm_private_bytes=vmm["Private_Dirty"],
        cpu_seconds=(int(stat[11]) + int(stat[12])) / ticks,
        disk_private_bytes=private_bytes(disk) if disk.exists() else 0,
    )


def _mappings(pid: int) -> tuple[dict[str, int], dict[str, int]]:
    """The sums of _FIELDS in bytes, for guest memory and for everything else of the process."""
    guest: dict[str, int] = dict.fromkeys(_FIELDS, 0)
    vmm: dict[str, int] = dict.fromkeys(_FIELDS, 0)
    current = vmm
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name in current and rest.endswith(" kB\n"):
                current[name] += int(rest[:-3]) * 1024
            elif "-" in line.split(" ", 1)[0]:
                current = guest if f"memfd:{MEMFD_NAME}" in line else vmm
    return guest, vmm
