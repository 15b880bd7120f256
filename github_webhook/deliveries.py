"""Finds webhook deliveries that never arrived and asks for them again: GitHub redelivers nothing by itself.

For GitHub Apps (``GET /app/hook/deliveries``): each try to deliver is one row, and tries of one delivery share
a GUID. A delivery is lost when none of its tries ended well.
"""

from datetime import datetime

import httpx
import msgspec

from github_webhook.app_auth import AppAuth
from github_webhook.rest import Rest, path

PER_PAGE = 100
MAX_PAGES = 100


class LostDelivery(msgspec.Struct, frozen=True):
    """A delivery none of whose tries ended well; ``id`` is that of its latest try. Unix seconds."""

    id: int
    guid: str
    event: str
    action: str | None
    delivered_at: float
    status_code: int


class _Try(msgspec.Struct):
    id: int
    guid: str
    delivered_at: datetime
    status_code: int
    event: str
    action: str | None = None


_tries = msgspec.json.Decoder(list[_Try])


class Deliveries:
    """The deliveries of one App. The caller owns ``http``; ``timeout`` is in seconds, per call."""

    def __init__(
        self,
        *,
        auth: AppAuth,
        http: httpx.AsyncClient,
        base_url: str = "https://api.github.com",
        timeout: float = 10.0,
    ) -> None:
        self._auth = auth
        self._rest = Rest(base_url, http, timeout=timeout)

    async def lost(self, *, since: float) -> list[LostDelivery]:
        """Lost deliveries tried since ``since`` (Unix seconds), oldest first. Raises a ForgeError."""
        latest: dict[str, _Try] = {}
        arrived: set[str] = set()
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            answer = await self._rest.call(
                "GET",
                "/app/hook/deliveries",
                headers=self._auth.app_headers(),
                bucket="app",
                params={"per_page": str(PER_PAGE), **({"cursor": cursor} if cursor else {})},
            )
            page = answer.read(_tries)
            for row in page:
                if 200 <= row.status_code < 300:
                    arrived.add(row.guid)
                latest.setdefault(row.guid, row)
            cursor = answer.next_cursor
            # Newest first: beyond this page everything is older still.
            if cursor is None or (page and page[-1].delivered_at.timestamp() < since):
                break
        found = [
            LostDelivery(row.id, guid, row.event, row.action, row.delivered_at.timestamp(), row.status_code)
            for guid, row in latest.items()
            if guid not in arrived and row.delivered_at.timestamp() >= since
        ]
        return sorted(found, key=lambda delivery: (delivery.delivered_at, delivery.id))

    async def redeliver(self, delivery_id: int) -> None:
        """Ask GitHub to send a delivery once more; it keeps its GUID. Raises a ForgeError."""
        await self._rest.call(
            "POST",
            f"/app/hook/deliveries{path(delivery_id)}/attempts",
            headers=self._auth.app_headers(),
            bucket="app",
        )
