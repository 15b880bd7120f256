"""Circuit breakers: what opens them, who is held, how one call at a time finds out that it is over."""

import asyncio
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook import rest
from github_webhook.app_auth import Scope, TokenAuth
from github_webhook.circuit import FIRST_PAUSE, IN_A_ROW, LONGEST_PAUSE, PROBE_SECONDS, Circuits
from github_webhook.errors import (
    Conflict,
    ForgeError,
    NotFound,
    NotInstalled,
    RateLimited,
    Suspended,
    Unauthorized,
    Unavailable,
)
from github_webhook.github import GitHub

pytestmark = pytest.mark.anyio

AWAY = Unavailable("GET /x: 502", status=502, retryable=True)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made() -> tuple[Circuits, Clock, list[int]]:
    clock, changes = Clock(), [0]

    def changed() -> None:
        changes[0] += 1

    return Circuits(changed=changed, clock=clock), clock, changes


def fail(circuits: Circuits, clock: Clock, *accounts: str, times: int = IN_A_ROW) -> None:
    for _ in range(times):
        for account in accounts:
            circuits.failed(account, AWAY, hint="somewhere")
        clock.now += 1.0


def refused(circuits: Circuits, account: str, place: str = "") -> ForgeError | None:
    try:
        circuits.admit(account, place)
    except ForgeError as error:
        return error
    return None


def test_failures_in_a_row_stop_the_calls_and_say_when_the_next_may_be_tried() -> None:
    circuits, clock, changes = made()
    fail(circuits, clock, "a", times=IN_A_ROW - 1)
    assert refused(circuits, "a") is None
    fail(circuits, clock, "a", times=1)
    error = refused(circuits, "a")
    assert type(error) is Unavailable and error.retryable and error.retry_at is not None
    assert clock.now < error.retry_at <= clock.now + FIRST_PAUSE
    assert "502" in str(error) and "5 calls in a row" in str(error)
    held = circuits.held("a")
    assert held is not None and held.code == "forge_unavailable"
    assert changes == [1]


def test_failures_of_one_moment_are_one_failure() -> None:
    circuits, clock, _ = made()
    for _ in range(100):
        circuits.failed("a", AWAY)
    assert refused(circuits, "a") is None
    clock.now += 3
    circuits.failed("a", AWAY)
    assert refused(circuits, "a") is not None


@pytest.mark.parametrize("error", [NotFound("x"), Conflict("x"), RateLimited("x", retry_at=9e9)])
def test_a_refusal_of_one_request_is_an_answer(error: ForgeError) -> None:
    circuits, clock, _ = made()
    for _ in range(3):
        fail(circuits, clock, "a", times=IN_A_ROW - 1)
        circuits.failed("a", error)
    assert refused(circuits, "a") is None


def test_the_trouble_of_one_account_holds_nobody_else() -> None:
    circuits, clock, _ = made()
    fail(circuits, clock, "a", times=50)
    assert [held.who for held in circuits.all()] == ["a"]
    assert circuits.held("b") is None and refused(circuits, "b") is None


def test_the_address_is_held_when_nobody_gets_through() -> None:
    circuits, clock, _ = made()
    fail(circuits, clock, "a", "b", times=3)
    error = refused(circuits, "c")
    assert type(error) is Unavailable
    assert circuits.all()[0].who == ""


def test_the_address_is_not_held_while_somebody_gets_through() -> None:
    circuits, clock, _ = made()
    for _ in range(20):
        fail(circuits, clock, "a", "b", times=1)
        circuits.answered("c")
    assert circuits.held("a") is not None and circuits.held("b") is not None
    assert refused(circuits, "c") is None


