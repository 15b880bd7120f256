"""What real guests reach through their slots, also as root with other addresses than their own.

Each test has a host of its own (``slot_world``) with an internet behind it, and the real engine on it.
"""

import contextlib
import json
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.integration.slot_world import (
    METADATA,
    NET_ADDRESSES,
    OTHER_PUBLIC,
    PRIVATE,
    PUBLIC,
    RESOLVER,
    UPLINK,
    Internet,
    on_a_host_of_its_own,
    tcp_server,
)
from vmm_core.engine import Engine
from vmm_core.machine import EgressRule, Network, Snapshot
from vmm_core.vm import RunningVm

# For each "address port", on a line of its own: whether a TCP connection is answered.
CONNECT = """
import json, socket, sys
found = {}
for word in sys.argv[1:]:
    host, port = word.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=1.5) as connection:
            found[word] = connection.recv(200).decode().strip()
    except OSError:
        found[word] = None
print(json.dumps(found))
"""
# Datagrams with a made-up source, written to the card itself; with a made-up MAC address too.
SPOOF = """
import socket, struct, sys
card = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
card.bind(("eth0", 0))
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
for source, mac in zip(sys.argv[2::2], sys.argv[3::2]):
    payload = b"spoofed!"
    udp = struct.pack("!HHHH", 4000, 9999, 8 + len(payload), 0) + payload
    ends = socket.inet_aton(source) + socket.inet_aton(sys.argv[1])
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + ends
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    frame = bytes.fromhex("52550a000202" + mac.replace(":", "")) + b"\\x08\\x00" + head + udp
    for _ in range(5): card.send(frame)
"""

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def guest(engine: Engine, parent: Snapshot, network: Network) -> AsyncIterator[RunningVm]:
    manifest = msgspec.structs.replace(parent.manifest, machine=parent.manifest.machine.on(network))
    async with engine.fork(msgspec.structs.replace(parent, manifest=manifest), ttl=120) as vm:
        yield vm


async def reached(vm: RunningVm, *places: str) -> dict[str, str | None]:
    result = await vm.exec(["python3", "-c", CONNECT, *places], timeout=60)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def on_its_host(test):
    """The test, given the engine of the shared data directory and the template ``networked``, on a host of its own."""

    async def run(engine: Engine, networked: Snapshot) -> None:
        @on_a_host_of_its_own
        async def there() -> None:
            net = Internet()
            async with Engine.open(engine.data_dir, slots=True, resolvers=[RESOLVER]) as own:
                await test(own, networked, net)

        there()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@on_its_host
async def test_the_internet_is_public_addresses_and_the_resolver_and_nothing_else(
    engine: Engine, networked: Snapshot, net: Internet
) -> None:
    listeners = [net.tcp(80), net.tcp(22)]
    resolver = net.udp(53, RESOLVER)
    own = tcp_server("0.0.0.0", 8080)
    async with (
        guest(engine, networked, Network("internet")) as vm,
        guest(engine, networked, Network("internet")) as other,
    ):
        await other.start(["python3", "-m", "http.server", "8000"], exec_id="serve")
        slot = other.record.slot
        assert slot is not None
        neighbour = f"10.200.{slot * 4 // 256}.{slot * 4 % 256 + 2}"
        closed = [
            *(
                f"{address}:80"
                for address in NET_ADDRESSES
                if address not in (PUBLIC, OTHER_PUBLIC, RESOLVER)
            ),
            *(f"{address}:8080" for address in (UPLINK, "10.0.2.2", "10.200.0.1", "127.0.0.1")),
            f"{neighbour}:8000",
        ]
        found = await reached(vm, f"{PUBLIC}:80", f"{OTHER_PUBLIC}:22", *closed)
        assert found.pop(f"{PUBLIC}:80") == f"{UPLINK} at {PUBLIC}", "masked by the host's own address"
        assert found.pop(f"{OTHER_PUBLIC}:22")
        assert found == dict.fromkeys(closed), "reached what is never open"
        assert f"{METADATA}:80" in closed
        assert f"{PRIVATE}:80" in closed
        await vm.exec("getent ahostsv4 who.example & sleep 1; kill $! 2>/dev/null; true")
        assert b"\x03who\x07example" in resolver.recv(512), "the guest asks the configured resolver"
        six = await vm.exec("python3 -c \"import socket; socket.create_connection(('2001:db8::1', 80), 2)\"")
        assert six.code != 0
    for sock in (*listeners, resolver, own):
        sock.close()


