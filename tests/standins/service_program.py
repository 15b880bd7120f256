"""``microvm serve`` as a real process on a host without VMs: arguments as those of the real command."""

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from runner_service import cli, daemon
from runner_service.domain import Template
from tests.standins.engine import FakeEngine, FakeHost
from tests.unit.runner_service.world import Catalog

HOST = FakeHost((Template("github-runner", "d" * 64, (), 512, "/opt/actions-runner"),))


class NoVms(FakeEngine):
    """An engine that could make VMs, was it asked to; nothing of the host is touched."""

    staging = Path("/tmp")

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, data_dir: Path, **_: Any) -> AsyncGenerator["NoVms"]:
        del data_dir
        yield cls(HOST)

    def vms(self) -> list[Any]:
        return []


def catalog(_: object) -> Catalog:
    return Catalog(HOST, Path("/nowhere"))


if __name__ == "__main__":
    setattr(daemon, "Engine", NoVms)  # noqa: B010
    setattr(daemon, "EngineCatalog", catalog)  # noqa: B010
    cli.main()
