"""The queue by name: who waits how long for what, in rows that are few however many jobs wait."""

from collections.abc import Collection, Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Job
from runner_service.store.rows import as_struct, chunks, columns
from runner_service.store.schema import FRUITLESS, HELD, jobs, runners

_JOB = columns(jobs, Job)
_LINE = (jobs.c.group_key, jobs.c.owner, jobs.c.repo)
# As ``Runner.covers``: it may still take the job it was made for, or took one that no event named yet.
_COVERS = sa.and_(
    sa.or_(
        runners.c.state.in_(("forking", "registering", "idle")),
        sa.and_(runners.c.state == "busy", runners.c.job_done_at.is_(None)),
    ),
    runners.c.serving_job_id.is_(None),
    runners.c.cancelled_at.is_(None),
    runners.c.killed_at.is_(None),
)
_SERVED = sa.and_(jobs.c.state == "queued", jobs.c.group_key.is_not(None))


class Waiting(msgspec.Struct, frozen=True):
    """``count`` queued jobs of one repository and group; ``oldest`` is when the first of them was queued."""

    group: str
    owner: str
    repo: str
    count: int
    oldest: float

    @property
    def repository(self) -> str:
        return f"{self.owner}/{self.repo}"


class Fruitless(msgspec.Struct, frozen=True):
    """A queued job for which ``count`` runners were made that ended without any job, the last of them at ``last``."""

    job_id: str
    group: str
    owner: str
    repo: str
    count: int
    last: float


async def waiting(db: AsyncConnection) -> list[Waiting]:
    """All queued jobs that a template serves, counted by group and repository; a row for each of these."""
    query = sa.select(*_LINE, sa.func.count(), sa.func.min(jobs.c.event_at)).where(_SERVED).group_by(*_LINE)
    return [Waiting(*row) for row in await db.execute(query)]


async def oldest_jobs(db: AsyncConnection, line: Waiting, limit: int) -> list[Job]:
    """The jobs of ``line`` without a runner that have waited longest, in this order."""
    mine = (jobs.c.group_key == line.group, jobs.c.owner == line.owner, jobs.c.repo == line.repo)
    query = (
        sa.select(*_JOB)
        .where(jobs.c.state == "queued", *mine, ~_has_runner(jobs))
        .order_by(jobs.c.event_at, jobs.c.id)
        .limit(limit)
    )
    return [as_struct(row, Job) for row in await db.execute(query)]


async def newest_jobs(
    db: AsyncConnection, owner: str, repo: str, groups: Collection[str], limit: int
) -> list[Job]:
    """The jobs of a repository in these groups that have waited shortest."""
    query = (
        sa.select(*_JOB)
        .where(
            jobs.c.state == "queued",
            jobs.c.group_key.in_(groups),
            jobs.c.owner == owner,
            jobs.c.repo == repo,
        )
        .order_by(jobs.c.event_at.desc(), jobs.c.id.desc())
        .limit(limit)
    )
    return [as_struct(row, Job) for row in await db.execute(query)]


async def heads(db: AsyncConnection, limit: int) -> list[Job]:
    """Of each group and repository the first job without a runner; of the ``limit`` that have waited longest."""
    lines = (
        sa.select(*_LINE, sa.func.min(jobs.c.event_at).label("oldest"))
        .where(_SERVED)
        .group_by(*_LINE)
        .order_by(sa.text("oldest"))
        .limit(limit)
        .subquery()
    )
    one = jobs.alias()
    first = (
        sa.select(one.c.id)
        .where(
            one.c.state == "queued",
            one.c.group_key == lines.c.group_key,
            one.c.owner == lines.c.owner,
            one.c.repo == lines.c.repo,
            ~_has_runner(one),
        )
        .order_by(one.c.event_at)
        .limit(1)
        .scalar_subquery()
    )
    query = sa.select(*_JOB).where(jobs.c.id.in_(sa.select(first).select_from(lines)))
    return [as_struct(row, Job) for row in await db.execute(query)]


async def held_jobs(db: AsyncConnection, limit: int) -> list[Job]:
    """The oldest of the jobs that stand outside the queue because it is full."""
    query = sa.select(*_JOB).where(HELD).order_by(jobs.c.event_at, jobs.c.id).limit(limit)
    return [as_struct(row, Job) for row in await db.execute(query)]


async def fruitless_jobs(db: AsyncConnection, *, since: float, least: int, limit: int) -> list[Fruitless]:
    """Queued jobs of which ``least`` runners or more ended without any job since that moment."""
    ended = (
        sa.select(
            runners.c.job_id, sa.func.count().label("made"), sa.func.max(runners.c.ended_at).label("last")
        )
        .where(FRUITLESS, runners.c.ended_at >= since, runners.c.job_id.is_not(None))
        .group_by(runners.c.job_id)
        .having(sa.func.count() >= least)
        .subquery()
    )
    query = (
        sa.select(jobs.c.id, *_LINE, ended.c.made, ended.c.last)
        .join(ended, ended.c.job_id == jobs.c.id)
        .where(_SERVED)
        .order_by(ended.c.last.desc())
        .limit(limit)
    )
    return [Fruitless(*row) for row in await db.execute(query)]


async def repositories_of(db: AsyncConnection, job_ids: Sequence[str]) -> dict[str, str]:
    """For each of these jobs its ``owner/repo``."""
    found: dict[str, str] = {}
    for chunk in chunks(job_ids):
        query = sa.select(jobs.c.id, jobs.c.owner, jobs.c.repo).where(jobs.c.id.in_(chunk))
        found.update((row.id, f"{row.owner}/{row.repo}") for row in await db.execute(query))
    return found


def _has_runner(one: sa.FromClause) -> sa.Exists:
    return sa.exists().where(runners.c.job_id == one.c.id, _COVERS)


async def warm_up(db: AsyncConnection, job: Job) -> None:
    """Run the statements of an ordinary pass once."""
    await waiting(db)
    await oldest_jobs(db, Waiting(job.group_key or "", job.owner, job.repo, 1, 0.0), 1)
    await heads(db, 1)
    await held_jobs(db, 1)
    await fruitless_jobs(db, since=0.0, least=1, limit=1)