@on_its_host
async def test_a_list_opens_what_it_names_on_the_ports_it_names(
    engine: Engine, networked: Snapshot, net: Internet
) -> None:
    listeners = [net.tcp(80), net.tcp(443)]
    rules = (
        EgressRule("forge.test", 443, via=f"{PUBLIC}:443"),
        EgressRule("10.9.9.0/24", 80),
        EgressRule("192.168.7.7", 0),
    )
    async with guest(engine, networked, Network("list", rules)) as vm:
        found = await reached(
            vm, "forge.test:443", f"{PRIVATE}:80", "192.168.7.7:443",
            "forge.test:80", f"{PRIVATE}:443", f"{PUBLIC}:443", f"{OTHER_PUBLIC}:80", "172.16.7.7:80",
        )  # fmt: skip
        assert [place for place, answer in found.items() if answer] == [
            "forge.test:443",
            f"{PRIVATE}:80",
            "192.168.7.7:443",
        ]
        denied = await vm.exec("ping -c1 -W1 10.0.2.2 || true")
        assert denied.code in (0, 127)
    for listener in listeners:
        listener.close()


@on_its_host
async def test_a_root_guest_that_makes_up_addresses_reaches_nobody(
    engine: Engine, networked: Snapshot, net: Internet
) -> None:
    sink = net.udp(9999)
    async with guest(engine, networked, Network("internet")) as vm:
        honest = f"import socket; s = socket.socket(2, 2); s.sendto(b'honest', ('{PUBLIC}', 9999))"
        await vm.exec(["python3", "-c", honest])
        assert sink.recv(100) == b"honest"
        mac, other = "52:54:00:12:34:56", "02:aa:bb:cc:dd:ee"
        pairs = [
            *("10.0.2.77", mac, "10.0.2.2", mac, "10.200.0.2", mac, "203.0.113.1", mac, "8.8.8.8", mac),
            *("127.0.0.1", mac, "10.0.2.100", other),
        ]
        sent = await vm.exec(["python3", "-c", SPOOF, PUBLIC, *pairs], user="root")
        assert sent.code == 0, sent.stderr
        # The kernel of the guest, too, sends from any address it is told to.
        for address in ("10.0.2.99", "8.8.8.8"):
            moved = (
                "import socket; s = socket.socket(2, 2); s.setsockopt(0, 19, 1); "  # IP_TRANSPARENT
                f"s.bind(('{address}', 0)); s.sendto(b'moved', ('{PUBLIC}', 9999))"
            )
            result = await vm.exec(["python3", "-c", moved], user="root")
            assert result.code == 0, result.stderr
        try:
            stray = sink.recv(100)
        except TimeoutError:
            stray = None
        assert stray is None, "a packet with a made-up source got out"
        # The same path is open to its own address: the checks above could have found something.
        await vm.exec(["python3", "-c", honest])
        assert sink.recv(100) == b"honest"
    sink.close()


@on_its_host
async def test_the_bandwidth_limit_holds_each_way(engine: Engine, networked: Snapshot, net: Internet) -> None:
    listener = net.tcp(80)
    script = (
        "import socket, time\n"
        f"c = socket.create_connection(('{PUBLIC}', 80)); c.recv(200)\n"
        "began, size, got = time.time(), 600_000, 0\n"
        "import threading; threading.Thread(target=lambda: c.sendall(bytes(size)), daemon=True).start()\n"
        "while got < size: got += len(c.recv(65536))\n"
        "print(time.time() - began)\n"
    )
    seconds: dict[int, float] = {}
    for mbit in (0, 2):
        async with guest(engine, networked, Network("internet", mbit=mbit)) as vm:
            result = await vm.exec(["python3", "-c", script], timeout=60)
            assert result.code == 0, result.stderr
            seconds[mbit] = float(result.stdout)
    # 600 kB both ways at 2 Mbit/s are 2.4 s, a burst aside.
    assert seconds[2] > 1.8, seconds
    assert seconds[0] < seconds[2] / 1.5, seconds
    listener.close()


@on_its_host
async def test_a_machine_without_network_has_none_in_its_slot(
    engine: Engine, networked: Snapshot, net: Internet
) -> None:
    listener = net.tcp(80)
    began = time.monotonic()
    async with guest(engine, networked, Network("list")) as vm:
        assert (await reached(vm, f"{PUBLIC}:80", "10.0.2.2:80")) == {
            f"{PUBLIC}:80": None,
            "10.0.2.2:80": None,
        }
    assert time.monotonic() - began < 60
    listener.close()
