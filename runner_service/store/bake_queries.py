"""The queries about bakes, and about the repositories and commits they are for. As ``queries``: on any database."""

from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Bake, Push, Repository
from runner_service.store.rows import as_struct, columns, insert_into
from runner_service.store.schema import bakes, commit_keys, heads, repositories

_BAKE = columns(bakes, Bake)
_REPOSITORY = columns(repositories, Repository)
_UNDER_WAY = ("queued", "baking")


# ── repositories and commits ─────────────────────────────────────────────────────────────────────


async def save_repository(db: AsyncConnection, found: Repository) -> None:
    """Insert or complete what is known of a repository: None leaves what was known."""
    values = msgspec.structs.asdict(found)
    insert = insert_into(db, repositories).values(**values)
    keep = {
        name: sa.func.coalesce(insert.excluded[name], repositories.c[name])
        for name in ("owner", "repo", "seen_at", "default_branch", "used_at", "moved_at")
    }
    await db.execute(insert.on_conflict_do_update(index_elements=["forge", "name"], set_=keep))


async def set_trouble(db: AsyncConnection, forge: str, name: str, trouble: str | None) -> None:
    """Why a repository cannot be looked at; None: it can."""
    await db.execute(
        sa.update(repositories)
        .where(repositories.c.forge == forge, repositories.c.name == name)
        .values(trouble=trouble)
    )


async def repository(db: AsyncConnection, forge: str, name: str) -> Repository | None:
    query = sa.select(*_REPOSITORY).where(repositories.c.forge == forge, repositories.c.name == name)
    row = (await db.execute(query)).one_or_none()
    return None if row is None else as_struct(row, Repository)


async def list_repositories(db: AsyncConnection, limit: int) -> list[Repository]:
    """Those heard of last."""
    query = sa.select(*_REPOSITORY).order_by(repositories.c.seen_at.desc()).limit(limit)
    return [as_struct(row, Repository) for row in await db.execute(query)]


async def save_head(db: AsyncConnection, push: Push) -> None:
    """A commit was seen at the head of a branch of the repository itself."""
    values = {
        "forge": push.forge, "repository": f"{push.owner}/{push.repo}".lower(), "commit_id": push.commit,
        "branch": push.branch, "at": push.seen_at,
    }  # fmt: skip
    insert = insert_into(db, heads).values(**values)
    keys = ["forge", "repository", "commit_id", "branch"]
    await db.execute(insert.on_conflict_do_update(index_elements=keys, set_={"at": push.seen_at}))


async def is_head(db: AsyncConnection, forge: str, name: str, commit: str, branch: str) -> bool:
    """Whether the commit was ever seen at the head of that branch of the repository itself."""
    query = sa.select(heads.c.at).where(
        heads.c.forge == forge,
        heads.c.repository == name,
        heads.c.commit_id == commit,
        heads.c.branch == branch,
    )
    return (await db.execute(query)).first() is not None


async def save_keys(
    db: AsyncConnection, forge: str, name: str, commit: str, keys: Mapping[str, str], now: float
) -> None:
    """The dependency keys of a commit, by the digest of the base."""
    for base, key in keys.items():
        insert = insert_into(db, commit_keys).values(
            forge=forge, repository=name, commit_id=commit, base_digest=base, key=key, at=now
        )
        unique = ["forge", "repository", "commit_id", "base_digest"]
        await db.execute(insert.on_conflict_do_update(index_elements=unique, set_={"key": key, "at": now}))


async def keys_of(db: AsyncConnection, forge: str, name: str, commit: str) -> dict[str, str]:
    """What is known of a commit's keys: digest of the base → key."""
    query = sa.select(commit_keys.c.base_digest, commit_keys.c.key).where(
        commit_keys.c.forge == forge, commit_keys.c.repository == name, commit_keys.c.commit_id == commit
    )
    return {row[0]: row[1] for row in await db.execute(query)}


# ── bakes ────────────────────────────────────────────────────────────────────────────────────────


