"""The receiver over real HTTP: what is refused, with which document, and that nothing of it is kept."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from litestar import Litestar
from litestar.logging import LoggingConfig

from github_webhook import receiver as module
from github_webhook.receiver import Delivery, StoreResult, receiver
from github_webhook.signatures import sign
from tests.standins.github_official import webhook_examples

pytestmark = pytest.mark.anyio

SECRETS = ["new secret", "old secret"]
GUID = "72d3162e-cc78-11e3-81ab-4c9367dc0958"


class Inbox:
    """Keeps deliveries in memory; as a table would, it knows a GUID again and whether it was processed."""

    def __init__(self) -> None:
        self.rows: list[Delivery] = []
        self.processed: set[str] = set()
        self.error: Exception | None = None
        self.delay = 0.0

    async def store(self, delivery: Delivery) -> StoreResult:
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        if delivery.id in self.processed:
            return "done"
        if any(row.id == delivery.id for row in self.rows):
            return "known"
        self.rows.append(delivery)
        return "stored"


class Counted:
    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.acceptances: list[tuple[str, str]] = []
        self.any = asyncio.Event()

    def refused(self, code: str) -> None:
        self.any.set()
        self.refusals.append(code)

    def accepted(self, event: str, outcome: str) -> None:
        self.acceptances.append((event, outcome))


class World:
    def __init__(self) -> None:
        self.inbox = Inbox()
        self.counted = Counted()
        self.secrets = list(SECRETS)
        self.http = httpx.AsyncClient(timeout=20)
        self.port = 0

    async def post(
        self, body: bytes, *, secret: str | None = SECRETS[0], without: str = "", **headers: str
    ) -> httpx.Response:
        given = {
            "content-type": "application/json",
            "x-github-event": "workflow_job",
            "x-github-delivery": GUID,
            "x-github-hook-id": "42",
            **({"x-hub-signature-256": sign(body, secret)} if secret else {}),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        given.pop(without, None)
        return await self.http.post(self.url, content=body, headers=given)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/webhooks/github"

    def refused(self, response: httpx.Response, status: int, code: str) -> None:
        """A problem document, one counter, and nothing else."""
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["type"] == f"urn:microvm:problem:{code}"
        assert problem["status"] == status and problem["title"] and problem["detail"]
        assert self.counted.refusals == [code]
        assert not self.inbox.rows and not self.counted.acceptances


@asynccontextmanager
async def serving(world: World, **options: Any) -> AsyncIterator[World]:
    handler = receiver(world.inbox, lambda: world.secrets, counters=world.counted, **options)
    app = Litestar([handler], openapi_config=None, logging_config=LoggingConfig(log_exceptions="always"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(10):
            while not server.started:
                await asyncio.sleep(0.01)
        world.port = server.servers[0].sockets[0].getsockname()[1]
        yield world
    finally:
        server.should_exit = True
        await task
        await world.http.aclose()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with serving(World()) as made:
        yield made


def example(number: int = 0) -> bytes:
    return json.dumps(webhook_examples("workflow_job")[number]).encode()


async def test_a_signed_delivery_is_stored_before_the_answer(world: World) -> None:
    response = await world.post(example())
    assert (response.status_code, response.json()) == (202, {"status": "stored"})
    (row,) = world.inbox.rows
    assert (row.id, row.event, row.action, row.hook_id) == (GUID, "workflow_job", "in_progress", "42")
    assert row.payload == example()
    assert world.counted.acceptances == [("workflow_job", "stored")]


@pytest.mark.parametrize("secret", SECRETS)
async def test_two_secrets_while_they_are_exchanged(world: World, secret: str) -> None:
    assert (await world.post(example(), secret=secret)).status_code == 202
    world.secrets.remove(secret)
    assert (await world.post(example(), secret=secret)).status_code == 401


async def test_redelivery_is_processed_until_it_was(world: World) -> None:
    await world.post(example())
    again = await world.post(example())
    assert (again.status_code, again.json()) == (202, {"status": "known"})
    world.inbox.processed.add(GUID)
    done = await world.post(example())
    assert (done.status_code, done.json()) == (200, {"status": "done"})
    assert len(world.inbox.rows) == 1


@pytest.mark.parametrize("name", ["ping", "push", "installation"])
async def test_the_other_events_are_stored_too(world: World, name: str) -> None:
    for number, payload in enumerate(webhook_examples(name)):
        body = json.dumps(payload).encode()
        response = await world.post(body, x_github_event=name, x_github_delivery=f"{GUID}-{number}")
        assert response.status_code == 202, response.text
    assert {row.event for row in world.inbox.rows} == {name}
    assert all(
        row.action == p.get("action") for row, p in zip(world.inbox.rows, webhook_examples(name), strict=True)
    )


async def test_what_cannot_be_unsubscribed_is_acknowledged_and_dropped(world: World) -> None:
    response = await world.post(b"{}", x_github_event="installation_repositories")
    assert (response.status_code, response.json()) == (200, {"status": "ignored"})
    assert not world.inbox.rows and not world.counted.refusals


async def test_unsigned(world: World) -> None:
    world.refused(await world.post(example(), secret=None), 401, "signature_missing")


async def test_wrongly_signed(world: World) -> None:
    world.refused(await world.post(example(), secret="guess"), 401, "signature_invalid")


async def test_signed_with_the_old_sha1_header_alone(world: World) -> None:
    response = await world.post(example(), secret=None, x_hub_signature="sha1=" + "0" * 40)
    world.refused(response, 401, "signature_missing")


async def test_truncated(world: World) -> None:
    world.refused(await world.post(example()[:-1]), 400, "payload_not_json")


async def test_not_json(world: World) -> None:
    world.refused(await world.post(b"payload=%7B%7D"), 400, "payload_not_json")


async def test_form_encoded(world: World) -> None:
    response = await world.post(b"payload=%7B%7D", content_type="application/x-www-form-urlencoded")
    world.refused(response, 415, "media_type_unsupported")


async def test_json_of_another_shape(world: World) -> None:
    world.refused(await world.post(b'{"action": "queued"}'), 422, "payload_invalid")


async def test_unknown_event(world: World) -> None:
    world.refused(await world.post(b"{}", x_github_event="star"), 422, "unknown_event")


@pytest.mark.parametrize("name", ["x-github-event", "x-github-delivery"])
async def test_missing_headers(world: World, name: str) -> None:
    world.refused(await world.post(example(), without=name), 400, "header_missing")


@pytest.mark.parametrize("value", ["a b c d e f g", "x" * 65, "../../../etc"])
async def test_malformed_delivery_id(world: World, value: str) -> None:
    world.refused(await world.post(example(), x_github_delivery=value), 400, "header_missing")


async def test_the_signature_comes_before_the_content(world: World) -> None:
    """Nobody without the secret learns what is understood here."""
    response = await world.post(b"not json", secret="guess", x_github_event="star")
    world.refused(response, 401, "signature_invalid")


async def test_thirty_megabytes(world: World) -> None:
    body = b" " * (30 << 20)
    world.refused(await world.post(body), 413, "payload_too_large")


async def test_thirty_megabytes_without_a_length_are_not_read_to_the_end(world: World) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 200 << 20:
            sent += 1 << 20
            yield b" " * (1 << 20)

    headers = {
        "content-type": "application/json",
        "x-github-event": "ping",
        "x-github-delivery": GUID,
        "x-hub-signature-256": "sha256=" + "0" * 64,
    }
    try:
        response = await world.http.post(world.url, content=endless(), headers=headers)
        assert response.status_code == 413
    except httpx.HTTPError:
        pass  # the server hung up on the rest, which is as good
    assert world.counted.refusals == ["payload_too_large"]
    assert not world.inbox.rows


async def test_just_under_the_cap_is_fine() -> None:
    async with serving(World(), max_body=len(example())) as world:
        assert (await world.post(example())).status_code == 202
        assert (await world.post(example() + b" ")).status_code == 413


async def test_bodies_in_flight_are_bounded_together() -> None:
    async with serving(World(), max_in_flight=100) as world:
        world.refused(await world.post(example()), 503, "receiver_busy")
        world.secrets.clear()
        assert (await world.post(b"{}")).status_code == 401, "what was held was given back"


async def test_a_sender_that_stops_in_the_middle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BODY_SECONDS", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head = (
        "POST /webhooks/github HTTP/1.1\r\nhost: x\r\nx-github-event: ping\r\n"
        f"x-github-delivery: {GUID}\r\nx-hub-signature-256: sha256=00\r\ncontent-length: 10\r\n\r\n"
    )
    writer.write(head.encode() + b"half")
    await writer.drain()
    async with asyncio.timeout(5):
        status = await reader.readline()
    assert b" 408 " in status
    assert world.counted.refusals == ["body_timeout"]
    writer.close()


async def test_a_sender_that_goes_away_in_the_middle(world: World) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    head = (
        "POST /webhooks/github HTTP/1.1\r\nhost: x\r\nx-github-event: ping\r\n"
        f"x-github-delivery: {GUID}\r\nx-hub-signature-256: sha256=00\r\ncontent-length: 10\r\n\r\n"
    )
    writer.write(head.encode() + b"half")
    await writer.drain()
    writer.transport.abort()
    async with asyncio.timeout(5):
        await world.counted.any.wait()
    assert world.counted.refusals == ["body_incomplete"]


async def test_an_inbox_that_cannot_store_is_a_failed_delivery(world: World) -> None:
    world.inbox.error = OSError("disk full at /secret/place")
    response = await world.post(example())
    world.refused(response, 503, "inbox_unavailable")
    assert "/secret/place" not in response.text
    world.inbox.error = None
    assert (await world.post(example())).status_code == 202, "redelivered, it is taken"


async def test_an_inbox_that_hangs_is_a_failed_delivery(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_SECONDS", 0.05)
    world.inbox.delay = 5
    world.refused(await world.post(example()), 503, "inbox_unavailable")


async def test_nothing_of_a_body_is_logged(
    world: World, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for secret in (SECRETS[0], "guess"):
        await world.post(b'{"hunter2": "hunter2"', secret=secret)
        await world.post(b'{"action": "hunter2"}', secret=secret)
    out, err = capfd.readouterr()
    assert "hunter2" not in caplog.text + out + err
    delivery = Delivery(id=GUID, event="ping", action=None, received_at=0, payload=b"hunter2", hook_id=None)
    assert "hunter2" not in repr(delivery)
