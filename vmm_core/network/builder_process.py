"""The process that lays and tears out slots: the only one that enters network namespaces.

A child of the service at the other end of a socket pair; it ends when that closes. Kept apart because
netlink blocks, because a namespace belongs to a thread, and because pyroute2 weighs 22 MiB. One request at a
time: a JSON packet in, a JSON packet (and the taps' descriptors) out.

    build N…     namespace, veth pair, tap, addresses, routes, neighbours → one descriptor a slot
    remove N…    all of it again, with what the kernel remembers of its connections
    limit N      bandwidth of both directions, in Mbit/s (0: none)
    ipv6 N       IPv6 as well, announced to the guest
    tap N        a new descriptor of the tap

pyroute2 makes the messages; they go out many to a system call.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from vmm_core.network import ipv6, netlink
from vmm_core.network.addresses import (
    GATEWAY,
    GATEWAY_MAC,
    GUEST_ADDRESS,
    GUEST_MAC,
    PREFIX_LENGTH,
    Slot,
    slot,
)
from vmm_core.network.builder import MAX_MESSAGE, Reply, Request
from vmm_core.network.netlink import TAP_INDEX, UP_INDEX, Netlink, Template

NETNS_DIR = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_SHARED, _MS_REC, _MNT_DETACH = 4096, 1 << 20, 16384, 2
_TUNSETIFF, _TUNSETPERSIST, _TUNSETIFINDEX = 0x400454CA, 0x400454CB, 0x400454DA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _enter(fd: int) -> None:
    _check(_libc.setns(fd, _CLONE_NEWNET), "setns")


def _write(path: str, value: str) -> None:
    fd = os.open(f"/proc/sys/net/{path}", os.O_WRONLY)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _prepare_netns_dir() -> None:
    """As ``ip netns`` does: a shared mount, so that what is unmounted here is gone everywhere."""
    NETNS_DIR.mkdir(mode=0o755, exist_ok=True)
    directory = str(NETNS_DIR).encode()
    if _libc.mount(b"", directory, b"none", _MS_SHARED | _MS_REC, None) != 0:
        _check(_libc.mount(directory, directory, b"none", _MS_BIND | _MS_REC, None), "bind /run/netns")
        _check(_libc.mount(b"", directory, b"none", _MS_SHARED | _MS_REC, None), "share /run/netns")


def _tap(place_index: int | None = None) -> int:
    """A descriptor of this namespace's tap, which is made (persistent) when ``place_index`` is given."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if place_index is not None:
            fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("I", place_index))
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"tap", _IFF_TAP | _IFF_NO_PI))
        if place_index is not None:
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    except BaseException:
        os.close(fd)
        raise
    return fd


# Of a namespace that has no interface yet: those to come inherit the defaults.
_INSIDE_SETTINGS: Final = (
    ("ipv6/conf/default/disable_ipv6", "1"),
    ("ipv4/conf/default/rp_filter", "1"),
    ("ipv4/ip_forward", "1"),
)
# Strict reverse paths: what does not come from 10.0.2.15 ends at the tap already. The namespace answers ARP for
# the virtual addresses of listed hosts, at once.
_TAP_SETTINGS: Final = (
    ("ipv4/conf/tap/proxy_arp", "1"),
    ("ipv4/conf/tap/send_redirects", "0"),
    ("ipv4/neigh/tap/proxy_delay", "0"),
)
_HOST_SETTINGS: Final = (
    ("ipv6/conf/{}/disable_ipv6", "1"),
    ("ipv4/conf/{}/rp_filter", "1"),
    ("ipv4/conf/{}/forwarding", "1"),
)


