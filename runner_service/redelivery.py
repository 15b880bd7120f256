"""Asks GitHub to send the deliveries again that never arrived: it redelivers nothing by itself. Apps only.

    every five minutes, each App by itself: tries since the last sweep ─► none ended well, not in the inbox ─► again

Up to when an App's deliveries were looked through is a row, so that what failed while the service was away is found.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from github_webhook.deliveries import LostDelivery
from github_webhook.errors import ForgeError, NotFound, Unprocessable
from runner_service.store import queries as q
from runner_service.store.store import Store
from runner_service.telemetry import Metrics

log = structlog.get_logger("redelivery")

EVENTS = frozenset({"workflow_job", "push", "installation"})
EVERY = 300.0
AT_ONCE = 50
TRIES = 3
_FIRST_LOOK = 3600.0
_KEPT_BY_GITHUB = 3 * 86400.0
_OVERLAP = 600.0
_SWEEP_LIMIT = 120.0
_REMEMBERED = 10_000


class Tries(Protocol):
    """The deliveries of one App, as ``github_webhook.deliveries.Deliveries``. Raise ForgeErrors."""

    async def lost(self, *, since: float) -> Sequence[LostDelivery]: ...
    async def redeliver(self, delivery_id: int) -> None: ...


class Redeliveries:
    """``apps`` are the deliveries of each App by its name in the settings."""

    def __init__(
        self,
        *,
        store: Store,
        forge: str,
        apps: Mapping[str, Tries],
        metrics: Metrics,
        every: float = EVERY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._forge = forge
        self._apps = apps
        self._metrics = metrics
        self._every = every
        self._clock = clock
        self._asked: dict[str, int] = {}

    async def run(self) -> None:
        """At once and then every few minutes, until cancelled."""
        while True:
            await asyncio.gather(*(self._try(name, tries) for name, tries in self._apps.items()))
            await asyncio.sleep(self._every)

    async def _try(self, name: str, tries: Tries) -> None:
        """One App's trouble is not the others', and not for long: the next sweep looks at the same time again."""
        try:
            async with asyncio.timeout(_SWEEP_LIMIT):
                await self.sweep(name, tries)
        except ForgeError as error:
            self._metrics.redeliveries.labels(error.code).inc()
            log.warning("deliveries_unknown", app=name, code=error.code, error=str(error)[:300])
        except TimeoutError:
            self._metrics.redeliveries.labels("timeout").inc()
            log.warning("deliveries_unknown", app=name, error=f"not done within {_SWEEP_LIMIT:g} s")
        except Exception as error:
            self._metrics.redeliveries.labels("internal_error").inc()
            log.exception("sweep_failed", app=name, error=str(error))

    async def sweep(self, name: str, tries: Tries) -> None:
        """Ask for what was lost since the last sweep; more than ``AT_ONCE`` are left to the next one."""
        began = self._clock()
        row = f"deliveries of {self._forge} {name}"
        mark = await self._store.read(lambda db: q.swept_until(db, row))
        since = began - _FIRST_LOOK if mark is None else max(mark, began - _KEPT_BY_GITHUB) - _OVERLAP
        lost = [one for one in await tries.lost(since=since) if one.event in EVENTS]
        guids = [one.guid for one in lost]
        arrived = await self._store.read(lambda db: q.known_deliveries(db, self._forge, guids))
        missing = [one for one in lost if one.guid not in arrived and self._asked.get(one.guid, 0) < TRIES]
        for one in missing[:AT_ONCE]:
            await self._again(name, tries, one)
        until = missing[AT_ONCE].delivered_at if len(missing) > AT_ONCE else began
        await self._store.write(lambda db: q.save_swept(db, row, until))

    async def _again(self, name: str, tries: Tries, lost: LostDelivery) -> None:
        if len(self._asked) >= _REMEMBERED:
            self._asked.clear()
        self._asked[lost.guid] = self._asked.get(lost.guid, 0) + 1
        outcome = "asked"
        try:
            await tries.redeliver(lost.id)
        except (NotFound, Unprocessable) as error:
            # GitHub has forgotten it: the polls must find what it told of.
            outcome = error.code
        self._metrics.redeliveries.labels(outcome).inc()
        log.info(
            "delivery_lost", app=name, guid=lost.guid, event_name=lost.event, action=lost.action,
            status=lost.status_code, outcome=outcome,
        )  # fmt: skip
