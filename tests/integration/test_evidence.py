"""How real VMs end, and what is told of it: killed, crashed, panicked, off, out of disk, out of memory, unseen."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import pytest

from vmm_core.engine import Engine
from vmm_core.errors import ChannelClosed, GuestError, VmDied
from vmm_core.machine import Snapshot, VmExit
from vmm_core.vm import RunningVm

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

HOG = "python3 -c 'import time\nheld = []\nwhile True: held.append(b\"x\" * (8 << 20))'"


async def ended(vm: RunningVm, seconds: float = 60.0) -> VmExit:
    async with asyncio.timeout(seconds):
        return await vm.wait()


async def dying(command: Awaitable[object]) -> None:
    """Run what the VM does not survive."""
    with contextlib.suppress(VmDied, ChannelClosed, GuestError):
        await command


async def test_a_killed_vmm_is_told_with_its_signal_events_and_cost(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal) as vm:
        await vm.exec("echo '<1>a word to the console' > /dev/kmsg; sleep 0.2", user="root")
        read = await vm.usage()
        os.kill(vm.record.pid, signal.SIGKILL)
        told = await ended(vm)
    assert (told.kind, told.cause, told.signal) == ("signaled", "vmm_killed", signal.SIGKILL)
    assert "signal 9" in told.reason
    assert "a word to the console" in told.console_tail
    assert "RESUME" in [event.name for event in told.events]
    assert told.usage is not None
    # Memory is that of the last reading, CPU time the kernel's own sum.
    assert told.usage.private_dirty_bytes == read.private_dirty_bytes > 0
    assert told.usage.cpu_seconds > 0


def break_vmm(pid: int) -> None:
    """Let the VMM run into an illegal instruction, as a taken-over or faulty one would.

    Sending the signal does nothing: the first process of a PID namespace takes none that it does not handle.
    """
    for _ in range(200):
        where = Path(f"/proc/{pid}/syscall").read_text().split()
        if len(where) == 9:
            with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
                memory.seek(int(where[8], 16))
                memory.write(b"\x0f\x0b")
            return
        time.sleep(0.01)
    raise AssertionError("the VMM never waits")


async def test_a_crashed_vmm_is_told_apart_from_a_killed_one(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        break_vmm(vm.record.pid)
        await dying(vm.exec("true"))
        told = await ended(vm)
    assert (told.cause, told.signal) == ("vmm_crashed", signal.SIGILL)
    assert "illegal instruction" in told.reason


async def test_a_panic_is_told_with_the_kernels_own_words(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        await dying(vm.exec("echo c > /proc/sysrq-trigger; sleep 30", user="root"))
        told = await ended(vm)
    assert (told.kind, told.cause) == ("exited", "guest_panic")
    assert told.reason == "the guest's kernel panicked: sysrq triggered crash"
    assert "Kernel panic - not syncing: sysrq triggered crash" in told.panic
    assert "Call Trace" in told.panic
    assert told.events[-1].name == "SHUTDOWN"


async def test_power_off_and_reboot_are_told_apart(engine: Engine, minimal: Snapshot) -> None:
    causes: list[str] = []
    for key in ("o", "b"):
        async with engine.fork(minimal) as vm:
            await dying(vm.exec(f"echo {key} > /proc/sysrq-trigger; sleep 30", user="root"))
            causes.append((await ended(vm)).cause)
    assert causes == ["guest_poweroff", "guest_reboot"]


async def test_a_console_flood_does_not_hide_the_panic(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        line = "flood-flood-flood-flood-flood-flood-flood"
        flood = f"i=0; while [ $i -lt 3000 ]; do echo $i-{line} > /dev/ttyS0; i=$((i+1)); done"
        await vm.exec(flood, user="root", timeout=120)
        await dying(vm.exec("echo c > /proc/sysrq-trigger; sleep 30", user="root"))
        told = await ended(vm)
    assert told.cause == "guest_panic"
    assert "sysrq triggered crash" in told.panic
    assert len(told.console_tail) <= 4096


async def test_a_guest_that_runs_out_of_memory_is_told_of_after_its_destruction(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal) as vm:
        result = await vm.exec(HOG, timeout=120)
        assert result.code != 0
        await vm.destroy()
        told = await ended(vm)
    assert (told.kind, told.cause) == ("destroyed", "destroyed")
    assert "Killed process" in told.guest_oom
    assert "python3" in told.guest_oom
    assert told.usage is not None
    assert told.usage.private_dirty_bytes > 200 << 20


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A memory cgroup of version 1 or 2 that takes 96 MiB."""
    for parent, limit, swap in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max", "memory.swap.max"),
    ):
        group = Path(parent) / f"microvm-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(96 << 20))
            except OSError:
                group.rmdir()
                continue
            with contextlib.suppress(OSError):
                (group / swap).write_text(str(96 << 20) if "limit" in limit else "0")
            yield group
            for _ in range(50):
                try:
                    group.rmdir()
                except OSError:
                    time.sleep(0.1)
                else:
                    return
            return
    pytest.skip("no memory cgroup can be made here")