class Builder:
    """Keeps the host's namespace and its sockets; the process may stand in any other between two calls."""

    def __init__(self) -> None:
        self._host_ns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._routes = Netlink(netlink.ROUTE)
        self._connections = Netlink(netlink.NETFILTER)
        constant = [
            netlink.up(TAP_INDEX, ("IFLA_ADDRESS", GATEWAY_MAC)),
            netlink.address(TAP_INDEX, GATEWAY, 32),
            netlink.route(TAP_INDEX, GUEST_ADDRESS, None),
            netlink.neighbour(TAP_INDEX, GUEST_ADDRESS, GUEST_MAC),
            netlink.up(UP_INDEX),
        ]
        self._inside_messages = Template(
            lambda place, _: [
                netlink.veth(place, self._host_ns),
                *constant,
                netlink.address(UP_INDEX, place.address, PREFIX_LENGTH),
                netlink.neighbour(UP_INDEX, place.host_address, place.host_mac),
                netlink.route(UP_INDEX, None, place.host_address),
            ]
        )
        self._host_messages = Template(
            lambda place, index: [
                netlink.up(index),
                netlink.address(index, place.host_address, PREFIX_LENGTH),
                # What goes to the guest already carries the guest's own address when it leaves the host.
                netlink.neighbour(index, GUEST_ADDRESS, place.mac),
            ]
        )
        self._ipv6 = Path("/proc/sys/net/ipv6").is_dir()
        _prepare_netns_dir()

    def build(self, place: Slot) -> int:
        """Lay a slot; answers its tap. Leftovers of a crash under the same number go first."""
        try:
            return self._build(place)
        except FileExistsError:
            self.remove([place])
            return self._build(place)
        finally:
            _enter(self._host_ns)

    def _build(self, place: Slot) -> int:
        path = NETNS_DIR / place.netns
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        tap = -1
        try:
            _check(_libc.unshare(_CLONE_NEWNET), "unshare")
            _check(_libc.mount(b"/proc/self/ns/net", str(path).encode(), b"none", _MS_BIND, None), "bind")
            self._apply(_INSIDE_SETTINGS, "")
            tap = _tap(TAP_INDEX)
            self._apply(_TAP_SETTINGS, "")
            with Netlink(netlink.ROUTE) as inside:
                inside.send(self._inside_messages.of(place))
            _enter(self._host_ns)
            self._apply(_HOST_SETTINGS, place.veth)
            self._routes.send(self._host_messages.of(place, socket.if_nametoindex(place.veth)))
        except BaseException:
            if tap >= 0:
                os.close(tap)
            with contextlib.suppress(OSError):
                self.remove([place])
            raise
        return tap

    def _apply(self, settings: Iterable[tuple[str, str]], name: str) -> None:
        for path, value in settings:
            if self._ipv6 or not path.startswith("ipv6"):
                _write(path.format(name), value)

    def remove(self, places: Sequence[Slot]) -> None:
        """Tear slots out. What is gone already is no error."""
        _enter(self._host_ns)
        doomed = False
        for place in places:
            path = NETNS_DIR / place.netns
            _libc.umount2(str(path).encode(), _MNT_DETACH)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                index = socket.if_nametoindex(place.veth)
                self._routes.send(netlink.doom(index))
                doomed = True
        if doomed:
            try:
                self._routes.send(netlink.delete_doomed())
            except OSError as error:
                # Gone meanwhile: the kernel deletes what was in a namespace that nobody has any more.
                if error.errno != errno.ENODEV:
                    raise
        addresses = [address for place in places for address in (place.address, place.address6)]
        self._connections.send(*(netlink.forget_connections(address) for address in addresses))

    def limit(self, place: Slot, mbit: int) -> None:
        with self._inside(place) as inside:
            for index in (UP_INDEX, TAP_INDEX):
                if mbit:
                    inside.send(netlink.bandwidth(index, mbit))
                else:
                    # ENOENT where there is no limit to lift.
                    with contextlib.suppress(FileNotFoundError):
                        inside.send(netlink.no_bandwidth(index))

    def ipv6(self, place: Slot) -> None:
        """Lay IPv6 beside IPv4 and announce it to the guest; may be done again."""
        with self._inside(place) as inside:
            ipv6.lay_inside(inside, place)
        ipv6.lay_on_host(self._routes, place, socket.if_nametoindex(place.veth))

    def tap(self, place: Slot) -> int:
        with self._inside(place):
            return _tap()

    @contextlib.contextmanager
    def _inside(self, place: Slot) -> Generator[Netlink]:
        fd = os.open(NETNS_DIR / place.netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(fd)
            with Netlink(netlink.ROUTE) as inside:
                yield inside
        finally:
            os.close(fd)
            _enter(self._host_ns)


def _serve(builder: Builder, request: Request) -> tuple[Reply, list[int]]:
    reply, fds = Reply(), list[int]()
    places = [slot(number) for number in request.numbers]
    if request.do == "remove":
        builder.remove(places)
        reply.done = request.numbers
        return reply, fds
    for place in places:
        try:
            if request.do == "build":
                fds.append(builder.build(place))
            elif request.do == "tap":
                fds.append(builder.tap(place))
            elif request.do == "ipv6":
                builder.ipv6(place)
            else:
                builder.limit(place, request.mbit)
        except OSError as error:
            reply.failed[place.number] = f"{error.strerror or error}"
        else:
            reply.done.append(place.number)
    return reply, fds


def main(fd: int) -> None:
    """Serve requests on the socket ``fd`` until the other end closes."""
    channel = socket.socket(fileno=fd)
    try:
        builder = Builder()
        channel.send(msgspec.json.encode(Reply()))
        while data := channel.recv(MAX_MESSAGE):
            reply, fds = _serve(builder, msgspec.json.decode(data, type=Request))
            socket.send_fds(channel, [msgspec.json.encode(reply)], fds)
            for tap in fds:
                os.close(tap)
    except Exception as error:  # noqa: BLE001 - the service is told
        with contextlib.suppress(OSError):
            channel.send(msgspec.json.encode(Reply(fatal=f"{type(error).__name__}: {error}")))
        sys.exit(1)
