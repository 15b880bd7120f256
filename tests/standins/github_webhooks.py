"""Webhook deliveries of the stand-in GitHub: signed, in order by default, never sent twice by themselves."""

import asyncio
import contextlib
import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import httpx

from github_webhook.signatures import sign

HOOK_ID = 109948940


@dataclass(slots=True)
class Sent:
    """One try to deliver. Tries of one delivery share the GUID."""

    id: int
    guid: str
    event: str
    action: str | None
    body: bytes
    repository_id: int | None
    redelivery: bool
    installation_id: int | None = None
    delivered_at: float = 0.0
    duration: float = 0.0
    status: str = "pending"
    status_code: int = 0
    answer: bytes = b""


@dataclass(slots=True)
class Mishaps:
    """What happens to the next deliveries, as it does at GitHub: lost, doubled, late, out of order."""

    lose: int = 0
    double: int = 0
    delay: float = 0.0
    hold: bool = False
    held: list[Sent] = field(default_factory=list)


class Webhooks:
    """Delivers to one address. ``url`` None: deliveries are recorded as failed to connect."""

    def __init__(self, url: str | None, secret: str) -> None:
        self.url = url
        self.secret = secret
        self.sent: list[Sent] = []
        self.mishaps = Mishaps()
        self._queue: asyncio.Queue[Sent] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._http: httpx.AsyncClient | None = None
        self._last_id = 0

    async def start(self) -> None:
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._http is not None:
            await self._http.aclose()

    def send(
        self,
        event: str,
        payload: dict[str, Any],
        *,
        repository_id: int | None = None,
        installation_id: int | None = None,
    ) -> Sent:
        body = json.dumps(payload, separators=(",", ":")).encode()
        sent = self._record(str(uuid.uuid4()), event, payload.get("action"), body, repository_id, False)
        sent.installation_id = installation_id
        if self.mishaps.lose > 0:
            self.mishaps.lose -= 1
            sent.status, sent.status_code, sent.delivered_at = "failed to connect", 502, time.time()
            return sent
        if self.mishaps.hold:
            self.mishaps.held.append(sent)
            return sent
        self._queue.put_nowait(sent)
        if self.mishaps.double > 0:
            self.mishaps.double -= 1
            self.redeliver(sent.guid)
        return sent

    def release(self, *, reverse: bool = False) -> None:
        """Send what was held back; ``reverse`` puts the last one first."""
        held, self.mishaps.held, self.mishaps.hold = self.mishaps.held, [], False
        for sent in reversed(held) if reverse else held:
            self._queue.put_nowait(sent)

    def redeliver(self, guid: str) -> Sent:
        """Send a delivery once more under its old GUID. Raises KeyError."""
        old = next((sent for sent in self.sent if sent.guid == guid), None)
        if old is None:
            raise KeyError(guid)
        again = self._record(guid, old.event, old.action, old.body, old.repository_id, True)
        again.installation_id = old.installation_id
        self._queue.put_nowait(again)
        return again

    async def settled(self, timeout: float = 10.0) -> None:
        """Everything queued so far was tried. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            await self._queue.join()

    def _record(
        self, guid: str, event: str, action: str | None, body: bytes, repository_id: int | None, again: bool
    ) -> Sent:
        self._last_id += 1
        sent = Sent(self._last_id, guid, event, action, body, repository_id, again)
        self.sent.append(sent)
        return sent

    async def _work(self) -> None:
        while True:
            sent = await self._queue.get()
            try:
                await asyncio.sleep(self.mishaps.delay)
                await self._deliver(sent)
            finally:
                self._queue.task_done()

    async def _deliver(self, sent: Sent) -> None:
        assert self._http is not None
        sent.delivered_at = started = time.time()
        headers = {
            "accept": "*/*",
            "content-type": "application/json",
            "user-agent": "GitHub-Hookshot/standin",
            "x-github-delivery": sent.guid,
            "x-github-event": sent.event,
            "x-github-hook-id": str(HOOK_ID),
            "x-github-hook-installation-target-id": str(sent.repository_id or 1),
            "x-github-hook-installation-target-type": "repository",
            "x-hub-signature-256": sign(sent.body, self.secret),
        }
        try:
            if self.url is None:
                raise httpx.ConnectError("no webhook address is set")
            response = await self._http.post(self.url, content=sent.body, headers=headers)
        except httpx.HTTPError:
            sent.status, sent.status_code = "failed to connect", 502
        else:
            sent.status_code, sent.answer = response.status_code, response.content[:4096]
            sent.status = (
                "OK" if response.is_success else "Invalid HTTP Response: " + str(response.status_code)
            )
        sent.duration = time.time() - started