async def test_a_vmm_that_the_kernel_kills_for_memory_is_told_as_such(
    engine: Engine, minimal: Snapshot, small_group: Path
) -> None:
    async with engine.fork(minimal) as vm:
        (small_group / "cgroup.procs").write_text(str(vm.record.pid))
        await dying(vm.exec(HOG, timeout=120))
        told = await ended(vm, 120)
    assert (told.cause, told.signal) == ("out_of_memory", signal.SIGKILL)
    assert "memory" in told.reason


async def test_what_a_vm_cost_is_known_at_its_end_and_teaches_its_template(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal, metadata={"repository": "acme/app"}) as vm:
        work = "dd if=/dev/urandom of=/root/x bs=1M count=24 conv=fsync && python3 -c 'x=bytes(40<<20).hex()'"
        assert (await vm.exec(work, user="root", timeout=120)).code == 0
        began = time.monotonic()
        await vm.destroy()
        took = time.monotonic() - began
        told = await ended(vm)
    assert took < 2.0
    usage = told.usage
    assert usage is not None
    assert usage.cpu_seconds > 0.3
    assert usage.disk_write_bytes >= 24 << 20
    assert usage.disk_private_bytes >= 24 << 20
    assert usage.private_dirty_bytes > 40 << 20
    assert usage.peak_bytes >= usage.private_dirty_bytes + usage.vmm_private_bytes > usage.private_dirty_bytes
    assert usage.shared_bytes > 0
    assert vm.record.metadata == {"repository": "acme/app"}
    name = vm.record.template or ""
    async with asyncio.timeout(5):
        while name not in (engine.data_dir / "working_sets.json").read_text():
            await asyncio.sleep(0.05)


async def test_an_adopted_vm_tells_its_end_by_its_monitor(engine: Engine, minimal: Snapshot) -> None:
    async with Engine.open(engine.data_dir) as earlier:
        launched = await earlier.launch(minimal)
    (vm,) = [vm for vm in await engine.adopt() if vm.id == launched.id]
    try:
        await dying(vm.exec("echo o > /proc/sysrq-trigger; sleep 30", user="root"))
        told = await ended(vm)
    finally:
        await vm.destroy()
    assert told.cause == "guest_poweroff"
    assert "guest-shutdown" in told.events[-1].detail


