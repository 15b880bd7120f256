"""``microvm frozen`` and ``microvm shell`` on a database alone: what is listed, and told when nothing is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner_service import audit
from runner_service.commands.access import note
from runner_service.settings import load
from runner_service.store import frozen_queries as fq
from runner_service.store.store import Store, sqlite_url
from tests.unit.runner_service.test_frozen import kept

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def microvm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner_service.cli", *arguments],
        env={**os.environ}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


async def test_what_is_kept_is_listed_and_what_is_not_is_a_sentence(tmp_path: Path) -> None:
    data = ("--data-dir", str(tmp_path))
    none = microvm("shell", *data, "x", "--", "true")
    assert none.returncode == 1 and "did the service ever run" in none.stderr
    async with Store.open(sqlite_url(tmp_path / "runner_service.db")) as store:
        await store.write(lambda db: fq.begin(db, kept(7, at=1.0, expires=9e9, size=3 << 20)))
        settings = load(environ={"MICROVM_DATA_DIR": str(tmp_path)})
        await note(settings, "frozen.shell", kept(7).id, job=kept(7).job_id, user="runner")
        (row,) = await store.read(lambda db: audit.entries(db, limit=9))
    assert (row.action, row.target, row.details) == (
        "frozen.shell",
        "vm-7",
        {"job": "github-7", "user": "runner"},
    )
    listed = microvm("frozen", *data)
    assert listed.returncode == 0 and "vm-7" in listed.stdout and "3.0" in listed.stdout
    assert '"job_id": "github-7"' in microvm("frozen", "--json", *data).stdout
    unknown = microvm("shell", *data, "nosuch", "--", "true")
    assert unknown.returncode == 1 and "nosuch" in unknown.stderr
    elsewhere = microvm("shell", *data, "vm-7", "--", "true")
    assert elsewhere.returncode == 1 and "host-1" in elsewhere.stderr
    missing = microvm("frozen", "rm", "vm-none", *data)
    assert missing.returncode == 1 and "vm-none" in missing.stderr
