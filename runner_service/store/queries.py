"""Every query of the control plane, by name. Plain functions on a connection; SQLite and PostgreSQL alike."""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Ending, Host, Job, Runner, TimelineRow
from runner_service.doubts import Unfinished
from runner_service.store import queue_queries as queue
from runner_service.store.rows import as_struct, chunks, columns, insert_into
from runner_service.store.schema import (
    bakes,
    commit_keys,
    endings,
    frozen,
    heads,
    hosts,
    inbox,
    infra_failures,
    jobs,
    locks,
    repositories,
    runners,
    sweeps,
    timeline,
)


class InboxRow(msgspec.Struct, frozen=True, kw_only=True):
    """A stored delivery, in the order it came in."""

    seq: int
    id: str
    forge: str
    event: str
    action: str | None
    received_at: float
    payload: bytes


_JOB = columns(jobs, Job)
_RUNNER = columns(runners, Runner)
_DELIVERY = columns(inbox, InboxRow)
_LINE = columns(timeline, TimelineRow)
_ENDING = columns(endings, Ending)
# Of a long story: so many lines of its beginning.
_FIRST_LINES = 50


# ── the scheduler's mutual exclusion ─────────────────────────────────────────────────────────────


async def lock_scheduler(db: AsyncConnection, owner: str, until: float) -> None:
    """First statement of every deciding transaction: whoever touches this row decides alone until commit."""
    await db.execute(_LOCK_SCHEDULER, {"owner": owner, "until": until})


_LOCK_SCHEDULER = (
    sa.update(locks)
    .where(locks.c.name == "scheduler")
    .values(lease_owner=sa.bindparam("owner"), lease_until=sa.bindparam("until"))
)


# ── inbox ────────────────────────────────────────────────────────────────────────────────────────


async def put_deliveries(
    db: AsyncConnection, rows: Sequence[Mapping[str, Any]]
) -> list[Literal["stored", "known", "done"]]:
    """Store each delivery once. ``known``: stored before, not processed yet; ``done``: processed before."""
    # Not by counting rows: what a driver counts after a conflict is its own affair.
    inserted = await db.execute(_put_deliveries(db.dialect.name), [dict(row) for row in rows])
    new = {(row.forge, row.id) for row in inserted}
    outcomes: list[Literal["stored", "known", "done"]] = []
    for row in rows:
        key = row["forge"], row["id"]
        if key in new:
            new.discard(key)  # a second one of the same transaction is a repetition
            outcomes.append("stored")
        else:
            outcomes.append("done" if await _processed(db, *key) else "known")
    return outcomes


@functools.cache
def _put_deliveries(dialect: str) -> sa.Executable:
    insert = insert_into(dialect, inbox).on_conflict_do_nothing(index_elements=["forge", "id"])
    return insert.returning(inbox.c.forge, inbox.c.id)


async def _processed(db: AsyncConnection, forge: str, delivery_id: str) -> bool:
    return await db.scalar(_PROCESSED_AT, {"whose": forge, "guid": delivery_id}) is not None


_PROCESSED_AT = sa.select(inbox.c.processed_at).where(
    inbox.c.forge == sa.bindparam("whose"), inbox.c.id == sa.bindparam("guid")
)


async def pending_deliveries(db: AsyncConnection, limit: int) -> list[InboxRow]:
    """The oldest unprocessed deliveries, in order."""
    return [as_struct(row, InboxRow) for row in await db.execute(_PENDING, {"most": limit})]


_PENDING = (
    sa.select(*_DELIVERY)
    .where(inbox.c.processed_at.is_(None))
    .order_by(inbox.c.seq)
    .limit(sa.bindparam("most"))
)


async def close_deliveries(db: AsyncConnection, outcomes: Mapping[int, str], now: float) -> None:
    """Mark deliveries (by seq) as processed, and drop their payloads: only the GUID is needed from now on."""
    if outcomes:
        rows = [{"row": seq, "what": outcome, "now": now} for seq, outcome in outcomes.items()]
        await db.execute(_CLOSE_DELIVERY, rows)


_CLOSE_DELIVERY = (
    sa.update(inbox)
    .where(inbox.c.seq == sa.bindparam("row"))
    .values(processed_at=sa.bindparam("now"), payload=b"", outcome=sa.bindparam("what"))
)


