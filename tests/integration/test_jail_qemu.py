"""Real QEMU in a cell: it restores a machine with no right of its own, and starts no program for anybody."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from vmm_core import memory
from vmm_core.cgroup import Cgroups, Limits
from vmm_core.disk import clone_file
from vmm_core.drivers.base import DISK, MEMORY, STATE
from vmm_core.drivers.qemu import device_args, find_qemu
from vmm_core.drivers.qmp import Qmp
from vmm_core.engine import Engine
from vmm_core.errors import VmmProtocolError
from vmm_core.guest.channel import Channel, Revive
from vmm_core.jail import Cell, CellSpec, Jailer
from vmm_core.machine import Snapshot
from vmm_core.process import VmmProcess

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="jailing needs root"),
]

NUMBER = 920_000
QEMU = find_qemu().binary
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@pytest.fixture(scope="module")
async def jailer(data_dir: Path) -> AsyncIterator[Jailer]:
    opened = await Jailer.open(data_dir, QEMU)
    assert opened.jailed, opened.why
    yield opened
    await opened.close()


@pytest.fixture(scope="module")
async def plain() -> AsyncIterator[Jailer]:
    opened = Jailer(None, Cgroups(()))
    yield opened
    await opened.close()


def spec(*, kvm: bool = False) -> CellSpec:
    limits = Limits(vcpus=1, memory_mib=512)
    return CellSpec(number=NUMBER, uid=2_000_000 + NUMBER, limits=limits, kvm=kvm)


@contextlib.contextmanager
def listening(directory: Path, names: Sequence[str]):
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for name in names:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.bind(str(directory / name))
            sock.listen(4)
            sockets.append(sock)
        yield [sock.fileno() for sock in sockets]


async def finish(jailer: Jailer, process: VmmProcess) -> None:
    await process.end()
    process.close()
    await jailer.cgroups.remove(NUMBER)


async def run_bare(
    owner: Jailer, directory: Path, *arguments: str, machine: str = "none", kvm: bool = False
) -> VmmProcess:
    """QEMU with a monitor on descriptor 3, and nothing that runs."""
    (directory / "qmp.sock").unlink(missing_ok=True)
    cell: Cell = await owner.prepare(spec(kvm=kvm))
    with listening(directory, ["qmp.sock"]) as fds:
        return await cell.run(
            [
                QEMU,
                *("-M", machine, "-nodefaults", "-S", "-display", "none"),
                *("-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
                *arguments,
            ],
            fds=fds,
            deadline=time.time() + 30,
            cwd=directory,
        )


async def try_to_run_a_program(owner: Jailer, directory: Path, *arguments: str) -> None:
    """As the guest's monitor commands would: a migration into a program."""
    process = await run_bare(owner, directory, *arguments)
    try:
        qmp = await Qmp.connect(directory / "qmp.sock")
        with contextlib.suppress(VmmProtocolError):
            await qmp.execute("migrate", uri=f"exec:/usr/bin/touch {directory}/started; cat > /dev/null")
        await asyncio.sleep(0.5)
        await qmp.close()
    finally:
        await finish(owner, process)


async def test_a_migration_starts_no_program(jailer: Jailer, plain: Jailer, tmp_path: Path) -> None:
    started = tmp_path / "started"
    await try_to_run_a_program(plain, tmp_path)
    assert started.exists(), "this way of starting a program works where nothing stops it"
    started.unlink()
    await try_to_run_a_program(plain, tmp_path, "-sandbox", SANDBOX)
    assert not started.exists(), "QEMU's own sandbox"
    await try_to_run_a_program(jailer, tmp_path)
    assert not started.exists(), "the cell alone"
    await try_to_run_a_program(jailer, tmp_path, "-sandbox", SANDBOX)
    assert not started.exists()


async def test_the_monitor_of_a_jailed_vmm_reads_and_writes_no_file_of_the_host(
    jailer: Jailer, plain: Jailer, tmp_path: Path
) -> None:
    async def dump(owner: Jailer) -> None:
        target = tmp_path / "dump"
        process = await run_bare(owner, tmp_path)
        try:
            qmp = await Qmp.connect(tmp_path / "qmp.sock")
            with contextlib.suppress(VmmProtocolError):
                await qmp.execute(
                    "chardev-add",
                    id="out",
                    backend={"type": "file", "data": {"out": str(target)}},
                )
            await qmp.close()
        finally:
            await finish(owner, process)

    await dump(plain)
    assert (tmp_path / "dump").exists()
    (tmp_path / "dump").unlink()
    await dump(jailer)
    assert not (tmp_path / "dump").exists()


