"""Network slots on a host of their own: what a guest that is root in there can reach, and what stays behind."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import struct
import time
from pathlib import Path

import pytest

from tests.integration.slot_world import (
    METADATA,
    OTHER_PUBLIC,
    PRIVATE,
    PUBLIC,
    RESOLVER,
    UPLINK,
    Guest,
    Internet,
    connections,
    guest,
    inside,
    on_a_host_of_its_own,
    service,
    sh,
    table,
    tcp_server,
    traces,
    udp_socket,
)
from vmm_core.errors import BadRequest, SlotsExhausted, SlotsUnavailable
from vmm_core.machine import EgressRule, Network
from vmm_core.network import claims, host, slots
from vmm_core.network.addresses import GUEST_ADDRESS6, slot
from vmm_core.network.rules import usual_connections
from vmm_core.network.slots import SlotPool

INTERNET = Network("internet")


@on_a_host_of_its_own
async def test_the_internet_is_public_addresses_and_the_resolver_and_nothing_else() -> None:
    net = Internet()
    net.tcp(443)
    net.tcp(53)
    tcp_server("0.0.0.0", 8080)  # the host's own, on all its addresses
    dns = net.udp(53, RESOLVER)
    async with SlotPool.open(3, resolvers=[RESOLVER]) as pool, guest(pool, INTERNET) as one:
        other = await pool.take()
        await pool.open_to(other, INTERNET)
        assert await one.connect(PUBLIC, 443) == f"{UPLINK} at {PUBLIC}"
        assert await one.pings(PUBLIC)
        assert not await one.pings(PRIVATE, timeout=0.3)
        assert not await one.pings(UPLINK, timeout=0.3)
        # The resolver answers at the address the guest has always known it by.
        assert await one.connect("10.0.2.3", 53) == f"{UPLINK} at {RESOLVER}"
        asked = asyncio.create_task(one.ask("10.0.2.3", 53, b"who?"))
        question, peer = await asyncio.to_thread(dns.recvfrom, 100)
        dns.sendto(b"you", peer)
        assert (question, await asked) == (b"who?", b"you")
        refused = {
            "private": (PRIVATE, 443),
            "private 172.16": ("172.16.7.7", 443),
            "private 192.168": ("192.168.7.7", 443),
            "shared": ("100.64.7.7", 443),
            "metadata": (METADATA, 443),
            "the host's uplink": (UPLINK, 8080),
            "the host's end of the slot": (one.slot.host_address, 8080),
            "the host's end of another slot": (other.host_address, 8080),
            "another slot": (other.address, 443),
            "its own slot's address": (one.slot.address, 8080),
            "the resolver's other ports": ("10.0.2.3", 443),
            "the gateway": ("10.0.2.2", 8080),
            "an unlisted name's address": ("10.0.2.100", 443),
        }
        for what, (address, port) in refused.items():
            # Refused at once, so that a job fails now and not after minutes.
            assert await one.connect(address, port) == "Connection refused", what
        assert await one.connect("127.0.0.1", 8080) == "Connection refused"  # the guest's own loopback
        one.sh(
            "ip route add 127.0.0.0/8 via 10.0.2.2 table 7; ip rule add pref 1 to 127.0.0.0/8 iif lo lookup 7"
        )
        one.sh(
            "ip rule add pref 2 lookup local; ip rule del pref 0; sysctl -qw net.ipv4.conf.all.route_localnet=1"
        )
        assert await one.connect("127.0.0.1", 8080) == "timeout"  # and not the host's


@on_a_host_of_its_own
async def test_a_list_opens_what_it_names_and_no_resolver() -> None:
    net = Internet()
    for port in (80, 443, 53):
        net.tcp(port)
    rules = (
        EgressRule("registry.test", 443),
        EgressRule("10.9.9.0/24", 443),
        EgressRule(OTHER_PUBLIC, 0),
        EgressRule("192.168.0.0/16", 0),
    )

    async def lookup(name: str) -> list[str]:
        return {"registry.test": [PUBLIC]}[name]

    async with (
        SlotPool.open(2, resolvers=[RESOLVER], lookup=lookup) as pool,
        guest(pool, Network("list", rules)) as one,
    ):
        assert await one.connect("10.0.2.100", 443) == f"{UPLINK} at {PUBLIC}"
        assert await one.reaches(PRIVATE, 443)
        assert await one.reaches(OTHER_PUBLIC, 80)
        assert await one.reaches("192.168.7.7", 53)
        for address, port in [
            ("10.0.2.100", 80),
            ("10.0.2.101", 443),
            (PUBLIC, 443),  # the name is listed, not what it happens to be today
            (PRIVATE, 80),
            ("10.0.2.3", 53),
            (METADATA, 80),
            (UPLINK, 443),
        ]:
            assert await one.connect(address, port) == "Connection refused", address
        # Closed again, its connections included.
        await pool.open_to(one.slot, Network("list"))
        assert not await one.reaches(PRIVATE, 443)


@on_a_host_of_its_own
async def test_a_wide_private_network_does_not_open_slots_or_the_host_in_it() -> None:
    net = Internet()
    net.tcp(443)
    sh("ip addr add 10.77.0.1/32 dev lo")
    tcp_server("0.0.0.0", 443)
    async with SlotPool.open(2) as pool, guest(pool, Network("list", (EgressRule("10.0.0.0/8", 0),))) as one:
        other = await pool.take()
        assert await one.reaches(PRIVATE, 443)
        for address in ("10.77.0.1", other.address, other.host_address, one.slot.host_address):
            assert not await one.reaches(address, 443), address


@on_a_host_of_its_own
async def test_the_operators_word_leads_to_the_hosts_loopback_and_to_that_port_only() -> None:
    Internet()
    tcp_server("127.0.0.1", 8443)
    tcp_server("127.0.0.1", 9999)
    network = Network("list", (EgressRule("github.test", 443, "127.0.0.1:8443"),))
    async with SlotPool.open(2) as pool, guest(pool, network) as one, guest(pool, INTERNET) as other:
        assert await one.connect("10.0.2.100", 443) == f"{one.slot.address} at 127.0.0.1"
        assert not await one.reaches("10.0.2.100", 9999)
        assert not await one.reaches("10.0.2.100", 8443)
        assert not await other.reaches("10.0.2.100", 443)
        # Routed to the loopback by the guest itself: the host takes only what its own map sent there.
        one.sh(
            "ip route add 127.0.0.0/8 via 10.0.2.2 table 7; ip rule add pref 1 to 127.0.0.0/8 iif lo lookup 7"
        )
        one.sh(
            "ip rule add pref 2 lookup local; ip rule del pref 0; sysctl -qw net.ipv4.conf.all.route_localnet=1"
        )
        assert await one.connect("127.0.0.1", 8443) == "timeout"


@on_a_host_of_its_own
async def test_a_name_that_moves_is_followed_and_open_connections_stay() -> None:
    net = Internet()
    net.tcp(443)
    answers = {"registry.test": [PUBLIC]}

    async def lookup(name: str) -> list[str]:
        return answers[name]

    def converse(guest_socket: socket.socket) -> bytes:
        guest_socket.sendall(b"still there?")
        return guest_socket.recv(100)

    network = Network("list", (EgressRule("registry.test", 443),))
    async with SlotPool.open(1, lookup=lookup) as pool, guest(pool, network) as one:
        old = one.inside(lambda: socket.create_connection(("10.0.2.100", 443), 2))
        assert PUBLIC.encode() in old.recv(200)
        answers["registry.test"] = [OTHER_PUBLIC]
        await pool.look_round()
        assert await one.connect("10.0.2.100", 443) == f"{UPLINK} at {OTHER_PUBLIC}"
        assert await asyncio.to_thread(converse, old) == b"still there?"
        old.close()
        # A name that now claims to be the host's loopback leads nowhere.
        tcp_server("127.0.0.1", 443)
        answers["registry.test"] = ["127.0.0.1"]
        await pool.look_round()
        assert not await one.reaches("10.0.2.100", 443)


@on_a_host_of_its_own
async def test_a_guest_that_is_root_cannot_pretend_to_be_another() -> None:
    net = Internet()
    sink = net.udp(9)
    local = udp_socket("0.0.0.0", 9)
    async with SlotPool.open(2) as pool, guest(pool, INTERNET) as one, guest(pool, INTERNET) as other:
        for forged in (
            "10.0.2.16",
            "10.0.2.2",
            other.slot.address,
            one.slot.address,
            one.slot.host_address,
            UPLINK,
            PUBLIC,
            "127.0.0.1",
        ):
            for target in (OTHER_PUBLIC, other.slot.address, UPLINK, one.slot.host_address, METADATA):
                one.inside(lambda source=forged, to=target: send_forged(source, to))
        with pytest.raises(TimeoutError):
            sink.recv(100)
        with pytest.raises(TimeoutError):
            local.recv(100)
        assert connections(other.slot.address) == []
        # The same as a real change of its address and MAC. Its own MAC never mattered, its address does.
        one.sh(
            "ip addr flush dev eth0; ip addr add 10.0.2.77/24 dev eth0; ip route replace default via 10.0.2.2"
        )
        assert await one.ask(OTHER_PUBLIC, 9, timeout=0.2) is None
        with pytest.raises(TimeoutError):
            sink.recv(100)
        one.sh(
            "ip addr flush dev eth0; ip addr add 10.0.2.15/24 dev eth0; ip route replace default via 10.0.2.2"
        )
        one.sh("ip link set eth0 address 52:55:0a:00:02:99")
        assert await one.ask(OTHER_PUBLIC, 9, timeout=0.2) is None
        assert sink.recvfrom(100)[1][0] == UPLINK
        assert await other.ask(OTHER_PUBLIC, 9, timeout=0.2) is None
        assert sink.recvfrom(100)[1][0] == UPLINK


@on_a_host_of_its_own
async def test_ipv6_and_other_protocols_do_not_leave() -> None:
    net = Internet()
    sh("ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip -n net -6 addr add 2001:db8::2/64 dev core nodad")
    sh("sysctl -qw net.ipv6.conf.all.forwarding=1")
    seen = inside("net", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)))
    seen.settimeout(0.5)
    assert net
    async with SlotPool.open(1) as pool, guest(pool, INTERNET) as one:
        one.sh("ip -6 addr add fd00::15/64 dev eth0 nodad; ip -6 route add default dev eth0")
        one.sh("ip -6 neigh add 2001:db8::2 lladdr 52:55:0a:00:02:02 dev eth0")

        def six() -> None:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams:
                datagrams.sendto(b"six", ("2001:db8::2", 9))

        one.inside(six)
        for protocol in (47, 132, 4, 50):  # GRE, SCTP, IP in IP, ESP
            one.inside(lambda number=protocol: send_forged("10.0.2.15", PUBLIC, number))
        packets = drain(seen)
        assert not any(b"six" in packet or b"forged" in packet for packet in packets)


@on_a_host_of_its_own
async def test_ipv6_is_there_for_who_asks_by_the_same_policy() -> None:
    net = Internet()
    sh("ip -6 addr add 2001:db8::1/64 dev uplink nodad; ip -n net -6 addr add 2001:db8::2/64 dev core nodad")
    for address in ("2001:db8:7::7", "2001:db8:8::8", "fd99::9"):
        sh(f"ip -n net -6 addr add {address}/128 dev lo nodad")
    sh("ip -6 route add default via 2001:db8::2; ip -6 route add fd99::/16 via 2001:db8::2")
    net.tcp(443, "::")
    tcp_server("::", 8080)
    listed = Network("list", (EgressRule("fd99::/64", 443), EgressRule("2001:db8:8::8", 0)), ipv6=True)
    before = sh("sysctl -n net.ipv6.conf.all.forwarding net.ipv6.conf.uplink.accept_ra")
    async with (
        SlotPool.open(3) as pool,
        guest(pool, Network("internet", ipv6=True)) as one,
        guest(pool, listed) as other,
        guest(pool, INTERNET) as without,
    ):
        for each in (one, other):
            await addressed(each)
        assert GUEST_ADDRESS6 not in without.sh("ip -6 addr show dev eth0")
        assert await one.connect("2001:db8:7::7", 443) == "2001:db8::1 at 2001:db8:7::7"
        assert await other.reaches("fd99::9", 443)
        assert await other.reaches("2001:db8:8::8", 443)
        for who, address, port in [
            (one, "fd99::9", 443),
            (one, "2001:db8::1", 8080),
            (one, one.slot.host_address6, 8080),
            (one, other.slot.address6, 443),
            (other, "2001:db8:7::7", 443),
            (other, "2001:db8::1", 8080),
        ]:
            assert await who.connect(address, port) == "Connection refused", address
        # Another source than its own, though the network is its own.
        one.sh("ip -6 addr flush dev eth0 scope global; ip -6 addr add fd6d:7600:0:2::77/64 dev eth0 nodad")
        assert await one.connect("2001:db8:7::7", 443) == "timeout"
        # Asked for no more: closed at once.
        assert connections(other.slot.address6)
        await pool.open_to(other.slot, Network("list"))
        assert not await other.reaches("fd99::9", 443)
        used = other.slot
    assert connections(used.address6) == []
    assert traces() == []
    assert sh("sysctl -n net.ipv6.conf.all.forwarding net.ipv6.conf.uplink.accept_ra") == before
    assert sh("sysctl -n net.ipv6.conf.uplink.force_forwarding") == "0\n"


async def addressed(one: Guest) -> None:
    """Wait until the guest has made its address of the slot's announcement."""
    async with asyncio.timeout(8):
        while f"{GUEST_ADDRESS6}/64 scope global dynamic" not in (
            shown := one.sh("ip -6 addr show dev eth0")
        ) or ("tentative" in shown):
            await asyncio.sleep(0.1)


