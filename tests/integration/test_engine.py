"""The engine on real VMs: forks are distinct, isolated, bounded, and leave nothing behind."""

import asyncio
import fcntl
import mmap
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest

from scripts.programs.measure import at_rest
from tests.integration.conftest import open_files, vmm_processes
from vmm_core import console, start
from vmm_core import engine as engine_module
from vmm_core.engine import Engine
from vmm_core.errors import (
    BadRequest,
    BootFailed,
    GuestRefused,
    HostOutOfMemory,
    PoolFull,
    SnapshotInvalid,
    UnknownTemplate,
    UnknownVm,
    VmDied,
    VmmMissing,
)
from vmm_core.machine import BootImage, EgressRule, MachineSpec, Manifest, Snapshot

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

IDENTITY = """
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo
python3 -c 'import uuid, random, os; print(uuid.uuid4()); print(os.getrandom(16).hex()); print(random.random())'
cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid
hostname
date +%s.%N
"""


async def test_eight_forks_at_once_are_eight_different_machines(engine: Engine, minimal: Snapshot) -> None:
    async def identity(_: int) -> tuple[float, list[str]]:
        async with engine.fork(minimal) as vm:
            result = await vm.exec(IDENTITY, timeout=60)
            assert result.code == 0, result
            return time.time(), result.stdout.decode().split()

    found = await asyncio.gather(*(identity(number) for number in range(8)))
    facts = [lines for _, lines in found]
    assert {len(lines) for lines in facts} == {9}
    for position, what in enumerate(
        [
            "random bytes",
            "UUID",
            "getrandom",
            "Python's random",
            "machine-id",
            "boot id",
            "kernel UUID",
            "hostname",
        ]
    ):
        assert len({lines[position] for lines in facts}) == 8, f"the same {what} in two forks"
    for finished, lines in found:
        assert abs(float(lines[8]) - finished) < 5, "a clock is wrong"


async def test_revive_sets_the_clock_to_within_a_fraction_of_a_second(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal) as vm:
        before = time.time()
        shown = float((await vm.exec("date +%s.%N")).stdout)
        assert before - 0.25 <= shown <= time.time() + 0.25


