"""One deciding transaction: inbox → jobs → demand → runners with a place on a host. No I/O but the database.

Everything a pass decides is committed at once, so the way from an event to the start of a fork is one commit.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service import demand, labels, parents, placement
from runner_service.domain import (
    Held,
    Host,
    Ignored,
    Job,
    JobEvent,
    Parent,
    Push,
    Repository,
    Runner,
    Template,
    TimelineRow,
    timeline,
)
from runner_service.ingest import Books, Choose, ScopeOf, age_out, apply, serve
from runner_service.store import bake_queries as bq
from runner_service.store import queries as q

log = structlog.get_logger("decide")

_INBOX_BATCH = 200
_UNSERVED_BATCH = 200
# GitHub fails a job that was queued for 24 h, and one that waited 30 days for an approval.
_QUEUED_LIMIT = 25 * 3600.0
_WAITING_LIMIT = 31 * 86400.0
# Runners that wait for room beyond what a host can hold: enough to fill it at once, not one per queued job.
_WAITING_MARGIN = 2


class Rules(msgspec.Struct, frozen=True):
    """What a pass decides by. ``host_seen_s``: a host silent for longer takes no new VM."""

    service: str
    default_template: str
    extra_labels: tuple[str, ...]
    name_prefix: str
    wanted_limit: float
    fork_limit: float
    lease_s: float = 30.0
    host_seen_s: float = 60.0


class Decision(msgspec.Struct):
    """What came out: runners to drive from now on, runners to wake, outcomes to count.

    ``moved``: a repository is new or a branch of one moved, so that a bake may be due.
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


Interpret = Callable[[q.InboxRow], JobEvent | Push | Ignored]


