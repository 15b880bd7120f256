"""Cells and the service they belong to: what lives, what ends, and when, whoever is killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from vmm_core import cgroup, vmm_root
from vmm_core.cgroup import Cgroups, Limits
from vmm_core.jail import CellSpec, Jailer
from vmm_core.process import start_ticks

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="jailing needs root"),
]

FIRST = 910_000
SLEEP = Path("/bin/sleep").resolve()
SMALL = Limits(vcpus=1, memory_mib=32, vmm_mib=32, disk_mib=64)

# A service that has three cells waiting, one VM, and an answer of its jailer unread, and then hangs.
SERVICE = """
import asyncio, json, sys, time
from pathlib import Path
from vmm_core.cgroup import Limits
from vmm_core.jail import CellSpec, Jailer

async def main(data, program, first, seconds):
    jailer = await Jailer.open(Path(data), program)
    assert jailer.jailed, jailer.why
    limits = Limits(vcpus=1, memory_mib=32, vmm_mib=32, disk_mib=64)
    cells = [
        await jailer.prepare(CellSpec(number=int(first) + n, uid=2_000_000 + int(first) + n, limits=limits))
        for n in range(4)
    ]
    vm = await cells[0].run([program, "60"], deadline=time.time() + float(seconds))
    print(json.dumps({"vm": vm.pid, "waiting": [cell.pid for cell in cells[1:]]}), flush=True)
    unread = asyncio.create_task(
        jailer.prepare(CellSpec(number=int(first) + 4, uid=2_000_000 + int(first) + 4, limits=limits))
    )
    for _ in range(10):
        await asyncio.sleep(0)
    time.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
async def jailer(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Jailer]:
    opened = await Jailer.open(tmp_path_factory.mktemp("data"), SLEEP)
    assert opened.jailed, opened.why
    yield opened
    await opened.close()


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    yield
    groups = cgroup.find()
    for number in range(FIRST, FIRST + 5):
        for pid in groups.pids(number):
            os.kill(pid, signal.SIGKILL)
        await groups.remove(number)


