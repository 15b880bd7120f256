"""Conditional requests and the rate limit as GitHub tells it: what is kept, what is believed, what is forgotten."""

import time

import httpx
import pytest

from github_webhook.conditional import Conditional
from github_webhook.errors import ForgeError
from github_webhook.rest import Limit, Rest

pytestmark = pytest.mark.anyio


def rest(*answers: httpx.Response) -> tuple[Rest, list[httpx.Request]]:
    asked: list[httpx.Request] = []
    queue = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return queue.pop(0) if len(queue) > 1 else queue[0]

    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return Rest("https://ghes.example", http), asked


async def test_not_modified_is_an_answer_only_to_whoever_asked_for_it() -> None:
    client, asked = rest(httpx.Response(304))
    answer = await client.call("GET", "/x", headers={}, bucket="b", etag='W/"1"')
    assert answer.unchanged and asked[0].headers["if-none-match"] == 'W/"1"'
    with pytest.raises(ForgeError, match="304"):
        await client.call("GET", "/x", headers={}, bucket="b")
    assert "if-none-match" not in asked[1].headers


def told(**more: str) -> httpx.Response:
    headers = {"limit": "5000", "remaining": "17", "reset": str(int(time.time()) + 60), **more}
    return httpx.Response(
        200, json={}, headers={f"x-ratelimit-{name}": text for name, text in headers.items()}
    )


async def test_the_limit_is_that_of_the_last_answer_and_of_its_bucket() -> None:
    client, _ = rest(told(), told(remaining="16"))
    assert client.limit("b") is None
    for left in (17, 16):
        await client.call("GET", "/x", headers={}, bucket="b")
        limit = client.limit("b")
        assert isinstance(limit, Limit) and (limit.limit, limit.remaining) == (5000, left)
    assert client.limit("another") is None


@pytest.mark.parametrize(
    "more",
    [
        {"remaining": "many"},
        {"reset": "9" * 30},
        {"reset": "100"},  # an hour that is over says nothing of this one
        {"resource": "actions_runner_registration"},
    ],
)
async def test_what_is_no_limit_of_ours_is_not_believed(more: dict[str, str]) -> None:
    client, _ = rest(told(**more))
    await client.call("GET", "/x", headers={}, bucket="b")
    assert client.limit("b") is None


async def test_a_reset_in_a_year_is_one_in_an_hour() -> None:
    client, _ = rest(told(reset=str(int(time.time()) + 365 * 86400)))
    await client.call("GET", "/x", headers={}, bucket="b")
    limit = client.limit("b")
    assert limit is not None and limit.reset_at <= time.time() + 3600


def test_what_was_answered_last_is_found_for_the_same_call_and_credentials_only() -> None:
    kept = Conditional()
    kept.keep("b", "/runs", {"page": "1", "status": "queued"}, '"1"', (1, 2), 2)
    found = kept.find("b", "/runs", {"status": "queued", "page": "1"})
    assert found is not None and (found.etag, found.items, found.length) == ('"1"', (1, 2), 2)
    assert kept.find("c", "/runs", {"page": "1", "status": "queued"}) is None
    assert kept.find("b", "/runs", {"page": "2", "status": "queued"}) is None
    kept.keep("b", "/runs", {"page": "1", "status": "queued"}, None, (), 0)
    assert kept.find("b", "/runs", {"page": "1", "status": "queued"}) is None


def test_the_least_used_answers_are_forgotten_first() -> None:
    kept = Conditional(most=10)
    for name in ("first", "second", "third"):
        kept.keep("b", name, {}, '"1"', (1, 2), 2)
    assert kept.find("b", "first", {}) is not None
    kept.keep("b", "fourth", {}, '"1"', (1, 2), 2)
    assert kept.find("b", "second", {}) is None
    assert all(kept.find("b", name, {}) is not None for name in ("first", "third", "fourth"))
    kept.keep("b", "huge", {}, '"1"', tuple(range(11)), 11)
    assert not kept._kept and kept._items == 0