class Decider:
    """Makes decisions; keeps nothing between them."""

    def __init__(
        self,
        rules: Rules,
        *,
        interpret: Interpret,
        scope_of: ScopeOf,
        templates: Callable[[], Sequence[Template]],
        parents: Callable[[], Sequence[Parent]],
        held: Callable[[Job], Held | None] = lambda _job: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rules = rules
        self._interpret = interpret
        self._scope_of = scope_of
        self._templates = templates
        self._parents = parents
        self._held = held
        self._clock = clock

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
        new = await self._balance(
            db, books, templates=templates, warm=warm, brakes=brakes, hosts=hosts, now=now
        )
        self._place(books, decision, new, hosts, now)
        await self._save(db, books, decision, new)
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

    # ── demand ───────────────────────────────────────────────────────────────────────────────────

    async def _balance(
        self,
        db: AsyncConnection,
        books: Books,
        *,
        templates: Sequence[Template],
        warm: Sequence[Parent],
        brakes: Mapping[str, demand.Brake],
        hosts: Sequence[Host],
        now: float,
    ) -> list[Runner]:
        """Counts decide per group: runners to make are returned (still ``wanted``), too many are told to go."""
        new: list[Runner] = []
        by_name = {template.name: template for template in templates}
        counts = await q.queued_counts(db)
        places = sum(host.max_vms for host in hosts if not host.draining)
        waiting = sum(runner.state == "wanted" for runner in books.runners.values())
        for group, difference in demand.balance(counts, books.runners.values()).items():
            if difference < 0:
                await self._give_up(db, books, group, -difference, now)
                continue
            brake = brakes.get(group)
            count = min(difference, max(0, places * _WAITING_MARGIN - waiting))
            jobs = await q.queued_jobs(db, group, difference + len(books.runners) if count else 1)
            jobs = [books.jobs.get(job.id, job) for job in jobs]
            template = by_name.get(jobs[0].template or "") if jobs else None
            if template is None:
                self._template_vanished(books, jobs, now)
            elif (held := self._held(jobs[0])) is not None:
                soon = max(1.0, held.until - now)
                self._hold_back(books, jobs, f"{held.reason}; next try in {soon:.0f} s", now)
            elif brake is not None and now < brake.until:
                self._hold_back(books, jobs, f"{brake.reason}; next try in {brake.until - now:.0f} s", now)
            elif count:
                made = demand.made_for([job.id for job in jobs], books.runners.values(), count)
                by_id = {job.id: job for job in jobs}
                new.extend(self._wanted(by_id[job_id], template, group, warm, now) for job_id in made)
                waiting += len(made)
            else:
                self._hold_back(books, jobs, f"capacity: all {places} places are in use or promised", now)
        books.runners.update((runner.id, runner) for runner in new)
        return new

    def _wanted(self, job: Job, template: Template, group: str, warm: Sequence[Parent], now: float) -> Runner:
        """Promised is what the largest of the machines takes that it may be forked from; the fork decides which."""
        may_be = [template, *(parent.machine for parent in parents.candidates(job, template.name, warm))]
        runner_id = f"{self._rules.name_prefix}-{secrets.token_hex(6)}"
        return Runner(
            id=runner_id,
            forge=job.forge,
            scope_kind=job.scope_kind,
            scope_path=job.scope_path,
            labels=labels.registered_labels(job.labels),
            group_key=group,
            template=template.name,
            digest=template.digest,
            memory_mib=max(one.need_mib for one in may_be),
            state="wanted",
            state_at=now,
            deadline=now + self._rules.wanted_limit,
            created_at=now,
            event_at=job.event_at,
            job_id=job.id,
        )

    async def _give_up(self, db: AsyncConnection, books: Books, group: str, count: int, now: float) -> None:
        queued = frozenset(job.id for job in await q.queued_jobs(db, group, len(books.runners) + 1))
        for runner in demand.surplus(books.runners.values(), group, count, queued):
            books.tell(runner.id, cancelled_at=now)
            books.lines.append(timeline(runner, now, "given up", "no queued job needs this runner any more"))

    def _template_vanished(self, books: Books, jobs: Sequence[Job], now: float) -> None:
        for job in jobs:
            books.jobs.setdefault(job.id, job)
            reason = f"the template '{job.template}' is not there any more"
            books.put_job(msgspec.structs.replace(job, group_key=None, waits_for=reason, updated_at=now))
            books.say(job, now, "not served", reason, "a template for its labels")

    def _hold_back(self, books: Books, jobs: Sequence[Job], reason: str, now: float) -> None:
        """Tell the oldest of the jobs why nothing is made for it; a changing number of seconds is no news."""
        for job in jobs[:1]:
            if (job.waits_for or "").partition(";")[0] != reason.partition(";")[0]:
                books.put_job(msgspec.structs.replace(job, waits_for=reason, updated_at=now))
                books.say(job, now, "waiting", reason, reason.partition(":")[0])

    # ── placement ────────────────────────────────────────────────────────────────────────────────

    def _place(
        self, books: Books, decision: Decision, new: Sequence[Runner], hosts: Sequence[Host], now: float
    ) -> None:
        """Give waiting runners, oldest first, a place on a host; the rest keep waiting, with the reason."""
        waiting = sorted(
            (r for r in books.runners.values() if r.state == "wanted"), key=lambda r: r.created_at
        )
        if not waiting:
            return
        room = _with_promises(hosts, books.runners.values())
        fresh = {runner.id for runner in new}
        for runner in waiting:
            placed, lines = self._place_one(runner, room, now)
            books.runners[runner.id] = placed
            books.lines.extend(lines)
            if placed.state == "forking":
                decision.started.append(placed)
            elif placed.state == "wanted" and lines:
                decision.reasons.append(lines[-1].step)
            if runner.id not in fresh and placed != runner:
                values = {name: getattr(placed, name) for name in _PLACED_COLUMNS}
                books.facts.setdefault(runner.id, {}).update(values)

    def _place_one(
        self, runner: Runner, hosts: dict[str, Host], now: float
    ) -> tuple[Runner, list[TimelineRow]]:
        """``wanted`` → (placed) → ``forking``, or why not; a runner nobody needs any more is gone at once."""
        replace = msgspec.structs.replace
        if runner.cancelled_at is not None or runner.killed_at is not None or now >= runner.deadline:
            code = "late_wanted" if now >= runner.deadline else "cancelled"
            reason = "waited too long for room" if code == "late_wanted" else "no job needs it any more"
            gone = replace(
                runner, state="gone", state_at=now, ended_at=now, code=code, reason=reason, waits_for=None
            )
            return gone, [timeline(runner, now, "gone", reason)]
        lines = (
            [timeline(runner, now, "wanted", "a queued job has no runner")]
            if runner.created_at == now
            else []
        )
        answer = placement.place(runner.memory_mib, list(hosts.values()))
        if isinstance(answer, placement.NoRoom):
            if runner.waits_for == answer.reason:
                return runner, lines
            told = timeline(runner, now, "waiting", answer.reason, "capacity")
            return replace(runner, waits_for=answer.reason), [*lines, told]
        hosts[answer.name] = placement.after(answer, runner.memory_mib)
        placed = replace(
            runner,
            state="forking",
            state_at=now,
            deadline=now + self._rules.fork_limit,
            host=answer.name,
            waits_for=None,
            lease_owner=answer.name,
            lease_until=now + self._rules.lease_s,
        )
        lines.append(timeline(placed, now, "placed", f"on {answer.name}"))
        lines.append(
            timeline(placed, now, "forking", f"from {runner.template} ({(runner.digest or '')[:12]})")
        )
        return placed, lines

    async def _save(
        self, db: AsyncConnection, books: Books, decision: Decision, new: Sequence[Runner]
    ) -> None:
        await q.add_runners(db, [books.runners[runner.id] for runner in new])
        fresh = {runner.id for runner in new}
        told = {runner_id: facts for runner_id, facts in books.facts.items() if runner_id not in fresh}
        await q.set_facts(db, told)
        decision.touched.update(told)
        await q.save_jobs(db, [books.jobs[job_id] for job_id in books.changed_jobs])
        await q.add_timeline(db, books.lines)


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


_PLACED_COLUMNS = (
    "state", "state_at", "deadline", "host", "waits_for", "lease_owner", "lease_until", "ended_at", "code", "reason",
)  # fmt: skip


def _with_promises(hosts: Sequence[Host], runners: Iterable[Runner]) -> dict[str, Host]:
    """The hosts with what the active runners hold of them."""
    found = {host.name: host for host in hosts}
    for runner in runners:
        host = found.get(runner.host or "")
        if host is not None and runner.takes_room:
            found[host.name] = placement.after(host, runner.memory_mib)
    return found
