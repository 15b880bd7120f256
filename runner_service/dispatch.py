"""The queue's part of a pass: which queued jobs get runners now, on which hosts, and what the others wait for.

    jobs counted by group and repository ─► too many runners: the surplus is given up
        ─► too many jobs: the newest of the longest queues stand outside until there is room
        ─► by fair turns (``fairness.py``): runners with a place on a host │ the reason why not

Jobs wait, not runners: a runner is made when its turn has come and there is room for it, in one commit.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service import demand, fairness, labels
from runner_service.domain import Held, Host, Job, Parent, Runner, Scope, Template, timeline
from runner_service.fairness import Key, Line, NotNow, Shares
from runner_service.ingest import Books, Choose, serve
from runner_service.limits import Limits
from runner_service.store import queries as q
from runner_service.store import queue_queries as qq

_BATCH = 200
_TOLD = 200
_FRUITLESS_WINDOW = 3600.0


class Rules(msgspec.Struct, frozen=True):
    """What a pass decides by. ``host_seen_s``: a host silent for longer takes no new VM."""

    service: str
    default_template: str
    extra_labels: tuple[str, ...]
    name_prefix: str
    fork_limit: float
    limits: Limits = Limits()
    lease_s: float = 30.0
    host_seen_s: float = 60.0


class Dispatched(msgspec.Struct):
    """Runners to drive from now on; codes of the reasons that were told; ``more``: there is work left for a pass."""

    shares: Shares
    started: list[Runner] = []
    reasons: list[str] = []
    more: bool = False


class Dispatch:
    """One pass over the queue within the caller's transaction; ``books`` are saved by the caller, new runners here."""

    def __init__(
        self,
        db: AsyncConnection,
        books: Books,
        *,
        rules: Rules,
        templates: Iterable[Template],
        warm: Iterable[Parent],
        brakes: Mapping[str, demand.Brake],
        held: Callable[[Scope], Held | None],
        hosts: Sequence[Host],
        choose: Choose,
        shares: Shares,
        now: float,
    ) -> None:
        self._db = db
        self._books = books
        self._rules = rules
        self._templates = {template.name: template for template in templates}
        self._sizes = _sizes(warm)
        self._brakes = brakes
        self._held = held
        self._hosts = hosts
        self._choose = choose
        self._now = now
        self._reasons: dict[Key, NotNow] = {}
        self._passed: dict[str, str] = {}
        self._out = Dispatched(shares)

    async def run(self) -> Dispatched:
        self._end_wanted()
        rows = await self._bound(await qq.waiting(self._db))
        homes = await self._homes()
        rows = await self._without_fruitless(rows)
        lines = await self._lines(rows, homes)
        await self._give(lines, {(row.group, row.repository): row for row in rows}, homes)
        await self._tell()
        return self._out

    # ── what there is ────────────────────────────────────────────────────────────────────────────

    def _end_wanted(self) -> None:
        """Rows of an older version: its runners waited for room, with no share in turns."""
        for runner in list(self._books.runners.values()):
            if runner.state == "wanted":
                reason = "made anew when its job's turn has come"
                self._books.tell(
                    runner.id, state="gone", state_at=self._now, ended_at=self._now, code="cancelled", reason=reason
                )  # fmt: skip
                self._books.lines.append(timeline(runner, self._now, "gone", reason))

    async def _homes(self) -> dict[str, str]:
        """For each active runner the repository whose job it serves, or was made for."""
        homes: dict[str, str] = {}
        unknown: dict[str, str] = {}
        for runner in self._books.runners.values():
            job_id = runner.serving_job_id or runner.job_id
            job = self._books.jobs.get(job_id or "")
            if runner.scope_kind == "repository":
                homes[runner.id] = runner.scope_path
            elif job is not None:
                homes[runner.id] = f"{job.owner}/{job.repo}"
            elif job_id is not None:
                unknown[runner.id] = job_id
        known = await qq.repositories_of(self._db, list(unknown.values())) if unknown else {}
        return homes | {runner: known[job] for runner, job in unknown.items() if job in known}

    async def _without_fruitless(self, rows: Sequence[qq.Waiting]) -> list[qq.Waiting]:
        """The queue without the jobs whose runners end without a job, again and again, until their next try is due."""
        found = await qq.fruitless_jobs(
            self._db, since=self._now - _FRUITLESS_WINDOW, least=demand.FRUITLESS, limit=_BATCH
        )
        covered = {runner.job_id for runner in self._books.runners.values() if runner.covers}
        less: Counter[tuple[str, str, str]] = Counter()
        for one in found:
            until = demand.fruitless_until(one.count, one.last)
            if one.job_id in covered or self._now >= until:
                continue
            less[one.group, one.owner, one.repo] += 1
            self._passed[one.job_id] = (
                f"brake: {one.count} runners made for it ended without a job, as if the forge had none; "
                f"{_next_try(until, self._now)}"
            )
        return _less(rows, less)

    # ── the bound of the queue ───────────────────────────────────────────────────────────────────

    async def _bound(self, rows: list[qq.Waiting]) -> list[qq.Waiting]:
        """Keep what waits below its bound: the newest of the longest queues leave, the oldest outside come in."""
        most = self._rules.limits.most_queued
        total = sum(row.count for row in rows)
        if total < most:
            held = await qq.held_jobs(self._db, min(most - total, _BATCH))
            for job in held:
                self._come_in(self._books.jobs.get(job.id, job))
            self._out.more = bool(held)
            return rows
        by_repository: Counter[tuple[str, str]] = Counter()
        for row in rows:
            by_repository[row.owner, row.repo] += row.count
        less: Counter[tuple[str, str, str]] = Counter()
        names = {f"{owner}/{repo}": (owner, repo) for owner, repo in by_repository}
        for name, count in fairness.overflow(
            {name: by_repository[one] for name, one in names.items()}, most
        ).items():
            owner, repo = names[name]
            groups = {row.group for row in rows if (row.owner, row.repo) == names[name]}
            self._out.more = self._out.more or count > _BATCH
            for job in await qq.newest_jobs(self._db, owner, repo, groups, min(count, _BATCH)):
                less[job.group_key or "", owner, repo] += 1
                self._stand_outside(self._books.jobs.get(job.id, job), total)
        return _less(rows, less)

    def _come_in(self, job: Job) -> None:
        if job.state != "queued" or job.group_key is not None:
            return
        self._books.say(job, self._now, "queued", "there is room in the queue again")
        serve(self._books, job, self._choose, self._now)

    def _stand_outside(self, job: Job, total: int) -> None:
        most = self._rules.limits.most_queued
        reason = f"queue: {total} jobs wait for runners, {most} may ([limits] most_queued)"
        self._books.put_job(
            msgspec.structs.replace(job, group_key=None, waits_for=reason, updated_at=self._now)
        )
        self._books.say(job, self._now, "waiting", reason, "queue")
        self._out.reasons.append("queue")

    # ── demand ───────────────────────────────────────────────────────────────────────────────────

    async def _lines(self, rows: Sequence[qq.Waiting], homes: Mapping[str, str]) -> list[Line]:
        """Counts decide by group: what is short is spread over its repositories, what is too many is given up."""
        queued: Counter[str] = Counter()
        by_group: dict[str, list[qq.Waiting]] = {}
        for row in rows:
            queued[row.group] += row.count
            by_group.setdefault(row.group, []).append(row)
        covers = Counter(
            (runner.group_key, homes.get(runner.id, ""))
            for runner in self._books.runners.values()
            if runner.covers
        )
        lines: list[Line] = []
        for group, difference in demand.balance(queued, self._books.runners.values()).items():
            if difference < 0:
                await self._give_up(group, -difference)
            elif await self._open(group, by_group[group]):
                mine = {row.repository: row for row in by_group[group]}
                lacks = {name: row.count - covers[group, name] for name, row in mine.items()}
                lines += [
                    self._line(mine[name], missing)
                    for name, missing in demand.spread(difference, lacks).items()
                ]
        return lines

    async def _open(self, group: str, rows: Sequence[qq.Waiting]) -> bool:
        """Whether runners of this group can be made now at all; if not, its jobs are told why."""
        template = labels.group_of(group).template
        if template not in self._templates:
            await self._template_vanished(template, rows)
            return False
        held, brake = self._held(labels.group_of(group).scope), self._brakes.get(group)
        if held is not None:
            self._hold_back(group, rows, NotNow("held", f"{held.reason}; {_next_try(held.until, self._now)}"))
        elif brake is not None and self._now < brake.until:
            self._hold_back(
                group, rows, NotNow("brake", f"{brake.reason}; {_next_try(brake.until, self._now)}")
            )
        else:
            return True
        return False

    def _hold_back(self, group: str, rows: Sequence[qq.Waiting], why: NotNow) -> None:
        self._reasons.update(((group, row.repository), why) for row in rows)

    def _line(self, row: qq.Waiting, missing: int) -> Line:
        """Promised is what the largest of the machines takes that its runners may be forked from."""
        group = labels.group_of(row.group)
        template = self._templates[group.template]
        sizes = [(template.need_mib, template.vcpus)]
        if group.scope_key.startswith("repository:"):
            sizes += self._sizes.get((row.repository.lower(), template.name), [])
        return Line(
            group=row.group,
            repository=row.repository,
            labels=group.labels,
            missing=missing,
            oldest=row.oldest,
            need_mib=max(mib for mib, _ in sizes),
            vcpus=max(vcpus for _, vcpus in sizes),
        )

    async def _give_up(self, group: str, count: int) -> None:
        runners = self._books.runners.values()
        mine = {r.job_id for r in runners if r.job_id is not None and r.covers and r.group_key == group}
        known = await q.jobs_by_id(self._db, mine) | self._books.jobs
        queued = frozenset(job_id for job_id in mine if job_id in known and known[job_id].state == "queued")
        for runner in demand.surplus(runners, group, count, queued):
            self._books.tell(runner.id, cancelled_at=self._now)
            reason = "no queued job needs this runner any more"
            self._books.lines.append(timeline(runner, self._now, "given up", reason))

    async def _template_vanished(self, template: str, rows: Sequence[qq.Waiting]) -> None:
        """Its jobs are no longer demand; they are tried again like all that no template serves."""
        reason = f"the template '{template}' is not there any more"
        for row in rows:
            for job in await qq.oldest_jobs(self._db, row, _BATCH):
                self._books.put_job(
                    msgspec.structs.replace(
                        job, template=None, group_key=None, waits_for=reason, updated_at=self._now
                    )
                )
                self._books.say(job, self._now, "not served", reason, "a template for its labels")

    # ── runners ──────────────────────────────────────────────────────────────────────────────────

    async def _give(
        self, lines: Sequence[Line], rows: Mapping[Key, qq.Waiting], homes: Mapping[str, str]
    ) -> None:
        """Turns, places, runners. What is promised counts, whatever the runners' states are."""
        alike = Counter(
            (homes.get(runner.id, runner.scope_path), runner.labels)
            for runner in self._books.runners.values()
            if runner.takes_room
        )
        used: fairness.Used = Counter()
        for (home, asked), count in alike.items():
            used.update(dict.fromkeys(fairness.names(home, asked), count))
        plan = fairness.share(
            lines,
            used=used,
            hosts=_with_promises(self._hosts, self._books.runners.values()),
            limits=self._rules.limits,
            shares=self._out.shares,
            now=self._now,
        )
        self._out.shares = plan.shares
        self._reasons.update(plan.held)
        by_key = {line.key: line for line in lines}
        for key, hosts in plan.places.items():
            await self._make(rows[key], by_key[key], hosts)
        await q.add_runners(self._db, self._out.started)

    async def _make(self, row: qq.Waiting, line: Line, hosts: Sequence[str]) -> None:
        # What this pass learned of runners is not in the database yet, so that some jobs may turn out to have one.
        limit = len(hosts) + len(self._passed) + len(self._books.facts)
        found = [self._books.jobs.get(job.id, job) for job in await qq.oldest_jobs(self._db, row, limit)]
        jobs = {job.id: job for job in found if job.group_key == row.group and job.state == "queued"}
        made = demand.made_for(
            list(jobs), self._books.runners.values(), len(hosts), passed=self._passed.keys()
        )
        for job_id, host in zip(made, hosts, strict=False):
            job = jobs[job_id]
            if job.waits_for is not None:
                self._books.put_job(msgspec.structs.replace(job, waits_for=None, updated_at=self._now))
            self._out.started.append(self._start(job, line, host))

    def _start(self, job: Job, line: Line, host: str) -> Runner:
        """``wanted`` → (placed) → ``forking``."""
        now, rules = self._now, self._rules
        template = self._templates[job.template or ""]
        runner = Runner(
            id=f"{rules.name_prefix}-{secrets.token_hex(6)}",
            forge=job.forge,
            scope_kind=job.scope_kind,
            scope_path=job.scope_path,
            labels=labels.registered_labels(job.labels),
            group_key=line.group,
            template=template.name,
            digest=template.digest,
            memory_mib=line.need_mib,
            vcpus=line.vcpus,
            state="forking",
            state_at=now,
            deadline=now + rules.fork_limit,
            created_at=now,
            event_at=job.event_at,
            job_id=job.id,
            host=host,
            lease_owner=host,
            lease_until=now + rules.lease_s,
        )
        self._books.runners[runner.id] = runner
        self._books.lines += [
            timeline(runner, now, "wanted", "a queued job has no runner"),
            timeline(runner, now, "placed", f"on {host}"),
            timeline(runner, now, "forking", f"from {template.name} ({template.digest[:12]})"),
        ]
        return runner

    # ── reasons ──────────────────────────────────────────────────────────────────────────────────

    async def _tell(self) -> None:
        """Let the first job of each line that gets no runner know why: those after it wait for their turn."""
        for job_id, job in (await q.jobs_by_id(self._db, self._passed)).items():
            self._say(self._books.jobs.get(job_id, job), NotNow("fruitless", self._passed[job_id]))
        if not self._reasons:
            return
        covered = {runner.job_id for runner in self._books.runners.values() if runner.covers}
        for found in await qq.heads(self._db, _TOLD):
            job = self._books.jobs.get(found.id, found)
            held = self._reasons.get((job.group_key or "", f"{job.owner}/{job.repo}"))
            if held is not None and job.id not in covered and job.id not in self._passed:
                self._say(job, held)

    def _say(self, job: Job, held: NotNow) -> None:
        if job.state == "queued" and not _alike(job.waits_for, held.reason):
            self._books.put_job(msgspec.structs.replace(job, waits_for=held.reason, updated_at=self._now))
            self._books.say(job, self._now, "waiting", held.reason, held.reason.partition(":")[0])
            self._out.reasons.append(held.code)


