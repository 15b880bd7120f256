"""Usage from what the kernel shows of a VMM: every sum, every hostile or odd shape of it."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core import accounting
from vmm_core.errors import VmDied
from vmm_core.machine import VmUsage
from vmm_core.memory import fresh_memory

SMAPS = """\
7f0000000000-7f0020000000 {mode} 00000000 00:01 77                         /memfd:microvm-memory (deleted)
Size:             524288 kB
Rss:               30000 kB
Pss:               12000 kB
Shared_Clean:      20000 kB
Shared_Dirty:          0 kB
Private_Clean:      1000 kB
Private_Dirty:      9000 kB
Anonymous:          8000 kB
VmFlags: rd wr mr mw me ac
7f1000000000-7f1000100000 rw-p 00000000 00:00 0                            [heap]
Rss:                 500 kB
Pss:                 500 kB
Private_Dirty:       400 kB
Anonymous:           400 kB
7f1000200000-7f1000300000 rw-p 00000000 00:00 0
Private_Dirty:       100 kB
7f1000400000-7f1000500000 r--p 00000000 08:01 3      /tmp/memfd:microvm-memory-not (deleted)
Private_Dirty:        10 kB
"""


def test_a_clones_own_pages_are_the_anonymous_ones() -> None:
    guest, vmm = accounting.mapped(SMAPS.format(mode="rw-p"))
    assert guest["Private"] == 8000 << 10
    assert (guest["Rss"], guest["Pss"]) == (30000 << 10, 12000 << 10)
    assert vmm["Private_Dirty"] == 510 << 10


def test_a_machine_that_booted_has_its_shared_mapping_to_itself() -> None:
    guest, _ = accounting.mapped(SMAPS.format(mode="rw-s"))
    assert guest["Private"] == 10000 << 10


@given(st.text())
def test_no_text_breaks_the_reading_of_mappings(text: str) -> None:
    guest, vmm = accounting.mapped(text)
    assert all(size >= 0 for size in (*guest.values(), *vmm.values()))


def test_taps_are_summed_from_the_guests_side() -> None:
    table = """Inter-|   Receive                                     |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0    0    0      100       1    0    0    0     0       0    0
  tap0: 5000      10    0    0    0     0    0    0      700       7    0    0    0     0       0    0
   veth: 9999      10    0    0    0     0    0    0      9999       7    0    0    0     0       0    0
"""
    assert accounting.tap_bytes(table) == (5000, 700)


@given(st.text())
def test_no_text_breaks_the_reading_of_taps(text: str) -> None:
    assert accounting.tap_bytes(text) >= (0, 0)
    assert accounting.tap_bytes(f"tap0: {text}") >= (0, 0) or "-" in text


def test_this_process_has_no_tap_of_its_own() -> None:
    assert accounting.network_bytes(os.getpid()) == (0, 0)
    assert accounting.network_bytes(2**22 + 1) == (0, 0)


def test_a_real_process_is_read_and_a_reused_number_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"x" * 65536)
    memory = fresh_memory(64 << 20)
    program = (
        "import mmap,sys,time; m=mmap.mmap(int(sys.argv[1]), 64<<20, flags=mmap.MAP_PRIVATE);"
        "m[:8<<20]=b'y'*(8<<20); print('ready', flush=True); time.sleep(30)"
    )
    with subprocess.Popen(
        ["python3", "-c", program, str(memory)], pass_fds=[memory], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            usage = accounting.usage(process.pid, disk)
            assert usage.private_dirty_bytes == 8 << 20
            assert usage.shared_bytes == 0
            assert 1 << 20 < usage.vmm_private_bytes < 64 << 20
            assert usage.peak_bytes == usage.private_dirty_bytes + usage.vmm_private_bytes
            assert usage.disk_private_bytes >= 65536
            with pytest.raises(VmDied, match="another process"):
                accounting.usage(process.pid, disk, start_ticks=1)
        finally:
            process.kill()
            os.close(memory)
    with pytest.raises(VmDied):
        accounting.usage(process.pid, disk)


def test_a_vmm_with_a_hundred_thousand_mappings_is_read_by_its_sums_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accounting, "_SMAPS_LIMIT", 500)
    guest, vmm = accounting.mappings(os.getpid())
    assert guest["Rss"] == 0
    assert vmm["Private_Dirty"] > 1 << 20


def test_two_readings_make_one_total() -> None:
    early = VmUsage(private_dirty_bytes=5, cpu_seconds=1.0, net_sent_bytes=10, peak_bytes=100)
    late = VmUsage(private_dirty_bytes=3, cpu_seconds=2.0, net_sent_bytes=12, peak_bytes=40)
    both = accounting.total(early, late)
    assert both == VmUsage(private_dirty_bytes=3, cpu_seconds=2.0, net_sent_bytes=12, peak_bytes=100)
    # What the kernel tells after the end knows no memory: that of the last reading stays.
    end = VmUsage(cpu_seconds=3.0, disk_write_bytes=7)
    final = accounting.total(both, end)
    assert final is not None
    assert (final.private_dirty_bytes, final.peak_bytes, final.cpu_seconds) == (3, 100, 3.0)
    assert (final.disk_write_bytes, final.net_sent_bytes) == (7, 12)
    assert accounting.total(None, end) == end
    assert accounting.total(end, None) == end
    assert accounting.total(None, None) is None


def test_the_host_has_memory_available() -> None:
    assert 0 < accounting.host_available_mib() < 1 << 24


def test_reading_mappings_is_quick_enough_for_a_destruction() -> None:
    text = SMAPS.format(mode="rw-p") * 60
    began = time.process_time()
    accounting.mapped(text)
    assert time.process_time() - began < 0.05
