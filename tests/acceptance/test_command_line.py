"""``microvm`` as people and scripts call it: its own process, real VMs, exit codes, output byte for byte."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scripts.programs.stage import TEMPLATE, Stage
from tests.acceptance.conftest import PATIENCE, eventually, gone, queue, running, vms
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

MICROVM = Path(sys.executable).with_name("microvm")


class Ended(NamedTuple):
    """A finished command."""

    code: int
    out: bytes
    error: str

    def json(self) -> Any:
        assert self.code == 0, self.error
        return json.loads(self.out)


async def started(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        MICROVM, *arguments, stdin=options.pop("stdin", pipe), stdout=pipe, stderr=pipe, **options
    )


async def microvm(*arguments: str, given: bytes = b"", **options: Any) -> Ended:
    process = await started(*arguments, **options)
    async with asyncio.timeout(PATIENCE):
        out, error = await process.communicate(given)
    assert process.returncode is not None
    assert b"Traceback" not in error, error.decode()
    return Ended(process.returncode, out, error.decode())


@pytest.fixture
def data(data_dir: Path) -> tuple[str, str]:
    return ("--data-dir", str(data_dir))


def one_sentence(ended: Ended) -> str:
    """What went wrong, as a user reads it."""
    lines = ended.error.strip().splitlines()
    assert lines, "not a word on stderr"
    assert lines[-1].startswith("microvm: "), ended.error
    return " ".join(lines)


# ── this host ────────────────────────────────────────────────────────────────────────────────────


async def test_help_tells_every_command() -> None:
    shown = await microvm("--help")
    assert shown.code == 0
    for command in ("doctor", "bake", "templates", "run", "serve", "ps", "jobs", "why", "logs", "kill"):
        assert command in shown.out.decode()
        assert (await microvm(command, "--help")).code == 0
    assert b"microvm" in (await microvm("--version")).out


async def test_doctor_tells_what_the_host_offers(data: tuple[str, str]) -> None:
    findings = {one["name"]: one for one in (await microvm("doctor", "--json", *data)).json()}
    assert findings["vmm"]["ok"] is True
    assert "QEMU" in findings["vmm"]["detail"]
    assert {"acceleration", "pool", "memory", "rights", "network", "jail", "cgroup"} <= set(findings)
    assert all(one["advice"] for one in findings.values() if one["ok"] is False)
    table = await microvm("doctor", *data)
    assert (table.code, b"QEMU" in table.out) == (0, True)


async def test_templates_lists_what_was_baked(
    data: tuple[str, str], template: Snapshot, tmp_path: Path
) -> None:
    listed = {one["name"]: one for one in (await microvm("templates", "--json", *data)).json()}
    assert listed[TEMPLATE]["digest"] == template.digest
    assert TEMPLATE in (await microvm("templates", *data)).out.decode()
    nothing = await microvm("templates", "--json", "--data-dir", str(tmp_path / "none"))
    assert nothing.json() == []


# ── run ──────────────────────────────────────────────────────────────────────────────────────────


async def test_run_passes_input_output_and_status_through(data: tuple[str, str], template: Snapshot) -> None:
    blob = os.urandom(1 << 20)
    echoed = await microvm("run", *data, TEMPLATE, "--", "cat", given=blob)
    assert (echoed.code, echoed.error) == (0, "")
    assert echoed.out == blob
    apart = await microvm("run", *data, TEMPLATE, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert apart == (7, b"out\n", "err\n")
    options = ("--env", "A=b c", "--cwd", "/tmp", "--user", "root")
    dressed = await microvm("run", *data, *options, TEMPLATE, "--", "sh", "-c", "echo $A; pwd; id -un")
    assert dressed == (0, b"b c\n/tmp\nroot\n", "")


async def test_run_ends_a_command_that_takes_too_long(data: tuple[str, str], template: Snapshot) -> None:
    late = await microvm("run", *data, "--timeout", "1", TEMPLATE, "--", "sleep", "60")
    assert late.code == 124


async def test_run_of_a_command_that_is_not_there(data: tuple[str, str], template: Snapshot) -> None:
    missing = await microvm("run", *data, TEMPLATE, "--", "/no/such/command")
    assert missing.code in (1, 127)
    assert "/no/such/command" in one_sentence(missing)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_command_and_its_vm(
    engine: Engine, data: tuple[str, str], template: Snapshot, number: int
) -> None:
    before = {record.id for record in engine.records()}
    process = await started("run", *data, TEMPLATE, "--", "sh", "-c", "echo up; sleep 600")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), PATIENCE) == b"up\n"
    assert {record.id for record in engine.records()} - before
    process.send_signal(number)
    out, error = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert (process.returncode, out, error) == (128 + number, b"", b"")
    assert {record.id for record in engine.records()} <= before


async def test_run_killed_outright_leaves_a_vm_that_the_service_takes_away(
    stage: Stage, engine: Engine, data: tuple[str, str], template: Snapshot
) -> None:
    process = await started("run", *data, TEMPLATE, "--", "sh", "-c", "echo up; sleep 600")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readline(), PATIENCE)
    (vm,) = [record.id for record in engine.records() if record.metadata.get("purpose") == "run"]
    process.kill()
    await process.communicate()
    await eventually(lambda: vm not in {record.id for record in engine.records()}, "the orphan is reaped")


async def test_run_into_a_closed_pipe_leaves_nothing(
    engine: Engine, data: tuple[str, str], template: Snapshot
) -> None:
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        MICROVM, "run", *data, TEMPLATE, "--", "yes", stdin=subprocess.DEVNULL, stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(writing)
    await asyncio.to_thread(os.read, reading, 100)
    os.close(reading)
    _, error = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 141
    assert b"Traceback" not in error


async def test_an_option_after_the_template_is_not_taken_for_the_command(data: tuple[str, str]) -> None:
    misplaced = await microvm("run", TEMPLATE, *data, "--", "true")
    assert misplaced.code == 2
    assert "--data-dir" in misplaced.error
    assert "before" in misplaced.error


async def test_an_unknown_template_is_a_sentence(data: tuple[str, str], template: Snapshot) -> None:
    unknown = await microvm("run", *data, "github-runer", "--", "true")
    assert unknown.code == 1
    assert "github-runer" in one_sentence(unknown)
    assert TEMPLATE in one_sentence(unknown), "the close match is named"


# ── the service ──────────────────────────────────────────────────────────────────────────────────


async def test_looking_at_the_service_and_ordering_it(stage: Stage, engine: Engine) -> None:
    config = ("--config", str(stage.config))
    job = await queue(stage, "hold")
    story = await running(stage, job)
    (vm,) = [
        one for one in (await microvm("ps", "--json", *config)).json() if one["job"] == story["job"]["id"]
    ]
    assert vm["id"] == story["job"]["vm"]
    assert vm["id"] in (await microvm("ps", *config)).out.decode()

    (shown,) = [
        one for one in (await microvm("jobs", "--json", *config)).json() if one["id"] == story["job"]["id"]
    ]
    assert (shown["state"], shown["vm"], shown["labels"]) == ("in_progress", vm["id"], ["microvm"])
    assert story["job"]["id"] in (await microvm("jobs", *config)).out.decode()

    why = (await microvm("why", str(job.id), "--json", *config)).json()
    assert [row["step"] for row in why["timeline"]][:2] == ["queued", "wanted"]
    assert "forked" in (await microvm("why", story["job"]["id"], *config)).out.decode()
    await stage.forge.wait_for_log(job, "holding\n", PATIENCE)
    assert b"Running job: hold" in (await microvm("logs", str(job.id), *config)).out

    follower = await started("logs", "-f", str(job.id), *config)
    killed = await microvm("kill", vm["id"], *config)
    assert killed.code == 0
    out, _ = await asyncio.wait_for(follower.communicate(), PATIENCE)
    assert (follower.returncode, b"Running job: hold" in out) == (0, True)
    story = await gone(stage, job)
    assert not vms(engine)
    for command in ("why", "logs", "kill"):
        missing = await microvm(command, "no-such-thing", *config)
        assert missing.code == 1
        assert "no-such-thing" in one_sentence(missing)
    await stage.forge.wait_for(job, "completed", 60)


async def test_without_the_service_its_database_answers(stage: Stage) -> None:
    config = ("--config", str(stage.config))
    job = await queue(stage, "hello")
    await gone(stage, job)
    await stage.stop()
    try:
        why = (await microvm("why", str(job.id), "--json", *config)).json()
        assert why["job"]["conclusion"] == "success"
        assert b"hello from" in (await microvm("logs", str(job.id), *config)).out
        assert (await microvm("ps", "--json", *config)).json() == []
    finally:
        await stage.start()


# ── what is wrong is told ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[runners]\nmax_vmss = 1\n", ["[runners]", "max_vmss", "max_vms"]),
        ("[runners]\nmax_vms = 'many'\n", ["[runners]", "max_vms", "int"]),
        ("[service]\nlog_format = 'xml'\n", ["log_format", "auto", "json", "console"]),
        ("[servise]\n", ["[servise]", "service"]),
        ("[service\n", ["not valid TOML"]),
    ],
)
async def test_a_wrong_setting_is_named_with_its_file_and_what_is_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    config = tmp_path / "wrong.toml"
    config.write_text(text)
    for command in (("serve",), ("jobs",), ("run", TEMPLATE, "--", "true")):
        wrong = await microvm(command[0], "--config", str(config), *command[1:])
        assert wrong.code == 2
        for word in [str(config), *words]:
            assert word in one_sentence(wrong)


@pytest.fixture
def path_without_qemu(tmp_path: Path) -> Iterator[str]:
    """Every program of this host but QEMU."""
    bare = tmp_path / "bin"
    bare.mkdir()
    for directory in ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            if not program.name.startswith("qemu") and not (bare / program.name).exists():
                (bare / program.name).symlink_to(program)
    yield str(bare)


async def test_without_qemu_a_sentence_says_what_to_do(
    data: tuple[str, str], template: Snapshot, path_without_qemu: str
) -> None:
    environment = {**os.environ, "PATH": path_without_qemu}
    run = await microvm("run", *data, TEMPLATE, "--", "true", env=environment)
    assert run.code == 1
    assert "qemu" in one_sentence(run).lower()
    assert "install" in one_sentence(run)
    doctor = await microvm("doctor", "--json", *data, env=environment)
    assert doctor.code == 1
    (vmm,) = [one for one in json.loads(doctor.out) if one["name"] == "vmm"]
    assert (vmm["ok"], "install" in vmm["advice"]) == (False, True)


async def test_a_data_directory_on_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=True)
    try:
        with (full / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))
        for command in (("run", "minimal", "--", "true"), ("serve",)):
            ended = await microvm(command[0], "--data-dir", str(full), *command[1:])
            assert ended.code == 1
            assert str(full) in one_sentence(ended)
    finally:
        subprocess.run(["umount", "-R", "-l", str(full)], check=True)
