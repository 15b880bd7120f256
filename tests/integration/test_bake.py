"""Recipes become templates on real VMs: warm, published whole or not at all, and found again."""

import asyncio
import io
import os
import signal
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from images.bake import Baked, bake
from images.catalog import Catalog, templates
from images.errors import BakeFailed, RecipeError
from images.events import BakeEvent
from images.recipe import load_recipe
from vmm_core.engine import Engine

SMALL = """
extends: minimal
machine: {memory: 256 MiB, disk: 1 GiB}
kernel_modules: []
"""

LISTENER = """#!/bin/sh
case "$1" in
    --version) echo 2.999.1 ;;
    warmup) id -un > /home/runner/warmed-up ;;
    *) exit 1 ;;
esac
"""


class Baker:
    """Bakes recipes written by a test, under names of their own, and removes what they made."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.directory = directory
        self.events: list[BakeEvent] = []
        self.digests: set[str] = set()

    def recipe(self, name: str, text: str) -> str:
        path = self.directory / f"{name}.yml"
        path.write_text(f"name: {name}\n{SMALL}{text}")
        return str(path)

    async def __call__(self, path: str, *, force: bool = False, **overrides: str) -> Baked:
        recipe = load_recipe(
            path, overrides={key.replace("__", "."): value for key, value in overrides.items()}
        )
        baked = await bake(self.engine, recipe, progress=self.events.append, force=force)
        self.digests.add(baked.snapshot.digest)
        return baked

    def steps(self) -> list[str]:
        return list(dict.fromkeys(event.step for event in self.events))


@pytest.fixture
async def baker(engine: Engine, tmp_path: Path) -> AsyncIterator[Baker]:
    # Names are unique to the run: a template left by an earlier run must not turn a bake into a hit.
    before = {snapshot.digest for snapshot in engine.snapshots.list()}
    yield Baker(engine, tmp_path)
    for snapshot in engine.snapshots.list():
        if snapshot.digest not in before:
            engine.snapshots.remove(snapshot.digest)


@pytest.fixture
def unique() -> Callable[[str], str]:
    return lambda stem: f"t-{stem}-{os.getpid()}-{time.time_ns() % 1_000_000}"


@pytest.fixture
def tarball(tmp_path: Path) -> Path:
    path = tmp_path / "runner.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("./bin/Runner.Listener")
        member.mode, member.size = 0o755, len(LISTENER)
        archive.addfile(member, io.BytesIO(LISTENER.encode()))
    return path


async def test_a_bake_runs_its_steps_and_its_forks_have_what_they_left(baker, unique, tarball):
    name = unique("full")
    path = baker.recipe(
        name,
        """
files:
  - {dest: /usr/share/greeting, content: "hello\\n", user: root}
  - {dest: /home/runner/deep/er/file, content: x, mode: "0600"}
warm:
  - {name: as runner, run: 'id -un > ~/who; echo a line; echo another >&2'}
  - {name: as root, user: root, env: {COLOUR: blue}, run: 'echo "$COLOUR" > /colour'}
