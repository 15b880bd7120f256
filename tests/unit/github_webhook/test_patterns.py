"""Patterns of repositories: what fits, and whether two patterns can meet."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook.patterns import fits, overlap, owner_fits

_PATTERN = st.text("ab*?", min_size=1, max_size=6)


def test_case_is_nothing_and_a_star_is_anything() -> None:
    assert fits("Acme/Web", ["acme/*"]) and fits("acme/web", ["x/y", "ACME/w*b"])
    assert not fits("acme-2/web", ["acme/*"]) and not fits("acme/web", [])
    assert owner_fits("Acme", ["acme/web"]) and not owner_fits("other", ["acme/web"])


@given(_PATTERN, _PATTERN, st.text("ab", max_size=8))
def test_what_fits_both_makes_them_overlap(one: str, other: str, path: str) -> None:
    if fits(path, [one]) and fits(path, [other]):
        assert overlap(one, other) and overlap(other, one)


@given(_PATTERN, _PATTERN)
def test_patterns_that_overlap_have_something_in_common(one: str, other: str) -> None:
    """A pattern without stars is searched for in the other by brute force."""
    if overlap(one, other) and "*" not in one:
        words = [""]
        for character in one:
            words = [word + made for word in words for made in ("ab" if character == "?" else character)]
        assert any(fits(word, [other]) for word in words)


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("acme/*", "acme/web", True),
        ("acme/*", "other/*", False),
        ("*/*", "acme/web", True),
        ("acme/web-*", "acme/*-api", True),
        ("acme/web", "ACME/Web", True),
        ("acme/[ab]", "acme/c", True),
        ("acme/[ab]", "acme/cc", False),
        ("acme-*/x", "acme/x", False),
    ],
)
def test_examples(one: str, other: str, meet: bool) -> None:
    assert overlap(one, other) is meet and overlap(other, one) is meet
    assert re.fullmatch(r"[^/]+/[^/]+", one)
