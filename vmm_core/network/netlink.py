"""The netlink messages a slot is made of: pyroute2 encodes them, many go out in one call.

Sockets here block (with a deadline) and belong to the namespace they were opened in: only
``builder_process.py`` uses them.
"""

import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

from pyroute2.netlink.nfnetlink import nfctsocket
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg
from pyroute2.netlink.rtnl.tcmsg import sched_tbf, tcmsg

from vmm_core.network.addresses import Slot

ROUTE, NETFILTER = socket.NETLINK_ROUTE, 12
UP_INDEX, TAP_INDEX = 10, 11
"""The numbers of ``up`` (a veth's end) and ``tap`` inside every namespace: most messages are the same for all."""

_RECEIVE_BYTES = 1 << 16
_SECONDS = 5.0
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10
_REQUEST_ACK, _CREATE_EXCL, _CREATE_REPLACE = 5, 0x600, 0x500
_NEWLINK, _DELLINK, _NEWADDR, _NEWROUTE, _NEWNEIGH, _NEWQDISC, _DELQDISC = 16, 17, 20, 24, 28, 36, 37
_CT_DELETE = (1 << 8) | 2
_NLMSG_ERROR = 2
_PERMANENT = 0x80
_NO_DUPLICATES = 0x02
_ROOT_QDISC = 0xFFFFFFFF
_DOOMED_GROUP = 0x6D76
# pyroute2's conntrack messages and queueing parameters carry no types.
_conntrack: Any = nfctsocket
_tbf: Any = sched_tbf


class Netlink:
    """A netlink socket of the namespace it was opened in."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_SECONDS)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)  # errors without the request
        self._socket.bind((0, 0))

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *messages: bytes) -> None:
        """All messages in one call. Raises OSError with the first error after all were answered."""
        data = b"".join(messages)
        self._socket.send(data)
        left, first = _count(data), 0
        while left:
            data = self._socket.recv(_RECEIVE_BYTES)
            at = 0
            while at + 20 <= len(data):
                length, kind = struct.unpack_from("IH", data, at)
                if kind == _NLMSG_ERROR:
                    left -= 1
                    first = first or -struct.unpack_from("i", data, at + 16)[0]
                at += (max(length, 16) + 3) & ~3
        if first:
            raise OSError(first, os.strerror(first))


class Template:
    """Messages of one slot, encoded once: another slot's are the same with other names and numbers in them."""

    def __init__(self, make: Callable[[Slot, int], Sequence[bytes]]) -> None:
        self._data = b"".join(make(_SAMPLE, _SAMPLE_INDEX))

    def of(self, place: Slot, index: int = 0) -> bytes:
        data = self._data
        for old, new in zip(_parts(_SAMPLE, _SAMPLE_INDEX), _parts(place, index), strict=True):
            data = data.replace(old, new)
        return data


# Values that occur nowhere else in a message, nor in each other. An interface's name may be followed by zeros.
_SAMPLE = Slot(
    0,
    "mv-sample-slot-",
    0,
    host_address="254.253.252.251",
    address="254.253.252.250",
    host_mac="fa:11:f9:22:f8:33",
    mac="fa:11:f9:22:f8:44",
    host_address6="",
    address6="",
)
_SAMPLE_INDEX = 0x7EFDFCFB


def _parts(place: Slot, index: int) -> tuple[bytes, ...]:
    return (
        place.veth.encode().ljust(15, b"\0"),
        socket.inet_aton(place.host_address),
        socket.inet_aton(place.address),
        bytes.fromhex(place.host_mac.replace(":", "")),
        bytes.fromhex(place.mac.replace(":", "")),
        struct.pack("i", index),
    )


def _count(data: bytes) -> int:
    count = at = 0
    while at < len(data):
        at += (struct.unpack_from("I", data, at)[0] + 3) & ~3
        count += 1
    return count


def _message(
    kind: Callable[[], Any], number: int, flags: int, attributes: list[Any], /, **fields: object
) -> bytes:
    message = kind()
    message["header"] = {"type": number, "flags": _REQUEST_ACK | flags, "sequence_number": 0, "pid": 0}
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = attributes
    message.encode()
    return bytes(message.data)