async def known_deliveries(db: AsyncConnection, forge: str, guids: Sequence[str]) -> set[str]:
    """Those of these deliveries that came in, at whatever try."""
    found: set[str] = set()
    for chunk in chunks(guids):
        query = sa.select(inbox.c.id).where(inbox.c.forge == forge, inbox.c.id.in_(chunk))
        found.update((await db.execute(query)).scalars())
    return found


async def swept_until(db: AsyncConnection, name: str) -> float | None:
    """Up to when this was looked through; None: never."""
    return await db.scalar(sa.select(sweeps.c.until).where(sweeps.c.name == name))


async def save_swept(db: AsyncConnection, name: str, until: float) -> None:
    insert = insert_into(db, sweeps).values(name=name, until=until)
    await db.execute(insert.on_conflict_do_update(index_elements=["name"], set_={"until": until}))


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────────


async def jobs_by_id(db: AsyncConnection, ids: Collection[str]) -> dict[str, Job]:
    found: dict[str, Job] = {}
    for chunk in chunks(list(ids)):
        for row in await db.execute(_JOBS_BY_ID, {"ids": chunk}):
            found[row.id] = as_struct(row, Job)
    return found


_JOBS_BY_ID = sa.select(*_JOB).where(jobs.c.id.in_(sa.bindparam("ids", expanding=True)))


async def each_job(db: AsyncConnection, ids: Sequence[str]) -> list[Job | None]:
    """These jobs, each in its place."""
    found = await jobs_by_id(db, ids)
    return [found.get(one) for one in ids]


async def list_jobs(db: AsyncConnection, *, limit: int, state: str | None = None) -> list[Job]:
    """The newest jobs, newest first."""
    query = sa.select(*_JOB).order_by(jobs.c.updated_at.desc(), jobs.c.id).limit(limit)
    if state is not None:
        query = query.where(jobs.c.state == state)
    return [as_struct(row, Job) for row in await db.execute(query)]


async def save_jobs(db: AsyncConnection, changed: Sequence[Job]) -> None:
    """Insert or replace these jobs."""
    if changed:
        await db.execute(_save_job(db.dialect.name), [_row(job) for job in changed])


@functools.cache
def _save_job(dialect: str) -> sa.Executable:
    insert = insert_into(dialect, jobs)
    columns = {c.name: insert.excluded[c.name] for c in jobs.columns if c.name != "id"}
    return insert.on_conflict_do_update(index_elements=["id"], set_=columns)


async def unserved_jobs(db: AsyncConnection, limit: int) -> list[Job]:
    """Queued jobs of ours that no template served when they were last looked at; the newest of them."""
    query = (
        sa.select(*_JOB)
        .where(jobs.c.state == "queued", jobs.c.group_key.is_(None), jobs.c.template.is_(None))
        .order_by(jobs.c.event_at.desc())
        .limit(limit)
    )
    return [as_struct(row, Job) for row in await db.execute(query)]


async def aged_jobs(
    db: AsyncConnection, *, queued_before: float, waiting_before: float, limit: int
) -> list[Job]:
    """Jobs that were queued before the one moment, or have waited for an approval since before the other."""
    unserved = sa.and_(jobs.c.state == "queued", jobs.c.event_at < queued_before)
    waiting = sa.and_(jobs.c.state == "waiting", jobs.c.event_at < waiting_before)
    query = sa.select(*_JOB).where(sa.or_(unserved, waiting)).order_by(jobs.c.event_at).limit(limit)
    return [as_struct(row, Job) for row in await db.execute(query)]


async def stranded_jobs(db: AsyncConnection, forge: str, limit: int) -> list[tuple[str, str]]:
    """Jobs (id, owner) in progress on a runner that is gone, or none of ours: nothing here will tell their end."""
    query = (
        sa.select(jobs.c.id, jobs.c.owner)
        .outerjoin(runners, runners.c.id == jobs.c.runner_id)
        .where(
            jobs.c.state == "in_progress",
            jobs.c.forge == forge,
            sa.or_(runners.c.id.is_(None), runners.c.state == "gone"),
        )
        .order_by(jobs.c.updated_at)
        .limit(limit)
    )
    return [(row[0], row[1]) for row in await db.execute(query)]


async def unfinished_jobs(db: AsyncConnection, forge: str, owner: str, repo: str) -> list[Unfinished]:
    """The jobs of a repository (names in any case) that no runner has taken yet, as far as the books know."""
    query = sa.select(jobs.c.id, jobs.c.state, jobs.c.event_at).where(
        jobs.c.state.in_(("queued", "waiting")),
        jobs.c.forge == forge,
        sa.func.lower(jobs.c.owner) == owner.lower(),
        sa.func.lower(jobs.c.repo) == repo.lower(),
    )
    return [Unfinished(row[0], row[1], row[2]) for row in await db.execute(query)]