page_cache: ["/usr/bin/git*", "/usr/lib/python3*/json/*"]
labels: [self-made]
""",
    )
    baked = await baker(path, runner__tarball=str(tarball))
    assert not baked.cache_hit
    names = [step for step, _ in baked.steps]
    assert names == [
        "check",
        "packages",
        "rootfs",
        "egress",
        "boot",
        "warm: as runner",
        "warm: as root",
        "runner",
        "settle",
        "snapshot",
    ]
    lines = [event.log for event in baker.events if event.step == "warm: as runner" and event.log]
    assert sorted(lines) == ["a line", "another"]

    (template,) = [one for one in templates(baker.engine) if one.name == name]
    assert template.digest == baked.snapshot.digest
    assert template.labels == (f"microvm-{name}", "microvm-1cpu-256mb", "self-made")
    assert (template.runner, template.runner_dir) == ("2.999.1", "/opt/actions-runner")
    assert template.machine.network.mode == "none"

    async with baker.engine.fork(name) as vm:
        script = "cat ~/who /colour /usr/share/greeting ~/warmed-up; stat -c '%U %a' ~/deep/er/file ~/deep; "
        script += "stat -c %U /opt/actions-runner/bin/Runner.Listener; id -u; hostname; command -v sudo; "
        script += "mount | grep ' / '"
        result = await vm.exec(script, timeout=60)
    said = result.stdout.decode().splitlines()
    assert said[:4] == ["runner", "blue", "hello", "runner"]
    assert said[4:8] == ["runner 600", "runner 755", "runner", "1000"]
    assert said[8] == vm.id
    assert len(said) == 10  # no sudo unless the recipe says so
    assert "ext4" in said[9]


async def test_the_same_inputs_are_a_hit_and_any_other_is_not(baker, unique):
    name = unique("hit")
    path = baker.recipe(name, "warm: [{name: one, run: 'true'}]\n")
    first = await baker(path)
    started = time.monotonic()
    second = await baker(path)
    assert time.monotonic() - started < 2
    assert second.cache_hit
    assert second.snapshot.digest == first.snapshot.digest
    baker.recipe(name, "warm: [{name: one, run: 'true # changed'}]\n")
    third = await baker(path)
    assert not third.cache_hit
    assert baker.engine.snapshots.names()[name] == third.snapshot.digest
    baker.recipe(name, "warm: [{name: one, run: 'true'}]\n")
    assert (await baker(path)).snapshot.digest == first.snapshot.digest
    assert baker.engine.snapshots.names()[name] == first.snapshot.digest
    forced = await baker(path, force=True)
    assert not forced.cache_hit
    assert forced.snapshot.digest != first.snapshot.digest
    assert (await baker(path)).snapshot.digest == forced.snapshot.digest
    meant = [row.digest for row in Catalog(baker.engine).history(name)]
    assert meant == [baked.snapshot.digest for baked in (forced, first, third, first)]


async def test_two_at_once_bake_once(baker, unique):
    path = baker.recipe(unique("twice"), "warm: [{name: one, run: 'true'}]\n")
    first, second = await asyncio.gather(baker(path), baker(path))
    assert first.snapshot.digest == second.snapshot.digest
    assert sorted((first.cache_hit, second.cache_hit)) == [False, True]
    assert any("waiting for another process" in event.message for event in baker.events)


@pytest.mark.usefixtures("nothing_left")
async def test_a_failing_step_names_itself_its_status_and_its_last_words(baker, unique):
    name = unique("fails")
    path = baker.recipe(name, "warm: [{name: break, run: 'seq 40; echo no such thing >&2; exit 7'}]\n")
    with pytest.raises(BakeFailed) as caught:
        await baker(path)
    error = caught.value
    assert (error.step, error.status) == ("warm: break", 7)
    assert len(error.output) == 20
    assert set(error.output) >= {"40", "no such thing"}
    assert "recipe" in error.advice
    assert name not in baker.engine.snapshots.names()


@pytest.mark.usefixtures("nothing_left")
async def test_a_step_that_takes_too_long_is_ended(baker, unique):
    path = baker.recipe(unique("slow"), "warm: [{name: sleep, timeout: 1, run: 'echo begun; sleep 60'}]\n")
    with pytest.raises(BakeFailed, match="raise its time-out") as caught:
        await baker(path)
    assert caught.value.output == ("begun",)


async def test_what_is_missing_is_said_before_anything_is_built(baker, unique):
    path = baker.recipe(unique("missing"), "runner: {tarball: nowhere.tar.gz}\n")
    with pytest.raises(RecipeError, match=r"nowhere\.tar\.gz"):
        await baker(path)
    assert baker.steps() == ["check"]
    unknown = baker.recipe(unique("unknown"), "packages: [no-such-package-at-all]\n")
    with pytest.raises(BakeFailed, match="no-such-package-at-all"):
        await baker(unknown)
    assert baker.steps() == ["check"]


async def test_a_disk_too_small_for_its_files_says_how_large(baker, unique):
    path = baker.recipe(unique("tiny"), "files: [{dest: /big, source: big}]\n")
    (baker.directory / "big").write_bytes(os.urandom(1 << 20) * 300)
    with pytest.raises(BakeFailed, match=r"Set machine\.disk to at least"):
        await baker(path, machine__disk="512 MiB")
    assert not list((baker.engine.data_dir / "cache" / "rootfs").glob(".*"))


async def test_a_bake_that_is_killed_leaves_nothing_that_looks_complete(baker, unique):
    name = unique("killed")
    path = baker.recipe(name, "warm: [{name: forever, run: 'echo it runs; sleep 600'}]\n")
    program = (
        "import asyncio, sys\n"
        "from images.bake import bake\n"
        "from images.recipe import load_recipe\n"
        "from vmm_core.engine import Engine\n"
        "async def main():\n"
        "    async with Engine.open(sys.argv[1]) as engine:\n"
        "        say = lambda event: print(event.log or event.message, flush=True)\n"
        "        await bake(engine, load_recipe(sys.argv[2]), progress=say)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(baker.engine.data_dir), path),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    async with asyncio.timeout(120):
        while b"it runs" not in await process.stdout.readline():
            pass
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert name not in baker.engine.snapshots.names()
    assert all(one.name != name for one in templates(baker.engine))
    # A machine outlives its owner, as every VM does; the next bake ends it.
    (orphan,) = [one for one in baker.engine.records() if one.metadata.get("recipe") == name]
    baker.recipe(name, "warm: [{name: quick, run: 'true'}]\n")
    assert not (await baker(path)).cache_hit
    assert orphan.id not in {one.id for one in baker.engine.records()}
