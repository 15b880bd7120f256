"""QEMU's user-mode network, closed but for a list: each allowed endpoint is one relayed TCP port.

The guest's network is 10.0.2.0/24 with ``restrict=on``: no packet leaves it. Every allowed host gets a
virtual address from 10.0.2.100 up, which the guest finds through its /etc/hosts; a connection to an
allowed port there starts ``relay.py`` on the host side, which knows one destination and nothing else.
Source: QEMU manual, ``-netdev user`` (restrict, guestfwd).
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vmm_core.errors import BadRequest
from vmm_core.machine import EgressRule, Network
from vmm_core.network.addresses import GATEWAY, GUEST_ADDRESS, GUEST_MAC, GUEST_NETWORK, RESOLVER
from vmm_core.network.egress import check_rules, destination, virtual_hosts

__all__ = ["GUEST_ADDRESS", "GUEST_MAC", "check", "check_rules", "netdev_argument", "virtual_hosts"]

_RELAY = Path(__file__).with_name("relay.py")


def check(network: Network) -> None:
    """Raise BadRequest unless user mode can give a VM this network."""
    if network.mode == "internet" or network.ipv6:
        what = "IPv6" if network.ipv6 else "the whole internet"
        raise BadRequest(
            f"user-mode networking cannot open {what}: it needs network slots (microvm doctor says why not)"
        )
    check_rules(network.allow)


def netdev_argument(rules: Sequence[EgressRule], limit_dir: Path) -> str:
    """The value of QEMU's ``-netdev`` for a network open to ``rules`` only.

    ``limit_dir`` is where the relays of this VM count themselves (relay.py).
    """
    hosts = virtual_hosts(rules)
    network = [f"net={GUEST_NETWORK}", f"host={GATEWAY}", f"dns={RESOLVER}"]
    parts = ["user", "id=net", "restrict=on", "ipv6=off", *network]
    for rule in rules:
        host, port = destination(rule)
        command = shlex.join([sys.executable, "-I", "-S", str(_RELAY), host, str(port), str(limit_dir)])
        parts.append(f"guestfwd=tcp:{hosts[rule.host.lower()]}:{rule.port}-cmd:{command}".replace(",", ",,"))
    return ",".join(parts)
