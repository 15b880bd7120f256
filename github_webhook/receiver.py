"""``POST /webhooks/github``: size → signature → shape → one committed inbox row → 2xx. Nothing else is kept.

Whoever is refused gets a problem document (RFC 9457) and costs a counter. The signature is checked over the
raw bytes before anything looks into them; bodies are never logged. GitHub waits 10 s for the answer and
redelivers nothing by itself, so an inbox that cannot store answers 503 and the delivery shows as failed.
"""

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
import structlog
from litestar import Request, Response, Router, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException

from github_webhook.errors import (
    BodyIncomplete,
    BodyTimeout,
    DeliveryRefused,
    HeaderMissing,
    InboxUnavailable,
    MediaTypeUnsupported,
    PayloadTooLarge,
    ReceiverBusy,
    SignatureInvalid,
    SignatureMissing,
)
from github_webhook.events import Ignored, WorkflowJobEvent, parse
from github_webhook.signatures import Verifier

MAX_BODY = 25 << 20
"""GitHub's own cap on a payload."""

MAX_IN_FLIGHT = 64 << 20
"""Bytes of all bodies held at one time; a sender needs no secret to make us hold one."""

BODY_SECONDS = 20.0
STORE_SECONDS = 8.0

_DELIVERY_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
_EVENT_NAME = re.compile(r"[a-z_]{1,64}")
_HOOK_ID = re.compile(r"[0-9]{1,20}")

_log = structlog.get_logger("github_webhook.receiver")

StoreResult = Literal["stored", "known", "done"]
WebRequest = Request[Any, Any, State]


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A verified delivery. ``id`` is GitHub's GUID, the same again when it is redelivered; Unix seconds."""

    id: str
    event: str
    action: str | None
    received_at: float
    payload: bytes
    hook_id: str | None

    def __repr__(self) -> str:
        return (
            f"Delivery(id={self.id!r}, event={self.event!r}, "
            f"action={self.action!r}, <{len(self.payload)} bytes>)"
        )


class Inbox(Protocol):
    """Where deliveries are written down."""

    async def store(self, delivery: Delivery) -> StoreResult:
        """Committed when it returns.

        ``stored``: new. ``known``: had it, not processed yet (and it will be). ``done``: processed before.
        Raises ReceiverBusy when too many wait to be written down.
        """
        ...


class Counters(Protocol):
    """Where deliveries are counted. All words come from small fixed sets: fit for metric labels."""

    def refused(self, code: str) -> None: ...
    def accepted(self, event: str, outcome: str) -> None: ...


class _NoCounters:
    def refused(self, code: str) -> None: ...
    def accepted(self, event: str, outcome: str) -> None: ...


def receiver(
    inbox: Inbox,
    secrets: Callable[[], Sequence[str]],
    *,
    path: str = "/webhooks/github",
    max_body: int = MAX_BODY,
    max_in_flight: int = MAX_IN_FLIGHT,
    counters: Counters | None = None,
) -> Router:
    """The route to hang into an application. ``secrets`` is asked for every delivery, so rotation is live.

    Answers 202 ``{"status": "stored"|"known"}``, 200 ``{"status": "done"|"ignored"}`` or a problem document.
    """
    return _Receiver(inbox, secrets, max_body, max_in_flight, counters or _NoCounters()).router(path)


class _Held:
    """The bytes of one body that count as in flight until it is answered."""

    bytes = 0


