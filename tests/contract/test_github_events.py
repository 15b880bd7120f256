"""The stand-in's webhooks: shaped as GitHub's schemas say, signed, and taken by our receiver."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from jsonschema import Draft7Validator
from litestar import Litestar

from github_webhook.events import PingEvent, PushEvent, WorkflowJobEvent, parse
from github_webhook.receiver import Delivery, StoreResult, receiver
from tests.standins.github_official import webhook_examples, webhook_schema
from tests.standins.github_world import OWNER, REPO, ForgeWorld, forge_world, git

pytestmark = pytest.mark.anyio

SECRET = "It's a Secret to Everybody"

WORKFLOW = """\
name: CI
jobs:
  test: {runs-on: microvm, steps: [{run: "true"}]}
  deploy: {runs-on: microvm, environment: production, steps: [{run: "true"}]}
  after: {runs-on: microvm, needs: [test], steps: [{run: "true"}]}
"""


class Inbox:
    def __init__(self) -> None:
        self.rows: list[Delivery] = []

    async def store(self, delivery: Delivery) -> StoreResult:
        known = any(row.id == delivery.id for row in self.rows)
        self.rows.append(delivery)
        return "known" if known else "stored"

    def jobs(self) -> list[tuple[str, str, str]]:
        events = [parse(row.event, row.payload) for row in self.rows]
        return [(e.name, e.action, e.status) for e in events if isinstance(e, WorkflowJobEvent)]


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
async def world(tmp_path: Path, inbox: Inbox) -> AsyncIterator[ForgeWorld]:
    app = Litestar([receiver(inbox, lambda: [SECRET])], openapi_config=None, logging_config=None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/webhooks/github"
    try:
        async with forge_world(tmp_path, WORKFLOW, webhook_url=url, secret=SECRET) as made:
            yield made
    finally:
        server.should_exit = True
        await task


def check(event: str, payload: dict[str, Any]) -> None:
    schema = webhook_schema()
    errors = list(
        Draft7Validator({**schema, "oneOf": [{"$ref": f"#/definitions/{event}"}]}).iter_errors(payload)
    )
    detail = [f"{e.json_path}: {e.message[:200]}" for error in errors for e in error.context or [error]]
    assert not errors, detail


async def serve(world: ForgeWorld, job: Any, conclusion: str = "success") -> None:
    """What a runner does, without one."""
    actions = world.forge.actions
    runner = actions.register("repository", OWNER, REPO, f"r{job.id}", job.labels, "_work")
    actions.open_session(runner, "2.329.0")
    actions.acquire(runner, job)
    actions.complete(runner, job, conclusion, [])


async def test_the_life_of_jobs_in_events(world: ForgeWorld, inbox: Inbox) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    test, deploy = run.jobs
    await serve(world, test)
    world.forge.actions.approve(deploy)
    await serve(world, deploy, "failure")
    await world.forge.webhooks.settled()
    assert inbox.jobs() == [
        ("test", "queued", "queued"),
        ("deploy", "queued", "waiting"),
        ("deploy", "waiting", "waiting"),
        ("test", "in_progress", "in_progress"),
        ("test", "completed", "completed"),
        ("after", "queued", "queued"),
        ("deploy", "queued", "queued"),
        ("deploy", "in_progress", "in_progress"),
        ("deploy", "completed", "completed"),
    ]
    for row in inbox.rows:
        check("workflow_job_event", json.loads(row.payload))
    assert len({row.id for row in inbox.rows}) == len(inbox.rows)
    assert all(sent.status_code == 202 for sent in world.forge.webhooks.sent)
    started = [parse(row.event, row.payload) for row in inbox.rows if row.action == "in_progress"]
    assert isinstance(started[0], WorkflowJobEvent)
    assert started[0].runner_name == f"r{test.id}" and started[0].environment is None
    assert isinstance(started[1], WorkflowJobEvent) and started[1].environment == "production"


async def test_pushes_are_told_as_the_schema_says(world: ForgeWorld, inbox: Inbox) -> None:
    directory = world.tmp / REPO
    first = git(directory, "rev-parse", "HEAD")
    git(directory, "commit", "-q", "--allow-empty", "-m", "Second")
    second = git(directory, "rev-parse", "HEAD")
    git(directory, "branch", "feature/x", first)
    await world.forge.push(OWNER, REPO)
    await world.forge.push(OWNER, REPO, "feature/x")
    git(directory, "branch", "-D", "feature/x")
    await world.forge.push(OWNER, REPO, "feature/x", before=first)
    await world.forge.webhooks.settled()
    for row in inbox.rows:
        check("push$event", json.loads(row.payload))
    events = [parse(row.event, row.payload) for row in inbox.rows]
    assert [
        (e.ref, e.before, e.after, e.deleted, e.on_default_branch) for e in events if isinstance(e, PushEvent)
    ] == [
        ("refs/heads/main", first, second, False, True),
        ("refs/heads/feature/x", "0" * 40, first, False, False),
        ("refs/heads/feature/x", first, "0" * 40, True, False),
    ]


def test_the_official_examples_fit_the_official_schemas() -> None:
    """Else the check above would check nothing."""
    fitting = 0
    schema = webhook_schema()
    for example in webhook_examples("workflow_job"):
        # Older examples lack fields that later schemas ask for.
        validator = Draft7Validator({**schema, "oneOf": [{"$ref": "#/definitions/workflow_job_event"}]})
        fitting += validator.is_valid(example)
    assert fitting >= 1
    with pytest.raises(AssertionError):
        check("workflow_job_event", {"action": "queued"})


async def test_cancelled_before_anybody_took_it(world: ForgeWorld, inbox: Inbox) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    world.forge.actions.cancel(run)
    await world.forge.webhooks.settled()
    ended = [parse(row.event, row.payload) for row in inbox.rows if row.action == "completed"]
    assert len(ended) == 2
    for event in ended:
        assert isinstance(event, WorkflowJobEvent)
        assert (event.conclusion, event.runner_id, event.runner_name) == ("cancelled", None, None)


async def test_a_rerun_announces_old_jobs_again(world: ForgeWorld, inbox: Inbox) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    test, deploy = run.jobs
    await serve(world, test, "failure")
    world.forge.actions.approve(deploy)
    await serve(world, deploy)
    await world.forge.webhooks.settled()
    inbox.rows.clear()
    fresh = world.forge.actions.rerun(test)
    await world.forge.webhooks.settled()
    assert fresh.id != test.id
    assert ("deploy", "completed", "completed") in inbox.jobs()
    assert inbox.jobs()[-1] == ("test", "queued", "queued")


async def test_deliveries_get_lost_doubled_and_reordered(world: ForgeWorld, inbox: Inbox) -> None:
    hooks = world.forge.webhooks
    hooks.mishaps.lose = 1
    lost = world.forge.ping(OWNER, REPO)
    await hooks.settled()
    assert not inbox.rows and lost.status == "failed to connect"
    hooks.redeliver(lost.guid)
    await hooks.settled()
    assert [row.id for row in inbox.rows] == [lost.guid]
    check("ping$event", json.loads(inbox.rows[0].payload))
    assert isinstance(parse("ping", inbox.rows[0].payload), PingEvent)
    hooks.mishaps.double = 1
    twice = world.forge.ping(OWNER, REPO)
    await hooks.settled()
    assert [row.id for row in inbox.rows].count(twice.guid) == 2
    hooks.mishaps.hold = True
    await world.forge.queue_run(OWNER, REPO)
    inbox.rows.clear()
    hooks.release(reverse=True)
    await hooks.settled()
    assert [name for name, _, _ in inbox.jobs()] == ["deploy", "deploy", "test"]


async def test_signed_with_another_secret_nothing_arrives(world: ForgeWorld, inbox: Inbox) -> None:
    world.forge.webhooks.secret = "another"
    sent = world.forge.ping(OWNER, REPO)
    await world.forge.webhooks.settled()
    assert sent.status_code == 401 and not inbox.rows
