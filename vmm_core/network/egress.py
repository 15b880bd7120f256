"""Egress policy: what the operator wrote → what may leave a machine. Pure; refuses what would open the host.

A host listed by name gets a virtual address from 10.0.2.100 up, the same for the same list on both backends
(the guest finds it through its /etc/hosts), and what the guest sends there is forwarded to where the name
really is. Addresses and networks are listed as themselves; only network slots can serve those.
"""

import functools
import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from vmm_core.errors import BadRequest
from vmm_core.machine import EgressRule, Network
from vmm_core.network.addresses import GUEST_NETWORK, NETWORK, RESOLVER, Slot
from vmm_core.network.firewall import Element
from vmm_core.network.rules import FORBIDDEN, FORBIDDEN6

MAX_NAMES = 100
MAX_RULES = 256
MAX_MBIT = 100_000
_FIRST_HOST = 100
_NAME = re.compile(r"(?=.{1,253}$)[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,62})(\.[a-zA-Z0-9_-]{1,63})*")
_LIKE_ADDRESS = re.compile(r".*[:/].*|([0-9.]*\.)?[0-9]+")
_WIDEST = 8
_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")
_FORBIDDEN = tuple(ipaddress.IPv4Network(network) for network in FORBIDDEN)

_WIDEST6 = 16
_OPEN_TO6 = (ipaddress.IPv6Network("2000::/3"), ipaddress.IPv6Network("fc00::/7"))
# Besides what the firewall forbids: the slots' own, and the metadata service of AWS.
_CLOSED6 = tuple(
    ipaddress.IPv6Network(network) for network in (*FORBIDDEN6, "fd6d:7600::/32", "fd00:ec2::254/128")
)

Endpoint = tuple[str, int]
_Range = ipaddress.IPv4Network | ipaddress.IPv6Network


def check_rules(rules: Sequence[EgressRule]) -> None:
    """Raise BadRequest, naming the rule, unless every rule can be served in user mode."""
    _check_size(rules)
    for rule in rules:
        if _LIKE_ADDRESS.fullmatch(rule.host):
            raise BadRequest(
                f"egress {_shown(rule)}: user-mode networking reaches hosts by name, not by address"
            )
        _check_name(rule)


def check_network(network: Network, own_addresses: Collection[str] = ()) -> None:
    """Raise BadRequest, naming the rule, unless a slot can serve ``network`` without opening the host.

    ``own_addresses`` are the host's own. A ``via`` is the operator's own word: it may name the host's loopback.
    """
    if not 0 <= network.mbit <= MAX_MBIT:
        raise BadRequest(f"a bandwidth of {network.mbit} Mbit/s: give 0 (no limit) to {MAX_MBIT}")
    _check_size(network.allow)
    for rule in network.allow:
        if _LIKE_ADDRESS.fullmatch(rule.host):
            _check_range(rule, own_addresses, ipv6=network.ipv6)
        else:
            _check_name(rule)
            host, _ = destination(rule)
            if (
                rule.via is not None
                and _LIKE_ADDRESS.fullmatch(host)
                and not may_forward_to(host, own=(), told=True)
            ):
                raise BadRequest(f"egress {_shown(rule)} via {rule.via}: no machine may reach that address")


def virtual_hosts(rules: Sequence[EgressRule]) -> dict[str, str]:
    """Host name → the address the guest reaches it at; the same for the same list in the same order."""
    names = dict.fromkeys(rule.host.lower() for rule in rules if not _LIKE_ADDRESS.fullmatch(rule.host))
    return {name: f"10.0.2.{_FIRST_HOST + index}" for index, name in enumerate(names)}


def destination(rule: EgressRule) -> Endpoint:
    """Where the host connects for a rule by name. Raises BadRequest for a ``via`` that is not host:port."""
    if rule.via is None:
        return rule.host, rule.port
    host, _, port = rule.via.rpartition(":")
    named = _NAME.fullmatch(host) and (not _LIKE_ADDRESS.fullmatch(host) or _address(host))
    if not (named and port.isdecimal() and 0 < int(port) < 65536):
        raise BadRequest(f"egress {_shown(rule)} goes via {rule.via!r}, which is not host:port")
    return host, int(port)


def names(network: Network) -> set[str]:
    """What has to be resolved before the network can be opened; addresses are not among them."""
    hosts = (destination(rule)[0] for rule in network.allow if not _LIKE_ADDRESS.fullmatch(rule.host))
    return {host.lower() for host in hosts if not _address(host)}


def may_forward_to(address: str, *, own: Collection[str], told: bool) -> bool:
    """Whether a listed name may lead to ``address``. ``told``: the operator wrote so himself (``via``), and may
    mean the host's own loopback; whoever answers for a name may not."""
    parsed = _address(address)
    if parsed is None:
        return False
    if parsed in _LOOPBACK:
        return told
    return not any(parsed in network for network in _FORBIDDEN) and (told or address not in own)


