"""Draining: a host takes no new work and finishes what runs.

An operator's order (``microvm drain``) stands in the host's row and holds, restarts too, until it is undone; a service
that is about to end drains its host until the next start. Either way nothing is placed there, and runners that have no
job yet are let go: the forge is asked first, and when it says that one is busy, that one stays.
"""

from collections.abc import Iterable, Sequence

from runner_service.domain import Host, Runner, TimelineRow, timeline
from runner_service.ingest import Books

CODE = "draining"


def without_work(runners: Iterable[Runner], hosts: Iterable[Host]) -> list[Runner]:
    """The runners on draining hosts that have no job yet and were not let go before. Pure."""
    draining = {host.name for host in hosts if host.draining}
    return [runner for runner in runners if runner.host in draining and runner.covers]


def release(books: Books, hosts: Sequence[Host], now: float) -> None:
    """Let go what has no work yet; the jobs these runners were made for wait for another."""
    for runner in without_work(books.runners.values(), hosts):
        books.tell(runner.id, cancelled_at=now, code=CODE)
        books.lines.append(_told(runner, now))


def _told(runner: Runner, now: float) -> TimelineRow:
    return timeline(
        runner, now, "released", f"{runner.host} is draining and it has no job yet", "another runner"
    )
