"""The host's one nftables table: a fixed number of rules, sets and maps that say what each slot may do.

    guest → namespace → mv-N ┐
      prerouting raw           a source that is not 10.0.2.15 ends here; the rest becomes its slot's address,
                               before connections are tracked, by a map of interface names
      prerouting nat           virtual addresses (listed names, the resolver) → where they really are
      forward / input          by the slot's address: what is allowed, how many connections, how fast;
                               nothing else reaches a network, the host, or another slot
      postrouting nat          leaves with the host's address
    mv-N ← … answers
      postrouting, last        the slot's address becomes 10.0.2.15 again

Changes are elements only. Each is one transaction of ``nft -j -f -``; concurrent ones share a call. The table
itself is written in nft's own language, because the JSON of nft 1.0 does not know sets that rules add to.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, cast

import msgspec

from vmm_core.errors import SlotsUnavailable
from vmm_core.network.addresses import (
    GUEST_ADDRESS,
    GUEST_NETWORK,
    NETWORK,
    number_of_address,
    number_of_name,
)

TABLE: Final = "microvm"
FORBIDDEN: Final = (
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/3",
    str(NETWORK),
    # Metadata services of clouds outside the link-local range: Azure, Alibaba, Oracle.
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
)
"""Destinations no list opens. Forwarded names have been checked before they became elements."""
PRIVATE: Final = (
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
)
"""Destinations that are no public internet; reached only when listed."""
NEW_PER_SECOND: Final = 250
"""New connections of one slot. Also bounds what it can make the host look for on a network it is joined to:
an address that does not answer stays in the host's neighbour table (1,024 entries) for three seconds."""
RESETS_PER_SECOND: Final = 20
_SECONDS = 20.0
_OUTPUT_BYTES = 64 << 20
_IN_ONE_CALL = 64

_PER_SLOT: Final = ("source", "forwards", "allowed", "allowed_whole", "internet")
"""The sets and maps whose first key names a slot."""

Part = str | int


class Element(msgspec.Struct, frozen=True):
    """An element of a set, or of a map when it has a ``value``. An address may be a CIDR. Elements of a set
    of intervals may not overlap: the kernel refuses them."""

    set: str
    key: tuple[Part, ...]
    value: tuple[Part, ...] = ()


