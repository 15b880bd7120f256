"""A runner from a URL: checked against its pinned sha256, fetched once, and never kept when it is another."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from images.cache import Cache
from images.errors import BuildFailed, RecipeError
from images.events import BakeEvent, Step
from images.plan import _download

pytestmark = pytest.mark.anyio
BODY = b"a tarball" * 100_000


@contextlib.asynccontextmanager
async def serving(status: str = "200 OK") -> AsyncIterator[tuple[str, list[str]]]:
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().split()[1])
        writer.write(
            f"HTTP/1.1 {status}\r\ncontent-length: {len(BODY)}\r\nconnection: close\r\n\r\n".encode() + BODY
        )
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/runner.tar.gz", asked


@pytest.fixture
def events() -> list[BakeEvent]:
    return []


async def test_it_is_fetched_once_with_progress(tmp_path: Path, events: list[BakeEvent]) -> None:
    step, sha256 = Step("runner", events.append), hashlib.sha256(BODY).hexdigest()
    async with serving() as (url, asked):
        first = await _download(Cache(tmp_path), url, sha256, "r.yml", step)
        second = await _download(Cache(tmp_path), url, sha256, "r.yml", step)
    assert first == second
    assert first.read_bytes() == BODY
    assert asked == ["/runner.tar.gz"]
    assert [event.fraction for event in events if event.fraction][-1] == 1.0


async def test_another_content_is_refused_by_name_and_not_kept(
    tmp_path: Path, events: list[BakeEvent]
) -> None:
    step = Step("runner", events.append)
    async with serving() as (url, _):
        with pytest.raises(RecipeError, match=r"r\.yml.*has sha256 .* not the 0000"):
            await _download(Cache(tmp_path), url, "0" * 64, "r.yml", step)
    assert not [path for path in tmp_path.rglob("*") if path.name == "runner.tar.gz"]


async def test_a_server_that_has_it_not_is_told(tmp_path: Path, events: list[BakeEvent]) -> None:
    async with serving("404 Not Found") as (url, _):
        with pytest.raises(BuildFailed, match="could not download"):
            await _download(Cache(tmp_path), url, "0" * 64, "r.yml", Step("runner", events.append))
