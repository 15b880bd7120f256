"""What listings said last, by their ETag: an unchanged one is answered with 304, which costs nothing of the rate limit.

Only what was read out of an answer is kept, never its body: a page of runs is a megabyte, their numbers are not.
GitHub's ETags are per page and differ with the token, so an App's hourly new token makes each listing cost one call.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

MOST_KEPT = 20_000


class Kept(msgspec.Struct, Generic[T], frozen=True):
    """``items`` are what was read out of the answer that had this ``etag``, one page ``length`` long."""

    etag: str
    items: Sequence[T]
    length: int


class Conditional:
    """The last answers with at most ``most`` items in all, the least recently used forgotten first."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._items = 0
        self._kept: OrderedDict[tuple[str, ...], Kept[Any]] = OrderedDict()

    def find(self, bucket: str, target: str, params: Mapping[str, str]) -> Kept[Any] | None:
        """What this call answered last, for these credentials."""
        key = _key(bucket, target, params)
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(
        self,
        bucket: str,
        target: str,
        params: Mapping[str, str],
        etag: str | None,
        items: Sequence[Any],
        length: int,
    ) -> None:
        """Remember an answer; one without an ETag only makes forgotten what was known."""
        key = _key(bucket, target, params)
        self._drop(self._kept.pop(key, None))
        if etag is None:
            return
        self._kept[key] = Kept(etag, items, length)
        self._items += 1 + len(items)
        while self._items > self._most:
            self._drop(self._kept.popitem(last=False)[1])

    def _drop(self, kept: Kept[Any] | None) -> None:
        self._items -= 1 + len(kept.items) if kept is not None else 0


def _key(bucket: str, target: str, params: Mapping[str, str]) -> tuple[str, ...]:
    return (bucket, target, *(f"{name}={value}" for name, value in sorted(params.items())))
