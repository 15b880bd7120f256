"""Globs over names with slashes, as forges have them for branches: ``*`` stays between slashes, ``**`` does not.

``**`` counts as a whole part (``release/**``); elsewhere it is a ``*``. Patterns come from repositories: the time
a match takes is bounded by the product of the two lengths.
"""

from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether the whole name fits, as the branch ``release/1.2`` fits ``release/*``."""
    return len(name.split("/")) in _reached(pattern.split("/"), name.split("/"))[-1]


def covers(pattern: str, directory: str, *, above: bool = False) -> bool:
    """Whether the directory is one that fits, or is below one. ``above``: or could hold one that fits.
    The root is ``""`` or ``.``, and covers everything."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    names = [name for name in directory.split("/") if name not in ("", ".")]
    rows = _reached(parts, names)
    return bool(rows[-1]) or (above and any(len(names) in row for row in rows))


def _reached(parts: list[str], names: list[str]) -> list[set[int]]:
    """Row by row: how many names the first n parts may have used up."""
    rows = [{0}]
    for part in parts:
        last = rows[-1]
        if part == "**":
            rows.append(set(range(min(last), len(names) + 1)) if last else set())
        else:
            rows.append({used + 1 for used in last if used < len(names) and fnmatchcase(names[used], part)})
    return rows
