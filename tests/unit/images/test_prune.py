"""What goes when templates are pruned, what never does, and that the bytes told are the bytes given back."""

import itertools
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images import footprint
from images import prune as prune_module
from images.catalog import Catalog
from images.prune import Candidate, Pruned, Removal, plan, prune
from tests.unit.images.catalog_world import (
    MIB,
    digest_of,
    open_catalog,
    parent,
    publish,
    rest,
    stand_on,
    template,
)
from vmm_core import disk
from vmm_core.errors import BadRequest
from vmm_core.machine import Frozen, Snapshot
from vmm_core.record import read_records

pytestmark = pytest.mark.anyio
MAIN = "octo-org/hello@main"
A, B, C, D = (digest_of(word) for word in "abcd")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Processes end here, power does not: what is synced makes no difference but in time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        yield


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return open_catalog(tmp_path)


def there(catalog: Catalog) -> set[str]:
    return {snapshot.digest for snapshot in catalog.store.list()}


def gone(pruned: Pruned) -> list[str]:
    return [removal.digest for removal in pruned.removed]


def why_stays(pruned: Pruned) -> dict[str, str]:
    return {one.digest: one.why for one in pruned.stays}


def promoted(catalog: Catalog, *words: str, idle: float = 3600.0) -> None:
    """Parents that the name meant one after the other; the last one means it now."""
    for word in words:
        snapshot = parent(catalog, word)
        catalog.promote(MAIN, snapshot.digest, "baked")
        rest(snapshot, idle)


# ── versions ─────────────────────────────────────────────────────────────────────────────────────


def test_versions_beyond_so_many_go_oldest_ones_and_those_rolled_back_from(catalog: Catalog) -> None:
    promoted(catalog, "a", "b", "c", "d")
    catalog.rollback(MAIN)
    dry = prune(catalog, keep=2, dry_run=True)
    assert set(gone(dry)) == {A, D}
    assert {removal.why for removal in dry.removed} == {f"more than 2 versions of {MAIN}"}
    assert there(catalog) == {A, B, C, D}
    assert prune(catalog, keep=2).removed == dry.removed
    assert there(catalog) == {B, C}
    assert catalog.store.names() == {MAIN: C}
    assert catalog.rollback(MAIN).digest == B


def test_versions_that_no_history_tells_of_count_after_those_it_tells_of(catalog: Catalog) -> None:
    for number, word in enumerate("abc"):
        template(catalog, word, created_at=float(number))
    catalog.store.set_name("python-ci", A)
    assert set(gone(prune(catalog, keep=2))) == {B}
    assert there(catalog) == {A, C}


def test_no_fewer_than_one_version_is_kept(catalog: Catalog) -> None:
    with pytest.raises(BadRequest, match="at least one"):
        prune(catalog, keep=0)


# ── what stays ───────────────────────────────────────────────────────────────────────────────────


def test_nothing_in_use_goes_for_any_budget(catalog: Catalog) -> None:
    base = template(catalog, "t")
    catalog.store.set_name("python-ci", base.digest)
    promoted(catalog, "a", "b", "c", "d")
    other = parent(catalog, "e", repository="octo-org/other", on=base)
    on_other = parent(catalog, "f", repository="octo-org/other", on=other)
    record = read_records(stand_on(catalog, A, "vm-7").parent)[0]
    frozen = Frozen(digest=digest_of("z"), record=record, frozen_at=1.0, expires_at=2.0)
    publish(catalog, "z", {"template": "octo-org/other"}, on=on_other, frozen=frozen)
    by_library = publish(catalog, "y", {})
    catalog.pin(B)
    held = catalog.store.hold(C)
    assert held is not None
    done = prune(catalog, keep=1, budget_bytes=0)
    assert gone(done) == [D]
    assert there(catalog) == {
        base.digest,
        A,
        B,
        C,
        other.digest,
        on_other.digest,
        digest_of("z"),
        by_library.digest,
    }
    assert catalog.store.names() == {"python-ci": base.digest}
    whys = why_stays(done)
    assert whys[A] == "VM vm-7 stands on it"
    assert whys[B] == "it is pinned"
    assert "a fork that is under way" in whys[C]
    assert whys[base.digest] == "it is what template python-ci means now"
    assert by_library.digest not in whys
    os.close(held)
    catalog.unpin(B)
    (catalog.pool.vms / "vm-7" / "vm.json").unlink()
    assert set(gone(prune(catalog, keep=1, budget_bytes=0))) == {A, B, C}


