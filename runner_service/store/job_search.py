"""Which job is meant: by an id, an address, a runner or ``owner/repo#name``; and its place in the queue."""

import difflib
import re
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Job
from runner_service.store.rows import as_struct, columns
from runner_service.store.schema import jobs, runners

_JOB = columns(jobs, Job)
_RECENT = 500
_URL = re.compile(
    r"https?://[^\s/]+/(?P<repo>[^/\s]+/[^/\s]+)/actions/runs/(?P<run>\d+)(?:/(?:job|jobs)/(?P<job>\d+))?"
)
_NAMED = re.compile(r"(?P<owner>[^/\s#]+)/(?P<repo>[^/\s#]+)(?:#(?P<name>.+))?", re.S)


async def find(db: AsyncConnection, ref: str) -> Job | None:
    """The job ``ref`` means, or None.

    It is our id, the forge's id (when one forge only has it), the address of its page, or the id of its runner or VM;
    of ``owner/repo``, ``owner/repo#name`` and a run's address it is the newest.
    """
    ref = ref.strip()
    if not ref or len(ref) > 500 or not ref.isprintable():
        return None
    page = _URL.match(ref)
    if page is not None:
        if page["job"] is not None:
            return await _by_id(db, page["job"])
        return await _newest(db, jobs.c.run_id == page["run"], *_of(page["repo"]))
    named = _NAMED.fullmatch(ref)
    if named is None:
        return await _by_id(db, ref) or await _by_runner(db, ref)
    where = _of(f"{named['owner']}/{named['repo']}")
    if named["name"] is None:
        return await _newest(db, *where)
    return await _newest(
        db, *where, sa.or_(jobs.c.name == named["name"], jobs.c.forge_job_id == named["name"])
    )


async def near(db: AsyncConnection, ref: str, most: int = 3) -> list[str]:
    """References of recent jobs that look like ``ref``."""
    recent = sa.select(jobs.c.id, jobs.c.forge_job_id, jobs.c.owner, jobs.c.repo, jobs.c.name)
    rows = (await db.execute(recent.order_by(jobs.c.updated_at.desc()).limit(_RECENT))).all()
    if "/" in ref:
        known = {f"{row.owner}/{row.repo}#{row.name}" for row in rows} | {
            f"{row.owner}/{row.repo}" for row in rows
        }
    else:
        known = {row.id for row in rows} | {row.forge_job_id for row in rows}
    folded = {one.lower(): one for one in sorted(known)}
    return [folded[one] for one in difflib.get_close_matches(ref.lower()[:500], folded, n=most, cutoff=0.6)]


async def place(db: AsyncConnection, job: Job) -> tuple[int, int] | None:
    """A queued job's place among those of its repository and group, oldest first, and how many these are."""
    if job.state != "queued" or job.group_key is None:
        return None
    older = sa.or_(
        jobs.c.event_at < job.event_at, sa.and_(jobs.c.event_at == job.event_at, jobs.c.id < job.id)
    )
    query = sa.select(sa.func.count(), sa.func.count().filter(older)).where(
        jobs.c.state == "queued",
        jobs.c.group_key == job.group_key,
        jobs.c.owner == job.owner,
        jobs.c.repo == job.repo,
    )
    among, before = (await db.execute(query)).one()
    return (before + 1, among)


async def queue(db: AsyncConnection) -> tuple[int, float | None]:
    """How many jobs are queued, and since when (Unix seconds) the oldest of them is."""
    query = sa.select(sa.func.count(), sa.func.min(jobs.c.event_at)).where(jobs.c.state == "queued")
    count, oldest = (await db.execute(query)).one()
    return count, oldest


def unknown(ref: str, close: Sequence[str], see: str) -> str:
    """The sentence for a reference that means no job; ``see`` names where all are listed."""
    told = f"there is no job {ref[:200]!r}"
    return f"{told}; did you mean {' or '.join(close)}? See {see}" if close else f"{told}: see {see}"


def _of(repository: str) -> tuple[sa.ColumnElement[bool], ...]:
    owner, _, repo = repository.lower().partition("/")
    return (sa.func.lower(jobs.c.owner) == owner, sa.func.lower(jobs.c.repo) == repo)


async def _newest(db: AsyncConnection, *where: sa.ColumnElement[bool]) -> Job | None:
    row = (
        await db.execute(sa.select(*_JOB).where(*where).order_by(jobs.c.event_at.desc(), jobs.c.id).limit(1))
    ).first()
    return None if row is None else as_struct(row, Job)


async def _by_id(db: AsyncConnection, ref: str) -> Job | None:
    query = sa.select(*_JOB).where(sa.or_(jobs.c.id == ref, jobs.c.forge_job_id == ref)).limit(2)
    rows = (await db.execute(query)).all()
    exact = [row for row in rows if row.id == ref]
    if exact or len(rows) == 1:
        return as_struct((exact or rows)[0], Job)
    return None


async def _by_runner(db: AsyncConnection, ref: str) -> Job | None:
    query = sa.select(runners.c.serving_job_id, runners.c.job_id)
    row = (
        await db.execute(query.where(sa.or_(runners.c.id == ref, runners.c.vm_id == ref)).limit(1))
    ).first()
    job_id = None if row is None else row.serving_job_id or row.job_id
    return None if job_id is None else await _by_id(db, job_id)
