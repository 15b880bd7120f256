"""What the API and the command line show of jobs, runners and VMs: the same values for both."""

import time
from pathlib import Path

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.domain import Bake, Ending, Job, Runner, TimelineRow
from runner_service.store import bake_queries as bq
from runner_service.store import infra_queries as iq
from runner_service.store import job_search
from runner_service.store import queries as q
from runner_service.store.infra_queries import InfraFailure
from runner_service.summary import Summary, summarize
from vmm_core import accounting
from vmm_core.drivers.base import DISK
from vmm_core.errors import VmmError
from vmm_core.machine import VmExit, VmRecord, VmUsage


class InfraView(msgspec.Struct, frozen=True):
    """That infrastructure failed under a job, whatever the forge concludes; and what came of running it once more."""

    at: float
    code: str
    reason: str
    rerun: str
    rerun_why: str
    rerun_job: str | None


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job with its runner. Times are Unix seconds; ``waits_for`` says why it is not running yet.

    ``usage`` is what the job's VM cost in all, once it has ended; ``infra``: it was not the job that failed.
    """

    id: str
    name: str
    repository: str
    workflow: str
    run_id: str
    state: str
    conclusion: str | None
    labels: tuple[str, ...]
    template: str | None
    runner: str | None
    runner_state: str | None
    vm: str | None
    waits_for: str | None
    queued_at: float
    started_at: float | None
    completed_at: float | None
    usage: VmUsage | None = None
    infra: InfraView | None = None


class RunnerView(msgspec.Struct, frozen=True, kw_only=True):
    """One runner that was made for a job or served it. ``ending`` is how its VM ended, with the evidence."""

    id: str
    state: str
    template: str
    vm: str | None
    host: str | None
    code: str | None
    reason: str | None
    waits_for: str | None
    exit_code: int | None
    parent: str | None = None
    usage: VmUsage | None = None
    ending: VmExit | None = None


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one job: where its time went and what it waits for, then step by step."""

    job: JobView
    summary: Summary
    runners: tuple[RunnerView, ...]
    timeline: tuple[TimelineRow, ...]


class VmView(msgspec.Struct, frozen=True, kw_only=True):
    """One VM of the host, what it costs (None: nobody could read it), and its tags; ``runner``/``job`` it serves.

    Sizes are those of ``VmUsage``: bytes of the guest's mapping, and apart from them the VMM's own heap.
    """

    id: str
    template: str | None
    pid: int
    vcpus: int
    memory_mib: int
    created_at: float
    expires_at: float
    runner: str | None = None
    runner_state: str | None = None
    job: str | None = None
    private_dirty_bytes: int | None = None
    shared_bytes: int | None = None
    pss_bytes: int | None = None
    vmm_private_bytes: int | None = None
    peak_bytes: int | None = None
    cpu_seconds: float | None = None
    disk_private_bytes: int | None = None
    disk_read_bytes: int | None = None
    disk_write_bytes: int | None = None
    net_sent_bytes: int | None = None
    net_received_bytes: int | None = None
    metadata: dict[str, str] = {}


async def list_bakes(db: AsyncConnection, *, limit: int, repository: str | None = None) -> list[Bake]:
    """The newest bakes, newest first."""
    return await bq.list_bakes(db, limit=limit, repository=repository.lower() if repository else None)


async def list_jobs(db: AsyncConnection, *, limit: int, state: str | None = None) -> list[JobView]:
    """The newest jobs with their runners."""
    jobs = await q.list_jobs(db, limit=limit, state=state)
    by_job = await q.runners_of_jobs(db, [job.id for job in jobs])
    failures = await iq.failures_of(db, [job.id for job in jobs])
    return [job_view(job, runner_of(job, by_job.get(job.id, [])), failures.get(job.id)) for job in jobs]


async def story(db: AsyncConnection, ref: str) -> Story | None:
    """The story of the job ``ref`` means (see ``job_search.find``), or None."""
    job = await job_search.find(db, ref)
    if job is None:
        return None
    runners = await q.runners_of_job(db, job.id)
    lines = await q.timeline_of_job(db, job.id)
    endings = await q.endings_of(db, [runner.id for runner in runners])
    failures = await iq.failures_of(db, [job.id])
    shown = job_view(job, runner_of(job, runners), failures.get(job.id))
    place = await job_search.place(db, job)
    return Story(
        job=shown,
        summary=summarize(job, runners, lines, says=shown.waits_for, place=place, now=time.time()),
        runners=tuple(runner_view(runner, endings.get(runner.id)) for runner in runners),
        timeline=tuple(lines),
    )


def runner_of(job: Job, runners: list[Runner]) -> Runner | None:
    """The runner a job is on: the one the forge named, else the newest that serves it or was made for it."""
    named = next((r for r in runners if r.id == job.runner_id), None)
    serving = next((r for r in runners if r.serving_job_id == job.id), None)
    made = next((r for r in runners if r.job_id == job.id and r.serving_job_id in (None, job.id)), None)
    return named or serving or made


def job_view(job: Job, runner: Runner | None, failure: InfraFailure | None = None) -> JobView:
    waits_for = job.waits_for
    if job.state == "queued" and waits_for is None and runner is not None:
        waits_for = runner.waits_for or f"its runner ({runner.state})"
    elif job.state == "queued" and waits_for is None:
        waits_for = "its turn: runners for older jobs like it come first"
    return JobView(
        id=job.id,
        name=job.name,
        repository=f"{job.owner}/{job.repo}",
        workflow=job.workflow,
        run_id=job.run_id,
        state=job.state,
        conclusion=job.conclusion,
        labels=job.labels,
        template=job.template,
        runner=runner.id if runner is not None else job.runner_id,
        runner_state=runner.state if runner is not None else None,
        vm=runner.vm_id if runner is not None else None,
        waits_for=waits_for,
        queued_at=job.event_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        usage=runner.usage if runner is not None else None,
        infra=None if failure is None or job.conclusion == "success" else infra_view(failure),
    )


def infra_view(failure: InfraFailure) -> InfraView:
    return InfraView(
        failure.at, failure.code, failure.reason, failure.rerun, failure.rerun_why, failure.rerun_job_id
    )


def runner_view(runner: Runner, ending: Ending | None = None) -> RunnerView:
    return RunnerView(
        id=runner.id,
        state=runner.state,
        template=runner.template,
        vm=runner.vm_id,
        host=runner.host,
        code=runner.code,
        reason=runner.reason,
        waits_for=runner.waits_for,
        exit_code=runner.exit_code,
        parent=runner.parent,
        usage=runner.usage,
        ending=ending.exit if ending is not None else None,
    )


def vm_view(record: VmRecord, runner: Runner | None = None, usage: VmUsage | None = None) -> VmView:
    return VmView(
        id=record.id,
        template=record.template,
        pid=record.pid,
        vcpus=record.machine.vcpus,
        memory_mib=record.machine.memory_mib,
        created_at=record.created_at,
        expires_at=record.expires_at,
        runner=runner.id if runner is not None else record.metadata.get("runner_id"),
        runner_state=runner.state if runner is not None else None,
        job=(runner.serving_job_id or runner.job_id) if runner is not None else None,
        metadata=record.metadata,
        **(msgspec.structs.asdict(usage) if usage is not None else {}),
    )


def read_usage(record: VmRecord, vms: Path) -> VmUsage | None:
    """What a VM costs now, whoever owns it; ``vms`` holds the VMs' directories. None: ended, or not ours to read."""
    try:
        return accounting.usage(record.pid, vms / record.id / DISK, start_ticks=record.start_ticks)
    except (VmmError, OSError):
        return None
