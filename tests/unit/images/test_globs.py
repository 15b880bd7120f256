"""Globs of branches and directories, as forges read them, and in bounded time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.globs import covers, matches


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("main", "main", True),
        ("main", "main2", False),
        ("*", "main", True),
        ("*", "release/1", False),
        ("release/*", "release/1", True),
        ("release/*", "release/1/x", False),
        ("release/**", "release/1/x", True),
        ("**", "a/b/c", True),
        ("**/fix", "fix", True),
        ("**/fix", "a/b/fix", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("v[0-9].x", "v1.x", True),
        ("Main", "main", False),
    ],
)
def test_a_pattern_fits_the_whole_name(pattern, name, fits):
    assert matches(pattern, name) is fits


@pytest.mark.parametrize(
    ("pattern", "directory", "below", "above"),
    [
        ("apps", "apps", True, True),
        ("apps/", "apps/web/src", True, True),
        ("./apps", "apps", True, True),
        ("apps/*", "apps", False, True),
        ("apps/*", "apps/web/src", True, True),
        ("apps", "apps2", False, False),
        ("apps/web", "", False, True),
        ("**/web", "x/y", False, True),
        (".", "anything/below", True, True),
    ],
)
def test_a_directory_covers_what_is_below(pattern, directory, below, above):
    assert covers(pattern, directory) is below
    assert covers(pattern, directory, above=True) is above


names = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=5).map("/".join)


@given(names, names)
def test_names_without_stars_fit_only_themselves(one, other):
    assert matches(one, other) == (one == other)
    assert covers(one, other) == (other + "/").startswith(one + "/")


def test_a_hostile_pattern_takes_no_longer():
    started = time.perf_counter()
    assert not matches("/".join(["**", "a"] * 50), "/".join(["a"] * 400 + ["b"]))
    assert not matches("*a" * 100 + "c", "a" * 250)
    assert time.perf_counter() - started < 2
