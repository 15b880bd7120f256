"""Polling and redelivery over our client and the stand-in: what is found, what it costs, what is left for runners."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from github_webhook.app_auth import AppAuth, Scope, TokenAuth
from github_webhook.deliveries import Deliveries
from github_webhook.errors import RateLimited
from github_webhook.github import GitHub
from github_webhook.reach import Reach
from github_webhook.routes import Route, Routes
from runner_service.credentials import deliveries, reached, routes
from runner_service.domain import JobEvent
from runner_service.github_forge import GitHubForge
from runner_service.github_listings import GitHubListings, Reached, named, served
from runner_service.polling import Poller
from runner_service.redelivery import Redeliveries
from runner_service.settings import GitHubApp, GitHubSettings
from runner_service.store.store import Store, sqlite_url
from runner_service.telemetry import Metrics
from tests.standins.github_world import OWNER, REPO, ForgeWorld, forge_world, make_repository

pytestmark = pytest.mark.anyio

_JOB = "{runs-on: microvm, steps: [{run: 'true'}]}"
WORKFLOW = f"jobs:\n  one: {_JOB}\n  two: {_JOB}\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ForgeWorld]:
    async with forge_world(tmp_path, WORKFLOW) as made:
        yield made


def app_auth(world: ForgeWorld, owner: str = OWNER) -> AppAuth:
    app = world.forge.add_app(owner)
    return AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )


def reach(world: ForgeWorld, auth: AppAuth | TokenAuth) -> Reach:
    return Reach(auth=auth, http=world.http, base_url=world.forge.url)


@contextlib.asynccontextmanager
async def poller(
    tmp_path: Path, world: ForgeWorld, auth: AppAuth | TokenAuth
) -> AsyncIterator[tuple[Poller, list[JobEvent], GitHub]]:
    observed: list[JobEvent] = []
    client = GitHub(auth=auth, http=world.http, base_url=world.forge.url)
    async with Store.open(sqlite_url(tmp_path / "service.db")) as store:
        yield (
            Poller(
                store=store,
                name="github",
                forge=GitHubForge(client),
                listings=GitHubListings(client, [Reached("github", reach(world, auth), ())]),
                allowed=lambda _owner, _repo: True,
                observe=observed.append,
                metrics=Metrics(),
                every=1.0,
            ),
            observed,
            client,
        )


async def rounds(poller: Poller, count: int) -> None:
    """So many passes, each with all it starts."""
    for _ in range(count):
        await poller._pass()
        tasks = [poller._reaching, *(owner.task for owner in poller._owners.values())]
        for task in tasks:
            if task is not None:
                await task


def make_due(poller: Poller) -> None:
    """Every repository had a job just now, and was looked at long ago."""
    for owner in poller._owners.values():
        for seen in owner.repositories.values():
            seen.used_at, seen.looked_at = time.time(), seen.looked_at and 1.0


@pytest.mark.parametrize("kind", ["app", "token"])
async def test_queued_jobs_of_whatever_the_credentials_reach_are_found(
    tmp_path: Path, world: ForgeWorld, kind: str
) -> None:
    await world.forge.add_repository(make_repository(world.tmp / "other", WORKFLOW), owner=OWNER)
    runs = [await world.forge.queue_run(OWNER, repo) for repo in (REPO, "other")]
    auth = app_auth(world) if kind == "app" else TokenAuth(world.forge.token)
    async with poller(tmp_path, world, auth) as (polling, observed, _):
        await rounds(polling, 3)
    assert {event.job_id for event in observed} == {f"github-{job.id}" for run in runs for job in run.jobs}
    assert {(event.via, event.state) for event in observed} == {("poll", "queued")}
    assert all(event.created_at is not None for event in observed)


async def test_an_exhausted_limit_leaves_the_last_calls_to_registrations(
    tmp_path: Path, world: ForgeWorld
) -> None:
    world.forge.rest.calls_an_hour = 40
    auth = app_auth(world)
    async with poller(tmp_path, world, auth) as (polling, _, client):
        for _ in range(30):
            # Something changes all the time, so that no answer is a 304.
            await world.forge.queue_run(OWNER, REPO)
            make_due(polling)
            await rounds(polling, 1)
        limit = client.limit(OWNER)
        assert limit is not None and limit.remaining >= 10
        assert polling._owners[OWNER].reason
        made = await client.generate_jit_config(
            Scope.repository(OWNER, REPO),
            name="r1",
            labels=["microvm"],
        )
    assert made.runner_id


async def test_until_the_forges_own_time_is_over_nobody_calls(tmp_path: Path, world: ForgeWorld) -> None:
    async with poller(tmp_path, world, TokenAuth(world.forge.token)) as (polling, _, client):
        await rounds(polling, 2)
        world.forge.fault("GET */actions/runs", status=429, headers={"retry-after": "600"}, times=None)
        before = len(world.forge.calls)
        for _ in range(5):
            make_due(polling)
            await rounds(polling, 1)
        assert len(world.forge.calls) == before + 1
        assert polling._owners[OWNER].retry_at > time.time() + 500
        with pytest.raises(RateLimited):
            await client.untaken_jobs(OWNER, REPO)


async def test_a_delivery_that_was_lost_comes_after_all(tmp_path: Path, world: ForgeWorld) -> None:
    hooks = world.forge.webhooks
    hooks.mishaps.lose = 1
    run = await world.forge.queue_run(OWNER, REPO)
    lost = hooks.sent[0]
    assert lost.status_code == 502 and len(run.jobs) == 2
    app = Deliveries(auth=app_auth(world), http=world.http, base_url=world.forge.url)
    async with Store.open(sqlite_url(tmp_path / "service.db")) as store:
        await Redeliveries(store=store, forge="github", apps={"a": app}, metrics=Metrics()).sweep("a", app)
    again = [sent for sent in hooks.sent if sent.redelivery]
    assert lost.guid in {sent.guid for sent in again}


# ── from the settings ────────────────────────────────────────────────────────────────────────────

APPS = GitHubSettings(
    apps=(
        GitHubApp("a", token_env="A", repositories=("o/r", "o/x-*")),
        GitHubApp("b", app_id="I", private_key_env="K", repositories=("acme/one",)),
    )
)


def test_what_is_named_and_what_is_served() -> None:
    assert named(APPS) == (("o", "r"), ("acme", "one"))
    is_served = served(APPS)
    assert [is_served(*name) for name in (("O", "R"), ("o", "x-1"), ("o", "y"), ("acme", "one"))] == [
        True, True, False, True,
    ]  # fmt: skip
    assert served(GitHubSettings(token_env="A"))("any", "thing")


async def test_only_credentials_with_patterns_are_asked_what_they_reach(
    world: ForgeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A", world.forge.token)
    monkeypatch.setenv("K", world.forge.add_app("acme").private_key_pem)
    known = routes(APPS, world.http)
    assert isinstance(known, Routes) and all(isinstance(route, Route) for route in known.all)
    assert [one.name for one in reached(APPS, known, world.http)] == ["a"]
    assert list(deliveries(APPS, known, world.http)) == ["b"]


async def test_owners_that_no_pattern_can_mean_are_left_out(world: ForgeWorld) -> None:
    await world.forge.add_repository(make_repository(world.tmp / "foreign"), owner="elsewhere")
    token = reach(world, TokenAuth(world.forge.token))
    listings = GitHubListings(world.github, [Reached("a", token, (f"{OWNER}/d*",))])
    assert await listings.owners() == [OWNER]
    assert await listings.repositories(OWNER) == [(OWNER, REPO)]
    assert await listings.repositories("elsewhere") == []


async def test_credentials_that_fail_hide_nothing_of_the_others(world: ForgeWorld) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        wrong = Reach(auth=TokenAuth("wrong"), http=http, base_url=world.forge.url)
        right = reach(world, TokenAuth(world.forge.token))
        listings = GitHubListings(world.github, [Reached("w", wrong, ()), Reached("r", right, ())])
        assert await listings.owners() == [OWNER]