def send_forged(source: str, target: str, protocol: int = 17) -> None:
    """One packet with any source address; a guest that is root needs no more than this."""
    payload = struct.pack("!HHHH", 7, 9, 14, 0) + b"forged"
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0,
        socket.inet_aton(source), socket.inet_aton(target),
    )  # fmt: skip
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        frame = bytes.fromhex("52550a000202") + bytes.fromhex("525400123456") + b"\x08\x00"
        raw.send(frame + header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def drain(packets: socket.socket) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            found.append(packets.recv(2000))
        except TimeoutError:
            return found


@on_a_host_of_its_own
async def test_the_number_of_rules_does_not_depend_on_the_number_of_slots() -> None:
    Internet()

    def rules() -> int:
        listing = json.loads(sh("nft -j list table inet microvm"))["nftables"]
        return sum("rule" in entry for entry in listing)

    def rules_inside(name: str) -> str:
        return sh(f"ip netns exec {name} nft list ruleset")

    network = Network(
        "internet", (EgressRule("a.test", 443, f"{PUBLIC}:443"), EgressRule("10.9.0.0/16", 443))
    )
    async with SlotPool.open(4) as pool:
        places = [await pool.take()]
        await pool.open_to(places[0], network)
        with_one = rules()
        places += [await pool.take() for _ in range(49)]
        await asyncio.gather(*(pool.open_to(place, network) for place in places))
        assert table().count('"mv-') >= 50
        assert rules() == with_one
        assert all(rules_inside(place.netns) == "" for place in places)
        await asyncio.gather(*(pool.give_back(place) for place in places))


@on_a_host_of_its_own
async def test_a_returned_slot_leaves_nothing_to_the_next() -> None:
    net = Internet()
    net.tcp(443)
    async with SlotPool.open(1, resolvers=[RESOLVER]) as pool:
        async with guest(
            pool, Network("internet", (EgressRule("a.test", 443, f"{PUBLIC}:443"),), mbit=50)
        ) as one:
            assert await one.reaches(PUBLIC, 443)
            assert await one.reaches("10.0.2.100", 443)
            assert connections(one.slot.address)
            sent = pool.usage(one.slot)
            assert min(sent.sent_bytes, sent.sent_packets, sent.received_bytes, sent.received_packets) > 0
            used = one.slot
        await settled(pool, used.number)
        assert connections(used.address) == []
        assert used.address not in table()
        # Until the same number comes round again: nothing of the last guest is there.
        taken = []
        while not taken or taken[-1].number != used.number:
            taken.append(await pool.take())
            assert len(taken) < 8
        usage = pool.usage(taken[-1])
        assert usage.sent_bytes == 0
        assert "tbf" not in sh(f"ip netns exec {used.netns} tc qdisc show")
        tap = await pool.tap_fd(taken[-1])
        with pytest.raises(BlockingIOError):
            os.read(tap, 2000)
        os.close(tap)
        for place in taken:
            await pool.give_back(place)
    assert traces() == []


async def settled(pool: SlotPool, number: int) -> None:
    async with asyncio.timeout(10):
        while pool.owner(number) or pool.ready < pool.size:
            await asyncio.sleep(0.05)


@on_a_host_of_its_own
async def test_handing_out_is_instant_and_preparing_is_fast() -> None:
    Internet()
    before = os.readlink("/proc/self/ns/net")
    async with SlotPool.open(60) as pool:
        rates, waits = list[float](), list[float]()
        for _ in range(3):
            await filled(pool)
            places = []
            for _ in range(60):
                started = time.perf_counter()
                places.append(await pool.take("/data/vms/vm-1"))
                waits.append(time.perf_counter() - started)
            started, lag = time.perf_counter(), 0.0
            while pool.ready < pool.size:
                slept = time.perf_counter()
                await asyncio.sleep(0.002)
                lag = max(lag, time.perf_counter() - slept)
            rates.append(60 / (time.perf_counter() - started))
            assert lag < 0.2, "the loop stood still while slots were prepared"
            await asyncio.gather(*(pool.give_back(place) for place in places))
        waits.sort()
        assert waits[int(len(waits) * 0.99)] <= 0.001, waits[-5:]
        assert max(rates) >= 100, rates
        print(f"handed out p99 {waits[int(len(waits) * 0.99)] * 1e3:.3f} ms; prepared per second {rates}")
    assert os.readlink("/proc/self/ns/net") == before
    # The service itself does not carry the weight of the library.
    program = "import sys, vmm_core.network.slots; sys.exit('pyroute2' in sys.modules)"
    with service(program) as imported:
        assert imported.wait(10) == 0


async def filled(pool: SlotPool) -> None:
    async with asyncio.timeout(30):
        while pool.ready < pool.size:
            await asyncio.sleep(0.02)


@on_a_host_of_its_own
async def test_a_guest_cannot_exhaust_the_hosts_connections() -> None:
    net = Internet()
    net.tcp(443)
    limit = usual_connections()
    async with SlotPool.open(2) as pool, guest(pool, INTERNET) as one, guest(pool, INTERNET) as other:

        def blast() -> None:
            until = time.monotonic() + 12
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
                port = 1024
                while time.monotonic() < until:
                    for _ in range(50):
                        port = port + 1 if port < 65000 else 1024
                        datagrams.sendto(b"x", (PUBLIC, port))
                    time.sleep(0.01)

        attack = asyncio.create_task(asyncio.to_thread(one.inside, blast))
        await asyncio.sleep(1.0)
        # Slower than it sends: new connections are limited as well.
        assert len(connections(one.slot.address)) < 1500
        most = 0
        while not attack.done():
            assert await other.reaches(PUBLIC, 443, timeout=3.0)
            most = max(most, len(connections(one.slot.address)))
            await asyncio.sleep(0.3)
        assert limit * 0.8 < most <= limit, (most, limit)
        assert connections(other.slot.address)


@on_a_host_of_its_own
async def test_bandwidth_is_limited_both_ways_and_can_be_lifted() -> None:
    net = Internet()
    net.tcp(443)

    def throughput(seconds: float) -> float:
        """Mbit/s there, and as much back."""
        with socket.create_connection((PUBLIC, 443), 5) as connection:
            connection.recv(200)
            connection.setblocking(False)
            sent = received = 0
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                for work in ("send", "receive"):
                    try:
                        if work == "send":
                            sent += connection.send(b"x" * 8192)
                        else:
                            received += len(connection.recv(65536))
                    except BlockingIOError:
                        time.sleep(0.0005)
            return received * 8 / seconds / 1e6

    async with SlotPool.open(1) as pool, guest(pool, Network("internet", mbit=10)) as one:
        qdiscs = sh(f"ip netns exec {one.slot.netns} tc qdisc show")
        assert set(re.findall(r"tbf \S+ dev (\w+) root .*rate 10Mbit", qdiscs)) == {"tap", "up"}
        limited = await asyncio.to_thread(one.inside, lambda: throughput(3.0))
        assert 4 < limited <= 11.5, limited
        await pool.open_to(one.slot, INTERNET)
        free = await asyncio.to_thread(one.inside, lambda: throughput(2.0))
        assert free > 2 * limited, (limited, free)


@on_a_host_of_its_own
async def test_nothing_stays_when_the_last_pool_closes_and_everything_while_another_is_open() -> None:
    Internet()
    assert sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.uplink.forwarding").split() == ["0", "0"]
    async with SlotPool.open(2):
        async with SlotPool.open(2) as pool, guest(pool, INTERNET):
            # Forwarding for what leads somewhere, not for the host as a whole, and only to slots.
            assert sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.uplink.forwarding").split() == ["0", "1"]
            assert '"uplink"' in table()
        assert "chain from_slot" in table()
    assert traces() == []
    assert sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.uplink.forwarding").split() == ["0", "0"]


@on_a_host_of_its_own
async def test_a_host_that_forwards_already_is_left_as_it_is() -> None:
    Internet()
    sh("sysctl -qw net.ipv4.ip_forward=1")
    async with SlotPool.open(1) as pool, guest(pool, INTERNET):
        assert '"uplink"' not in table()
    assert sh("sysctl -n net.ipv4.ip_forward net.ipv4.conf.uplink.forwarding").split() == ["1", "1"]


@on_a_host_of_its_own
async def test_a_firewall_that_somebody_flushed_is_closed_and_then_restored() -> None:
    net = Internet()
    net.tcp(443)
    tcp_server("0.0.0.0", 8080)
    async with SlotPool.open(1) as pool, guest(pool, INTERNET) as one:
        assert await one.reaches(PUBLIC, 443)
        sh("nft flush ruleset")
        assert not await one.reaches(PUBLIC, 443)
        assert not await one.reaches(UPLINK, 8080)
        await pool.look_round()
        assert await one.reaches(PUBLIC, 443)
        assert not await one.reaches(UPLINK, 8080)


_SERVICE = """
import asyncio, os, sys, random
from vmm_core.machine import EgressRule, Network
from vmm_core.network.slots import SlotPool

async def use(pool, number):
    while True:
        place = await pool.take(f"/vms/vm-{number}")
        await pool.open_to(place, Network("internet", (EgressRule("10.9.0.0/16", 443),), mbit=random.choice([0, 100])))
        os.close(await pool.tap_fd(place))
        print(place.number, flush=True)
        if sys.argv[1] == "keep":
            await asyncio.sleep(1000)
        await pool.give_back(place)

async def main():
    async with SlotPool.open(3) as pool:
        await asyncio.gather(*(use(pool, number) for number in range(3)))

asyncio.run(main())
"""


@on_a_host_of_its_own
async def test_what_a_killed_service_left_is_found_and_reaped() -> None:
    Internet()
    for _ in range(8):
        with service(_SERVICE, "churn") as killed:
            assert killed.stdout is not None
            await asyncio.to_thread(killed.stdout.readline)
            await asyncio.sleep(random.random() * 0.4)
            killed.send_signal(signal.SIGKILL)
    async with SlotPool.open(2) as pool:
        await filled(pool)
        first = {orphan.number for orphan in await pool.orphans()}
        again = [orphan for orphan in await pool.orphans() if orphan.number in first]
        assert again
        assert all(orphan.owner == "" or orphan.owner.startswith("/vms/vm-") for orphan in again)
        for orphan in again:
            assert await pool.reap(orphan.number)
        assert await pool.orphans() == []
    assert traces() == []


@on_a_host_of_its_own
async def test_a_slot_somebody_lives_in_is_no_orphan_and_can_be_adopted() -> None:
    net = Internet()
    net.tcp(443)
    with service(_SERVICE, "keep") as killed:
        assert killed.stdout is not None
        numbers = [int(await asyncio.to_thread(killed.stdout.readline)) for _ in range(3)]
        killed.send_signal(signal.SIGKILL)
    number = numbers[0]
    vm = await asyncio.create_subprocess_exec("ip", "netns", "exec", f"mv-{number}", "sleep", "60")
    await asyncio.sleep(0.3)
    async with SlotPool.open(1) as pool:
        await filled(pool)
        orphans = {orphan.number: orphan.owner for orphan in await pool.orphans()}
        assert number not in orphans
        assert set(numbers[1:]) <= set(orphans)
        assert not await pool.reap(number)
        owner = pool.owner(number)
        assert owner is not None
        with pytest.raises(BadRequest, match="can not be adopted"):
            await pool.adopt(number, "/vms/another")
        place = await pool.adopt(number, owner)
        assert place == slot(number)
        async with SlotPool.open(0) as other:
            with pytest.raises(BadRequest, match="held by another process"):
                await other.adopt(number, owner)
        # What it was open to is replaced, not added to.
        await pool.open_to(place, Network("list", (EgressRule(PUBLIC, 443),)))
        assert "10.9.0.0/16" not in [line for line in table().splitlines() if place.address in line]
        one = Guest(place, await pool.tap_fd(place))
        assert await one.reaches(PUBLIC, 443)
        assert not await one.reaches(PRIVATE, 443)
        one.close()
        vm.kill()
        await vm.wait()
        await pool.give_back(place)
        for orphan in await pool.orphans():
            assert await pool.reap(orphan.number)
    assert traces() == []


@on_a_host_of_its_own
async def test_a_vm_keeps_its_slot_when_its_service_closes() -> None:
    net = Internet()
    net.tcp(443)
    async with SlotPool.open(2) as pool:
        place = await pool.take("/vms/vm-1")
        await pool.open_to(place, INTERNET)
        one = Guest(place, await pool.tap_fd(place))
    assert await one.reaches(PUBLIC, 443)
    assert sorted(entry.name for entry in Path("/run/netns").glob("mv-*")) == [place.netns]
    async with SlotPool.open(2) as pool:
        place = await pool.adopt(place.number, "/vms/vm-1")
        assert await one.reaches(PUBLIC, 443)
        one.close()
        await pool.give_back(place)
    assert traces() == []


@on_a_host_of_its_own
async def test_a_host_that_cannot_have_slots_says_why() -> None:
    Internet()
    assert await host.usable() is None
    sh("ip route add 10.200.40.0/24 via 203.0.113.2")
    reason = await host.usable()
    assert reason is not None
    assert "10.200.40.0/24" in reason
    assert "uplink" in reason
    with pytest.raises(SlotsUnavailable, match="collides"):
        async with SlotPool.open(1):
            pass
    sh("ip route del 10.200.40.0/24")
    assert traces() == []


@on_a_host_of_its_own
async def test_a_host_without_a_free_slot_fails_the_one_that_needed_it() -> None:
    Internet()
    claims.SLOTS = 3
    slots._CHUNK = 2
    async with SlotPool.open(2) as pool:
        places = [await pool.take() for _ in range(3)]
        with pytest.raises(SlotsExhausted, match="all 3 network slots"):
            await pool.take()
        await pool.give_back(places[1])
        assert (await pool.take()).number == places[1].number
        await pool.open_to(places[0], INTERNET)


@on_a_host_of_its_own
async def test_a_builder_that_dies_is_started_again() -> None:
    Internet()
    async with SlotPool.open(2) as pool:
        await filled(pool)
        process = pool._builder._process
        assert process is not None
        process.kill()
        process.wait()
        places = [await pool.take() for _ in range(5)]
        assert len({place.number for place in places}) == 5
        for place in places:
            await pool.give_back(place)
    assert traces() == []


@on_a_host_of_its_own
async def test_a_refused_policy_changes_nothing() -> None:
    net = Internet()
    net.tcp(443)
    async with SlotPool.open(1) as pool, guest(pool, INTERNET) as one:
        with pytest.raises(BadRequest, match="this host"):
            await pool.open_to(one.slot, Network("list", (EgressRule(UPLINK, 443),)))
        assert await one.reaches(PUBLIC, 443)
