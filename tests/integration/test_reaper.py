"""What outlives its service and what does not: adopted, ended at its time, or removed when seen on two passes."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from scripts.programs.leftovers import Leftovers
from vmm_core import cgroup
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot
from vmm_core.network.addresses import slot
from vmm_core.processes import of_uid, one
from vmm_core.reaper import Reaper
from vmm_core.record import host_boot

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="slots and jails need root"),
]

ROOT = Path(__file__).parents[2]
LINES = 60

OWNER = """
import asyncio, json, sys
from scripts.programs.leftovers import Leftovers
from vmm_core import cgroup
from vmm_core.engine import Engine
from vmm_core.machine import EgressRule

async def main(data, template, ttl, allow, script):
    async with Engine.open(data, slots=True) as engine:
        rules = [EgressRule(*rule) for rule in json.loads(allow)]
        vm = await engine.launch(template, ttl=float(ttl), allow=rules or None)
        print(vm.id, flush=True)
        process = await vm.start(["/bin/sh", "-c", script], exec_id="job")
        async for piece in process.output():
            print(piece.offset + len(piece.data), flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""

# A machine of another data directory: a program in a cell of a slot that is claimed for it, and then nobody.
STRANGER = """
import asyncio, json, sys, time
from pathlib import Path
from vmm_core.berths import open_berths
from vmm_core.machine import MachineSpec

async def main(data, vm):
    async with open_berths(Path(data), "/bin/sleep", kvm=False, slots=True) as berths:
        berth = await berths.take(MachineSpec(vcpus=1, memory_mib=64, disk_mib=64), Path(vm))
        process = await berth.cell.run(["/bin/sleep", "60"], deadline=time.time() + 60)
        print(json.dumps([berth.slot.number, process.pid, process.start_ticks]), flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@asynccontextmanager
async def running(program: str, *arguments: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def heard(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line = await process.stdout.readline()
    assert line, "it ended early"
    return line.decode().strip()


async def until(met: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not met():
            await asyncio.sleep(0.02)


async def gone(number: int) -> None:
    """Nothing is left of a slot: its namespace, its control groups, processes of its uid."""
    place = slot(number)
    named = [Path(f"/run/netns/{place.netns}"), *cgroup.find().group(number)]
    await until(lambda: not of_uid(place.uid) and not any(path.exists() for path in named), 10)


async def test_a_vm_ends_at_its_time_though_nothing_runs(engine: Engine, minimal: Snapshot) -> None:
    ttl = 5.0
    before = time.time()
    async with running(OWNER, str(engine.data_dir), minimal.digest, str(ttl), "[]", "true") as owner:
        vm_id = await heard(owner)
        owner.kill()
    (record,) = [record for record in engine.records() if record.id == vm_id]
    assert record.slot is not None
    assert before + ttl < record.expires_at < time.time() + ttl

    def ended() -> bool:
        return one(record.pid, record.start_ticks) is None

    await asyncio.sleep(max(0.0, record.expires_at - time.time() - 1.0))
    assert not ended(), "it has a second left"
    await until(ended, 3.0)
    assert record.expires_at - 0.1 < time.time() < record.expires_at + 1.5
    assert (engine.pool.vms / vm_id).exists(), "nobody was there to remove it"

    assert vm_id not in [vm.id for vm in await engine.adopt()]
    assert not (engine.pool.vms / vm_id).exists()
    ending = engine.ending(vm_id)
    assert ending is not None
    assert ending.kind == "expired"
    await until(lambda: not of_uid(slot(record.slot or 0).uid), 5)


async def test_a_jailed_vm_is_adopted_with_its_stream_and_its_network(
    engine: Engine, networked: Snapshot
) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello from the host\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    allow = [["forge.test", 80, f"127.0.0.1:{port}"]]
    script = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); sleep 0.03; done"
    seen = 0
    arguments = (str(engine.data_dir), networked.digest, "300", json.dumps(allow), script)
    async with server, running(OWNER, *arguments) as owner:
        vm_id = await heard(owner)
        while seen < 60:
            seen = int(await heard(owner))
        owner.kill()
        await owner.wait()
        (record,) = [record for record in engine.records() if record.id == vm_id]
        reaper = await engine.reaper()
        for _ in range(3):  # what waits for adoption is no orphan
            assert not [orphan for orphan in await reaper.sweep() if orphan.name in (vm_id, str(record.slot))]

        (vm,) = [vm for vm in await engine.adopt() if vm.id == vm_id]
        assert (vm.record.pid, vm.record.start_ticks) == (record.pid, record.start_ticks)
        assert one(record.pid, record.start_ticks)
        assert vm.record.slot == record.slot is not None
        process = await vm.attach("job", stdout_from=seen)
        rest = (await process.collect(max_bytes=1 << 20)).stdout
        whole = "".join(f"line {number}\n" for number in range(LINES)).encode()
        assert rest == whole[seen:], "a gap, or something twice"

        said = await vm.exec(connect("forge.test", 80))
        assert said.stdout == b"hello from the host\n", said.stderr
        assert (await vm.exec(connect("forge.test", 81))).code != 0
        assert (await vm.exec(connect("10.0.2.2", port))).code != 0
        await vm.destroy()
    assert record.slot is not None
    await until(lambda: not of_uid(slot(record.slot or 0).uid), 5)


def connect(host: str, port: int) -> list[str]:
    script = f"import socket; s = socket.create_connection(({host!r}, {port}), 2); print(s.recv(99).decode(), end='')"
    return ["python3", "-c", script]


async def test_a_vm_of_another_data_directory_lives_until_its_time_has_passed(
    engine: Engine, minimal: Snapshot, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reaper = await engine.reaper()
    directory = tmp_path / "pool" / "vms" / "vm-elsewhere"
    directory.mkdir(parents=True)
    async with running(STRANGER, str(tmp_path), str(directory)) as owner:
        number, pid, ticks = json.loads(await heard(owner))
        facts = {"pid": pid, "start_ticks": ticks, "host_boot": host_boot(), "expires_at": time.time() + 60}
        record = directory / "vm.json"
        record.write_text(json.dumps(facts))
        owner.kill()
    await three_passes(reaper, number)
    assert one(pid, ticks), "it waits for its own engine"

    record.write_text(json.dumps({**facts, "expires_at": time.time() - 1}))
    caplog.clear()
    assert str(number) not in [orphan.name for orphan in await reaper.sweep()]
    assert one(pid, ticks)
    assert str(number) in [orphan.name for orphan in await reaper.sweep()]
    assert one(pid, ticks) is None
    await gone(number)
    lines = [line.getMessage() for line in caplog.records if f"kind=slot name={number} " in line.getMessage()]
    assert len(lines) == 1
    assert "time to live has passed" in lines[0]


async def test_a_start_that_was_cut_short_takes_its_slot_along(
    engine: Engine, minimal: Snapshot, tmp_path: Path
) -> None:
    reaper = await engine.reaper()
    directory = tmp_path / "pool" / "vms" / "vm-elsewhere"
    directory.mkdir(parents=True)
    async with running(STRANGER, str(tmp_path), str(directory)) as owner:
        number, pid, ticks = json.loads(await heard(owner))
        await three_passes(reaper, number)
        assert one(pid, ticks), "its owner lives"
        assert not left_of(engine, number, pid)
        owner.kill()
    directory.rmdir()
    assert left_of(engine, number, pid) >= {"process", "claim", "network namespace"}
    await reaper.sweep()
    assert one(pid, ticks), "seen once"
    assert str(number) in [orphan.name for orphan in await reaper.sweep()]
    assert one(pid, ticks) is None
    await gone(number)


def left_of(engine: Engine, number: int, pid: int) -> set[str]:
    """The kinds of leftovers that are of this slot and this process."""
    found = Leftovers.look(engine).found
    return {
        *(["process"] if any(line.startswith(f"{pid} ") for line in found["process"]) else []),
        *(["claim"] if any(line.startswith(f"slot {number} ") for line in found["claim"]) else []),
        *(
            ["control group"]
            if any(line.endswith(f"microvm/{number}") for line in found["control group"])
            else []
        ),
        *(["network namespace"] if f"name mv-{number}" in found["network namespace"] else []),
    }


async def three_passes(reaper: Reaper, number: int) -> None:
    for _ in range(3):
        assert str(number) not in [orphan.name for orphan in await reaper.sweep()]


async def test_what_living_engines_have_is_left_alone(engine: Engine, minimal: Snapshot) -> None:
    reaper = await engine.reaper()
    async with (
        running(OWNER, str(engine.data_dir), minimal.digest, "300", "[]", "sleep 60") as owner,
        engine.fork(minimal) as own,
    ):
        other = await heard(owner)
        records = {record.id: record for record in engine.records()}
        kept = {own.id, other, *(str(record.slot) for record in records.values())}
        for _ in range(3):
            assert not [orphan for orphan in await reaper.sweep() if orphan.name in kept]
        assert (await own.exec("echo fine")).stdout == b"fine\n"
        assert one(records[other].pid, records[other].start_ticks)
        owner.kill()
        await owner.wait()
        assert other in [vm.id for vm in await engine.adopt()]
        for vm in engine.vms():
            if vm.id == other:
                assert (await vm.exec("echo fine")).stdout == b"fine\n"
                await vm.destroy()


async def test_an_engine_reaps_by_itself_when_asked(
    engine: Engine, minimal: Snapshot, tmp_path: Path
) -> None:
    directory = engine.pool.vms / "vm-halfmade"
    directory.mkdir()
    async with Engine.open(engine.data_dir):
        await asyncio.sleep(0.5)
        assert directory.exists(), "one that lives for a moment does not reap"
    async with Engine.open(engine.data_dir, reap_every=0.2):
        await until(lambda: not directory.exists(), 20)
