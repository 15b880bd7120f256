"""Orders about a host and the service itself: draining, and reading the settings again.

GET /hosts   POST /drain?host=   POST /undrain?host=   POST /reload
"""

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, Protocol

import msgspec
from litestar import get, post
from litestar.exceptions import HTTPException, NotFoundException
from litestar.params import QueryParameter

from runner_service.problems import WebRequest
from runner_service.reload import Reloaded
from runner_service.settings import SettingsError
from runner_service.store import host_queries as hq
from runner_service.store.store import Store

HostName = Annotated[str | None, QueryParameter(name="host", min_length=1, max_length=300)]


class Audited(Protocol):
    """Writes an order down with what came of it."""

    def __call__(
        self, request: WebRequest, action: str, target: str, **details: Any
    ) -> AbstractAsyncContextManager[None]: ...


class Orders(msgspec.Struct, frozen=True):
    """What the orders need: this host's name, a way to wake the scheduler, and to read the settings again."""

    host: str
    wake: Callable[[], None]
    reload: Callable[[], Reloaded]


class SettingsException(HTTPException):
    """The new settings cannot be used; the old ones stay in force."""

    status_code = 422


def operation_routes(store: Store, orders: Orders, audited: Audited) -> list[Any]:
    """The routes on the hosts of ``store`` and on this service."""

    async def order(request: WebRequest, action: str, name: str | None, at: float | None) -> hq.HostState:
        host = name or orders.host
        async with audited(request, action, host):
            if not await store.write(lambda db: hq.order_drain(db, host, at)):
                known = [one.name for one in await store.read(hq.host_states)]
                raise NotFoundException(
                    f"there is no host {host!r}: {', '.join(known) or 'none was ever here'}"
                )
        orders.wake()
        return next(one for one in await store.read(hq.host_states) if one.name == host)

    @get("/hosts", summary="The hosts, which of them drain, and what is left on each")
    async def list_hosts() -> list[hq.HostState]:
        return await store.read(hq.host_states)

    @post(
        "/drain", status_code=200, raises=[NotFoundException], opt={"access": "operate"},
        summary="Let a host (this one) take no new work, until it is undone",
    )  # fmt: skip
    async def drain(request: WebRequest, name: HostName = None) -> hq.HostState:
        return await order(request, "host.drain", name, time.time())

    @post(
        "/undrain", status_code=200, raises=[NotFoundException], opt={"access": "operate"},
        summary="Let a host (this one) take work again",
    )  # fmt: skip
    async def undrain(request: WebRequest, name: HostName = None) -> hq.HostState:
        return await order(request, "host.undrain", name, None)

    @post(
        "/reload", status_code=200, raises=[SettingsException], opt={"access": "operate"},
        summary="Read the settings again; what changed, and what of it waits for a restart",
    )  # fmt: skip
    async def reload(request: WebRequest) -> Reloaded:
        async with audited(request, "settings.reload", orders.host):
            try:
                return orders.reload()
            except SettingsError as error:
                raise SettingsException(str(error)) from None

    return [list_hosts, drain, undrain, reload]
