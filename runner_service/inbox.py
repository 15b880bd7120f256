"""Where verified deliveries are written down: one committed row each, then the scheduler is woken.

Those that arrive while others are committed go into the next transaction together: a commit costs a sync of the disk.
"""

from collections.abc import Callable
from typing import Literal, Protocol

from github_webhook.errors import ReceiverBusy
from runner_service.store import queries as q
from runner_service.store.store import Store

MOST_WAITING = 4000
"""Deliveries that wait to be written down; what comes then is refused, and the forge shows it as failed."""


class Arrived(Protocol):
    """A verified delivery, as ``github_webhook.receiver.Delivery``. ``received_at`` in Unix seconds."""

    @property
    def id(self) -> str: ...
    @property
    def event(self) -> str: ...
    @property
    def action(self) -> str | None: ...
    @property
    def received_at(self) -> float: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def hook_id(self) -> str | None: ...


class StoreInbox:
    """The receiver's inbox for one forge."""

    def __init__(self, store: Store, forge: str, wake: Callable[[], None]) -> None:
        self._group = store.grouped(q.put_deliveries)
        self._forge = forge
        self._wake = wake

    async def store(self, delivery: Arrived) -> Literal["stored", "known", "done"]:
        """Committed when it returns. ``known``: had it, not processed yet; ``done``: processed before.

        Raises ReceiverBusy when too many wait already.
        """
        if len(self._group) >= MOST_WAITING:
            raise ReceiverBusy("too many deliveries wait to be written down; redeliver this one later")
        row = {
            "id": delivery.id,
            "forge": self._forge,
            "event": delivery.event,
            "action": delivery.action,
            "hook_id": delivery.hook_id,
            "received_at": delivery.received_at,
            "payload": delivery.payload,
        }
        outcome = await self._group.do(row)
        if outcome != "done":
            self._wake()
        return outcome