async def test_a_machine_is_restored_in_a_cell_and_works(
    jailer: Jailer, engine: Engine, minimal: Snapshot
) -> None:
    machine, accel = minimal.manifest.machine, minimal.manifest.accel
    directory = engine.staging / f"jail-test-{os.getpid()}"
    directory.mkdir()
    files = contextlib.ExitStack()
    try:
        clone_file(minimal.path / DISK, directory / DISK)
        sealed = memory.load_sealed(minimal.path / MEMORY, machine.memory_mib << 20)
        files.callback(os.close, sealed)
        disk = files.enter_context((directory / DISK).open("r+b")).fileno()
        state = files.enter_context((minimal.path / STATE).open("rb")).fileno()
        names = ["qmp.sock", "agent.sock", "console.sock"]
        fds = [*files.enter_context(listening(directory, names)), sealed, disk, state]
        cell = await jailer.prepare(spec(kvm=accel == "kvm"))
        size = f"size={machine.memory_mib}M"
        process = await cell.run(
            [
                QEMU,
                *("-accel", accel, *device_args(machine, accel), "-sandbox", SANDBOX),
                *("-object", f"memory-backend-file,id=mem,{size},mem-path=/proc/self/fd/6,share=off"),
                *("-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
                *("-chardev", "socket,id=agent,fd=4,server=on,wait=off"),
                *("-chardev", "socket,id=console,fd=5,server=on,wait=off"),
                *("-add-fd", "fd=7,set=1", "-blockdev"),
                "driver=raw,node-name=root,file.driver=file,file.filename=/dev/fdset/1",
                *("-incoming", "defer"),
            ],
            fds=fds,
            deadline=time.time() + 60,
        )
        try:
            await _check_guest(directory, process)
        finally:
            await finish(jailer, process)
    finally:
        files.close()
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


async def _check_guest(directory: Path, process: VmmProcess) -> None:
    qmp = await Qmp.connect(directory / "qmp.sock")
    qmp.send("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    await qmp.execute("migrate-incoming", uri="fd:8")
    await qmp.close()
    channel = await Channel.connect(directory / "agent.sock")
    await channel.revive(Revive(token="jail-test", hostname="jailed", machine_id="0" * 32), timeout=30)
    script = (
        "hostname; dd if=/dev/urandom of=/home/runner/x bs=1M count=8 2>/dev/null && sync && echo written"
    )
    command = await channel.start("one", ["/bin/sh", "-c", script], user="runner")
    result = await command.collect(max_bytes=1 << 16)
    assert (result.code, result.stdout) == (0, b"jailed\nwritten\n"), process.log_text()
    await channel.close()
    assert process.running
    assert process.log_text() == ""
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "Seccomp_filters:\t2" in status, "ours, and QEMU's own"
    # What live forks and the accounting read.
    smaps = Path(f"/proc/{process.pid}/smaps").read_text()
    assert f"memfd:{memory.MEMFD_NAME}" in smaps
    line = next(line for line in smaps.splitlines() if f"memfd:{memory.MEMFD_NAME}" in line)
    start = int(line.partition("-")[0], 16)
    with Path(f"/proc/{process.pid}/pagemap").open("rb") as pages:
        pages.seek(start // 4096 * 8)
        assert len(pages.read(8)) == 8
    with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as guest:
        guest.seek(start)
        assert len(guest.read(4096)) == 4096


async def test_kvm_is_there_only_for_cells_that_use_it(jailer: Jailer) -> None:
    if not Path("/dev/kvm").exists():
        pytest.skip("this host has no /dev/kvm")
    for kvm in (True, False):
        cell = await jailer.prepare(spec(kvm=kvm))
        device = Path(f"/proc/{cell.pid}/root/dev/kvm")
        assert device.exists() == kvm
        if kvm:
            assert os.stat(device).st_rdev == os.stat("/dev/kvm").st_rdev
            assert os.stat(device).st_mode & 0o777 == 0o666
        await cell.discard()
        await jailer.cgroups.remove(NUMBER)


async def test_a_jailed_vmm_uses_kvm_as_an_unjailed_one_does(
    jailer: Jailer, plain: Jailer, tmp_path: Path
) -> None:
    async def query(owner: Jailer) -> object:
        process = await run_bare(
            owner, tmp_path, "-accel", "kvm", "-sandbox", SANDBOX, machine="microvm", kvm=True
        )
        try:
            qmp = await Qmp.connect(tmp_path / "qmp.sock")
            await qmp.execute("cont")
            await asyncio.sleep(0.3)
            answer = (await qmp.execute("query-kvm"), await qmp.execute("query-status"))
            await qmp.close()
            return answer
        except VmmProtocolError:
            return None
        finally:
            await finish(owner, process)

    outside = await query(plain)
    if outside is None:
        pytest.skip("QEMU does not start with KVM on this host")
    assert await query(jailer) == outside
