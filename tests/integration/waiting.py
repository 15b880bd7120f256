"""How long a job waited without a cause: what the books say of its time in the queue, against the forge's own times.

Jobs with the same labels in one place are served alike, so the forge gives each runner to the oldest of them. At any
moment the n-th oldest waits for good reason when n runners for jobs like it are on their way, or a cause is named.
"""

import itertools
from collections.abc import Iterable

import msgspec


class Waited(msgspec.Struct, frozen=True):
    """A job in the queue of ``group``, from ``queued`` until ``taken`` (Unix seconds), by the forge's own clock."""

    job: str
    group: str
    queued: float
    taken: float


class Span(msgspec.Struct, frozen=True):
    """Something was so from ``start`` to ``end``, for one job, for a group, or (both None) for all."""

    start: float
    end: float
    why: str
    group: str | None = None
    job: str | None = None


def unexplained(
    waited: Waited, alike: Iterable[Waited], under_way: Iterable[Span], causes: Iterable[Span]
) -> list[tuple[float, float]]:
    """The stretches of its time in the queue for which neither a runner under way nor a cause can be named.

    ``alike``: the jobs of its group. ``under_way``: from when to when a runner of its group was made.
    """
    older = [one for one in alike if (one.queued, one.job) < (waited.queued, waited.job)]
    made = [span for span in under_way if span.group == waited.group]
    excused = [
        span for span in causes
        if span.group in (None, waited.group) and span.job in (None, waited.job)
    ]  # fmt: skip
    moments = {waited.queued, waited.taken}
    for span in (*made, *excused):
        moments |= {span.start, span.end}
    moments |= {one.taken for one in older}
    ordered = sorted(moment for moment in moments if waited.queued <= moment <= waited.taken)
    gaps: list[tuple[float, float]] = []
    for start, end in itertools.pairwise(ordered):
        middle = (start + end) / 2
        if any(span.start <= middle < span.end for span in excused):
            continue
        rank = 1 + sum(one.taken > middle for one in older)
        if sum(span.start <= middle < span.end for span in made) >= rank:
            continue
        if gaps and gaps[-1][1] == start:
            gaps[-1] = (gaps[-1][0], end)
        else:
            gaps.append((start, end))
    return gaps


def seconds(gaps: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in gaps)
