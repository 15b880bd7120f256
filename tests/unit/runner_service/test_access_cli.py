"""``microvm tokens`` and ``audit``; which token a command sends where."""

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import structlog

from runner_service import audit, client, tokens
from runner_service.access import Failures, Gate
from runner_service.api import Api
from runner_service.client import NotThereError
from runner_service.commands import access, service
from runner_service.settings import Service as ServiceSettings
from runner_service.settings import Settings, SettingsError
from runner_service.store.store import Store, StoreError, sqlite_url
from tests.unit.runner_service.test_cli import microvm
from tests.unit.runner_service.test_serving import served
from tests.unit.runner_service.world import Service, World

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What commands print is looked at; the log of the service that runs beside them is not theirs."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    yield
    structlog.reset_defaults()


def settings_of(directory: Path) -> Settings:
    return Settings(service=ServiceSettings(data_dir=str(directory)))


@asynccontextmanager
async def demanding(service: Service) -> AsyncIterator[str]:
    """A service on a real port that demands tokens; its address."""
    gate = Gate(
        service.store, local_is_trusted=False, open_metrics=False, refused=service.metrics.refused,
        failures=Failures(),
    )  # fmt: skip

    async def vms() -> list[object]:
        return []

    api = Api(store=service.store, logs=service.logs, bake_logs=service.bake_logs, metrics=service.metrics,
              readiness=None, vms=vms, kill=service.scheduler.kill, gate=gate)  # fmt: skip  # pyright: ignore
    async with served(api.app()) as (host, port):
        yield f"http://{host}:{port}"


async def test_tokens_of_this_hosts_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(tmp_path)
    await access.create(settings, None, "ci", "read", 30, as_json=False)
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert tokens.well_formed(token) and token not in shown.err and "not shown again" in shown.err
    await access.create(settings, None, "ops", "operate", None, as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert made["name"] == "ops" and made["expires_at"] is None and tokens.well_formed(made["token"])
    await access.listing(settings, None, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["scope"]) for one in listed] == [("ci", "read"), ("ops", "operate")]
    assert listed[0]["expires_at"] == pytest.approx(time.time() + 30 * 86400, abs=60)
    await access.revoke(settings, None, "ci")
    with pytest.raises(tokens.TokenError, match="microvm tokens list"):
        await access.revoke(settings, None, "ci")
    capsys.readouterr()
    await access.audit_log(settings, None, 10, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [(row["action"], row["target"]) for row in rows] == [
        ("token.revoke", "ci"), ("token.create", "ops"), ("token.create", "ci"),
    ]  # fmt: skip
    assert rows[0]["who"] == audit.local() and token not in str(rows)
    await access.listing(settings, None, as_json=False)
    await access.audit_log(settings, None, 10, as_json=False)
    assert "ops" in capsys.readouterr().out


async def test_tokens_of_a_service_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path / "world")
    async with world.running() as running, demanding(running) as url:
        made = await running.store.write(
            lambda db: tokens.create(db, name="boss", scope="admin", days=1, who="test")
        )
        file = tmp_path / "token"
        file.touch(mode=0o600)
        file.write_text(made.token + "\n")
        settings = msgspec.structs.replace(settings_of(tmp_path), token_file=file)
        await access.create(settings, url, "far", "read", 1, as_json=False)
        assert tokens.well_formed(capsys.readouterr().out.strip())
        await access.listing(settings, url, as_json=True)
        assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["boss", "far"]
        with pytest.raises(NotThereError, match="already"):
            await access.create(settings, url, "far", "read", None, as_json=False)
        await access.revoke(settings, url, "far")
        await access.audit_log(settings, url, 1, as_json=True)
        assert json.loads(capsys.readouterr().out.partition("\n")[2])[0]["who"] == "boss"
        with pytest.raises(NotThereError, match="token"):
            await access.listing(settings_of(tmp_path), url, as_json=True)


async def test_the_hosts_own_token_goes_to_its_own_service_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MICROVM_API_TOKEN_FILE", raising=False)
    world = World(tmp_path / "world")
    data = tmp_path / "data"
    data.mkdir()
    async with world.running() as running, demanding(running) as url:
        await tokens.keep_local(running.store, data, "h")
        settings = settings_of(data)
        told = client.ServiceAnswer(url, os.getpid())
        (data / client.SERVICE_FILE).write_bytes(msgspec.json.encode(told))
        await service.ps(settings, None, as_json=True)
        assert json.loads(capsys.readouterr().out) == []
        with pytest.raises(NotThereError, match="Bearer"):
            await service.ps(settings, url, as_json=True)
        monkeypatch.setenv("MICROVM_API_TOKEN_FILE", str(data / client.TOKEN_FILE))
        await service.ps(settings, url, as_json=True)
        (data / client.TOKEN_FILE).chmod(0o644)
        with pytest.raises(SettingsError, match="chmod 600"):
            await service.ps(settings, url, as_json=True)


async def test_what_a_command_does_by_itself_is_noted_with_what_came_of_it(tmp_path: Path) -> None:
    async def right() -> int:
        return 7

    async def wrong() -> int:
        raise NotThereError("there is no such thing")

    settings = settings_of(tmp_path)
    assert await access.noted(settings, right(), "template.prune", "", keep=2) == 7
    with pytest.raises(NotThereError):
        await access.noted(settings, wrong(), "template.promote", "python-ci")
    with pytest.raises(NotThereError):
        await access.noted(settings_of(tmp_path / "nowhere"), wrong(), "template.promote", "python-ci")
    assert not (tmp_path / "nowhere").exists()
    async with Store.open(sqlite_url(tmp_path / "runner_service.db")) as store:
        last, first = await store.read(lambda db: audit.entries(db, limit=10))
    assert (first.who, first.action, first.details, first.outcome) == (
        audit.local(), "template.prune", {"keep": 2}, "done",
    )  # fmt: skip
    assert (last.action, last.target, last.outcome) == (
        "template.promote", "python-ci", "there is no such thing",
    )  # fmt: skip


async def test_an_audit_log_that_cannot_be_written_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def right() -> int:
        return 0

    (tmp_path / "runner_service.db").mkdir()
    assert await access.noted(settings_of(tmp_path), right(), "template.pin", "x") == 0
    assert "audit log" in capsys.readouterr().err
    with pytest.raises(StoreError):  # what must not happen without its row
        await access.note(settings_of(tmp_path), "frozen.shell", "vm-1")


def test_the_commands_as_they_are_typed(tmp_path: Path) -> None:
    where = ["--data-dir", str(tmp_path)]
    made = microvm("tokens", "create", "ci", "--scope", "read", *where)
    assert made.returncode == 0 and tokens.well_formed(made.stdout.strip())
    again = microvm("tokens", "create", "ci", "--scope", "read", *where)
    assert again.returncode == 1 and "already" in again.stderr and "Traceback" not in again.stderr
    assert microvm("tokens", "create", "ci", *where).returncode == 2
    assert microvm("tokens", "create", "a b", "--scope", "read", *where).returncode == 1
    missing = microvm("jobs", "--api", "http://127.0.0.1:1", "--token-file", str(tmp_path / "none"))
    assert missing.returncode == 2 and "none" in missing.stderr
