"""One deciding transaction: inbox → jobs → queue → runners with a place on a host. No I/O but the database.

Everything a pass decides is committed at once, so the way from an event to the start of a fork is one commit.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service import demand, drain, labels, parents
from runner_service.dispatch import Dispatch, Rules
from runner_service.domain import (
    Held,
    Ignored,
    Job,
    JobEvent,
    Parent,
    Push,
    Repository,
    Runner,
    Scope,
    Template,
    TimelineRow,
)
from runner_service.fairness import Shares
from runner_service.ingest import Books, Choose, ScopeOf, age_out, apply, serve
from runner_service.store import bake_queries as bq
from runner_service.store import queries as q

__all__ = ["Decider", "Decision", "Rules"]

log = structlog.get_logger("decide")

_INBOX_BATCH = 200
_UNSERVED_BATCH = 200
# GitHub fails a job that was queued for 24 h, and one that waited 30 days for an approval.
_QUEUED_LIMIT = 25 * 3600.0
_WAITING_LIMIT = 31 * 86400.0


class Decision(msgspec.Struct):
    """What came out: runners to drive from now on, runners to wake, outcomes to count.

    ``moved``: a repository is new or a branch of one moved, so that a bake may be due. ``draining``: this host is.
    """

    started: list[Runner] = []
    touched: set[str] = set()
    outcomes: dict[str, int] = {}
    entered: dict[str, int] = {}
    found: dict[str, int] = {}
    reasons: list[str] = []
    processed: int = 0
    more: bool = False
    moved: bool = False
    draining: bool = False
    lines: list[TimelineRow] = []


Interpret = Callable[[q.InboxRow], JobEvent | Push | Ignored]


class Decider:
    """Makes decisions; keeps nothing between them but the debts of repositories, which a restart may forget."""

    def __init__(
        self,
        rules: Rules,
        *,
        interpret: Interpret,
        scope_of: ScopeOf,
        templates: Callable[[], Sequence[Template]],
        parents: Callable[[], Sequence[Parent]],
        held: Callable[[Scope], Held | None] = lambda _scope: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules = rules
        self._interpret = interpret
        self._scope_of = scope_of
        self._templates = templates
        self._parents = parents
        self._held = held
        self._clock = clock
        self._shares = Shares()

    def reconfigure(self, rules: Rules, scope_of: ScopeOf) -> None:
        """Decide by other rules from the next pass on."""
        self._rules = rules
        self._scope_of = scope_of

    async def decide(
        self,
        db: AsyncConnection,
        *,
        observed: Callable[[], Sequence[JobEvent]],
        brakes: Mapping[str, demand.Brake],
        look_again: bool,
    ) -> Decision:
        """One pass within the caller's transaction. ``look_again``: also try jobs that no template served before."""
        now = self._clock()
        decision = Decision()
        await q.lock_scheduler(db, self._rules.service, now + self._rules.lease_s)
        deliveries = await q.pending_deliveries(db, _INBOX_BATCH)
        decision.more = len(deliveries) == _INBOX_BATCH
        events, pushes, outcomes = self._read(deliveries)
        events.extend(observed())
        known = await q.jobs_by_id(db, {event.job_id for event in events}) if events else {}
        books = Books(known, await q.active_runners(db))
        missing = {event.runner_name for event in events if event.runner_name} - set(books.runners)
        if missing:
            books.past = await q.runners_by_id(db, missing)
        templates, warm = self._templates(), self._parents()
        chosen = self._chooser(templates, warm)
        heard: dict[str, Repository] = {}
        for event in events:
            outcome = self._work(books, event, chosen, now)
            if outcome == "new":
                job = books.jobs[event.job_id]
                heard[f"{job.owner}/{job.repo}".lower()] = _used(job, now)
                decision.found[event.via] = decision.found.get(event.via, 0) + 1
            decision.outcomes[outcome] = decision.outcomes.get(outcome, 0) + 1
            if outcome in ("new", "advanced"):
                decision.entered[event.state] = decision.entered.get(event.state, 0) + 1
        if look_again:
            await self._look_again(db, books, chosen, now)
        await q.save_jobs(db, [books.jobs[job_id] for job_id in books.changed_jobs])
        await q.close_deliveries(db, outcomes, now)
        books.changed_jobs.clear()
        await self._note_repositories(db, heard.values(), pushes, now)
        decision.moved = bool(heard or pushes)
        hosts = await q.live_hosts(db, now - self._rules.host_seen_s)
        drain.release(books, hosts, now)
        decision.draining = any(host.draining for host in hosts if host.name == self._rules.service)
        dispatch = Dispatch(
            db,
            books,
            rules=self._rules,
            templates=templates,
            warm=warm,
            brakes=brakes,
            held=self._held,
            hosts=hosts,
            choose=chosen,
            shares=self._shares,
            now=now,
        )
        out = await dispatch.run()
        self._shares = out.shares
        decision.started, decision.reasons = out.started, out.reasons
        decision.more = decision.more or out.more
        await self._save(db, books, decision)
        decision.processed = len(deliveries)
        return decision

    async def _look_again(self, db: AsyncConnection, books: Books, choose: Choose, now: float) -> None:
        """Give up the jobs that the forge must have given up, and try the others that no template served."""
        for job in await q.aged_jobs(
            db, queued_before=now - _QUEUED_LIMIT, waiting_before=now - _WAITING_LIMIT, limit=_UNSERVED_BATCH
        ):
            if job.id not in books.changed_jobs:
                age_out(books, job, now)
        for job in await q.unserved_jobs(db, _UNSERVED_BATCH):
            if job.id not in books.changed_jobs:
                serve(books, job, choose, now)

    def _work(self, books: Books, event: JobEvent, choose: Choose, now: float) -> str:
        """One event that trips over a fault of ours must not hold up all that come after it."""
        try:
            return apply(books, event, choose=choose, scope_of=self._scope_of, now=now)
        except Exception:
            log.exception("event_failed", job=event.job_id, state=event.state)
            return "failed"

    def _read(self, deliveries: Sequence[q.InboxRow]) -> tuple[list[JobEvent], list[Push], dict[int, str]]:
        events: list[JobEvent] = []
        pushes: list[Push] = []
        outcomes: dict[int, str] = {}
        for row in deliveries:
            event = self._interpret(row)
            if isinstance(event, Ignored):
                outcomes[row.seq] = event.reason
            elif isinstance(event, Push):
                allowed = self._scope_of(event) is not None
                outcomes[row.seq] = "push" if allowed else "not_allowed"
                pushes.extend([event] if allowed else [])
            else:
                outcomes[row.seq] = "job"
                events.append(event)
        return events, pushes, outcomes

    async def _note_repositories(
        self, db: AsyncConnection, heard: Iterable[Repository], pushes: Sequence[Push], now: float
    ) -> None:
        """Who was heard of, which commits are really on a branch, and that something moved: many pushes are one."""
        for repository in heard:
            await bq.save_repository(db, repository)
        for repository in {
            f"{push.owner}/{push.repo}".lower(): _moved(push, now) for push in pushes
        }.values():
            await bq.save_repository(db, repository)
        for push in pushes:
            if push.commit:
                await bq.save_head(db, push)

    def _chooser(self, templates: Sequence[Template], warm: Sequence[Parent]) -> Choose:
        rules = self._rules

        def choose(job: Job) -> labels.Serve | labels.Foreign | labels.Unservable:
            asked = (
                parents.labels_asked(job.owner, job.repo, warm) if job.scope_kind == "repository" else None
            )
            return labels.choose(
                job.labels, templates, default=rules.default_template, extra=rules.extra_labels, asked=asked
            )

        return choose

    async def _save(self, db: AsyncConnection, books: Books, decision: Decision) -> None:
        await q.set_facts(db, books.facts)
        decision.touched.update(books.facts)
        await q.save_jobs(db, [books.jobs[job_id] for job_id in books.changed_jobs])
        await q.add_timeline(db, books.lines)
        decision.lines = books.lines


def _used(job: Job, now: float) -> Repository:
    return Repository(
        forge=job.forge,
        name=f"{job.owner}/{job.repo}".lower(),
        owner=job.owner,
        repo=job.repo,
        seen_at=now,
        used_at=now,
    )


def _moved(push: Push, now: float) -> Repository:
    return Repository(
        forge=push.forge,
        name=f"{push.owner}/{push.repo}".lower(),
        owner=push.owner,
        repo=push.repo,
        seen_at=now,
        default_branch=push.default_branch or None,
        moved_at=now,
    )