def test_what_was_used_just_now_stays_whether_it_has_a_name_yet_or_not(catalog: Catalog) -> None:
    template(catalog, "a", idle=1.0)
    template(catalog, "b", idle=prune_module.GRACE_S + 5)
    done = prune(catalog, keep=1, budget_bytes=0)
    assert gone(done) == [B]
    assert why_stays(done)[A].startswith("it was used")


@pytest.mark.parametrize("event", ["touch", "pin", "promote", "vm", "gone"])
def test_what_is_used_between_plan_and_removal_stays(catalog: Catalog, event: str) -> None:
    promoted(catalog, "a", "b")

    def meanwhile(*arguments: object, **options: object) -> tuple[list[Removal], int]:
        found = plan(*arguments, **options)  # type: ignore[arg-type]
        match event:
            case "touch":
                catalog.touch(A)
            case "pin":
                catalog.pin(A)
            case "promote":
                catalog.promote("octo-org/hello@next", A, "the same key")
            case "vm":
                stand_on(catalog, A)
            case _:
                catalog.store.remove(A)
        return found

    with mock.patch.object(prune_module, "plan", meanwhile):
        done = prune(catalog, keep=1)
    assert gone(done) == []
    assert A in why_stays(done)
    assert (A in there(catalog)) == (event != "gone")


def test_a_fork_that_begins_while_others_are_pruned_keeps_its_parent(catalog: Catalog) -> None:
    for number in range(30):
        parent(catalog, f"p{number}", branch=f"b{number}")
    lost: list[str] = []
    stop = threading.Event()

    def forks() -> None:
        while not stop.is_set():
            for digest in there(catalog):
                held = catalog.store.hold(digest)
                if held is not None:
                    if not (catalog.pool.snapshots / digest / "memory.img").exists():
                        lost.append(digest)
                    os.close(held)

    thread = threading.Thread(target=forks)
    thread.start()
    try:
        for _ in range(5):
            prune(catalog, budget_bytes=0)
    finally:
        stop.set()
        thread.join()
    assert lost == []
    prune(catalog, budget_bytes=0)
    assert there(catalog) == set()


# ── the budget ───────────────────────────────────────────────────────────────────────────────────


def test_the_least_recently_used_go_until_the_budget_is_met_their_names_with_them(catalog: Catalog) -> None:
    for idle, word in ((400, "a"), (300, "b"), (200, "c")):
        snapshot = parent(catalog, word, branch=f"branch-{word}", size=MIB)
        catalog.promote(f"octo-org/hello@branch-{word}", snapshot.digest, "baked")
        rest(snapshot, idle)
    whole = prune(catalog, dry_run=True)
    assert (whole.removed, whole.bytes_before) == ((), whole.bytes_after)
    assert whole.bytes_before >= 3 * MIB
    done = prune(catalog, budget_bytes=whole.bytes_before - 1)
    assert gone(done) == [A]
    assert done.removed[0].why == "least recently used"
    assert done.bytes_before - done.bytes_after == done.removed[0].bytes >= MIB
    assert set(catalog.store.names()) == {"octo-org/hello@branch-b", "octo-org/hello@branch-c"}
    assert gone(prune(catalog, budget_bytes=done.bytes_after)) == []
    catalog.touch(B)
    rest(catalog.store.load(B), 150)
    assert gone(prune(catalog, budget_bytes=done.bytes_after - 1)) == [C]


@pytest.fixture
async def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Catalog]:
    """A catalog on a pool whose files really share blocks."""
    monkeypatch.setattr(disk, "LOOP_POOL_MAX", 3 << 30)  # sparse
    async with disk.open_pool(tmp_path) as pool:
        if pool.kind == "copy":
            pytest.skip(f"no blocks can be shared here: {pool.note}")
        yield Catalog(pool)


def used_bytes(catalog: Catalog) -> int:
    os.sync()
    stat = os.statvfs(catalog.pool.root)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def freed_soon(catalog: Catalog, before: int, expected: int) -> None:
    """XFS gives blocks back in the background."""
    deadline = time.monotonic() + 10
    while abs(before - used_bytes(catalog) - expected) > MIB // 4:
        assert time.monotonic() < deadline, f"{before - used_bytes(catalog)} bytes came back, not {expected}"
        time.sleep(0.1)