def spec(number: int) -> CellSpec:
    return CellSpec(number=number, uid=2_000_000 + number, limits=SMALL)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    """No such process, or one that has ended and was not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def jailers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() == "microvm-jailer\n"]


def process_of(jailer: Jailer) -> int:
    """The process behind one jailer: engines of other tests in this process have theirs."""
    assert jailer._link is not None
    return jailer._link._process.pid


async def test_a_killed_service_leaves_its_vm_until_its_deadline_and_nothing_else(tmp_path: Path) -> None:
    seconds = 4.0
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE, tmp_path, str(SLEEP), str(FIRST), str(seconds)],
        stdout=subprocess.PIPE,
    )
    try:
        assert service.stdout is not None
        pids = json.loads(await asyncio.to_thread(service.stdout.readline))
        started = time.time()
        await asyncio.sleep(0.3)
        (own_jailer,) = jailers_of(service.pid)
        assert not gone(pids["vm"])
        assert not any(gone(pid) for pid in pids["waiting"])
    finally:
        service.kill()
        service.wait()
    await until(lambda: all(gone(pid) for pid in pids["waiting"]), seconds=2)
    groups = cgroup.find()
    await until(lambda: not groups.pids(FIRST + 4))
    assert FIRST + 4 in groups.numbers(), "the one that was never heard of was made"
    assert not gone(pids["vm"]), "a VM outlives its service"
    assert not gone(own_jailer)
    await until(lambda: gone(pids["vm"]), seconds=seconds + 5)
    assert seconds - 1 < time.time() - started < seconds + 3
    await until(lambda: gone(own_jailer))


async def test_a_jailer_that_is_killed_costs_nothing_but_another_one(jailer: Jailer) -> None:
    waiting = await jailer.prepare(spec(FIRST))
    vm = await (await jailer.prepare(spec(FIRST + 1))).run([str(SLEEP), "60"], deadline=time.time() + 60)
    first = process_of(jailer)
    os.kill(first, signal.SIGKILL)
    another = await jailer.prepare(spec(FIRST + 2))
    second = process_of(jailer)
    assert second != first
    assert vm.running
    revived = await waiting.run([str(SLEEP), "60"], deadline=time.time() + 60)
    assert revived.running
    # The new one has heard of the VM of the old one.
    assert (
        sum("pidfd" in os.readlink(f"/proc/{second}/fd/{fd}") for fd in os.listdir(f"/proc/{second}/fd")) >= 2
    )
    for process in (vm, revived):
        await process.end()
        process.close()
    await another.discard()


async def test_the_jailer_kills_at_the_latest_deadline_it_was_told(jailer: Jailer) -> None:
    # It leaves ten seconds to a service that lives: a deadline that long ago is due now.
    vm = await (await jailer.prepare(spec(FIRST))).run([str(SLEEP), "60"], deadline=time.time() - 7)
    await jailer.watch(vm, time.time() + 60)
    await asyncio.sleep(3.5)
    assert vm.running
    await jailer.watch(vm, time.time() - 11)
    assert await asyncio.wait_for(vm.wait(), 3) == -signal.SIGKILL
    vm.close()


async def test_the_jailer_ends_with_its_engine_or_with_its_last_vm(tmp_path: Path) -> None:
    before = set(jailers_of(os.getpid()))
    opened = await Jailer.open(tmp_path, SLEEP)
    vm = await (await opened.prepare(spec(FIRST))).run([str(SLEEP), "60"], deadline=time.time() + 60)
    (own,) = set(jailers_of(os.getpid())) - before
    await opened.close()
    assert vm.running
    assert not gone(own)
    await vm.end()
    vm.close()
    await until(lambda: gone(own))
    idle = await Jailer.open(tmp_path, SLEEP)
    (second,) = set(jailers_of(os.getpid())) - before
    await idle.close()
    assert start_ticks(second) is None
    assert start_ticks(own) is None, "reaped by the next one"


async def test_the_jailer_holds_nothing_of_its_engine(jailer: Jailer, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w"):
        own = process_of(jailer)
        assert os.readlink(f"/proc/{own}/cwd") == "/"
        held = {
            os.readlink(f"/proc/{own}/fd/{fd}").partition("/data")[0] for fd in os.listdir(f"/proc/{own}/fd")
        }
        assert str(tmp_path / "lock") not in held
        mounts = Path(f"/proc/{own}/mountinfo").read_text().splitlines()
        assert {line.split()[4] for line in mounts} == {"/", "/dev"}


async def test_without_rights_cells_are_plain_and_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    opened = await Jailer.open(tmp_path, SLEEP)
    assert not opened.jailed
    assert "uid 1000" in opened.why
    assert "rights of the service" in opened.describe()
    process = await (await opened.prepare(spec(FIRST))).run(
        [str(SLEEP), "60"], deadline=time.time() + 60, cwd=tmp_path
    )
    assert os.readlink(f"/proc/{process.pid}/cwd") == str(tmp_path)
    assert os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
    await process.end()
    process.close()
    await opened.close()


async def test_a_root_that_cannot_be_entered_means_plain_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmm_root, "build", lambda *_: tmp_path / "gone")
    opened = await Jailer.open(tmp_path, SLEEP)
    assert not opened.jailed
    assert "No such file" in opened.why
    await opened.close()


async def test_cells_do_without_control_groups_that_cannot_be_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "groups" / "microvm").mkdir(parents=True)
    broken = cgroup.Hierarchy(tmp_path / "groups", unified=False, controllers=("cpu",))
    monkeypatch.setattr(cgroup, "find", lambda: Cgroups((broken,)))
    opened = await Jailer.open(tmp_path, SLEEP)
    assert opened.jailed
    assert opened.cgroups.controllers == frozenset()
    assert "cannot join" in opened.describe()
    await opened.close()
