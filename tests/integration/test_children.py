"""Snapshots of machines that are forks themselves: children that store what they changed, in chains, on real VMs."""

import asyncio
import contextlib
import errno
import os
import secrets
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmm_core.disk import private_bytes
from vmm_core.drivers.qemu import QemuVm
from vmm_core.engine import Engine
from vmm_core.errors import (
    BadRequest,
    GuestRefused,
    PoolFull,
    SnapshotInUse,
    SnapshotInvalid,
    UnknownTemplate,
    VmmProtocolError,
    WrongOwner,
)
from vmm_core.machine import Snapshot
from vmm_core.vm import RunningVm

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left", "no_children_left")]

MIB = 1 << 20
NAME = "octo-org/hello@feature/ünïcode-%2F.."[:-2]
IDENTITY = (
    "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1"
)


@pytest.fixture
async def no_children_left(engine: Engine) -> AsyncIterator[None]:
    """Every snapshot a test leaves is removed, the last first; nothing half-made may be among them."""
    before = {path.name for path in engine.pool.snapshots.iterdir()}
    names = engine.snapshots.names()
    yield
    for snapshot in engine.snapshots.list():
        if snapshot.digest not in before:
            engine.snapshots.remove(snapshot.digest)
    assert {path.name for path in engine.pool.snapshots.iterdir()} <= before
    assert engine.snapshots.names() == names
    assert [path for path in engine.pool.staging.iterdir() if path.name.startswith("snapshot-")] == []


async def child_of(
    engine: Engine, parent: str | Snapshot, script: str = "true", *, owner: str | None = None
) -> Snapshot:
    vm = await engine.launch(parent, owner=owner)
    result = await vm.exec(f"set -eu; {script}", user="root", timeout=60)
    assert result.code == 0, result
    return await save(engine, vm)


async def save(engine: Engine, vm: RunningVm, **options: str) -> Snapshot:
    saved = await engine.snapshot(vm, digest=secrets.token_hex(32), labels={"template": "child"}, **options)
    assert not vm.directory.exists()
    assert vm.id not in {each.id for each in engine.vms()}
    return saved


async def settled(engine: Engine, snapshot: Snapshot, file: str) -> int:
    """Bytes of a file that are its own, once XFS has let go of the removed disks it shared them with."""
    found = -1
    async with asyncio.timeout(20):
        while True:
            now = private_bytes(snapshot.path / file)
            if now == found:
                return now
            found = now
            engine.pool.free_bytes()  # statfs(2) makes XFS begin
            await asyncio.sleep(0.5)


async def test_forks_of_a_child_hold_what_it_had_and_are_machines_of_their_own(
    engine: Engine, minimal: Snapshot
) -> None:
    vm = await engine.launch(minimal)
    await vm.exec("echo memory > /dev/shm/mark; echo disk > /home/runner/mark")
    child = await save(engine, vm, name=NAME)
    manifest = child.manifest
    assert (manifest.base, manifest.state, manifest.ephemeral, manifest.frozen) == (
        minimal.digest,
        "devices",
        False,
        None,
    )
    assert engine.snapshots.resolve(NAME).digest == child.digest
    vms = [await engine.launch(NAME) for _ in range(3)]
    try:
        for each in vms:
            assert each.record.parent == child.digest
            assert (await each.exec("cat /dev/shm/mark /home/runner/mark")).stdout == b"memory\ndisk\n"
            assert abs(float((await each.exec("date +%s.%N")).stdout) - time.time()) < 5
        facts = [(await each.exec(IDENTITY, user="root")).stdout.split(b"\n", 3) for each in vms]
        for values in zip(*facts, strict=True):
            assert len(set(values)) == 3
        await vms[0].exec("echo other > /dev/shm/mark; echo other > /home/runner/mark")
        assert (await vms[1].exec("cat /dev/shm/mark /home/runner/mark")).stdout == b"memory\ndisk\n"
        async with vms[0].fork() as grandchild:
            assert (await grandchild.exec("cat /dev/shm/mark")).stdout == b"other\n"
        frozen = await vms[0].freeze()
        thawed = await engine.thaw(frozen.id)
        assert (await thawed.exec("cat /dev/shm/mark /home/runner/mark")).stdout == b"other\nother\n"
        await thawed.destroy()
    finally:
        await asyncio.gather(*(each.destroy() for each in vms))
    engine.snapshots.unset_name(NAME)
    with pytest.raises(UnknownTemplate):
        engine.snapshots.resolve(NAME)


async def test_a_child_costs_what_it_wrote_and_not_what_it_freed_or_wrote_as_it_was(
    engine: Engine, minimal: Snapshot
) -> None:
    # 30 MiB stay in memory and 20 on the disk; 100 more were in use and are zero again, and 8 more are written
    # over with what they held.
    base = await child_of(engine, minimal, "dd if=/dev/urandom of=/dev/shm/same bs=1M count=8 2>&1")
    child = await child_of(
        engine,
        base,
        "cd /dev/shm; cat same > /root/same; cat /root/same > again; cat again > same; rm again;"
        "dd if=/dev/urandom of=/dev/shm/kept bs=1M count=30 2>&1;"
        "dd if=/dev/urandom of=/dev/shm/gone bs=1M count=100 2>&1;"
        "dd if=/dev/zero of=/dev/shm/gone bs=1M count=100 conv=notrunc 2>&1; rm /dev/shm/gone;"
        "dd if=/dev/urandom of=/home/runner/kept bs=1M count=20 2>&1; sync",
    )
    memory, disk = await settled(engine, child, "memory.img"), await settled(engine, child, "disk.img")
    assert 30 * MIB <= memory
    assert 28 * MIB <= disk <= 28 * 1.15 * MIB + 2 * MIB
    assert engine.snapshots.private_bytes(child.digest) >= memory + disk
    print("memory", memory / MIB, "disk", disk / MIB)