def ruleset(connections: int, routed: Iterable[str] = ()) -> str:
    """The whole table. Loading it again replaces the rules and keeps the slots' elements.

    ``connections`` is how many tracked connections one slot may have, ``routed`` the interfaces that forward
    only because of the slots, and hence only to slots.
    """
    slots, guests, guest = NETWORK, GUEST_NETWORK, GUEST_ADDRESS
    new, resets = NEW_PER_SECOND, RESETS_PER_SECOND
    per_slot = "type ipv4_addr; size 65536; flags dynamic"
    return f"""
add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{
  map source {{ type ifname : ipv4_addr; }}
  map forwards {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
  set allowed {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; }}
  set allowed_whole {{ type ipv4_addr . ipv4_addr; flags interval; }}
  set internet {{ type ipv4_addr; }}
  set routed {{ type ifname; }}
  set forbidden {{ type ipv4_addr; flags interval; elements = {{ {", ".join(FORBIDDEN)} }} }}
  set private {{ type ipv4_addr; flags interval; elements = {{ {", ".join(PRIVATE)} }} }}
  set connections {{ {per_slot}; }}
  set openings {{ {per_slot},timeout; timeout 10s; }}
  set resets {{ {per_slot},timeout; timeout 10s; }}

  chain truth {{
    ip saddr != {guest} counter drop comment "spoofed"
    ip daddr 127.0.0.0/8 counter drop comment "loopback"
    ip saddr set iifname map @source accept
    counter drop comment "not open, or not IPv4"
  }}
  chain arriving {{
    type filter hook prerouting priority raw; policy accept;
    iifname "mv-*" goto truth
  }}
  chain forwarding {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "mv-*" dnat ip to ip saddr . ip daddr . meta l4proto . th dport map @forwards
  }}
  chain admit {{
    update @openings {{ ip saddr limit rate over {new}/second burst {2 * new} packets }} counter drop
    add @connections {{ ip saddr ct count over {connections} }} counter drop
    accept
  }}
  chain refuse {{
    meta l4proto != tcp counter drop
    update @resets {{ ip saddr limit rate {resets}/second burst {2 * resets} packets }} reject with tcp reset
    counter drop
  }}
  chain from_slot {{
    oifname "mv-*" goto refuse
    tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
    ct state established,related accept
    ct state != new counter drop
    ct status dnat ct original ip daddr {guests} goto admit
    ip daddr @forbidden goto refuse
    ip saddr . ip daddr . meta l4proto . th dport @allowed goto admit
    ip saddr . ip daddr @allowed_whole meta l4proto {{ tcp, udp, icmp }} goto admit
    ip daddr @private goto refuse
    ip saddr @internet meta l4proto {{ tcp, udp, icmp }} goto admit
    goto refuse
  }}
  chain through {{
    type filter hook forward priority filter; policy accept;
    iifname "mv-*" goto from_slot
    oifname "mv-*" ct state established,related accept
    oifname "mv-*" counter drop
    iifname @routed counter drop
  }}
  chain to_host {{
    ct status dnat ct original ip daddr {guests} ct state established accept
    ct status dnat ct original ip daddr {guests} ct state new goto admit
    goto refuse
  }}
  chain inward {{
    type filter hook input priority filter; policy accept;
    iifname "mv-*" goto to_host
  }}
  chain masked {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {slots} oifname != "mv-*" masquerade
  }}
  chain leaving {{
    type filter hook postrouting priority 500; policy accept;
    oifname "mv-*" ip daddr {slots} ip daddr set {guest}
  }}
}}
flush set inet {TABLE} routed
{"".join(f'add element inet {TABLE} routed {{ "{device}" }}' + chr(10) for device in sorted(routed))}"""  # noqa: S608


class Firewall:
    """Changes the table. Callers that come while a call runs share the next one."""

    def __init__(self, nft: str = "nft") -> None:
        self._nft = nft
        self._waiting: list[tuple[list[object], asyncio.Future[None]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def load(self, connections: int, routed: Iterable[str] = ()) -> None:
        """Make the table, or replace its rules; its elements stay."""
        await self._call("-f", "-", text=ruleset(connections, routed))

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

    async def forget_rates(self, addresses: Sequence[str]) -> None:
        """Remove what the rules counted for these slots; an element that is not there is added before."""
        commands: list[object] = []
        for name in ("connections", "openings", "resets"):
            elements = [Element(name, (address,)) for address in addresses]
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
            process = await asyncio.create_subprocess_exec(
                self._nft,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            )
        except OSError as error:
            raise SlotsUnavailable(f"{self._nft} cannot be started: {error.strerror}") from error
        try:
            async with asyncio.timeout(_SECONDS):
                output, errors = await process.communicate(text.encode())
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(error, TimeoutError):
                raise SlotsUnavailable(
                    f"nft {' '.join(arguments)} did not end within {_SECONDS:.0f} s"
                ) from error
            raise
        if process.returncode != 0:
            said = errors.decode("utf-8", "replace").strip()[:500]
            raise SlotsUnavailable(f"nft {' '.join(arguments)} ended with {process.returncode}: {said}")
        return output


def usual_connections() -> int:
    """Tracked connections a slot may have: a 32nd of what the host can track, 256 to 2048."""
    try:
        fd = os.open("/proc/sys/net/netfilter/nf_conntrack_max", os.O_RDONLY)
    except OSError:
        return 1024
    try:
        return min(max(int(os.read(fd, 32)) // 32, 256), 2048)
    finally:
        os.close(fd)


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
    return number_of_name(first) if element.set == "source" else number_of_address(first)


def _succeed(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _fail(done: asyncio.Future[None], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
