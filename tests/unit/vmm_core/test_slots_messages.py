"""A slot's netlink messages, made from one sample, are those that pyroute2 would encode for that slot."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.network import netlink
from vmm_core.network.addresses import GUEST_ADDRESS, PREFIX_LENGTH, SLOTS, Slot, slot
from vmm_core.network.netlink import Template


def messages(place: Slot, index: int) -> list[bytes]:
    return [
        netlink.address(netlink.UP_INDEX, place.address, PREFIX_LENGTH),
        netlink.neighbour(netlink.UP_INDEX, place.host_address, place.host_mac),
        netlink.route(netlink.UP_INDEX, None, place.host_address),
        netlink.up(index),
        netlink.neighbour(index, GUEST_ADDRESS, place.mac),
    ]


TEMPLATE = Template(messages)
VETH = Template(lambda place, _: [netlink.veth(place, 5)])


@given(st.integers(0, SLOTS - 1), st.integers(1, 1 << 30))
def test_a_template_is_what_the_library_would_encode(number: int, index: int) -> None:
    assert TEMPLATE.of(slot(number), index) == b"".join(messages(slot(number), index))


@given(st.integers(0, SLOTS - 1))
def test_the_name_of_the_veth_is_followed_by_zeros_only(number: int) -> None:
    place = slot(number)
    data = VETH.of(place)
    name = data[data.index(b"mv-") :][:16]
    assert name == place.veth.encode().ljust(16, b"\0")
    assert bytes.fromhex(place.mac.replace(":", "")) in data
    assert bytes.fromhex(place.host_mac.replace(":", "")) in data


def test_an_error_of_the_kernel_is_raised_with_its_number() -> None:
    with netlink.Netlink(netlink.ROUTE) as routes, pytest.raises(OSError, match="No such device"):
        routes.send(netlink.up(2_000_000_000), netlink.up(2_000_000_001))
    assert socket.if_nameindex()