def test_one_call_probes_and_its_answer_counts() -> None:
    circuits, clock, changes = made()
    fail(circuits, clock, "a")
    clock.now += 10
    assert refused(circuits, "a") is None, "the probe"
    assert refused(circuits, "a") is not None, "only one"
    circuits.failed("a", AWAY)
    assert refused(circuits, "a") is not None
    clock.now += 2 * FIRST_PAUSE + 0.1
    assert refused(circuits, "a") is None
    circuits.answered("a")
    assert refused(circuits, "a") is None and circuits.all() == []
    assert changes == [2]


def test_a_probe_that_was_given_up_or_never_ends_makes_room_for_another() -> None:
    circuits, clock, _ = made()
    fail(circuits, clock, "a")
    clock.now += 10
    assert refused(circuits, "a") is None
    circuits.abandoned("a")
    assert refused(circuits, "a") is None
    clock.now += PROBE_SECONDS
    assert refused(circuits, "a") is None


def test_calls_that_were_under_way_when_it_opened_do_not_make_the_pause_longer() -> None:
    circuits, clock, _ = made()
    fail(circuits, clock, "a")
    held = circuits.held("a")
    for _ in range(20):
        circuits.failed("a", AWAY)
    assert held is not None and circuits.held("a").until == held.until  # type: ignore[union-attr]


@given(st.integers(1, 60))
def test_pauses_grow_and_never_beyond_five_minutes(tries: int) -> None:
    circuits, clock, _ = made()
    fail(circuits, clock, "a")
    pauses = []
    for _ in range(tries):
        held = circuits.held("a")
        assert held is not None
        clock.now = max(clock.now, held.until)
        assert refused(circuits, "a") is None
        circuits.failed("a", AWAY)
        pauses.append(circuits.held("a").until - clock.now)  # type: ignore[union-attr]
    assert pauses == sorted(pauses) and pauses[-1] <= LONGEST_PAUSE


def test_credentials_that_are_refused_twice_hold_their_account() -> None:
    circuits, _clock, _ = made()
    circuits.failed("a", Unauthorized("GET /x: 401 Bad credentials", status=401))
    assert refused(circuits, "a") is None
    circuits.failed("a", Unauthorized("GET /x: 401 Bad credentials", status=401))
    error = refused(circuits, "a")
    assert type(error) is Unauthorized and error.retryable and error.retry_at is not None
    assert refused(circuits, "b") is None


def test_a_repository_without_the_app_holds_itself_alone() -> None:
    circuits, _clock, _ = made()
    circuits.failed("a", NotInstalled("the App is not installed on o/r"), place="a o/r")
    assert type(refused(circuits, "a", "a o/r")) is NotInstalled
    assert refused(circuits, "a", "a o/other") is None


def test_an_event_holds_and_another_lifts_it_at_once() -> None:
    circuits, _clock, changes = made()
    circuits.hold("a", Suspended("suspended"))
    circuits.failed("a", NotInstalled("not there"), place="a o/r")
    assert type(refused(circuits, "a")) is Suspended
    circuits.lift("a")
    assert refused(circuits, "a", "a o/r") is None and changes == [4]


# -- around real calls ---------------------------------------------------------------------------

SLOW, FINE = Scope.repository("slow", "r"), Scope.repository("fine", "r")
RUNNER = {"id": 5, "name": "r", "os": "linux", "status": "online", "busy": False, "labels": []}


class ByOwner(TokenAuth):
    """A token whose limits are each owner's own, as an App's are."""

    def bucket(self, scope: Scope) -> str:
        return scope.account


async def test_a_forge_that_is_away_is_not_called_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    away = True

    async def serve(request: httpx.Request) -> httpx.Response:
        calls.append(request.url.path)
        return httpx.Response(502) if away else httpx.Response(200, json=RUNNER)

    clock = Clock()
    http = httpx.AsyncClient(transport=httpx.MockTransport(serve))
    github = GitHub(auth=ByOwner("t"), http=http, base_url="https://f", circuits=Circuits(clock=clock))
    for _ in range(IN_A_ROW + 10):
        with pytest.raises(Unavailable):
            await github.generate_jit_config(SLOW, name="r", labels=["x"])
        clock.now += 0.5 if len(calls) <= IN_A_ROW else 0.0
    assert IN_A_ROW <= len(calls) <= IN_A_ROW + 1
    assert github.held(SLOW) is not None
    away = False
    clock.now += 60
    await github.probe(SLOW)
    assert github.held(SLOW) is None
    assert await github.get_runner(SLOW, 5)


