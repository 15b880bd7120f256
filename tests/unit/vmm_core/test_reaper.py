"""What the reaper takes for nobody's, and what it leaves alone."""

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from vmm_core.berths import Berths
from vmm_core.disk import Pool
from vmm_core.machine import MachineSpec, Manifest, VmRecord
from vmm_core.orphans import Orphan
from vmm_core.process import start_ticks
from vmm_core.processes import Seen, seen, watches
from vmm_core.reaper import MOST_IN_ONE_PASS, Reaper
from vmm_core.record import host_boot, try_lock, write_record
from vmm_core.snapshot import MANIFEST, SnapshotStore

pytestmark = pytest.mark.anyio


class World:
    """A data directory and a reaper of it, on a host without slots."""

    def __init__(self, root: Path) -> None:
        self.pool = Pool(root=root, kind="copy")
        for path in (self.pool.snapshots, self.pool.names, self.pool.vms, self.pool.staging):
            path.mkdir(parents=True)
        self.snapshots = SnapshotStore(self.pool)
        self.owned: set[str] = set()
        self.cleared: list[str] = []
        self.stubborn: set[str] = set()
        berths = cast(Berths, SimpleNamespace(slots=None))
        self.reaper = Reaper(self.pool, self.snapshots, berths, owned=lambda: self.owned, clear=self._clear)

    async def _clear(self, directory: Path) -> None:
        assert try_lock(directory) is None, "cleared by one that does not hold it"
        if directory.name in self.stubborn:
            raise OSError("cannot be removed")
        self.cleared.append(directory.name)
        shutil.rmtree(directory)

    def vm(self, name: str, **facts: Any) -> Path:
        directory = self.pool.vms / name
        directory.mkdir()
        known: dict[str, Any] = {
            "id": name,
            "pid": os.getpid(),
            "start_ticks": start_ticks(os.getpid()),
            "machine": MachineSpec(),
            "accel": "tcg",
            "parent": None,
            "template": None,
            "created_at": 1.0,
            "expires_at": time.time() + 3600,
            "host_boot": host_boot(),
        }
        write_record(directory, VmRecord(**{**known, **facts}))
        return directory

    async def look(self) -> list[Orphan]:
        """Those of this directory: others may leave something on this host at any time."""
        return [orphan for orphan in await self.reaper.look() if orphan.kind != "jailer"]

    async def names(self) -> list[str]:
        return [orphan.name for orphan in await self.look()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "pool")


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        yield process
        process.kill()


async def test_a_vm_that_runs_waits_for_adoption(world: World) -> None:
    world.vm("vm-1")
    assert not await world.look()


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"pid": 1 << 22}, "its VMM has ended"),
        ({"start_ticks": 1}, "its VMM has ended"),
        ({"host_boot": "another"}, "its VMM has ended"),
        ({"expires_at": 1.0}, "its time to live has passed"),
    ],
)
async def test_a_vm_that_nobody_will_adopt(world: World, facts: dict[str, Any], why: str) -> None:
    world.vm("vm-1", **facts)
    (orphan,) = await world.look()
    assert (orphan.kind, orphan.name, orphan.why) == ("vm", "vm-1", why)


async def test_a_start_that_was_cut_short(world: World) -> None:
    (world.pool.vms / "vm-1").mkdir()
    assert [orphan.why for orphan in await world.look()] == ["its start was cut short"]


async def test_what_a_living_process_holds_is_left_alone(world: World) -> None:
    directory = world.vm("vm-1", expires_at=1.0)
    held = try_lock(directory)
    assert held is not None
    assert not await world.look()
    os.close(held)
    assert await world.names() == ["vm-1"]
    world.owned.add("vm-1")
    assert not await world.look()


async def test_a_record_of_another_release_counts_as_far_as_it_is_known(world: World) -> None:
    directory = world.vm("vm-1")
    facts = msgspec.json.decode((directory / "vm.json").read_bytes())
    del facts["machine"]
    (directory / "vm.json").write_bytes(msgspec.json.encode(facts))
    assert not await world.look()
    (directory / "vm.json").write_bytes(msgspec.json.encode({**facts, "expires_at": 1.0}))
    assert await world.names() == ["vm-1"]