async def queue_bake(db: AsyncConnection, wanted: Bake) -> Bake | None:
    """Queue a bake (its id is given here), unless one of its key is under way; a queued one gets the newer commit.

    Queued bakes of other keys of its branch are given up. None: one of its key was under way.
    """
    branch = sa.and_(
        bakes.c.host == wanted.host, bakes.c.forge == wanted.forge, bakes.c.repository == wanted.repository,
        bakes.c.branch == wanted.branch,
    )  # fmt: skip
    await db.execute(
        sa.update(bakes)
        .where(branch, bakes.c.state == "queued", bakes.c.key != wanted.key)
        .values(state="superseded", ended_at=wanted.created_at)
    )
    values = {name: value for name, value in msgspec.structs.asdict(wanted).items() if name != "id"}
    insert = insert_into(db, bakes).values(**values).on_conflict_do_nothing().returning(*_BAKE)
    row = (await db.execute(insert)).one_or_none()
    if row is not None:
        return as_struct(row, Bake)
    await db.execute(
        sa.update(bakes)
        .where(branch, bakes.c.state == "queued", bakes.c.key == wanted.key)
        .values(commit=wanted.commit)
    )
    return None


async def supersede(db: AsyncConnection, host: str, now: float) -> None:
    """Give up queued bakes whose branch has a newer one: theirs must not be promoted after it."""
    newer = bakes.alias()
    moved_on = sa.exists().where(
        newer.c.host == bakes.c.host, newer.c.forge == bakes.c.forge, newer.c.repository == bakes.c.repository,
        newer.c.branch == bakes.c.branch, newer.c.id > bakes.c.id, newer.c.state != "superseded",
    )  # fmt: skip
    await db.execute(
        sa.update(bakes)
        .where(bakes.c.host == host, bakes.c.state == "queued", moved_on)
        .values(state="superseded", ended_at=now)
    )


async def due_bakes(db: AsyncConnection, host: str, now: float, limit: int) -> list[Bake]:
    """Queued bakes of a host whose time has come, oldest first."""
    query = (
        sa.select(*_BAKE)
        .where(bakes.c.host == host, bakes.c.state == "queued", bakes.c.due_at <= now)
        .order_by(bakes.c.due_at, bakes.c.id)
        .limit(limit)
    )
    return [as_struct(row, Bake) for row in await db.execute(query)]


async def next_due(db: AsyncConnection, host: str) -> float | None:
    """When the next queued bake of a host is due."""
    return await db.scalar(
        sa.select(sa.func.min(bakes.c.due_at)).where(bakes.c.host == host, bakes.c.state == "queued")
    )


async def baking(db: AsyncConnection, host: str) -> list[Bake]:
    """The bakes of a host that are in state ``baking``."""
    query = sa.select(*_BAKE).where(bakes.c.host == host, bakes.c.state == "baking").order_by(bakes.c.id)
    return [as_struct(row, Bake) for row in await db.execute(query)]


async def step_bake(db: AsyncConnection, bake_id: int, *, was: str, values: Mapping[str, Any]) -> Bake | None:
    """Persist what became of a bake, if it still is in state ``was``; else None."""
    update = (
        sa.update(bakes).where(bakes.c.id == bake_id, bakes.c.state == was).values(**values).returning(*_BAKE)
    )
    row = (await db.execute(update)).one_or_none()
    return None if row is None else as_struct(row, Bake)


async def bake(db: AsyncConnection, bake_id: int) -> Bake | None:
    row = (await db.execute(sa.select(*_BAKE).where(bakes.c.id == bake_id))).one_or_none()
    return None if row is None else as_struct(row, Bake)


async def list_bakes(db: AsyncConnection, *, limit: int, repository: str | None = None) -> list[Bake]:
    """The newest bakes, newest first."""
    query = sa.select(*_BAKE).order_by(bakes.c.id.desc()).limit(limit)
    if repository is not None:
        query = query.where(bakes.c.repository == repository)
    return [as_struct(row, Bake) for row in await db.execute(query)]


async def last_bakes(db: AsyncConnection, host: str, forge: str, name: str) -> list[Bake]:
    """The newest bake of each (branch, key) of a repository on a host, newest first; not those given up."""
    newest = (
        sa.select(sa.func.max(bakes.c.id))
        .where(
            bakes.c.host == host,
            bakes.c.forge == forge,
            bakes.c.repository == name,
            bakes.c.state != "superseded",
        )
        .group_by(bakes.c.branch, bakes.c.key)
    )
    query = sa.select(*_BAKE).where(bakes.c.id.in_(newest)).order_by(bakes.c.id.desc()).limit(200)
    return [as_struct(row, Bake) for row in await db.execute(query)]


async def bake_counts(db: AsyncConnection) -> dict[str, int]:
    """Bakes under way, by state."""
    query = (
        sa.select(bakes.c.state, sa.func.count()).where(bakes.c.state.in_(_UNDER_WAY)).group_by(bakes.c.state)
    )
    return {row[0]: row[1] for row in await db.execute(query)}
