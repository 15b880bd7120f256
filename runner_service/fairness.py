"""Who gets the next runners, and why the others wait: limits, priorities, fair shares. Pure.

    lines ─► by priority, then debt ─► its limits ─► a host with room ─► a runner, which its repository pays for
                                          └───────────────┴─► the reason why not

Weighted fair queueing: a repository pays for each runner when it is made and for as long as it is there, divided by its
weight; who owes least comes next. A debt only says how much more a repository had than the least served of those that
wait for room: nobody saves up by asking for nothing, and when nobody waits there are no debts.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

import msgspec

from runner_service import placement
from runner_service.domain import Host
from runner_service.labels import COMPANIONS
from runner_service.limits import Limits

V = TypeVar("V", int, float)
Kind = Literal["owner", "repository", "label"]
Used = Counter[tuple[Kind, str]]
Key = tuple[str, str]

# What a runner costs its repository the moment it is made, in seconds of one VM: a turn counts however short the job.
_TURN = 60.0
# A pass that comes much later than the one before it says little about the time between.
_LONGEST_PAUSE = 60.0
# A job too large for what is free lets smaller ones pass for so many seconds; then a host is kept for it.
_PATIENCE = 300.0
_WAITS_FOR_ROOM = frozenset({"max_vms", "memory", "cpu"})


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """The queued jobs of one repository that one kind of runner (``group``) serves.

    ``missing``: how many of them have no runner; ``oldest`` is when the first of them was queued, in Unix seconds.
    ``need_mib`` and ``vcpus`` are what one such runner takes of a host.
    """

    group: str
    repository: str
    labels: tuple[str, ...]
    missing: int
    oldest: float
    need_mib: int
    vcpus: int = 1

    @property
    def key(self) -> Key:
        return self.group, self.repository


class NotNow(msgspec.Struct, frozen=True):
    """Why a line gets no (further) runner now; ``code`` is a stable word, ``reason`` one sentence with the numbers."""

    code: str
    reason: str


class Quota(msgspec.Struct, frozen=True):
    """At most ``most`` VMs of the owner, repository or label ``name``, as ``setting`` says."""

    kind: Kind
    name: str
    most: int
    setting: str


class Shares(msgspec.Struct, frozen=True):
    """What repositories owe, in seconds of one VM, as of the moment ``at``, when each had ``running`` VMs.

    Those that are not named owe nothing.
    """

    at: float = 0.0
    debts: dict[str, float] = {}
    running: dict[str, int] = {}


class Plan(msgspec.Struct):
    """``places``: for each line the hosts of its new runners, by name; ``held``: why a line gets no more of them."""

    places: dict[Key, list[str]]
    held: dict[Key, NotNow]
    shares: Shares


def names(repository: str, labels: Iterable[str]) -> list[tuple[Kind, str]]:
    """What a VM of ``repository`` (owner/repo) with ``labels`` counts for; labels that every runner has do not."""
    repository = repository.lower()
    found: list[tuple[Kind, str]] = [("owner", repository.partition("/")[0]), ("repository", repository)]
    asked = dict.fromkeys(label.lower() for label in labels)
    return [*found, *(("label", label) for label in asked if label not in COMPANIONS)]


def quotas(repository: str, labels: Iterable[str], limits: Limits) -> list[Quota]:
    """The limits that hold for a VM of ``repository`` with ``labels``."""
    tables: dict[Kind, tuple[str, int, Mapping[str, int]]] = {
        "owner": ("owners", limits.per_owner, limits.owners),
        "repository": ("repositories", limits.per_repository, limits.repositories),
        "label": ("labels", limits.per_label, limits.labels),
    }
    found: list[Quota] = []
    for kind, name in names(repository, labels):
        section, most, patterns = tables[kind]
        setting = f"[limits] per_{kind}"
        pattern = _match(name, patterns)
        if pattern is not None:
            most, setting = patterns[pattern], f'[limits.{section}] "{pattern}"'
        if most:
            found.append(Quota(kind, name, most, setting))
    return found


def weight(repository: str, limits: Limits) -> float:
    pattern = _match(repository.lower(), limits.weights)
    return 1.0 if pattern is None else limits.weights[pattern]


def priority(labels: Iterable[str], limits: Limits) -> int:
    """The highest priority among the labels that have one; 0 when none has."""
    patterns = (_match(label.lower(), limits.priorities) for label in labels)
    return max((limits.priorities[pattern] for pattern in patterns if pattern is not None), default=0)


def share(
    lines: Sequence[Line],
    *,
    used: Mapping[tuple[Kind, str], int],
    hosts: Iterable[Host],
    limits: Limits,
    shares: Shares,
    now: float,
) -> Plan:
    """Give runners to ``lines`` until no line can have another one.

    ``used`` counts the VMs there are, by ``names``; ``hosts`` come with what is promised on them.
    """
    turn = _Turn(used, hosts, limits, _charged(shares, limits, now), now)
    waiting = {line.key: line for line in lines if line.missing > 0}
    left = {key: line.missing for key, line in waiting.items()}
    plan = Plan({}, {}, shares)
    # Ranks only grow while runners are given out: one that is out of date is put back where it belongs.
    heap = [(turn.rank(line), line.key) for line in waiting.values()]
    heapq.heapify(heap)
    while heap:
        rank, key = heapq.heappop(heap)
        line = waiting[key]
        if (today := turn.rank(line)) != rank:
            heapq.heappush(heap, (today, key))
            continue
        answer = turn.give(line)
        if isinstance(answer, NotNow):
            plan.held[key] = answer
            continue
        plan.places.setdefault(key, []).append(answer)
        left[key] -= 1
        if left[key]:
            heapq.heappush(heap, (turn.rank(line), key))
    waiters = {
        waiting[key].repository.lower() for key, held in plan.held.items() if held.code in _WAITS_FOR_ROOM
    }
    plan.shares = Shares(now, _settled(turn.debts, waiters), turn.running())
    return plan


class _Turn:
    """What is there while runners are given out."""

    def __init__(
        self,
        used: Mapping[tuple[Kind, str], int],
        hosts: Iterable[Host],
        limits: Limits,
        debts: dict[str, float],
        now: float,
    ) -> None:
        self.debts = debts
        self._used: Used = Counter(dict(used))
        self._rooms = {host.name: host for host in hosts}
        self._limits = limits
        self._now = now
        self._weights: dict[str, float] = {}
        self._quotas: dict[Key, list[Quota]] = {}
        self._priorities: dict[Key, int] = {}
        # Room only shrinks: what once did not fit will not.
        self._no_room: dict[tuple[int, int], placement.NoRoom] = {}
        self._kept: str | None = None

    def running(self) -> dict[str, int]:
        """How many VMs each repository has by now."""
        return {name: count for (kind, name), count in self._used.items() if kind == "repository" and count}

    def rank(self, line: Line) -> tuple[int, float, float, float]:
        """Lower comes first: priority, debt, VMs there are, age."""
        name = line.repository.lower()
        if line.key not in self._priorities:
            self._priorities[line.key] = priority(line.labels, self._limits)
        in_use = self._used["repository", name] / self._weight(name)
        return -self._priorities[line.key], self.debts.get(name, 0.0), in_use, line.oldest

    def give(self, line: Line) -> str | NotNow:
        """The host of one more runner, or why there is none."""
        if line.key not in self._quotas:
            self._quotas[line.key] = quotas(line.repository, line.labels, self._limits)
        for quota in self._quotas[line.key]:
            there = self._used[quota.kind, quota.name]
            if there >= quota.most:
                return _over(quota, there)
        host = self._place(line)
        if isinstance(host, NotNow):
            return host
        self._rooms[host.name] = placement.after(host, line.need_mib, line.vcpus)
        self._used.update(names(line.repository, line.labels))
        name = line.repository.lower()
        self.debts[name] = self.debts.get(name, 0.0) + _TURN / self._weight(name)
        return host.name

    def _place(self, line: Line) -> Host | NotNow:
        size = line.need_mib, line.vcpus
        answer = self._no_room.get(size) or placement.place(*size, list(self._rooms.values()))
        if isinstance(answer, Host):
            return answer
        self._no_room[size] = answer
        reason = answer.reason
        if answer.code in ("memory", "cpu") and self._kept is None and self._now - line.oldest >= _PATIENCE:
            self._kept = placement.largest(line.need_mib, list(self._rooms.values()))
            # Full for everybody else, rather than away: they are told so.
            room = self._rooms[self._kept]
            self._rooms[self._kept] = msgspec.structs.replace(room, max_vms=room.vms)
            reason = f"{reason}; what becomes free on {self._kept} is kept for it"
        return NotNow(answer.code, reason)

    def _weight(self, name: str) -> float:
        if name not in self._weights:
            self._weights[name] = weight(name, self._limits)
        return self._weights[name]


def overflow(queued: Mapping[str, int], most: int) -> dict[str, int]:
    """How many jobs of which repository do not fit into a queue of ``most``: those of the longest go first."""
    excess = sum(queued.values()) - most
    if excess <= 0:
        return {}
    # The level to which the longest are cut: everybody keeps what is below it.
    kept, rest = most, sorted(queued.items(), key=lambda one: (one[1], one[0]))
    cut: dict[str, int] = {}
    while rest:
        name, count = rest.pop(0)
        mine = min(count, kept // (len(rest) + 1))
        kept -= mine
        if count > mine:
            cut[name] = count - mine
    return cut


def _charged(shares: Shares, limits: Limits, now: float) -> dict[str, float]:
    """The debts, with the time since then of the VMs there were: one that ended meanwhile is no cheaper for that."""
    seconds = min(max(0.0, now - shares.at), _LONGEST_PAUSE) if shares.at else 0.0
    debts = dict(shares.debts)
    for name, count in shares.running.items():
        debts[name] = debts.get(name, 0.0) + count * seconds / weight(name, limits)
    return debts


def _settled(debts: Mapping[str, float], waiters: Collection[str]) -> dict[str, float]:
    """The debts beyond that of the least served waiter: bounded by who really had more than others."""
    if not waiters:
        return {}
    least = min(debts.get(name, 0.0) for name in waiters)
    return {name: debt - least for name, debt in debts.items() if debt > least}


def _over(quota: Quota, used: int) -> NotNow:
    whose = f"with the label {quota.name}" if quota.kind == "label" else f"of {quota.name}"
    reason = f"limit: {used} of {quota.most} VMs {whose} are in use ({quota.setting})"
    return NotNow(f"limit_{quota.kind}", reason)


def _match(name: str, patterns: Mapping[str, V]) -> str | None:
    """Which of ``patterns`` means ``name`` (lower case): the name itself, else the longest that matches."""
    found = [p for p in patterns if p.lower() == name or fnmatchcase(name, p.lower())]
    return max(found, key=lambda p: (p.lower() == name, len(p), p), default=None)