async def test_on_shared_blocks_the_bytes_told_are_those_the_pool_gets_back(shared: Catalog) -> None:
    base = template(shared, "t", size=8 * MIB)
    shared.store.set_name("python-ci", base.digest)
    first = parent(shared, "a", on=base, size=3 * MIB, idle=500)
    second = parent(shared, "b", on=first, size=MIB, idle=400)
    third = parent(shared, "c", on=second, size=2 * MIB, idle=300)
    os.sync()
    # 8 of the base, 3 of the first (of which the second has 2 and the third 1 in common), 1 and 2 of their own.
    before = prune(shared, keep=9, dry_run=True).bytes_before
    assert before - 14 * MIB < MIB // 4
    assert abs(shared.store.private_bytes(third.digest) - 2 * MIB) < MIB // 4
    assert shared.store.private_bytes(base.digest) < 6 * MIB
    dry = prune(shared, keep=9, budget_bytes=0, dry_run=True)
    assert gone(dry) == [third.digest, second.digest, first.digest], "what stands on another goes first"
    assert [round(removal.bytes / MIB) for removal in dry.removed] == [2, 1, 3]
    full = used_bytes(shared)
    done = prune(shared, keep=9, budget_bytes=12 * MIB + MIB // 2)
    assert done.removed == dry.removed[:1]
    freed_soon(shared, full, done.removed[0].bytes)
    rest_of_it = prune(shared, keep=9, budget_bytes=0)
    assert gone(rest_of_it) == [second.digest, first.digest]
    freed_soon(shared, full, before - rest_of_it.bytes_after)


async def test_blocks_that_a_vm_shares_are_not_told_as_given_back(shared: Catalog) -> None:
    snapshot = parent(shared, "a", size=4 * MIB)
    disk.clone_file(snapshot.path / "memory.img", shared.pool.vms / "disk.img")
    os.sync()
    done = prune(shared, budget_bytes=0, dry_run=True)
    assert gone(done) == [A]
    assert done.removed[0].bytes < MIB // 4


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────


class Blocks:
    """Sizes by sets of numbered blocks."""

    def __init__(self, blocks: dict[str, set[int]]) -> None:
        self.blocks = blocks

    def total(self, digests: Sequence[str]) -> int:
        return len(set().union(*(self.blocks[digest] for digest in digests)))

    def alone(self, digest: str, among: Sequence[str]) -> int:
        others = set().union(*(self.blocks[other] for other in among if other != digest))
        return len(self.blocks[digest] - others)


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Candidate], Blocks]:
    count = draw(st.integers(0, 9))
    candidates: list[Candidate] = []
    blocks: dict[str, set[int]] = {}
    for number in range(count):
        digest = f"s{number}"
        base = draw(st.none() | st.sampled_from([one.digest for one in candidates])) if candidates else None
        counted = draw(st.sampled_from([True, True, True, False]))
        kept = (
            draw(st.sampled_from(["", "", "VM vm-1 stands on it", "it is pinned"]))
            if counted
            else "no template"
        )
        candidates.append(
            Candidate(
                digest, "n", draw(st.integers(0, 4)), float(draw(st.integers(0, 5))), base, kept, counted
            )
        )
        own = draw(st.sets(st.integers(0, 30), max_size=8))
        blocks[digest] = own | (
            draw(st.sets(st.sampled_from(sorted(blocks[base])))) if base and blocks[base] else set()
        )
    return candidates, Blocks(blocks)


