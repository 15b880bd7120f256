"""What a job's VM cost and how it ended: kept with the job, shown, counted by repository, forgotten in time."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from prometheus_client import generate_latest

from runner_service import views
from runner_service.commands import service as commands
from runner_service.commands import show
from runner_service.domain import Ending
from runner_service.facts import spent
from runner_service.store import queries as q
from runner_service.telemetry import OTHER, Metrics, Names
from tests.unit.runner_service.world import World, until
from vmm_core.machine import MachineSpec, VmEvent, VmExit, VmRecord, VmUsage

pytestmark = pytest.mark.anyio
MIB = 1 << 20
USAGE = VmUsage(
    private_dirty_bytes=90 * MIB,
    shared_bytes=40 * MIB,
    pss_bytes=100 * MIB,
    vmm_private_bytes=20 * MIB,
    cpu_seconds=12.5,
    disk_private_bytes=33 * MIB,
    disk_read_bytes=5 * MIB,
    disk_write_bytes=44 * MIB,
    net_sent_bytes=MIB,
    net_received_bytes=2 * MIB,
    peak_bytes=110 * MIB,
)
PANIC = VmExit(
    kind="exited",
    code=0,
    cause="guest_panic",
    reason="the guest's kernel panicked: out of ideas",
    console_tail="tail",
    panic="Kernel panic - not syncing: out of ideas\nCall Trace:",
    events=(VmEvent(1.0, "SHUTDOWN", "guest=true reason=guest-reset"),),
    usage=USAGE,
)


async def test_a_vm_that_dies_leaves_its_evidence_and_cost_with_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        await until(lambda: world.host.machines and job.runs)
        (machine,) = world.host.machines.values()
        machine.end(PANIC)
        async with asyncio.timeout(10):
            while not (story := await service.story(job.id)).runners or story.runners[0].state != "gone":
                await asyncio.sleep(0.02)
        text = generate_latest(service.metrics.registry).decode()
    runner = story.runners[0]
    assert runner.ending == PANIC
    assert runner.usage == USAGE
    assert story.job.usage == USAGE
    assert runner.code == "vm_died"
    assert "out of ideas" in (runner.reason or "")
    commands.print_evidence(runner)
    shown = capsys.readouterr().out
    assert "guest_panic (status 0)" in shown
    assert "SHUTDOWN guest=true reason=guest-reset" in shown
    assert "console Kernel panic - not syncing: out of ideas" in shown
    assert 'microvm_vm_ends_total{cause="guest_panic"} 1.0' in text
    assert f'microvm_repository_cpu_seconds_total{{repository="{story.job.repository}"}} 12.5' in text
    # What the API sends and the command line reads is the same.
    again = msgspec.json.decode(msgspec.json.encode(story), type=views.Story)
    assert again.runners[0].ending == PANIC


async def test_an_ordinary_end_tells_the_cost_and_no_evidence(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue()
        await world.until_quiet()
        story = await service.story(job.id)
    runner = story.runners[0]
    assert runner.ending is not None
    assert runner.ending.cause == "destroyed"
    assert runner.usage == world.host.usage
    (line,) = [line for line in story.timeline if line.step == "destroyed"]
    assert "it took 1.5 s of CPU, 64 MiB of memory of its own" in line.reason
    assert commands.shown_runners(story) == []


async def test_a_guest_that_ran_out_of_memory_is_told_in_the_story(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.guest_oom = "Out of memory: Killed process 7 (cc1plus)"
    async with world.running() as service:
        job = world.forge.queue()
        await world.until_quiet()
        story = await service.story(job.id)
    assert [line.reason for line in story.timeline if line.step == "guest out of memory"] == [
        "Out of memory: Killed process 7 (cc1plus)"
    ]
    assert len(commands.shown_runners(story)) == 1


async def test_a_vm_that_ended_while_no_service_ran_is_told_by_what_it_left(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        job = world.forge.queue(seconds=30)
        async with asyncio.timeout(10):
            while (await service.story(job.id)).job.runner_state != "busy":
                await asyncio.sleep(0.02)
        (machine,) = world.host.machines.values()
    machine.end(PANIC)
    world.host.endings[machine.record.id] = PANIC
    async with world.running() as service:
        async with asyncio.timeout(10):
            while (story := await service.story(job.id)).runners[0].state != "gone":
                await asyncio.sleep(0.02)
    assert story.runners[0].ending == PANIC
    assert "did not survive the restart of the service: the guest's kernel panicked" in (
        story.runners[0].reason or ""
    )


async def test_evidence_expires_with_the_job(tmp_path: Path) -> None:
    world = World(tmp_path)
    early, late = Ending("early", time.time(), PANIC), Ending("late", time.time() + 100, PANIC)
    async with world.running() as service:
        for ending in (early, msgspec.structs.replace(late, exit=VmExit(kind="exited")), late):
            await service.store.write(lambda db, ending=ending: q.keep_endings(db, [ending]))
        assert await service.store.read(lambda db: q.endings_of(db, ["early", "late"])) == {
            "early": early,
            "late": late,
        }
        await service.store.write(lambda db: q.forget(db, early.at + 50))
        kept = await service.store.read(lambda db: q.endings_of(db, ["early", "late"]))
    assert kept == {"late": late}


def test_label_values_are_few() -> None:
    names = Names(most=3)
    assert [names.of(name) for name in ("a", "b", "a", "c", "d", "b", None)] == [
        "a", "b", "a", "c", OTHER, "b", OTHER,
    ]  # fmt: skip
    metrics = Metrics()
    for number in range(1000):
        metrics.spent(f"owner/repo-{number}", PANIC, since=0.0, now=1.0)
    series = [
        line
        for line in generate_latest(metrics.registry).decode().splitlines()
        if line.startswith("microvm_repository_cpu_seconds_total{")
    ]
    assert len(series) == 201
    (other,) = [line for line in series if 'repository="other"' in line]
    assert float(other.rpartition(" ")[2]) == 800 * 12.5


def _value(text: str, series: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    return float(line.rpartition(" ")[2])


def test_running_vms_are_summed_by_template_and_gone_ones_are_gone() -> None:
    metrics = Metrics()
    metrics.live([("a", USAGE), ("a", USAGE), ("b", None)], {"a": 100 * MIB})
    text = generate_latest(metrics.registry).decode()
    assert _value(text, 'microvm_vm_memory_bytes{kind="private",template="a"}') == 2 * 90 * MIB
    assert 'microvm_vms_live{template="b"} 1.0' in text
    assert 'microvm_template_need_bytes{template="a"}' in text
    metrics.live([], {})
    assert 'template="a"' not in generate_latest(metrics.registry).decode()


def test_a_vm_is_shown_with_all_it_costs_and_its_tags() -> None:
    record = VmRecord(
        id="vm-1", pid=1, start_ticks=1, machine=MachineSpec(), accel="tcg", parent=None, template="t",
        created_at=1.0, expires_at=2.0, metadata={"repository": "acme/app"},
    )  # fmt: skip
    view = views.vm_view(record, None, USAGE)
    assert all(getattr(view, name) == getattr(USAGE, name) for name in VmUsage.__struct_fields__)
    assert view.metadata == {"repository": "acme/app"}
    assert views.vm_view(record).pss_bytes is None
    assert views.read_usage(msgspec.structs.replace(record, pid=2**22 + 1), Path("/nowhere")) is None


def test_sizes_and_times_are_short() -> None:
    assert show.both(MIB, 2 * MIB + MIB // 2) == "1.0/2.5"
    assert show.both(None, 1) == "-"
    assert show.seconds(None) == "-"
    assert show.left(0.0) == "0s"
    assert "over the network" in spent(USAGE)
    assert "network" not in spent(VmUsage())
