"""The frozen machines of a data directory: who they are, whose turn it is with one, and until when they are kept.

frozen ──claimed──► thawed or discarded by one and no other
frozen ──its time has passed──► removed, by a timer or when the next engine opens
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator

from vmm_core.errors import BadRequest, UnknownTemplate, UnknownVm
from vmm_core.machine import Frozen, Snapshot
from vmm_core.snapshot import SnapshotStore

_LONGEST_WAIT = 3600.0  # other processes freeze machines too


class FrozenVms:
    def __init__(self, snapshots: SnapshotStore) -> None:
        self._snapshots = snapshots
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: set[asyncio.Task[None]] = set()

    def all(self) -> list[Frozen]:
        """Oldest first."""
        return [frozen for snapshot in self._snapshots.frozen() if (frozen := snapshot.manifest.frozen)]

    def has(self, vm_id: str) -> bool:
        return any(frozen.id == vm_id for frozen in self.all())

    @contextlib.asynccontextmanager
    async def claimed(self, vm_id: str) -> AsyncGenerator[tuple[Snapshot, Frozen]]:
        """The frozen machine of this id, which nobody else thaws, discards or forks meanwhile.

        Raises UnknownVm when there is none, BadRequest when somebody else has claimed it.
        """
        unknown = UnknownVm(
            f"there is no frozen VM {vm_id}: it was thawed or discarded, or its time has passed"
        )
        digest = next((frozen.digest for frozen in self.all() if frozen.id == vm_id), None)
        if digest is None:
            raise unknown
        held = self._snapshots.hold(digest, alone=True)
        if held is None:
            raise BadRequest(f"frozen VM {vm_id} is being thawed, forked or discarded right now: try again")
        try:
            try:
                snapshot = self._snapshots.load(digest)
            except UnknownTemplate:
                raise unknown from None
            if (frozen := snapshot.manifest.frozen) is None:
                raise unknown
            yield snapshot, frozen
        finally:
            os.close(held)
        await asyncio.to_thread(self._snapshots.tidy)  # when it was retired

    async def discard(self, vm_id: str) -> None:
        async with self.claimed(vm_id) as (snapshot, _):
            self._snapshots.retire(snapshot)

    def watch_time(self) -> None:
        """Remove those whose time has passed, now and whenever the next one's has."""
        if self._timer is not None:
            self._timer.cancel()
        wait = _LONGEST_WAIT
        for frozen in self.all():
            remaining = frozen.expires_at - time.time()
            if remaining <= 0:
                task = asyncio.create_task(self._expire(frozen.id), name=f"expire-{frozen.id}")
                self._expiring.add(task)
                task.add_done_callback(self._expiring.discard)
            else:
                wait = min(wait, remaining)
        self._timer = asyncio.get_running_loop().call_later(wait + 0.01, self.watch_time)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._expiring, return_exceptions=True)

    async def _expire(self, vm_id: str) -> None:
        with contextlib.suppress(BadRequest):  # somebody else was quicker, or thaws it right now
            await self.discard(vm_id)
