"""Finds by looking what no event told: queued jobs, and how jobs went on whose events were lost.

    every tick, an owner at a time ──► looks: repositories that are due ──► untaken jobs ──► worked like events
                                  └──► questions: jobs in doubt (doubts.py), one by one ──► worked like events

Each owner has one task at most, each look and each round a deadline, so that one owner's trouble or slowness delays no
other's. Which repositories are due is decided in ``poll_plan.py``. Nothing here is needed after a restart: the next
looks find it again.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from github_webhook.errors import Forbidden, ForgeError, NotFound, Suspended
from runner_service.domain import JOB_RANK, Job, JobEvent, Repository
from runner_service.doubts import Doubts, Unfinished, doubtful, given_up
from runner_service.labels import is_ours
from runner_service.poll_plan import Pace, Seen, choose
from runner_service.ports import Forge, Listed, Listings
from runner_service.store import bake_queries as bq
from runner_service.store import queries as q
from runner_service.store.store import Store
from runner_service.telemetry import Metrics

log = structlog.get_logger("polling")

_TICK = 10.0
_REACH_EVERY = 600.0
_LOOKS_AT_ONCE = 4
_LOOK_LIMIT = 60.0
_ROUND_LIMIT = 300.0
_FIRST_PAUSE = 10.0
_OWNER_PAUSE = 300.0
_REPOSITORY_PAUSE = 3600.0
_OWNERS = 1000
_REPOSITORIES = 10_000
_HEARD = 2000
_STRANDED = 500


class _Owner(msgspec.Struct):
    """What is known of one account; keys of ``repositories`` are names in lower case."""

    name: str
    repositories: dict[str, Seen]
    doubts: Doubts
    unlisted: dict[str, set[str]]
    stranded: set[str]
    in_reach: bool = False
    reached_at: float = 0.0
    chosen_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    reason: str = ""
    task: asyncio.Task[None] | None = None


class Poller:
    """Looks at one forge. ``every`` is the interval in seconds; 0: only questions are asked, nothing is looked at.

    ``named`` are repositories (owner, name) to look at from the start, ``allowed`` says which (``owner/name``) are
    served at all. What is found goes to ``observe``.
    """

    def __init__(
        self,
        *,
        store: Store,
        name: str,
        forge: Forge,
        listings: Listings,
        allowed: Callable[[str, str], bool],
        observe: Callable[[JobEvent], None],
        metrics: Metrics,
        every: float,
        named: tuple[tuple[str, str], ...] = (),
        tick: float = _TICK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._name = name
        self._forge = forge
        self._listings = listings
        self._allowed = allowed
        self._observe = observe
        self._metrics = metrics
        self._every = every
        self._tick = min(tick, every) if every else tick
        self._clock = clock
        self._owners: dict[str, _Owner] = {}
        self._reaching: asyncio.Task[None] | None = None
        self._reached_at = 0.0
        for owner, repo in named:
            self._see(owner, repo)

    def reconfigure(
        self,
        *,
        listings: Listings,
        allowed: Callable[[str, str], bool],
        named: tuple[tuple[str, str], ...],
    ) -> None:
        """Other repositories are served from now on; which ones there are is asked anew."""
        self._listings = listings
        self._allowed = allowed
        self._reached_at = 0.0
        for owner, repo in named:
            self._see(owner, repo)

    async def run(self) -> None:
        """Look and ask whenever it is time, until cancelled."""
        try:
            while True:
                try:
                    await self._pass()
                except Exception as error:
                    log.exception("poll_failed", error=str(error))
                await asyncio.sleep(self._tick)
        finally:
            tasks = [owner.task for owner in self._owners.values()] + [self._reaching]
            for task in tasks:
                if task is not None:
                    task.cancel()
            await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)

    async def _pass(self) -> None:
        """Start a round for every owner that has something due and none under way."""
        now = self._clock()
        if self._every and now - self._reached_at >= _REACH_EVERY and not _busy(self._reaching):
            self._reached_at = now
            self._reaching = asyncio.create_task(self._find_owners(), name="poll-owners")
        await self._read_books()
        for owner in self._owners.values():
            if _busy(owner.task) or now < owner.retry_at:
                continue
            owner.doubts.hold(owner.stranded.union(*owner.unlisted.values()))
            looks = self._choose(owner, now)
            due = owner.doubts.due(now)
            if looks or due or self._reach_due(owner, now):
                owner.task = asyncio.create_task(self._round(owner, looks, due), name=f"poll-{owner.name}")

    async def _read_books(self) -> None:
        """The repositories heard of, and the jobs whose end only the forge can tell."""

        async def read(db: AsyncConnection) -> tuple[list[Repository], list[tuple[str, str]]]:
            return await bq.list_repositories(db, _HEARD), await q.stranded_jobs(db, self._name, _STRANDED)

        heard, stranded = await self._store.read(read)
        for repository in heard:
            if repository.forge == self._name and self._allowed(repository.owner, repository.repo):
                self._see(repository.owner, repository.repo, repository.used_at or 0.0)
        for owner in self._owners.values():
            owner.stranded = set()
        for job_id, name in stranded:
            owner = self._owner(name)
            if owner is not None:
                owner.stranded.add(job_id)

    def _owner(self, name: str) -> _Owner | None:
        """What is known of this account; None when there are too many."""
        key = name.lower()
        if key not in self._owners and len(self._owners) < _OWNERS:
            self._owners[key] = _Owner(name, {}, Doubts(), {}, set())
        return self._owners.get(key)

    def _see(self, owner: str, repo: str, used_at: float = 0.0) -> None:
        known = self._owner(owner)
        if known is None or len(known.repositories) >= _REPOSITORIES:
            return
        seen = known.repositories.setdefault(repo.lower(), Seen(owner=owner, repo=repo))
        seen.used_at = max(seen.used_at, used_at)

    def _choose(self, owner: _Owner, now: float) -> list[Seen]:
        if not self._every:
            return []
        allowance = self._listings.allowance(owner.name)
        pace, looks = choose(list(owner.repositories.values()), allowance, self._every, owner.chosen_at, now)
        if looks:
            owner.chosen_at = now
        label = self._metrics.owners.of(owner.name)
        self._metrics.poll_interval.labels(label).set(pace.interval)
        if allowance is not None:
            self._metrics.rate_limit.labels(label).set(allowance.remaining)
        self._tell_pace(owner, pace)
        return looks

    def _tell_pace(self, owner: _Owner, pace: Pace) -> None:
        if bool(pace.reason) != bool(owner.reason):
            tell = log.warning if pace.reason else log.info
            tell(
                "poll_stretched" if pace.reason else "poll_interval_kept", owner=owner.name,
                seconds=round(pace.interval), reason=pace.reason,
            )  # fmt: skip
        owner.reason = pace.reason

    # ── what the credentials reach ───────────────────────────────────────────────────────────────

    async def _find_owners(self) -> None:
        try:
            async with asyncio.timeout(_ROUND_LIMIT):
                for name in await self._listings.owners():
                    owner = self._owner(name)
                    if owner is not None:
                        owner.in_reach = True
        except (ForgeError, TimeoutError) as error:
            self._reached_at = self._clock() - _REACH_EVERY + _LOOK_LIMIT
            log.warning("owners_unknown", error=str(error) or "no answer in time")
        except Exception as error:
            log.exception("owners_unknown", error=str(error))

    def _reach_due(self, owner: _Owner, now: float) -> bool:
        return bool(self._every) and owner.in_reach and now - owner.reached_at >= _REACH_EVERY

    async def _reach(self, owner: _Owner) -> None:
        # Should it fail, it is tried again in a minute: a repository whose first job no event told of waits for this.
        owner.reached_at = self._clock() - _REACH_EVERY + _LOOK_LIMIT
        for name, repo in await self._listings.repositories(owner.name):
            if self._allowed(name, repo):
                self._see(name, repo)
        owner.reached_at = self._clock()

    # ── a round of one owner ─────────────────────────────────────────────────────────────────────

    async def _round(self, owner: _Owner, looks: list[Seen], due: list[str]) -> None:
        """Looks first, since a job may wait for one; then the questions. An owner's trouble ends its round."""
        try:
            async with asyncio.timeout(_ROUND_LIMIT):
                await self._look_at_all(owner, looks)
                for job_id in due:
                    await self._ask(owner, job_id)
                if self._reach_due(owner, self._clock()):
                    await self._reach(owner)
            owner.failures = 0
        except ForgeError as error:
            self._hold_back(owner, error)
        except TimeoutError:
            self._metrics.polls.labels("round_timeout").inc()
            log.warning("poll_round_timeout", owner=owner.name, seconds=_ROUND_LIMIT)
        except Exception as error:
            self._metrics.polls.labels("internal_error").inc()
            log.exception("poll_round_failed", owner=owner.name, error=str(error))

    def _hold_back(self, owner: _Owner, error: ForgeError) -> None:
        """The account's credentials, its rate limit or the forge itself: nothing of this owner is asked for a while."""
        owner.failures += 1
        pause = min(_OWNER_PAUSE, self._tick * 2.0 ** min(owner.failures - 1, 10))
        owner.retry_at = max(self._clock() + pause, error.retry_at or 0.0)
        log.warning("poll_held_back", owner=owner.name, code=error.code, error=str(error)[:300])

    async def _look_at_all(self, owner: _Owner, looks: list[Seen]) -> None:
        todo = deque(looks)

        async def work() -> None:
            while todo:
                try:
                    await self._look(owner, todo.popleft())
                except BaseException:
                    todo.clear()
                    raise

        workers = [asyncio.create_task(work()) for _ in range(min(_LOOKS_AT_ONCE, len(looks)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _look(self, owner: _Owner, seen: Seen) -> None:
        """One look within its deadline. Raises a ForgeError when it is not this repository's own trouble."""
        began, first, after = self._clock(), not seen.looked_at, seen.after
        seen.looked_at = began
        listed: Listed | None = None
        try:
            async with asyncio.timeout(_LOOK_LIMIT):
                listed = await self._listings.untaken(seen.owner, seen.repo, after=after)
        except TimeoutError:
            self._put_off(seen, "look_timeout", f"no answer within {_LOOK_LIMIT:g} s")
        except ForgeError as error:
            if not _of_repository(error):
                self._metrics.polls.labels(error.code).inc()
                raise
            self._put_off(seen, error.code, str(error))
        books = await self._store.read(lambda db: q.unfinished_jobs(db, self._name, seen.owner, seen.repo))
        ids = None
        if listed is not None:
            seen.failures, seen.after = 0, listed.more or 0
            seen.count(listed.calls, listed.paid, first=first)
            ids = {job.job_id for job in listed.jobs} if listed.more is None and not after else None
            self._found(listed, books)
        owner.unlisted[seen.repo.lower()] = doubtful(books, ids, began)

    def _put_off(self, seen: Seen, code: str, reason: str) -> None:
        """Deleted, renamed, out of reach, or slow: this repository alone is looked at less often."""
        self._metrics.polls.labels(code).inc()
        seen.failures += 1
        seen.retry_at = self._clock() + min(_REPOSITORY_PAUSE, _FIRST_PAUSE * 2.0**seen.failures)
        if seen.failures == 1:
            log.warning("poll_put_off", repository=f"{seen.owner}/{seen.repo}", code=code, error=reason[:300])

    def _found(self, listed: Listed, books: list[Unfinished]) -> None:
        events = news(listed.jobs, books)
        self._metrics.polls.labels("news" if events else "nothing").inc()
        for event in events:
            self._observe(event)

    async def _ask(self, owner: _Owner, job_id: str) -> None:
        """Ask about one job. Raises a ForgeError when it is not its repository's own trouble."""
        owner.doubts.asked(job_id, self._clock())
        job = (await self._store.read(lambda db: q.jobs_by_id(db, [job_id]))).get(job_id)
        if job is None or not _open(job, owner):
            return
        try:
            event = await self._forge.job(job.scope, job.forge_job_id, owner=job.owner, repo=job.repo)
        except ForgeError as error:
            self._metrics.polls.labels(error.code).inc()
            if not _of_repository(error):
                raise
            return
        self._metrics.polls.labels("asked").inc()
        if owner.doubts.answered(job_id, known=event is not None):
            event = given_up(job, self._clock())
        if event is not None and JOB_RANK[event.state] > JOB_RANK[job.state]:
            self._observe(event)


def news(jobs: tuple[JobEvent, ...], books: list[Unfinished]) -> list[JobEvent]:
    """Those found jobs that are ours and further than the books have them, or not there at all."""
    known = {job.id: JOB_RANK[job.state] for job in books}
    return [job for job in jobs if is_ours(job.labels) and JOB_RANK[job.state] > known.get(job.job_id, -1)]


def _open(job: Job, owner: _Owner) -> bool:
    return job.state in ("queued", "waiting") or job.id in owner.stranded


def _of_repository(error: ForgeError) -> bool:
    """Whether it is the trouble of one repository: renamed, deleted, or a permission is missing there."""
    return isinstance(error, NotFound | Forbidden) and not isinstance(error, Suspended)


def _busy(task: asyncio.Task[None] | None) -> bool:
    return task is not None and not task.done()
