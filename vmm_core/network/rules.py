"""The host's one nftables table, as text: a fixed number of rules, and sets and maps that say what each slot may do.

    guest → namespace → mv-N ┐
      prerouting raw           a source that is not 10.0.2.15 ends here; the rest becomes its slot's address,
                               before connections are tracked, by a map of interface names
      prerouting nat           virtual addresses (listed names, the resolver) → where they really are
      forward / input          by the slot's address: what is allowed, how many connections, how fast;
                               nothing else reaches a network, the host, or another slot
      postrouting nat          leaves with the host's address
    mv-N ← … answers
      postrouting, last        the slot's address becomes 10.0.2.15 again

Written in nft's own language, because the JSON of nft 1.0 does not know sets that rules add to.
"""

import os
from collections.abc import Iterable
from typing import Final

from vmm_core.network.addresses import (
    GUEST_ADDRESS,
    GUEST_ADDRESS6,
    GUEST_NETWORK,
    NETWORK,
    NETWORK6,
)

TABLE: Final = "microvm"
FORBIDDEN: Final = (
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/3",
    str(NETWORK),
    # Metadata services of clouds outside the link-local range: Azure, Alibaba, Oracle.
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
)
"""Destinations no list opens. Forwarded names have been checked before they became elements."""
PRIVATE: Final = (
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
)
"""Destinations that are no public internet; reached only when listed."""
FORBIDDEN6: Final = ("2001::/32", "2002::/16")
"""Tunnels through which an IPv6 address means an IPv4 one. Only 2000::/3 is public at all."""
NEW_PER_SECOND: Final = 250
"""New connections of one slot. Also bounds what it can make the host look for on a network it is joined to:
an address that does not answer stays in the host's neighbour table (1,024 entries) for three seconds."""
RESETS_PER_SECOND: Final = 20


