"""App credentials against the stand-in, which checks the JWT's signature and times as GitHub does."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jwt
import pytest

from github_webhook import app_auth
from github_webhook.app_auth import AppAuth, Scope
from github_webhook.errors import NotFound, RateLimited, Unauthorized, Unavailable
from github_webhook.github import GitHub
from tests.standins.github import AppCredentials, StandinGitHub
from tests.standins.github_model import Repository

pytestmark = pytest.mark.anyio

REPO = Scope.repository("octo-org", "demo")
ORG = Scope.organization("Octo-Org")


class World:
    def __init__(self, forge: StandinGitHub, app: AppCredentials, http: httpx.AsyncClient) -> None:
        self.forge = forge
        self.app = app
        self.http = http
        self.auth = self.make()
        self.github = self.client(self.auth)

    def make(self, **changes: Any) -> AppAuth:
        values = {"client_id": self.app.client_id, "private_key_pem": self.app.private_key_pem, **changes}
        return AppAuth(http=self.http, base_url=self.forge.url, timeout=5, **values)

    def client(self, auth: AppAuth) -> GitHub:
        return GitHub(auth=auth, http=self.http, base_url=self.forge.url, timeout=5)

    def count(self, end: str) -> int:
        return sum(call.endswith(end) for call in self.forge.calls)

    def drop_tokens(self) -> None:
        """As GitHub does when an App's tokens are revoked."""
        for value in [v for v, token in self.forge.rest.tokens.items() if token.owner]:
            del self.forge.rest.tokens[value]


@pytest.fixture
async def world(tmp_path: Any) -> AsyncIterator[World]:
    async with StandinGitHub() as forge, httpx.AsyncClient() as http:
        forge.actions.repositories["octo-org/demo"] = Repository(
            1, "octo-org", "demo", tmp_path, True, "main"
        )
        yield World(forge, forge.add_app("octo-org"), http)


async def test_a_token_serves_every_scope_of_its_account(world: World) -> None:
    for scope in (REPO, ORG, REPO):
        assert await world.github.find_runner(scope, "nobody") is None
    assert world.count("/installation") == 1
    assert world.count("/access_tokens") == 1


async def test_many_at_once_fetch_one_token(world: World) -> None:
    world.forge.fault("POST */access_tokens", delay=0.1)
    headers = await asyncio.gather(*(world.auth.headers(REPO) for _ in range(30)))
    assert len({h["authorization"] for h in headers}) == 1
    assert world.count("/installation") == 1 and world.count("/access_tokens") == 1


async def test_a_waiter_takes_over_when_the_fetcher_is_cancelled(world: World) -> None:
    world.forge.fault("POST */access_tokens", delay=0.3)
    first = asyncio.create_task(world.auth.headers(REPO))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(world.auth.headers(REPO))
    first.cancel()
    assert (await second)["authorization"].startswith("Bearer ghs_")


async def test_refreshed_five_minutes_early(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.forge.rest.token_seconds = 301.0
    await world.auth.headers(REPO)
    await world.auth.headers(REPO)
    assert world.count("/access_tokens") == 1
    later = time.time() + 5
    monkeypatch.setattr(app_auth.time, "time", lambda: later)
    await world.auth.headers(REPO)
    assert world.count("/access_tokens") == 2


async def test_a_revoked_token_is_replaced_once(world: World) -> None:
    await world.github.find_runner(REPO, "nobody")
    world.drop_tokens()
    registration = await world.github.generate_jit_config(REPO, name="r", labels=["x"])
    assert registration.name == "r", "even a POST: a 401 means that nothing happened"
    assert world.count("/access_tokens") == 2
    world.forge.fault("GET */runners", status=401, times=None)
    with pytest.raises(Unauthorized):
        await world.github.find_runner(REPO, "nobody")
    assert world.count("/access_tokens") == 3


async def test_many_refused_at_once_fetch_one_new_token(world: World) -> None:
    await world.github.find_runner(REPO, "nobody")
    world.drop_tokens()
    await asyncio.gather(*(world.github.find_runner(REPO, "nobody") for _ in range(20)))
    assert world.count("/access_tokens") == 2


async def test_an_event_can_name_the_installation(world: World) -> None:
    world.auth.learn(REPO, world.app.installation_id)
    await world.auth.headers(ORG)
    assert world.count("/installation") == 0


async def test_a_number_of_the_past_is_looked_up_again(world: World) -> None:
    """Removed and installed again, an App has a new installation id."""
    world.auth.learn(REPO, 4711)
    await world.auth.headers(REPO)
    assert world.count("/access_tokens") == 2 and world.count("/installation") == 1


async def test_not_installed_there(world: World) -> None:
    with pytest.raises(NotFound, match="not installed on elsewhere/thing"):
        await world.auth.headers(Scope.repository("elsewhere", "thing"))


async def test_a_wrong_key_says_what_to_check(world: World) -> None:
    other = world.forge.add_app("other")
    with pytest.raises(Unauthorized, match=r"client_id.*private key.*clock"):
        await world.make(private_key_pem=other.private_key_pem).headers(REPO)


async def test_a_clock_that_is_off(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(app_auth.time, "time", lambda: now + 45)
    assert await world.make().headers(REPO), "a minute ahead is allowed for"
    monkeypatch.setattr(app_auth.time, "time", lambda: now - 3600)
    with pytest.raises(Unauthorized, match="clock"):
        await world.make().headers(REPO)


async def test_the_apps_word_is_short_lived(world: World) -> None:
    token = world.auth.app_headers()["authorization"].removeprefix("Bearer ")
    claims = jwt.decode(token, options={"verify_signature": False})
    now = time.time()
    assert jwt.get_unverified_header(token)["alg"] == "RS256"
    assert claims["iss"] == world.app.client_id
    assert -65 < claims["iat"] - now < -55 and 0 < claims["exp"] - now <= 600


async def test_failures_of_the_fetch_reach_the_caller_and_heal(world: World) -> None:
    world.forge.fault("POST */access_tokens", status=502)
    with pytest.raises(Unavailable):
        await world.auth.headers(REPO)
    world.forge.fault("POST */access_tokens", drop="before")
    with pytest.raises(Unavailable):
        await world.auth.headers(REPO)
    world.forge.faults.clear()
    assert await world.auth.headers(REPO)
    world.forge.fault("POST */access_tokens", status=429, headers={"retry-after": "9"})
    with pytest.raises(RateLimited):
        await world.make().headers(REPO)


@pytest.mark.parametrize(
    "pem", ["", "hunter2", "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----"]
)
def test_a_key_that_is_none_is_refused_without_quoting_it(pem: str) -> None:
    with pytest.raises(ValueError, match="PEM private key") as caught:
        AppAuth(client_id="x", private_key_pem=pem, http=httpx.AsyncClient())
    assert "hunter2" not in str(caught.value)


async def test_secrets_stay_out_of_words(world: World) -> None:
    headers = await world.auth.headers(REPO)
    secret = headers["authorization"].removeprefix("Bearer ")
    for thing in (world.auth, *world.auth._tokens.values()):  # pyright: ignore[reportPrivateUsage]
        assert secret not in repr(thing) and "PRIVATE KEY" not in repr(thing)
