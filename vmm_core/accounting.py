"""What a VM really costs: pages and blocks that are its own, apart from what it shares with its parent.

The kernel is asked about the VMM process, never the VMM itself: that may have been taken over by its guest.
"""

import contextlib
import os
import re
from pathlib import Path

import msgspec

from vmm_core.disk import private_bytes
from vmm_core.errors import VmDied
from vmm_core.machine import VmUsage
from vmm_core.memory import MEMFD_NAME

_FIELDS = ("Anonymous", "Pss", "Rss", "Private_Dirty", "Private_Clean")
# The head of a mapping (its mode and its file), or one of its sums.
_SMAPS = re.compile(
    rf"^[0-9a-f]+-[0-9a-f]+ (\S{{4}}) \S+ \S+ \S+ *(.*)$|^({'|'.join(_FIELDS)}): +(\d+) kB$", re.MULTILINE
)
_GUEST = re.compile(rf"/memfd:{MEMFD_NAME}\b")
_SMAPS_LIMIT = 4 << 20
_TAP = "tap"


def usage(pid: int, disk: Path, *, start_ticks: int | None = None) -> VmUsage:
    """Read the usage of the VMM ``pid``. Blocking: some milliseconds of /proc. VmDied when it is gone.

    Private guest memory of a clone is the mapping's anonymous pages: those the guest wrote since the fork. Its
    ``Private_Dirty`` would also count pages of the parent that only one clone has mapped so far. A machine that
    booted has its memory to itself, though it is mapped as shared. ``start_ticks`` guards against a reused pid.
    """
    try:
        guest, vmm = mappings(pid)
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        cpu_seconds = (int(stat[11]) + int(stat[12])) / ticks
        started = int(stat[19])
    except (OSError, ValueError, IndexError) as error:
        raise VmDied(f"the VMM {pid} ended while its usage was read") from error
    if start_ticks is not None and started != start_ticks:
        raise VmDied(f"the VMM {pid} ended, another process has its number now")
    read, written = _storage(pid)
    sent, received = network_bytes(pid)
    return VmUsage(
        private_dirty_bytes=guest["Private"],
        shared_bytes=guest["Rss"] - guest["Private"],
        pss_bytes=guest["Pss"],
        vmm_private_bytes=vmm["Private_Dirty"],
        cpu_seconds=cpu_seconds,
        disk_private_bytes=private_bytes(disk) if disk.exists() else 0,
        disk_read_bytes=read,
        disk_write_bytes=written,
        net_sent_bytes=sent,
        net_received_bytes=received,
        peak_bytes=guest["Private"] + vmm["Private_Dirty"],
    )


def total(last: VmUsage | None, now: VmUsage | None) -> VmUsage | None:
    """Two readings as one: what is held now (or was when last seen), and the most of what only ever grows.

    After its end the kernel tells of a VMM only CPU time and disk I/O: memory is that of the last reading.
    """
    if last is None or now is None:
        return last or now
    held = now if now.peak_bytes else last
    return msgspec.structs.replace(
        held,
        cpu_seconds=max(last.cpu_seconds, now.cpu_seconds),
        disk_read_bytes=max(last.disk_read_bytes, now.disk_read_bytes),
        disk_write_bytes=max(last.disk_write_bytes, now.disk_write_bytes),
        net_sent_bytes=max(last.net_sent_bytes, now.net_sent_bytes),
        net_received_bytes=max(last.net_received_bytes, now.net_received_bytes),
        peak_bytes=max(last.peak_bytes, now.peak_bytes),
    )


def host_available_mib() -> int:
    """Memory of this host that new VMs can have without pushing anything out (``MemAvailable``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


def mappings(pid: int) -> tuple[dict[str, int], dict[str, int]]:
    """The sums of _FIELDS and of the guest's ``Private`` in bytes, for guest memory and all else of the process.

    A taken-over VMM can make itself so many mappings that nobody should read them all: then only its sums are
    read, and all of it counts as the VMM's.
    """
    with Path(f"/proc/{pid}/smaps").open(errors="replace") as file:
        smaps = file.read(_SMAPS_LIMIT)
    if len(smaps) == _SMAPS_LIMIT:
        smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return mapped(smaps)


def mapped(smaps: str) -> tuple[dict[str, int], dict[str, int]]:
    """The same of the text of an smaps file."""
    guest: dict[str, int] = dict.fromkeys((*_FIELDS, "Private"), 0)
    vmm: dict[str, int] = dict.fromkeys((*_FIELDS, "Private"), 0)
    current, own = vmm, ()
    for mode, path, name, size in _SMAPS.findall(smaps):
        if mode:
            current = guest if _GUEST.match(path) else vmm
            own = ("Private_Dirty", "Private_Clean") if mode.endswith("s") else ("Anonymous",)
        else:
            current[name] += int(size) << 10
            if name in own:
                current["Private"] += int(size) << 10
    return guest, vmm


def _storage(pid: int) -> tuple[int, int]:
    """Bytes the process caused to be read from and written to storage; zeros without the right to know."""
    counts = {"read_bytes": 0, "write_bytes": 0}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            name, _, count = line.partition(":")
            if name in counts:
                counts[name] = int(count)
    return counts["read_bytes"], counts["write_bytes"]


def network_bytes(pid: int) -> tuple[int, int]:
    """Bytes the guest sent and received, by its tap in the network namespace of the process ``pid``.

    A VMM in this process's own namespace has no tap of its own (user-mode network): zeros.
    """
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink():
            return tap_bytes(Path(f"/proc/{pid}/net/dev").read_text())
    return 0, 0


def tap_bytes(table: str) -> tuple[int, int]:
    """Sum of the taps in a ``/proc/net/dev``: what the kernel received from a tap the guest has sent."""
    sent = received = 0
    for line in table.splitlines():
        name, colon, rest = line.partition(":")
        numbers = rest.split()
        if colon and name.strip().startswith(_TAP) and len(numbers) >= 9:
            with contextlib.suppress(ValueError):
                sent += int(numbers[0])
                received += int(numbers[8])
    return sent, received
