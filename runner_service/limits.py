"""The section ``[limits]`` of the settings: who may have how many VMs at once, and whose turn it is."""

import math
import re
from collections.abc import Mapping

import msgspec


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Numbers of VMs; 0 means no limit.

    ``per_owner``, ``per_repository`` and ``per_label`` hold for each one by itself; the tables ``owners``,
    ``repositories`` and ``labels`` say otherwise for those a pattern names (``"octo-org/*" = 4``: each of them has 4).
    ``weights`` of repositories (1 unless given) say how large their shares are while jobs wait for room; jobs whose
    labels have a higher one of ``priorities`` (0 unless given) come first. Of several patterns the name itself counts,
    then the longest. ``most_queued`` jobs wait for runners; further ones stand outside until there is room.
    ``memory_overcommit`` times the host's memory, and ``cpu_overcommit`` times its CPUs (0: not counted), is promised.
    """

    per_owner: int = 0
    per_repository: int = 0
    per_label: int = 0
    owners: dict[str, int] = {}
    repositories: dict[str, int] = {}
    labels: dict[str, int] = {}
    weights: dict[str, float] = {}
    priorities: dict[str, int] = {}
    most_queued: int = 10_000
    memory_overcommit: float = 1.0
    cpu_overcommit: float = 8.0


_NAME = r"[^\s/|,]+"
# Table → what one of its patterns looks like, in a regular expression and in words; the least of its numbers.
_TABLES: Mapping[str, tuple[str, str, float]] = {
    "owners": (_NAME, "an owner or a pattern such as octo-*", 0),
    "repositories": (f"{_NAME}/{_NAME}", "owner/repository or owner/*", 0),
    "labels": (r"[^\s|,]+", "a label or a pattern such as microvm-*", 0),
    "weights": (f"{_NAME}/{_NAME}", "owner/repository or owner/*", 0.01),
    "priorities": (r"[^\s|,]+", "a label or a pattern such as microvm-*", -math.inf),
}


def complaint(limits: Limits) -> str | None:
    """What is wrong with the tables, as the rest of a sentence that begins with ``[limits``; None: nothing."""
    for table, (shape, words, least) in _TABLES.items():
        numbers: Mapping[str, float] = getattr(limits, table)
        for pattern, number in numbers.items():
            if not re.fullmatch(shape, pattern):
                return f".{table}]: '{pattern}' is not {words}"
            if not (math.isfinite(number) and number >= least):
                return f'.{table}] "{pattern}": must be a number of at least {least:g}, not {number}'
    return None
