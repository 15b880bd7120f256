"""Measures how fast deliveries are taken, beside the floor: two servers on one database, each in turn.

The server is a process of its own, and so is the load. A ratio is that of two rounds next to each other; the median of
them is the figure, since the machine may have other things to do.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from runner_service.store.store import Store, sqlite_url
from scripts.programs.ingest_load import Answers, Load
from scripts.programs.ingest_server import PATHS, SECRET
from scripts.programs.measure import Tick, percentile

AT_ONCE = 1000
_CONNECTIONS = 64
_READY_SECONDS = 60.0
_LOAD_SECONDS = 180.0


class IngestError(Exception):
    """The load could not be measured; the message says why."""


class Server(msgspec.Struct):
    """A running server, ours or the floor."""

    which: str
    pid: int
    port: int

    async def take(self, count: int, connections: int) -> tuple[Answers, float]:
        """Send it ``count`` deliveries; the answers, and the CPU seconds it took for them."""
        load = Load(
            port=self.port, path=PATHS[self.which], secret=SECRET, connections=connections, count=count
        )
        before = _cpu_seconds(self.pid)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scripts.programs.ingest_load",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                output, _ = await process.communicate(msgspec.json.encode(load))
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise IngestError(f"the load ended with {process.returncode}: what it said is above")
        answers = msgspec.json.decode(output, type=Answers)
        if len(answers.ms) != count or set(answers.statuses) - {201, 202}:
            raise IngestError(
                f"of {count} deliveries to {self.which} these were answered: {answers.statuses}"
            )
        return answers, _cpu_seconds(self.pid) - before


@contextlib.asynccontextmanager
async def serving(which: str, database: Path) -> AsyncGenerator[Server]:
    """A server of its own process, ready to answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)
        port = listening.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "scripts.programs.ingest_server", which, str(database), str(listening.fileno()),
            pass_fds=[listening.fileno()],
        )  # fmt: skip
    try:
        server = Server(which, process.pid, port)
        async with asyncio.timeout(_READY_SECONDS):
            await server.take(2, 1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def measure_ingest(directory: Path, *, count: int, rounds: int, tick: Tick) -> dict[str, float]:
    """``count`` deliveries a round over 64 connections; then 1,000 on as many connections at once."""
    database = directory / "ingest.db"
    async with Store.open(sqlite_url(database)):
        pass  # made and migrated before both open it
    async with serving("ours", database) as ours, serving("floor", database) as floor:
        rates: dict[str, list[float]] = {"ours": [], "floor": []}
        load_cpu: list[float] = []
        for _ in range(rounds):
            for server in (ours, floor):
                answers, _ = await server.take(count, _CONNECTIONS)
                rates[server.which].append(count / answers.seconds)
                load_cpu.append(answers.cpu_seconds / answers.seconds)
            tick("deliveries beside the floor")
        bursts: list[list[float]] = []
        for _ in range(rounds):
            answers, _ = await ours.take(AT_ONCE, AT_ONCE)
            bursts.append(answers.ms)
            tick(f"{AT_ONCE} deliveries at once")
    p50s, p99s = [percentile(ms, 50) for ms in bursts], [percentile(ms, 99) for ms in bursts]
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["floor"], strict=True)]
    return {
        "control.ingest_per_s": statistics.median(rates["ours"]),
        "control.ingest_floor_per_s": statistics.median(rates["floor"]),
        "control.ingest_ratio": statistics.median(ratios),
        "control.ingest_load_cpu": statistics.median(load_cpu),
        "control.ingest_p50_ms": statistics.median(p50s),
        "control.ingest_p99_ms": statistics.median(p99s),
        "control.ingest_p99_over_p50": statistics.median(
            p99 / p50 for p99, p50 in zip(p99s, p50s, strict=True)
        ),
    }


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
