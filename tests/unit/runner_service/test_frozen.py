"""VMs of failed jobs: frozen when a repository wants that, kept for a time and within limits, removed for certain."""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook.errors import Unavailable
from runner_service import audit
from runner_service.commands.shell import command, why_not
from runner_service.domain import Job
from runner_service.frozen import result_in, surplus
from runner_service.settings import Frozen as FrozenSettings
from runner_service.settings import Settings
from runner_service.store import frozen_queries as fq
from runner_service.store.frozen_queries import KeptVm
from tests.unit.runner_service.world import RUNNERS, Service, World, until
from vmm_core.errors import PoolFull, UnknownVm
from vmm_core.machine import Frozen

pytestmark = pytest.mark.anyio
KEEP = FrozenSettings(repositories=("O/R",), ttl_h=1.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def kept(number: int, *, at: float = 0.0, expires: float = 100.0, size: int | None = 1) -> KeptVm:
    return KeptVm(
        id=f"vm-{number}", host="host-1", job_id=f"github-{number}", runner_id="microvm-1", repository="o/r",
        owner="o", folder="/w", state="frozen", digest="d", bytes=size, created_at=at, expires_at=expires,
    )  # fmt: skip


# ── what is to go ────────────────────────────────────────────────────────────────────────────────


def test_overdue_ones_go_then_the_oldest_beyond_a_limit() -> None:
    rows = [kept(1, at=1), kept(2, at=2, expires=10), kept(3, at=3), kept(4, at=4)]
    gone = surplus(rows, 50.0, most=2, most_bytes=100)
    assert [(row.id, why) for row, why in gone] == [
        ("vm-2", "its time had passed"),
        ("vm-1", "the limit of 2 frozen VMs was reached: the oldest goes first"),
    ]
    (big,) = surplus([kept(1, size=3 << 20)], 0.0, most=9, most_bytes=2 << 20)
    assert big[1] == "the limit of 2 MiB of frozen VMs was reached: the oldest goes first"


_rows = st.lists(
    st.builds(
        kept,
        st.integers(0, 99),
        at=st.floats(0, 100),
        expires=st.floats(0, 200),
        size=st.one_of(st.none(), st.integers(0, 10)),
    ),
    unique_by=lambda row: row.id,
    max_size=12,
)


@given(_rows, st.integers(1, 5), st.integers(1, 20))
def test_what_stays_is_in_time_within_the_limits_and_the_newest(
    rows: list[KeptVm], most: int, size: int
) -> None:
    now = 100.0
    going = {row.id for row, _ in surplus(rows, now, most=most, most_bytes=size)}
    stay = [row for row in rows if row.id not in going]
    assert all(row.expires_at > now for row in stay)
    assert len(stay) <= most and sum(row.bytes or 0 for row in stay) <= size
    in_time = [row for row in rows if row.expires_at > now]
    for gone in (row for row in in_time if row.id in going):
        assert all((gone.created_at, gone.id) < (row.created_at, row.id) for row in stay), (
            "the oldest go first"
        )
        # It was necessary: with it (and all that are newer) a limit would not be met.
        newer = [row for row in in_time if (row.created_at, row.id) >= (gone.created_at, gone.id)]
        assert len(newer) > most or sum(row.bytes or 0 for row in newer) > size


def test_the_runners_own_words_are_read_from_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert result_in(log) is None
    log.write_bytes(b"Running job: test\n")
    assert result_in(log) is None
    log.write_bytes(b"x" * 100_000 + b"\n2026: Job test (3.11, a) completed with result: Failed\nbye\n")
    assert result_in(log) == "failure"
    log.write_bytes(log.read_bytes() + b"Job other completed with result: Succeeded\n")
    assert result_in(log) == "success"


def test_a_shell_begins_in_the_jobs_folder_and_on_a_terminal_in_a_pseudo_terminal(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    inner = command(f"{tmp_path}/work", ["sh", "-c", "pwd; echo $0 $1", "a b", "c"], terminal=False)
    done = subprocess.run(inner, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"{tmp_path}/work\na b c\n"
    missing = subprocess.run(
        command("/no/such", ["true"], terminal=False), capture_output=True, text=True, timeout=30, check=True
    )
    assert "/no/such" in missing.stderr
    on_terminal = command(f"{tmp_path}/work", ["sh", "-c", "tty; pwd; exit 3"], terminal=True)
    done = subprocess.run(on_terminal, input="", capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3
    assert "/dev/pts/" in done.stdout and f"{tmp_path}/work" in done.stdout
    killed = command("/", ["sh", "-c", "kill -9 $$"], terminal=True)
    assert subprocess.run(killed, input=b"", capture_output=True, timeout=30, check=False).returncode == 137


@pytest.mark.parametrize(
    ("state", "conclusion", "patterns", "words"),
    [
        ("in_progress", None, ("o/*",), "is in_progress"),
        ("completed", "success", ("o/*",), "succeeded"),
        ("completed", "failure", (), "[frozen]"),
        ("completed", "failure", ("O/r",), "microvm why github-1"),
    ],
)
def test_why_there_is_nothing_to_open(
    state: str, conclusion: str | None, patterns: tuple[str, ...], words: str
) -> None:
    job = Job(
        id="github-1", forge="github", forge_job_id="1", owner="o", repo="r", scope_kind="repository",
        scope_path="o/r", labels=(), state=state, conclusion=conclusion, event_at=0, updated_at=0,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    assert words in why_not(job, Settings(frozen=FrozenSettings(repositories=patterns)))


# ── the whole way ────────────────────────────────────────────────────────────────────────────────


async def rows_of(service: Service) -> list[KeptVm]:
    return await service.store.read(lambda db: fq.kept_on(db, "host-1"))


async def eventually(met: Callable[[], Awaitable[object]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await met():
            await asyncio.sleep(0.02)


async def steps_of(service: Service, job: str) -> list[str]:
    return [line.step for line in (await service.story(job)).timeline]


async def test_a_failed_jobs_vm_is_frozen_after_its_registration_is_gone(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP)
    async with world.running() as service:
        job = world.forge.queue(fails=True)
        await world.until_quiet()
        (row,) = await rows_of(service)
        story = await service.story(job.id)
        steps = [line.step for line in story.timeline]
    (vm_id,) = world.host.frozen
    assert (row.id, row.state, row.job_id, row.owner) == (vm_id, "frozen", f"github-{job.id}", "o")
    assert row.digest == world.host.frozen[vm_id].digest
    assert row.expires_at == pytest.approx(time.time() + 3600, abs=60)
    assert steps.index("deregistered") < steps.index("frozen") < steps.index("gone")
    assert "destroyed" not in steps
    assert any(f"microvm shell github-{job.id}" in line.reason for line in story.timeline)
    assert world.effects.index("before freeze") > max(
        number for number, effect in enumerate(world.effects) if effect == "before deregister"
    )


@pytest.mark.parametrize(
    ("frozen", "more"),
    [
        (None, {"fails": True}),
        (FrozenSettings(repositories=("o/other", "p/*")), {"fails": True}),
        (KEEP, {}),
    ],
)
async def test_others_are_destroyed(
    tmp_path: Path, frozen: FrozenSettings | None, more: dict[str, object]
) -> None:
    world = World(tmp_path, frozen=frozen)
    async with world.running() as service:
        job = world.forge.queue(**more)
        await world.until_quiet()
        assert "destroyed" in await steps_of(service, job.id)
        assert not await rows_of(service)
    assert not world.host.frozen and "before freeze" not in world.effects


async def test_without_an_event_the_forge_is_asked_once(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP)
    world.mangle = lambda event: [] if event.state == "completed" else [event]
    async with world.running() as service:
        job = world.forge.queue(fails=True)
        await world.until_quiet()
        assert "frozen" in await steps_of(service, job.id)


async def test_without_event_and_forge_the_runners_words_count(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP)
    world.mangle = lambda event: [] if event.state == "completed" else [event]
    world.forge.faults["job"] = [Unavailable("502", status=502, retryable=True) for _ in range(2)]
    async with world.running() as service:
        job = world.forge.queue(fails=True, seconds=0.5, output=b"Job test completed with result: Failed\n")
        await until(lambda: world.host.frozen)
        world.forge.faults.clear()
        await world.until_quiet(20)
        assert "frozen" in await steps_of(service, job.id)


async def test_a_registration_that_stays_keeps_the_vm_from_being_frozen(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP, runners=msgspec.structs.replace(RUNNERS, retire_limit_s=1))
    trouble = [Unavailable("502", status=502, retryable=True) for _ in range(50)]
    world.forge.faults["deregister"] = trouble
    async with world.running() as service:
        job = world.forge.queue(fails=True)
        await eventually(lambda: _has(service, job.id, "gone"))
        assert "not frozen" in await steps_of(service, job.id)
        assert "destroyed" in await steps_of(service, job.id)
    assert not world.host.frozen


async def _has(service: Service, job: str, step: str) -> bool:
    return step in await steps_of(service, job)


async def test_a_vm_that_cannot_be_frozen_is_told_and_destroyed(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP)
    world.host.freeze_errors = [PoolFull("the disk pool is full")]
    async with world.running() as service:
        job = world.forge.queue(fails=True)
        await world.until_quiet()
        story = await service.story(job.id)
        assert not await rows_of(service)
    (told,) = [line for line in story.timeline if line.step == "not frozen"]
    assert "the disk pool is full" in told.reason
    assert not world.host.frozen and not world.host.machines


async def test_at_its_time_it_goes_also_when_no_service_ran_then(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=msgspec.structs.replace(KEEP, ttl_h=1.5 / 3600))
    async with world.running():
        world.forge.queue(fails=True)
        await world.until_quiet()
        assert world.host.frozen
    await asyncio.sleep(1.6)
    assert world.host.frozen, "the stand-in has no clock of its own"
    world.effects.clear()
    async with world.running() as service:
        assert not world.host.frozen, "gone before anything else was done"
        assert world.effects.index("discard") < world.effects.index("adopt")
        assert not await rows_of(service)
        world.forge.queue(fails=True)
        await until(lambda: world.host.frozen)
        await until(lambda: not world.host.frozen)
        await eventually(lambda: _none_left(service))
        await world.until_quiet()


async def _none_left(service: Service) -> bool:
    return not await rows_of(service)


async def test_beyond_the_limit_the_oldest_goes(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=msgspec.structs.replace(KEEP, most=2))
    async with world.running() as service:
        jobs = []
        for _ in range(4):
            jobs.append(world.forge.queue(fails=True))
            await world.until_quiet()
        await until(lambda: len(world.host.frozen) == 2)
        await eventually(lambda: _only(service, [f"github-{job.id}" for job in jobs[2:]]))


async def _only(service: Service, jobs: list[str]) -> bool:
    return [row.job_id for row in await rows_of(service)] == jobs


async def test_sizes_are_measured_and_limited(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=msgspec.structs.replace(KEEP, most_mib=15))
    async with world.running() as service:
        for _ in range(2):
            world.forge.queue(fails=True)
            await world.until_quiet()
        assert len(world.host.frozen) == 2
        await until(lambda: len(world.host.frozen) == 1, 10)
        (row,) = [one for one in await rows_of(service) if one.state == "frozen"]
        assert row.bytes == world.host.frozen_bytes
        await eventually(lambda: _audited(service, "frozen.remove", "limit"))


async def _audited(service: Service, action: str, why: str) -> bool:
    log = await service.store.read(lambda db: audit.entries(db, limit=9))
    return any(row.action == action and why in row.details["why"] for row in log)


async def test_an_operator_removes_one(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP)
    async with world.running() as service:
        job = world.forge.queue(fails=True)
        await world.until_quiet()
        (vm_id,) = world.host.frozen
        log = await service.store.read(lambda db: audit.entries(db, limit=9))
        assert [(row.who, row.action, row.target) for row in log] == [
            ("service host-1", "frozen.freeze", vm_id)
        ]
        await service.freezer.remove(vm_id, "removed by an operator")
        assert not world.host.frozen and not await rows_of(service)
        row = await service.store.read(lambda db: fq.find(db, f"github-{job.id}"))
        assert row is not None and (row.state, row.why) == ("removed", "removed by an operator")
        with pytest.raises(UnknownVm, match="microvm frozen"):
            await service.freezer.remove(vm_id, "again")
        with pytest.raises(UnknownVm):
            await service.freezer.remove("vm-none", "again")


async def test_frozen_vms_without_a_row_are_discarded_unless_somebody_wants_them_back(tmp_path: Path) -> None:
    world = World(tmp_path, frozen=KEEP)
    async with world.running() as service:
        job = world.forge.queue(seconds=1.0)
        await until(lambda: job.runs)
        (machine,) = world.host.machines.values()
        wanted_back = machine.record
        strange = {"program": "of somebody else"}
        for number, metadata in enumerate(
            (wanted_back.metadata, {**wanted_back.metadata, "runner_id": "microvm-gone"}, strange)
        ):
            record = msgspec.structs.replace(wanted_back, id=f"vm-x{number}", metadata=metadata)
            world.host.frozen[record.id] = Frozen("d", record, 0.0, time.time() + 60)
        await service.freezer.sweep()
        assert set(world.host.frozen) == {"vm-x0", "vm-x2"}
        await world.until_quiet()
        await service.freezer.sweep()
        assert set(world.host.frozen) == {"vm-x2"}


async def test_killed_at_any_moment_rows_and_files_agree_and_nothing_is_left_at_the_end(
    tmp_path: Path,
) -> None:
    settings = msgspec.structs.replace(KEEP, most=1)
    (tmp_path / "clean").mkdir()
    clean = World(tmp_path / "clean", frozen=settings)
    async with clean.running() as service:
        await _freeze_and_remove(clean, service)
    begin = clean.effects.index("before freeze") - 4
    for number in range(begin, len(clean.effects) + 1):
        (tmp_path / str(number)).mkdir()
        world = World(tmp_path / str(number), frozen=settings)
        world.kill_at = number
        async with world.running() as service:
            await _freeze_and_remove(world, service)
        at = world.effects[-1]
        world.kill_at = None
        async with world.running() as service:
            await world.until_quiet()
            await service.freezer.sweep()
            rows = await rows_of(service)
            assert [row.state for row in rows] in ([], ["frozen"]), f"killed at {number} ({at})"
            assert {row.id for row in rows} == set(world.host.frozen), f"killed at {number} ({at})"
            assert not world.host.machines
            for row in rows:
                await service.freezer.remove(row.id, "the end")
            assert not world.host.frozen


async def _freeze_and_remove(world: World, service: Service) -> None:
    """A job fails and its VM is kept, then removed; or the service is killed on the way."""
    world.forge.queue(fails=True)
    await world.until_quiet()
    for vm_id in list(world.host.frozen):
        if not world.dead.is_set():
            try:
                await service.freezer.remove(vm_id, "removed")
            except BaseException:
                assert world.dead.is_set()
