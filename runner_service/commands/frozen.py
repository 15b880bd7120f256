"""``microvm frozen``: what is kept, and away with it."""

import sys
from collections.abc import Sequence

import msgspec

from runner_service import client
from runner_service.client import NotThereError
from runner_service.commands import show
from runner_service.commands.access import note
from runner_service.daemon import database_url
from runner_service.frozen import BY_OPERATOR, Freezer
from runner_service.settings import Settings
from runner_service.store import frozen_queries as fq
from runner_service.store.frozen_queries import KeptVm
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.engine import Engine

_REMOVE_SECONDS = 60.0


async def listing(settings: Settings, api: str | None, limit: int, *, as_json: bool) -> int:
    if api is not None:
        answer = await client.send(settings, api, "GET", "/frozen", address=api, params={"limit": limit})
        found = msgspec.json.decode(client.content_of(answer), type=list[KeptVm])
    else:
        async with Store.open(database_url(settings), read_only=True) as store:
            found = await store.read(lambda db: fq.list_kept(db, limit))
    if as_json:
        show.print_json(found)
        return 0
    rows = [
        (one.id, one.job_id, one.repository, one.state, one.host, show.mib(one.bytes),
         show.ago(one.created_at), show.left(one.expires_at), one.why)
        for one in found
    ]  # fmt: skip
    columns = ("VM", "JOB", "REPOSITORY", "STATE", "HOST", "MIB", "AGE", "LEFT", "WHY")
    empty = "no VM of a failed job is kept"
    if not settings.frozen.repositories and api is None:
        empty += ": [frozen] repositories in the settings names none"
    show.table(columns, rows, empty=empty, right=("MIB", "AGE", "LEFT"))
    return 0


async def remove(settings: Settings, api: str | None, vms: Sequence[str]) -> int:
    """On this host beside a running service, or through one elsewhere."""
    for vm_id in vms:
        if api is not None:
            path = f"/frozen/{client.quoted(vm_id)}/remove"
            client.content_of(
                await client.send(settings, api, "POST", path, address=api, timeout=_REMOVE_SECONDS)
            )
        else:
            await _remove_here(settings, vm_id)
        sys.stdout.write(f"{vm_id} is removed\n")
    return 0


async def _remove_here(settings: Settings, vm_id: str) -> None:
    # Read first: looking for what is not there makes no database.
    async with Store.open(database_url(settings), read_only=True) as store:
        kept = await store.read(lambda db: fq.find(db, vm_id))
    if kept is None or kept.id != vm_id or kept.state == "removed":
        raise NotThereError(f"there is no frozen VM {vm_id}: see microvm frozen")
    await note(settings, "frozen.remove", kept.id, job=kept.job_id)
    async with Store.open(database_url(settings)) as store, Engine.open(settings.data_dir) as engine:
        freezer = Freezer(
            store=store,
            machines=engine,
            settings=settings.frozen,
            host=settings.service.name,
            size=lambda _digest: _unmeasured(),
            metrics=Metrics(),
        )
        await freezer.remove(vm_id, BY_OPERATOR)


async def _unmeasured() -> int:
    return 0
