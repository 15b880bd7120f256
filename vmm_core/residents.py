"""The parents whose memory is resident: sealed in RAM, shared by every fork; the least recently forked are let go."""

import asyncio
import os
from collections import OrderedDict

from vmm_core.machine import Snapshot
from vmm_core.snapshot import load_memory

RESIDENT_PARENTS = 4


class Residents:
    """Sealed memory by digest. A descriptor that was let go lives on in the VMMs that map it."""

    def __init__(self, bound: int = RESIDENT_PARENTS) -> None:
        self._bound = bound
        self._held: OrderedDict[str, int] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._pinned: dict[str, int] = {}

    async def memory_of(self, snapshot: Snapshot) -> int:
        """The sealed memory of a parent, loaded once. The descriptor stays ours: use it before the next await."""
        digest = snapshot.digest
        if digest in self._pinned:
            return self._pinned[digest]
        if digest not in self._held:
            loading = self._loading.get(digest)
            if loading is None:
                loading = asyncio.create_task(self._load(snapshot), name=f"load-{digest[:12]}")
                self._loading[digest] = loading
            await asyncio.shield(loading)
        self._held.move_to_end(digest)
        while len(self._held) > self._bound:
            os.close(self._held.popitem(last=False)[1])
        return self._held[digest]

    def pin(self, digest: str, fd: int) -> None:
        """Keep the sealed memory of a snapshot until ``unpin``. The descriptor is ours from now on."""
        self._pinned[digest] = fd

    def unpin(self, digest: str) -> None:
        os.close(self._pinned.pop(digest))

    async def close(self) -> None:
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        while self._held:
            os.close(self._held.popitem()[1])
        while self._pinned:
            os.close(self._pinned.popitem()[1])

    async def _load(self, snapshot: Snapshot) -> None:
        """The task itself keeps the books: whoever waits for it may be cancelled."""
        try:
            self._held[snapshot.digest] = await asyncio.to_thread(load_memory, snapshot)
        finally:
            del self._loading[snapshot.digest]
