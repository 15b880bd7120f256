"""What has to be baked: looks at the watched repositories when something moved, now and then, and after trouble.

    a push, a first job, another base template, ``poll_s`` over ─► look (fetch) ─► keys of the watched branches
        ─► what ``wanted_bakes`` says is queued: one row a key, whatever the number of pushes

A repository is watched from its first job on, if it has a parent, or if the settings name it.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from github_webhook.patterns import fits
from runner_service.domain import Bake, Parent, Push, Repository, Template
from runner_service.parents import of_repository
from runner_service.ports import CannotLookError, Catalog, Look, Repositories
from runner_service.settings import Bakes as BakeSettings
from runner_service.store import bake_queries as bq
from runner_service.store.store import Store

log = structlog.get_logger("bake_plan")

_LOOKS_AT_ONCE = 4
_REPOSITORIES = 2000
_TICK = 5.0
_TROUBLE_SECONDS = 10.0
_MOST_TROUBLE_SECONDS = 3600.0


class Wanted(msgspec.Struct, frozen=True):
    """A bake that should be queued. ``force``: although a parent of this key is there."""

    branch: str
    commit: str
    key: str
    why: str
    due_at: float
    force: bool = False


def wanted_bakes(
    look: Look,
    keys: Mapping[str, str],
    base: Template,
    *,
    mine: Sequence[Parent],
    last: Sequence[Bake],
    there: Callable[[Bake], bool],
    withdrawn: Callable[[Bake], bool],
    now: float,
    every: float,
    retry: float,
) -> list[Wanted]:
    """The bakes that the watched branches need, the default branch's first.

    ``keys`` by commit; ``mine`` the repository's parents, ``last`` its newest bakes by branch and key, the newest
    first. Whether what a bake made is still ``there``, or was ``withdrawn`` by a rollback; ``every`` and ``retry`` in
    seconds, ``every`` 0 for never.
    """
    found: list[Wanted] = []
    for branch, commit in look.watched.items():
        key = keys.get(commit)
        if key is None:
            continue
        current = next((p for p in mine if p.branch == branch), None)
        made = next((b for b in last if (b.branch, b.key) == (branch, key)), None)
        newest = next((b for b in last if b.branch == branch), None)
        fresh = _fresh_since(key, current, mine)
        if fresh is None and made is not None and made.state == "done" and there(made):
            # Made, and not in use: what a name means after a rollback is the operator's choice. But when the branch
            # went elsewhere meanwhile and came back, it is wanted again.
            fresh = made.ended_at if made is newest or withdrawn(made) else None
        if fresh is not None:
            if every and fresh + every <= now and (made is None or (made.ended_at or now) + every <= now):
                found.append(Wanted(branch, commit, key, f"every {every / 3600:g} h", now, force=True))
            continue
        due = now
        if made is not None and made.state == "failed":
            if made.commit == commit and not (every and (made.ended_at or now) + every <= now):
                continue  # nothing has changed: it would fail again
            due = max(now, (made.ended_at or now) + retry * 2**made.attempts)
        found.append(Wanted(branch, commit, key, _reason(branch, key, base, current), due))
    return found


def _fresh_since(key: str, current: Parent | None, mine: Sequence[Parent]) -> float | None:
    """Since when there is a parent of this key, of the branch or of another one; None: there is none."""
    if current is not None and current.key == key:
        return current.created_at
    return max((p.created_at for p in mine if p.key == key), default=None)


def _reason(branch: str, key: str, base: Template, current: Parent | None) -> str:
    if current is None:
        return f"{branch} has no parent yet"
    if current.base_digest != base.digest:
        return f"the template {base.name} is another one now"
    return f"the dependencies of {branch} changed: key {current.key[:12]} → {key[:12]}"


class _Seen(msgspec.Struct):
    """What this process remembers of its last look at a repository."""

    at: float
    bases: frozenset[str]
    failures: int = 0


class Planner:
    """Looks, and queues. ``queued`` is called when something was."""

    def __init__(
        self,
        *,
        store: Store,
        host: str,
        catalog: Catalog,
        repositories: Repositories,
        settings: BakeSettings,
        default_template: str,
        queued: Callable[[], None],
        tick: float = _TICK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._host = host
        self._catalog = catalog
        self._repositories = repositories
        self._settings = settings
        self._default_template = default_template
        self._queued = queued
        self._tick = tick
        self._clock = clock
        self._woken = asyncio.Event()
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._looking: dict[tuple[str, str], asyncio.Task[None]] = {}

    def reconfigure(self, settings: BakeSettings, default_template: str) -> None:
        """Other patterns and times from the next look on."""
        self._settings = settings
        self._default_template = default_template
        self.wake()

    def wake(self) -> None:
        """A repository is new, or a branch of one moved."""
        self._woken.set()

    async def run(self) -> None:
        """Look whenever it is time, until cancelled. A repository that is slow holds up no other."""
        try:
            while True:
                self._woken.clear()
                try:
                    await self._pass()
                except Exception as error:
                    log.exception("plan_failed", error=str(error))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._tick):
                        await self._woken.wait()
        finally:
            looking = list(self._looking.values())
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)

    async def _pass(self) -> None:
        now = self._clock()
        with_parents = {parent.repository for parent in self._catalog.parents()}
        digests = frozenset(template.digest for template in self._catalog.templates())
        for repository in await self._store.read(lambda db: bq.list_repositories(db, _REPOSITORIES)):
            if len(self._looking) >= _LOOKS_AT_ONCE:
                return
            key = (repository.forge, repository.name)
            watched = repository.name in with_parents or self._is_watched(repository)
            if watched and key not in self._looking and self._is_due(repository, digests, now):
                task = asyncio.create_task(self._look(repository), name=f"look-{repository.name}")
                self._looking[key] = task
                task.add_done_callback(lambda _, key=key: self._looked(key))

    def _looked(self, key: tuple[str, str]) -> None:
        self._looking.pop(key, None)
        self.wake()

    def _is_watched(self, repository: Repository) -> bool:
        return repository.used_at is not None or fits(repository.name, self._settings.repositories)

    def _is_due(self, repository: Repository, digests: frozenset[str], now: float) -> bool:
        seen = self._seen.get((repository.forge, repository.name))
        if seen is None:
            return True
        moved = repository.moved_at is not None and repository.moved_at >= seen.at
        if seen.failures:
            # Somebody who pushes what mends it need not wait for long.
            pause = _TROUBLE_SECONDS * (1 if moved else 2 ** min(seen.failures - 1, 10))
            return now >= seen.at + min(_MOST_TROUBLE_SECONDS, pause)
        rebased = bool(seen.bases - digests)
        polled = self._settings.poll_s > 0 and now >= seen.at + self._settings.poll_s
        return moved or rebased or polled

    def _parents(self, repository: Repository) -> list[Parent]:
        return of_repository(repository.owner, repository.repo, self._catalog.parents())

    async def _look(self, repository: Repository) -> None:
        """Look at one repository and queue what it needs. Trouble is written on its row; later it is tried again."""
        name = (repository.forge, repository.name)
        started = self._clock()
        failures = self._seen[name].failures if name in self._seen else 0
        trouble: str | None = None
        bases: frozenset[str] = frozenset()
        try:
            async with asyncio.timeout(self._settings.look_limit_s):
                bases = await self._plan(repository)
        except TimeoutError:
            trouble = f"it could not be looked at within {self._settings.look_limit_s:.0f} s"
        except CannotLookError as error:
            trouble = str(error)[:2000]
        except Exception as error:
            log.exception("look_failed", repository=repository.name)
            trouble = f"internal error: {type(error).__name__}: {error}"[:500]
        self._seen[name] = _Seen(started, bases, failures + 1 if trouble else 0)
        if trouble != repository.trouble:
            log.info("repository", repository=repository.name, trouble=trouble)
            await self._store.write(lambda db: bq.set_trouble(db, *name, trouble))

    async def _plan(self, repository: Repository) -> frozenset[str]:
        """Queue what is needed; the digests of the templates on which that was decided."""
        look = await self._repositories.look(repository)
        base = self._base(look)
        mine = self._parents(repository)
        bases = {base.digest: base.runner, **{p.base_digest: p.machine.runner for p in mine}}
        keys: dict[str, dict[str, str]] = {}
        for commit in dict.fromkeys(look.watched.values()):
            keys[commit] = await self._repositories.keys(repository, commit, bases)
        queued = await self._store.write(lambda db: self._write(db, repository, look, base, mine, keys))
        for bake in queued:
            log.info("bake_queued", bake=bake.id, name=bake.name, key=bake.key[:12], why=bake.why)
        if queued:
            self._queued()
        return frozenset({base.digest})

    def _base(self, look: Look) -> Template:
        name = look.template or self._default_template
        base = next((t for t in self._catalog.templates() if t.name == name), None)
        if base is None:
            raise CannotLookError(f"the template '{name}' is not baked on this host: microvm bake {name}")
        return base

    async def _write(
        self,
        db: AsyncConnection,
        repository: Repository,
        look: Look,
        base: Template,
        mine: Sequence[Parent],
        keys: Mapping[str, Mapping[str, str]],
    ) -> list[Bake]:
        """One transaction: what was seen, and what follows from it."""
        now = self._clock()
        forge, name = repository.forge, repository.name
        await bq.save_repository(db, msgspec.structs.replace(repository, default_branch=look.default_branch))
        for branch, commit in look.watched.items():
            head = Push(
                forge=forge,
                owner=repository.owner,
                repo=repository.repo,
                branch=branch,
                commit=commit,
                seen_at=now,
            )
            await bq.save_head(db, head)
        for commit, by_base in keys.items():
            await bq.save_keys(db, forge, name, commit, by_base, now)
        wanted = wanted_bakes(
            look,
            {commit: by_base[base.digest] for commit, by_base in keys.items() if base.digest in by_base},
            base,
            mine=mine,
            last=await bq.last_bakes(db, self._host, forge, name),
            there=lambda bake: bake.digest is not None and self._catalog.has(bake.digest),
            withdrawn=lambda bake: bake.digest in self._catalog.withdrawn(bake.name),
            now=now,
            every=self._settings.every_h * 3600,
            retry=self._settings.retry_s,
        )
        queued = [await bq.queue_bake(db, self._row(repository, base, one, now)) for one in wanted]
        return [bake for bake in queued if bake is not None]

    def _row(self, repository: Repository, base: Template, wanted: Wanted, now: float) -> Bake:
        return Bake(
            id=0,
            host=self._host,
            forge=repository.forge,
            repository=repository.name,
            branch=wanted.branch,
            commit=wanted.commit,
            key=wanted.key,
            base=base.name,
            base_digest=base.digest,
            state="queued",
            why=wanted.why,
            created_at=now,
            due_at=wanted.due_at,
            force=wanted.force,
        )
