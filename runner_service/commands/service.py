"""``microvm ps | jobs | why | logs | kill``: look at the service, give it orders."""

import asyncio
import sys
from datetime import datetime

from runner_service import client, views
from runner_service.commands import show
from runner_service.settings import Settings
from runner_service.summary import Summary
from vmm_core.console import last_words
from vmm_core.engine import Engine

_CONSOLE_CHARS = 2000
_PHASES = {
    "event": "event on its way", "deciding": "decided", "waiting": "waited", "forking": "forked",
    "registering": "registered at the forge", "starting": "runner came online", "forge": "online, forge gave the job",
    "running": "ran", "cleanup": "cleaned up",
}  # fmt: skip


async def ps(settings: Settings, api: str | None, *, as_json: bool) -> int:
    """VMs from the service, or from the data directory when no service answers."""
    found: list[views.VmView] | None = None
    if api is not None or client.announced(settings.data_dir) is not None:
        async with client.source(settings, api) as source:
            found = await source.vms()
    if found is None:
        found = await _vms_of(settings)
    if as_json:
        show.print_json(found)
        return 0
    rows = [
        (vm.id, vm.template, vm.runner, vm.runner_state, vm.job, vm.pid, f"{vm.vcpus}×{vm.memory_mib}",
         show.mib(vm.private_dirty_bytes), show.mib(vm.shared_bytes), show.mib(vm.pss_bytes),
         show.mib(vm.vmm_private_bytes), show.seconds(vm.cpu_seconds), show.mib(vm.disk_private_bytes),
         show.both(vm.disk_read_bytes, vm.disk_write_bytes), show.both(vm.net_sent_bytes, vm.net_received_bytes),
         show.ago(vm.created_at), show.left(vm.expires_at), _tags(vm))
        for vm in found
    ]  # fmt: skip
    numbers = (
        "PID", "PRIVATE MIB", "SHARED", "PSS", "VMM", "CPU S", "DISK MIB", "R/W MIB", "NET S/R MIB", "AGE", "LEFT",
    )  # fmt: skip
    columns = ("VM", "TEMPLATE", "RUNNER", "STATE", "JOB", "PID", "CPU×MIB", *numbers[1:], "TAGS")
    show.table(columns, rows, empty="no VM runs", right=numbers)
    return 0


def _tags(vm: views.VmView) -> str:
    """What the caller said of it, but for the runner and the job, which have columns of their own."""
    return " ".join(
        f"{key}={value}" for key, value in vm.metadata.items() if value not in (vm.runner, vm.job)
    )


async def _vms_of(settings: Settings) -> list[views.VmView]:
    if not settings.data_dir.is_dir():
        return []
    async with Engine.open(settings.data_dir) as engine:
        vms = engine.pool.vms
        return [
            views.vm_view(record, usage=await asyncio.to_thread(views.read_usage, record, vms))
            for record in engine.records()
        ]


async def jobs(settings: Settings, api: str | None, limit: int, *, as_json: bool) -> int:
    async with client.source(settings, api) as source:
        found = await source.jobs(limit)
    if as_json:
        show.print_json(found)
        return 0
    rows = [
        (job.id, job.repository, job.name, _became(job), job.template, job.runner,
         show.ago(job.queued_at), show.seconds(job.usage and job.usage.cpu_seconds),
         show.mib(job.usage and job.usage.peak_bytes), job.waits_for)
        for job in found
    ]  # fmt: skip
    columns = (
        "JOB", "REPOSITORY", "NAME", "STATE", "TEMPLATE", "RUNNER", "QUEUED", "CPU S", "PEAK MIB", "WAITS FOR",
    )  # fmt: skip
    show.table(columns, rows, empty="no job was seen yet", right=("QUEUED", "CPU S", "PEAK MIB"))
    return 0


def _became(job: views.JobView) -> str:
    return job.infra.code if job.infra is not None else job.conclusion or job.state


async def why(settings: Settings, api: str | None, job: str, *, as_json: bool) -> int:
    """The story of a job: where its time went, what it waits for, each step with its milliseconds since the event."""
    async with client.source(settings, api) as source:
        story = await source.story(job)
    if as_json:
        show.print_json(story)
        return 0
    print_story(story)
    return 0


