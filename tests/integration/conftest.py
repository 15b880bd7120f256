"""Real VMs: one engine for the session and a template baked from the ``minimal`` recipe."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from images.bake import bake
from images.recipe import load_recipe
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot


@pytest.fixture(scope="session")
async def engine(data_dir: Path) -> AsyncIterator[Engine]:
    async with Engine.open(data_dir) as opened:
        for vm in await opened.adopt():  # an earlier run that was killed
            await vm.destroy()
        yield opened
        for vm in opened.vms():
            await vm.destroy()


@pytest.fixture(scope="session")
async def minimal(engine: Engine) -> Snapshot:
    return (await bake(engine, load_recipe("minimal"), progress=lambda _event: None)).snapshot


def open_files() -> set[str]:
    """What this process has open, without what comes and goes with threads and the loop."""
    found: set[str] = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    return found


def vmm_processes(engine: Engine) -> list[int]:
    """Every process on this host whose working directory is a VM of this engine's pool."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                directory = os.readlink(entry / "cwd")
            except OSError:
                continue
            if directory.startswith(f"{engine.pool.vms}/"):
                found.append(int(entry.name))
    return found


@pytest.fixture
def nothing_left(engine: Engine) -> Iterator[None]:
    """After the test there are no more VMs, VMM processes and open files than before it."""
    before = (set(engine.pool.vms.iterdir()), set(vmm_processes(engine)))
    yield
    assert set(engine.pool.vms.iterdir()) <= before[0]
    assert set(vmm_processes(engine)) <= before[1]
