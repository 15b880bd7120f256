"""Webhook deliveries of the stand-in GitHub: signed, in order by default, never sent twice by themselves."""

import asyncio
import contextlib
import json
import random
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
    lost: bool = False

    @property
    def received(self) -> bool:
        """Whether it really was: GitHub may believe so of one that was lost."""
        return 200 <= self.status_code < 300 and not self.lost


@dataclass(slots=True)
class Unruly:
    """A share of all deliveries is lost or doubled, and each is up to ``late`` seconds late: so they overtake.

    Half of the lost ones failed, as GitHub will tell; the others it believes to have been received.
    """

    chance: random.Random
    lost: float = 0.2
    doubled: float = 0.2
    late: float = 0.5


@dataclass(slots=True)
class Mishaps:
    """What happens to the next deliveries, as it does at GitHub: lost, doubled, late, out of order."""

    lose: int = 0
    double: int = 0
    delay: float = 0.0
    hold: bool = False
    held: list[Sent] = field(default_factory=list)
    unruly: Unruly | None = None


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
        self._under_way: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
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
        if self.mishaps.unruly is not None:
            self._unruly(sent, self.mishaps.unruly)
            return sent
        self._queue.put_nowait(sent)
        if self.mishaps.double > 0:
            self.mishaps.double -= 1
            self.redeliver(sent.guid)
        return sent

    def _unruly(self, sent: Sent, unruly: Unruly) -> None:
        chance = unruly.chance
        if chance.random() < unruly.lost:
            told = ("failed to connect", 502) if chance.random() < 0.5 else ("OK", 202)
            (sent.status, sent.status_code), sent.delivered_at = told, time.time()
            sent.lost = True
            return
        self._soon(sent, chance.random() * unruly.late)
        if chance.random() < unruly.doubled:
            self._soon(self._again(sent), chance.random() * unruly.late)

    def _soon(self, sent: Sent, seconds: float) -> None:
        async def deliver() -> None:
            await asyncio.sleep(seconds)
            await self._deliver(sent)

        task = asyncio.create_task(deliver())
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

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
        again = self._again(old)
        self._queue.put_nowait(again)
        return again

    def remind(self, action: str, after: float) -> None:
        """Redeliver what was received in no try, the last of them ``after`` seconds ago: as who looks at them would."""
        last: dict[str, Sent] = {}
        for sent in self.sent:
            before = last.get(sent.guid)
            if before is None or not before.received:
                last[sent.guid] = sent
        for sent in last.values():
            tried = sent.status_code and sent.delivered_at < time.time() - after
            if sent.action == action and tried and not sent.received:
                self.redeliver(sent.guid)

    def _again(self, old: Sent) -> Sent:
        again = self._record(old.guid, old.event, old.action, old.body, old.repository_id, True)
        again.installation_id = old.installation_id
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
