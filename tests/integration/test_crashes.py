"""SIGKILL at any moment: after a restart and two passes nothing is lost that should live, and nothing lives that
should be gone.

The moments are drawn from a seed that is printed; MICROVM_CRASH_SEED replays them, MICROVM_CRASHES says how many.
"""

import asyncio
import contextlib
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from pathlib import Path

import msgspec
import pytest

from images.bake import root_disk
from images.recipe import load_recipe
from scripts.programs.leftovers import Leftovers
from vmm_core.engine import Engine
from vmm_core.reaper import Reaper
from vmm_core.record import try_lock
from vmm_core.snapshot import MANIFEST
from vmm_core.vm import RunningVm

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="what is left behind is looked for on the whole host"),
]

CRASHES = int(os.environ.get("MICROVM_CRASHES", "10"))
SEED = int(os.environ.get("MICROVM_CRASH_SEED", str(random.SystemRandom().randrange(1 << 32))))
LIFE_SECONDS = 1.2
BOOT_EVERY = 3
# Programs that are killed one after the other and judged together.
TOGETHER = 2
PROGRAM = Path(__file__).with_name("crashing.py")
ROOT = Path(__file__).parents[2]
STEPS = ("resolve", "place", "disk", "memory", "spawn", "connect", "revive", "record", "done")
# Kinds that are told apart by slots, so that what others do on this host meanwhile is not taken for ours.
KINDS = (
    "process",
    "jailer",
    "claim",
    "control group",
    "firewall element",
    "network namespace",
    "network device",
)


class Life:
    """One run of the program, and what became of each VM as it was told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.states: dict[str, str] = {}
        self.said: list[str] = []

    @classmethod
    async def begin(cls, data_dir: Path, seed: int, boot: str, step: str = "") -> "Life":
        """Up to where it is ready to work."""
        argv = [sys.executable, str(PROGRAM), str(data_dir), str(seed), boot, step]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = asyncio.subprocess.PIPE
        life = cls(await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, env=environment))
        async with asyncio.timeout(60):
            while await life.hear() != "ready":
                pass
        return life

    async def hear(self) -> str:
        assert self.process.stdout is not None
        line = (await self.process.stdout.readline()).decode()
        if not line.endswith("\n"):
            return ""
        self.said.append(line.strip())
        word, *rest = line.split()
        if word in ("launched", "thawed"):
            self.states[rest[0]] = "lives"
        elif word in ("freezing", "frozen", "thawing", "destroying", "destroyed"):
            self.states[rest[0]] = word
        elif word == "executed":
            assert rest[0] == rest[1], "the wrong guest answered"
        assert word != "failed", line
        return word

    async def end(self, after: float | None) -> None:
        """Let it work and kill it ``after`` so many seconds, or wait until it kills itself."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        reading = asyncio.create_task(self._hear_all())
        try:
            async with asyncio.timeout(after or 30):
                await asyncio.shield(reading)
        except TimeoutError:
            self.process.kill()
        async with asyncio.timeout(30):
            await reading
            assert await self.process.wait() == -9, self.said

    async def _hear_all(self) -> None:
        while await self.hear():
            pass

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()


@contextlib.asynccontextmanager
async def begun(lives: Sequence[Coroutine[None, None, Life]]) -> AsyncGenerator["asyncio.Future[list[Life]]"]:
    """Lives that begin beside what is done meanwhile."""
    tasks = [asyncio.create_task(life) for life in lives]
    try:
        yield asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        for life in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(life, Life):
                life.kill()
                await life.process.wait()


async def judge(engine: Engine, reaper: Reaper, lives: Sequence[Life]) -> None:
    """The law, after these crashes."""
    states = {vm_id: state for life in lives for vm_id, state in life.states.items()}
    crashed = ours(Leftovers.look(engine))
    adopted = {vm.id: vm for vm in await engine.adopt()}
    await reaper.sweep()
    before = reaper.suspects
    await reaper.sweep()
    frozen = {each.id for each in engine.frozen()}
    for vm_id, state in states.items():
        here = (vm_id in adopted) + (vm_id in frozen)
        assert here <= 1, f"{vm_id} is there twice ({state})"
        if state == "lives":
            assert vm_id in adopted, f"{vm_id} is lost"
        elif state == "frozen":
            assert vm_id in frozen, f"{vm_id} is lost, which was frozen"
        elif state in ("freezing", "thawing"):
            assert here == 1, f"{vm_id} is lost, {state}"
        elif state == "destroyed":
            assert here == 0, f"{vm_id} is back"
    still = {orphan.key for orphan in await reaper.look()} & before
    assert not still, "seen on two passes, and there"
    await asyncio.gather(*(answers(vm) for vm in adopted.values()))
    for vm_id in frozen:
        vm = adopted[vm_id] = await engine.thaw(vm_id, ttl=300)
        await answers(vm)
    await asyncio.gather(*(vm.destroy() for vm in adopted.values()))
    assert not abandoned(engine)
    deadline = time.monotonic() + 5
    while left := crashed & ours(Leftovers.look(engine)):  # slots are scrubbed in the background
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.1)


