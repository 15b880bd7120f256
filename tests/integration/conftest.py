"""Real VMs: one engine for the session and a template baked from the ``minimal`` recipe."""

import contextlib
import os
import re
from collections import Counter
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
        for frozen in opened.frozen():
            await opened.discard(frozen.id)
        yield opened
        for vm in opened.vms():
            await vm.destroy()


@pytest.fixture(scope="session")
async def minimal(engine: Engine) -> Snapshot:
    return (await bake(engine, load_recipe("minimal"), progress=lambda _event: None)).snapshot


@pytest.fixture(scope="session")
async def networked(engine: Engine) -> Snapshot:
    """A template with a network card."""
    path = engine.data_dir / "networked.yml"
    path.write_text("name: networked\nextends: minimal\negress: [placeholder.test:80]\n")
    return (await bake(engine, load_recipe(str(path)), progress=lambda _event: None)).snapshot


def open_files() -> Counter[str]:
    """How many of each kind of file this process has open (numbers come and go with threads and the loop)."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{fd}"))] += 1
    return found


def vmm_processes(engine: Engine) -> list[int]:
    """Every VMM and relay of this engine's pool: by its disk, which a jailed one has open, or its directory."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                held = [entry / "cwd"]
                if (entry / "comm").read_text().startswith("qemu-system"):
                    held += (entry / "fd").iterdir()
                if any(_inside(path, engine.pool.vms) for path in held):
                    found.append(int(entry.name))
    return found


def _inside(link: Path, directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link).startswith(f"{directory}/")
    return False


@pytest.fixture
def nothing_left(engine: Engine) -> Iterator[None]:
    """After the test there are no more VMs, VMM processes and open files than before it."""
    before = (set(engine.pool.vms.iterdir()), set(vmm_processes(engine)))
    yield
    assert set(engine.pool.vms.iterdir()) <= before[0]
    assert set(vmm_processes(engine)) <= before[1]
