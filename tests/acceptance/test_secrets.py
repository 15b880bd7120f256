"""Secrets are nowhere they do not belong: the just-in-time configuration, the webhook secret, the forge's token.

While a job runs, everything that another user, a log reader, a later fork or a thief of the disk could see is
searched. Each place is first shown to be searched at all: what is known to stand in it must be found there.
"""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from scripts.programs.stage import Stage
from tests.acceptance.conftest import gone, queue, running, vms
from tests.standins.github_runners import jit_config
from vmm_core.disk import data_extents
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

_CHUNK = 8 << 20
_WINDOW = 40
Places = Mapping[str, Iterable[bytes]]


def search(places: Places, needles: Iterable[bytes]) -> list[str]:
    """Where any of the needles stands, as ``place: needle``."""
    wanted = list(needles)
    assert wanted
    assert min(map(len, wanted)) >= 8, "too short to be found by anything but chance"
    found: set[str] = set()
    for place, pieces in places.items():
        rest = b""
        for piece in pieces:
            text = rest + piece
            found.update(f"{place}: {needle[:24]!r}…" for needle in wanted if needle in text)
            rest = text[-max(map(len, wanted)) :]
    return sorted(found)


def contents(path: Path) -> Iterator[bytes]:
    """The data of a file that may be sparse and large; nothing when it has gone meanwhile."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        for start, end in data_extents(fd, os.fstat(fd).st_size):
            for offset in range(start, end, _CHUNK):
                yield os.pread(fd, min(_CHUNK, end - offset), offset)
    finally:
        os.close(fd)


def processes() -> dict[str, list[bytes]]:
    """Command line and environment of every process of this host."""
    found: dict[str, list[bytes]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            for name in ("cmdline", "environ"):
                try:
                    data = (entry / name).read_bytes()
                except OSError:
                    continue  # it ended between two looks
                found[f"{name} of {entry.name}"] = [data, data.replace(b"\0", b" ")]
    return found


def forms(secret: bytes) -> set[bytes]:
    """The secret itself and its base64, wherever in a longer text it was encoded."""
    found = {secret}
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + secret)
        # The first and last group hold bits of what stands around it.
        found.add(encoded[4:-4])
    return found


def windows(text: bytes) -> set[bytes]:
    """Pieces of a long text: enough of them that no part of it of twice the size could be missed."""
    return {text[at : at + _WINDOW] for at in range(0, len(text) - _WINDOW, _WINDOW)}


def jit_needles(encoded: str) -> set[bytes]:
    """All that is secret in a just-in-time configuration: whole, in part, and decoded."""
    outer: dict[str, str] = json.loads(base64.b64decode(encoded))
    key = json.loads(base64.b64decode(outer[".credentials_rsaparams"]))
    client = json.loads(base64.b64decode(outer[".credentials"]))["data"]["clientId"]
    found = windows(encoded.encode()) | forms(key["secret"].encode()) | forms(client.encode())
    for name in (".credentials", ".credentials_rsaparams"):
        found |= windows(outer[name].encode())
    return found


async def places(stage: Stage, engine: Engine, job: int) -> dict[str, Iterable[bytes]]:
    """What lies outside the guest and could hold what it should not, as it is now; but for the snapshots."""
    found: dict[str, Iterable[bytes]] = {**processes()}
    work = stage.config.parent
    files = [stage.log, *work.glob("service.db*")]
    files += [path for path in (engine.data_dir / "logs").rglob("*") if path.is_file()]
    files += list(engine.data_dir.glob("*.json"))
    for vm in vms(engine):
        # The VM's own disk is the guest's: the runner's files stand there, and go with it.
        files += [
            path for path in (engine.pool.vms / vm).iterdir() if path.is_file() and path.name != "disk.img"
        ]
    found |= {str(path): contents(path) for path in files}
    for path in (
        "/metrics",
        "/jobs",
        f"/jobs/{job}",
        f"/jobs/{job}/log",
        "/vms",
        "/readyz",
        "/schema/openapi.json",
    ):
        answer = await stage.http.get(path)
        found[f"GET {path}"] = [answer.content, repr(answer.headers).encode()]
    return found


async def test_the_configuration_and_the_secrets_are_nowhere_outside_the_guest(
    stage: Stage, engine: Engine, template: Snapshot
) -> None:
    job = await queue(stage, "hold")
    story = await running(stage, job)
    (runner,) = [one for one in stage.forge.actions.runners.values() if one.name == story["job"]["runner"]]
    encoded = jit_config(runner, stage.forge.guest_url)
    needles = jit_needles(encoded)
    for secret in (stage.forge.webhooks.secret, stage.forge.token, job.token):
        needles |= forms(secret.encode())
    vm = vms(engine)[story["job"]["vm"]]

    snapshot = {path.name: contents(path) for path in template.path.iterdir()}
    # Kept in a name: a failing assertion shows its parts, and those hold other people's environment.
    leaks = search({**await places(stage, engine, job.id), **snapshot}, needles)
    assert not leaks

    # The guest has them, or the job would not run: what is searched for is what was really used.
    fetched = {"the disk of the VM": contents(engine.pool.vms / vm.id / "disk.img")}
    memory = {"the memory of the service": _memory(stage.service.pid)}
    used = search(fetched, needles) or search({"the memory of the VM": _memory(vm.pid)}, needles)
    assert used
    held = search(memory, forms(stage.forge.token.encode()))
    assert held

    # And every place was really searched: the runner's name is in all that speak of it …
    named = search(await places(stage, engine, job.id), [runner.name.encode()])
    for place in (
        str(stage.log),
        "service.db",
        "vm.json",
        "/vms:",
        f"GET /jobs/{job.id}:",
        f"/jobs/{job.id}/log",
        "/jobs:",
    ):
        assert any(place in line for line in named), f"{place} was not searched: {named}"
    argv = search(processes(), [str(stage.config).encode()])
    assert any("cmdline of " in line for line in argv)
    # … and what was baked is in the snapshot.
    baked = search(
        {path.name: contents(path) for path in template.path.iterdir()}, [b"The stand-in runner is warm."]
    )
    assert {line.partition(":")[0] for line in baked} >= {"disk.img", "memory.img"}

    stage.forge.actions.cancel(job.run)
    await gone(stage, job)
    leaks = search(await places(stage, engine, job.id), needles)
    assert not leaks


async def test_a_planted_secret_would_be_found(stage: Stage, tmp_path: Path) -> None:
    runner = stage.forge.actions.register("repository", "octo-org", "hello", "planted", ["microvm"], "_work")
    encoded = jit_config(runner, stage.forge.guest_url)
    needles = jit_needles(encoded)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    planted = {
        "argv": subprocess.Popen([*sleeper, encoded]),
        "environment": subprocess.Popen(sleeper, env={"LEAK": runner.secret}),
        "a part": subprocess.Popen([*sleeper, f"x{encoded[333:433]}y"]),
        "a file of it": subprocess.Popen([*sleeper, base64.b64encode(f'a"{runner.secret}"'.encode())]),
    }
    try:
        for kind, process in planted.items():
            _until_executed(process.pid)
            lines = [line for line in search(processes(), needles) if f" of {process.pid}:" in line]
            assert lines, f"{kind} was not found"
        # Far into a sparse file, and across the border of two reads.
        sparse = tmp_path / "memory.img"
        with sparse.open("wb") as file:
            file.seek(64 << 20)
            file.write(bytes(_CHUNK - 10) + runner.secret.encode() + bytes(100))
        assert search({"sparse": contents(sparse)}, needles)
        assert not search({"nothing": [os.urandom(1 << 20)]}, needles)
    finally:
        for process in planted.values():
            process.kill()
            process.wait()
        stage.forge.actions.delete_runner(runner)


def _until_executed(pid: int) -> None:
    deadline = time.monotonic() + 30
    while b"time.sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _memory(pid: int) -> Iterator[bytes]:
    """The writable private memory of a process."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            borders, rights = line.split()[:2]
            start, end = (int(border, 16) for border in borders.split("-"))
            if not rights.startswith("rw"):
                continue
            for offset in range(start, end, _CHUNK):
                try:
                    memory.seek(offset)
                    yield memory.read(min(_CHUNK, end - offset))
                except (OSError, ValueError, OverflowError):
                    break