def _next_try(until: float, now: float) -> str:
    return f"next try in {max(1.0, until - now):.0f} s"


def _alike(told: str | None, reason: str) -> bool:
    """Changing numbers, and what stands behind a semicolon, are no news."""
    return told is not None and _wordings(told) == _wordings(reason)


def _wordings(reason: str) -> str:
    return re.sub(r"\d+", "", reason.partition(";")[0])


def _less(rows: Sequence[qq.Waiting], less: Mapping[tuple[str, str, str], int]) -> list[qq.Waiting]:
    """``rows`` with so many jobs fewer."""
    if not less:
        return list(rows)
    left = (
        msgspec.structs.replace(row, count=row.count - less.get((row.group, row.owner, row.repo), 0))
        for row in rows
    )
    return [row for row in left if row.count > 0]


def _sizes(warm: Iterable[Parent]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Repository and template → memory and vCPUs of the parents its jobs may be forked from."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for parent in warm:
        if parent.repository.partition("/")[0] == parent.owner:
            size = parent.machine.need_mib, parent.machine.vcpus
            found.setdefault((parent.repository, parent.base), []).append(size)
    return found


def _with_promises(hosts: Sequence[Host], runners: Iterable[Runner]) -> list[Host]:
    """The hosts with what the active runners hold of them."""
    found = {host.name: host for host in hosts}
    held: dict[str, list[int]] = {}
    for runner in runners:
        if runner.takes_room and runner.host in found:
            sums = held.setdefault(runner.host or "", [0, 0, 0])
            sums[0] += 1
            sums[1] += runner.memory_mib
            sums[2] += runner.vcpus
    return [
        msgspec.structs.replace(host, vms=sums[0], used_mib=sums[1], vcpus=sums[2])
        if (sums := held.get(host.name))
        else host
        for host in found.values()
    ]
