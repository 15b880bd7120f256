"""QEMU's user-mode network, closed but for a list: each allowed endpoint is one relayed TCP port.

The guest's network is 10.0.2.0/24 with ``restrict=on``: no packet leaves it. Every allowed host gets a
virtual address from 10.0.2.100 up, which the guest finds through its /etc/hosts; a connection to an
allowed port there starts ``relay.py`` on the host side, which knows one destination and nothing else.
Source: QEMU manual, ``-netdev user`` (restrict, guestfwd).
"""

import ipaddress
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vmm_core.errors import BadRequest
from vmm_core.machine import EgressRule, Network

GUEST_ADDRESS = "10.0.2.15"
GUEST_MAC = "52:54:00:12:34:56"
_FIRST_HOST = 100
_MAX_HOSTS = 100
_MAX_RULES = 256
_NAME = re.compile(r"(?=.{1,253}$)[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,62})(\.[a-zA-Z0-9_-]{1,63})*")
_RELAY = Path(__file__).with_name("relay.py")


def check(network: Network) -> None:
    """Raise BadRequest unless user mode can give a VM this network."""
    if network.mode == "internet" or network.ipv6:
        what = "IPv6" if network.ipv6 else "the whole internet"
        raise BadRequest(
            f"user-mode networking cannot open {what}: it needs network slots (microvm doctor says why not)"
        )
    check_rules(network.allow)


def check_rules(rules: Sequence[EgressRule]) -> None:
    """Raise BadRequest, naming the rule, unless every rule can be served in user mode."""
    if len(rules) > _MAX_RULES or len({rule.host for rule in rules}) > _MAX_HOSTS:
        raise BadRequest(f"user-mode networking serves at most {_MAX_HOSTS} hosts and {_MAX_RULES} ports")
    for rule in rules:
        if not 0 < rule.port < 65536:
            raise BadRequest(f"egress {rule.host}:{rule.port}: a port is 1 to 65535")
        if not _NAME.fullmatch(rule.host) or _is_address(rule.host):
            raise BadRequest(
                f"egress {rule.host}:{rule.port}: user-mode networking reaches hosts by name, not by address"
            )
        if rule.via is not None:
            _destination(rule)


def virtual_hosts(rules: Sequence[EgressRule]) -> dict[str, str]:
    """Host name → the address the guest reaches it at; the same for the same list in the same order."""
    names = dict.fromkeys(rule.host.lower() for rule in rules)
    return {name: f"10.0.2.{_FIRST_HOST + index}" for index, name in enumerate(names)}


def netdev_argument(rules: Sequence[EgressRule], limit_dir: Path) -> str:
    """The value of QEMU's ``-netdev`` for a network open to ``rules`` only.

    ``limit_dir`` is where the relays of this VM count themselves (relay.py).
    """
    hosts = virtual_hosts(rules)
    parts = ["user", "id=net", "restrict=on", "ipv6=off", "net=10.0.2.0/24", "host=10.0.2.2", "dns=10.0.2.3"]
    for rule in rules:
        host, port = _destination(rule)
        command = shlex.join([sys.executable, "-I", "-S", str(_RELAY), host, str(port), str(limit_dir)])
        parts.append(f"guestfwd=tcp:{hosts[rule.host.lower()]}:{rule.port}-cmd:{command}".replace(",", ",,"))
    return ",".join(parts)


def _destination(rule: EgressRule) -> tuple[str, int]:
    if rule.via is None:
        return rule.host, rule.port
    host, _, port = rule.via.rpartition(":")
    if not (_NAME.fullmatch(host) and port.isdecimal() and 0 < int(port) < 65536):
        raise BadRequest(f"egress {rule.host}:{rule.port} goes via {rule.via!r}, which is not host:port")
    return host, int(port)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
