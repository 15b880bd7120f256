"""What takes the deliveries of the bench: ``python -m scripts.programs.ingest_server ours|floor DATABASE SOCKET``.

``ours`` is the service's own application, receiver and inbox. ``floor`` is a bare Litestar route that only inserts one
row of the same bytes into the same database, in a transaction of its own. Both run on uvicorn as the service does.
"""

import asyncio
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import uvicorn
from litestar import Litestar, Request, post
from litestar.datastructures import State

from github_webhook.receiver import receiver
from runner_service import serving, telemetry
from runner_service.api import Api, Readiness
from runner_service.inbox import StoreInbox
from runner_service.joblog import JobLogs
from runner_service.store.schema import inbox
from runner_service.store.store import Store, sqlite_url
from runner_service.views import VmView

SECRET = "the secret of the bench"
PATHS = {"ours": "/webhooks/github", "floor": "/"}


def ours(store: Store, directory: Path) -> Litestar:
    """The service's application; nothing but its webhooks is asked for."""
    metrics = telemetry.Metrics()
    logs = JobLogs(directory, limit=1 << 20)

    async def readiness() -> Readiness:
        return Readiness(True, ())

    async def vms() -> list[VmView]:
        return []

    async def kill(_vm: str) -> None:
        return None

    api = Api(
        store=store, logs=logs, bake_logs=logs, metrics=metrics, readiness=readiness, vms=vms, kill=kill
    )
    box = StoreInbox(store, "github", lambda: None)
    return api.app([receiver(box, lambda: (SECRET,), counters=telemetry.DeliveryCounters(metrics))])


def floor(store: Store) -> Litestar:
    """The least that keeps a body."""
    insert = sa.insert(inbox)

    @post(PATHS["floor"])
    async def keep(request: Request[Any, Any, State]) -> None:
        row = {
            "id": str(uuid.uuid4()), "forge": "floor", "event": "", "received_at": 0.0, "payload": await request.body(),
        }  # fmt: skip
        async with store.writing() as db:
            await db.execute(insert, row)

    return Litestar([keep], openapi_config=None, logging_config=None)


async def serve(which: str, database: Path, listening: socket.socket) -> None:
    """Until SIGTERM."""
    telemetry.configure_logging("json", "info")
    async with Store.open(sqlite_url(database)) as store:
        await store.warm_up()
        app = floor(store) if which == "floor" else ours(store, database.parent)
        await uvicorn.Server(serving.config(app)).serve(sockets=[listening])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))))
