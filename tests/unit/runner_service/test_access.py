"""Who may ask the API for what: the rules by property, and the guard before real routes with real tokens."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_service import audit, tokens
from runner_service.access import (
    Asked,
    Caller,
    Failures,
    Gate,
    Refused,
    bearer,
    is_local,
    passed_on,
    reached_from_here_only,
    with_token,
    without_token,
)
from runner_service.api import Api, Check, Readiness, webhooks_alone
from runner_service.operation_routes import Orders
from runner_service.reload import Reloaded
from runner_service.tokens import SCOPES, Scope, Token, TokenError
from tests.unit.runner_service.world import Service, World

pytestmark = pytest.mark.anyio

REMOTE = ("192.0.2.7", 4711)
LOCAL = ("127.0.0.1", 4711)


def asked(**more: Any) -> Asked:
    values: dict[str, Any] = {
        "peer": "127.0.0.1", "host": "127.0.0.1:8470", "forwarded": False, "token": None, "order": False,
        "from_page": False, "wanted": "read",
    }  # fmt: skip
    return Asked(**(values | more))


requests = st.builds(
    Asked,
    peer=st.sampled_from(["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "192.0.2.7", "::2", "", "x"]),
    host=st.sampled_from(
        [
            "localhost",
            "LOCALHOST:1",
            "127.0.0.1:8470",
            "[::1]:8470",
            "evil.example",
            "",
            "[",
            "127.0.0.1.evil.example",
        ]
    ),
    forwarded=st.booleans(),
    token=st.none(),
    order=st.booleans(),
    from_page=st.booleans(),
    wanted=st.sampled_from(SCOPES),
)


@given(requests)
def test_without_a_token_only_this_host_itself_passes_and_no_page_gives_orders(one: Asked) -> None:
    answer = without_token(one, local_is_trusted=True)
    passes = isinstance(answer, Caller)
    from_here = one.peer in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1")
    named = one.host in ("localhost", "LOCALHOST:1", "127.0.0.1:8470", "[::1]:8470")
    assert passes == (from_here and named and not one.forwarded and not (one.order and one.from_page))
    assert isinstance(without_token(one, local_is_trusted=False), Refused)


@given(requests, st.sampled_from(SCOPES), st.one_of(st.none(), st.floats(0, 200)), st.floats(0, 200))
def test_a_token_passes_wherever_it_comes_from_if_it_lasts_and_its_scope_does(
    one: Asked, scope: Scope, expires: float | None, now: float
) -> None:
    token = Token(name="t", scope=scope, created_at=0.0, expires_at=expires)
    answer = with_token(token, one, now)
    enough = SCOPES.index(scope) >= SCOPES.index(one.wanted)
    assert isinstance(answer, Caller) == (enough and (expires is None or expires > now))
    assert isinstance(with_token(None, one, now), Refused)


def test_every_refusal_says_what_to_do() -> None:
    refusals = [
        without_token(asked(), local_is_trusted=False),
        without_token(asked(forwarded=True), local_is_trusted=True),
        without_token(asked(host="evil.example"), local_is_trusted=True),
        with_token(Token(name="t", scope="read", created_at=0, expires_at=1), asked(), 2),
        with_token(Token(name="t", scope="read", created_at=0), asked(wanted="operate"), 2),
    ]
    assert all(isinstance(one, Refused) and "microvm tokens create" in one.detail for one in refusals)


@pytest.mark.parametrize(
    ("name", "forwarded"),
    [
        ("X-Forwarded-For", True), ("x-forwarded-proto", True), ("Forwarded", True), ("Via", True),
        ("X-Real-IP", True), ("CF-Connecting-IP", True), ("Accept", False), ("X-Forward", False),
    ],
)  # fmt: skip
def test_what_tells_of_a_proxy(name: str, forwarded: bool) -> None:
    assert passed_on(["accept", name]) is forwarded


def test_only_a_bearer_token_is_one() -> None:
    assert bearer(None) is None
    assert bearer("Bearer abc") == bearer("  bearer   abc ") == "abc"
    assert bearer("Basic abc") == bearer("Bearer") == bearer("") == ""


def test_addresses_that_only_this_host_reaches() -> None:
    assert all(map(reached_from_here_only, ["127.0.0.1", "::1", "localhost", "127.3.4.5"]))
    assert not any(map(reached_from_here_only, ["0.0.0.0", "::", "192.0.2.1", "", "host.example"]))
    assert is_local(asked()) and not is_local(asked(peer="192.0.2.7"))


def test_bad_tokens_are_slowed_down_by_address() -> None:
    now = 0.0
    failures = Failures(lambda: now)
    for _ in range(10):
        assert failures.wait("192.0.2.7") == 0
        failures.add("192.0.2.7")
    assert 0 < failures.wait("192.0.2.7") <= 6
    assert failures.wait("192.0.2.8") == 0
    now = 6.0
    assert failures.wait("192.0.2.7") == 0
    failures.add("192.0.2.7")
    assert failures.wait("192.0.2.7") > 0
    now = 1000.0
    assert failures.wait("192.0.2.7") == 0


def test_one_network_of_ipv6_is_one_address_and_memory_is_bounded() -> None:
    failures = Failures(lambda: 0.0)
    for number in range(10):
        failures.add(f"2001:db8::{number:x}")
    assert failures.wait("2001:db8::ffff") > 0 and failures.wait("2001:db8:0:1::") == 0
    for number in range(10_000):
        failures.add(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(failures._spent) <= 4096


@given(st.integers())
def test_tokens_differ_and_are_known_by_their_digest(_: int) -> None:
    one, other = tokens.make(), tokens.make()
    assert one != other and tokens.digest_of(one) != tokens.digest_of(other)
    assert tokens.well_formed(one) and one.startswith("microvm_") and len(one) == 51
    assert one not in tokens.digest_of(one)


# ── the guard before the routes ──────────────────────────────────────────────────────────────────


@asynccontextmanager
async def calling(
    service: Service, peer: tuple[str, int], *, trusted: bool = True, open_metrics: bool = False
) -> AsyncIterator[httpx.AsyncClient]:
    gate = Gate(
        service.store, local_is_trusted=trusted, open_metrics=open_metrics, refused=service.metrics.refused,
        failures=Failures(),
    )  # fmt: skip

    async def readiness() -> Readiness:
        return Readiness(True, (Check("database", True, "answers"),))

    async def vms() -> list[Any]:
        return []

    api = Api(store=service.store, logs=service.logs, bake_logs=service.bake_logs, metrics=service.metrics,
              readiness=readiness, vms=vms, kill=service.scheduler.kill, gate=gate,
              orders=Orders("host-1", service.scheduler.wake, lambda: Reloaded("", (), ())))  # fmt: skip
    transport = httpx.ASGITransport(app=api.app(), client=peer)  # pyright: ignore
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http


async def make(service: Service, scope: Scope, name: str | None = None, days: float | None = 1) -> str:
    made = await service.store.write(
        lambda db: tokens.create(db, name=name or scope, scope=scope, days=days, who="test")
    )
    return made.token


def sent(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


ROUTES: list[tuple[str, str, Scope]] = [
    ("GET", "/jobs", "read"), ("GET", "/jobs/x", "read"), ("GET", "/why?job=x", "read"),
    ("GET", "/jobs/x/log", "read"), ("GET", "/vms", "read"),
    ("GET", "/bakes", "read"), ("GET", "/metrics", "read"), ("GET", "/readyz", "read"),
    ("GET", "/schema/openapi.json", "read"), ("POST", "/vms/x/kill", "operate"), ("GET", "/tokens", "admin"),
    ("POST", "/tokens", "admin"), ("DELETE", "/tokens/x", "admin"), ("GET", "/audit", "admin"),
    ("GET", "/hosts", "read"), ("POST", "/drain", "operate"), ("POST", "/undrain", "operate"),
    ("POST", "/reload", "operate"),
]  # fmt: skip


async def test_each_scope_reaches_its_own_routes_and_those_below(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, REMOTE) as http:
        made: dict[Scope, str] = {scope: await make(service, scope) for scope in SCOPES}
        for method, path, wanted in ROUTES:
            nobody = await http.request(method, path)
            assert nobody.status_code == 401, path
            assert nobody.headers["content-type"] == "application/problem+json"
            assert nobody.headers["www-authenticate"].startswith("Bearer")
            for scope in SCOPES:
                answer = await http.request(method, path, headers=sent(made[scope]))
                if tokens.allows(scope, wanted):
                    assert answer.status_code not in (401, 403, 429), (path, scope)
                else:
                    assert answer.status_code == 403 and f"--scope {wanted}" in answer.json()["detail"]
        assert (await http.get("/healthz")).status_code == 200
        metrics = (await http.get("/metrics", headers=sent(made["read"]))).text
        assert f'microvm_access_refused_total{{code="no_token"}} {len(ROUTES)}.0' in metrics
        assert 'microvm_access_refused_total{code="scope"}' in metrics
        assert not any(token in metrics for token in made.values())


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
async def test_a_proxy_reaches_what_its_token_allows(tmp_path: Path, header: str) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, LOCAL) as http:
        token = await make(service, "read")
        passed = {header: "192.0.2.7"}
        assert (await http.get("/jobs")).status_code == 200
        for method, path, _ in ROUTES:
            assert (await http.request(method, path, headers=passed)).status_code == 401, path
        assert (await http.get("/jobs", headers=passed | sent(token))).status_code == 200
        assert (await http.get("/healthz", headers=passed)).status_code == 200


async def test_where_tokens_are_demanded_this_host_needs_one_too(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, LOCAL, trusted=False) as http:
        assert (await http.get("/jobs")).status_code == 401
        token = await make(service, "read")
        assert (await http.get("/jobs", headers=sent(token))).status_code == 200
        assert (await http.get("/metrics")).status_code == 401
        async with calling(service, LOCAL, trusted=False, open_metrics=True) as other:
            assert (await other.get("/metrics")).status_code == 200
            assert (await other.get("/jobs")).status_code == 401


async def test_a_page_of_another_name_for_our_address_reads_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, LOCAL) as http:
        answer = await http.get("/jobs", headers={"host": "rebound.evil.example"})
    assert answer.status_code == 401 and "rebound.evil.example" in answer.json()["detail"]


async def test_a_page_with_a_token_may_give_orders(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, LOCAL) as http:
        page = {"origin": "https://dashboard.example"}
        assert (await http.post("/vms/x/kill", headers=page)).status_code == 403
        token = await make(service, "operate")
        assert (await http.post("/vms/x/kill", headers=page | sent(token))).status_code == 404


async def test_revoked_and_expired_tokens_end_at_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, REMOTE) as http:
        token = await make(service, "read")
        assert (await http.get("/jobs", headers=sent(token))).status_code == 200
        await service.store.write(lambda db: tokens.revoke(db, "read", who="test"))
        assert (await http.get("/jobs", headers=sent(token))).status_code == 401
        short = await make(service, "read", "short", days=0.2 / 86400)
        await asyncio.sleep(0.25)
        answer = await http.get("/jobs", headers=sent(short))
        assert answer.status_code == 401 and "'short' has expired" in answer.json()["detail"]


async def test_guesses_are_slowed_and_cost_no_look_up_while_good_tokens_go_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, REMOTE) as http:
        good, fresh = await make(service, "read"), await make(service, "read", "fresh")
        assert (await http.get("/jobs", headers=sent(good))).status_code == 200
        statuses = [(await http.get("/jobs", headers=sent(tokens.make()))).status_code for _ in range(10)]
        assert statuses == [401] * 10
        slowed = await http.get("/jobs", headers=sent(fresh))
        assert slowed.status_code == 429 and 1 <= int(slowed.headers["retry-after"]) <= 60
        assert (await http.get("/jobs", headers=sent(good))).status_code == 200
        async with calling(service, ("198.51.100.1", 1)) as other:
            assert (await other.get("/jobs", headers=sent(fresh))).status_code == 200


async def test_tokens_are_made_listed_and_revoked_over_the_api(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, REMOTE) as http:
        boss = sent(await make(service, "admin"))
        order = {"name": "ci", "scope": "operate", "days": 7}
        made = await http.post("/tokens", json=order, headers=boss)
        assert made.status_code == 201 and made.headers["cache-control"] == "no-store"
        token = made.json()["token"]
        assert made.json()["expires_at"] == pytest.approx(time.time() + 7 * 86400, abs=60)
        assert (await http.post("/tokens", json=order, headers=boss)).status_code == 409
        for bad in ({"name": "a b", "scope": "read"}, {"name": "a", "scope": "root"}, {"name": "a"},
                    {"name": "a", "scope": "read", "days": -1}, {"name": "a", "scope": "read", "day": 1}):  # fmt: skip
            assert (await http.post("/tokens", json=bad, headers=boss)).status_code == 400, bad
        assert (await http.get("/vms", headers=sent(token))).status_code == 200
        listed = await http.get("/tokens", headers=boss)
        (ci,) = [one for one in listed.json() if one["name"] == "ci"]
        assert ci["scope"] == "operate" and ci["used_at"] is not None
        assert token not in listed.text and tokens.digest_of(token) not in listed.text
        assert (await http.delete("/tokens/ci", headers=boss)).status_code == 204
        assert (await http.delete("/tokens/ci", headers=boss)).status_code == 404
        assert (await http.get("/vms", headers=sent(token))).status_code == 401
        rows = (await http.get("/audit", headers=boss)).json()
        assert [(row["who"], row["action"], row["target"]) for row in rows[:2]] == [
            ("admin", "token.revoke", "ci"), ("admin", "token.create", "ci"),
        ]  # fmt: skip
        assert token not in str(rows)


async def test_orders_are_written_down_with_what_came_of_them(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, calling(service, REMOTE) as http:
        token = await make(service, "operate", "ops")
        await http.post("/vms/nope/kill", headers=sent(token))
        row, _ = await service.store.read(lambda db: audit.entries(db, limit=10))
        assert (row.who, row.action, row.target) == ("ops", "vm.kill", "nope")
        assert row.outcome != "done" and "nope" in row.outcome
        async with calling(service, LOCAL) as local:
            await local.post("/vms/nope/kill")
        row, *_ = await service.store.read(lambda db: audit.entries(db, limit=1))
        assert row.who == "local"  # no socket stands behind this request whose user could be told


async def test_only_digests_are_kept_and_the_use_of_a_token_is_noted(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        token = await make(service, "read")
        (before,) = await service.store.read(tokens.all_of_them)
        assert before.used_at is None
        assert (await tokens.find(service.store, token, 5000.0)) is not None
        await tokens.find(service.store, token, 5001.0)
        (after,) = await service.store.read(tokens.all_of_them)
        assert after.used_at == 5000.0  # to the hour
        await tokens.find(service.store, token, 9000.0)
        assert (await service.store.read(tokens.all_of_them))[0].used_at == 9000.0
        with pytest.raises(TokenError, match="already"):
            await make(service, "read")
        with pytest.raises(TokenError, match="no name"):
            await make(service, "read", "host:x")
    stored = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert tokens.digest_of(token).encode() in stored and token.encode() not in stored


async def test_the_token_of_this_hosts_command_line(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service:
        directory = tmp_path / "data"
        directory.mkdir()
        await tokens.keep_local(service.store, directory, "h")
        file = directory / "api-token"
        first = file.read_text().strip()
        assert file.stat().st_mode & 0o777 == 0o600
        found = await tokens.find(service.store, first, time.time())
        assert found is not None and (found.name, found.scope) == ("host:h", "admin")
        await tokens.keep_local(service.store, directory, "h")
        assert file.read_text().strip() == first  # a restart changes nothing for whoever holds it
        await service.store.write(lambda db: tokens.revoke(db, "host:h", who="test"))
        await tokens.keep_local(service.store, directory, "h")
        assert file.read_text().strip() != first
        assert await tokens.find(service.store, first, time.time()) is None
        await tokens.drop_local(service.store, directory, "h")
        assert not file.exists() and await service.store.read(tokens.all_of_them) == []


async def test_an_address_for_webhooks_alone_serves_nothing_else() -> None:
    transport = httpx.ASGITransport(app=webhooks_alone([]))  # pyright: ignore
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        assert (await http.get("/healthz")).status_code == 200
        for method, path, _ in ROUTES:
            answer = await http.request(method, path)
            assert answer.status_code == 404, path
            assert answer.headers["content-type"] == "application/problem+json"
