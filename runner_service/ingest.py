"""What an event changes in the books: jobs move forward only, runners learn facts. Pure: no I/O, any order."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from runner_service.domain import JOB_RANK, Job, JobEvent, Push, Runner, Scope, TimelineRow, Via, timeline
from runner_service.labels import Foreign, Serve, Unservable, group_key, is_ours

Choose = Callable[[Job], Serve | Foreign | Unservable]
ScopeOf = Callable[[JobEvent | Push], Scope | None]


class Books:
    """The rows one transaction works on, and what it changed in them. ``past`` are runners that are gone."""

    def __init__(self, jobs: dict[str, Job], runners: Iterable[Runner]) -> None:
        self.jobs = jobs
        self.runners = {runner.id: runner for runner in runners}
        self.past: dict[str, Runner] = {}
        self.changed_jobs: set[str] = set()
        self.facts: dict[str, dict[str, Any]] = {}
        self.lines: list[TimelineRow] = []

    def put_job(self, job: Job) -> None:
        self.jobs[job.id] = job
        self.changed_jobs.add(job.id)

    def tell(self, runner_id: str, **facts: Any) -> None:
        """Write facts on a runner, here and (later) in its row."""
        self.runners[runner_id] = msgspec.structs.replace(self.runners[runner_id], **facts)
        self.facts.setdefault(runner_id, {}).update(facts)

    def say(
        self,
        job: Job,
        at: float,
        step: str,
        reason: str = "",
        waits_for: str | None = None,
        *,
        runner: str | None = None,
    ) -> None:
        """A timeline row of a job itself; ``runner`` when it is on one of ours."""
        ms = round((at - job.event_at) * 1000, 1)
        self.lines.append(
            TimelineRow(
                at=at, job_id=job.id, runner_id=runner, step=step, reason=reason, waits_for=waits_for, ms=ms
            )
        )


def apply(books: Books, event: JobEvent, *, choose: Choose, scope_of: ScopeOf, now: float) -> str:
    """Work one event into the books; the answer is a stable word for the counter and the inbox row.

    Repeated, late and reversed events change nothing that happened later.
    """
    known = books.jobs.get(event.job_id)
    if known is None:
        if not is_ours(event.labels):
            return "foreign"
        scope = scope_of(event)
        if scope is None:
            return "not_allowed"
        job = _new_job(event, scope, now)
        books.put_job(job)
        _enter(books, job, event, choose, now)
        return "new"
    if JOB_RANK[event.state] <= JOB_RANK[known.state]:
        return "repeated"
    job = _advance(known, event, now)
    books.put_job(job)
    _enter(books, job, event, choose, now)
    return "advanced"


def serve(books: Books, job: Job, choose: Choose, now: float) -> None:
    """Find a template for a queued job, or say why there is none."""
    chosen = choose(job)
    if isinstance(chosen, Serve):
        key = group_key(job.forge, job.scope.key, chosen.template.name, chosen.labels)
        books.put_job(
            msgspec.structs.replace(
                job, template=chosen.template.name, group_key=key, waits_for=None, updated_at=now
            )
        )
        return
    reason = chosen.reason if isinstance(chosen, Unservable) else "its labels are not ours"
    if job.waits_for != reason or job.template is not None:
        books.put_job(
            msgspec.structs.replace(job, waits_for=reason, template=None, group_key=None, updated_at=now)
        )
        books.say(job, now, "not served", reason, "a template for its labels")


def age_out(books: Books, job: Job, now: float) -> None:
    """Give up a job whose end we were never told; should it be told yet, it changes nothing."""
    books.put_job(
        msgspec.structs.replace(
            job, state="completed", conclusion="stale", waits_for=None, updated_at=now, completed_at=now
        )
    )
    hours = (now - job.event_at) / 3600
    books.say(job, now, "aged out", f"{job.state} for {hours:.0f} h: the forge has given it up by now")


def _new_job(event: JobEvent, scope: Scope, now: float) -> Job:
    blank = Job(
        id=event.job_id,
        forge=event.forge,
        forge_job_id=event.forge_job_id,
        owner=event.owner,
        repo=event.repo,
        scope_kind=scope.kind,
        scope_path=scope.path,
        labels=event.labels,
        state=event.state,
        event_at=event.seen_at,
        updated_at=now,
        created_at=event.created_at,
        name=event.name,
        workflow=event.workflow,
        run_id=event.run_id,
        run_attempt=event.run_attempt,
        head_sha=event.head_sha,
        head_branch=event.head_branch,
    )
    return _advance(blank, event, now)


def _advance(job: Job, event: JobEvent, now: float) -> Job:
    state = event.state
    # A wait for an approval is not ours: the clock starts when the job is really queued.
    event_at = event.seen_at if job.state == "waiting" and state == "queued" else job.event_at
    return msgspec.structs.replace(
        job,
        # A renamed repository's events carry its new name; the forge leads calls for the old one there.
        owner=event.owner,
        repo=event.repo,
        state=state,
        event_at=event_at,
        updated_at=now,
        waits_for=None if JOB_RANK[state] > JOB_RANK["queued"] else job.waits_for,
        runner_name=event.runner_name or job.runner_name,
        conclusion=event.conclusion if state == "completed" else job.conclusion,
        started_at=_started(job, event),
        completed_at=(event.completed_at or event.seen_at) if state == "completed" else job.completed_at,
    )


def _started(job: Job, event: JobEvent) -> float | None:
    """When it began to run: the forge's own word, which for a queued job means something else, or when we saw it."""
    if event.state == "in_progress":
        return event.started_at or event.seen_at
    if event.state == "completed" and event.runner_name and job.started_at is None:
        return event.started_at
    return job.started_at


