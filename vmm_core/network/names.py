"""Where listed names are now: looked up on the host, remembered for a minute, refreshed before it matters.

A guest never waits for a look-up after its machine started: an answer that is too old is used while a new one
is fetched. Bounded: four look-ups at once, 3 seconds each, 4,096 names.
"""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

Lookup = Callable[[str], Awaitable[list[str]]]

FRESH_SECONDS = 60.0
FAILED_SECONDS = 20.0
_LOOKUP_SECONDS = 3.0
_AT_ONCE = 4
_MAX_NAMES = 4096


class Names:
    """Answers with one address a name; keeps to it for as long as the name still has it."""

    def __init__(self, lookup: Lookup | None = None) -> None:
        self._executor = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="names")
        self._lookup = lookup or self._ask_host
        self._known: dict[str, tuple[str, float]] = {}
        self._failed: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def targets(self, names: Iterable[str]) -> dict[str, str]:
        """Name → address, for those that have one. Waits only for names that were not asked for lately."""
        wanted = set(names)
        now = time.monotonic()
        tasks = {name: self._ask(name) for name in wanted if not self._fresh(name, now)}
        unknown = [
            task
            for name, task in tasks.items()
            if name not in self._known and now - self._failed.get(name, -FAILED_SECONDS) >= FAILED_SECONDS
        ]
        if unknown:
            await asyncio.wait(unknown, timeout=_LOOKUP_SECONDS)
        return {name: self._known[name][0] for name in wanted if name in self._known}

    async def refresh(self, names: Iterable[str]) -> dict[str, str]:
        """As ``targets``, asking again whatever is known, and waiting for the answers."""
        wanted = set(names)
        for memory in (self._known, self._failed):
            if len(memory) > _MAX_NAMES:
                for stale in memory.keys() - wanted:
                    del memory[stale]
        tasks = [self._ask(name) for name in wanted]
        if tasks:
            await asyncio.wait(tasks)
        return {name: self._known[name][0] for name in wanted if name in self._known}

    def close(self) -> None:
        for task in self._asking.values():
            task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _fresh(self, name: str, now: float) -> bool:
        known = self._known.get(name)
        return known is not None and now - known[1] < FRESH_SECONDS

    def _ask(self, name: str) -> asyncio.Task[None]:
        task = self._asking.get(name)
        if task is None:
            task = self._asking[name] = asyncio.create_task(self._update(name))
            task.add_done_callback(lambda _: self._asking.pop(name, None))
        return task

    async def _update(self, name: str) -> None:
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                addresses = await self._lookup(name)
        except (OSError, TimeoutError, UnicodeError):
            addresses = []
        # Without an answer the last one stays: a resolver that is down must not cut what works.
        self._failed.pop(name, None)
        if not addresses:
            self._failed[name] = time.monotonic()
        else:
            last = self._known.get(name)
            kept = last is not None and last[0] in addresses
            self._known[name] = (last[0] if last is not None and kept else addresses[0], time.monotonic())

    async def _ask_host(self, name: str) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._executor, socket.getaddrinfo, name, None, socket.AF_INET, socket.SOCK_STREAM
        )
        return [str(entry[4][0]) for entry in found]