def print_story(story: views.Story) -> None:
    """First the answer (state, what it waits for, where the time went), then every step, then the evidence."""
    shown = story.job
    state = shown.conclusion or shown.state
    show.line(f"{shown.id}  {shown.repository}  {shown.name}  [{', '.join(shown.labels)}]  {state}")
    if shown.infra is not None:
        show.line(f"infrastructure failed, not the job: {shown.infra.code}: {shown.infra.reason}")
        if shown.infra.rerun != "off":
            show.line(f"run once more: {shown.infra.rerun}: {shown.infra.rerun_why}")
    _print_wait(story)
    _print_spans(story.summary)
    sys.stdout.write("\n")
    rows = [
        (datetime.fromtimestamp(line.at).strftime("%H:%M:%S.%f")[:-3],
         "" if line.ms is None else f"{line.ms:.0f}", line.step, line.runner_id, line.reason, line.waits_for)
        for line in story.timeline
    ]  # fmt: skip
    show.table(
        ("AT", "MS", "STEP", "RUNNER", "WHY", "WAITS FOR"), rows, empty="nothing happened yet", right=("MS",)
    )
    for runner in shown_runners(story):
        print_evidence(runner)


def _print_wait(story: views.Story) -> None:
    wait = story.summary.wait
    if wait is None:
        return
    since = datetime.fromtimestamp(wait.since).strftime("%H:%M:%S")
    show.line(f"waits for: {wait.what} ({wait.code})")
    show.line(f"since:     {since}, {show.duration(wait.seconds)} ago")
    if wait.place is not None:
        show.line(f"place:     {wait.place} of {wait.among} queued jobs like it in its repository")
    show.line(f"ends when: {wait.ends}")


def _print_spans(summary: Summary) -> None:
    """One line a phase: what, how long, its share of all as a bar."""
    total = summary.seconds
    end = "in all" if summary.over else "so far"
    rows = [
        (_PHASES.get(span.phase, span.phase) + (f": {span.reason}" if span.reason else ""),
         show.duration(span.seconds), f"{100 * span.seconds / total:.0f}", "▪" * round(24 * span.seconds / total))
        for span in summary.spans
    ]  # fmt: skip
    rows.append((end, show.duration(total), "", f"{show.duration(summary.ready_seconds)} before it ran"))
    show.table(("WHERE THE TIME WENT", "TIME", "%", ""), rows, empty="", right=("TIME", "%"))


def shown_runners(story: views.Story) -> list[views.RunnerView]:
    """Those whose VM ended otherwise than by our own hand, or ran out of memory inside."""
    return [
        runner
        for runner in story.runners
        if runner.ending is not None
        and (runner.ending.cause not in ("destroyed", "expired", "frozen") or runner.ending.guest_oom)
    ]


def print_evidence(runner: views.RunnerView) -> None:
    """How a VM ended that should not have; console and events are hostile text, control characters are out of them."""
    ending = runner.ending
    if ending is None:
        return
    how = f"signal {ending.signal}" if ending.signal is not None else f"status {ending.code}"
    sys.stdout.write(f"\nVM of {runner.id}: {ending.cause} ({how}): {ending.reason}\n")
    if ending.guest_oom:
        sys.stdout.write(f"  in the guest: {ending.guest_oom}\n")
    for event in ending.events:
        at = datetime.fromtimestamp(event.at).strftime("%H:%M:%S.%f")[:-3]
        sys.stdout.write(f"  VMM {at} {event.name} {event.detail}\n")
    for line in last_words(ending.panic or ending.console_tail, _CONSOLE_CHARS).splitlines():
        sys.stdout.write(f"  console {line}\n")


async def logs(settings: Settings, api: str | None, job: str, *, follow: bool) -> int:
    """The raw log; on a terminal only text and colours of it."""
    terminal = sys.stdout.isatty()
    async with client.source(settings, api) as source:
        if "/" in job:
            job = (await source.story(job)).job.id
        async for piece in source.log(job, follow=follow):
            data = show.for_terminal(piece) if terminal else piece
            # Off the loop: a reader that is slow must slow us down, not break the connection.
            await asyncio.to_thread(show.write, data)
    return 0


async def kill(settings: Settings, api: str | None, vm: str) -> int:
    """Through the service, so that its runner is retired properly; without a service the VM is just ended."""
    if not await client.kill(settings, api, vm):
        from runner_service.commands import access  # noqa: PLC0415

        await access.noted(settings, _destroy(settings, vm), "vm.kill", vm)
    sys.stdout.write(f"{vm} is being ended\n")
    return 0


async def _destroy(settings: Settings, vm: str) -> int:
    async with Engine.open(settings.data_dir) as engine:
        await engine.destroy(vm)
    return 0
