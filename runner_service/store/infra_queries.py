"""The queries on jobs whose infrastructure failed, and on their re-runs. SQLite and PostgreSQL alike."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Job, Runner
from runner_service.infrastructure import GUEST_OOM
from runner_service.store.rows import as_struct, chunks, columns, insert_into
from runner_service.store.schema import infra_failures, jobs, runners

RerunState = Literal["off", "wanted", "asked", "done", "needless", "given_up"]


class InfraFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A job whose infrastructure failed under it, as one row; unique per job.

    wanted ─► asked ─► done      the forge was asked to run it again ─► and does, as ``rerun_job_id``
      │         └────► given_up  it was not seen, or never allowed, within ``deadline``
      ├──────────────► needless  it succeeded after all, or somebody cancelled its run
    off                          not configured, not worth it, or it was a re-run itself; ``rerun_why`` says which
    """

    job_id: str
    runner_id: str
    at: float
    code: str
    reason: str
    rerun: RerunState
    rerun_why: str = ""
    rerun_job_id: str | None = None
    tries: int = 0
    next_at: float | None = None
    deadline: float | None = None


_FAILURE = columns(infra_failures, InfraFailure)
_JOB = columns(jobs, Job)
_RUNNER = columns(runners, Runner)


async def unnoticed(db: AsyncConnection, since: float, limit: int) -> list[tuple[Job, Runner]]:
    """Jobs that a failure of infrastructure ended and nobody has noted yet, with the runners that were lost.

    ``since``: only of what ended, or was heard of, after this. A job that succeeded was not harmed.
    """
    harmed = sa.and_(
        runners.c.infra.is_not(None),
        sa.or_(jobs.c.conclusion.is_(None), jobs.c.conclusion != "success"),
        # What ran out of memory in the guest need not have been the job: the forge says whether that failed.
        sa.or_(runners.c.infra != GUEST_OOM, jobs.c.conclusion == "failure"),
        ~sa.exists().where(infra_failures.c.job_id == jobs.c.id),
    )
    ended = sa.or_(runners.c.state == "retiring", runners.c.ended_at > since)
    queries = (
        sa.select(jobs.c.id, runners.c.id)
        .join(runners, runners.c.serving_job_id == jobs.c.id)
        .where(harmed, ended)
        .limit(limit),
        sa.select(jobs.c.id, runners.c.id)
        .join(runners, runners.c.id == jobs.c.runner_id)
        .where(harmed, jobs.c.updated_at > since)
        .limit(limit),
    )
    pairs = {row[0]: row[1] for query in queries for row in await db.execute(query)}
    found_jobs = await _by_id(db, jobs, Job, pairs)
    found_runners = await _by_id(db, runners, Runner, set(pairs.values()))
    return [(found_jobs[job_id], found_runners[runner_id]) for job_id, runner_id in pairs.items()]


async def _by_id(
    db: AsyncConnection, table: sa.Table, kind: type[Any], ids: Collection[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for chunk in chunks(list(ids)):
        for row in await db.execute(sa.select(*columns(table, kind)).where(table.c.id.in_(chunk))):
            found[row.id] = as_struct(row, kind)
    return found


async def note(db: AsyncConnection, failure: InfraFailure) -> bool:
    """Keep it, once; False when somebody has."""
    insert = insert_into(db, infra_failures).values(**msgspec.structs.asdict(failure))
    insert = insert.on_conflict_do_nothing(index_elements=["job_id"])
    return (await db.execute(insert.returning(infra_failures.c.job_id))).first() is not None


async def failures_of(db: AsyncConnection, job_ids: Collection[str]) -> dict[str, InfraFailure]:
    """The failures of infrastructure under these jobs."""
    found: dict[str, InfraFailure] = {}
    for chunk in chunks(list(job_ids)):
        query = sa.select(*_FAILURE).where(infra_failures.c.job_id.in_(chunk))
        found.update({row.job_id: as_struct(row, InfraFailure) for row in await db.execute(query)})
    return found


async def was_rerun(db: AsyncConnection, job: Job) -> str | None:
    """The job of the same run and name that was, or is to be, run again for a failure of infrastructure."""
    query = (
        sa.select(jobs.c.id)
        .join(infra_failures, infra_failures.c.job_id == jobs.c.id)
        .where(
            infra_failures.c.rerun.not_in(("off", "needless")),
            jobs.c.id != job.id,
            *_same(job),
        )
    )
    return await db.scalar(query.limit(1))


async def attempts_of(db: AsyncConnection, job: Job) -> list[Job]:
    """All jobs of this one's name in its run that were heard of since it was."""
    query = sa.select(*_JOB).where(jobs.c.updated_at >= job.event_at, *_same(job))
    return [as_struct(row, Job) for row in await db.execute(query)]


def _same(job: Job) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        jobs.c.forge == job.forge,
        jobs.c.owner == job.owner,
        jobs.c.repo == job.repo,
        jobs.c.run_id == job.run_id,
        jobs.c.name == job.name,
    )


async def due_reruns(db: AsyncConnection, now: float, limit: int) -> list[tuple[InfraFailure, Job]]:
    """Those that are to be looked after now, longest due first, with their jobs."""
    query = (
        sa.select(*_FAILURE)
        .where(infra_failures.c.rerun.in_(("wanted", "asked")), infra_failures.c.next_at <= now)
        .order_by(infra_failures.c.next_at)
        .limit(limit)
    )
    failures = [as_struct(row, InfraFailure) for row in await db.execute(query)]
    found = await _by_id(db, jobs, Job, [failure.job_id for failure in failures])
    return [(failure, found[failure.job_id]) for failure in failures if failure.job_id in found]


async def change(
    db: AsyncConnection, failure: InfraFailure, values: Mapping[str, Any]
) -> InfraFailure | None:
    """Write ``values`` unless somebody else did something about it meanwhile (then None)."""
    update = (
        sa.update(infra_failures)
        .where(
            infra_failures.c.job_id == failure.job_id,
            infra_failures.c.rerun == failure.rerun,
            infra_failures.c.tries == failure.tries,
        )
        .values(**values)
        .returning(*_FAILURE)
    )
    row = (await db.execute(update)).one_or_none()
    return None if row is None else as_struct(row, InfraFailure)
