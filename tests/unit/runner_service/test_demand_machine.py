"""Demand against a forge whose events come in any order, twice or never: what is made follows what is known.

A machine of jobs as the forge has them, events on their way, and the books. A cycle is a pass: what is too many is
given up, what is missing is made. The forge gives its jobs to whichever runner of ours is idle.
"""

from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runner_service import demand
from runner_service.domain import JOB_RANK, JobEvent, Runner, Scope, Template
from runner_service.ingest import Books, apply
from runner_service.labels import choose

TEMPLATES = [Template("t", "d" * 64, ("microvm-big",), 512, "/opt/actions-runner")]
LABELS = (("microvm",), ("microvm-big",))
numbers = st.integers(0, 1000)


class Forge(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.truth: dict[str, JobEvent] = {}
        self.coming: list[JobEvent] = []
        self.books = Books({}, [])
        self.online: set[str] = set()
        self.ranks: dict[str, int] = {}
        self.made = 0
        self.lost_runners = 0

    # ── what happens at the forge ────────────────────────────────────────────────────────────────

    @rule(labels=st.sampled_from(LABELS), approved=st.booleans())
    def a_job_comes(self, labels: tuple[str, ...], approved: bool) -> None:
        name = str(len(self.truth) + 1)
        self._becomes(
            JobEvent(
                forge="github", forge_job_id=name, owner="o", repo="r", labels=labels, seen_at=self.now,
                state="queued" if approved else "waiting",
            )
        )  # fmt: skip

    @rule(pick=numbers)
    def one_is_approved(self, pick: int) -> None:
        self._moves(pick, "waiting", "queued")

    @rule(pick=numbers)
    def one_is_cancelled(self, pick: int) -> None:
        self._moves(pick, "queued", "completed", conclusion="cancelled")

    @rule(pick=numbers, which=numbers)
    def one_is_picked_up_by_any_runner_of_its_labels(self, pick: int, which: int) -> None:
        job = self._in(pick, "queued")
        if job is None:
            return
        idle = sorted(
            one.id
            for one in self.books.runners.values()
            if one.id in self.online and set(job.labels) <= set(one.labels)
        )
        if idle:
            runner = idle[which % len(idle)]
            self.online.discard(runner)
            self._becomes(msgspec.structs.replace(job, state="in_progress", runner_name=runner))

    @rule(pick=numbers)
    def one_ends(self, pick: int) -> None:
        self._moves(pick, "in_progress", "completed", conclusion="success")

    # ── what reaches us ──────────────────────────────────────────────────────────────────────────

    @rule(pick=numbers, again=st.booleans())
    def an_event_arrives(self, pick: int, again: bool) -> None:
        if self.coming:
            index = pick % len(self.coming)
            self._hear(self.coming[index] if again else self.coming.pop(index))

    @rule(pick=numbers)
    def an_event_is_lost(self, pick: int) -> None:
        if self.coming:
            self.coming.pop(pick % len(self.coming))

    @rule()
    def the_forge_is_asked_about_everything(self) -> None:
        for job in self.truth.values():
            self._hear(job)
        self.a_cycle()
        # Now that all is known: exactly as many as there are jobs to take.
        waiting = [job for job in self.truth.values() if job.state == "queued"]
        assert sum(one.covers for one in self.books.runners.values()) == len(waiting)

    # ── what we do ───────────────────────────────────────────────────────────────────────────────

    @rule()
    def a_cycle(self) -> None:
        queued = self._queued()
        for group, difference in demand.balance(_counts(queued), self.books.runners.values()).items():
            mine = [job for job, key in queued.items() if key == group]
            runners = self.books.runners.values()
            for one in demand.surplus(runners, group, -difference, frozenset(mine)) if difference < 0 else ():
                self.books.tell(one.id, cancelled_at=self.now)
                self.online.discard(one.id)
            for job in demand.made_for(mine, runners, difference) if difference > 0 else ():
                self._make(job, group)
        covers = [one.group_key for one in self.books.runners.values() if one.covers]
        assert {key: covers.count(key) for key in set(covers)} == _counts(queued)
        assert demand.balance(_counts(queued), self.books.runners.values()) == {}

    @rule(pick=numbers)
    def a_runner_comes_online(self, pick: int) -> None:
        starting = sorted(
            one.id for one in self.books.runners.values() if one.covers and one.id not in self.online
        )
        if starting:
            runner = starting[pick % len(starting)]
            if runner not in {job.runner_name for job in self.truth.values()}:
                self.online.add(runner)

    @rule(pick=numbers)
    def a_runner_dies(self, pick: int) -> None:
        there = sorted(one.id for one in self.books.runners.values() if one.covers)
        if there:
            runner = there[pick % len(there)]
            if runner not in {job.runner_name for job in self.truth.values()}:
                self.online.discard(runner)
                self.books.past[runner] = self.books.runners.pop(runner)
                self.lost_runners += 1

    # ── what always holds ────────────────────────────────────────────────────────────────────────

    @initialize()
    def nothing(self) -> None:
        assert not self.books.runners

    @invariant()
    def no_more_were_made_than_jobs_and_what_was_lost_between(self) -> None:
        # Each runner beyond one a job makes up for one that died, was given up, or took a job that is told of wrongly.
        given_up = sum(one.cancelled_at is not None for one in self.books.runners.values())
        unheard = sum(
            JOB_RANK[job.state] > JOB_RANK[self.books.jobs[job.job_id].state]
            for job in self.truth.values()
            if job.job_id in self.books.jobs
        )
        serving = sum(one.serving_job_id is not None for one in self.books.runners.values())
        assert self.made <= len(self._queued()) + serving + given_up + self.lost_runners + unheard + len(
            [job for job in self.books.jobs.values() if job.state == "completed"]
        )

    @invariant()
    def jobs_only_move_forward(self) -> None:
        for job in self.books.jobs.values():
            rank = JOB_RANK[job.state]
            assert self.ranks.get(job.id, 0) <= rank <= JOB_RANK[self.truth[job.id].state]
            self.ranks[job.id] = rank

    @invariant()
    def no_job_has_two_runners_that_may_take_it(self) -> None:
        mine = [one.job_id for one in self.books.runners.values() if one.covers and one.job_id is not None]
        assert len(mine) == len(set(mine))

    @invariant()
    def what_waits_for_an_approval_is_no_demand(self) -> None:
        assert not {job.id for job in self.books.jobs.values() if job.state == "waiting"} & set(
            self._queued()
        )

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _in(self, pick: int, state: str) -> JobEvent | None:
        there = [job for job in self.truth.values() if job.state == state]
        return there[pick % len(there)] if there else None

    def _moves(self, pick: int, before: str, after: str, **more: Any) -> None:
        job = self._in(pick, before)
        if job is not None:
            self._becomes(msgspec.structs.replace(job, state=after, **more))  # pyright: ignore[reportArgumentType]

    def _becomes(self, job: JobEvent) -> None:
        self.now += 1
        self.truth[job.job_id] = job
        self.coming.append(job)

    def _hear(self, event: JobEvent) -> None:
        apply(
            self.books, event,
            choose=lambda job: choose(job.labels, TEMPLATES, default="t"),
            scope_of=lambda _: Scope("repository", "o/r"),
            now=self.now,
        )  # fmt: skip

    def _queued(self) -> dict[str, str]:
        """Queued jobs as we know them, oldest first, with their groups."""
        jobs = sorted(self.books.jobs.values(), key=lambda job: (job.event_at, job.id))
        return {job.id: job.group_key for job in jobs if job.state == "queued" and job.group_key is not None}

    def _make(self, job_id: str, group: str) -> None:
        self.made += 1
        job = self.books.jobs[job_id]
        runner = Runner(
            id=f"r{self.made}", forge="github", scope_kind="repository", scope_path="o/r",
            labels=(*job.labels, "self-hosted", "linux", "x64"), group_key=group, template="t", memory_mib=512,
            state="forking", state_at=self.now, deadline=1e9, created_at=self.now, event_at=job.event_at, job_id=job_id,
        )  # fmt: skip
        self.books.runners[runner.id] = runner


def _counts(queued: dict[str, str]) -> dict[str, int]:
    groups = list(queued.values())
    return {group: groups.count(group) for group in set(groups)}


TestDemand = Forge.TestCase
TestDemand.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
