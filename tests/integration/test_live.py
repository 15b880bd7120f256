"""Forks of machines that run, freeze and thaw, on real VMs."""

import asyncio
import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from vmm_core import live as live_module
from vmm_core.disk import private_bytes
from vmm_core.drivers.qemu import QemuVm
from vmm_core.engine import Engine
from vmm_core.errors import (
    BadRequest,
    PoolFull,
    SnapshotInUse,
    SnapshotInvalid,
    UnknownVm,
    VmDied,
    VmmProtocolError,
)
from vmm_core.machine import Snapshot
from vmm_core.record import read_record
from vmm_core.vm import RunningVm

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left", "no_snapshots_left")]

MIB = 1 << 20
COUNT = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); sleep 0.05; done"
IDENTITY = (
    "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1"
)
MARKS = "echo memory > /dev/shm/mark; echo disk > /home/runner/mark"


@pytest.fixture
async def no_snapshots_left(engine: Engine) -> AsyncIterator[None]:
    """After the test, and a moment for what goes on in the background, the store is as it was."""
    before = captures(engine)
    yield
    deadline = time.monotonic() + 20
    while extra := captures(engine) - before:
        assert time.monotonic() < deadline, f"left in the store: {extra}"
        engine.snapshots.tidy()
        await asyncio.sleep(0.1)


def captures(engine: Engine) -> set[str]:
    """What is in the store and no template: captures, written or not, and frozen machines."""
    templates = {each.digest for each in engine.snapshots.list() if each.manifest.state == "migration"}
    return {path.name for path in engine.pool.snapshots.iterdir()} - templates


async def facts(vm: RunningVm) -> list[str]:
    result = await vm.exec(IDENTITY, user="root", timeout=30)
    assert result.code == 0, result
    return [line.strip() for line in result.stdout.decode().splitlines()]


async def seen(vm: RunningVm, least: int) -> bytes:
    """The output of the command ``count`` in this machine, once there are so many lines of it."""
    process = await vm.attach("count")
    try:
        got = b""
        async with asyncio.timeout(60):
            async for piece in process.output():
                got += piece.data
                if got.count(b"\n") >= least:
                    break
        return got
    finally:
        process.release()


def whole_lines(output: bytes) -> int:
    """How many lines there are, each in its place, none twice and none missing."""
    lines = output.decode().splitlines()
    assert lines[:-1] == [f"line {number}" for number in range(len(lines) - 1)]
    return len(lines)


