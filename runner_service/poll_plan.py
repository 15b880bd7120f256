"""Which repositories are looked at next, and how often. Pure: a forge's rate limit is shared with registrations.

Repositories with a job within a day are looked at every interval, the others in turn with what is left. The interval
stretches when the rate limit does not suffice: half of it is never spent on looking.
"""

from collections.abc import Iterable, Sequence

import msgspec

RECENT_SECONDS = 86400.0
SHARE = 0.5
CALLS_A_SECOND = 5.0
"""A third of GitHub's secondary limit of 900 points a minute, of which a GET costs one, answered with 304 or not."""

_SMOOTHING = 0.1
_SAVED_SECONDS = 30.0


class Allowance(msgspec.Struct, frozen=True):
    """A primary rate limit as the forge told it last: calls per hour, those left, when it begins anew (Unix s)."""

    limit: int
    remaining: int
    reset_at: float

    def spare(self) -> float:
        """Calls that looking may still take."""
        return self.remaining - SHARE * self.limit


class Seen(msgspec.Struct, kw_only=True):
    """A repository, and what is remembered of looking at it. Times are Unix seconds; 0: never.

    A look takes ``calls`` as of the last time, of which ``paid`` count against the rate limit on average.
    ``after`` is where the last look ended early.
    """

    owner: str
    repo: str
    used_at: float = 0.0
    looked_at: float = 0.0
    complete_at: float = 0.0
    calls: float = 3.0
    paid: float = 0.0
    after: int = 0
    failures: int = 0
    retry_at: float = 0.0

    @property
    def cost(self) -> float:
        """What the next look is expected to cost: the first one knows no ETags."""
        return self.paid if self.looked_at else self.calls

    def count(self, calls: int, paid: int, *, first: bool) -> None:
        """Learn from a look."""
        self.calls = float(calls)
        if not first:
            self.paid += _SMOOTHING * (paid - self.paid)

    def recent(self, now: float) -> bool:
        return now - self.used_at < RECENT_SECONDS


class Pace(msgspec.Struct, frozen=True):
    """Every how many seconds recent repositories are looked at, and why it is not more often ("" when it need not)."""

    interval: float
    reason: str = ""


def pace(recent: Iterable[Seen], allowance: Allowance | None, every: float, now: float) -> Pace:
    """The shortest interval of at least ``every`` seconds that the limits allow for these repositories together."""
    repositories = list(recent)
    by_calls = sum(seen.calls for seen in repositories) / CALLS_A_SECOND
    if allowance is None:
        by_limit = 0.0
    elif (spare := allowance.spare()) < 1.0:
        left = max(0.0, allowance.reset_at - now)
        return Pace(
            max(every, left),
            f"the rate limit leaves {allowance.remaining} of {allowance.limit} calls: they are kept for runners",
        )
    else:
        by_limit = sum(seen.paid for seen in repositories) * max(1.0, allowance.reset_at - now) / spare
    interval = max(every, by_calls, by_limit)
    if interval == every:
        return Pace(every)
    which = "the rate limit" if by_limit >= by_calls else "the limit of calls a minute"
    return Pace(interval, f"{which} does not suffice for {len(repositories)} repositories")


def choose(
    repositories: Sequence[Seen], allowance: Allowance | None, every: float, since: float, now: float
) -> tuple[Pace, list[Seen]]:
    """What is to be looked at now, the most recently used first; ``since`` is when something was chosen last."""
    recent = [seen for seen in repositories if seen.recent(now)]
    chosen_pace = pace(recent, allowance, every, now)
    spare = allowance.spare() if allowance is not None else float("inf")
    chosen: list[Seen] = []
    for seen in sorted(recent, key=lambda seen: -seen.used_at):
        if _due(seen, chosen_pace.interval, now) and (not seen.cost or seen.cost <= spare) and spare >= 0.0:
            chosen.append(seen)
            spare -= seen.cost
    # What the recent ones leave, as far as it has come together since the last time.
    elapsed = min(max(0.0, now - since), _SAVED_SECONDS)
    interval = chosen_pace.interval
    calls = (CALLS_A_SECOND - sum(seen.calls for seen in recent) / interval) * elapsed
    costs = spare
    if allowance is not None:
        per_second = max(0.0, spare) / max(1.0, allowance.reset_at - now)
        costs = (per_second - sum(seen.paid for seen in recent) / interval) * elapsed
    others = (seen for seen in repositories if not seen.recent(now) and _due(seen, every, now))
    for seen in sorted(others, key=lambda seen: seen.looked_at):
        if calls < seen.calls or costs < seen.cost:
            break
        calls -= seen.calls
        costs -= seen.cost
        chosen.append(seen)
    return chosen_pace, chosen


def _due(seen: Seen, interval: float, now: float) -> bool:
    return now >= seen.looked_at + interval and now >= seen.retry_at