# ── runners ──────────────────────────────────────────────────────────────────────────────────────


async def active_runners(db: AsyncConnection) -> list[Runner]:
    """Every runner that is not gone, oldest first."""
    return [as_struct(row, Runner) for row in await db.execute(_ACTIVE_RUNNERS)]


_ACTIVE_RUNNERS = (
    sa.select(*_RUNNER).where(runners.c.state != "gone").order_by(runners.c.created_at, runners.c.id)
)


async def runner(db: AsyncConnection, runner_id: str) -> Runner | None:
    row = (await db.execute(_ONE_RUNNER, {"one": runner_id})).one_or_none()
    return None if row is None else as_struct(row, Runner)


_ONE_RUNNER = sa.select(*_RUNNER).where(runners.c.id == sa.bindparam("one"))


async def each_runner(db: AsyncConnection, ids: Sequence[str]) -> list[Runner | None]:
    """These runners, in whatever state, each in its place."""
    found = await runners_by_id(db, ids)
    return [found.get(one) for one in ids]


async def runners_by_id(db: AsyncConnection, ids: Collection[str]) -> dict[str, Runner]:
    """These runners, in whatever state."""
    found: dict[str, Runner] = {}
    for chunk in chunks(list(ids)):
        for row in await db.execute(_RUNNERS_BY_ID, {"ids": chunk}):
            found[row.id] = as_struct(row, Runner)
    return found


_RUNNERS_BY_ID = sa.select(*_RUNNER).where(runners.c.id.in_(sa.bindparam("ids", expanding=True)))


async def runners_of_job(db: AsyncConnection, job_id: str) -> list[Runner]:
    """The runners made for a job or serving it, newest first."""
    query = (
        sa.select(*_RUNNER)
        .where(sa.or_(runners.c.job_id == job_id, runners.c.serving_job_id == job_id))
        .order_by(runners.c.created_at.desc())
    )
    return [as_struct(row, Runner) for row in await db.execute(query)]


async def runners_of_jobs(db: AsyncConnection, job_ids: Sequence[str]) -> dict[str, list[Runner]]:
    """For each of these jobs the runners made for it or serving it, newest first."""
    found: dict[str, list[Runner]] = {}
    for chunk in chunks(job_ids):
        query = (
            sa.select(*_RUNNER)
            .where(sa.or_(runners.c.job_id.in_(chunk), runners.c.serving_job_id.in_(chunk)))
            .order_by(runners.c.created_at.desc())
        )
        for row in await db.execute(query):
            one = as_struct(row, Runner)
            for job_id in {one.job_id, one.serving_job_id} - {None}:
                found.setdefault(str(job_id), []).append(one)
    return found


async def runner_counts(db: AsyncConnection) -> dict[str, int]:
    """Runners that are not gone, by state."""
    query = (
        sa.select(runners.c.state, sa.func.count()).where(runners.c.state != "gone").group_by(runners.c.state)
    )
    return {row[0]: row[1] for row in await db.execute(query)}


async def add_runners(db: AsyncConnection, new: Sequence[Runner]) -> None:
    if new:
        await db.execute(_ADD_RUNNER, [_row(one) for one in new])


_ADD_RUNNER = sa.insert(runners)


async def set_runner_facts(db: AsyncConnection, runner_id: str, **facts: Any) -> None:
    """Write facts (never the state) on a runner that is not gone."""
    await set_facts(db, {runner_id: facts})


