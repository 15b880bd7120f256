"""IPv6 of a slot, for machines that ask for it: laid beside IPv4 by ``builder_process.py``, by the same plan.

The slot announces its network once (a router advertisement waits in the tap until the guest is there to read
it), and the guest makes its address of it and of its MAC: the same in every slot, so nothing in the guest has to
be told. Source: RFC 4861, section 4.2 and 4.6; RFC 4862, section 5.5.
"""

import ipaddress
import os
import socket
import struct

from vmm_core.network import netlink
from vmm_core.network.addresses import (
    GATEWAY6,
    GATEWAY_MAC,
    GUEST_ADDRESS6,
    GUEST_MAC,
    GUEST_NETWORK6,
    Slot,
)
from vmm_core.network.netlink import TAP_INDEX, UP_INDEX

_LENGTH = 64
_ROUTER_SECONDS = 0xFFFF
_FOREVER = 0xFFFFFFFF
_HOP_LIMIT = 255
# No addresses but those given here, which are there at once: none is probed for duplicates first.
_INSIDE = (
    ("all/forwarding", "1"),
    ("up/addr_gen_mode", "1"),
    ("tap/addr_gen_mode", "1"),
    ("up/disable_ipv6", "0"),
    ("tap/disable_ipv6", "0"),
)
_HOST = (
    ("{}/addr_gen_mode", "1"),
    ("{}/accept_ra", "0"),
    ("{}/disable_ipv6", "0"),
    ("{}/force_forwarding", "1"),
)


def lay_inside(routes: netlink.Netlink, place: Slot) -> None:
    """To be called in the slot's namespace; may be called again. Announces the network to the guest."""
    _apply(_INSIDE, "")
    routes.send(
        netlink.address(TAP_INDEX, GATEWAY6, _LENGTH),
        netlink.route(TAP_INDEX, GUEST_ADDRESS6, None),
        netlink.neighbour(TAP_INDEX, GUEST_ADDRESS6, GUEST_MAC),
        netlink.address(UP_INDEX, place.address6, _LENGTH),
        netlink.neighbour(UP_INDEX, place.host_address6, place.host_mac),
        netlink.route(UP_INDEX, None, place.host_address6),
    )
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMPV6) as raw:
        raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, _HOP_LIMIT)
        raw.sendto(announcement(), ("ff02::1", 0, 0, TAP_INDEX))


def lay_on_host(routes: netlink.Netlink, place: Slot, index: int) -> None:
    """To be called in the host's namespace; may be called again."""
    _apply(_HOST, place.veth)
    routes.send(
        netlink.address(index, place.host_address6, _LENGTH),
        netlink.neighbour(index, GUEST_ADDRESS6, place.mac),
    )


def announcement() -> bytes:
    """A router advertisement of the guests' network; the kernel fills in the checksum."""
    router = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, _ROUTER_SECONDS, 0, 0)
    link = struct.pack("!BB6s", 1, 1, bytes.fromhex(GATEWAY_MAC.replace(":", "")))
    # On the link, and to make addresses of.
    prefix = struct.pack("!BBBBIII", 3, 4, _LENGTH, 0xC0, _FOREVER, _FOREVER, 0)
    return router + link + prefix + ipaddress.IPv6Address(GUEST_NETWORK6.network_address).packed


def _apply(settings: tuple[tuple[str, str], ...], name: str) -> None:
    for path, value in settings:
        try:
            fd = os.open(f"/proc/sys/net/ipv6/conf/{path.format(name)}", os.O_WRONLY)
        except FileNotFoundError:
            if path.endswith("force_forwarding"):  # a kernel before 6.17; the host forwards as a whole
                continue
            raise
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
