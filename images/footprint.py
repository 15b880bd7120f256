"""How many bytes of the pool snapshots hold, each alone or together: files that share blocks, counted once.

Every stretch of the device belongs to a set of snapshots. What removing one gives back are the stretches that belong
to it and to none of those that stay, so what a whole row of removals would give back is known before the first.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from vmm_core.disk import extents

_INDEX_BITS = 20


class Footprint:
    """Bytes by the set of snapshots that hold them; a set is a bit mask."""

    def __init__(self, digests: Iterable[str], bytes_of: Mapping[int, int]) -> None:
        self._bits = {digest: 1 << index for index, digest in enumerate(digests)}
        self._bytes_of = bytes_of

    def total(self, digests: Collection[str]) -> int:
        """Bytes that at least one of these holds."""
        mask = self._mask(digests)
        return sum(count for owners, count in self._bytes_of.items() if owners & mask)

    def alone(self, digest: str, among: Collection[str]) -> int:
        """Bytes that this one holds and no other ``among`` those that are there, nor any other file of the pool."""
        bit = self._bits.get(digest, 0)
        rivals = self._mask(among) & ~bit | self._elsewhere
        return sum(count for owners, count in self._bytes_of.items() if owners & bit and not owners & rivals)

    @property
    def _elsewhere(self) -> int:
        return 1 << len(self._bits)

    def _mask(self, digests: Collection[str]) -> int:
        mask = 0
        for digest in digests:
            mask |= self._bits.get(digest, 0)
        return mask


def files_of(directory: Path) -> list[Path]:
    """The files of a snapshot; none when it has been removed."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def measure(files: Mapping[str, Iterable[Path]]) -> Footprint:
    """Of snapshots by digest, with the files of each. Blocking: some microseconds an extent."""
    bytes_of: dict[int, int] = {}
    edges: list[int] = []
    for index, paths in enumerate(files.values()):
        own, shared = _placed(paths)
        bytes_of[1 << index] = bytes_of.get(1 << index, 0) + own
        for start, end in _joined(shared):
            edges += (start << _INDEX_BITS | index, end << _INDEX_BITS | index)
    edges.sort()
    elsewhere = 1 << len(files)
    owners = position = 0
    for edge in edges:
        offset, index = edge >> _INDEX_BITS, edge & (1 << _INDEX_BITS) - 1
        if owners and offset > position:
            # Shared, yet by none of ours: by the disk of a VM, or by a file of the cache.
            held = owners if owners & owners - 1 else owners | elsewhere
            bytes_of[held] = bytes_of.get(held, 0) + offset - position
        position = offset
        owners ^= 1 << index
    return Footprint(files, bytes_of)


def _placed(paths: Iterable[Path]) -> tuple[int, list[tuple[int, int]]]:
    """Bytes that no other file holds, and the stretches that others hold too."""
    own = 0
    shared: list[tuple[int, int]] = []
    for path in paths:
        try:
            placed, rest = extents(path)
        except FileNotFoundError:
            continue  # removed meanwhile
        own += rest
        for start, length, is_shared in placed:
            if is_shared:
                shared.append((start, start + length))
            else:
                own += length
    return own, shared


def _joined(stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in as few stretches as can be, none of which overlap."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(stretches):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
