"""``microvm frozen``: what is kept, and away with it."""

import sys
from collections.abc import Sequence

import httpx
import msgspec

from runner_service import audit, client
from runner_service.client import NotThereError
from runner_service.commands import show
from runner_service.daemon import database_url
from runner_service.frozen import BY_OPERATOR, Freezer
from runner_service.settings import Settings
from runner_service.store import frozen_queries as fq
from runner_service.store.frozen_queries import KeptVm
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.engine import Engine


async def listing(settings: Settings, api: str | None, limit: int, *, as_json: bool) -> int:
    if api is not None:
        answer = await _ask(settings, api, "GET", f"/frozen?limit={limit}")
        found = msgspec.json.decode(answer.content, type=list[KeptVm])
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
            await _ask(settings, api, "POST", f"/frozen/{client.quoted(vm_id)}/remove")
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
    await note(settings, "frozen.remove", kept)
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


async def note(settings: Settings, action: str, kept: KeptVm, **details: object) -> None:
    """A line of the audit log. Raises StoreError: what cannot be written down is not done."""
    told = {"job": kept.job_id, **details}
    async with Store.open(database_url(settings)) as store:
        await store.write(
            lambda db: audit.record(db, who=audit.local(), action=action, target=kept.id, details=told)
        )


async def _unmeasured() -> int:
    return 0


async def _ask(settings: Settings, api: str, method: str, path: str) -> httpx.Response:
    async with client.http_client(settings, api, api, httpx.Timeout(60.0)) as http:
        try:
            answer = await http.request(method, path)
        except httpx.HTTPError as error:
            raise NotThereError(f"the service at {api} does not answer: {error}") from error
    if answer.is_error:
        raise NotThereError(client.detail_of(answer))
    return answer
