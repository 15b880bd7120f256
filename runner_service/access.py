"""Who may ask the API for what: pure rules, and the guard that asks them before every route.

    from this host, not passed on     as ``service.access`` says: everything without a token, or as everybody else
    from anywhere else                with a token of the route's scope
    /healthz, webhooks                anybody; a delivery is known by its signature

A route's scope stands in its ``opt["access"]``; without one it is ``read`` for GET and ``admin`` for the rest.
"""

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import msgspec
import structlog
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException, NotAuthorizedException, PermissionDeniedException
from litestar.exceptions import TooManyRequestsException as TooManyRequests
from litestar.handlers import BaseRouteHandler
from prometheus_client import Counter

from runner_service import audit, peers, tokens
from runner_service.store.store import Store
from runner_service.tokens import Scope, Token

log = structlog.get_logger("access")

Connection = ASGIConnection[Any, Any, Any, Any]
Refusal = Literal["no_token", "bad_token", "expired_token", "scope", "page", "too_many"]

LOCAL = "local"
"""The caller that needs no token. No token can take its place in the audit log: a user of this host says its number."""

_SAFE = ("GET", "HEAD", "OPTIONS")
_PASSED_ON = ("forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip")
_BURST = 10.0
_PER_SECOND = 1 / 6
_ADDRESSES = 4096
_KNOWN = 1024


class Caller(msgspec.Struct, frozen=True):
    """Whoever passed: the name that the audit log takes, and what is allowed to them."""

    name: str
    scope: Scope


class Asked(msgspec.Struct, frozen=True):
    """What the rules look at in a request. ``token`` is None when none was sent."""

    peer: str
    host: str
    forwarded: bool
    token: str | None
    order: bool
    from_page: bool
    wanted: Scope


class Refused(msgspec.Struct, frozen=True):
    """Why a request does not pass: the word that is counted, and the sentence that says what to do."""

    code: Refusal
    detail: str
    retry_after: int = 0


def is_local(asked: Asked) -> bool:
    """From this host itself: not passed on by a proxy, nor sent by a page whose name was turned to our address.

    A browser that follows such a name (DNS rebinding) still says it in the Host header.
    """
    return _loopback(asked.peer) and not asked.forwarded and _named_here(asked.host)


def without_token(asked: Asked, *, local_is_trusted: bool) -> Caller | Refused:
    """The answer to a request that brings no token."""
    if not (local_is_trusted and is_local(asked)):
        return Refused("no_token", _advice(asked, local_is_trusted=local_is_trusted))
    if asked.order and asked.from_page:
        return Refused("page", "a web page may not give orders to this service without a token")
    return Caller(LOCAL, "admin")


def with_token(found: Token | None, asked: Asked, now: float) -> Caller | Refused:
    """The answer to a request whose token is ``found`` in the books (None: it is not there)."""
    if found is None:
        return Refused(
            "bad_token", "this token is not known here: it was revoked, or made for another service"
        )
    if found.expires_at is not None and found.expires_at <= now:
        return Refused(
            "expired_token", f"the token '{found.name}' has expired: make another with microvm tokens create"
        )
    if not tokens.allows(found.scope, asked.wanted):
        return Refused(
            "scope",
            f"the token '{found.name}' has the scope {found.scope}, this needs {asked.wanted}: "
            f"microvm tokens create NAME --scope {asked.wanted}",
        )
    return Caller(found.name, found.scope)