@settings(max_examples=200, deadline=None)
@given(pools(), st.integers(1, 3), st.none() | st.just(40) | st.integers(0, 40))
def test_the_law_of_pruning(pool: tuple[list[Candidate], Blocks], keep: int, budget: int | None) -> None:
    candidates, sizes = pool
    if budget == 40:  # just met
        budget = sizes.total([one.digest for one in candidates if one.counted])
    removals, after = plan(candidates, sizes, keep=keep, budget=budget)
    by_digest = {one.digest: one for one in candidates}
    left = dict(by_digest)

    def removable() -> list[Candidate]:
        bases = {one.base for one in left.values()}
        return [one for one in left.values() if not one.kept and one.digest not in bases]

    for removal in removals:
        one = by_digest[removal.digest]
        may_go = removable()
        assert one in may_go, "nothing that is kept, and nothing that another which stays stands on"
        if removal.why == "least recently used":
            assert budget is not None
            held = sizes.total([other.digest for other in left.values() if other.counted])
            assert held > budget, "not one more than needed"
            assert one.last_used == min(other.last_used for other in may_go)
        else:
            assert one.rank >= keep
        assert removal.bytes == sizes.alone(one.digest, list(left))
        del left[one.digest]
    assert not [one for one in removable() if one.rank >= keep]
    assert after == sizes.total([one.digest for one in left.values() if one.counted])
    assert budget is None or after <= budget or not removable(), "under the budget, or nothing more may go"
    whole = sizes.total(list(by_digest))
    assert sum(removal.bytes for removal in removals) == whole - sizes.total(list(left)), "not a byte twice"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 40), max_size=12), max_size=6),
    st.sets(st.integers(0, 40), max_size=10),
    st.integers(1, 63),
)
def test_a_footprint_counts_every_block_once_and_gives_back_what_nobody_else_holds(
    snapshots: list[set[int]], elsewhere: set[int], some: int
) -> None:
    held = {f"s{number}": blocks for number, blocks in enumerate(snapshots)}
    holders = Counter(itertools.chain(elsewhere, *snapshots))

    def extents(path: Path) -> tuple[list[tuple[int, int, bool]], int]:
        return [(block * 4096, 4096, holders[block] > 1) for block in held[path.name]], 0

    with mock.patch.object(footprint, "extents", extents):
        found = footprint.measure({digest: [Path(digest)] for digest in held})
    among = [digest for number, digest in enumerate(held) if some >> number & 1]
    assert found.total(among) == 4096 * len(set().union(*(held[digest] for digest in among)))
    for digest in among:
        mine = held[digest].difference(*(held[other] for other in among if other != digest))
        # Of a block that several snapshots hold nobody can tell whether a file of somebody else does too.
        others = {block for block in mine & elsewhere if sum(block in blocks for blocks in snapshots) == 1}
        assert found.alone(digest, among) == 4096 * len(mine - others)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["promote", "rollback", "pin", "unpin", "touch", "vm", "prune"]),
            st.sampled_from("abcde"),
            st.integers(0, 6),
        ),
        max_size=20,
    )
)
def test_whatever_was_done_before_pruning_takes_nothing_that_is_used_pinned_or_current(
    steps: list[tuple[str, str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        catalog = open_catalog(Path(directory))
        base: Snapshot | None = None
        for number, word in enumerate("abc"):
            base = template(catalog, word, on=base, idle=1000.0 + number)
        for word in "de":
            parent(catalog, word, on=base, idle=500.0)
        for action, word, number in steps:
            digest = digest_of(word)
            name = "python-ci" if word in "abc" else MAIN
            if digest not in there(catalog):
                continue
            match action:
                case "promote":
                    catalog.promote(name, digest, "baked")
                    rest(catalog.store.load(digest), 900)
                case "pin":
                    catalog.pin(digest)
                case "unpin":
                    catalog.unpin(digest)
                case "touch":
                    catalog.touch(digest)
                case "vm" if not list(catalog.pool.vms.iterdir()):
                    stand_on(catalog, digest)
                case "prune":
                    safe = _safe(catalog)
                    before = there(catalog)
                    done = prune(catalog, keep=1 + number % 3, budget_bytes=number * 2048)
                    assert safe <= there(catalog)
                    assert before - there(catalog) == set(gone(done))
                    assert set(catalog.store.names().values()) <= there(catalog)
                case _:
                    pass


def _safe(catalog: Catalog) -> set[str]:
    """What is used, pinned, or what the name of a template means now; and all of that stands on."""
    names = catalog.store.names()
    found = {record.parent for record in read_records(catalog.pool.vms)} | catalog.pinned()
    found |= {digest for name, digest in names.items() if "@" not in name}
    bases = {snapshot.digest: snapshot.manifest.base for snapshot in catalog.store.list()}
    while below := {bases[digest] for digest in found if bases.get(digest)} - found:
        found |= below
    return {digest for digest in found if digest is not None}