async def test_a_command_streams_both_outputs_and_tells_its_status(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        result = await vm.exec("echo out; echo err >&2; id -un; exit 7")
        assert (result.code, result.stdout, result.stderr) == (7, b"out\nrunner\n", b"err\n")
        assert (await vm.exec(["cat"], stdin=b"\x00\xff" * 100_000)).stdout == b"\x00\xff" * 100_000
        assert (await vm.exec(["id", "-un"], user="root")).stdout == b"root\n"
        timed_out = await vm.exec("sleep 60", timeout=0.5)
        assert (timed_out.code, timed_out.timed_out) == (124, True)
        killed = await vm.start(["sleep", "60"], exec_id="victim")
        await killed.kill(signal.SIGTERM)
        ended = await killed.wait(timeout=10)
        assert (ended.code, ended.signal) == (143, 15)
        with pytest.raises(GuestRefused, match="no-such-program"):
            await vm.exec(["/no-such-program"])
        with pytest.raises(GuestRefused, match="nobody-here"):
            await vm.exec(["true"], user="nobody-here")


async def test_files_go_in_and_come_out(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        data = os.urandom(3 << 20)
        await vm.put("/home/runner/some/where/blob", data, mode=0o640)
        assert await vm.get("/home/runner/some/where/blob") == data
        listing = await vm.exec("stat -c '%a %U' /home/runner/some/where/blob; ls -A /home/runner/some/where")
        assert listing.stdout.split() == [b"640", b"runner", b"blob"]
        with pytest.raises(GuestRefused):
            await vm.get("/dev/zero")
        with pytest.raises(GuestRefused):
            await vm.get("/home/runner/some/where/blob", max_bytes=1024)


async def test_a_fork_changes_neither_its_parent_nor_its_siblings(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as first, engine.fork(minimal) as second:
        await first.exec(
            "echo changed > /home/runner/mark; dd if=/dev/urandom of=/dev/shm/x bs=1M count=20 2>&1; sync"
        )
        assert (await second.exec("ls /home/runner/mark /dev/shm/x")).code != 0
    async with engine.fork(minimal) as third:
        assert (await third.exec("ls /home/runner/mark /dev/shm/x")).code != 0


async def test_a_vmm_that_was_taken_over_cannot_change_the_parent(engine: Engine, minimal: Snapshot) -> None:
    """With every right of the VMM process: through its own descriptors, and by opening the memory anew."""
    async with engine.fork(minimal) as vm:
        descriptors = Path(f"/proc/{vm.record.pid}/fd")
        memory = [entry for entry in descriptors.iterdir() if "microvm-memory" in os.readlink(entry)]
        assert memory, "the VMM holds the parent's memory by a descriptor"
        for entry in memory:
            fd = os.open(entry, os.O_RDWR)
            try:
                with pytest.raises(PermissionError):
                    os.pwrite(fd, b"taken over", 0)
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, 0)
                with pytest.raises(PermissionError):
                    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
                with pytest.raises(PermissionError):
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0)
            finally:
                os.close(fd)


STEPS = ["resolve", "place", "disk", "memory", "spawn", "connect", "revive", "record", "done"]


@pytest.mark.parametrize("step", STEPS)
async def test_a_fork_that_fails_at_any_step_leaves_nothing(
    data_dir: Path, minimal: Snapshot, step: str
) -> None:
    armed = False
    heard: list[str] = []

    def trip(name: str) -> None:
        heard.append(name)
        if armed and name == step:
            raise RuntimeError(f"injected at {name}")

    async with Engine.open(data_dir, on_step=trip) as engine:
        async with engine.fork(minimal) as vm:  # loads what stays open, and shows that every step is known
            assert vm.id
        assert heard == STEPS
        before = await at_rest(
            lambda: (open_files(), vmm_processes(engine), sorted(engine.pool.vms.iterdir()))
        )
        armed = True
        with pytest.raises(RuntimeError, match=f"injected at {step}"):
            await engine.launch(minimal)
        now = await at_rest(lambda: (open_files(), vmm_processes(engine), sorted(engine.pool.vms.iterdir())))
        assert now == before
        assert not engine.vms()


async def test_a_cancelled_fork_leaves_nothing(engine: Engine, minimal: Snapshot) -> None:
    await engine.prewarm(minimal)
    for delay in (0.005, 0.03, 0.06):
        task = asyncio.create_task(engine.launch(minimal))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not vmm_processes(engine)


async def test_a_console_flood_cannot_fill_the_disk(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        flood = await vm.start(["/bin/sh", "-c", "yes flood > /dev/ttyS0"], exec_id="flood", user="root")
        await asyncio.sleep(4)
        assert (await vm.exec("echo still here", timeout=30)).stdout == b"still here\n"
        await flood.kill()
        captured = sum(path.stat().st_size for path in vm.directory.glob("console.log*"))
        assert 0 < captured <= 2 * console.CAP_BYTES + 65536
        assert "flood" in console.tail(vm.directory)


async def test_a_vm_ends_when_its_time_to_live_has_passed(engine: Engine, minimal: Snapshot) -> None:
    vm = await engine.launch(minimal, ttl=1.0)
    ended = await asyncio.wait_for(vm.wait(), timeout=10)
    assert ended.kind == "expired"
    await vm.destroy()
    assert not vm.directory.exists()


async def test_the_death_of_a_vmm_is_told_with_its_signal(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        os.kill(vm.record.pid, signal.SIGKILL)
        ended = await asyncio.wait_for(vm.wait(), timeout=10)
        assert (ended.kind, ended.signal) == ("signaled", 9)
        with pytest.raises(VmDied, match="signal 9"):
            await vm.exec("true")


async def test_a_command_under_way_hears_of_the_death(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        running = asyncio.create_task(vm.exec("sleep 60"))
        await asyncio.sleep(0.5)
        os.kill(vm.record.pid, signal.SIGKILL)
        with pytest.raises(VmDied):
            await asyncio.wait_for(running, timeout=10)


async def test_a_guest_panic_is_told_with_the_kernels_own_words(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        await vm.start(
            ["/bin/sh", "-c", "sleep 0.3; echo c > /proc/sysrq-trigger"], exec_id="panic", user="root"
        )
        ended = await asyncio.wait_for(vm.wait(), timeout=30)
        assert ended.kind == "exited"
        assert "Kernel panic" in ended.console_tail


async def test_a_guest_that_fills_its_disk_hurts_only_itself(engine: Engine, minimal: Snapshot) -> None:
    def pool_free() -> int:
        stat = os.statvfs(engine.pool.root)
        return stat.f_bfree * stat.f_frsize

    free = pool_free()
    async with engine.fork(minimal) as vm, engine.fork(minimal) as neighbour:
        await vm.exec("dd if=/dev/urandom of=/var/tmp/x bs=1M count=64 conv=fsync", user="root", timeout=120)
        assert (await vm.usage()).disk_private_bytes >= 64 << 20
        filled = await vm.exec(
            "fallocate -l 100G /var/tmp/y; cp /var/tmp/x /var/tmp/z", user="root", timeout=120
        )
        assert b"No space left" in filled.stderr
        assert (await vm.exec("echo still here")).stdout == b"still here\n"
        assert (await neighbour.exec("echo z > /home/runner/z && cat /home/runner/z")).stdout == b"z\n"
    deadline = time.monotonic() + 30  # XFS frees blocks of removed files in the background
    while pool_free() < free - (4 << 20):
        assert time.monotonic() < deadline, "the host did not get its blocks back"
        await asyncio.sleep(0.2)


async def test_usage_counts_what_a_fork_wrote(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as idle, engine.fork(minimal) as busy:
        await busy.exec("dd if=/dev/urandom of=/dev/shm/x bs=1M count=30", timeout=60)
        first, second = await idle.usage(), await busy.usage()
        assert first.private_dirty_bytes < 12 << 20
        assert second.private_dirty_bytes >= first.private_dirty_bytes + (30 << 20)
        assert first.shared_bytes > 0
        assert first.vmm_private_bytes > 0
        assert second.cpu_seconds > 0


# ── another process ──────────────────────────────────────────────────────────────────────────────

OWNER = """
import asyncio, sys
from vmm_core.engine import Engine

async def main():
    async with Engine.open(sys.argv[1]) as engine:
        vm = await engine.launch(sys.argv[2], ttl=float(sys.argv[3]), metadata={"who": "test"})
        script = "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
        process = await vm.start(["/bin/sh", "-c", script], exec_id="job")
        got = 0
        async for piece in process.output():
            got = piece.offset + len(piece.data)
            print(vm.id, got, flush=True)

asyncio.run(main())
"""


async def start_owner(
    data_dir: Path, template: str, ttl: float
) -> tuple[asyncio.subprocess.Process, str, int]:
    """A process that owns a VM with a command under way; its VM's id and how much output it has seen."""
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(data_dir), template, str(ttl),
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert owner.stdout is not None
    seen = 0
    vm_id = ""
    async with asyncio.timeout(60):
        while seen < 60:
            line = (await owner.stdout.readline()).split()
            assert line, "the owner died early"
            vm_id, seen = line[0].decode(), int(line[1])
    return owner, vm_id, seen


async def test_a_vm_outlives_its_process_and_its_stream_goes_on_without_a_gap(
    engine: Engine, data_dir: Path, minimal: Snapshot
) -> None:
    owner, vm_id, seen = await start_owner(data_dir, minimal.digest, 600)
    assert await engine.adopt() == [], "a VM with a living owner is not adopted"
    owner.kill()
    await owner.wait()
    await asyncio.sleep(1.0)
    adopted = await engine.adopt()
    assert [vm.id for vm in adopted] == [vm_id]
    vm = adopted[0]
    try:
        assert vm.record.metadata == {"who": "test"}
        process = await vm.attach("job", stdout_from=seen)
        result = await process.collect(timeout=60)
        whole = b"".join(b"line %d\n" % number for number in range(200))
        assert result.code == 0
        assert result.stdout == whole[seen:]
        assert (await vm.exec("echo more")).stdout == b"more\n"
    finally:
        await vm.destroy()


async def test_a_vm_that_expired_while_nobody_watched_is_removed(
    engine: Engine, data_dir: Path, minimal: Snapshot
) -> None:
    owner, vm_id, _ = await start_owner(data_dir, minimal.digest, 15)
    owner.kill()
    await owner.wait()
    record = next(record for record in engine.records() if record.id == vm_id)
    assert Path(f"/proc/{record.pid}").exists()
    async with asyncio.timeout_at(asyncio.get_running_loop().time() + record.expires_at - time.time() + 3):
        while Path(f"/proc/{record.pid}").exists():  # the jailer ends it on time, though no engine lives
            await asyncio.sleep(0.1)
    assert await engine.adopt() == []
    assert vm_id not in {record.id for record in engine.records()}


async def test_any_engine_can_destroy_any_vm(engine: Engine, data_dir: Path, minimal: Snapshot) -> None:
    owner, vm_id, _ = await start_owner(data_dir, minimal.digest, 600)
    try:
        await engine.destroy(vm_id)
        assert not vmm_processes(engine)
    finally:
        owner.kill()
        await owner.wait()
    await engine.adopt()
    with pytest.raises(UnknownVm, match=vm_id):
        await engine.destroy(vm_id)


# ── the network ──────────────────────────────────────────────────────────────────────────────────

FETCH = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
s.sendall(b"ping"); print(s.recv(100).decode())
"""


@pytest.mark.parametrize("slots", [True, False], ids=["slot", "plain"])
async def test_a_guest_reaches_what_it_was_opened_to_and_nothing_else(
    data_dir: Path, networked: Snapshot, slots: bool
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"pong:" + await reader.read(100))
        await writer.drain()
        writer.close()

    allowed = await asyncio.start_server(answer, "127.0.0.1", 0)
    secret = await asyncio.start_server(answer, "127.0.0.1", 0)
    port, secret_port = (server.sockets[0].getsockname()[1] for server in (allowed, secret))
    rule = EgressRule(host="forge.test", port=8080, via=f"127.0.0.1:{port}")
    async with (
        allowed,
        secret,
        Engine.open(data_dir, slots=slots) as engine,
        engine.fork(networked, allow=[rule]) as vm,
    ):

        async def fetch(host: str, to: int) -> tuple[int, bytes]:
            result = await vm.exec(["python3", "-c", FETCH, host, str(to)], timeout=30)
            return result.code, result.stdout

        assert await fetch("forge.test", 8080) == (0, b"pong:ping\n")
        assert await fetch("forge.test", 8080) == (0, b"pong:ping\n")
        for host, closed in [
            ("forge.test", 8081),
            ("forge.test", secret_port),
            ("10.0.2.2", secret_port),
            ("10.0.2.2", port),
            ("10.0.2.3", 53),
            ("169.254.169.254", 80),
            ("127.0.0.1", secret_port),
        ]:
            code, _ = await fetch(host, closed)
            assert code != 0, f"{host}:{closed} is reachable"


async def test_a_machine_without_a_card_is_not_opened_to_anything(engine: Engine, minimal: Snapshot) -> None:
    with pytest.raises(BadRequest, match="no network card"):
        await engine.launch(minimal, allow=[EgressRule(host="forge.test", port=80)])
    async with engine.fork(minimal) as vm:
        assert (await vm.exec("ls /sys/class/net")).stdout.split() == [b"lo"]


@pytest.mark.parametrize(
    "rule",
    [
        EgressRule(host="127.0.0.1", port=80),
        EgressRule(host="0.0.0.0/0", port=443),
        EgressRule(host="169.254.169.254", port=80),
        EgressRule(host="forge.test", port=0),
        EgressRule(host="a b", port=80),
        EgressRule(host="x;reboot", port=80),
        EgressRule(host="forge.test", port=80, via="nowhere"),
    ],
)
async def test_an_endpoint_that_cannot_be_served_is_refused_by_name(
    engine: Engine, networked: Snapshot, rule: EgressRule
) -> None:
    with pytest.raises(BadRequest, match="egress"):
        await engine.launch(networked, allow=[rule])


# ── bad input and bad hosts ──────────────────────────────────────────────────────────────────────


async def test_an_unknown_template_is_refused_with_the_close_names(engine: Engine, minimal: Snapshot) -> None:
    with pytest.raises(UnknownTemplate, match="minimal"):
        await engine.launch("minimol")


async def test_a_template_by_name_by_digest_and_by_its_first_digits(
    engine: Engine, minimal: Snapshot
) -> None:
    for ref in ("minimal", minimal.digest, minimal.digest[:10]):
        assert engine.snapshots.resolve(ref).digest == minimal.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"argv_digest": "0" * 64}, "other devices"),
        ({"vmm_version": "99.0.0"}, "QEMU 99.0.0"),
        ({"cpu_model": "abacus"}, "abacus"),
    ],
)
async def test_a_snapshot_of_another_host_is_refused_by_name(
    engine: Engine, minimal: Snapshot, change: dict[str, str], words: str
) -> None:
    other = Snapshot(path=minimal.path, manifest=msgspec.structs.replace(minimal.manifest, **change))
    with pytest.raises(SnapshotInvalid, match=words):
        await engine.launch(other)


@pytest.mark.parametrize("file", ["memory.img", "state.bin", "disk.img"])
async def test_a_cut_or_missing_file_is_found_before_anything_starts(
    engine: Engine, minimal: Snapshot, file: str
) -> None:
    with engine.snapshots.draft() as draft:
        for name in minimal.manifest.files:
            (draft / name).write_bytes(b"x")
        manifest: Manifest = msgspec.structs.replace(minimal.manifest, digest="c0ffee" * 10, files={})
        broken = engine.snapshots.publish(
            draft, msgspec.structs.replace(manifest, files=dict.fromkeys(minimal.manifest.files, 1))
        )
    try:
        (broken.path / file).write_bytes(b"")
        with pytest.raises(SnapshotInvalid, match=file):
            await engine.launch(broken.digest)
        (broken.path / file).unlink()
        with pytest.raises(SnapshotInvalid, match=f"{file} .*missing"):
            await engine.launch(broken.digest)
    finally:
        shutil.rmtree(broken.path)


async def test_garbage_for_device_state_fails_that_fork_and_leaves_nothing(
    engine: Engine, minimal: Snapshot
) -> None:
    await engine.prewarm(minimal)  # its files are looked at when its memory is loaded, and never again
    with engine.snapshots.draft() as draft:
        for name in minimal.manifest.files:
            os.link(minimal.path / name, draft / name)
        (draft / "state.bin").unlink()
        (draft / "state.bin").write_bytes(os.urandom(4096))
        bad = Snapshot(path=draft, manifest=minimal.manifest)
        with pytest.raises(VmDied, match="ended before it answered"):
            await engine.launch(bad)


async def test_no_qemu_and_an_old_qemu_are_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vmm_core.drivers.qemu import BINARY, find_qemu

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VmmMissing, match="install"):
        find_qemu()
    old = tmp_path / BINARY
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 5.2.0 (Debian)'\n")
    old.chmod(0o755)
    with pytest.raises(VmmMissing, match="too old"):
        find_qemu()
    old.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(VmmMissing, match="failed"):
        find_qemu()


async def test_a_full_pool_fails_the_one_fork_and_no_other(
    engine: Engine, minimal: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine.fork(minimal) as running:
        monkeypatch.setattr("vmm_core.disk.RESERVE_BYTES", 1 << 60)
        with pytest.raises(PoolFull, match="templates"):
            await engine.launch(minimal)
        assert (await running.exec("echo fine")).stdout == b"fine\n"


async def test_a_host_without_memory_refuses_the_fork_and_no_other(
    engine: Engine, minimal: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine.fork(minimal) as running:
        monkeypatch.setattr(engine_module, "_MEMORY_RESERVE_MIB", 1 << 40)
        with pytest.raises(HostOutOfMemory, match="end VMs"):
            await engine.launch(minimal)
        assert (await running.exec("echo fine")).stdout == b"fine\n"


async def test_a_machine_that_never_says_hello_is_given_up_with_its_console(
    engine: Engine, minimal: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = sorted(engine.data_dir.glob("cache/**/vmlinux"))
    assert kernels, "the bake of the fixture left a kernel in its cache"
    kernel = kernels[-1]
    blank = engine.staging / "blank.img"
    blank.touch()
    os.truncate(blank, 64 << 20)
    monkeypatch.setattr(start, "BOOT_SECONDS", 30.0)
    try:
        image = BootImage(kernel=kernel, initrd=kernel.with_name("initrd.img"), disk=blank)
        with pytest.raises(BootFailed, match="did not come up"):
            async with engine.boot(image, MachineSpec(disk_mib=64)):
                pass
    finally:
        blank.unlink()


async def test_a_damaged_snapshot_gives_way_to_its_replacement(engine: Engine, minimal: Snapshot) -> None:
    digest = "badc0de0" * 5
    for _ in range(2):
        with engine.snapshots.draft() as draft:
            (draft / "disk.img").write_bytes(b"whole")
            manifest: Manifest = msgspec.structs.replace(
                minimal.manifest, digest=digest, files={"disk.img": 5}
            )
            published = engine.snapshots.publish(draft, manifest)
        assert (published.path / "disk.img").read_bytes() == b"whole"
        (published.path / "disk.img").write_bytes(b"cut")
        with pytest.raises(SnapshotInvalid):
            engine.snapshots.load(digest)
    engine.snapshots.remove(digest)
    with pytest.raises(UnknownTemplate):
        engine.snapshots.load(digest)


async def test_an_unreadable_record_is_left_alone_and_a_missing_one_is_cleared(engine: Engine) -> None:
    strange, halfmade = engine.pool.vms / "vm-strange", engine.pool.vms / "vm-halfmade"
    for directory in (strange, halfmade):
        directory.mkdir()
    (strange / "vm.json").write_text('{"from": "another release"}')
    try:
        assert await engine.adopt() == []
        assert strange.exists()
        assert not halfmade.exists()
    finally:
        shutil.rmtree(strange)


async def test_closing_an_engine_waits_for_a_destruction_whose_asker_was_cancelled(
    data_dir: Path, minimal: Snapshot
) -> None:
    async with Engine.open(data_dir) as engine:
        vm = await engine.launch(minimal)
        asking = asyncio.create_task(vm.destroy())
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert not vm.directory.exists()
    assert not vmm_processes(engine)


async def test_a_plain_vm_takes_its_relays_along(data_dir: Path, networked: Snapshot) -> None:
    held: list[asyncio.StreamWriter] = []

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await reader.read(-1)

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        Engine.open(data_dir, slots=False) as engine,
        engine.fork(networked, allow=[EgressRule("forge.test", 80, via=f"127.0.0.1:{port}")]) as vm,
    ):
        script = "import socket, time; s = socket.create_connection(('forge.test', 80)); time.sleep(60)"
        await vm.start(["python3", "-c", script], exec_id="talk")
        async with asyncio.timeout(30):
            while not held:
                await asyncio.sleep(0.05)
        assert len(vmm_processes(engine)) == 2, "the VMM and one relay"
        await vm.destroy()
        assert not vmm_processes(engine)
        for writer in held:
            writer.close()