async def set_facts(db: AsyncConnection, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """As ``set_runner_facts`` on many runners, by id: one statement for those with the same columns."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for runner_id, values in facts.items():
        if values:
            new = {f"new_{name}": value for name, value in values.items()}
            alike.setdefault(tuple(values), []).append({"one": runner_id, **new})
    for names, rows in alike.items():
        await db.execute(_set_columns(names), rows)


@functools.cache
def _set_columns(names: tuple[str, ...]) -> sa.Executable:
    known = sa.update(runners).where(runners.c.id == sa.bindparam("one"), runners.c.state != "gone")
    # Not by the columns' own names: SQLAlchemy keeps those for itself.
    return known.values({name: sa.bindparam(f"new_{name}") for name in names})


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a runner: what changes in its row, its lines of the timeline, how its VM ended if it did."""

    runner_id: str
    was: str
    owner: str
    values: Mapping[str, Any]
    lines: Sequence[TimelineRow] = ()
    ending: Ending | None = None


async def step_runners(db: AsyncConnection, steps: Sequence[Step]) -> list[Runner | None]:
    """Persist each step, if its row still is in state ``was`` and leased to ``owner``; else None.

    The answers are the whole rows, with the facts others wrote meanwhile.
    """
    rows: dict[str, Runner] = {}
    for chunk in chunks([step.runner_id for step in steps]):
        for row in await db.execute(_RUNNERS_TO_STEP, {"ids": chunk}):
            rows[row.id] = as_struct(row, Runner)
    answers: list[Runner | None] = []
    taken: list[Step] = []
    for step in steps:
        row = rows.get(step.runner_id)
        if row is None or row.state != step.was or row.lease_owner != step.owner:
            answers.append(None)
            continue
        after = rows[row.id] = msgspec.structs.replace(row, **step.values)
        answers.append(after)
        taken.append(step)
    await set_facts(db, {step.runner_id: step.values for step in taken})
    await add_timeline(db, [line for step in taken for line in step.lines])
    await keep_endings(db, [step.ending for step in taken if step.ending is not None])
    return answers


# Locked in one order, so that two services do not wait for each other; SQLite has one writer anyway.
_RUNNERS_TO_STEP = _RUNNERS_BY_ID.order_by(runners.c.id).with_for_update()


async def kill_runner_of_vm(db: AsyncConnection, vm_id: str, now: float) -> str | None:
    """Note that an operator wants this VM gone; the id of its runner, or None when no runner owns it."""
    update = (
        sa.update(runners)
        .where(runners.c.vm_id == vm_id, runners.c.state != "gone")
        .values(killed_at=now)
        .returning(runners.c.id)
    )
    return (await db.execute(update)).scalar_one_or_none()


async def renew_leases(db: AsyncConnection, owner: str, now: float, until: float) -> list[Runner]:
    """Extend our leases and take over those that ran out on our host; the runners we hold now."""
    free = sa.or_(
        runners.c.lease_owner == owner,
        sa.and_(
            runners.c.host == owner, sa.or_(runners.c.lease_until.is_(None), runners.c.lease_until < now)
        ),
    )
    update = (
        sa.update(runners)
        .where(runners.c.state != "gone", runners.c.host.is_not(None), free)
        .values(lease_owner=owner, lease_until=until)
        .returning(*_RUNNER)
    )
    return [as_struct(row, Runner) for row in await db.execute(update)]


# ── timeline, hosts, housekeeping ────────────────────────────────────────────────────────────────


async def add_timeline(db: AsyncConnection, rows: Sequence[TimelineRow]) -> None:
    if rows:
        await db.execute(_ADD_LINE, [msgspec.structs.asdict(row) for row in rows])


_ADD_LINE = sa.insert(timeline)


async def timeline_of_job(db: AsyncConnection, job_id: str, most: int = 500) -> list[TimelineRow]:
    """The story of a job with that of the runners that were its own at the time, in order.

    Of a very long one the beginning and the end: how it stands now matters more than how often it was tried.
    """
    query = sa.select(*_LINE).where(timeline.c.job_id == job_id)
    rows = (await db.execute(query.order_by(timeline.c.at, timeline.c.seq).limit(most))).all()
    if len(rows) == most:
        newest = await db.execute(
            query.order_by(timeline.c.at.desc(), timeline.c.seq.desc()).limit(most - _FIRST_LINES)
        )
        last = list(reversed(newest.all()))
        rows = [*rows[:_FIRST_LINES], *(row for row in last if row not in rows[:_FIRST_LINES])]
    return [as_struct(row, TimelineRow) for row in rows]


async def keep_endings(db: AsyncConnection, found: Sequence[Ending]) -> None:
    """Keep how the VMs of runners ended; the last word counts."""
    if found:
        await db.execute(_keep_ending(db.dialect.name), [msgspec.structs.asdict(ending) for ending in found])


@functools.cache
def _keep_ending(dialect: str) -> sa.Executable:
    insert = insert_into(dialect, endings)
    last = {name: insert.excluded[name] for name in ("at", "exit")}
    return insert.on_conflict_do_update(index_elements=["runner_id"], set_=last)


async def endings_of(db: AsyncConnection, runner_ids: Collection[str]) -> dict[str, Ending]:
    """How the VMs of these runners ended, as far as they did."""
    found: dict[str, Ending] = {}
    for chunk in chunks(list(runner_ids)):
        for row in await db.execute(sa.select(*_ENDING).where(endings.c.runner_id.in_(chunk))):
            found[row.runner_id] = as_struct(row, Ending)
    return found


async def save_host(db: AsyncConnection, host: Host, now: float) -> None:
    values = {
        "name": host.name, "max_vms": host.max_vms, "memory_mib": host.memory_mib,
        "draining": host.draining, "seen_at": now, "cpus": host.cpus,
    }  # fmt: skip
    insert = insert_into(db, hosts).values(**values)
    await db.execute(insert.on_conflict_do_update(index_elements=["name"], set_=values))


async def live_hosts(db: AsyncConnection, seen_since: float) -> list[Host]:
    """Hosts heard of since ``seen_since``, without what is promised on them."""
    rows = await db.execute(_LIVE_HOSTS, {"since": seen_since})
    return [
        Host(
            row.name,
            row.max_vms,
            row.memory_mib,
            draining=row.draining or row.drain_ordered_at is not None,
            cpus=row.cpus,
        )
        for row in rows
    ]


_LIVE_HOSTS = sa.select(hosts).where(hosts.c.seen_at >= sa.bindparam("since")).order_by(hosts.c.name)


async def forget(db: AsyncConnection, before: float) -> None:
    """Drop what ended before ``before``: processed deliveries, finished jobs, gone runners, their timeline and ends,
    bakes that are over, and what was known of commits and repositories nobody spoke of since."""
    await db.execute(sa.delete(inbox).where(inbox.c.processed_at < before))
    await db.execute(sa.delete(jobs).where(jobs.c.updated_at < before, jobs.c.state == "completed"))
    await db.execute(sa.delete(runners).where(runners.c.state == "gone", runners.c.ended_at < before))
    await db.execute(sa.delete(endings).where(endings.c.at < before))
    await db.execute(sa.delete(timeline).where(timeline.c.at < before))
    await db.execute(sa.delete(heads).where(heads.c.at < before))
    await db.execute(sa.delete(commit_keys).where(commit_keys.c.at < before))
    await db.execute(sa.delete(bakes).where(bakes.c.ended_at < before))
    await db.execute(sa.delete(infra_failures).where(infra_failures.c.at < before))
    await db.execute(sa.delete(frozen).where(frozen.c.removed_at < before))
    await db.execute(sa.delete(repositories).where(repositories.c.seen_at < before))


async def warm_up(db: AsyncConnection) -> None:
    """Run the statements on the way from an event to a runner once; the caller rolls back."""
    name = "warm-up"
    row = {
        "id": name,
        "forge": name,
        "event": "",
        "action": None,
        "hook_id": None,
        "received_at": 0.0,
        "payload": b"",
    }
    await put_deliveries(db, [row])
    await lock_scheduler(db, name, 0.0)
    await close_deliveries(db, {one.seq: name for one in await pending_deliveries(db, 1)}, 0.0)
    job = Job(
        id=name, forge=name, forge_job_id=name, owner="", repo="", scope_kind="repository", scope_path="",
        labels=(name,), state="queued", event_at=0.0, updated_at=0.0, group_key=name,
    )  # fmt: skip
    await save_jobs(db, [job])
    await jobs_by_id(db, [name])
    await queue.warm_up(db, job)
    one = Runner(
        id=name, forge=name, scope_kind="repository", scope_path="", labels=(name,), group_key=name, template="",
        memory_mib=0, state="forking", state_at=0.0, deadline=0.0, created_at=0.0, event_at=0.0, lease_owner=name,
    )  # fmt: skip
    await add_runners(db, [one])
    await active_runners(db)
    await live_hosts(db, 0.0)
    await runner(db, name)
    values = {
        "state": "registering",
        "state_at": 0.0,
        "deadline": 0.0,
        "waits_for": None,
        "vm_id": "",
        "remote_id": "",
    }
    line = TimelineRow(at=0.0, job_id=None, runner_id=name, step=name)
    step = Step(runner_id=name, was="forking", owner=name, values=values, lines=[line])
    await step_runners(db, [step])


def _row(value: msgspec.Struct) -> dict[str, Any]:
    fields = msgspec.structs.asdict(value)
    fields["labels"] = list(fields["labels"])
    return fields