class _Receiver:
    def __init__(
        self,
        inbox: Inbox,
        secrets: Callable[[], Sequence[str]],
        max_body: int,
        max_in_flight: int,
        counters: Counters,
    ) -> None:
        self._inbox = inbox
        self._secrets = secrets
        self._max_body = max_body
        self._max_in_flight = max_in_flight
        self._counters = counters
        self._in_flight = 0

    def router(self, path: str) -> Router:
        @post(
            "/",
            # Litestar's own cap would answer with its own document; ours is enforced while reading.
            request_max_body_size=None,
            summary="Receive a GitHub webhook delivery",
            tags=["webhooks"],
        )
        async def github_delivery(request: WebRequest) -> Response[bytes]:
            return await self._answer(request)

        return Router(path=path, route_handlers=[github_delivery])

    async def _answer(self, request: WebRequest) -> Response[bytes]:
        try:
            status, outcome = await self._receive(request)
        except DeliveryRefused as refusal:
            self._counters.refused(refusal.code)
            # Only a debug line: whoever can reach the port could fill the log with it. It holds no body.
            _log.debug("delivery_refused", code=refusal.code, detail=str(refusal))
            answer = problem(refusal.status, refusal.code, refusal.title, str(refusal))
            if refusal.retry_after is not None:
                answer.headers["retry-after"] = str(refusal.retry_after)
            return answer
        return Response(
            msgspec.json.encode({"status": outcome}), status_code=status, media_type="application/json"
        )

    async def _receive(self, request: WebRequest) -> tuple[int, str]:
        headers = request.headers
        event_name = _header(headers.get("x-github-event"), "X-GitHub-Event", _EVENT_NAME)
        delivery_id = _header(headers.get("x-github-delivery"), "X-GitHub-Delivery", _DELIVERY_ID)
        signature = headers.get("x-hub-signature-256")
        if not signature:
            raise SignatureMissing("the header X-Hub-Signature-256 is missing: give the hook a secret")
        self._check_announced(headers.get("content-length"))
        held = _Held()
        try:
            payload = await self._verified_body(request, signature, held)
            return await self._take(request, event_name, delivery_id, payload)
        finally:
            self._in_flight -= held.bytes

    async def _take(
        self, request: WebRequest, event_name: str, delivery_id: str, payload: bytes
    ) -> tuple[int, str]:
        """A verified body becomes a stored delivery, or is of no use."""
        headers = request.headers
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise MediaTypeUnsupported("set the hook's content type to application/json")
        event = parse(event_name, payload)
        if isinstance(event, Ignored):
            self._counters.accepted(event_name, event.reason)
            return 200, "ignored"
        hook_id = headers.get("x-github-hook-id", "")
        delivery = Delivery(
            id=delivery_id,
            event=event_name,
            action=event.action if isinstance(event, WorkflowJobEvent) else getattr(event, "action", None),
            received_at=time.time(),
            payload=payload,
            hook_id=hook_id if _HOOK_ID.fullmatch(hook_id) else None,
        )
        outcome = await self._store(delivery)
        self._counters.accepted(event_name, outcome)
        return (200 if outcome == "done" else 202), outcome

    def _check_announced(self, length: str | None) -> None:
        if length is None or not length.isdecimal():
            return
        if len(length) > 15 or int(length) > self._max_body:
            raise PayloadTooLarge(f"a delivery is at most {self._max_body} bytes")

    async def _verified_body(self, request: WebRequest, signature: str, held: "_Held") -> bytes:
        """The raw body, hashed as it arrives; raises unless it is small enough and the signature fits."""
        verifier = Verifier(self._secrets())
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > self._max_body:
                        raise PayloadTooLarge(f"a delivery is at most {self._max_body} bytes")
                    if self._in_flight + len(chunk) > self._max_in_flight:
                        raise ReceiverBusy("too many deliveries at once; redeliver this one later")
                    self._in_flight += len(chunk)
                    held.bytes += len(chunk)
                    verifier.update(chunk)
                    body += chunk
        except TimeoutError:
            raise BodyTimeout(f"the body took longer than {BODY_SECONDS:.0f} s") from None
        except HTTPException:
            raise BodyIncomplete("the connection ended in the middle of the body") from None
        if not verifier.matches(signature):
            raise SignatureInvalid("the signature was made with none of the secrets set here")
        return bytes(body)

    async def _store(self, delivery: Delivery) -> StoreResult:
        try:
            async with asyncio.timeout(STORE_SECONDS):
                return await self._inbox.store(delivery)
        except ReceiverBusy:
            raise
        except Exception as error:  # noqa: BLE001
            # Whatever the store raises, GitHub must see a failed delivery and not a silent loss.
            _log.error("inbox_unavailable", delivery=delivery.id, error=type(error).__name__)
            raise InboxUnavailable("the delivery could not be written down; redeliver it") from None


def problem(status: int, code: str, title: str, detail: str) -> Response[bytes]:
    """A problem document (RFC 9457); ``type`` is made from the stable code."""
    document = {"type": f"urn:microvm:problem:{code}", "title": title, "status": status, "detail": detail}
    return Response(msgspec.json.encode(document), status_code=status, media_type="application/problem+json")


def _header(value: str | None, name: str, allowed: re.Pattern[str]) -> str:
    if value is None:
        raise HeaderMissing(f"the header {name} is missing: is this really GitHub?")
    if not allowed.fullmatch(value):
        raise HeaderMissing(f"the header {name} is malformed")
    return value
