"""The hosts of the fleet as operators see them, and the order to drain one."""

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.store.schema import hosts, runners


class HostState(msgspec.Struct, frozen=True, kw_only=True):
    """A host and what is on it. Times are Unix seconds; ``drain_ordered_at``: an operator's order that holds now.

    ``stopping``: its service is ending, or has ended. ``drained``: it is draining and nothing is left on it.
    """

    name: str
    seen_at: float
    max_vms: int
    draining: bool
    drained: bool
    drain_ordered_at: float | None
    stopping: bool
    runners: dict[str, int]

    @property
    def left(self) -> int:
        """Runners that are not gone yet."""
        return sum(self.runners.values())


async def order_drain(db: AsyncConnection, name: str, at: float | None) -> bool:
    """Let the host take no new work from ``at`` on, or (None) take it again; False when there is no such host."""
    ordered = at if at is None else sa.func.coalesce(hosts.c.drain_ordered_at, at)
    update = sa.update(hosts).where(hosts.c.name == name).values(drain_ordered_at=ordered)
    return (await db.execute(update.returning(hosts.c.name))).first() is not None


async def host_states(db: AsyncConnection) -> list[HostState]:
    """All hosts that were ever here, by name."""
    counts: dict[str, dict[str, int]] = {}
    count = sa.select(runners.c.host, runners.c.state, sa.func.count()).where(
        runners.c.state != "gone", runners.c.host.is_not(None)
    )
    for name, state, number in await db.execute(count.group_by(runners.c.host, runners.c.state)):
        counts.setdefault(name, {})[state] = number
    found: list[HostState] = []
    for row in await db.execute(sa.select(hosts).order_by(hosts.c.name)):
        draining = row.draining or row.drain_ordered_at is not None
        found.append(
            HostState(
                name=row.name,
                seen_at=row.seen_at,
                max_vms=row.max_vms,
                draining=draining,
                drained=draining and not counts.get(row.name),
                drain_ordered_at=row.drain_ordered_at,
                stopping=row.draining,
                runners=counts.get(row.name, {}),
            )
        )
    return found