def ruleset(
    connections: int, routed: Iterable[str] = (), routed6: Iterable[str] = (), *, mtu: int = 1500
) -> str:
    """The whole table. Loading it again replaces the rules and keeps the slots' elements.

    ``connections`` is how many tracked connections one slot may have, ``routed`` (and ``routed6``) the
    interfaces that forward only because of the slots, and hence only to slots. ``mtu`` is the least of the host's ways
    out: a guest, whose own is 1500, is told by the answers to its connections to send no larger segments.
    """
    slots, guests, guest = NETWORK, GUEST_NETWORK, GUEST_ADDRESS
    slots6, guest6, new, resets = NETWORK6, GUEST_ADDRESS6, NEW_PER_SECOND, RESETS_PER_SECOND
    devices = _add_devices("routed", routed) + _add_devices("routed6", routed6)
    return f"""
add table inet {TABLE}
flush table inet {TABLE}
table inet {TABLE} {{
  map source {{ type ifname : ipv4_addr; }}
  map source6 {{ type ifname : ipv6_addr; }}
  map forwards {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
  set allowed {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; }}
  set allowed6 {{ type ipv6_addr . ipv6_addr . inet_proto . inet_service; flags interval; }}
  set allowed_whole {{ type ipv4_addr . ipv4_addr; flags interval; }}
  set allowed_whole6 {{ type ipv6_addr . ipv6_addr; flags interval; }}
  set internet {{ type ipv4_addr; }}
  set internet6 {{ type ipv6_addr; }}
  set routed {{ type ifname; }}
  set routed6 {{ type ifname; }}
  set forbidden {{ type ipv4_addr; flags interval; elements = {{ {", ".join(FORBIDDEN)} }} }}
  set forbidden6 {{ type ipv6_addr; flags interval; elements = {{ {", ".join(FORBIDDEN6)} }} }}
  set private {{ type ipv4_addr; flags interval; elements = {{ {", ".join(PRIVATE)} }} }}
{_meters("", "ipv4_addr")}{_meters("6", "ipv6_addr")}
  chain truth {{
    meta nfproto ipv6 goto truth6
    ip saddr != {guest} counter drop comment "spoofed"
    ip daddr 127.0.0.0/8 counter drop comment "loopback"
    ip saddr set iifname map @source accept
    counter drop comment "not open"
  }}
  chain truth6 {{
    ip6 saddr != {guest6} counter drop comment "spoofed"
    ip6 daddr ::1 counter drop comment "loopback"
    ip6 saddr set iifname map @source6 accept
    counter drop comment "not open"
  }}
  chain arriving {{
    type filter hook prerouting priority raw; policy accept;
    iifname "mv-*" goto truth
  }}
  chain forwarding {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "mv-*" dnat ip to ip saddr . ip daddr . meta l4proto . th dport map @forwards
  }}
  chain admit {{
    update @openings {{ ip saddr limit rate over {new}/second burst {2 * new} packets }} counter drop
    update @openings6 {{ ip6 saddr limit rate over {new}/second burst {2 * new} packets }} counter drop
    add @connections {{ ip saddr ct count over {connections} }} counter drop
    add @connections6 {{ ip6 saddr ct count over {connections} }} counter drop
    accept
  }}
  chain refuse {{
    meta l4proto != tcp counter drop
    update @resets {{ ip saddr limit rate {resets}/second burst {2 * resets} packets }} reject with tcp reset
    update @resets6 {{ ip6 saddr limit rate {resets}/second burst {2 * resets} packets }} reject with tcp reset
    counter drop
  }}
  chain from_slot {{
    oifname "mv-*" goto refuse
    tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
    ct state established,related accept
    ct state != new counter drop
    meta nfproto ipv6 goto from_slot6
    ct status dnat ct original ip daddr {guests} goto admit
    ip daddr @forbidden goto refuse
    ip saddr . ip daddr . meta l4proto . th dport @allowed goto admit
    ip saddr . ip daddr @allowed_whole meta l4proto {{ tcp, udp, icmp }} goto admit
    ip daddr @private goto refuse
    ip saddr @internet meta l4proto {{ tcp, udp, icmp }} goto admit
    goto refuse
  }}
  chain from_slot6 {{
    ip6 daddr @forbidden6 goto refuse
    ip6 saddr . ip6 daddr . meta l4proto . th dport @allowed6 goto admit
    ip6 saddr . ip6 daddr @allowed_whole6 meta l4proto {{ tcp, udp, icmpv6 }} goto admit
    ip6 daddr 2000::/3 ip6 saddr @internet6 meta l4proto {{ tcp, udp, icmpv6 }} goto admit
    goto refuse
  }}
  chain through {{
    type filter hook forward priority filter; policy accept;
    iifname "mv-*" goto from_slot
    oifname "mv-*" meta nfproto ipv4 tcp flags & (syn | rst) == syn tcp option maxseg size set {mtu - 40}
    oifname "mv-*" meta nfproto ipv6 tcp flags & (syn | rst) == syn tcp option maxseg size set {mtu - 60}
    oifname "mv-*" ct state established,related accept
    oifname "mv-*" counter drop
    meta nfproto ipv4 iifname @routed counter drop
    meta nfproto ipv6 iifname @routed6 counter drop
  }}
  chain to_host {{
    ct status dnat ct original ip daddr {guests} ct state established accept
    ct status dnat ct original ip daddr {guests} ct state new goto admit
    goto refuse
  }}
  chain inward {{
    type filter hook input priority filter; policy accept;
    iifname "mv-*" goto to_host
  }}
  chain masked {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {slots} oifname != "mv-*" masquerade
    ip6 saddr {slots6} oifname != "mv-*" masquerade
  }}
  chain leaving {{
    type filter hook postrouting priority 500; policy accept;
    oifname "mv-*" ip daddr {slots} ip daddr set {guest}
    oifname "mv-*" ip6 daddr {slots6} ip6 daddr set {guest6}
  }}
}}
flush set inet {TABLE} routed
flush set inet {TABLE} routed6
{devices}"""  # noqa: S608


def _add_devices(name: str, devices: Iterable[str]) -> str:
    return "".join(f'add element inet {TABLE} {name} {{ "{device}" }}\n' for device in sorted(devices))


def _meters(suffix: str, kind: str) -> str:
    common = f"type {kind}; size 65536; flags dynamic"
    return f"""
  set connections{suffix} {{ {common}; }}
  set openings{suffix} {{ {common},timeout; timeout 10s; }}
  set resets{suffix} {{ {common},timeout; timeout 10s; }}
"""


def usual_connections() -> int:
    """Tracked connections a slot may have: a 32nd of what the host can track, 256 to 2048."""
    try:
        fd = os.open("/proc/sys/net/netfilter/nf_conntrack_max", os.O_RDONLY)
    except OSError:
        return 1024
    try:
        return min(max(int(os.read(fd, 32)) // 32, 256), 2048)
    finally:
        os.close(fd)
