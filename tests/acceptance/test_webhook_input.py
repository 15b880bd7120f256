"""Bad deliveries over real HTTP: refused with a problem document, counted, and nothing else is kept."""

import asyncio
import json
import sqlite3
import uuid
from typing import Any

import httpx
import pytest

from github_webhook.signatures import sign
from scripts.programs.stage import Stage
from tests.acceptance.conftest import gone, queue

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

GOOD = json.dumps(
    {"zen": "Keep it logically awesome.", "hook_id": 1, "hook": {"type": "Repository"}}
).encode()


def delivery(stage: Stage, body: bytes = GOOD, event: str = "ping", **headers: str | None) -> dict[str, Any]:
    """A properly signed delivery; ``headers`` (with _ for -) replace its own, None leaves one out."""
    found: dict[str, str | None] = {
        "content-type": "application/json",
        "x-github-event": event,
        "x-github-delivery": str(uuid.uuid4()),
        "x-hub-signature-256": sign(body, stage.forge.webhooks.secret),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return {"content": body, "headers": {name: value for name, value in found.items() if value is not None}}


async def post(stage: Stage, **delivery: Any) -> httpx.Response:
    return await stage.http.post("/webhooks/github", **delivery)


def kept(stage: Stage) -> int:
    """Rows of the inbox."""
    with sqlite3.connect(f"file:{stage.config.parent / 'service.db'}?mode=ro", uri=True) as database:
        return database.execute("SELECT count(*) FROM inbox").fetchone()[0]


async def counted(stage: Stage, code: str) -> float:
    lines = (await stage.http.get("/metrics")).text.splitlines()
    start = f'microvm_deliveries_total{{event="",result="{code}"}} '
    return next((float(line.removeprefix(start)) for line in lines if line.startswith(start)), 0.0)


@pytest.mark.parametrize(
    ("status", "code", "body", "headers"),
    [
        (401, "signature_missing", GOOD, {"x_hub_signature_256": None}),
        (401, "signature_invalid", GOOD, {"x_hub_signature_256": sign(GOOD, "another secret")}),
        (401, "signature_invalid", GOOD, {"x_hub_signature_256": "sha256=xyz"}),
        (401, "signature_invalid", GOOD[:-1], {"x_hub_signature_256": sign(GOOD, "whatever")}),
        (400, "payload_not_json", GOOD[:-1], {}),
        (400, "payload_not_json", b"\x00\xff not JSON", {}),
        (400, "payload_not_json", b"", {}),
        (
            422,
            "payload_invalid",
            b'{"action": "queued", "workflow_job": 7}',
            {"x_github_event": "workflow_job"},
        ),
        (422, "payload_invalid", b"[" * 100_000, {"x_github_event": "workflow_job"}),
        (422, "unknown_event", b"{}", {"x_github_event": "no_such_event"}),
        (
            415,
            "media_type_unsupported",
            b"payload=%7B%7D",
            {"content_type": "application/x-www-form-urlencoded"},
        ),
        (400, "header_missing", GOOD, {"x_github_event": None}),
        (400, "header_missing", GOOD, {"x_github_delivery": "../../etc"}),
    ],
)
async def test_a_bad_delivery_is_refused_and_only_counted(
    stage: Stage, status: int, code: str, body: bytes, headers: dict[str, str | None]
) -> None:
    rows, count = kept(stage), await counted(stage, code)
    answer = await post(stage, **delivery(stage, body, **headers))
    if code == "payload_invalid" and answer.status_code == 400:
        code, status = "payload_not_json", 400  # deep nesting may fail as either
        count = await counted(stage, code) - 1
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:microvm:problem:{code}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert stage.forge.webhooks.secret not in answer.text
    assert kept(stage) == rows
    assert await counted(stage, code) == count + 1


@pytest.mark.parametrize("announced", [True, False])
async def test_thirty_megabytes_are_refused_before_they_are_held(stage: Stage, announced: bool) -> None:
    rows = kept(stage)
    body = b'{"a": "' + b"x" * (30 << 20) + b'"}'
    signed = delivery(stage, body)
    before = _rss(stage)

    async def pieces() -> Any:
        for at in range(0, len(body), 1 << 20):
            yield body[at : at + (1 << 20)]

    try:
        answer = await post(stage, content=body if announced else pieces(), headers=signed["headers"])
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # answered and closed before we had sent all: as good
    else:
        assert answer.status_code == 413
        assert answer.json()["type"] == "urn:microvm:problem:payload_too_large"
    assert await counted(stage, "payload_too_large") >= 1
    assert kept(stage) == rows
    assert _rss(stage) - before < 60 << 20


def _rss(stage: Stage) -> int:
    with open(f"/proc/{stage.service.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


async def test_a_sender_that_goes_away_in_the_middle_leaves_nothing(stage: Stage) -> None:
    rows = kept(stage)
    port = int(stage.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = "".join(f"{name}: {value}\r\n" for name, value in delivery(stage)["headers"].items())
    writer.write(
        f"POST /webhooks/github HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: 1000\r\n\r\n".encode() + GOOD
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await stage.http.get("/healthz")).status_code == 200
    assert kept(stage) == rows


async def test_other_methods_and_paths_get_problem_documents_too(stage: Stage) -> None:
    for method, path, status in (
        ("GET", "/webhooks/github", 405),
        ("POST", "/jobs", 405),
        ("GET", "/nosuch", 404),
    ):
        answer = await stage.http.request(method, path)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status


async def test_ping_is_answered(stage: Stage) -> None:
    sent = stage.forge.ping("octo-org", "hello")
    await stage.forge.webhooks.settled()
    assert sent.status_code in (200, 202)
    assert 'event="ping"' in (await stage.http.get("/metrics")).text


async def test_a_delivery_that_was_processed_is_acknowledged_and_ignored(stage: Stage) -> None:
    first = len(stage.forge.webhooks.sent)
    job = await queue(stage, "hello")
    await gone(stage, job)
    await stage.forge.webhooks.settled()
    rows = kept(stage)
    sent = stage.forge.webhooks.sent[first]
    again = stage.forge.webhooks.redeliver(sent.guid)
    await stage.forge.webhooks.settled()
    assert (again.status_code, json.loads(again.answer)) == (200, {"status": "done"})
    assert kept(stage) == rows
    assert len((await stage.story(job))["runners"]) == 1


async def test_the_service_says_nothing_of_bodies_in_its_log(stage: Stage) -> None:
    body = b'{"marker": "only-in-this-body", "broken'
    await post(stage, **delivery(stage, body))
    await post(stage, **delivery(stage, body, x_hub_signature_256="sha256=" + "0" * 64))
    assert "only-in-this-body" not in stage.log.read_text()
    assert "Traceback" not in stage.log.read_text()
