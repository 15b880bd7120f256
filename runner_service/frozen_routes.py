"""``/frozen``: the VMs of failed jobs that are kept.

GET /frozen?limit=   POST /frozen/{id}/remove
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from litestar import get, post
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, QueryParameter

from runner_service.frozen import BY_OPERATOR
from runner_service.problems import WebRequest
from runner_service.store import frozen_queries as fq
from runner_service.store.frozen_queries import KeptVm
from runner_service.store.store import Store
from vmm_core.errors import UnknownVm

Audited = Callable[[WebRequest, str, str], AbstractAsyncContextManager[None]]
Remove = Callable[[str, str], Awaitable[KeptVm]]


async def none_kept(vm_id: str, _why: str) -> KeptVm:
    """The answer of a service that keeps no VM."""
    raise UnknownVm(f"there is no frozen VM {vm_id}: see GET /frozen")


def frozen_routes(store: Store, remove: Remove, audited: Audited) -> list[Any]:
    """The routes on what ``store`` says is kept."""

    @get("/frozen", summary="VMs of failed jobs that are kept frozen, newest first")
    async def list_frozen(
        limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
    ) -> list[KeptVm]:
        return await store.read(lambda db: fq.list_kept(db, limit))

    @post(
        "/frozen/{vm:str}/remove",
        status_code=202,
        raises=[NotFoundException],
        opt={"access": "operate"},
        summary="Remove a frozen VM; of another host within its next half minute",
    )
    async def remove_frozen(vm: FromPath[str], request: WebRequest) -> KeptVm:
        async with audited(request, "frozen.remove", vm):
            return await remove(vm, BY_OPERATOR)

    return [list_frozen, remove_frozen]
