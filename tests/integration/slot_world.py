"""A host of its own for a test, an internet behind it, and a guest that is only a network stack.

The host is a network and mount namespace with a /run of its own, so that its firewall, routes, claims and
namespaces are nobody else's. The internet is a namespace behind the host's uplink. A guest is a namespace whose
``eth0`` is joined to the slot's tap as a VMM would join it; the test is root in there.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import functools
import ipaddress
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vmm_core.machine import Network
from vmm_core.network.addresses import GATEWAY, GUEST_ADDRESS, GUEST_MAC, Slot
from vmm_core.network.slots import SlotPool

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)
_NEWNET, _NEWNS, _PRIVATE_REC = 0x40000000, 0x00020000, (1 << 18) | 16384
TEST_SECONDS = 100

UPLINK = "203.0.113.1"
PUBLIC, OTHER_PUBLIC, RESOLVER = "198.51.100.7", "198.51.100.8", "198.51.100.53"
PRIVATE, METADATA = "10.9.9.9", "169.254.169.254"
NET_ADDRESSES = (PUBLIC, OTHER_PUBLIC, RESOLVER, PRIVATE, METADATA, "192.168.7.7", "172.16.7.7", "100.64.7.7")


def on_a_host_of_its_own(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in a process with namespaces of its own; what fails there fails here, with its traceback."""

    @functools.wraps(test)
    def run() -> None:
        if os.geteuid() != 0:
            pytest.skip("network namespaces need root")
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _child(test, write)
        os.close(write)
        with open(read, "rb") as said:
            output = said.read().decode("utf-8", "replace")
        _, status = os.waitpid(pid, 0)
        if status != 0:
            pytest.fail(f"on its own host (status {status}):\n{output}", pytrace=False)

    del run.__wrapped__  # pytest must see a plain function
    return run


def _child(test: Callable[[], Coroutine[Any, Any, None]], write: int) -> None:
    code = 1
    try:
        signal.alarm(TEST_SECONDS)
        for kind in (_NEWNS, _NEWNET):
            _must(_libc.unshare(kind))
        _must(_libc.mount(None, b"/", None, _PRIVATE_REC, None))
        _must(_libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, b"size=64m"))
        _must(_libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))
        sh("ip link set lo up")
        asyncio.run(test())
        code = 0
    except BaseException:
        os.write(write, traceback.format_exc().encode()[-60_000:])
    finally:
        os._exit(code)


