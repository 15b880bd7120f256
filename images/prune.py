"""Which templates go: versions of a name beyond so many, then the least recently used until a byte budget is met.

    measure ──► plan (pure) ──► each one: still so? ── yes ──► removed, its names with it

What is kept for a reason stays, and what another snapshot that stays stands on stays with it. Planned without the
lock, which takes a while; whatever was used, pinned or named since then is left alone.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from images import footprint
from images.catalog import Catalog, last_used, made_as
from images.history import versions, withdrawn
from vmm_core.errors import BadRequest, SnapshotInUse, SnapshotInvalid, UnknownTemplate
from vmm_core.machine import Snapshot
from vmm_core.record import read_records

VERSIONS_KEPT = 3
# What was used so short a time ago may be about to be promoted, or forked.
GRACE_S = 120.0


class Candidate(msgspec.Struct, frozen=True):
    """A snapshot as pruning sees it.

    ``rank`` counts the versions of its name that come before it. ``last_used`` in Unix seconds; ``base`` is what it
    stands on. ``kept`` says in a few words why it must stay; empty when it may go. ``counted``: its bytes are under
    the budget.
    """

    digest: str
    name: str
    rank: int
    last_used: float
    base: str | None = None
    kept: str = ""
    counted: bool = True


class Removal(msgspec.Struct, frozen=True):
    """``bytes`` is what it gives back, the removals before it done. Names that mean it go with it."""

    digest: str
    name: str
    last_used: float
    bytes: int
    why: str


class Stays(msgspec.Struct, frozen=True):
    """A template that may not go, and why."""

    digest: str
    name: str
    why: str


class Pruned(msgspec.Struct, frozen=True):
    """What went (or would go), what may not go, and the bytes of the pool that templates hold before and after."""

    removed: tuple[Removal, ...]
    stays: tuple[Stays, ...]
    bytes_before: int
    bytes_after: int


def prune(
    catalog: Catalog, *, budget_bytes: int | None = None, keep: int = VERSIONS_KEPT, dry_run: bool = False
) -> Pruned:
    """Remove versions of each name beyond ``keep``, then the least recently used until ``budget_bytes`` are met.

    Only what was baked goes; nothing that VMs or other snapshots stand on, that is pinned, that the name of a
    template (not of a repository's parent) means now, or that was used in the last two minutes. Blocking.
    """
    if keep < 1:
        raise BadRequest(f"at least one version of each name is kept, not {keep}")
    snapshots = catalog.store.list()
    sizes = footprint.measure({each.digest: footprint.files_of(each.path) for each in snapshots})
    candidates = _candidates(catalog, snapshots)
    counted = [one for one in candidates if one.counted]
    before = sizes.total([one.digest for one in counted])
    removals, after = plan(candidates, sizes, keep=keep, budget=budget_bytes)
    stays = [Stays(one.digest, one.name, one.kept) for one in counted if one.kept]
    if not dry_run:
        removals, late = _carry_out(catalog, removals)
        stays += late
        gone = {removal.digest for removal in removals}
        after = sizes.total([one.digest for one in counted if one.digest not in gone])
        catalog.tidy()
    return Pruned(tuple(removals), tuple(stays), before, after)


class Sizes(Protocol):
    """What ``images.footprint`` tells."""

    def total(self, digests: Sequence[str]) -> int: ...
    def alone(self, digest: str, among: Sequence[str]) -> int: ...


def plan(
    candidates: Sequence[Candidate], sizes: Sizes, *, keep: int, budget: int | None
) -> tuple[list[Removal], int]:
    """What goes, in that order, and the bytes that are held then: at most ``budget``, unless nothing more may go."""
    left = {one.digest: one for one in candidates}
    removals: list[Removal] = []

    def held() -> int:
        return sizes.total([digest for digest, one in left.items() if one.counted])

    def remove(one: Candidate, why: str) -> None:
        gain = sizes.alone(one.digest, list(left))
        del left[one.digest]
        removals.append(Removal(one.digest, one.name, one.last_used, gain, why))

    # What stands on a version may go in the same round, so look again until nothing more goes.
    while surplus := [one for one in _removable(left) if one.rank >= keep]:
        for one in surplus:
            remove(one, f"more than {keep} version{'s' if keep != 1 else ''} of {one.name}")
    while budget is not None and held() > budget and (rest := _removable(left)):
        remove(min(rest, key=lambda one: (one.last_used, -one.rank, one.digest)), "least recently used")
    return removals, held()


def _removable(left: dict[str, Candidate]) -> list[Candidate]:
    stood_on = {one.base for one in left.values()}
    return [one for one in left.values() if not one.kept and one.digest not in stood_on]


def _candidates(catalog: Catalog, snapshots: Sequence[Snapshot]) -> list[Candidate]:
    names = catalog.store.names()
    ranks = _ranks(catalog, snapshots, names)
    reason = _Reasons(catalog, names)
    meant = {digest: name for name, digest in sorted(names.items(), reverse=True)}
    found: list[Candidate] = []
    for snapshot in snapshots:
        made_for = made_as(snapshot.manifest)
        name = meant.get(snapshot.digest, made_for)
        rank = ranks.get(snapshot.digest, 0)
        used = last_used(snapshot)
        base = snapshot.manifest.base
        kept = reason.to_keep(snapshot, used)
        found.append(Candidate(snapshot.digest, name, rank, used, base, kept, counted=bool(made_for)))
    return found


class _Reasons:
    """Why snapshots stay, as of the moment this is made."""

    def __init__(self, catalog: Catalog, names: Mapping[str, str]) -> None:
        self._in_use = {record.parent: record.id for record in read_records(catalog.pool.vms)}
        self._pinned = catalog.pinned()
        self._templates = {digest: name for name, digest in names.items() if "@" not in name}
        self._now = time.time()

    def to_keep(self, snapshot: Snapshot, used: float) -> str:
        """Empty when there is none."""
        digest, idle = snapshot.digest, self._now - used
        if not made_as(snapshot.manifest):
            return "it is no template"
        if digest in self._in_use:
            return f"VM {self._in_use[digest]} stands on it"
        if digest in self._pinned:
            return "it is pinned"
        if digest in self._templates:
            return f"it is what template {self._templates[digest]} means now"
        return f"it was used {max(0.0, idle):.0f} s ago" if idle < GRACE_S else ""


def _ranks(catalog: Catalog, snapshots: Sequence[Snapshot], names: Mapping[str, str]) -> dict[str, int]:
    """For each version of a name how many come before it: first those it may go back to, newest first; at the end
    those it was rolled back from."""
    made: dict[str, list[str]] = {}
    for snapshot in snapshots:  # newest first
        if name := made_as(snapshot.manifest):
            made.setdefault(name, []).append(snapshot.digest)
    known = {snapshot.digest for snapshot in snapshots}
    ranks: dict[str, int] = {}
    for name in made.keys() | names.keys():
        rows = catalog.rows(name, names)
        bad = withdrawn(rows)
        order = dict.fromkeys((*reversed(versions(rows)), *made.get(name, ()), *bad))
        there = sorted((digest for digest in order if digest in known), key=bad.__contains__)
        for rank, digest in enumerate(there):
            ranks[digest] = min(rank, ranks.get(digest, rank))
    return ranks


def _carry_out(catalog: Catalog, removals: Sequence[Removal]) -> tuple[list[Removal], list[Stays]]:
    """What is gone now, and what came in between."""
    gone: list[Removal] = []
    stays: list[Stays] = []
    for removal in removals:
        obstacle = _remove(catalog, removal.digest)
        if obstacle:
            stays.append(Stays(removal.digest, removal.name, obstacle))
        else:
            gone.append(removal)
    return gone, stays


def _remove(catalog: Catalog, digest: str) -> str:
    with catalog.locked():
        try:
            snapshot = catalog.store.load(digest)
            # What was used or promoted since the plan was made was so within the grace.
            kept = _Reasons(catalog, catalog.store.names()).to_keep(snapshot, last_used(snapshot))
            if kept:
                return kept
            catalog.store.remove(digest)
        except UnknownTemplate:
            return "somebody else has removed it"
        except (SnapshotInUse, SnapshotInvalid) as error:
            return str(error)
    return ""
