"""Patterns of repositories, as ``owner/*``: what fits one, and whether one repository can fit two. Pure."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache


def fits(path: str, patterns: Iterable[str]) -> bool:
    """Whether ``owner/repo`` (in any case, as GitHub compares) fits one of the patterns."""
    return any(fnmatchcase(path.lower(), pattern.lower()) for pattern in patterns)


def owner_fits(owner: str, patterns: Iterable[str]) -> bool:
    """Whether the owner fits the owner's part of one of the patterns."""
    return fits(owner, (pattern.partition("/")[0] for pattern in patterns))


def overlap(one: str, other: str) -> bool:
    """Whether some repository may fit both. ``[…]`` counts as any character: then it may say so too often."""
    return _meet(_tokens(one.lower()), _tokens(other.lower()))


def _tokens(pattern: str) -> tuple[str, ...]:
    """One token a place: a character, ``?`` for any, ``*`` for any number of them."""
    found: list[str] = []
    at = 0
    while at < len(pattern):
        end = pattern.find("]", at + 2) if pattern[at] == "[" else -1
        found.append("?" if end > 0 else pattern[at] if pattern[at] in "*?" else f"={pattern[at]}")
        at = end + 1 if end > 0 else at + 1
    return tuple(found)


def _meet(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    @cache
    def meet(i: int, j: int) -> bool:
        a = one[i] if i < len(one) else None
        b = other[j] if j < len(other) else None
        if a is None and b is None:
            return True
        if a == "*":
            return meet(i + 1, j) or (b is not None and meet(i, j + 1))
        if b == "*":
            return meet(i, j + 1) or (a is not None and meet(i + 1, j))
        if a is None or b is None:
            return False
        return (a == b or "?" in (a, b)) and meet(i + 1, j + 1)

    return meet(0, 0)
