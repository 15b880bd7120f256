"""Removes everything that a test run has left, also one that was killed: ``python -m tests.sweep DIR``.

VMs and frozen VMs of the test data directory end, and what nothing owns goes from the whole host, as the service's
reaper removes it: slots, control groups, cells, jailers, drafts, captures. The last engine to leave takes the
firewall's table along and unmounts the pool. What living processes hold is left to them.
"""

import asyncio
import contextlib
import logging
import sys
from pathlib import Path

from vmm_core.engine import Engine
from vmm_core.errors import UnknownVm, VmmError

_MOST_PASSES = 50


async def sweep(data_dir: Path) -> None:
    if not data_dir.exists():
        return
    async with Engine.open(data_dir) as engine:
        for record in engine.records():
            with contextlib.suppress(UnknownVm):
                await engine.destroy(record.id)
        for vm in await engine.adopt():  # removes what was never finished
            await vm.destroy()
        for frozen in engine.frozen():
            with contextlib.suppress(VmmError):  # somebody thaws it
                await engine.discard(frozen.id)
        reaper = await engine.reaper()
        await reaper.sweep()
        for _ in range(_MOST_PASSES):
            if not await reaper.sweep():
                break


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="sweep: %(message)s")
    asyncio.run(sweep(Path(sys.argv[1])))
