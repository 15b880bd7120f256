"""What the operator's list becomes, and what no list can open."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core.errors import BadRequest
from vmm_core.machine import EgressRule, Network
from vmm_core.network.addresses import NETWORK, slot
from vmm_core.network.egress import (
    check_network,
    elements,
    names,
    on_loopback,
    virtual_hosts,
)
from vmm_core.network.firewall import Element
from vmm_core.network.rules import FORBIDDEN

PLACE = slot(5)
OWN = {"192.0.2.2"}


def opened(network: Network, **targets: str) -> frozenset[Element]:
    check_network(network, OWN)
    return elements(
        PLACE,
        network,
        targets={name.replace("_", "."): address for name, address in targets.items()},
        resolvers=["192.0.2.53"],
        own=OWN,
    )


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        ("0.0.0.0/0", 0, "internet"),
        ("0.0.0.0/1", 443, "internet"),
        ("127.0.0.1", 80, "127.0.0.0/8"),
        ("127.0.0.0/9", 0, "127.0.0.0/8"),
        ("169.254.169.254", 80, "metadata"),
        ("169.0.0.0/8", 80, "169.254.0.0/16"),
        ("168.63.129.16", 80, "metadata"),
        ("10.200.3.0/24", 0, "10.200.0.0/16"),
        ("10.200.0.0/16", 0, "10.200.0.0/16"),
        ("224.0.0.251", 5353, "224.0.0.0/3"),
        ("255.255.255.255", 67, "224.0.0.0/3"),
        ("0.0.0.0", 80, "0.0.0.0/8"),
        ("10.0.2.3", 53, "own network"),
        ("192.0.2.2", 22, "this host"),
        ("300.1.1.1", 80, "300.1.1.1"),
        ("10.1.2.3/24", 80, "host bits"),
        ("10.0.0.0/33", 80, "10.0.0.0/33"),
        ("1.2.3", 80, "1.2.3"),
        ("99", 80, "99"),
        ("10.1.2.3", 65536, "port"),
        ("10.1.2.3", -1, "port"),
        ("example.test", 0, "port"),
        ("a b", 443, "neither"),
        ("", 443, "neither"),
        ("-x.test", 443, "neither"),
        ("fe80::1", 443, "IPv6"),
        ("::/0", 0, "IPv6"),
    ],
)
def test_a_rule_that_opens_the_host_or_does_not_parse_is_refused_by_name(
    host: str, port: int, said: str
) -> None:
    with pytest.raises(BadRequest, match=said) as refused:
        check_network(Network("list", (EgressRule("fine.test", 443), EgressRule(host, port))), OWN)
    assert f"{host}:{port}" in str(refused.value)


@pytest.mark.parametrize(
    "via",
    ["169.254.169.254:80", "10.200.0.1:80", "224.0.0.1:80", "0.0.0.0:80", "x", "x:0", "1.2.3:80", "a:b:80"],
)
def test_a_via_no_machine_may_reach_is_refused(via: str) -> None:
    with pytest.raises(BadRequest, match="via"):
        check_network(Network("list", (EgressRule("fine.test", 443, via),)))


def test_bounds_of_a_list() -> None:
    with pytest.raises(BadRequest, match="100 hosts"):
        check_network(Network("list", tuple(EgressRule(f"h{n}.test", 443) for n in range(101))))
    with pytest.raises(BadRequest, match="256 ports"):
        check_network(Network("list", tuple(EgressRule("h.test", n) for n in range(1, 258))))
    with pytest.raises(BadRequest, match="Mbit"):
        check_network(Network("internet", mbit=-1))


def test_nothing_is_open_without_a_network() -> None:
    assert opened(Network("none")) == frozenset()


def test_the_internet_is_public_addresses_and_the_resolver() -> None:
    assert opened(Network("internet")) == {
        Element("source", ("mv-5",), ("10.200.0.22",)),
        Element("internet", ("10.200.0.22",)),
        Element("forwards", ("10.200.0.22", "10.0.2.3", "udp", 53), ("192.0.2.53", 53)),
        Element("forwards", ("10.200.0.22", "10.0.2.3", "tcp", 53), ("192.0.2.53", 53)),
    }


def test_a_list_has_no_resolver_and_only_what_it_names() -> None:
    rules = (EgressRule("Registry.test", 443), EgressRule("10.1.0.0/16", 0), EgressRule("198.51.100.7", 53))
    assert opened(Network("list", rules), registry_test="198.51.100.1") == {
        Element("source", ("mv-5",), ("10.200.0.22",)),
        Element("forwards", ("10.200.0.22", "10.0.2.100", "tcp", 443), ("198.51.100.1", 443)),
        Element("forwards", ("10.200.0.22", "10.0.2.100", "udp", 443), ("198.51.100.1", 443)),
        Element("allowed_whole", ("10.200.0.22", "10.1.0.0/16")),
        Element("allowed", ("10.200.0.22", "198.51.100.7", "tcp", 53)),
        Element("allowed", ("10.200.0.22", "198.51.100.7", "udp", 53)),
    }


def test_a_name_without_an_address_is_not_reachable_and_breaks_nothing() -> None:
    assert opened(Network("list", (EgressRule("registry.test", 443),))) == {
        Element("source", ("mv-5",), ("10.200.0.22",))
    }


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "10.200.0.6", "192.0.2.2", "224.0.0.1", "0.0.0.0"]
)
def test_whoever_answers_for_a_name_cannot_lead_it_to_the_host(address: str) -> None:
    found = opened(Network("list", (EgressRule("rebound.test", 80),)), rebound_test=address)
    assert {element.set for element in found} == {"source"}


def test_the_operators_own_word_may_lead_to_the_hosts_loopback() -> None:
    network = Network("list", (EgressRule("github.test", 443, "127.0.0.1:8443"),))
    found = opened(network)
    assert Element("forwards", ("10.200.0.22", "10.0.2.100", "tcp", 443), ("127.0.0.1", 8443)) in found
    assert on_loopback(found)
    assert not on_loopback(opened(Network("internet")))
    assert names(network) == set()


def test_names_to_look_up_are_those_the_host_connects_to() -> None:
    rules = (
        EgressRule("A.test", 443),
        EgressRule("b.test", 443, "C.test:8443"),
        EgressRule("10.1.0.0/16", 443),
    )
    assert names(Network("list", rules)) == {"a.test", "c.test"}


def test_virtual_addresses_follow_the_order_of_names_and_skip_addresses() -> None:
    rules = [
        EgressRule("10.1.0.0/16", 443),
        EgressRule("b.test", 80),
        EgressRule("a.test", 80),
        EgressRule("B.test", 443),
    ]
    assert virtual_hosts(rules) == {"b.test": "10.0.2.100", "a.test": "10.0.2.101"}


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("::/0", "internet"),
        ("2000::/3", "internet"),
        ("fe80::1", "can be listed"),
        ("::1", "can be listed"),
        ("ff02::1", "can be listed"),
        ("64:ff9b::7f00:1", "can be listed"),
        ("2002:7f00:1::1", "can be listed"),
        ("fd00:ec2::254", "can be listed"),
        ("fd6d:7600:1:5::2", "can be listed"),
        ("::ffff:127.0.0.1", "can be listed"),
        ("2001:db8::1", "this host"),
        ("2001:db8::g", "2001:db8::g"),
    ],
)
def test_ipv6_that_opens_the_host_is_refused(host: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        check_network(Network("list", (EgressRule(host, 443),), ipv6=True), {"2001:db8::1"})


def test_ipv6_is_open_to_who_asked_only() -> None:
    assert not any(element.set.endswith("6") for element in opened(Network("internet")))
    rules = (
        EgressRule("fd99::/64", 0),
        EgressRule("2001:db8:7::/48", 443),
        EgressRule("2001:db8:7:1::1", 443),
    )
    found = opened(Network("internet", rules, ipv6=True))
    assert {element for element in found if element.set.endswith("6")} == {
        Element("source6", ("mv-5",), (PLACE.address6,)),
        Element("internet6", (PLACE.address6,)),
        Element("allowed_whole6", (PLACE.address6, "fd99::/64")),
        Element("allowed6", (PLACE.address6, "2001:db8:7::/48", "tcp", 443)),
        Element("allowed6", (PLACE.address6, "2001:db8:7::/48", "udp", 443)),
    }


NETWORKS = st.builds(
    lambda address, length: str(ipaddress.IPv4Network((int(address), length), strict=False)),
    st.ip_addresses(v=4),
    st.integers(min_value=0, max_value=32),
)


@given(st.lists(st.tuples(NETWORKS, st.sampled_from([0, 80, 443])), max_size=12))
def test_accepted_lists_never_reach_what_is_forbidden_and_never_overlap(rules: list[tuple[str, int]]) -> None:
    network = Network("list", tuple(EgressRule(host, port) for host, port in rules))
    try:
        check_network(network, OWN)
    except BadRequest:
        return
    found = opened(network)
    ranges = [element for element in found if element.set.startswith("allowed")]
    for element in ranges:
        reached = ipaddress.IPv4Network(str(element.key[1]))
        for written in FORBIDDEN:
            # Wider ones keep these closed by the firewall's own rule, which comes first.
            forbidden = ipaddress.IPv4Network(written)
            wider = reached.supernet_of(forbidden) and reached != forbidden
            assert not reached.overlaps(forbidden) or (
                wider and (forbidden == NETWORK or forbidden.prefixlen == 32)
            )
    for element in ranges:
        same = [other for other in ranges if other.set == element.set and other.key[2:] == element.key[2:]]
        reach = [ipaddress.IPv4Network(str(other.key[1])) for other in same]
        mine = ipaddress.IPv4Network(str(element.key[1]))
        assert sum(mine.overlaps(other) for other in reach) == 1
    # Everything that was listed is reached.
    for host, port in rules:
        listed = ipaddress.IPv4Network(host)
        assert any(
            listed.subnet_of(ipaddress.IPv4Network(str(element.key[1])))
            for element in ranges
            if (element.set == "allowed_whole") == (port == 0) and (port == 0 or element.key[3] == port)
        )