def _enter(books: Books, job: Job, event: JobEvent, choose: Choose, now: float) -> None:
    """What follows from the state the job just entered."""
    if job.state == "waiting":
        books.say(job, event.seen_at, "waiting", "seen, not queued yet", "an approval at the forge")
    elif job.state == "queued":
        books.say(job, event.seen_at, "queued", _seen(job, event))
        serve(books, job, choose, now)
    elif job.state == "in_progress":
        _picked_up(books, job, event)
    else:
        _completed(books, job, event)


def _seen(job: Job, event: JobEvent) -> str:
    seen = _SEEN[event.via]
    if job.created_at is None:
        return seen
    # The forge's clock has whole seconds and need not be ours: a negative delay is none.
    return f"{seen} {max(0.0, event.seen_at - job.created_at):.1f} s after it was created"


_SEEN: dict[Via, str] = {
    "delivery": "event seen",
    "poll": "no event came: found by a poll",
    "asked": "no event came: the forge was asked",
}


def _how(event: JobEvent) -> str:
    """What its story adds when no event told it."""
    note = f", {event.note}" if event.note else ""
    if event.via == "delivery":
        return note
    return f"{note}; {'found by a poll' if event.via == 'poll' else 'the forge said so when asked'}"


def _picked_up(books: Books, job: Job, event: JobEvent) -> None:
    runner = books.runners.get(event.runner_name or "")
    if runner is None:
        _elsewhere(books, job, event, "in progress", "")
        return
    books.put_job(msgspec.structs.replace(job, runner_id=runner.id))
    books.say(job, event.seen_at, "in progress", f"on runner {runner.id}{_how(event)}", runner=runner.id)
    books.tell(runner.id, serving_job_id=job.id)
    if runner.job_id != job.id:
        _swap(books, job, runner, event.seen_at)


def _elsewhere(books: Books, job: Job, event: JobEvent, step: str, what: str) -> None:
    """The runner is gone already (events are late), or was never ours."""
    if event.runner_name in books.past:
        books.put_job(msgspec.structs.replace(job, runner_id=event.runner_name))
        books.say(
            job,
            event.seen_at,
            step,
            f"{what}on runner {event.runner_name}, which is gone by now{_how(event)}",
        )
    elif event.runner_name:
        books.say(
            job,
            event.seen_at,
            step,
            f"{what}on runner {event.runner_name}, which is none of ours{_how(event)}",
        )
    else:
        books.say(job, event.seen_at, step, f"{what.strip()}{_how(event)}".removeprefix("; "))


def _swap(books: Books, job: Job, thief: Runner, at: float) -> None:
    """``thief`` was made for another job: that one gets the runner made for ``job``, if there is one."""
    robbed_id = thief.job_id
    spare = next((r for r in books.runners.values() if r.job_id == job.id and r.covers), None)
    books.tell(thief.id, job_id=job.id)
    if spare is not None:
        books.tell(spare.id, job_id=robbed_id)
    if robbed_id is None:
        return
    waits_for = f"runner {spare.id}" if spare is not None else "another runner"
    row = timeline(
        thief, at, "runner taken", f"the forge gave its runner {thief.id} to job {job.id}", waits_for
    )
    books.lines.append(msgspec.structs.replace(row, job_id=robbed_id))


def _completed(books: Books, job: Job, event: JobEvent) -> None:
    runner = books.runners.get(event.runner_name or job.runner_id or "")
    conclusion = event.conclusion or "no conclusion"
    if runner is None:
        _elsewhere(books, job, event, "completed", f"{conclusion} ")
        return
    books.say(
        job, event.seen_at, "completed", f"{conclusion} on runner {runner.id}{_how(event)}", runner=runner.id
    )
    if job.runner_id != runner.id:
        books.put_job(msgspec.structs.replace(job, runner_id=runner.id))
    books.tell(runner.id, serving_job_id=job.id, job_done_at=event.seen_at)
    if runner.job_id != job.id:
        _swap(books, job, runner, event.seen_at)