def address(index: int, address: str, length: int) -> bytes:
    """An address of an interface. IPv6: at once, without a probe for duplicates, and for good measure again."""
    attributes = [("IFA_LOCAL", address), ("IFA_ADDRESS", address)]
    six = ":" in address
    return _message(
        ifaddrmsg,
        _NEWADDR,
        _CREATE_REPLACE if six else _CREATE_EXCL,
        attributes,
        family=_family(address),
        index=index,
        prefixlen=length,
        scope=0,
        flags=_NO_DUPLICATES if six else 0,
    )


def neighbour(index: int, address: str, mac: str) -> bytes:
    """Who has an address, for good: no protocol asks or changes it."""
    attributes = [("NDA_DST", address), ("NDA_LLADDR", mac)]
    family = _family(address)
    return _message(
        ndmsg,
        _NEWNEIGH,
        _CREATE_REPLACE,
        attributes,
        family=family,
        ifindex=index,
        state=_PERMANENT,
        ndm_type=1,
    )


def route(index: int, destination: str | None, gateway: str | None) -> bytes:
    """A route to one address, or (``destination`` None) to everything by ``gateway``."""
    attributes: list[Any] = [("RTA_OIF", index)]
    if destination:
        attributes.append(("RTA_DST", destination))
    if gateway:
        attributes.append(("RTA_GATEWAY", gateway))
    family = _family(destination or gateway or "")
    six = family == socket.AF_INET6
    return _message(
        rtmsg,
        _NEWROUTE,
        _CREATE_REPLACE if six else _CREATE_EXCL,
        attributes,
        family=family,
        dst_len=(128 if six else 32) if destination else 0,
        table=254,
        proto=4,
        scope=0 if gateway else 253,
        type=1,
    )


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def up(index: int, *attributes: tuple[str, object]) -> bytes:
    return _message(ifinfmsg, _NEWLINK, 0, list(attributes), index=index, flags=1, change=1)


def veth(place: Slot, host_ns: int) -> bytes:
    peer = {
        "attrs": [("IFLA_IFNAME", place.veth), ("IFLA_ADDRESS", place.host_mac), ("IFLA_NET_NS_FD", host_ns)]
    }
    information = {
        "attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer)]})]
    }
    attributes = [("IFLA_IFNAME", "up"), ("IFLA_ADDRESS", place.mac), ("IFLA_LINKINFO", information)]
    return _message(ifinfmsg, _NEWLINK, _CREATE_EXCL, attributes, index=UP_INDEX)


def forget_connections(address: str) -> bytes:
    """Every connection that ``address`` began. Source: kernel, ctnetlink_flush_conntrack (5.8)."""
    origin = _conntrack.NFCTAttrTuple(family=_family(address), saddr=address)
    origin.attrs()  # fills in ``flags``
    message = _conntrack.nfct_msg.create_from(
        tuple_orig=origin, cta_filter={"attrs": [["CTA_FILTER_ORIG_FLAGS", origin.flags]]}
    )
    message["header"] = {"type": _CT_DELETE, "flags": _REQUEST_ACK, "sequence_number": 0, "pid": 0}
    message["nfgen_family"] = _family(address)
    message.encode()
    return bytes(message.data)


def bandwidth(index: int, mbit: int) -> bytes:
    rate = mbit * 125_000
    # 20 ms of traffic at once, at least two large frames; queued for at most 100 ms.
    burst = max(rate // 50, 1 << 14)
    options = _tbf.get_parameters({"rate": rate, "burst": burst, "limit": rate // 10 + burst, "mtu": 2048})
    attributes = [("TCA_KIND", "tbf"), ("TCA_OPTIONS", options)]
    return _message(
        tcmsg, _NEWQDISC, _CREATE_REPLACE, attributes, index=index, parent=_ROOT_QDISC, handle=0x10000
    )


def no_bandwidth(index: int) -> bytes:
    return _message(tcmsg, _DELQDISC, 0, [], index=index, parent=_ROOT_QDISC)


def doom(index: int) -> bytes:
    """Mark an interface for ``delete_doomed``: one grace period of the kernel for all, not one for each."""
    return _message(ifinfmsg, _NEWLINK, 0, [("IFLA_GROUP", _DOOMED_GROUP)], index=index)


def delete_doomed() -> bytes:
    return _message(ifinfmsg, _DELLINK, 0, [("IFLA_GROUP", _DOOMED_GROUP)])
