"""The command line: quick help, one sentence per error, exit codes, the database when no service answers."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from runner_service.commands.show import for_terminal
from runner_service.store import bake_queries as bq
from runner_service.store.store import Store, sqlite_url
from tests.unit.runner_service.world import BAKES, World


def microvm(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner_service.cli", *arguments],
        capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", **(env or {})}, check=False,
    )  # fmt: skip


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    shown = microvm("--help")
    assert shown.returncode == 0
    for command in (
        "doctor", "bake", "templates", "run", "serve", "ps", "jobs", "why", "logs", "bakes", "kill", "drain", "reload",
    ):  # fmt: skip
        assert command in shown.stdout
    heavy = ("sqlalchemy", "litestar", "uvicorn", "vmm_core.engine", "images.bake", "httpx")
    code = f"import sys, runner_service.cli; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "minimal"], 2, "COMMAND"),
        (["run", "--env", "x", "minimal", "true"], 2, "NAME=VALUE"),
        (["bake", "minimal", "--set", "x"], 2, "KEY=VALUE"),
        (["bake", "no-such-recipe"], 2, "no-such-recipe"),
        (["serve", "--config", "/no/such/file.toml"], 2, "/no/such/file.toml"),
        (["jobs", "--data-dir", "/no/such/dir"], 1, "no database"),
        (["jobs", "--limit", "0"], 2, "--limit"),
        (["jobs", "--api", "http://127.0.0.1:1"], 2, "http://127.0.0.1:1"),
        (["bakes", "--data-dir", "/no/such/dir"], 1, "no database"),
        (["bakes", "log", "x"], 2, "'x'"),
        (["bakes", "--json", "log", "1"], 2, "microvm bakes log"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    if arguments[0] == "bake":
        arguments = [*arguments, "--data-dir", str(tmp_path)]
    failed = microvm(*arguments)
    assert failed.returncode == code, failed.stderr
    assert words in failed.stderr
    assert "Traceback" not in failed.stderr


def test_a_wrong_setting_stops_every_command(tmp_path: Path) -> None:
    (tmp_path / "microvm.toml").write_text("[runners]\nmax_vm = 1\n")
    failed = microvm("ps", env={"MICROVM_CONFIG": str(tmp_path / "microvm.toml")})
    assert failed.returncode == 2
    assert "microvm.toml: [runners]: unknown key 'max_vm', did you mean 'max_vms'?" in failed.stderr


async def _one_job(directory: Path) -> None:
    """And a bake that failed."""
    world = World(directory, bakes=msgspec.structs.replace(BAKES, attempts=1))
    refusal = {
        "error": "bake_failed",
        "step": "install",
        "message": "npm ci: \x1b[2Jexit 1",
        "advice": "Look at it.",
    }
    (directory / "bake.json").write_text(json.dumps([{"answer": refusal}]))
    async with world.running() as service:
        world.forge.queue()
        await world.push("o/r", "main", "1" * 40, "locks")
        await world.until_quiet()
        async with asyncio.timeout(20):
            while not [
                b
                for b in await service.store.read(lambda db: bq.list_bakes(db, limit=1))
                if b.state == "failed"
            ]:
                await asyncio.sleep(0.05)
    await world.host.close()


def test_without_a_service_the_database_and_the_log_files_are_read(tmp_path: Path) -> None:
    asyncio.run(_one_job(tmp_path))
    (tmp_path / "service.db").rename(tmp_path / "runner_service.db")
    at = ("--data-dir", str(tmp_path))
    (job,) = json.loads(microvm("jobs", "--json", *at).stdout)
    assert job["state"] == "completed" and job["conclusion"] == "success"
    story = json.loads(microvm("why", job["id"], "--json", *at).stdout)
    assert story["timeline"][0]["step"] == "queued" and story["timeline"][-1]["step"] == "gone"
    assert "forking" in microvm("why", "1", *at).stdout
    assert microvm("logs", "1", *at).stdout.endswith("hello from the job\ndone\n")
    unknown = microvm("why", "99", *at)
    assert unknown.returncode == 1 and "no job '99'" in unknown.stderr
    assert json.loads(microvm("jobs", "--json", *at).stdout) == [job]
    (bake,) = json.loads(microvm("bakes", "--json", *at).stdout)
    assert (bake["state"], bake["code"]) == ("failed", "bake_failed")
    shown = microvm("bakes", *at).stdout
    assert "o/r@main" in shown and "install: npm ci: exit 1 — Look at it." in shown and "\x1b[2J" not in shown
    assert "install: npm ci" in microvm("bakes", "log", str(bake["id"]), *at).stdout
    unknown = microvm("bakes", "log", "99", *at)
    assert unknown.returncode == 1 and "no bake 99" in unknown.stderr


def test_reading_a_database_that_another_version_wrote_is_refused(tmp_path: Path) -> None:
    async def spoil() -> None:
        import sqlalchemy as sa

        async with Store.open(sqlite_url(tmp_path / "runner_service.db")) as store, store.writing() as db:
            await db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))

    asyncio.run(spoil())
    failed = microvm("jobs", "--data-dir", str(tmp_path))
    assert failed.returncode == 1 and "9999" in failed.stderr


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b[31mred\x1b[0m\n\ttext", b"\x1b[31mred\x1b[0m\n\ttext"),
        (b"a\x1b[2Jb\x1b[1;1Hc", b"abc"),
        (b"a\x1b]0;title\x07b", b"ab"),
        (b"a\x1bPdevice\x1b\\b", b"ab"),
        (b"a\x07\x08\x00b\r\n", b"ab\r\n"),
        ("häß".encode(), "häß".encode()),
        ("a\x9b2Jb".encode(), b"a2Jb"),
    ],
)
def test_a_terminal_gets_text_and_colours_only(raw: bytes, shown: bytes) -> None:
    assert for_terminal(raw) == shown
