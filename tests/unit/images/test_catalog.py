"""Names of templates: promoted as a whole or not at all, rolled back, remembered, and never a stranger's parent."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images import catalog as catalog_module
from images.catalog import Catalog, templates
from images.contents import Base, contents
from images.errors import CatalogBusy, NoEarlierVersion
from images.history import NAMES_KEPT, ROWS_KEPT, Row, effective, versions, withdrawn
from tests.unit.images.catalog_world import digest_of, open_catalog, parent, publish, stand_on, template
from vmm_core.errors import BadRequest, UnknownTemplate

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


@pytest.fixture
def four(catalog: Catalog) -> Catalog:
    for word in "abcd":
        parent(catalog, word)
    return catalog


def meaning(catalog: Catalog, name: str = MAIN) -> str | None:
    return catalog.store.names().get(name)


def told(catalog: Catalog, name: str = MAIN) -> list[tuple[str, str]]:
    return [(row.action, row.digest) for row in catalog.history(name)]


# ── promote and roll back ────────────────────────────────────────────────────────────────────────


def test_a_promotion_changes_what_the_name_means_and_is_remembered_with_commit_and_key(four: Catalog) -> None:
    before = time.time()
    four.promote(MAIN, A, "baked from the base")
    row = four.promote(MAIN, B, "baked\nfrom \x1b[2Jthe last parent")
    assert meaning(four) == B
    assert row.why == "baked?from ?[2Jthe last parent"
    assert (row.commit, row.key, row.at >= before) == (digest_of("b")[:40], "key-b", True)
    assert told(four) == [("promote", B), ("promote", A)]


def test_a_promotion_of_what_the_name_means_already_changes_nothing(four: Catalog) -> None:
    first = four.promote(MAIN, A, "baked")
    assert four.promote(MAIN, A, "the same key") == first
    assert told(four) == [("promote", A)]


def test_rollbacks_go_back_one_version_each_and_a_promotion_follows_what_was_gone_back_to(
    four: Catalog,
) -> None:
    for digest in (A, B, C):
        four.promote(MAIN, digest, "baked")
    assert four.rollback(MAIN).digest == meaning(four) == B
    assert four.withdrawn(MAIN) == {C}
    four.promote(MAIN, D, "baked")
    assert four.rollback(MAIN).digest == B, "not C, which was rolled back from"
    assert four.rollback(MAIN).digest == A
    assert four.withdrawn(MAIN) == {B, C, D}
    with pytest.raises(NoEarlierVersion, match="no earlier version"):
        four.rollback(MAIN)
    assert meaning(four) == A
    four.promote(MAIN, C, "after all")
    assert four.withdrawn(MAIN) == {B, D}


def test_a_rollback_passes_over_versions_that_are_gone(four: Catalog) -> None:
    for digest in (A, B, C):
        four.promote(MAIN, digest, "baked")
    four.store.remove(B)
    assert four.rollback(MAIN).digest == A
    four.store.remove(C)
    with pytest.raises(NoEarlierVersion):
        four.rollback(MAIN)


def test_a_rollback_brings_back_a_name_whose_snapshot_was_removed(four: Catalog) -> None:
    four.promote(MAIN, A, "baked")
    four.promote(MAIN, B, "baked")
    four.store.remove(B)
    assert meaning(four) is None
    assert four.rollback(MAIN).digest == meaning(four) == A


def test_what_never_was_is_told_with_what_there_is(four: Catalog) -> None:
    four.promote(MAIN, A, "baked")
    for ask in (four.history, four.rollback):
        with pytest.raises(UnknownTemplate, match="octo-org/hello@main"):
            ask("octo-org/hello@mian")
    with pytest.raises(BadRequest, match="is a digest"):
        four.rollback(B)
    with pytest.raises(UnknownTemplate):
        four.promote(MAIN, "f" * 64, "why")
    assert told(four) == [("promote", A)]


@pytest.mark.parametrize("name", ["other-org/hello@main", "octo-org/other@main", "python-ci"])
def test_no_name_is_given_the_parent_of_a_repository_it_is_not_of(four: Catalog, name: str) -> None:
    template(four, "t")
    four.promote("python-ci", digest_of("t"), "baked")
    with pytest.raises(BadRequest, match=f"is a parent of octo-org/hello, so {name} cannot mean it"):
        four.promote(name, A, "why")
    with pytest.raises(BadRequest, match="is no repository's parent"):
        four.promote(MAIN, digest_of("t"), "why")
    assert four.store.names() == {"python-ci": digest_of("t")}


@pytest.mark.parametrize("name", ["../x", "Octo/hello@main", "octo/hello@", "octo/hello@a..b", "a@b", ""])
def test_what_is_no_name_is_refused_before_anything_is_written(four: Catalog, name: str) -> None:
    with pytest.raises(BadRequest):
        four.promote(name, A, "why")
    assert not list(four.pool.root.parent.glob("catalog/history/*"))


def test_a_branch_of_another_name_may_share_a_parent(four: Catalog) -> None:
    long = "octo-org/hello@" + "ä/" * 60 + "x"
    for name in (MAIN, long):
        four.promote(name, A, "the same key")
    assert four.store.names() == {MAIN: A, long: A}
    assert told(four, long) == [("promote", A)]


# ── what a crash leaves ──────────────────────────────────────────────────────────────────────────


def _killed_at(line: int, act: Any) -> bool:
    """Run ``act`` in a process of its own that ends without a word at the so-many-th line; whether it got there."""
    child = os.fork()
    if child == 0:
        left = line

        def trace(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal left
            ours = "/images/" in frame.f_code.co_filename or "/vmm_core/" in frame.f_code.co_filename
            if event == "line" and ours:
                left -= 1
                if left < 0:
                    os._exit(9)
            return trace if ours else None

        sys.settrace(trace)
        with contextlib.suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("kind", ["promote", "rollback", "first"])
def test_killed_at_any_line_the_name_means_the_old_or_the_new_and_history_follows_it(
    tmp_path: Path, kind: str
) -> None:
    line = 0
    seen = Counter[str | None]()
    before = {"promote": (A, B), "rollback": (A, B, C), "first": ()}[kind]
    old, new = {"promote": (B, C), "rollback": (C, B), "first": (None, A)}[kind]
    while True:
        catalog = open_catalog(tmp_path / str(line))
        for word in "abcd":
            parent(catalog, word, size=1)
        for digest in before:
            catalog.promote(MAIN, digest, "baked")
        if kind == "rollback":
            killed = _killed_at(line, functools.partial(catalog.rollback, MAIN))
        else:
            killed = _killed_at(line, functools.partial(catalog.promote, MAIN, new, "baked"))
        now = meaning(catalog)
        seen[now] += 1
        assert now in (old, new)
        if now is not None:
            rows = catalog.history(MAIN)
            assert rows[0].digest == now
            assert len(rows) == len(before) + (now == new)
            assert kind == "first" or all(row.action != "found" for row in rows)
        # And whoever comes next finds a catalog that works.
        catalog.promote(MAIN, D, "baked")
        assert told(catalog)[0] == ("promote", D)
        known = [digest for _, digest in told(catalog)[1:]]
        assert known == [*([new] if now == new else []), *reversed(before)]
        if not killed:
            break
        line += 9
    assert seen[old] > 5, "it was killed before the name changed"
    assert seen[new] > 1, "and after"


def test_a_name_that_somebody_else_set_is_in_its_history_from_then_on(four: Catalog) -> None:
    four.store.set_name(MAIN, A)
    assert told(four) == [("found", A)]
    four.promote(MAIN, B, "baked")
    four.store.set_name(MAIN, C)
    assert told(four) == [("found", C), ("promote", B), ("found", A)]
    assert four.rollback(MAIN).digest == B
    assert told(four) == [("rollback", B), ("found", C), ("promote", B), ("found", A)]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"name": 1}', b"[" * 100_000, bytes(3 << 20)])
def test_a_history_that_cannot_be_read_begins_anew_with_what_the_name_means(
    four: Catalog, damage: bytes
) -> None:
    four.promote(MAIN, A, "baked")
    (path,) = four.pool.root.parent.glob("catalog/history/*.json")
    path.write_bytes(damage)
    assert told(four) == [("found", A)]
    four.promote(MAIN, B, "baked")
    assert told(four) == [("promote", B), ("found", A)]


def _promote_many(directory: Path, words: list[str]) -> None:
    catalog = open_catalog(directory)
    for word in words:
        catalog.promote(MAIN, digest_of(word), "baked")


def test_of_several_processes_at_once_no_promotion_is_lost(tmp_path: Path) -> None:
    catalog = open_catalog(tmp_path)
    shares = [[f"{worker}-{number}" for number in range(12)] for worker in range(4)]
    for word in itertools.chain(*shares):
        parent(catalog, word, size=1)
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_promote_many, args=(tmp_path, share)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    rows = catalog.history(MAIN)
    assert sorted(row.digest for row in rows) == sorted(digest_of(word) for word in itertools.chain(*shares))
    assert rows[0].digest == meaning(catalog)


def test_a_lock_that_is_never_given_back_is_an_error_not_a_wait(
    four: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "_LOCK_S", 0.1)
    with four.locked(), pytest.raises(CatalogBusy, match="try again"):
        four.promote(MAIN, A, "why")
    four.promote(MAIN, A, "why")


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


def test_a_history_keeps_its_last_rows(four: Catalog) -> None:
    for turn in range(ROWS_KEPT + 5):
        four.promote(MAIN, (A, B)[turn % 2], f"turn {turn}")
    rows = four.history(MAIN)
    assert (len(rows), rows[0].why) == (ROWS_KEPT, f"turn {ROWS_KEPT + 4}")


def test_histories_of_names_that_mean_nothing_any_more_are_forgotten_when_there_are_too_many(
    four: Catalog,
) -> None:
    four.promote(MAIN, A, "baked")
    directory = four.pool.root.parent / "catalog" / "history"
    os.utime(next(directory.iterdir()), (1, 1))
    for number in range(NAMES_KEPT):
        path = directory / f"{number:040x}.json"
        path.touch()
        os.utime(path, (2 + number, 2 + number))
    four.promote("octo-org/hello@new", B, "baked")
    assert len(list(directory.iterdir())) == NAMES_KEPT
    assert not (directory / f"{1:040x}.json").exists()
    assert told(four) == [("promote", A)], "the oldest, but its name still means something"
    assert told(four, "octo-org/hello@new") == [("promote", B)]


# ── use and pins ─────────────────────────────────────────────────────────────────────────────────


def test_a_touch_marks_the_last_use_and_costs_next_to_nothing(four: Catalog) -> None:
    four.promote(MAIN, A, "baked")
    os.utime(four.store.load(A).path, (1, 1))
    before = time.time()
    four.touch(A)
    (listed,) = templates(four.store)
    assert listed.last_used_at >= before - 0.1
    times: list[float] = []
    for _ in range(300):
        began = time.perf_counter()
        four.touch(A)
        times.append(time.perf_counter() - began)
    assert sorted(times)[150] < 0.0002
    four.touch("f" * 64)  # gone meanwhile: nothing to mark


def test_pins_stay_until_taken_off_and_go_with_their_snapshot(four: Catalog) -> None:
    four.pin(A)
    four.pin(A)
    four.pin(B)
    assert open_catalog(four.pool.root.parent).pinned() == {A, B}
    with pytest.raises(UnknownTemplate):
        four.pin("f" * 64)
    four.unpin(B)
    four.unpin(B)
    assert four.pinned() == {A}
    four.store.remove(A)
    four.tidy()
    assert four.pinned() == frozenset()


# ── what there is, and what is in it ─────────────────────────────────────────────────────────────


def test_the_list_tells_whose_a_parent_is_and_what_it_was_made_for(catalog: Catalog) -> None:
    template(catalog, "t")
    parent(catalog, "a", owner="octo-org")
    catalog.promote("python-ci", digest_of("t"), "baked")
    catalog.promote(MAIN, A, "baked")
    mine, base = templates(catalog.store)
    assert (mine.name, mine.owner, mine.repository, mine.branch) == (
        MAIN,
        "octo-org",
        "octo-org/hello",
        "main",
    )
    assert (mine.commit, mine.key, mine.base) == (digest_of("a")[:40], "key-a", "python-ci")
    assert (base.name, base.owner, base.repository, base.key) == ("python-ci", None, None, None)


def test_the_parents_of_a_repository_are_all_there_are_but_those_rolled_back_from(four: Catalog) -> None:
    parent(four, "other", repository="octo-org/other")
    for digest in (A, B, C):
        four.promote(MAIN, digest, "baked")
    four.rollback(MAIN)
    assert {found.digest for found in four.parents("octo-org/hello")} == {A, B, D}
    assert {found.name for found in four.parents("octo-org/hello")} == {MAIN}


def test_contents_answer_what_is_in_here(catalog: Catalog) -> None:
    base = template(catalog, "t")
    labels = {
        "template": "octo-org/hello", "repository": "octo-org/hello", "branch": "main", "commit": "1" * 40,
        "key": "2" * 64, "base": "python-ci", "base.digest": base.digest, "baked.from": "previous",
        "recipe": '{"install": true}', "lockfiles": '[["uv.lock", "uv", "3f"]]', "tools": '{"python": "3.11.2"}',
        "suite": "bookworm",
    }  # fmt: skip
    middle = publish(catalog, "m", labels, on=base)
    top = publish(catalog, "x", labels, on=middle, owner="octo-org")
    catalog.promote("python-ci", base.digest, "baked")
    catalog.promote(MAIN, middle.digest, "baked")
    catalog.promote(MAIN, top.digest, "baked again")
    catalog.pin(top.digest)
    stand_on(catalog, top.digest, "vm-7")
    found = contents(catalog, MAIN)
    assert (found.template.name, found.template.owner, found.template.commit) == (MAIN, "octo-org", "1" * 40)
    assert (found.names, found.pinned, found.users, found.baked_from) == (
        (MAIN,),
        True,
        ("VM vm-7",),
        "previous",
    )
    assert found.bases == (Base(middle.digest, MAIN), Base(base.digest, "python-ci"))
    assert (found.recipe, found.lockfiles) == ({"install": True}, (("uv.lock", "uv", "3f"),))
    assert (found.tools, found.labels["suite"]) == ({"python": "3.11.2"}, "bookworm")
    assert [row.why for row in found.history] == ["baked again", "baked"]
    assert found.own_bytes > 0
    assert contents(catalog, middle.digest[:12]).names == ()


def test_what_a_guest_noted_that_is_not_what_it_should_be_is_shown_as_noted(catalog: Catalog) -> None:
    labels = {"template": "python-ci", "tools": "[" * 5000, "lockfiles": '{"a": 1}', "recipe": "7"}
    publish(catalog, "t", labels)
    found = contents(catalog, digest_of("t"))
    assert (found.tools, found.lockfiles, found.recipe) == ({}, (), {})
    assert {key: found.labels[key] for key in labels} == labels


# ── laws ─────────────────────────────────────────────────────────────────────────────────────────

_ROWS = st.lists(
    st.tuples(st.sampled_from(["promote", "rollback", "found"]), st.sampled_from("abcdef")), max_size=30
).map(lambda rows: tuple(Row(0.0, digest, action, "") for action, digest in rows))  # type: ignore[arg-type]


@given(_ROWS)
def test_versions_are_distinct_end_with_the_last_row_and_leave_out_what_was_withdrawn(
    rows: tuple[Row, ...],
) -> None:
    found = versions(rows)
    assert len(set(found)) == len(found)
    assert found[-1:] == tuple(row.digest for row in rows[-1:])
    assert set(found) | withdrawn(rows) == {row.digest for row in rows}
    assert not set(found) & withdrawn(rows)


@given(_ROWS, st.none() | st.sampled_from("abcdef"))
def test_the_history_in_effect_ends_with_what_the_name_means(rows: tuple[Row, ...], now: str | None) -> None:
    found = effective(rows, None if now is None else Row(0.0, now, "found", ""))
    assert now is None or found[-1].digest == now
    assert effective(found, None if now is None else Row(0.0, now, "found", "")) == found
    assert abs(len(found) - len(rows)) <= 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["promote", "rollback", "remove", "set"]),
            st.sampled_from("abcd"),
            st.sampled_from([MAIN, "octo-org/hello@next"]),
        ),
        max_size=25,
    )
)
def test_whatever_happens_history_begins_with_what_the_name_means(steps: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        catalog = open_catalog(Path(directory))
        for word in "abcd":
            parent(catalog, word, size=1)
        for action, word, name in steps:
            with contextlib.suppress(UnknownTemplate, NoEarlierVersion):
                match action:
                    case "promote":
                        catalog.promote(name, digest_of(word), "baked")
                        assert meaning(catalog, name) == digest_of(word)
                    case "rollback":
                        before = meaning(catalog, name)
                        assert catalog.rollback(name).digest == meaning(catalog, name) != before
                    case "remove":
                        catalog.store.remove(digest_of(word))
                    case _:
                        catalog.store.set_name(name, digest_of(word))
            for known, digest in catalog.store.names().items():
                rows = catalog.history(known)
                assert rows[0].digest == digest
                assert versions(rows[::-1])[-1] == digest
