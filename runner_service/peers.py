"""Whose the other end of a TCP connection from this same host is: the kernel lists the owner of every socket."""

import asyncio
import contextlib
import ipaddress
import struct
from collections.abc import Iterable
from pathlib import Path

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"
Address = tuple[str, int | None]


async def uid_of(peer: Address | None, here: Address | None) -> int | None:
    """The user that owns the socket ``peer``, connected to ours ``here``; None when it is not (or no longer) listed."""
    if peer is None or here is None or peer[1] is None or here[1] is None:
        return None
    return await asyncio.to_thread(_look, peer, here)


def _look(peer: Address, here: Address) -> int | None:
    for table in _TABLES:
        with contextlib.suppress(OSError), table.open() as lines:
            if (uid := owner(lines, peer, here)) is not None:
                return uid
    return None


def owner(lines: Iterable[str], peer: Address, here: Address) -> int | None:
    """The uid in the row of a socket table whose local end is ``peer`` (proc(5), /proc/net/tcp).

    Only of a connection that stands: one that its owner has closed already is shown as root's.
    """
    wanted = [(f"{local}", f"{remote}") for local, remote in zip(_ends(peer), _ends(here), strict=True)]
    for line in lines:
        fields = line.split()
        if len(fields) > 7 and (fields[1], fields[2]) in wanted and fields[3] == _ESTABLISHED:
            return int(fields[7])
    return None


def _ends(address: Address) -> tuple[str, str]:
    """The end as each of the two tables writes it: four bytes in the order of the host, the port in plain hex.

    An IPv4 socket may also be one of IPv6 that is connected to a mapped address.
    """
    ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
    six = ip if isinstance(ip, ipaddress.IPv6Address) else ipaddress.IPv6Address(f"::ffff:{ip}")
    four = ip if isinstance(ip, ipaddress.IPv4Address) else (six.ipv4_mapped or ip)
    return tuple(f"{_words(end.packed)}:{address[1]:04X}" for end in (four, six))  # pyright: ignore[reportReturnType]


def _words(packed: bytes) -> str:
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))
