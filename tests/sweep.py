"""Ends every VM of a test data directory and unmounts its pool: ``python -m tests.sweep DIR``.

Runs after the tests, also after a run that was killed.
"""

import asyncio
import sys
from pathlib import Path

from vmm_core.engine import Engine


async def sweep(data_dir: Path) -> None:
    if not data_dir.exists():
        return
    async with Engine.open(data_dir) as engine:
        for record in engine.records():
            await engine.destroy(record.id)
        await engine.adopt()  # removes what was never finished


if __name__ == "__main__":
    asyncio.run(sweep(Path(sys.argv[1])))