def _must(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def sh(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Run ``work`` on a thread that stands in ``namespace``; its sockets stay there."""
    done: list[T] = []
    failed: list[BaseException] = []

    def body() -> None:
        fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            _must(_libc.setns(fd, _NEWNET))
            done.append(work())
        except BaseException as error:
            failed.append(error)
        finally:
            os.close(fd)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


class Internet:
    """Namespace ``net`` behind the host's uplink. Every address answers on the ports the test opens."""

    def __init__(self) -> None:
        sh("ip netns add net")
        sh("ip link add uplink type veth peer name core netns net")
        sh(f"ip addr add {UPLINK}/24 dev uplink; ip link set uplink up; ip route add default via 203.0.113.2")
        sh("ip -n net link set lo up; ip -n net link set core up; ip -n net addr add 203.0.113.2/24 dev core")
        for address in NET_ADDRESSES:
            sh(f"ip -n net addr add {address}/32 dev lo")
        sh("ip route add 169.254.169.254/32 via 203.0.113.2")

    def tcp(self, port: int, address: str = "0.0.0.0") -> socket.socket:
        return inside("net", lambda: tcp_server(address, port))

    def udp(self, port: int, address: str = "0.0.0.0") -> socket.socket:
        return inside("net", lambda: udp_socket(address, port))


def tcp_server(address: str, port: int) -> socket.socket:
    """Tells everyone who connects from where it seems to be, then sends back what it reads."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(256)

    def serve(connection: socket.socket, peer: str) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(f"{peer} at {connection.getsockname()[0]}\n".encode())
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, (peer, *_) = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection, peer), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


def udp_socket(address: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.bind((address, port))
    bound.settimeout(0.5)
    return bound


class Guest:
    """The other end of a slot's tap. ``namespace`` is its own; the test is root in it."""

    def __init__(self, place: Slot, tap: int) -> None:
        self.namespace = f"guest-{place.number}"
        self.slot = place
        self._tap = tap
        sh(f"ip netns add {self.namespace}")
        self._card = inside(self.namespace, _card)
        self.sh(f"ip link set eth0 address {GUEST_MAC}; ip link set lo up; ip link set eth0 up")
        self.sh(f"ip addr add {GUEST_ADDRESS}/24 dev eth0; ip route add default via {GATEWAY}")
        self._stop = os.eventfd(0)
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def sh(self, command: str) -> str:
        return sh(f"ip netns exec {self.namespace} sh -ec '{command}'")

    def inside(self, work: Callable[[], T]) -> T:
        return inside(self.namespace, work)

    async def connect(self, address: str, port: int, *, timeout: float = 1.0) -> str:
        """What the server says about us, or why there is no connection."""

        family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def work() -> str:
            with socket.socket(family) as connection:
                connection.settimeout(timeout)
                try:
                    connection.connect((address, port))
                    return connection.recv(200).decode().strip()
                except TimeoutError:
                    return "timeout"
                except OSError as error:
                    return os.strerror(error.errno or 0)

        return await asyncio.to_thread(self.inside, work)

    async def ask(self, address: str, port: int, text: bytes = b"?", *, timeout: float = 1.0) -> bytes | None:
        """A datagram and its answer."""

        def work() -> bytes | None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
                connection.settimeout(timeout)
                connection.sendto(text, (address, port))
                try:
                    return connection.recv(2000)
                except OSError:
                    return None

        return await asyncio.to_thread(self.inside, work)

    async def pings(self, address: str, *, timeout: float = 1.0) -> bool:
        """Whether an ICMP echo comes back."""

        def work() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
                raw.settimeout(timeout)
                raw.sendto(bytes.fromhex("0800e5ca12340001"), (address, 0))
                try:
                    return raw.recv(100)[20:21] == b"\0"
                except TimeoutError:
                    return False

        return await asyncio.to_thread(self.inside, work)

    async def reaches(self, address: str, port: int, *, timeout: float = 1.0) -> bool:
        return " at " in await self.connect(address, port, timeout=timeout)

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for fd in (self._tap, self._card, self._stop):
            os.close(fd)
        sh(f"ip netns del {self.namespace}")

    def _pump(self) -> None:
        pairs = {self._tap: self._card, self._card: self._tap}
        while True:
            ready, _, _ = select.select([*pairs, self._stop], [], [])
            if self._stop in ready:
                return
            for fd in ready:
                for _ in range(64):
                    try:
                        os.write(pairs[fd], os.read(fd, 65536))
                    except OSError:
                        break


def _card() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"eth0", 0x1002))
    return fd


@contextlib.asynccontextmanager
async def guest(pool: SlotPool, network: Network, owner: str = "/vms/test") -> AsyncIterator[Guest]:
    """A guest in a slot that is open to ``network``."""
    place = await pool.take(owner)
    try:
        await pool.open_to(place, network)
        opened = Guest(place, await pool.tap_fd(place))
        try:
            yield opened
        finally:
            opened.close()
    finally:
        await pool.give_back(place)


def connections(address: str) -> list[str]:
    """The tracked connections a slot's address began."""
    lines = Path("/proc/net/nf_conntrack").read_text().splitlines()
    shown = ipaddress.ip_address(address).exploded
    return [line for line in lines if f"src={shown} " in line.split("dport=")[0]]


def table() -> str:
    return sh("nft list table inet microvm")


def traces() -> list[str]:
    """All that slots may have left on this host."""
    found = [f"namespace {entry.name}" for entry in Path("/run/netns").glob("mv-*")]
    found += [f"interface {name}" for _, name in socket.if_nameindex() if name.startswith("mv-")]
    found += [f"claim {entry.name}" for entry in Path("/run/microvm/slots").glob("*")]
    found += [f"tables {line}" for line in sh("nft list tables").splitlines()]
    found += [
        f"connection {line}"
        for line in Path("/proc/net/nf_conntrack").read_text().splitlines()
        if "10.200." in line
    ]
    found += [f"routes {line}" for line in sh("ip route").splitlines() if "10.200." in line]
    return found


@contextlib.contextmanager
def service(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process of this host that runs ``program`` (Python); killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