async def test_a_vm_that_ended_unseen_leaves_its_evidence(engine: Engine, minimal: Snapshot) -> None:
    async with Engine.open(engine.data_dir) as earlier:
        launched = await earlier.launch(minimal)
        await launched.exec("echo '<1>its last words' > /dev/kmsg; sleep 0.2", user="root")
    os.kill(launched.record.pid, signal.SIGKILL)
    await asyncio.to_thread(
        os.waitpid, launched.record.pid, 0
    )  # as init would, were its service not this process
    assert launched.id not in [vm.id for vm in await engine.adopt()]
    told = engine.ending(launched.id)
    assert told is not None
    assert (told.kind, told.cause) == ("vanished", "unknown")
    assert "no service" in told.reason
    assert "its last words" in told.console_tail


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def tiny(tmp_path: Path, minimal: Snapshot) -> AsyncIterator[Engine]:
    """An engine whose pool is an XFS of 1.5 GiB with one template."""
    data = tmp_path / "data"
    pool = data / "pool"
    pool.mkdir(parents=True)
    image = tmp_path / "tiny.xfs"
    with image.open("wb") as file:
        file.truncate(1536 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", image, pool], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no XFS on a loop file here: {error}")
    try:
        (pool / "snapshots").mkdir(mode=0o711)
        target = pool / "snapshots" / minimal.path.name
        subprocess.run(["cp", "-a", "--sparse=always", minimal.path, target], check=True, timeout=120)
        async with Engine.open(data) as opened:
            yield opened
    finally:
        subprocess.run(["umount", pool], check=True, timeout=60)
        shutil.rmtree(tmp_path, ignore_errors=True)


async def test_a_full_pool_ends_the_vm_that_writes_and_no_other(tiny: Engine, minimal: Snapshot) -> None:
    async with tiny.fork(minimal.digest) as writer, tiny.fork(minimal.digest) as neighbour:
        free = tiny.pool.free_bytes()
        with (tiny.pool.root / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, free - (32 << 20))
        began = time.monotonic()
        await dying(
            writer.exec("dd if=/dev/zero of=/root/x bs=1M count=300 conv=fsync", user="root", timeout=120)
        )
        told = await ended(writer, 120)
        assert time.monotonic() - began < 100
        assert told.cause == "disk_full"
        assert "pool was full" in told.reason
        # One event for each request that was under way.
        full = [event.detail for event in told.events if event.name == "BLOCK_IO_ERROR"]
        assert full
        assert all("nospace=true" in detail for detail in full)
        assert (await neighbour.exec("cat /proc/loadavg")).code == 0
        (tiny.pool.root / "ballast").unlink()
        assert (await neighbour.exec("echo lives > /root/y && sync", user="root", timeout=60)).code == 0


async def test_a_full_pool_met_while_nobody_listened_ends_the_vm_at_adoption(
    tiny: Engine, minimal: Snapshot
) -> None:
    async with Engine.open(tiny.data_dir) as earlier:
        launched = await earlier.launch(minimal.digest)
        free = tiny.pool.free_bytes()
        with (tiny.pool.root / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, free - (16 << 20))
        await launched.start(
            ["/bin/sh", "-c", "sleep 1; dd if=/dev/zero of=/root/x bs=1M count=200 conv=fsync"],
            exec_id="fill",
            user="root",
        )
    await asyncio.sleep(6)
    adopted = [vm for vm in await tiny.adopt() if vm.id == launched.id]
    # It may end so soon after the adoption that it is found dead; either way it is told.
    told = await ended(adopted[0]) if adopted else tiny.ending(launched.id)
    assert told is not None
    assert told.cause == "disk_full"
    for vm in adopted:
        await vm.destroy()
    assert launched.id not in [record.id for record in tiny.records()]


# ── the network ──────────────────────────────────────────────────────────────────────────────────


async def test_what_a_guest_sends_is_counted_though_nothing_lets_it_pass(
    engine: Engine, networked: Snapshot
) -> None:
    send = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for _ in range(300): s.sendto(b'x' * 1000, ('10.0.2.2', 9))"
    )
    async with engine.fork(networked) as vm:
        if vm.record.slot is None:
            pytest.skip("user-mode networking counts nothing")
        before = await vm.usage()
        assert (await vm.exec(["python3", "-c", send], timeout=60)).code == 0
        await vm.destroy()
        told = await ended(vm)
    assert told.usage is not None
    assert before.net_sent_bytes < 100_000
    assert 300_000 <= told.usage.net_sent_bytes < 600_000
