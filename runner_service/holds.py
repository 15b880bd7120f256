"""Asks a forge that is held back whether it is still so: no job's VM is forked to find that out.

Each account is asked by itself, so that one which keeps silent delays no other. When it answers, its circuit closes
and the scheduler goes on at once.
"""

import asyncio
import time
from collections.abc import Callable

from github_webhook.app_auth import Scope
from github_webhook.circuit import Held
from github_webhook.github import GitHub
from runner_service.telemetry import Metrics

_TICK = 1.0
_AT_ONCE = 32
_SHOWN = 5


class Probes:
    """Looks every second for what is due; each question ends within the client's own time-out."""

    def __init__(
        self, client: GitHub, metrics: Metrics, *, tick: float = _TICK, clock: Callable[[], float] = time.time
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._tick = tick
        self._clock = clock
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                self.look()
                await asyncio.sleep(self._tick)
        finally:
            for task in self._asking.values():
                task.cancel()
            await asyncio.gather(*self._asking.values(), return_exceptions=True)

    def look(self) -> None:
        """Ask for everybody who is due, and count who is held back."""
        held = self._client.circuits.all()
        self._metrics.hold_back([one.code for one in held])
        now = self._clock()
        for one in held:
            scope = one.hint
            due = one.until <= now and one.who not in self._asking and len(self._asking) < _AT_ONCE
            if due and isinstance(scope, Scope):
                task = asyncio.create_task(self._client.probe(scope), name=f"probe-{one.who}")
                self._asking[one.who] = task
                task.add_done_callback(lambda _, who=one.who: self._asking.pop(who, None))


def told(held: list[Held]) -> str:
    """What is held back, in one line."""
    if not held:
        return "no call is held back"
    shown = [f"{one.who or 'every call'}: {one.reason}"[:300] for one in held[:_SHOWN]]
    more = [f"and {len(held) - _SHOWN} more"] if len(held) > _SHOWN else []
    return "; ".join([*shown, *more])
