"""A forge that refuses, fails, keeps silent or loses its answer: told in the job's timeline, and the job runs later.

Every fault has a repository of its own, and all jobs run at once: their brakes do not touch each other.
"""

import asyncio
from typing import Any

import pytest

from scripts.programs.leftovers import Leftovers
from scripts.programs.stage import Stage
from tests.acceptance.conftest import eventually, queue, steps, told, vms
from tests.standins.github_state import Job
from vmm_core.engine import Engine

pytestmark = pytest.mark.anyio

# What the forge does with the first calls for a registration.
REFUSED: dict[str, dict[str, Any]] = {
    "unauthorized": {"status": 401},
    "forbidden": {"status": 403},
    "not_found": {"status": 404},
    "unprocessable": {"status": 422},
    "unavailable": {"status": 500, "times": 4},
}
RETRIED: dict[str, dict[str, Any]] = {
    "fails_twice": {"status": 502, "times": 2},
    "no_answer": {"drop": "before"},
    "lost_answer": {"drop": "after"},
    "too_slow": {"delay": 15.0},
    "answer_invalid": {"status": 201, "body": '{"runner": {}, "encoded_jit_config": 5}'},
}
CONFLICT: dict[str, dict[str, Any]] = {"conflict": {"status": 409}}
FAULTS = {**REFUSED, **RETRIED, **CONFLICT}
Ended = dict[str, tuple[Job, dict[str, Any]]]


@pytest.fixture(scope="module")
def max_vms() -> int:
    """All jobs of this module are queued at once: what they wait for shall be the forge, not room."""
    return 16


@pytest.fixture(scope="module")
async def ended(stage: Stage, engine: Engine) -> Ended:
    """One job a fault, all queued at once, until the last one's runner is gone."""
    before = Leftovers.look(engine)
    repository = stage.forge.repository("octo-org", "hello").git_dir
    jobs: dict[str, Job] = {}
    for name, fault in FAULTS.items():
        await stage.forge.add_repository(repository, name=name)
        stage.forge.fault(f"POST *repos/octo-org/{name}/actions/runners/generate-jitconfig", **fault)
        jobs[name] = await queue(stage, "hello", name)
    stories = dict(
        zip(jobs, await asyncio.gather(*(all_gone(stage, job) for job in jobs.values())), strict=True)
    )
    await eventually(lambda: not Leftovers.look(engine).since(before), "nothing left")
    return {name: (jobs[name], stories[name]) for name in FAULTS}


def in_order(story: dict[str, Any]) -> list[dict[str, Any]]:
    """The story's runners in the order they were made."""
    made = [row["runner_id"] for row in story["timeline"] if row["step"] == "wanted"]
    return sorted(story["runners"], key=lambda runner: made.index(runner["id"]))


async def all_gone(stage: Stage, job: Job) -> dict[str, Any]:
    """The story once the job is over and none of its runners is left."""
    await stage.forge.wait_for(job, "completed", 170)
    return await stage.until(
        job,
        lambda story: (
            story["job"]["state"] == "completed"
            and all(runner["state"] == "gone" for runner in story["runners"])
        ),
        "all runners gone",
    )


@pytest.mark.parametrize("name", [*FAULTS])
async def test_the_job_runs_in_the_end_and_nothing_is_left(
    stage: Stage, engine: Engine, ended: Ended, name: str
) -> None:
    job, story = ended[name]
    assert job.conclusion == "success"
    assert story["job"]["conclusion"] == "success"
    assert {runner["state"] for runner in story["runners"]} == {"gone"}
    assert not stage.forge.actions.runners
    assert not vms(engine)


@pytest.mark.parametrize("name", [*REFUSED])
async def test_a_refusal_is_told_and_a_new_runner_is_tried_later(ended: Ended, name: str) -> None:
    _, story = ended[name]
    first, *others = in_order(story)
    assert first["code"] == f"forge_{name}"
    assert first["reason"].startswith("cannot register with the forge: ")
    assert len(others) == 1
    assert "cannot register with the forge" in told(story, "retiring")
    # It was held back, and the job said by what, where a pass of the scheduler fell into that time.
    rows = story["timeline"]
    failed = next(row["at"] for row in rows if row["step"] == "retiring" and row["runner_id"] == first["id"])
    again = next(row["at"] for row in rows if row["step"] == "wanted" and row["runner_id"] == others[0]["id"])
    assert f"forge_{name}" in told(story, "waiting") or again - failed >= 0.9, rows


@pytest.mark.parametrize("name", [*RETRIED])
async def test_what_may_pass_is_tried_again_for_the_same_runner(ended: Ended, name: str) -> None:
    _, story = ended[name]
    assert len(story["runners"]) == 1, story["timeline"]
    assert steps(story).count("register again") == RETRIED[name].get("times", 1)
    assert "retiring" in steps(story)


async def test_a_refused_runner_has_no_vm_and_no_registration(ended: Ended) -> None:
    for name in REFUSED:
        _, story = ended[name]
        first = in_order(story)[0]["id"]
        rows = [row["step"] for row in story["timeline"] if row["runner_id"] == first]
        assert "registered" not in rows
        if "forked" in rows:
            assert "destroyed" in rows, f"{name}: {rows}"


async def test_a_forge_that_is_away_is_waited_for(stage: Stage) -> None:
    await stage.forge.pause()
    try:
        job = await queue(stage, "hello")
        story = await stage.until(job, lambda story: "retiring" in steps(story), "given up")
        assert job.status == "queued"
        assert story["runners"][0]["code"] == "forge_unavailable"
    finally:
        await stage.forge.resume()
    story = await all_gone(stage, job)
    assert job.conclusion == "success"
    assert "register again" in steps(story)


async def test_a_rate_limit_holds_until_the_time_it_names(stage: Stage) -> None:
    """Last of the faults: it stops every call with these credentials."""
    stage.forge.fault("POST */generate-jitconfig", status=403, headers={"retry-after": "4"})
    job = await queue(stage, "hello")
    story = await all_gone(stage, job)
    assert job.conclusion == "success"
    first, second = in_order(story)
    assert first["code"] == "forge_rate_limited"
    times = {row["runner_id"]: row["at"] for row in story["timeline"] if row["step"] == "wanted"}
    assert times[second["id"]] - times[first["id"]] >= 3.5
    assert "forge_rate_limited" in told(story, "waiting")


async def test_the_service_lives_and_counts_what_went_wrong(stage: Stage, ended: Ended) -> None:
    assert stage.service.returncode is None
    metrics = (await stage.http.get("/metrics")).text
    for name in REFUSED:
        assert f'microvm_reasons_total{{code="forge_{name}"}}' in metrics
    log = stage.log.read_text()
    assert "Traceback" not in log
    assert "internal_error" not in log
