"""Slot N is a pure function of N: distinct, without overlap, and readable back."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.errors import BadRequest
from vmm_core.network.addresses import (
    GUEST_ADDRESS6,
    GUEST_MAC,
    GUEST_NETWORK,
    GUEST_NETWORK6,
    NETWORK,
    NETWORK6,
    PREFIX_LENGTH,
    SLOTS,
    UID_BASE,
    number_of_address,
    number_of_name,
    slot,
)

NUMBERS = st.integers(min_value=0, max_value=SLOTS - 1)


def test_all_slots_are_distinct_in_everything_that_names_them() -> None:
    everything = [slot(number) for number in range(SLOTS)]
    for values in (
        {place.name for place in everything},
        {place.uid for place in everything},
        {place.address for place in everything},
        {place.host_address for place in everything},
        {place.mac for place in everything},
        {place.host_mac for place in everything},
        {place.address6 for place in everything},
        {place.host_address6 for place in everything},
    ):
        assert len(values) == SLOTS
    assert not {place.mac for place in everything} & {place.host_mac for place in everything}
    assert not {place.address for place in everything} & {place.host_address for place in everything}


def test_the_slots_fill_their_range_exactly() -> None:
    assert SLOTS == 16_384
    assert NETWORK.num_addresses == SLOTS * (1 << (32 - PREFIX_LENGTH))
    assert not NETWORK.overlaps(GUEST_NETWORK)


@given(NUMBERS)
def test_a_slot_is_the_two_hosts_of_its_own_network(number: int) -> None:
    place = slot(number)
    network = ipaddress.IPv4Network((place.host_address, PREFIX_LENGTH), strict=False)
    assert [str(host) for host in network.hosts()] == [place.host_address, place.address]
    assert network.subnet_of(NETWORK)


@given(NUMBERS, NUMBERS)
def test_networks_of_two_slots_never_overlap(one: int, other: int) -> None:
    networks = [
        ipaddress.IPv4Network((slot(number).address, PREFIX_LENGTH), strict=False) for number in (one, other)
    ]
    assert networks[0].overlaps(networks[1]) == (one == other)


@given(NUMBERS)
def test_number_comes_back_from_names_and_addresses(number: int) -> None:
    place = slot(number)
    assert number_of_name(place.name) == number
    assert number_of_address(place.address) == number
    assert number_of_address(place.host_address) == number
    assert number_of_address(place.address6) == number
    assert number_of_address(place.host_address6) == number
    assert ipaddress.IPv6Address(place.address6) in NETWORK6
    assert slot(number) == place


@given(NUMBERS)
def test_names_fit_into_an_interface_name_and_macs_are_local_unicast(number: int) -> None:
    place = slot(number)
    assert len(place.name) <= 15
    for mac in (place.mac, place.host_mac):
        parts = [int(part, 16) for part in mac.split(":")]
        assert len(parts) == 6
        assert parts[0] & 3 == 2
    assert UID_BASE <= place.uid < 0x8000_0000


@given(st.text(max_size=12))
def test_only_our_own_names_are_read_as_slots(name: str) -> None:
    number = number_of_name(name)
    assert number is None or slot(number).name == name


@pytest.mark.parametrize("name", ["mv-01", "mv-16384", "mv--1", "mv-", "eth0", "mv-1x", "mv-٣"])
def test_names_that_only_look_like_ours(name: str) -> None:
    assert number_of_name(name) is None


def test_the_guests_ipv6_address_is_the_one_its_mac_makes() -> None:
    high = int(GUEST_NETWORK6.network_address)
    mac = bytes.fromhex(GUEST_MAC.replace(":", ""))
    low = bytes([mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE, *mac[3:]])
    assert int(ipaddress.IPv6Address(GUEST_ADDRESS6)) == high + int.from_bytes(low, "big")
    assert not NETWORK6.overlaps(GUEST_NETWORK6)


@given(st.ip_addresses(v=6).filter(lambda address: address not in NETWORK6))
def test_ipv6_addresses_outside_belong_to_no_slot(address: ipaddress.IPv6Address) -> None:
    assert number_of_address(str(address)) is None


@given(st.ip_addresses(v=4).filter(lambda address: address not in NETWORK))
def test_addresses_outside_belong_to_no_slot(address: ipaddress.IPv4Address) -> None:
    assert number_of_address(str(address)) is None


@pytest.mark.parametrize("number", [-1, SLOTS, 1 << 40])
def test_a_number_out_of_range_is_refused_by_name(number: int) -> None:
    with pytest.raises(BadRequest, match="0 to 16383"):
        slot(number)
