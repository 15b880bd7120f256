"""The end of a service: SIGTERM drains, a second one (or the end of the grace) hands over at once.

    serving ── SIGTERM ──► draining ── nothing left · grace over · SIGTERM again ──► handing over ──► ended

draining      no new VM is started, what has no job yet is let go, what runs goes on; webhooks and the API still answer
handing over  ``keep``: the VMs run on and the next start adopts them; ``stop``: they are ended and deregistered first
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Literal, Protocol

import structlog

log = structlog.get_logger("stopping")

_STOP_SECONDS = 60.0
_DRAIN_SECONDS = 5.0


class Ending(Protocol):
    """What the end needs of the scheduler."""

    async def drain(self) -> None: ...
    async def emptied(self) -> None: ...
    async def end_vms(self) -> None: ...
    @property
    def driven(self) -> int: ...


class Stopping:
    """Who wants the service to end, and how soon. Signals may come at any time, also before it serves."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def signal(self) -> None:
        """SIGTERM or SIGINT: the first asks, each further one hurries."""
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()

    def broken(self) -> None:
        """A part of the service ended by itself: there is nothing to wait for."""
        self.at_once.set()
        self.asked.set()


async def wind_down(
    ending: Ending, stopping: Stopping, *, grace: float, vms: Literal["keep", "stop"]
) -> None:
    """Drain for ``grace`` seconds at most, then end the VMs or leave them to the next start."""
    # A service that ends takes no new work in any case: other hosts must not count on this one.
    await _within(_DRAIN_SECONDS, ending.drain())
    if ending.driven and grace and not stopping.at_once.is_set():
        log.info("draining", runners=ending.driven, grace_s=grace, hint="a second SIGTERM hands over at once")
        await _first(grace, ending.emptied(), stopping.at_once.wait())
    if vms == "stop" and ending.driven:
        log.info("ending_vms", runners=ending.driven)
        await _within(_STOP_SECONDS, ending.end_vms())
    log.info("handing_over", runners=ending.driven, vms=vms)


async def _first(seconds: float, *waits: Coroutine[Any, Any, Any]) -> None:
    tasks = [asyncio.create_task(one) for one in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """What fails or takes too long holds nothing up: the rows tell the next start how to go on."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except Exception as error:
        log.exception("ending_failed", error=f"{type(error).__name__}: {error}"[:300])
