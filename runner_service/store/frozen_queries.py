"""The queries on VMs of failed jobs that are kept frozen. SQLite and PostgreSQL alike."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.store.rows import as_struct, columns, insert_into
from runner_service.store.schema import frozen

KeptState = Literal["freezing", "frozen", "removing", "removed"]


class KeptVm(msgspec.Struct, frozen=True, kw_only=True):
    """The VM of a failed job, as one row. ``id`` is the VM's; ``bytes`` is what it alone takes of the pool.

    freezing ─► frozen ─► removing ─► removed     ``why`` says what for: its time, a limit, an operator
        └──────────────────────────────┘          it could not be frozen, or ended before it was

    The row is written before the files are made and closed after they are gone, so no crash leaves files without one.
    ``folder`` is the job's work folder in the guest. Times are Unix seconds.
    """

    id: str
    host: str
    job_id: str
    runner_id: str
    repository: str
    owner: str
    folder: str
    state: KeptState
    digest: str | None = None
    bytes: int | None = None
    created_at: float
    expires_at: float
    removed_at: float | None = None
    why: str | None = None


_KEPT = columns(frozen, KeptVm)


async def begin(db: AsyncConnection, kept: KeptVm) -> None:
    """Before a freeze, which may be the second try after a crash."""
    values = msgspec.structs.asdict(kept)
    insert = insert_into(db, frozen).values(**values)
    await db.execute(insert.on_conflict_do_update(index_elements=["id"], set_=values))


async def change(db: AsyncConnection, vm_id: str, was: Sequence[KeptState], **values: Any) -> KeptVm | None:
    """Write ``values`` if the row is in one of these states; else None."""
    update = (
        sa.update(frozen)
        .where(frozen.c.id == vm_id, frozen.c.state.in_(was))
        .values(**values)
        .returning(*_KEPT)
    )
    row = (await db.execute(update)).one_or_none()
    return None if row is None else as_struct(row, KeptVm)


async def kept_on(db: AsyncConnection, host: str) -> list[KeptVm]:
    """What is not removed yet on a host, oldest first."""
    query = (
        sa.select(*_KEPT)
        .where(frozen.c.host == host, frozen.c.state != "removed")
        .order_by(frozen.c.created_at, frozen.c.id)
    )
    return [as_struct(row, KeptVm) for row in await db.execute(query)]


async def list_kept(db: AsyncConnection, limit: int) -> list[KeptVm]:
    """What is not removed yet on any host, newest first."""
    query = (
        sa.select(*_KEPT)
        .where(frozen.c.state != "removed")
        .order_by(frozen.c.created_at.desc(), frozen.c.id)
        .limit(limit)
    )
    return [as_struct(row, KeptVm) for row in await db.execute(query)]


async def find(db: AsyncConnection, ref: str) -> KeptVm | None:
    """The VM of this id, or the newest of the job of this id; also one that was removed."""
    query = (
        sa.select(*_KEPT)
        .where(sa.or_(frozen.c.id == ref, frozen.c.job_id == ref))
        .order_by(frozen.c.created_at.desc())
        .limit(1)
    )
    row = (await db.execute(query)).one_or_none()
    return None if row is None else as_struct(row, KeptVm)
