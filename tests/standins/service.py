"""The whole service as a process of its own over a fake host, to be killed and started again in no time.

    python -m tests.standins.service CONFIG LOG

prints 0 when it is ready, forks a service for each line on stdin and prints its process id; when that one ended, its
wait status. All is imported once, before the first fork: a start costs a fraction of a second. It is the daemon as it
is: only the engine is another, and the clocks that are made for hours run faster.
"""

import asyncio
import contextlib
import functools
import importlib
import os
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from runner_service import daemon
from runner_service.domain import Template
from runner_service.settings import load
from tests.standins.distant import DistantEngine, FixedCatalog

TEMPLATES = (
    Template(
        "github-runner", "d" * 64, ("microvm-1cpu-512mb",), 512, "/opt/actions-runner", runner="2.330.0"
    ),
)
TICK = 1.0
_FASTER: dict[str, object] = {
    "runner_service.flow._BUSY_EVERY": 0.5,
    "runner_service.flow._RETRY_EVERY": 0.5,
    "runner_service.flow._LOOK_EVERY": (0.5, 1.0, 2.0),
    "runner_service.doubts.LONGEST_PAUSE": 2.0,
    "runner_service.doubts.LAG_SECONDS": 2.0,
    "runner_service.doubts.UNSEEN_SECONDS": 20.0,
    "runner_service.polling._REACH_EVERY": 5.0,
    "runner_service.polling._LOOK_LIMIT": 4.0,
    "runner_service.poll_plan.CALLS_A_SECOND": 50.0,
    "github_webhook.rest.SECONDARY_PAUSE": 1.0,
    "github_webhook.circuit.FIRST_PAUSE": 0.5,
    "github_webhook.circuit.LONGEST_PAUSE": 2.0,
}


def faster() -> None:
    """Set the clocks. AttributeError when one of them is not there any more."""
    for name, value in _FASTER.items():
        module, _, attribute = name.rpartition(".")
        found = importlib.import_module(module)
        getattr(found, attribute)
        setattr(found, attribute, value)
    daemon.Scheduler = functools.partial(daemon.Scheduler, tick=TICK)  # type: ignore[misc]


def _serve(config: Path, log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    daemon.Engine = DistantEngine  # type: ignore[misc]
    FixedCatalog.found = TEMPLATES
    daemon.EngineCatalog = FixedCatalog  # type: ignore[misc]
    faster()
    asyncio.run(daemon.serve(load(config, {})))


def main(config: Path, log: Path) -> None:
    print(0, flush=True)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _serve(config, log)
            finally:
                os._exit(0)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


class ServiceProcess:
    """``async with ServiceProcess.open(config, log) as service``: ``start``, ``kill``, ``stop`` as often as wanted."""

    def __init__(self, nursery: asyncio.subprocess.Process) -> None:
        self._nursery = nursery
        self.pid: int | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, config: Path, log: Path) -> AsyncGenerator["ServiceProcess"]:
        with log.open("ab") as out:
            nursery = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.standins.service", str(config), str(log),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=out,
            )  # fmt: skip
        service = cls(nursery)
        try:
            await service._number()
            yield service
        finally:
            if service.pid is not None:
                await service.kill()
            assert nursery.stdin is not None
            nursery.stdin.close()
            await nursery.wait()

    async def start(self) -> None:
        assert self.pid is None and self._nursery.stdin is not None
        self._nursery.stdin.write(b"\n")
        self.pid = await self._number()

    async def kill(self) -> None:
        """SIGKILL, at whatever it is doing."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> None:
        assert self.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        self.pid = None
        await self._number()

    async def _number(self) -> int:
        assert self._nursery.stdout is not None
        async with asyncio.timeout(60):
            return int(await self._nursery.stdout.readline())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