async def test_a_record_that_cannot_be_read_is_nobodys_once_nothing_runs_there(world: World) -> None:
    directory = world.vm("vm-1")
    (directory / "vm.json").write_bytes(b"\0" * 100)
    with subprocess.Popen(["/bin/sleep", "60"], cwd=directory) as process:
        assert not await world.look()
        process.kill()
    assert [orphan.why for orphan in await world.look()] == [
        "its record cannot be read, and nothing runs there"
    ]


async def test_removed_when_seen_twice_with_a_line_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.vm("vm-1", pid=1 << 22)
    with caplog.at_level(logging.WARNING, "vmm_core.reaper"):
        assert not await world.reaper.sweep()
        assert not caplog.records
        assert [orphan.name for orphan in await world.reaper.sweep()] == ["vm-1"]
    assert world.cleared == ["vm-1"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("reaped kind=vm name=vm-1 mark=")
    assert line.endswith("why='its VMM has ended'")
    assert not await world.reaper.sweep()


async def test_another_one_of_the_same_name_is_seen_for_the_first_time(world: World) -> None:
    directory = world.vm("vm-1", pid=1 << 22)
    assert not await world.reaper.sweep()
    directory.rename(directory.with_name("kept"))  # its inode number shall not be used again
    world.vm("vm-1", pid=1 << 22)
    assert "vm-1" not in [orphan.name for orphan in await world.reaper.sweep()]
    assert "vm-1" in [orphan.name for orphan in await world.reaper.sweep()]


async def test_what_found_an_owner_between_two_passes_is_left_alone(world: World) -> None:
    directory = world.vm("vm-1", pid=1 << 22)
    assert not await world.reaper.sweep()
    held = try_lock(directory)
    assert held is not None
    assert not await world.reaper.sweep()
    os.close(held)
    assert not await world.reaper.sweep()
    assert await world.reaper.sweep()


async def test_a_vmm_whose_time_has_passed_is_ended(world: World, child: "subprocess.Popen[bytes]") -> None:
    world.vm("vm-1", pid=child.pid, start_ticks=start_ticks(child.pid), expires_at=time.time() + 0.2)
    assert not await world.reaper.sweep()
    await asyncio.sleep(0.25)
    assert not await world.reaper.sweep()
    assert child.poll() is None
    assert await world.reaper.sweep()
    assert child.wait(5) == -9
    assert world.cleared == ["vm-1"]


async def test_a_pass_does_so_much_and_no_more(world: World) -> None:
    for number in range(MOST_IN_ONE_PASS + 5):
        (world.pool.vms / f"vm-{number:03}").mkdir()
    assert not await world.reaper.sweep()
    assert len(await world.reaper.sweep()) == MOST_IN_ONE_PASS
    assert len(await world.reaper.sweep()) == 5


async def test_one_that_cannot_be_removed_does_not_keep_the_others(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("vm-1", "vm-2"):
        (world.pool.vms / name).mkdir()
    world.stubborn.add("vm-1")
    await world.reaper.sweep()
    assert [orphan.name for orphan in await world.reaper.sweep()] == ["vm-2"]
    assert "not reaped kind=vm name=vm-1" in caplog.text
    world.stubborn.clear()
    assert [orphan.name for orphan in await world.reaper.sweep()] == ["vm-1"]


# ── drafts and captures ──────────────────────────────────────────────────────────────────────────


async def test_drafts_whose_maker_has_ended(world: World) -> None:
    staging = world.pool.staging
    for name in ("vm-1", "vm-2", "removed-12345678", f"snapshot-{os.getpid()}-12345678", "strange"):
        (staging / name).mkdir()
    held = try_lock(staging / "vm-2")
    assert held is not None
    with world.snapshots.draft() as draft:
        await world.reaper.sweep()
        await world.reaper.sweep()
        assert sorted(path.name for path in staging.iterdir()) == sorted(["vm-2", "strange", draft.name])
    os.close(held)
    assert await world.names() == ["vm-2"]


async def test_captures_that_were_never_completed(world: World) -> None:
    left, digest = world.pool.snapshots / ("a" * 64), "b" * 64
    left.mkdir()
    with world.snapshots.draft() as draft:
        _, held = world.snapshots.place(draft, digest)
    assert await world.names() == [left.name]
    await world.reaper.sweep()
    await world.reaper.sweep()
    assert not left.exists()
    os.close(held)
    assert await world.names() == [digest]


async def test_captures_that_nothing_stands_on(world: World) -> None:
    manifest = Manifest(
        digest="c" * 64, created_at=1.0, machine=MachineSpec(), accel="tcg",
        vmm_version="1", cpu_model="max", argv_digest="x", files={}, labels={},
    )  # fmt: skip
    used = msgspec.structs.replace(manifest, digest="d" * 64, ephemeral=True)
    unused = msgspec.structs.replace(used, digest="e" * 64)
    for each in (manifest, used, unused):
        path = world.pool.snapshots / each.digest
        path.mkdir()
        (path / MANIFEST).write_bytes(msgspec.json.encode(each))
    world.vm("vm-1", parent=used.digest)
    assert await world.names() == [unused.digest]
    await world.reaper.sweep()
    await world.reaper.sweep()
    assert sorted(path.name for path in world.pool.snapshots.iterdir()) == [manifest.digest, used.digest]


# ── processes ────────────────────────────────────────────────────────────────────────────────────


async def test_a_process_whose_vm_is_gone(world: World) -> None:
    directory = world.pool.vms / "vm-1"
    directory.mkdir()
    with subprocess.Popen(["/bin/sleep", "60"], cwd=directory) as process:
        shutil.rmtree(directory)
        assert await world.names() == [str(process.pid)]
        await world.reaper.sweep()
        assert process.poll() is None
        await world.reaper.sweep()
        assert process.wait(5) == -9


JAILER = """
import ctypes, os, sys, time
ctypes.CDLL(None).prctl(15, b"microvm-jailer", 0, 0, 0)
if sys.argv[1:]:
    os.pidfd_open(int(sys.argv[1]))
print(flush=True)
time.sleep(60)
"""


def a_jailer(*watched: int) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-c", JAILER, *map(str, watched)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.skipif(os.geteuid() != 0, reason="jailers are root's")
async def test_a_jailer_with_neither_an_engine_nor_a_vm(
    world: World, child: "subprocess.Popen[bytes]"
) -> None:
    with a_jailer() as idle, a_jailer() as ours, a_jailer(child.pid) as busy:
        pidfd = os.pidfd_open(ours.pid)  # as an engine has of its jailer
        await world.reaper.sweep()
        await world.reaper.sweep()
        assert idle.wait(5) == -9
        assert (ours.poll(), busy.poll()) == (None, None)
        os.close(pidfd)
        for process in (ours, busy):
            process.kill()


def test_processes_are_told_apart_by_their_start(child: "subprocess.Popen[bytes]") -> None:
    (found,) = [process for process in seen() if process.pid == child.pid]
    assert found == Seen(
        pid=child.pid, ticks=start_ticks(child.pid) or 0, parent=os.getpid(), uid=os.getuid(), name="sleep",
        cwd=os.getcwd(), netns=os.stat("/proc/self/ns/net").st_ino,
    )  # fmt: skip
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.pid not in [process.pid for process in seen()], "it has ended, though nobody has asked how"


def test_whom_a_process_watches(child: "subprocess.Popen[bytes]") -> None:
    pidfd = os.pidfd_open(child.pid)
    assert child.pid in watches(os.getpid())
    child.kill()
    child.wait()
    assert child.pid not in watches(os.getpid())
    os.close(pidfd)
    assert not watches(1 << 22)
