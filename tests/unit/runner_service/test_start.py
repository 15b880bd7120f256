"""A service that cannot start says why in one sentence, and shows no secret."""

from pathlib import Path

import pytest

from runner_service import client, daemon
from runner_service.settings import Service, Settings, SettingsError
from runner_service.store.store import Store, StoreError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("below", ["", "deeper"])
async def test_a_data_directory_that_cannot_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" / below
    with pytest.raises(SettingsError, match=r"cannot use the data directory .*data_dir"):
        await daemon.serve(Settings(service=Service(data_dir=str(directory))))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://u:hush@h/d", ["'mysql'", "sqlite:///FILE"]),
        ("postgresql+asyncpg://u:hush@h/d", ["'postgresql+asyncpg'", "postgresql://"]),
        ("postgresql://u:hush@h:port/d", ["'postgresql'", "allowed"]),
        ("hush", ["no URL", "allowed"]),
        ("sqlite://", ["FILE"]),
        ("sqlite:////proc/nope/x.db", ["/proc/nope/x.db"]),
    ],
)
async def test_a_database_that_cannot_be(url: str, words: list[str]) -> None:
    with pytest.raises(StoreError) as raised:
        async with Store.open(url):
            pass
    for word in words:
        assert word in str(raised.value)
    assert "hush" not in str(raised.value)


async def test_a_plain_sqlite_url(tmp_path: Path) -> None:
    async with Store.open(f"sqlite:///{tmp_path}/x.db") as store:
        assert store.url.drivername == "sqlite+aiosqlite"
    assert (tmp_path / "x.db").exists()


async def test_the_local_service_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    http = client.http_client(Settings(), None, "http://127.0.0.1:2", client.httpx.Timeout(1.0))
    assert not http._mounts
    await http.aclose()
