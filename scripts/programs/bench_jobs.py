"""Measures how many jobs a second go through the whole life of a runner, over in-memory stand-ins.

Everything of the control plane is real: inbox, scheduler, handlers, logs, and the store on disk with its synced
commits. What it drives answers at once: a hypervisor and a forge in memory, jobs of ten milliseconds.
"""

import asyncio
import time
from pathlib import Path

import msgspec

from scripts.programs.measure import Tick
from tests.unit.runner_service.world import RUNNERS, TEMPLATE, World

VMS = 100
REPOSITORIES = 20
_LATE = 300.0
_PATIENT = msgspec.structs.replace(
    RUNNERS, max_vms=VMS, fork_limit_s=120, online_limit_s=120, idle_limit_s=120,
    job_limit_s=120, retire_limit_s=120,
)  # fmt: skip


class JobsError(Exception):
    """Not every job ran once, or something was left."""


async def measure_jobs(directory: Path, *, count: int, tick: Tick) -> dict[str, float]:
    """``count`` jobs of twenty repositories queued at once, on 100 places, until nothing of them is left."""
    world = World(directory, runners=_PATIENT)
    world.memory_mib, world.cpus = VMS * TEMPLATE.need_mib, VMS
    world.tick = 10.0  # the service's own
    async with world.running() as service:
        started, cpu = time.perf_counter(), time.process_time()
        for number in range(count):
            world.forge.queue(repo=f"o/r{number % REPOSITORIES}")
        async with asyncio.timeout(_LATE):
            while world.host.machines or any(job.state != "completed" for job in world.forge.jobs.values()):
                await asyncio.sleep(0.02)
            while await service.runners():
                await asyncio.sleep(0.02)
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
    await world.host.close()
    tick("jobs through the whole life of a runner")
    if any(job.runs != 1 for job in world.forge.jobs.values()) or world.forge.runners:
        raise JobsError("not every job ran exactly once, or a registration was left")
    return {
        "control.jobs_per_s": count / seconds,
        "control.cpu_ms_a_job": spent / count * 1e3,
        "control.launches_a_job": world.host.launches / count,
    }
