"""Changes of the firewall's table (rules.py): elements come and go, each change in one transaction.

All go through ``nft -j -f -`` (the table itself, written in nft's own language, through ``nft -f -``), with a
deadline. Concurrent changes share a call; when one of them is at fault, it fails alone.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import msgspec

from vmm_core import program
from vmm_core.errors import SlotsUnavailable, VmmMissing
from vmm_core.network.addresses import Slot, number_of_address, number_of_name
from vmm_core.network.rules import TABLE, ruleset

_SECONDS = 20.0
_IN_ONE_CALL = 64

_RATES: Final = ("connections", "openings", "resets")
_PER_SLOT: Final = (
    "source",
    "forwards",
    "allowed",
    "allowed_whole",
    "internet",
    "source6",
    "allowed6",
    "allowed_whole6",
    "internet6",
)
"""The sets and maps whose first key names a slot."""

Part = str | int


class Element(msgspec.Struct, frozen=True):
    """An element of a set, or of a map when it has a ``value``. An address may be a CIDR. Elements of a set
    of intervals may not overlap: the kernel refuses them."""

    set: str
    key: tuple[Part, ...]
    value: tuple[Part, ...] = ()


class Firewall:
    """Changes the table. Callers that come while a call runs share the next one."""

    def __init__(self, nft: str = "nft") -> None:
        self._nft = nft
        self._waiting: list[tuple[list[object], asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def load(
        self, connections: int, routed: Iterable[str], routed6: Iterable[str], *, mtu: int
    ) -> None:
        """Make the table, or replace its rules; its elements stay."""
        await self._call("-f", "-", text=ruleset(connections, routed, routed6, mtu=mtu))

    async def exists(self) -> bool:
        tables = await self._listing("tables")
        return any(entry.get("table", {}).get("name") == TABLE for entry in tables)

    async def drop(self) -> None:
        """Remove the table with all that is in it; its absence is no error."""
        table = {"family": "inet", "name": TABLE}
        await self._commands([{"add": {"table": table}}, {"delete": {"table": table}}])

    async def change(self, add: Iterable[Element] = (), remove: Iterable[Element] = ()) -> None:
        """One transaction: ``remove`` (must be there), then ``add`` (may be there)."""
        commands = [*_commands("delete", remove), *_commands("add", add)]
        if not commands:
            return
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((commands, done))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        await done

    async def forget_rates(self, places: Sequence[Slot]) -> None:
        """Remove what the rules counted for these slots; an element that is not there is added before."""
        commands: list[object] = []
        for name in _RATES:
            elements = [Element(name, (place.address,)) for place in places]
            elements += [Element(f"{name}6", (place.address6,)) for place in places]
            commands += _commands("add", elements) + _commands("delete", elements)
        await self._commands(commands)

    async def elements(self) -> dict[int, list[Element]]:
        """Every slot's elements, by its number, as the kernel has them."""
        found: dict[int, list[Element]] = {}
        for entry in await self._listing("table", "inet", TABLE):
            holder = entry.get("set") or entry.get("map")
            if holder is None or holder["name"] not in _PER_SLOT:
                continue
            for item in holder.get("elem", ()):
                element = _parsed(holder["name"], item)
                if (number := _number(element)) is not None:
                    found.setdefault(number, []).append(element)
        return found

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_IN_ONE_CALL], self._waiting[_IN_ONE_CALL:]
            try:
                await self._commands([command for commands, _ in batch for command in commands])
            except SlotsUnavailable as error:
                if len(batch) == 1:
                    _fail(batch[0][1], error)
                    continue
                # One of them is at fault: each alone, so that the others do not suffer.
                for commands, done in batch:
                    try:
                        await self._commands(commands)
                    except SlotsUnavailable as own:
                        _fail(done, own)
                    else:
                        _succeed(done)
            except BaseException:
                for _, done in batch:
                    done.cancel()
                raise
            else:
                for _, done in batch:
                    _succeed(done)

    async def _commands(self, commands: Sequence[object]) -> None:
        await self._call("-j", "-f", "-", text=msgspec.json.encode({"nftables": commands}).decode())

    async def _listing(self, *what: str) -> list[dict[str, Any]]:
        output = await self._call("-j", "list", *what)
        return cast("dict[str, list[dict[str, Any]]]", msgspec.json.decode(output))["nftables"]

    async def _call(self, *arguments: str, text: str = "") -> bytes:
        try:
            ended = await program.run([self._nft, *arguments], stdin=text.encode(), timeout=_SECONDS)
        except VmmMissing as error:
            raise SlotsUnavailable(str(error)) from error
        except TimeoutError as error:
            raise SlotsUnavailable(
                f"nft {' '.join(arguments)} did not end within {_SECONDS:.0f} s"
            ) from error
        if ended.status != 0:
            raise SlotsUnavailable(
                f"nft {' '.join(arguments)} ended with {ended.status}: {ended.errors.strip()[:500]}"
            )
        return ended.output


def _commands(verb: str, elements: Iterable[Element]) -> list[object]:
    by_set: dict[str, list[object]] = {}
    for element in elements:
        key = _json(element.key)
        pair = verb == "add" and element.value
        by_set.setdefault(element.set, []).append([key, _json(element.value)] if pair else key)
    return [
        {verb: {"element": {"family": "inet", "table": TABLE, "name": name, "elem": items}}}
        for name, items in by_set.items()
    ]


def _json(parts: tuple[Part, ...]) -> object:
    values = [_json_part(part) for part in parts]
    return values[0] if len(values) == 1 else {"concat": values}


def _json_part(part: Part) -> object:
    if isinstance(part, str) and "/" in part:
        address, _, length = part.partition("/")
        return {"prefix": {"addr": address, "len": int(length)}}
    return part


def _parsed(name: str, item: Any) -> Element:
    if isinstance(item, list):
        key, value = cast("list[Any]", item)
        return Element(name, _parts(key), _parts(value))
    return Element(name, _parts(item))


def _parts(value: Any) -> tuple[Part, ...]:
    several = cast("dict[str, list[Any]]", value).get("concat") if isinstance(value, dict) else None
    return tuple(_part(part) for part in several or [value])


def _part(value: Any) -> Part:
    if not isinstance(value, dict):
        return cast("Part", value)
    prefix = cast("dict[str, dict[str, Any]]", value)["prefix"]
    return f"{prefix['addr']}/{prefix['len']}"


def _number(element: Element) -> int | None:
    first = str(element.key[0])
    return number_of_name(first) if element.set.startswith("source") else number_of_address(first)


def _succeed(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _fail(done: asyncio.Future[None], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
