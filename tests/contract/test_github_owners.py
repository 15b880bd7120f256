"""Several Apps side by side, and what befalls one: suspended, removed, its token revoked, a repository renamed."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from github_webhook.app_auth import AppAuth, Scope, TokenAuth
from github_webhook.circuit import Circuits
from github_webhook.errors import ForgeError, NotFound, NotInstalled, Suspended, Unauthorized
from github_webhook.github import GitHub
from github_webhook.routes import Route, Routes
from runner_service.github_forge import Interpreter
from runner_service.holds import Probes, told
from runner_service.store.queries import InboxRow
from runner_service.telemetry import Metrics
from tests.standins.github import AppCredentials, StandinGitHub
from tests.standins.github_webhooks import Sent
from tests.standins.github_world import LABELS, make_repository

pytestmark = pytest.mark.anyio

ACME, OTHER = Scope.repository("acme", "web"), Scope.repository("other", "api")


class World:
    """Two Apps, each on an owner of its own, and one client for both."""

    def __init__(self, forge: StandinGitHub, http: httpx.AsyncClient) -> None:
        self.forge = forge
        self.apps = {owner: forge.add_app(owner) for owner in ("acme", "other")}
        self.now = 0.0
        self.changes = 0
        self.circuits = Circuits(changed=self._changed, clock=lambda: time.time() + self.now)
        self.auths = {owner: self._auth(app, http) for owner, app in self.apps.items()}
        self.routes = Routes(
            [Route(owner, auth, (f"{owner.upper()}/*",)) for owner, auth in self.auths.items()]
        )
        self.github = GitHub(
            auth=self.routes, http=http, base_url=forge.url, timeout=3.0, circuits=self.circuits
        )
        self.interpret = Interpreter(self.routes, self.circuits)

    def _auth(self, app: AppCredentials, http: httpx.AsyncClient) -> AppAuth:
        return AppAuth(
            client_id=app.client_id, private_key_pem=app.private_key_pem, http=http, base_url=self.forge.url
        )

    def _changed(self) -> None:
        self.changes += 1

    def read(self, sent: Sent) -> None:
        self.interpret(
            InboxRow(
                seq=sent.id, id=sent.guid, forge="github", event=sent.event, action=sent.action,
                received_at=time.time(), payload=sent.body,
            )
        )  # fmt: skip

    def calls(self) -> int:
        return len(self.forge.calls)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with StandinGitHub() as forge, httpx.AsyncClient(trust_env=False) as http:
        for scope in (ACME, OTHER):
            await forge.add_repository(
                make_repository(tmp_path / (scope.repo or "")), owner=scope.owner, name=scope.repo
            )
        yield World(forge, http)


async def register(world: World, scope: Scope, name: str = "r1") -> int:
    return (await world.github.generate_jit_config(scope, name=name, labels=LABELS)).runner_id


async def refusal(world: World, scope: Scope) -> ForgeError:
    with pytest.raises(ForgeError) as told_:
        await register(world, scope)
    return told_.value


async def test_each_owner_is_served_with_its_own_credentials(world: World) -> None:
    assert await register(world, ACME) and await register(world, OTHER)
    assert {token.owner for token in world.forge.rest.tokens.values() if token.owner} == {"acme", "other"}
    error = await refusal(world, Scope.repository("stranger", "x"))
    assert type(error) is NotInstalled and "stranger/x" in str(error)


async def test_an_app_registers_at_its_organization_alone() -> None:
    here, there = TokenAuth("one"), TokenAuth("two")
    routes = Routes([Route("a", here, ("acme/web",)), Route("b", there, ("acme/*-x",), organizations=True)])
    assert routes.route(Scope.organization("Acme")).auth is there  # type: ignore[union-attr]
    assert routes.route(Scope.repository("acme", "web")).auth is here  # type: ignore[union-attr]
    assert routes.route(Scope.organization("other")) is None
    assert routes.bucket(Scope.repository("acme", "web")) != routes.bucket(Scope.organization("acme"))


async def test_a_suspended_installation_is_told_and_holds_its_owner_alone(world: World) -> None:
    world.forge.installation(world.apps["acme"], "suspend")
    error = await refusal(world, ACME)
    assert type(error) is Suspended and "acme is suspended" in str(error)
    before = world.calls()
    for _ in range(50):
        assert type(await refusal(world, ACME)) is Suspended
    assert world.calls() == before, "no call is made while it is held"
    held = world.github.held(ACME)
    assert held is not None and held.code == "forge_suspended"
    assert world.github.held(OTHER) is None and await register(world, OTHER)


async def test_the_event_holds_at_once_and_the_event_lifts_at_once(world: World) -> None:
    assert await register(world, ACME)
    world.read(world.forge.installation(world.apps["acme"], "suspend"))
    held = world.github.held(ACME)
    assert held is not None and held.code == "forge_suspended" and "event" in held.reason
    assert "acme" in told(world.circuits.all())
    assert world.github.held(OTHER) is None
    world.read(world.forge.installation(world.apps["acme"], "unsuspend"))
    assert world.github.held(ACME) is None and world.changes == 2
    assert await register(world, ACME, "r2")


async def test_a_removed_installation_is_found_again_when_it_is_back(world: World) -> None:
    assert await register(world, ACME)
    world.read(world.forge.installation(world.apps["acme"], "deleted"))
    assert type(await refusal(world, ACME)) is NotInstalled
    # Its event gets lost: the back-off finds out.
    world.forge.installation(world.apps["acme"], "created")
    metrics = Metrics()
    probes = Probes(world.github, metrics, clock=lambda: time.time() + world.now)
    before = world.calls()
    probes.look()
    held = {"code": "forge_not_installed"}
    assert metrics.registry.get_sample_value("microvm_forge_held", held) == 1
    await asyncio.sleep(0.1)
    assert world.calls() == before, "not before its time"
    world.now = 10.0
    probes.look()
    async with asyncio.timeout(5):
        while world.github.held(ACME) is not None:
            await asyncio.sleep(0.01)
    assert await register(world, ACME, "r2")
    probes.look()
    assert not metrics.registry.get_sample_value("microvm_forge_held", held)


async def test_a_late_event_of_the_past_is_found_out(world: World) -> None:
    """Suspended and back again, and the events come in the wrong order."""
    late = world.forge.installation(world.apps["acme"], "suspend")
    world.read(world.forge.installation(world.apps["acme"], "unsuspend"))
    world.read(late)
    assert world.github.held(ACME) is not None
    world.now = 10.0
    await world.github.probe(ACME)
    assert world.github.held(ACME) is None


async def test_a_revoked_token_is_replaced_once_and_a_bad_key_holds_its_owner(world: World) -> None:
    assert await register(world, ACME)
    world.forge.rest.tokens = {v: t for v, t in world.forge.rest.tokens.items() if t.owner != "acme"}
    assert await register(world, ACME, "r2"), "a fresh token, and the call again"
    world.forge.fault("* /repos/acme/*", status=401, times=None)
    before = world.calls()
    for _ in range(20):
        assert type(await refusal(world, ACME)) is Unauthorized
    assert world.calls() - before <= 8
    held = world.github.held(ACME)
    assert held is not None and held.code == "forge_unauthorized"
    assert await register(world, OTHER)


async def test_a_token_that_is_fetched_slowly_is_waited_for_by_its_owner_only(world: World) -> None:
    number = world.apps["acme"].installation_id
    world.forge.fault(f"POST /app/installations/{number}/access_tokens", delay=30.0, times=None)
    waiting = [asyncio.create_task(refusal(world, ACME)) for _ in range(30)]
    await asyncio.sleep(0.1)
    started = time.monotonic()
    assert await register(world, OTHER)
    assert time.monotonic() - started < 2.0
    errors = await asyncio.gather(*waiting)
    assert {error.code for error in errors} == {"forge_unavailable"}
    assert time.monotonic() - started < 20, "all of them share one try"


async def test_the_events_of_one_app_do_not_touch_another_on_the_same_account(world: World) -> None:
    second = world.forge.add_app("acme")
    auth = world._auth(second, world.github._rest._http)  # pyright: ignore[reportPrivateUsage]
    routes = Routes([Route("a", world.auths["acme"], ("acme/web",)), Route("b", auth, ("acme/api*",))])
    interpret = Interpreter(routes, world.circuits)
    world.interpret = interpret
    world.read(world.forge.installation(second, "suspend"))
    assert [held.who for held in world.circuits.all()] == ["b/account:acme"]


async def test_a_renamed_repository_goes_on_under_its_old_name(world: World) -> None:
    first = await register(world, ACME)
    world.forge.rename("acme", "web", name="site")
    found = await world.github.get_runner(ACME, first)
    assert found is not None and found.id == first
    second = await register(world, ACME, "r2")
    by_new_name = await world.github.find_runner(Scope.repository("acme", "site"), "r2")
    assert by_new_name is not None and by_new_name.id == second
    assert await world.github.delete_runner(ACME, second) == "deleted"


async def test_a_deleted_repository_is_not_found(world: World) -> None:
    assert await register(world, ACME)
    del world.forge.actions.repositories["acme/web"]
    error = await refusal(world, ACME)
    assert type(error) is NotFound
    assert world.github.held(ACME) is None, "that is about this repository: its owner is not held"
