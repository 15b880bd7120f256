"""Names of snapshots: whatever a branch is called, its name is found again and is no path out of its directory."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_core.errors import BadRequest
from vmm_core.names import Names, check_name

A, B = "a" * 64, "b" * 64
LONG = "octo-org/hello@" + "ü/" * 66 + "ü"


@pytest.fixture
def names(tmp_path: Path) -> Names:
    (tmp_path / "names").mkdir()
    return Names(tmp_path / "names")


GOOD = [
    "python-ci",
    "octo-org/hello@main",
    "octo-org/.github@main",
    "group/sub/group/repo@feature/a@b",
    "o/r@release-1.2",
    "o/r@%2e%2e%2fescape",
    "o/r@@@",
    "o/r@" + "x" * 200,
    "o/r@weiß-日本",
    LONG,
]  # fmt: skip
BAD = [
    "", ".", "..", "-x", "Python", "a b", "a/b", "x" * 101, "../x", "x\n", "x\0",
    "o/r@", "o/r@@", "@main", "o@main", "/o/r@main", "o/r/@main", "O/r@main", "o/..@main", "o/.@main", "o/../r@main",
    "../r@main", "o//r@main", "o/r@/x", "o/r@x/", "o/r@x//y", "o/r@..", "o/r@a/../b", "o/r@.x", "o/r@a/.b",
    "o/r@x.lock", "o/r@x.lock/y", "o/r@x.", "o/r@a b", "o/r@a\nb", "o/r@a\0b", "o/r@a~1", "o/r@a^", "o/r@a:b",
    "o/r@a?", "o/r@a*", "o/r@a[", "o/r@a\\b", "o/r@a@{1}", "o/r@-x", "o/r@" + "x" * 201, "o/r@" + "ü" * 101,
    "o/r@\udcff", "o/" + "r" * 101 + "@main", "a/" * 150 + "r@main",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_name_means_what_it_was_set_to_last_until_it_is_unset(names: Names, name: str) -> None:
    names.set(name, A)
    assert names.all() == {name: A}
    names.set(name, B)
    assert names.all() == {name: B}
    names.unset(name)
    assert names.all() == {}
    names.unset(name)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_name_is_refused_and_nothing_is_made(names: Names, name: str) -> None:
    with pytest.raises(BadRequest, match="is no name of a snapshot"):
        names.set(name, A)
    for asking in (check_name, names.unset):
        with pytest.raises(BadRequest, match="is no name of a snapshot"):
            asking(name)
    assert names.all() == {}


@settings(deadline=None)  # each name is brought to storage
@given(st.text(alphabet=st.characters(exclude_categories=()), max_size=260))
def test_no_branch_leaves_the_directory(tmp_path_factory: pytest.TempPathFactory, branch: str) -> None:
    root = tmp_path_factory.mktemp("pool")
    (root / "names").mkdir()
    names = Names(root / "names")
    try:
        names.set(f"o/r@{branch}", A)
    except BadRequest:
        assert names.all() == {}
    else:
        assert names.all() == {f"o/r@{branch}": A}
        assert len(os.listdir(root / "names")) == 1
    assert os.listdir(root) == ["names"]


def test_names_that_are_alike_are_not_the_same(names: Names) -> None:
    alike = ["o/r@a%2Fb", "o/r@a/b", "o/r@A/b", LONG, LONG[:-1] + "u"]
    for number, name in enumerate(alike):
        names.set(name, f"{number}" * 64)
    assert names.all() == {name: f"{number}" * 64 for number, name in enumerate(alike)}
    names.forget("3" * 64)
    assert set(names.all()) == set(alike) - {LONG}


def test_what_else_lies_in_the_directory_is_no_name(names: Names, tmp_path: Path) -> None:
    (tmp_path / "names" / "file").write_text("x")
    (tmp_path / "names" / ".draft").symlink_to("../snapshots/" + A)
    assert names.all() == {}