async def written(engine: Engine, digest: str) -> Snapshot:
    """A capture, once it is on disk."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(BadRequest):
                return engine.snapshots.load(digest)
            await asyncio.sleep(0.05)


# ── forks of a machine that runs ─────────────────────────────────────────────────────────────────


async def test_children_hold_processes_files_and_tmpfs_and_are_machines_of_their_own(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal, metadata={"repository": "x"}) as vm:
        await vm.exec(MARKS)
        counting = await vm.start(["/bin/sh", "-c", COUNT], exec_id="count")
        await asyncio.sleep(0.5)
        children = await vm.fork_many(3)
        try:
            assert len({child.timings.pause_ms for child in children}) == 1, "one pause for all"
            assert {child.record.parent for child in children} != {vm.record.parent}
            assert all(child.record.metadata == {"repository": "x"} for child in children)
            identities = [await facts(each) for each in (vm, *children)]
            for what, values in zip(
                ("hostname", "machine id", "boot id", "random bytes"),
                zip(*identities, strict=True),
                strict=True,
            ):
                assert len(set(values)) == 4, f"the same {what} twice"
            for child in children:
                assert (await child.exec("cat /dev/shm/mark /home/runner/mark")).stdout == b"memory\ndisk\n"
                assert abs(float((await child.exec("date +%s.%N")).stdout) - time.time()) < 5
                at_once = whole_lines(await seen(child, 5))
                assert whole_lines(await seen(child, at_once + 5)) >= at_once + 5, "it counts on"
            await children[0].exec("echo other > /dev/shm/mark; echo other > /home/runner/mark")
            for other in (vm, children[1]):
                assert (await other.exec("cat /dev/shm/mark /home/runner/mark")).stdout == b"memory\ndisk\n"
            await counting.kill()
            lines = whole_lines(await seen(children[1], 5))
            assert whole_lines(await seen(children[1], lines + 5)) >= lines + 5, "killed in the parent alone"
        finally:
            await asyncio.gather(*(child.destroy() for child in children))


async def test_a_chain_of_forks_holds_what_each_of_them_wrote(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as first:
        await first.exec("echo 1 > /dev/shm/1; dd if=/dev/urandom of=/dev/shm/data bs=1M count=8 2>&1")
        async with first.fork() as second:
            await second.exec("echo 2 > /dev/shm/2; echo 2 > /home/runner/2")
            async with second.fork() as third:
                await third.exec("echo 3 > /dev/shm/3")
                async with third.fork() as fourth:
                    assert (await fourth.exec("cat /dev/shm/[123] /home/runner/2")).stdout == b"1\n2\n3\n2\n"
                    sums = [await vm.exec("sha256sum /dev/shm/data") for vm in (first, second, third, fourth)]
                    assert len({result.stdout for result in sums}) == 1
                    parents = [vm.record.parent or "" for vm in (second, third, fourth)]
                    chain = [await written(engine, digest) for digest in parents]
                    assert [each.manifest.base for each in chain] == [minimal.digest, *parents[:2]]
                    # Each costs what its machine wrote since it was forked, not what those before it wrote.
                    sizes = [private_bytes(each.path / "memory.img") for each in chain]
                    assert sum(sizes[1:]) < 8 * 2 * MIB + 8 * MIB
                    with pytest.raises(SnapshotInUse, match=third.id):
                        engine.snapshots.remove(parents[1])
                with pytest.raises(SnapshotInUse, match=third.id):
                    engine.snapshots.remove(parents[1])
            with pytest.raises(SnapshotInUse, match=second.id):
                engine.snapshots.remove(parents[0])
        with pytest.raises(SnapshotInUse, match=first.id):
            engine.snapshots.remove(minimal.digest)


async def test_a_capture_costs_its_private_pages_and_blocks_on_disk(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal) as vm:
        await vm.exec(
            "dd if=/dev/urandom of=/dev/shm/x bs=1M count=30; dd if=/dev/urandom of=x bs=1M count=20; sync"
        )
        private = (await vm.usage()).private_dirty_bytes
        frozen = await vm.freeze()
    snapshot = engine.snapshots.load(frozen.digest)
    memory = private_bytes(snapshot.path / "memory.img")
    assert 30 * MIB <= memory <= private + 8 * MIB
    async with asyncio.timeout(20):
        # Its blocks are its own once XFS has let go of the VM's removed disk, which it does in the background.
        while (disk := private_bytes(snapshot.path / "disk.img")) < 20 * MIB:
            await asyncio.sleep(0.1)
    assert disk <= 30 * MIB
    await engine.discard(frozen.id)
    assert not snapshot.path.exists()


async def test_a_machine_that_booted_is_forked_too(engine: Engine, minimal: Snapshot) -> None:
    from images.bake import root_disk
    from images.recipe import load_recipe

    recipe = load_recipe("minimal")
    image = await root_disk(engine, recipe, progress=lambda _event: None)
    async with engine.boot(image, recipe.machine) as vm:
        await vm.exec("echo memory > /dev/shm/mark")
        async with vm.fork() as child:
            assert (await child.exec("cat /dev/shm/mark; hostname")).stdout.split() == [
                b"memory",
                child.id.encode(),
            ]
            await child.exec("echo child > /dev/shm/mark")
            assert (await vm.exec("cat /dev/shm/mark")).stdout == b"memory\n"
            async with child.fork() as grandchild:
                assert (await grandchild.exec("cat /dev/shm/mark")).stdout == b"child\n"
        frozen = await vm.freeze()
    thawed = await engine.thaw(frozen.id)
    assert (await thawed.exec("cat /dev/shm/mark")).stdout == b"memory\n"
    await thawed.destroy()


async def test_a_cancelled_fork_leaves_the_machine_running_and_nothing_else(
    engine: Engine, minimal: Snapshot
) -> None:
    cancelled = 0
    async with engine.fork(minimal) as vm:
        for delay in (0.0, 0.02, 0.05, 0.08, 0.15, 0.3):
            forking = asyncio.create_task(vm.fork_many(2))
            await asyncio.sleep(delay)
            forking.cancel()
            try:
                for child in await forking:  # it was quicker
                    await child.destroy()
            except asyncio.CancelledError:
                cancelled += 1
            assert (await vm.exec("echo fine", timeout=30)).stdout == b"fine\n"
        assert [each.id for each in engine.vms()] == [vm.id]
    assert cancelled >= 2


@pytest.mark.parametrize("step", ["pause", "save_devices", "resume"])
async def test_a_machine_runs_on_whatever_fails_while_it_stands_still(
    engine: Engine, minimal: Snapshot, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    original: Callable[..., Awaitable[None]] = getattr(QemuVm, step)
    failures = 1

    async def fails(vm: QemuVm, *arguments: Path) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise VmmProtocolError("injected")
        await original(vm, *arguments)

    async with engine.fork(minimal) as vm:
        monkeypatch.setattr(QemuVm, step, fails)
        if step == "resume":  # is tried again
            await (await vm.fork_many(1))[0].destroy()
        else:
            with pytest.raises(VmmProtocolError, match="injected"):
                await vm.fork_many(1)
        assert (await vm.exec("echo fine", timeout=30)).stdout == b"fine\n"
        failures = 1
        if step != "resume":
            with pytest.raises(VmmProtocolError, match="injected"):
                await vm.freeze()
            assert (await vm.exec("echo fine", timeout=30)).stdout == b"fine\n"
        monkeypatch.undo()
        async with vm.fork() as child:
            assert (await child.exec("echo fine")).stdout == b"fine\n"


async def test_a_machine_that_cannot_be_resumed_is_ended_and_not_left_standing(
    engine: Engine, minimal: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: QemuVm) -> None:
        raise VmmProtocolError("injected")

    async with engine.fork(minimal) as vm:
        monkeypatch.setattr(QemuVm, "resume", fails)
        with pytest.raises(VmDied, match="could not be resumed: injected"):
            await vm.fork_many(1)
        assert "injected" in (await asyncio.wait_for(vm.wait(), timeout=10)).reason


async def test_a_fork_of_a_machine_whose_vmm_has_ended_is_told_as_that(
    engine: Engine, minimal: Snapshot
) -> None:
    async with engine.fork(minimal) as vm:
        os.kill(vm.record.pid, signal.SIGKILL)
        await vm.wait()
        with pytest.raises(VmDied):
            await vm.fork_many(1)
        with pytest.raises(VmDied):
            await vm.freeze()


@pytest.mark.parametrize("count", [0, -1, 257])
async def test_a_number_of_children_that_cannot_be_is_refused(
    engine: Engine, minimal: Snapshot, count: int
) -> None:
    async with engine.fork(minimal) as vm:
        with pytest.raises(BadRequest, match=f"{count} children"):
            await vm.fork_many(count)


async def test_several_forks_of_one_machine_at_once_take_turns(engine: Engine, minimal: Snapshot) -> None:
    async with engine.fork(minimal) as vm:
        families = await asyncio.gather(*(vm.fork_many(1) for _ in range(3)))
        children = [child for family in families for child in family]
        assert len({child.record.parent for child in children}) == 3
        for each in (vm, *children):
            assert (await each.exec("echo fine")).stdout == b"fine\n"
        await asyncio.gather(*(child.destroy() for child in children))


async def test_a_full_pool_fails_that_fork_and_that_freeze_and_the_machine_runs_on(
    engine: Engine, minimal: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise PoolFull("no room: remove templates") from OSError(errno.ENOSPC, "No space left on device")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with engine.fork(minimal) as vm:
        with monkeypatch.context() as patch:
            patch.setattr("vmm_core.disk.RESERVE_BYTES", 1 << 60)
            for asking in (vm.fork_many(1), vm.freeze()):
                with pytest.raises(PoolFull, match="templates"):
                    await asking
        with monkeypatch.context() as patch:
            patch.setattr("vmm_core.capture.write_ranges", full_disk)
            patch.setattr("vmm_core.guest_memory.write_changes", full_disk)
            with pytest.raises(PoolFull, match="templates"):
                await vm.freeze()
            # Children need no image: theirs is not written, and they run without.
            async with vm.fork() as child:
                assert (await child.exec("echo fine")).stdout == b"fine\n"
        with monkeypatch.context() as patch:
            patch.setattr("vmm_core.capture.clone_file", full)
            for asking in (vm.fork_many(1), vm.freeze()):
                with pytest.raises(PoolFull, match="templates"):
                    await asking
        assert engine.frozen() == []
        assert (await vm.exec("echo fine")).stdout == b"fine\n"


async def test_a_child_whose_parents_image_was_never_written_is_frozen_whole(
    engine: Engine, minimal: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine.fork(minimal) as vm:
        await vm.exec("echo parent > /dev/shm/mark")
        with monkeypatch.context() as patch:
            patch.setattr(live_module, "write_image", lambda *_: (_ for _ in ()).throw(PoolFull("injected")))
            (child,) = await vm.fork_many(1)
            placed = engine.pool.snapshots / (child.record.parent or "")
            async with asyncio.timeout(20):
                while placed.exists():
                    await asyncio.sleep(0.05)
        frozen = await child.freeze()
    assert engine.snapshots.load(frozen.digest).manifest.base is None
    thawed = await engine.thaw(frozen.id)
    assert (await thawed.exec("cat /dev/shm/mark")).stdout == b"parent\n"
    await thawed.destroy()


# ── freeze and thaw ──────────────────────────────────────────────────────────────────────────────


async def test_a_thawed_machine_is_the_same_and_its_processes_go_on(
    engine: Engine, minimal: Snapshot
) -> None:
    vm = await engine.launch(minimal, metadata={"job": "7"}, hostname="builder")
    await vm.exec(MARKS)
    await vm.start(["/bin/sh", "-c", COUNT], exec_id="count")
    before = await facts(vm)
    at_once = whole_lines(await seen(vm, 10))
    frozen = await vm.freeze()
    ended = await vm.wait()
    assert (ended.kind, ended.cause) == ("frozen", "frozen")
    assert not vm.directory.exists()
    assert [each.id for each in engine.frozen()] == [vm.id] == [frozen.id]
    with pytest.raises(VmDied, match="frozen"):
        await vm.exec("true")
    await asyncio.sleep(2)
    thawed = await engine.thaw(frozen.id, ttl=60)
    try:
        assert engine.frozen() == []
        assert (thawed.id, thawed.record.metadata) == (vm.id, {"job": "7"})
        assert thawed.record.parent == minimal.digest
        assert thawed.record.expires_at - time.time() < 61
        after = await facts(thawed)
        assert after[:3] == before[:3], "hostname, machine id and boot id"
        assert after[0] == "builder"
        assert after[3] != before[3], "fresh entropy"
        assert abs(float((await thawed.exec("date +%s.%N")).stdout) - time.time()) < 5
        assert (await thawed.exec("cat /dev/shm/mark /home/runner/mark")).stdout == b"memory\ndisk\n"
        assert whole_lines(await seen(thawed, at_once + 20)) >= at_once + 20
        # Frozen again, it shares with its parent as before, and with nothing that is gone.
        again = await thawed.freeze()
        snapshot = engine.snapshots.load(again.digest)
        assert snapshot.manifest.base == minimal.digest
        assert private_bytes(snapshot.path / "memory.img") < 40 * MIB
        with pytest.raises(SnapshotInUse, match=f"frozen VM {vm.id}"):
            engine.snapshots.remove(minimal.digest)
        final = await engine.thaw(again.id)
        async with final.fork() as child:
            assert whole_lines(await seen(child, at_once + 30)) >= at_once + 30
        await final.destroy()
    finally:
        await thawed.destroy()


async def test_a_frozen_machine_outlives_service_and_host(
    engine: Engine, data_dir: Path, minimal: Snapshot
) -> None:
    vm = await engine.launch(minimal)
    await vm.exec("echo kept > /dev/shm/mark")
    frozen = await vm.freeze()
    async with Engine.open(data_dir) as later:
        assert frozen.id in {each.id for each in later.frozen()}
        assert await later.adopt() == []
        thawed = await later.thaw(frozen.id)
        assert (await thawed.exec("cat /dev/shm/mark")).stdout == b"kept\n"
        await thawed.destroy()


async def test_a_frozen_machine_whose_time_has_passed_is_gone_by_timer_and_at_open(
    engine: Engine, data_dir: Path, minimal: Snapshot
) -> None:
    first, second = await engine.launch(minimal), await engine.launch(minimal)
    async with Engine.open(data_dir) as watching:
        frozen = await first.freeze(ttl=1.0)
        path = engine.snapshots.load(frozen.digest).path
        async with asyncio.timeout(15):
            while path.exists():
                await asyncio.sleep(0.1)
        with pytest.raises(UnknownVm, match="its time has passed"):
            await engine.thaw(frozen.id)
        assert watching.frozen() == []
    frozen = await second.freeze(ttl=3600)
    snapshot = engine.snapshots.load(frozen.digest)
    past = msgspec.structs.replace(frozen, expires_at=time.time() - 1)
    engine.snapshots.complete(msgspec.structs.replace(snapshot.manifest, frozen=past))
    async with Engine.open(data_dir) as later, asyncio.timeout(15):
        while snapshot.path.exists():
            await asyncio.sleep(0.1)
        assert later.frozen() == []


async def test_a_thaw_of_what_was_thawed_discarded_or_pruned_is_refused_by_name(
    engine: Engine, minimal: Snapshot
) -> None:
    vms = [await engine.launch(minimal) for _ in range(3)]
    discarded, pruned, thawed = [await vm.freeze() for vm in vms]
    await engine.discard(discarded.id)
    engine.snapshots.remove(pruned.digest)
    running = await engine.thaw(thawed.id)
    for frozen in (discarded, pruned, thawed):
        with pytest.raises(UnknownVm, match=frozen.id):
            await engine.thaw(frozen.id)
        with pytest.raises(UnknownVm, match=frozen.id):
            await engine.discard(frozen.id)
    assert (await running.exec("echo fine")).stdout == b"fine\n"
    await running.destroy()


async def test_of_two_that_thaw_the_same_machine_one_gets_it(
    engine: Engine, data_dir: Path, minimal: Snapshot
) -> None:
    vm = await engine.launch(minimal)
    frozen = await vm.freeze()
    async with Engine.open(data_dir) as other:
        results = await asyncio.gather(engine.thaw(frozen.id), other.thaw(frozen.id), return_exceptions=True)
        machines = [result for result in results if isinstance(result, RunningVm)]
        assert len(machines) == 1, results
        assert {type(result) for result in results if result is not machines[0]} <= {BadRequest, UnknownVm}
        assert (await machines[0].exec("echo fine")).stdout == b"fine\n"
        await machines[0].destroy()


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        size = path.stat().st_size
        at = next(at for at in range(0, size, 4096) if os.pread(file.fileno(), 64, at).strip(b"\0"))
        data = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([data[0] ^ 0xFF]), at)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: os.truncate(path / "memory.img", 1 << 20), "memory.img .* has 1048576 bytes"),
        (lambda path: (path / "state.bin").unlink(), "state.bin .* is missing"),
        (lambda path: flip(path / "memory.img"), "memory image is damaged at byte"),
        (lambda path: flip(path / "state.bin"), "state.bin of snapshot"),
        (lambda path: flip(path / "memory.sums"), "memory.sums of snapshot"),
    ],
)
async def test_a_damaged_frozen_machine_is_refused_by_name_before_anything_starts(
    engine: Engine, minimal: Snapshot, damage: Callable[[Path], None], words: str
) -> None:
    vm = await engine.launch(minimal)
    frozen = await vm.freeze()
    path = engine.snapshots.load(frozen.digest).path
    try:
        damage(path)
        with pytest.raises((SnapshotInvalid, UnknownVm)) as caught:
            await engine.thaw(frozen.id)
        if isinstance(caught.value, SnapshotInvalid):
            assert re.search(words, str(caught.value))
        with pytest.raises((SnapshotInvalid, BadRequest)) as caught:
            await engine.launch(frozen.digest)
        assert re.search(f"{words}|is no template", str(caught.value))
        assert not engine.vms()
    finally:
        engine.snapshots.remove(frozen.digest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"argv_digest": "0" * 64}, "other devices"),
        ({"vmm_version": "99.0.0"}, "QEMU 99.0.0"),
        ({"cpu_model": "abacus"}, "abacus"),
    ],
)
async def test_a_frozen_machine_of_another_host_is_refused_by_name(
    engine: Engine, minimal: Snapshot, change: dict[str, str], words: str
) -> None:
    vm = await engine.launch(minimal)
    frozen = await vm.freeze()
    manifest = engine.snapshots.load(frozen.digest).manifest
    engine.snapshots.complete(msgspec.structs.replace(manifest, **change))
    with pytest.raises(SnapshotInvalid, match=words):
        await engine.thaw(frozen.id)
    assert [each.id for each in engine.frozen()] == [vm.id]
    await engine.discard(frozen.id)


# ── another process ──────────────────────────────────────────────────────────────────────────────

OWNER = """
import asyncio, sys
from vmm_core.engine import Engine