class Failures:
    """Failed tries of each address: ten at once, then one every six seconds; the oldest of many addresses go first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def add(self, address: str) -> None:
        self._spent[_network(address)] = (self._now(address) + 1, self._clock())
        self._spent.move_to_end(_network(address))
        while len(self._spent) > _ADDRESSES:
            self._spent.popitem(last=False)

    def wait(self, address: str) -> float:
        """Seconds until this address may fail again; 0: now."""
        return max(0.0, (self._now(address) + 1 - _BURST) / _PER_SECOND)

    def _now(self, address: str) -> float:
        spent, at = self._spent.get(_network(address), (0.0, 0.0))
        return max(0.0, spent - (self._clock() - at) * _PER_SECOND)


class Gate:
    """The guard of an application. ``local_is_trusted``: requests from this host itself need no token."""

    def __init__(
        self,
        store: Store,
        *,
        local_is_trusted: bool,
        open_metrics: bool,
        refused: Counter,
        failures: Failures,
    ) -> None:
        self._store = store
        self._local_is_trusted = local_is_trusted
        self._open_metrics = open_metrics
        self._refused = refused
        self._failures = failures
        # Digests that were good: their owners are not locked out by a stranger behind the same address.
        self._known: OrderedDict[str, None] = OrderedDict()

    async def __call__(self, connection: Connection, handler: BaseRouteHandler) -> None:
        wanted = handler.opt.get("access")
        if wanted == "open" or (wanted == "metrics" and self._open_metrics):
            return
        asked = asked_by(connection, "read" if wanted == "metrics" else wanted)
        answer = await self._answer(asked)
        if isinstance(answer, Refused):
            self._refused.labels(answer.code).inc()
            log.debug("refused", code=answer.code, peer=asked.peer, path=connection.scope["path"][:200])
            raise _exception(answer)
        connection.scope["user"] = answer

    async def _answer(self, asked: Asked) -> Caller | Refused:
        if asked.token is None:
            return without_token(asked, local_is_trusted=self._local_is_trusted)
        digest = tokens.digest_of(asked.token)
        if digest not in self._known and (seconds := self._failures.wait(asked.peer)) > 0:
            # Nothing is looked up: guesses cost neither the database nor the log anything.
            wait = math.ceil(seconds)
            return Refused("too_many", f"too many bad tokens from this address: try again in {wait} s", wait)
        now = time.time()
        found = await tokens.find(self._store, asked.token, now) if tokens.well_formed(asked.token) else None
        answer = with_token(found, asked, now)
        if isinstance(answer, Refused) and answer.code != "scope":
            self._failures.add(asked.peer)
            self._known.pop(digest, None)
        else:
            self._known[digest] = None
            self._known.move_to_end(digest)
            while len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        return answer


def asked_by(connection: Connection, wanted: Scope | None) -> Asked:
    headers = connection.headers
    method = connection.scope["method"] if connection.scope["type"] == "http" else "GET"
    return Asked(
        peer=connection.client.host if connection.client is not None else "",
        host=headers.get("host", ""),
        forwarded=passed_on(headers.keys()),
        token=bearer(headers.get("authorization")),
        order=method not in _SAFE,
        from_page="origin" in headers,
        wanted=wanted or ("read" if method in _SAFE else "admin"),
    )


def passed_on(names: Iterable[str]) -> bool:
    """Whether a proxy says that it sends this for somebody else."""
    return any(name.startswith("x-forwarded-") or name in _PASSED_ON for name in map(str.lower, names))


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header; another kind of credential is a token that fits nothing."""
    if header is None:
        return None
    kind, _, value = header.strip().partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


async def who(connection: Connection) -> str:
    """The name of the caller for the audit log; for one on this host its user, as far as the kernel still tells."""
    scope = cast("dict[str, Any]", connection.scope)
    caller: Caller = scope["user"]
    if caller.name != LOCAL:
        return caller.name
    uid = await peers.uid_of(scope.get("client"), scope.get("server"))
    return LOCAL if uid is None else audit.local(uid)


def _exception(refused: Refused) -> HTTPException:
    if refused.code == "too_many":
        return TooManyRequests(detail=refused.detail, headers={"retry-after": str(refused.retry_after)})
    if refused.code in ("scope", "page"):
        return PermissionDeniedException(detail=refused.detail)
    return NotAuthorizedException(
        detail=refused.detail, headers={"www-authenticate": 'Bearer realm="microvm"'}
    )


def _advice(asked: Asked, *, local_is_trusted: bool) -> str:
    make = "make one on its host with microvm tokens create NAME --scope " + asked.wanted
    if local_is_trusted and _loopback(asked.peer):
        why = "was passed on by a proxy" if asked.forwarded else f"names the service '{asked.host[:100]}'"
        return f"this request {why}, so it needs a token (Authorization: Bearer …): {make}"
    return f"this service demands a token (Authorization: Bearer …): {make}"


def _loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _named_here(host: str) -> bool:
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower() == "localhost" or _loopback(name)


def _network(address: str) -> str:
    """One of IPv6 has a whole /64 to call from."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else str(parsed)


def reached_from_here_only(address: str) -> bool:
    """Whether nobody but this host can reach a service that listens on ``address``."""
    return _named_here(f"[{address}]" if ":" in address else address)
