"""What slot N is called and which addresses it has: pure functions of N, the same on every host.

    guest 10.0.2.15 ──tap── namespace mv-N ──veth── host
           10.0.2.2 (gateway)   10.200.x.y+2   10.200.x.y+1

The guest sees the same network in every slot, so that a snapshot runs in any of them; the host tells slots
apart by the /30 of each, cut from 10.200.0.0/16.
"""

import ipaddress

import msgspec

from vmm_core.errors import BadRequest

SLOTS = 16_384
NETWORK = ipaddress.IPv4Network("10.200.0.0/16")
"""Every slot's /30. A host that has an address or a route in here can not use slots (``host.usable`` says so)."""
PREFIX_LENGTH = 30
PREFIX = "mv-"
UID_BASE = 0x7000_0000
"""Between systemd's container range and its reserved upper half (systemd, UIDS-GIDS): nobody else's."""

GUEST_NETWORK = ipaddress.IPv4Network("10.0.2.0/24")
GUEST_ADDRESS = "10.0.2.15"
GUEST_MAC = "52:54:00:12:34:56"
GATEWAY = "10.0.2.2"
GATEWAY_MAC = "52:55:0a:00:02:02"
RESOLVER = "10.0.2.3"

NETWORK6 = ipaddress.IPv6Network("fd6d:7600:1::/48")
"""Every slot's /64, for machines that asked for IPv6."""
GUEST_NETWORK6 = ipaddress.IPv6Network("fd6d:7600:0:2::/64")
GATEWAY6 = "fe80::2"
GUEST_ADDRESS6 = "fd6d:7600:0:2:5054:ff:fe12:3456"
"""What a guest makes of the network (announced to it by the slot) and its MAC; constant as well."""

_LOWEST = int(NETWORK.network_address)
_STEP = 1 << (32 - PREFIX_LENGTH)


class Slot(msgspec.Struct, frozen=True):
    """One network place. ``name`` is both its namespace (under /run/netns) and the host's end of its veth pair.

    ``address`` is what the host takes the guest for; ``host_address`` is the other end of the /30. Those with a
    6 are the same for IPv6, which is there only when asked for.
    """

    number: int
    name: str
    uid: int
    host_address: str
    address: str
    host_mac: str
    mac: str
    host_address6: str
    address6: str

    @property
    def netns(self) -> str:
        return self.name

    @property
    def veth(self) -> str:
        return self.name


def slot(number: int) -> Slot:
    """Slot ``number``. Raises BadRequest outside 0…16383."""
    if not 0 <= number < SLOTS:
        raise BadRequest(f"slot {number}: a host has slots 0 to {SLOTS - 1}")
    base = _LOWEST + number * _STEP
    base6 = int(NETWORK6.network_address) + (number << 64)
    tail = f"{number >> 8:02x}:{number & 255:02x}"
    return Slot(
        number=number,
        name=f"{PREFIX}{number}",
        uid=UID_BASE + number,
        host_address=str(ipaddress.IPv4Address(base + 1)),
        address=str(ipaddress.IPv4Address(base + 2)),
        host_mac=f"02:6d:76:00:{tail}",
        mac=f"02:6d:76:01:{tail}",
        host_address6=str(ipaddress.IPv6Address(base6 + 1)),
        address6=str(ipaddress.IPv6Address(base6 + 2)),
    )


def number_of_address(address: str) -> int | None:
    """The slot an address of a /30 or /64 belongs to; None outside the slots' ranges."""
    if ":" in address:
        number = (int(ipaddress.IPv6Address(address)) - int(NETWORK6.network_address)) >> 64
        return number if 0 <= number < SLOTS else None
    value = int(ipaddress.IPv4Address(address)) - _LOWEST
    return value // _STEP if 0 <= value < SLOTS * _STEP else None


def number_of_name(name: str) -> int | None:
    """The slot a namespace or veth name belongs to; None for any other name."""
    digits = name.removeprefix(PREFIX)
    if digits == name or not digits.isdecimal() or not digits.isascii() or len(digits) > 5:
        return None
    number = int(digits)
    return number if number < SLOTS and str(number) == digits else None
