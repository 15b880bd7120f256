"""The parents whose memory is resident: sealed in RAM, shared by every fork; the least recently forked are let go."""

import asyncio
import os
from collections import OrderedDict

from vmm_core.machine import Snapshot
from vmm_core.snapshot import load_memory

# Of the host's memory, for parents that wait for a fork; those that VMs map are there anyway.
_SHARE = 4


class Residents:
    """Sealed memory by digest. A descriptor that was let go lives on in the VMMs that map it.

    The parents last forked are kept, as many as fit into ``most_bytes`` (default: a quarter of the host's memory).
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._most_bytes = total // _SHARE if most_bytes is None else most_bytes
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
        while len(self._held) > 1 and sum(map(_size, self._held.values())) > self._most_bytes:
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


def _size(fd: int) -> int:
    """Bytes of memory that a sealed memory takes; what was never written takes none."""
    return os.fstat(fd).st_blocks * 512
