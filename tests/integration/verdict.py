"""What the soak looks at when all is over: the books of the service against what really happened."""

import json

import msgspec

from runner_service.domain import Job as Row
from runner_service.domain import Runner as RunnerRow
from runner_service.domain import TimelineRow
from runner_service.labels import registered_labels
from tests.integration.waiting import Span, Waited, unexplained
from tests.standins.github_model import Job
from tests.standins.github_webhooks import Sent

# Reasons of a runner whose VM ended under its job.
DIED = frozenset({"vm_died", "vm_lost", "channel_lost", "runner_lost"})


class Books(msgspec.Struct):
    """What the service wrote down: jobs by the forge's id, runners by name, the timeline in order."""

    jobs: dict[str, Row]
    runners: dict[str, RunnerRow]
    lines: list[TimelineRow]


def untrue(
    job: Job, runs: int, row: Row | None, runner: RunnerRow | None, *, died: bool, heard: bool
) -> str | None:
    """What is wrong with how a job ended, or with what the books say of it. ``died``: its VM was killed by us.

    ``heard``: an event of it was received. A job that was over before anybody looked need not be known otherwise.
    """
    if runs != (0 if job.started_at == job.created_at else 1):
        return f"ran {runs} times, {job.conclusion}"
    if job.conclusion not in ("success", "cancelled", "failure"):
        return f"ended as {job.conclusion}"
    if job.conclusion == "failure" and not died:
        return f"failed on {job.runner_name} for no reason of its own"
    if job.conclusion == "success" and runs != 1:
        return "succeeded and never ran"
    if row is None:
        return "the service never heard of it" if heard else None
    if (row.state, row.conclusion) != ("completed", job.conclusion):
        return f"{job.conclusion}, but the books say {row.state} {row.conclusion}"
    if (row.runner_name or None) != job.runner_name:
        return f"ran on {job.runner_name}, but the books say {row.runner_name}"
    if job.conclusion == "failure" and (runner is None or runner.code not in DIED):
        return f"its VM died, but the books say {runner and runner.code}: {runner and runner.reason}"
    return None


def group_of(place: str, labels: tuple[str, ...]) -> str:
    """What the forge gives the same runners to."""
    return f"{place.lower()}|{','.join(sorted(label.lower() for label in registered_labels(labels)))}"


def waits(jobs: list[Job], now: float) -> list[Waited]:
    return [
        Waited(
            str(job.id), group_of(job.run.repository.full_name, tuple(job.labels)), job.created_at,
            job.started_at if job.runner_name and job.started_at else job.completed_at or now,
        )
        for job in jobs
    ]  # fmt: skip


def under_way(books: Books, now: float) -> list[Span]:
    """Each runner from its first line until it listens or is given up."""
    began: dict[str, float] = {}
    spans: list[Span] = []
    for line in books.lines:
        runner = books.runners.get(line.runner_id or "")
        if runner is None:
            continue
        if line.step == "wanted":
            began.setdefault(runner.id, line.at)
        elif line.step in ("idle", "busy", "retiring", "gone") and runner.id in began:
            spans.append(Span(began.pop(runner.id), line.at, line.step, _group(runner)))
    return spans + [Span(at, now, "still", _group(books.runners[one])) for one, at in began.items()]


def told_causes(books: Books, now: float) -> list[Span]:
    """What the books say that a job waits for, until a runner is made for it or it is taken; true of those like it."""
    by_id = {row.id: row for row in books.jobs.values()}
    open_: dict[str, tuple[float, str]] = {}
    spans: list[Span] = []
    for line in books.lines:
        row = by_id.get(line.job_id or "")
        if row is None:
            continue
        if line.runner_id is None and line.waits_for:
            open_.setdefault(row.id, (line.at, line.reason))
        elif row.id in open_ and line.step in ("wanted", "in progress", "completed"):
            at, why = open_.pop(row.id)
            spans.append(Span(at, line.at, why, _place(row)))
    return spans + [Span(at, now, why, _place(by_id[job])) for job, (at, why) in open_.items()]


def _place(row: Row) -> str:
    return group_of(f"{row.owner}/{row.repo}", row.labels)


def heard_of(sent: list[Sent]) -> set[int]:
    """The jobs that an event told of."""
    return {
        json.loads(one.body)["workflow_job"]["id"]
        for one in sent
        if one.event == "workflow_job" and one.received
    }


def not_heard(jobs: list[Job], sent: list[Sent], books: Books, now: float) -> list[Span]:
    """For each job from when it was queued until the service could first know of it."""
    heard: dict[str, float] = {}
    for one in sent:
        if one.action == "queued" and one.received:
            job = str(json.loads(one.body)["workflow_job"]["id"])
            heard[job] = min(heard.get(job, now), one.delivered_at + one.duration)
    spans: list[Span] = []
    for job in jobs:
        row = books.jobs.get(str(job.id))
        known = min(heard.get(str(job.id), now), row.event_at if row is not None else now)
        spans.append(Span(job.created_at, known, "not heard of", job=str(job.id)))
    return spans


def _group(runner: RunnerRow) -> str:
    return group_of(runner.scope_path, runner.labels)


def waited_for_nothing(
    jobs: list[Job], sent: list[Sent], books: Books, down: list[Span], now: float
) -> dict[str, list[tuple[float, float]]]:
    """By job, the stretches of its wait that nothing explains."""
    waited = waits(jobs, now)
    groups: dict[str, list[Waited]] = {}
    for one in waited:
        groups.setdefault(one.group, []).append(one)
    made = under_way(books, now)
    causes = [*told_causes(books, now), *not_heard(jobs, sent, books, now), *down]
    return {one.job: unexplained(one, groups[one.group], made, causes) for one in waited}