def elements(
    slot: Slot,
    network: Network,
    *,
    targets: Mapping[str, str],
    resolvers: Sequence[str],
    own: Collection[str] = (),
) -> frozenset[Element]:
    """What the firewall holds for a slot that is open to ``network``.

    ``targets`` is where names are now (lower case); a name without one is not reachable for the moment.
    """
    if network.mode == "none":
        return frozenset()
    found = {Element("source", (slot.veth,), (slot.address,))}
    hosts = virtual_hosts(network.allow)
    for rule in network.allow:
        if rule.host.lower() not in hosts:
            continue
        host, port = destination(rule)
        target = host if _address(host) else targets.get(host.lower())
        if target is None or not may_forward_to(target, own=own, told=rule.via is not None):
            continue
        found |= _forward(slot, (hosts[rule.host.lower()], rule.port), (target, port))
    found |= _ranges(slot, network.allow)
    if network.ipv6:
        found.add(Element("source6", (slot.veth,), (slot.address6,)))
    if network.mode == "internet":
        found.add(Element("internet", (slot.address,)))
        if network.ipv6:
            found.add(Element("internet6", (slot.address6,)))
        if resolvers:
            found |= _forward(slot, (RESOLVER, 53), (resolvers[0], 53))
    return frozenset(found)


def on_loopback(found: Iterable[Element]) -> bool:
    """Whether any element forwards to the host's own loopback."""
    return any(
        element.set == "forwards" and ipaddress.IPv4Address(element.value[0]) in _LOOPBACK
        for element in found
    )


def _forward(slot: Slot, virtual: Endpoint, target: Endpoint) -> set[Element]:
    return {
        Element("forwards", (slot.address, virtual[0], protocol, virtual[1]), target)
        for protocol in ("tcp", "udp")
    }


def _ranges(slot: Slot, rules: Sequence[EgressRule]) -> set[Element]:
    """Addresses and networks, merged for each port: the elements of a set of intervals may not overlap."""
    by_port: dict[int, list[_Range]] = {}
    for rule in rules:
        if _LIKE_ADDRESS.fullmatch(rule.host):
            by_port.setdefault(rule.port, []).append(ipaddress.ip_network(rule.host))
    found = set[Element]()
    for port, networks in by_port.items():
        four = [network for network in networks if isinstance(network, ipaddress.IPv4Network)]
        six = [network for network in networks if isinstance(network, ipaddress.IPv6Network)]
        for network in ipaddress.collapse_addresses(four):
            found |= _range("", slot.address, str(network).removesuffix("/32"), port)
        for network in ipaddress.collapse_addresses(six):
            found |= _range("6", slot.address6, str(network).removesuffix("/128"), port)
    return found


def _range(suffix: str, source: str, network: str, port: int) -> set[Element]:
    if port == 0:
        return {Element(f"allowed_whole{suffix}", (source, network))}
    return {Element(f"allowed{suffix}", (source, network, kind, port)) for kind in ("tcp", "udp")}


def _check_size(rules: Sequence[EgressRule]) -> None:
    if len(rules) > MAX_RULES or len(virtual_hosts(rules)) > MAX_NAMES:
        raise BadRequest(f"egress: a machine reaches at most {MAX_NAMES} hosts by name and {MAX_RULES} ports")


def _check_name(rule: EgressRule) -> None:
    if not 0 < rule.port < 65536:
        raise BadRequest(f"egress {_shown(rule)}: a port is 1 to 65535")
    if not _NAME.fullmatch(rule.host):
        raise BadRequest(f"egress {_shown(rule)}: neither a host name nor an address")
    destination(rule)


def _check_range(rule: EgressRule, own_addresses: Collection[str], *, ipv6: bool) -> None:
    shown = f"egress {_shown(rule)}"
    if not 0 <= rule.port < 65536:
        raise BadRequest(f"{shown}: a port is 1 to 65535, or 0 for every port")
    if rule.via is not None:
        raise BadRequest(f"{shown}: only a host listed by name goes via another")
    try:
        network = ipaddress.ip_network(rule.host)
    except ValueError as error:
        raise BadRequest(
            f"{shown}: {error}; write an address, or a network such as 192.168.7.0/24"
        ) from error
    if isinstance(network, ipaddress.IPv6Network):
        _check_range6(shown, network, ipv6=ipv6)
    else:
        _check_range4(shown, network)
    if network.num_addresses == 1 and str(network.network_address) in own_addresses:
        raise BadRequest(f"{shown}: that is this host, which no machine may reach; give a name and a via")


def _check_range4(shown: str, network: ipaddress.IPv4Network) -> None:
    if network.prefixlen < _WIDEST:
        raise BadRequest(f"{shown}: opens nearly everything; the mode for that is internet")
    for forbidden in _FORBIDDEN:
        # A company's whole 10.0.0.0/8 may be listed: the slots (or a cloud's metadata) inside it stay closed.
        inside_may_be = forbidden == NETWORK or forbidden.prefixlen == 32
        if network.subnet_of(forbidden) or (network.supernet_of(forbidden) and not inside_may_be):
            raise BadRequest(
                f"{shown}: {forbidden} is never open (the host, its neighbours or its cloud's metadata)"
            )
    if network.subnet_of(GUEST_NETWORK):
        raise BadRequest(f"{shown}: {GUEST_NETWORK} is the machine's own network")


def _check_range6(shown: str, network: ipaddress.IPv6Network, *, ipv6: bool) -> None:
    if not ipv6:
        raise BadRequest(f"{shown}: an IPv6 address needs a network that asks for IPv6")
    if network.prefixlen < _WIDEST6:
        raise BadRequest(f"{shown}: opens nearly everything; the mode for that is internet")
    if not any(network.subnet_of(open_to) for open_to in _OPEN_TO6) or any(
        network.overlaps(closed) for closed in _CLOSED6
    ):
        raise BadRequest(
            f"{shown}: only public (2000::/3) and private (fc00::/7) IPv6 networks can be listed"
        )


@functools.lru_cache(maxsize=1024)
def _address(text: str) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        return None


def _shown(rule: EgressRule) -> str:
    return f"{rule.host[:300]}:{rule.port}"