async def main():
    async with Engine.open(sys.argv[1]) as engine:
        vm = await engine.launch(sys.argv[2], ttl=600)
        await vm.exec("echo kept > /dev/shm/mark")
        await vm.start(["/bin/sh", "-c", sys.argv[4]], exec_id="count")
        print(vm.id, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        if sys.argv[3] == "freeze":
            await vm.freeze()
        elif sys.argv[3] == "fork":
            await vm.fork_many(1)
        elif sys.argv[3] == "thaw":
            frozen = await vm.freeze()
            print("frozen", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            await engine.thaw(frozen.id)
        print("done", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def owner_of(data_dir: Path, template: str, what: str) -> tuple[asyncio.subprocess.Process, str]:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(data_dir), template, what, COUNT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return owner, (await heard(owner)).decode()


async def heard(owner: asyncio.subprocess.Process) -> bytes:
    assert owner.stdout is not None
    async with asyncio.timeout(60):
        line = (await owner.stdout.readline()).strip()
    assert line, "the owner died early"
    return line


async def kill_after(owner: asyncio.subprocess.Process, seconds: float) -> None:
    assert owner.stdin is not None
    owner.stdin.write(b"go\n")
    await owner.stdin.drain()
    await asyncio.sleep(seconds)
    owner.kill()
    await owner.wait()


async def sole_survivor(engine: Engine, vm_id: str) -> RunningVm:
    """The machine of that id, which must live exactly once: running, or frozen."""
    adopted = [vm for vm in await engine.adopt() if vm.id == vm_id]
    frozen = [each for each in engine.frozen() if each.id == vm_id]
    assert len(adopted) + len(frozen) == 1, f"running {adopted}, frozen {frozen}"
    return adopted[0] if adopted else await engine.thaw(vm_id)


async def check_whole(vm: RunningVm) -> None:
    assert (await vm.exec("cat /dev/shm/mark", timeout=30)).stdout == b"kept\n"
    lines = whole_lines(await seen(vm, 5))
    assert whole_lines(await seen(vm, lines + 3)) >= lines + 3, "its command goes on"


@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0])
async def test_a_service_killed_while_it_freezes_leaves_the_machine_or_a_whole_frozen_one(
    engine: Engine, data_dir: Path, minimal: Snapshot, seconds: float
) -> None:
    owner, vm_id = await owner_of(data_dir, minimal.digest, "freeze")
    await kill_after(owner, seconds)
    vm = await sole_survivor(engine, vm_id)
    try:
        await check_whole(vm)
    finally:
        await vm.destroy()


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.3, 0.5])
async def test_a_service_killed_while_it_thaws_leaves_the_machine_or_a_whole_frozen_one(
    engine: Engine, data_dir: Path, minimal: Snapshot, seconds: float
) -> None:
    owner, vm_id = await owner_of(data_dir, minimal.digest, "thaw")
    assert owner.stdin is not None
    owner.stdin.write(b"go\n")
    assert await heard(owner) == b"frozen"
    await kill_after(owner, seconds)
    vm = await sole_survivor(engine, vm_id)
    try:
        await check_whole(vm)
    finally:
        await vm.destroy()


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.15, 0.25, 0.4])
async def test_a_service_killed_while_it_forks_leaves_its_machine_running_on(
    engine: Engine, data_dir: Path, minimal: Snapshot, seconds: float
) -> None:
    owner, vm_id = await owner_of(data_dir, minimal.digest, "fork")
    await kill_after(owner, seconds)
    adopted = await engine.adopt()
    vm = next(vm for vm in adopted if vm.id == vm_id)
    await check_whole(vm)
    async with vm.fork() as child:
        await check_whole(child)
    for each in adopted:
        await each.destroy()


async def test_a_machine_of_another_process_is_forked_and_frozen_after_adoption(
    engine: Engine, data_dir: Path, minimal: Snapshot
) -> None:
    owner, vm_id = await owner_of(data_dir, minimal.digest, "fork")
    assert owner.stdin is not None
    owner.stdin.write(b"go\n")
    assert await heard(owner) == b"done"
    owner.kill()
    await owner.wait()
    adopted = {vm.id: vm for vm in await engine.adopt()}
    assert len(adopted) == 2
    child = next(vm for vm in adopted.values() if vm.id != vm_id)
    assert read_record(child.directory).parent == child.record.parent
    for vm in adopted.values():
        async with vm.fork() as grandchild:
            await check_whole(grandchild)
        frozen = await vm.freeze()
        thawed = await engine.thaw(frozen.id)
        await check_whole(thawed)
        await thawed.destroy()
