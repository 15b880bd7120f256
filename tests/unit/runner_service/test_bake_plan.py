"""What is to be baked, given what is there: pure."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_service.bake_plan import Wanted, wanted_bakes
from runner_service.domain import Bake, Parent, Template
from runner_service.ports import Look
from tests.unit.runner_service.test_parents import bake, parent

BASE = Template("github-runner", "b", (), 512, "/opt/runner")
NOW = 1000.0


def plan(
    look: Look,
    keys: dict[str, str],
    *,
    mine: list[Parent] | None = None,
    last: list[Bake] | None = None,
    there: bool = True,
    withdrawn: bool = False,
    every: float = 0.0,
    base: Template = BASE,
) -> list[Wanted]:
    return wanted_bakes(
        look, keys, base, mine=mine or [], last=last or [], there=lambda _: there, withdrawn=lambda _: withdrawn,
        now=NOW, every=every, retry=10.0,
    )  # fmt: skip


MAIN = Look("main", {"main": "c1"})


def done(**more: object) -> Bake:
    values = {
        "id": 7,
        "branch": "main",
        "key": "k1",
        "commit": "c1",
        "state": "done",
        "digest": "d1",
        "ended_at": 900.0,
    }
    return bake(**(values | more))


def test_a_branch_without_a_parent_gets_one_and_each_reason_is_told() -> None:
    assert plan(MAIN, {"c1": "k1"}) == [Wanted("main", "c1", "k1", "main has no parent yet", NOW)]
    old = parent("octo-org/hello", "main", "k0")
    (changed,) = plan(MAIN, {"c1": "k1"}, mine=[old])
    assert changed.why == "the dependencies of main changed: key k0 → k1"
    (rebased,) = plan(MAIN, {"c1": "k1"}, mine=[old], base=msgspec.structs.replace(BASE, digest="b2"))
    assert rebased.why == "the template github-runner is another one now"
    assert plan(MAIN, {}) == []


@pytest.mark.parametrize("branch", ["main", "dev"])
def test_a_known_key_is_not_baked_again(branch: str) -> None:
    assert plan(MAIN, {"c1": "k1"}, mine=[parent("octo-org/hello", branch, "k1")]) == []


def test_what_the_operator_rolled_back_is_not_brought_back() -> None:
    back = parent("octo-org/hello", "main", "k0")
    assert plan(MAIN, {"c1": "k1"}, mine=[back], last=[done()]) == []
    # The branch moved on and came back to what was withdrawn.
    newer = done(id=8, key="k2", commit="c2")
    assert plan(MAIN, {"c1": "k1"}, mine=[back], last=[newer, done()], withdrawn=True) == []


def test_a_branch_that_comes_back_to_an_older_key_is_wanted_again() -> None:
    newer = done(id=8, key="k2", commit="c2")
    assert [
        w.key
        for w in plan(MAIN, {"c1": "k1"}, mine=[parent("octo-org/hello", "main", "k2")], last=[newer, done()])
    ] == ["k1"]


def test_what_was_pruned_is_made_again() -> None:
    assert [w.key for w in plan(MAIN, {"c1": "k1"}, last=[done()], there=False)] == ["k1"]


def test_what_failed_is_tried_again_for_another_commit_only_and_later() -> None:
    failed = bake(branch="main", key="k1", commit="c1", attempts=3, ended_at=NOW - 1)
    assert plan(MAIN, {"c1": "k1"}, last=[failed]) == []
    (again,) = plan(MAIN, {"c1": "k1"}, last=[msgspec.structs.replace(failed, commit="c0")])
    assert again.due_at == NOW - 1 + 80


def test_a_schedule_bakes_what_is_old_enough_once() -> None:
    known = parent("octo-org/hello", "main", "k1", at=NOW - 100)
    assert plan(MAIN, {"c1": "k1"}, mine=[known], every=200) == []
    (wanted,) = plan(MAIN, {"c1": "k1"}, mine=[known], every=50)
    assert wanted.force and "every" in wanted.why
    assert plan(MAIN, {"c1": "k1"}, mine=[known], last=[done(ended_at=NOW - 10)], every=50) == []


@given(
    st.dictionaries(st.sampled_from(["main", "dev", "x"]), st.sampled_from(["c1", "c2", "c3"]), min_size=1),
    st.dictionaries(st.sampled_from(["c1", "c2", "c3"]), st.sampled_from(["k1", "k2"])),
    st.lists(st.sampled_from(["main", "dev", "x"]), unique=True),
)
def test_after_what_was_wanted_is_made_nothing_is_wanted(
    watched: dict[str, str], keys: dict[str, str], with_parent: list[str]
) -> None:
    mine = [parent("octo-org/hello", branch, "k0") for branch in with_parent]
    look = Look("main", watched)
    wanted = plan(look, keys, mine=mine)
    assert len({w.branch for w in wanted}) == len(wanted)
    for one in wanted:
        mine = [p for p in mine if p.branch != one.branch]
        mine.append(parent("octo-org/hello", one.branch, one.key))
    assert plan(look, keys, mine=mine) == []
