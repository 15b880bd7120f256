"""``microvm drain | reload``: orders to the service, and what came of them."""

import asyncio
import sys
from typing import Any, TypeVar

import msgspec
from rich.console import Console

from runner_service import client
from runner_service.commands import show
from runner_service.reload import Reloaded
from runner_service.settings import Settings, SettingsError
from runner_service.store.host_queries import HostState

T = TypeVar("T")
_LOOK_SECONDS = 1.0


class Drain(msgspec.Struct, frozen=True):
    """What is wanted of ``host`` (None: that of the service that is asked)."""

    host: str | None
    undo: bool = msgspec.field(default=False)
    wait: bool = msgspec.field(default=False)


async def drain(settings: Settings, api: str | None, wish: Drain, *, as_json: bool) -> int:
    """Give the order; with ``wait`` show what is left until nothing is."""
    params = {} if wish.host is None else {"host": wish.host}
    path = "/undrain" if wish.undo else "/drain"
    state = await _ask(settings, api, "POST", path, HostState, **params)
    if wish.wait:
        state = await _until_drained(settings, api, state)
    if as_json:
        show.print_json(state)
    else:
        show.line(_told(state))
    return 0


async def reload(settings: Settings, api: str | None, *, as_json: bool) -> int:
    told = await _ask(settings, api, "POST", "/reload", Reloaded)
    if as_json:
        show.print_json(told)
        return 0
    rows = [(change.key, change.was, change.now, change.takes_effect) for change in told.changes]
    show.table(("SETTING", "WAS", "NOW", "TAKES EFFECT"), rows, empty="nothing changed")
    if told.restart:
        show.line(f"waiting for a restart of the service: {', '.join(told.restart)}")
    return 0


async def _until_drained(settings: Settings, api: str | None, state: HostState) -> HostState:
    """A line on a terminal that changes, else a line whenever something changed; on stderr."""
    console = Console(stderr=True, highlight=False)
    said = ""
    with console.status("", spinner="dots") as status:
        while not state.drained:
            told = _told(state)
            if told != said and not console.is_terminal:
                sys.stderr.write(told + "\n")
            status.update(told)
            said = told
            await asyncio.sleep(_LOOK_SECONDS)
            hosts = await _ask(settings, api, "GET", "/hosts", list[HostState])
            state = next(one for one in hosts if one.name == state.name)
            if not state.draining:
                raise client.NotThereError(f"{state.name} takes work again: somebody undid the order")
    return state


def _told(state: HostState) -> str:
    if not state.draining:
        return f"{state.name} takes work"
    if state.drained:
        return f"{state.name} is drained: nothing is left on it"
    left = ", ".join(f"{count} {name}" for name, count in sorted(state.runners.items()))
    return f"{state.name} is draining: {left}"


async def _ask(
    settings: Settings, api: str | None, method: str, path: str, kind: type[T], **params: Any
) -> T:
    address = api or client.announced(settings.data_dir)
    if address is None:
        raise SettingsError(
            f"no service runs on {settings.data_dir}: start it with microvm serve, or name another with --api"
        )
    answer = await client.send(settings, api, method, path, address=address, params=params)
    if answer.status_code == 422:
        raise SettingsError(client.detail_of(answer))
    return msgspec.json.decode(client.content_of(answer), type=kind)