async def answers(vm: RunningVm) -> None:
    assert (await vm.exec("hostname", timeout=30)).stdout.decode().strip() == vm.id


def ours(look: Leftovers) -> set[str]:
    found = {f"{kind}: {thing}" for kind in KINDS for thing in look.found[kind]}
    if look.found.get("control group"):  # tests of cells have groups of numbers that no slot has
        found = {thing for thing in found if not re.search(r"group: .*/(?:\d{6,}|probe-.*)$", thing)}
    return {thing for thing in found if "network" not in thing or re.search(r"\bmv-\d+", thing)}


def abandoned(engine: Engine) -> list[str]:
    """Directories of the pool that nobody holds any more."""
    pool = engine.pool
    drafts = [path for path in pool.staging.iterdir() if not alive(path)]
    halfway = [path for path in pool.snapshots.iterdir() if not (path / MANIFEST).exists()]
    return [
        *(str(path) for path in pool.vms.iterdir() if free(try_lock(path))),
        *(str(path) for path in drafts),
        *(str(path) for path in halfway if free(engine.snapshots.hold(path.name, alone=True))),
    ]


def alive(draft: Path) -> bool:
    """Whether the maker of a draft lives: its pid is in the name, or it holds the lock in it."""
    maker = re.fullmatch(r"snapshot-(\d+)-\w+", draft.name)
    return Path(f"/proc/{maker[1]}").exists() if maker else not free(try_lock(draft))


def free(lock: int | None) -> bool:
    if lock is not None:
        os.close(lock)
    return lock is not None


@pytest.fixture
async def reaper(engine: Engine) -> Reaper:
    """One that has removed what others have left on this host: it would hide what we leave."""
    made = await engine.reaper()
    await made.sweep()
    while await made.sweep():
        pass
    return made


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("minimal")
async def test_killed_at_a_step_of_a_fork(engine: Engine, reaper: Reaper, step: str) -> None:
    life = await Life.begin(engine.data_dir, 0, "-", step)
    try:
        await life.end(None)
        lives = len(life.states)
        halfway = len(list(engine.pool.vms.iterdir()))
        await judge(engine, reaper, [life])
    finally:
        life.kill()
    assert lives == 1
    assert halfway - lives == (step not in ("resolve", "place"))


@pytest.mark.usefixtures("minimal")
async def test_killed_at_random_moments(engine: Engine, reaper: Reaper) -> None:
    print(f"MICROVM_CRASH_SEED={SEED}")
    moments = random.Random(SEED)
    recipe = load_recipe("minimal")
    image = await root_disk(engine, recipe, progress=lambda _event: None)
    boot = msgspec.json.encode((image, recipe.machine), enc_hook=str).decode()
    async with contextlib.AsyncExitStack() as stack:

        async def begin(number: int) -> "asyncio.Future[list[Life]]":
            what = boot if number % BOOT_EVERY == 0 else "-"
            seeds = [moments.randrange(1 << 32) for _ in range(TOGETHER)]
            coming = [Life.begin(engine.data_dir, seed, what) for seed in seeds]
            return await stack.enter_async_context(begun(coming))

        coming = await begin(0)
        rounds, last = -(-CRASHES // TOGETHER), list[str]()
        for number in range(rounds):
            lives = await coming
            await asyncio.gather(*(life.end(moments.uniform(0, LIFE_SECONDS)) for life in lives))
            last += [line.split()[0] for life in lives for line in life.said[-1:]]
            if number + 1 < rounds:
                coming = await begin(number + 1)  # they start while these are judged
            try:
                await judge(engine, reaper, lives)
            except BaseException:
                for life in lives:
                    print(f"crash {number} of seed {SEED}:", *life.said[-12:], sep="\n  ")
                raise
    print("killed after:", *(f"{count} × {word}" for word, count in Counter(last).most_common()))
