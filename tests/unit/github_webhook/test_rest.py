"""The client against answers of every kind: what is repeated, what is which error, what is bounded."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from github_webhook import errors, rest
from github_webhook.app_auth import Scope, TokenAuth
from github_webhook.github import GitHub
from github_webhook.rest import api_base_url, path

pytestmark = pytest.mark.anyio

REPO = Scope.repository("octo-org", "demo")
Answers = list[httpx.Response | Exception]


class Script:
    """A server that answers what it was told, and keeps the requests."""

    def __init__(self, *answers: httpx.Response | Exception | Callable[[httpx.Request], Any]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            return await answer(request)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> GitHub:
        http = httpx.AsyncClient(transport=httpx.MockTransport(self))
        return GitHub(auth=TokenAuth("hunter2"), http=http, base_url="https://ghes.example/api/v3", **options)


def problem(status: int, message: str = "No", **headers: str) -> httpx.Response:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return httpx.Response(
        status, json={"message": message}, headers={"x-github-request-id": "ABC:1", **named}
    )


RUNNER = {"id": 5, "name": "r", "os": "linux", "status": "online", "busy": True, "labels": [{"name": "x"}]}


async def test_a_call_says_what_github_asks_for() -> None:
    script = Script(httpx.Response(200, json=RUNNER))
    runner = await script.client().get_runner(REPO, 5)
    assert runner is not None and (runner.id, runner.online, runner.busy, runner.labels) == (
        5,
        True,
        True,
        ("x",),
    )
    (request,) = script.requests
    assert str(request.url) == "https://ghes.example/api/v3/repos/octo-org/demo/actions/runners/5"
    assert request.headers["x-github-api-version"] == "2022-11-28"
    assert request.headers["accept"] == "application/vnd.github+json"
    assert request.headers["authorization"] == "Bearer hunter2"
    assert request.headers["user-agent"]


@pytest.mark.parametrize(
    ("status", "kind", "code", "retryable"),
    [
        (400, errors.ForgeError, "forge_error", False),
        (401, errors.Unauthorized, "forge_unauthorized", False),
        (403, errors.Forbidden, "forge_forbidden", False),
        (404, errors.NotFound, "forge_not_found", False),
        (409, errors.Conflict, "forge_conflict", False),
        (422, errors.Unprocessable, "forge_unprocessable", False),
        (500, errors.Unavailable, "forge_unavailable", True),
        (502, errors.Unavailable, "forge_unavailable", True),
        (503, errors.Unavailable, "forge_unavailable", True),
    ],
)
async def test_each_status_is_an_error_of_its_own(
    status: int, kind: type[errors.ForgeError], code: str, retryable: bool
) -> None:
    script = Script(problem(status, "Because"))
    with pytest.raises(errors.ForgeError) as caught:
        await script.client().generate_jit_config(REPO, name="r", labels=["x"])
    error = caught.value
    assert type(error) is kind and error.code == code and error.retryable is retryable
    assert (error.status, error.request_id) == (status, "ABC:1")
    assert "Because" in str(error) and "generate-jitconfig" in str(error)


@pytest.mark.parametrize("failure", [problem(500), httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
async def test_a_registration_is_never_sent_twice_by_itself(failure: httpx.Response | Exception) -> None:
    script = Script(failure)
    with pytest.raises(errors.Unavailable):
        await script.client().generate_jit_config(REPO, name="r", labels=["x"])
    with pytest.raises(errors.Unavailable):
        await script.client().rerun_job("octo-org", "demo", 1)
    assert len(script.requests) == 2


@pytest.mark.parametrize("failure", [problem(502), httpx.ConnectError("refused"), httpx.ReadError("reset")])
async def test_reads_and_deletes_are_repeated(failure: httpx.Response | Exception) -> None:
    script = Script(failure, httpx.Response(200, json=RUNNER))
    assert await script.client().get_runner(REPO, 5)
    script = Script(failure, httpx.Response(204))
    assert await script.client().delete_runner(REPO, 5) == "deleted"
    script = Script(failure)
    with pytest.raises(errors.Unavailable):
        await script.client().get_runner(REPO, 5)
    assert len(script.requests) == 3


async def test_a_delete_whose_answer_was_lost_finds_it_gone() -> None:
    script = Script(httpx.ReadError("reset"), problem(404))
    assert await script.client().delete_runner(REPO, 5) == "gone"


async def test_a_busy_runner_is_not_deleted() -> None:
    script = Script(problem(422, "Bad request - Runner r is still running a job"))
    assert await script.client().delete_runner(REPO, 5) == "busy"


async def test_every_call_ends_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_: httpx.Request) -> httpx.Response:
        import asyncio

        await asyncio.sleep(60)
        raise AssertionError

    for call in ("get_runner", "generate_jit_config"):
        client = Script(never).client(timeout=0.2)
        started = time.monotonic()
        with pytest.raises(errors.Unavailable, match=r"0\.2 s"):
            if call == "get_runner":
                await client.get_runner(REPO, 5)
            else:
                await client.generate_jit_config(REPO, name="r", labels=["x"])
        assert time.monotonic() - started < 2


# -- rate limits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        (problem(429, retry_after="7"), 7),
        (problem(403, retry_after="7"), 7),
        (problem(403, retry_after="999999"), rest.MAX_PAUSE),
        (problem(403, retry_after="soon"), 60),
        (problem(403, x_ratelimit_remaining="0", x_ratelimit_reset="0"), 1),
        (problem(403, x_ratelimit_remaining="0", x_ratelimit_reset="x" * 30), 60),
        (problem(429), 60),
        (problem(403, "You have exceeded a secondary rate limit."), 60),
    ],
)
async def test_a_rate_limit_says_when_to_come_back(answer: httpx.Response, seconds: float) -> None:
    script = Script(answer)
    with pytest.raises(errors.RateLimited) as caught:
        await script.client().get_runner(REPO, 5)
    assert caught.value.retryable
    assert abs(caught.value.retry_at - time.time() - seconds) < 5
    assert len(script.requests) == 1, "it is not waited out here"


async def test_an_exhausted_limit_names_its_end() -> None:
    reset = int(time.time()) + 600
    script = Script(problem(403, x_ratelimit_remaining="0", x_ratelimit_reset=str(reset)))
    with pytest.raises(errors.RateLimited) as caught:
        await script.client().get_runner(REPO, 5)
    assert caught.value.retry_at == reset


async def test_a_missing_permission_is_no_rate_limit() -> None:
    script = Script(problem(403, "Resource not accessible by integration", x_ratelimit_remaining="4999"))
    with pytest.raises(errors.Forbidden):
        await script.client().get_runner(REPO, 5)


async def test_until_then_github_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(problem(429, retry_after="30"), httpx.Response(200, json=RUNNER))
    client = script.client()
    for _ in range(3):
        with pytest.raises(errors.RateLimited):
            await client.get_runner(REPO, 5)
    assert len(script.requests) == 1
    later = time.time() + 31
    monkeypatch.setattr(rest.time, "time", lambda: later)
    assert await client.get_runner(REPO, 5)


# -- answers that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"id": "5"}', b"\xff", json.dumps({**RUNNER, "labels": 1}).encode()],
)
async def test_an_answer_of_another_shape_is_an_error(body: bytes) -> None:
    script = Script(httpx.Response(200, content=body))
    with pytest.raises(errors.AnswerInvalid):
        await script.client().get_runner(REPO, 5)


async def test_unknown_fields_are_fine() -> None:
    script = Script(httpx.Response(200, json={**RUNNER, "novelty": {"a": [1]}}))
    assert await script.client().get_runner(REPO, 5)


async def test_an_answer_without_end_is_cut_off() -> None:
    read = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> Any:
            nonlocal read
            while read < 1 << 30:
                read += 1 << 20
                yield b" " * (1 << 20)

    script = Script(httpx.Response(200, stream=Endless()))
    with pytest.raises(errors.AnswerInvalid, match="larger than"):
        await script.client().get_runner(REPO, 5)
    assert read <= rest.MAX_ANSWER + (1 << 20)


async def test_a_renamed_repository_is_followed_on_the_same_server_only() -> None:
    moved = httpx.Response(
        301, headers={"location": "https://ghes.example/api/v3/repositories/1/actions/runners/5"}
    )
    script = Script(moved, httpx.Response(200, json=RUNNER))
    assert await script.client().get_runner(REPO, 5)
    assert script.requests[1].headers["authorization"] == "Bearer hunter2"
    for elsewhere in ("https://evil.example/", "http://ghes.example/api/v3/x", "//evil.example/x"):
        script = Script(httpx.Response(302, headers={"location": elsewhere}))
        with pytest.raises(errors.AnswerInvalid):
            await script.client().get_runner(REPO, 5)
        assert len(script.requests) == 1
    script = Script(httpx.Response(302, headers={"location": "https://ghes.example/round"}))
    with pytest.raises(errors.AnswerInvalid, match="redirects"):
        await script.client().get_runner(REPO, 5)


async def test_secrets_stay_out_of_words() -> None:
    jit = {"runner": {**RUNNER, "busy": False}, "encoded_jit_config": "hunter3"}
    registration = (
        await Script(httpx.Response(201, json=jit)).client().generate_jit_config(REPO, name="r", labels=["x"])
    )
    assert registration.encoded_jit_config == "hunter3"
    assert "hunter" not in repr(registration) + str(registration) + f"{registration!r}" + repr(
        TokenAuth("hunter2")
    )
    broken = Script(httpx.Response(201, json={**jit, "runner": 5}))
    with pytest.raises(errors.AnswerInvalid) as caught:
        await broken.client().generate_jit_config(REPO, name="r", labels=["x"])
    assert "hunter" not in str(caught.value)


# -- what we send --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ä", "a/b"])
async def test_a_name_github_would_refuse_is_not_sent(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        await Script(problem(500)).client().generate_jit_config(REPO, name=name, labels=["x"])


@pytest.mark.parametrize("count", [0, 101])
async def test_labels_are_one_to_a_hundred(count: int) -> None:
    with pytest.raises(ValueError, match="labels"):
        await Script(problem(500)).client().generate_jit_config(REPO, name="r", labels=["x"] * count)


def test_no_name_leaves_its_place_in_an_address() -> None:
    assert path("repos", "a b", "c/d?e") == "/repos/a%20b/c%2Fd%3Fe"
    for bad in ("..", ".", ""):
        with pytest.raises(ValueError, match="segment"):
            path("repos", bad)
    with pytest.raises(ValueError, match="segment"):
        _ = Scope("repository", "octo-org").path


@pytest.mark.parametrize(
    ("server", "base"),
    [
        ("https://github.com", "https://api.github.com"),
        ("https://github.com/", "https://api.github.com"),
        ("https://api.github.com", "https://api.github.com"),
        ("https://octo.ghe.com", "https://api.octo.ghe.com"),
        ("https://ghes.example", "https://ghes.example/api/v3"),
        ("https://ghes.example:8443/", "https://ghes.example:8443/api/v3"),
        ("https://ghes.example/api/v3/", "https://ghes.example/api/v3"),
    ],
)
def test_the_rest_address_of_a_server(server: str, base: str) -> None:
    assert api_base_url(server) == base


@pytest.mark.parametrize("token", ["", "  ", "a\nb", "tökén"])
def test_a_token_that_cannot_be_one(token: str) -> None:
    with pytest.raises(ValueError, match="token"):
        TokenAuth(token)
