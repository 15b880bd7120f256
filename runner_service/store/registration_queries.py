"""Queries about registrations: where a host's runners registered, which of them should be listed there."""

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Job, Runner, Scope
from runner_service.store.rows import as_struct, columns
from runner_service.store.schema import jobs, runners

MOST_SCOPES = 1000
MOST_JOBS = 1000

_JOB = columns(jobs, Job)
_RUNNER = columns(runners, Runner)


async def used_scopes(db: AsyncConnection, host: str, since: float) -> list[tuple[str, Scope, float]]:
    """Forge and scope of this host's runners that are not gone, or went since then, and when one was last there."""
    at = sa.func.max(sa.func.coalesce(runners.c.ended_at, runners.c.state_at)).label("at")
    query = (
        sa.select(runners.c.forge, runners.c.scope_kind, runners.c.scope_path, at)
        .where(
            runners.c.host == host,
            sa.or_(runners.c.state != "gone", runners.c.ended_at >= since),
        )
        .group_by(runners.c.forge, runners.c.scope_kind, runners.c.scope_path)
        .order_by(at.desc())
        .limit(MOST_SCOPES)
    )
    return [(row.forge, Scope(row.scope_kind, row.scope_path), row.at) for row in await db.execute(query)]


async def registered_runners(db: AsyncConnection, host: str, forge: str, scope: Scope) -> list[Runner]:
    """This host's runners of a scope that wait for a job with a registration."""
    query = sa.select(*_RUNNER).where(
        runners.c.host == host,
        runners.c.forge == forge,
        runners.c.scope_kind == scope.kind,
        runners.c.scope_path == scope.path,
        runners.c.state.in_(("registering", "idle")),
        runners.c.remote_id.is_not(None),
    )
    return [as_struct(row, Runner) for row in await db.execute(query)]


async def open_jobs_of(db: AsyncConnection, forge: str, scope: Scope) -> list[Job]:
    """The jobs of a scope that no runner of ours runs: queued, or waiting for an approval."""
    query = (
        sa.select(*_JOB)
        .where(
            jobs.c.forge == forge,
            jobs.c.scope_kind == scope.kind,
            jobs.c.scope_path == scope.path,
            jobs.c.state.in_(("queued", "waiting")),
        )
        .order_by(jobs.c.event_at)
        .limit(MOST_JOBS)
    )
    return [as_struct(row, Job) for row in await db.execute(query)]