async def test_the_slowness_of_one_owner_takes_nothing_from_another() -> None:
    under_way, most = 0, 0

    async def serve(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        if "/slow/" in request.url.path:
            under_way += 1
            most = max(most, under_way)
            try:
                await asyncio.sleep(30)
            finally:
                under_way -= 1
        return httpx.Response(200, json=RUNNER)

    http = httpx.AsyncClient(transport=httpx.MockTransport(serve))
    github = GitHub(auth=ByOwner("t"), http=http, base_url="https://f", timeout=1.0)
    slow = [asyncio.create_task(github.get_runner(SLOW, 5)) for _ in range(100)]
    await asyncio.sleep(0.1)
    started = time.monotonic()
    assert await github.get_runner(FINE, 5)
    assert time.monotonic() - started < 0.5
    assert most == rest.AT_ONCE
    answers = await asyncio.gather(*slow, return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}
    assert time.monotonic() - started < 5, "whoever waits for his turn gives up in time, too"


async def test_a_secondary_limit_on_creating_leaves_looking_and_letting_go_alone() -> None:
    async def serve(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(403, json={"message": "You have exceeded a secondary rate limit"})
        return httpx.Response(204 if request.method == "DELETE" else 200, json=RUNNER)

    http = httpx.AsyncClient(transport=httpx.MockTransport(serve))
    github = GitHub(auth=ByOwner("t"), http=http, base_url="https://f")
    with pytest.raises(RateLimited):
        await github.generate_jit_config(SLOW, name="r", labels=["x"])
    assert await github.get_runner(SLOW, 5)
    assert await github.delete_runner(SLOW, 5) == "deleted"
    with pytest.raises(RateLimited, match="not called"):
        await github.generate_jit_config(SLOW, name="r", labels=["x"])
    held = github.held(SLOW)
    assert held is not None and held.code == "forge_rate_limited" and held.until > time.time() + 50
    assert github.held(FINE) is None


async def test_a_limit_that_goes_on_is_waited_out_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(429)))
    github = GitHub(auth=ByOwner("t"), http=http, base_url="https://f")
    clock, pauses = Clock(), []
    monkeypatch.setattr(rest.time, "time", clock)
    for _ in range(8):
        with pytest.raises(RateLimited) as told:
            await github.get_runner(SLOW, 5)
        pauses.append(told.value.retry_at - clock.now)
        clock.now = told.value.retry_at + 1
    assert pauses[:4] == [60, 120, 240, 480] and pauses[-1] == rest.MAX_PAUSE


async def test_a_primary_limit_holds_every_call() -> None:
    limit = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(time.time()) + 100)}
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(403, headers=limit)))
    github = GitHub(auth=ByOwner("t"), http=http, base_url="https://f")
    with pytest.raises(RateLimited):
        await github.generate_jit_config(SLOW, name="r", labels=["x"])
    with pytest.raises(RateLimited, match="not called"):
        await github.get_runner(SLOW, 5)


def test_what_nobody_can_probe_is_held_for_its_pause_only() -> None:
    """An event that names no repository: the next job is the probe."""
    circuits, clock, _ = made()
    circuits.hold("a", Suspended("suspended"))
    assert circuits.held("a") is not None
    clock.now += FIRST_PAUSE
    assert circuits.held("a") is None and refused(circuits, "a") is None
    circuits.failed("a", Suspended("suspended"), hint="somewhere")
    clock.now += LONGEST_PAUSE
    assert circuits.held("a") is not None
