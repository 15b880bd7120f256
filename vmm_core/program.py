"""Runs a program of this host to its end: what it is given and what it says are files in memory, not pipes.

It is reaped through its pidfd (process.py), by nobody but us. asyncio's own subprocesses are not: a thread waits for
each, and ``kill`` and ``close`` poll it as well, so that one of the two now and then finds the other's "unknown child".
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vmm_core.process import VmmProcess


class Finished(msgspec.Struct, frozen=True):
    """How a program ended: its exit status (below 0: the signal), its output, and the start of its complaints."""

    status: int
    output: bytes
    errors: str


async def run(argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Finished:
    """Run ``argv`` to its end. It is killed when the caller gives up.

    Raises VmmMissing when it cannot be started, TimeoutError when it takes longer than ``timeout`` seconds.
    """
    given, said = os.memfd_create("stdin"), os.memfd_create("stdout")
    try:
        os.write(given, stdin)
        os.lseek(given, 0, os.SEEK_SET)
        process = VmmProcess.spawn(argv, cwd=Path("/"), stdin=given, stdout=said)
        try:
            async with asyncio.timeout(timeout):
                status = await process.wait()
            errors = process.log_text()
        finally:
            await process.end()
            process.close()
        return Finished(status or 0, os.pread(said, os.fstat(said).st_size, 0), errors)
    finally:
        os.close(given)
        os.close(said)
