"""Chooses a job's parent when its VM is about to be forked: what the database knows, else the mirror within a deadline.

What only one answer can follow from is not asked. A repository that cannot be looked at in time costs a job its best
parent, never its run.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service import parents
from runner_service.domain import Bake, Job, Parent, Push, Repository, Template
from runner_service.parents import Choice, Facts
from runner_service.ports import CannotLookError, Catalog, Repositories
from runner_service.store import bake_queries as bq
from runner_service.store import queries as q
from runner_service.store.store import Store

log = structlog.get_logger("choice")
_CONFIRM_SECONDS = 60.0


class Chooser:
    """``repositories`` None: no mirrors are kept here, and nothing is baked by itself. ``limit`` in seconds."""

    def __init__(
        self,
        *,
        store: Store,
        host: str,
        catalog: Catalog,
        repositories: Repositories | None,
        limit: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._host = host
        self._catalog = catalog
        self._repositories = repositories
        self._limit = limit
        self._clock = clock

    async def choose(self, job_id: str, base: Template) -> Choice | None:
        """The parent for a job whose labels ask for the template ``base``; None when there are none to choose from."""
        warm = self._catalog.parents()
        if not warm and self._repositories is None:
            return None
        known = await self._store.read(lambda db: self._known(db, job_id, base, warm))
        if known is None:
            return None
        job, repository, found, facts = known
        if parents.asks(job, found, facts.default_branch) and self._repositories is not None:
            facts = await self._ask(self._repositories, repository, job, found, facts)
        return parents.choose(job, base.name, found, facts)

    async def confirm(self, job_id: str, base: Template) -> Choice | None:
        """The choice again, with the key of the commit, which was not worth waiting for; None: it is not to be had.

        Of the repository's own commits only: one from a fork has no key here.
        """
        known = await self._store.read(lambda db: self._known(db, job_id, base, self._catalog.parents()))
        if known is None or self._repositories is None:
            return None
        job, repository, found, facts = known
        if not facts.own:
            return None
        if not facts.keys:
            try:
                async with asyncio.timeout(_CONFIRM_SECONDS):
                    facts = await self._with_keys(self._repositories, repository, job, found, facts)
            except (TimeoutError, CannotLookError):
                return None
        return parents.choose(job, base.name, found, facts)

    async def _known(
        self, db: AsyncConnection, job_id: str, base: Template, warm: Sequence[Parent]
    ) -> tuple[Job, Repository, list[Parent], Facts] | None:
        """What the database tells."""
        job = (await q.jobs_by_id(db, [job_id])).get(job_id)
        if job is None:
            return None
        name = f"{job.owner}/{job.repo}".lower()
        found = parents.candidates(job, base.name, warm)
        repository = await bq.repository(db, job.forge, name) or Repository(
            forge=job.forge, name=name, owner=job.owner, repo=job.repo, seen_at=self._clock()
        )
        own, keys = False, frozenset[str]()
        if found:
            own = await bq.is_head(db, job.forge, name, job.head_sha, job.head_branch)
            keys = _keys(await bq.keys_of(db, job.forge, name, job.head_sha), found)
        bakes = await bq.last_bakes(db, self._host, job.forge, name)
        default = repository.default_branch
        facts = Facts(
            default_branch=default,
            own=own or None,
            keys=keys,
            bake=_relevant(bakes, job.head_branch if own else default, default),
            trouble=repository.trouble,
            watched=self._repositories is not None,
        )
        return job, repository, found, facts

    async def _ask(
        self,
        repositories: Repositories,
        repository: Repository,
        job: Job,
        found: list[Parent],
        known: Facts,
    ) -> Facts:
        """Ask the mirror for what is not known and could change the choice; what is learned is kept."""
        facts = known
        try:
            async with asyncio.timeout(self._limit):
                if facts.own is None:
                    own = await repositories.on_branch(repository, job.head_sha, job.head_branch)
                    facts = msgspec.structs.replace(facts, own=own)
                    if own:
                        await self._keep_own(job)
                if facts.own and not facts.keys and "key" in parents.asks(job, found, facts.default_branch):
                    facts = await self._with_keys(repositories, repository, job, found, facts)
        except (TimeoutError, CannotLookError) as error:
            log.warning(
                "choice_not_certain", job=job.id, repository=repository.name, error=str(error) or "late"
            )
        return facts

    async def _with_keys(
        self, repositories: Repositories, repository: Repository, job: Job, found: list[Parent], known: Facts
    ) -> Facts:
        """With the keys of the job's commit, from the mirror."""
        bases = {p.base_digest: p.machine.runner for p in found}
        fresh = await repositories.keys(repository, job.head_sha, bases)
        await self._keep_keys(repository, job, fresh)
        return msgspec.structs.replace(known, keys=_keys(fresh, found))

    async def _keep_own(self, job: Job) -> None:
        seen = Push(
            forge=job.forge, owner=job.owner, repo=job.repo, branch=job.head_branch, commit=job.head_sha,
            seen_at=self._clock(),
        )  # fmt: skip
        await self._store.write(lambda db: bq.save_head(db, seen))

    async def _keep_keys(self, repository: Repository, job: Job, keys: dict[str, str]) -> None:
        now = self._clock()
        await self._store.write(
            lambda db: bq.save_keys(db, job.forge, repository.name, job.head_sha, keys, now)
        )


def _keys(by_base: dict[str, str], found: list[Parent]) -> frozenset[str]:
    """Of the keys of a commit, those on the bases that the parents in question stand on."""
    bases = {parent.base_digest for parent in found}
    return frozenset(key for base, key in by_base.items() if base in bases)


def _relevant(bakes: list[Bake], *branches: str | None) -> Bake | None:
    """The newest bake of the first of ``branches`` that has any."""
    for branch in branches:
        for bake in bakes:
            if bake.branch == branch:
                return bake
    return None
