"""What a runner's VM may reach: what its template is open to, what the settings add, and the forge itself. Pure."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from vmm_core.errors import BadRequest
from vmm_core.machine import EgressRule
from vmm_core.network.egress import check_rules

_PORTS = {"https": 443, "http": 80}


def forge_rule(api_url: str) -> EgressRule | None:
    """The endpoint of a forge's API; None when its host is no name that user-mode networking can serve."""
    parts = urlsplit(api_url)
    rule = EgressRule(parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0))
    # The guest's localhost is the guest: taking that name over would open this host's own loopback to it.
    if rule.host == "localhost" or rule.host.endswith(".localhost"):
        return None
    try:
        check_rules([rule])
    except BadRequest:
        return None
    return rule


def merged(*lists: Iterable[EgressRule]) -> tuple[EgressRule, ...]:
    """All rules, each endpoint once; of two rules for one endpoint the later list's holds."""
    found: dict[tuple[str, int], EgressRule] = {}
    for rules in lists:
        found.update(((rule.host.lower(), rule.port), rule) for rule in rules)
    return tuple(found.values())
