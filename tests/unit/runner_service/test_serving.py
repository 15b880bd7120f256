"""The service's HTTP over real sockets: peers that send endless heads, slowly, or nothing, do not stay."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from litestar import Litestar, Request, Response, post

from runner_service import serving
from runner_service.api import webhooks_alone
from runner_service.claims import address_of, announce
from runner_service.client import SERVICE_FILE, ServiceAnswer

pytestmark = pytest.mark.anyio


@post("/echo", request_max_body_size=None)
async def echo(request: Request) -> Response[bytes]:
    body = b"".join([chunk async for chunk in request.stream()])
    return Response(str(len(body)).encode(), media_type="text/plain")


@asynccontextmanager
async def served(app: Litestar | None = None) -> AsyncIterator[tuple[str, int]]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = serving.Server(serving.config(app or Litestar([echo], openapi_config=None, logging_config=None)))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        await task


async def closed_within(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            while await reader.read(65536):
                pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    try:
        writer.write(data)
        await writer.drain()
    except ConnectionError:
        pass


async def test_a_silent_and_a_slow_head_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 0.3)
    async with served() as address:
        silent, _one = await asyncio.open_connection(*address)
        slow, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            await send(writer, b"POST /echo HTTP/1.1\r\nx: ")
            await asyncio.sleep(0.15)
        assert await closed_within(silent, 10)
        assert await closed_within(slow, 10)


async def test_a_slow_body_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.3)
    async with served() as address:
        reader, writer = await asyncio.open_connection(*address)
        await send(writer, b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        assert await closed_within(reader, 10)


@pytest.mark.parametrize(
    "endless",
    [
        b"POST /echo HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 200_000,
        b"POST /echo HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 40_000,
        b"POST /" + b"a" * 200_000,
        b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 40_000,
    ],
    ids=["one header", "many headers", "the address", "after the body"],
)
async def test_an_endless_head_is_cut(endless: bytes) -> None:
    async with served() as address:
        reader, writer = await asyncio.open_connection(*address)
        await send(writer, endless)
        assert await closed_within(reader, 5)


async def test_bodies_and_connections_that_are_used_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 2.0)
    async with served() as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        for size in (0, 10, 5 << 20):
            assert (await http.post("/echo", content=b"x" * size)).text == str(size)
        headers = {f"x-{number}": "y" * 100 for number in range(100)}
        assert (await http.post("/echo", content=b"abc", headers=headers)).text == "3"


async def test_more_connections_than_there_may_be_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CONNECTIONS", 4)
    async with served() as (host, port):
        kept = [await asyncio.open_connection(host, port) for _ in range(4)]
        await asyncio.sleep(0.1)
        more, _writer = await asyncio.open_connection(host, port)
        assert await closed_within(more, 5)
        _, writer = kept[0]
        writer.write(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\na")
        assert b" 201 " in await kept[0][0].readline()
        for _, writer in kept:
            writer.close()


async def test_a_header_does_not_change_who_asks() -> None:
    @post("/who")
    async def who(request: Request) -> str:
        return request.client.host if request.client else ""

    app = Litestar([who], openapi_config=None, logging_config=None)
    async with served(app) as (host, port), httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
        assert (await http.post("/who", headers={"x-forwarded-for": "192.0.2.7"})).text == "127.0.0.1"


async def test_both_addresses_are_announced(tmp_path) -> None:
    import msgspec

    async with served(webhooks_alone([])) as (host, port):
        with socket.create_server(("127.0.0.1", 0)) as api, socket.create_server(("127.0.0.1", 0)) as hooks:
            announce(tmp_path, api, hooks)
            told = msgspec.json.decode((tmp_path / SERVICE_FILE).read_bytes(), type=ServiceAnswer)
            assert (told.address, told.webhooks) == (address_of(api), address_of(hooks))
            announce(tmp_path, api)
            told = msgspec.json.decode((tmp_path / SERVICE_FILE).read_bytes(), type=ServiceAnswer)
            assert told.webhooks == ""
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as http:
            assert (await http.get("/healthz")).status_code == 200
            assert (await http.get("/jobs")).status_code == 404
