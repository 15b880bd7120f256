"""Our client and the stand-in, both held to GitHub's own OpenAPI document: every request and every answer."""

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from github_webhook.app_auth import AppAuth, Scope, TokenAuth
from github_webhook.deliveries import Deliveries
from github_webhook.errors import Conflict, Forbidden, NotFound, Unavailable, Unprocessable
from github_webhook.github import GitHub
from github_webhook.reach import Reach
from github_webhook.rest import clone_url
from runner_service.domain import Scope as JobScope
from runner_service.github_forge import GitHubForge
from tests.standins.github_official import openapi
from tests.standins.github_world import LABELS, OWNER, REPO, SCOPE, ForgeWorld, forge_world, make_repository
from tests.standins.openapi import CheckedTransport, OpenApi

pytestmark = pytest.mark.anyio

WORKFLOW = """\
name: CI
jobs:
  one: {runs-on: microvm, steps: [{run: "true"}]}
  two: {runs-on: [microvm, gpu], steps: [{run: "true"}]}
  late: {runs-on: microvm, needs: one, steps: [{run: "true"}]}
"""

ENTERPRISE = Scope("enterprise", "octo-corp")
SCOPES = [SCOPE, Scope.organization(OWNER), ENTERPRISE]


class World(ForgeWorld):
    checked: CheckedTransport


@pytest.fixture(scope="module")
def documents() -> list[OpenApi]:
    return [OpenApi(openapi()), OpenApi(openapi("ghec"))]


@pytest.fixture
async def world(tmp_path: Path, documents: list[OpenApi]) -> AsyncIterator[World]:
    checked = CheckedTransport(httpx.AsyncHTTPTransport(), *documents)
    async with forge_world(tmp_path, WORKFLOW, transport=checked) as made:
        made.__class__ = World
        made.checked = checked  # type: ignore[attr-defined]
        yield made  # type: ignore[misc]
    assert checked.problems == []
    assert checked.checked


def app_client(world: World) -> GitHub:
    app = world.forge.add_app(OWNER)
    auth = AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )
    return GitHub(auth=auth, http=world.http, base_url=world.forge.url)


@pytest.mark.parametrize("scope", SCOPES, ids=lambda scope: scope.kind)
async def test_the_life_of_a_registration(world: World, scope: Scope) -> None:
    github = world.github
    made = await github.generate_jit_config(scope, name="r1", labels=LABELS)
    assert made.name == "r1" and made.encoded_jit_config
    found = await github.find_runner(scope, "R1")
    assert found is not None and found.id == made.runner_id
    assert (found.online, found.busy, found.labels, found.ephemeral) == (False, False, LABELS, True)
    assert await github.get_runner(scope, made.runner_id) == found
    assert await github.find_runner(scope, "r2") is None
    assert await github.runners(scope) == ([found], True)
    assert await github.delete_runner(scope, made.runner_id) == "deleted"
    assert await github.delete_runner(scope, made.runner_id) == "gone"
    assert await github.get_runner(scope, made.runner_id) is None


async def test_as_an_app(world: World) -> None:
    github = app_client(world)
    made = await github.generate_jit_config(SCOPE, name="r1", labels=LABELS)
    assert await github.get_runner(SCOPE, made.runner_id)
    with pytest.raises(NotFound):
        await github.find_runner(Scope.organization("elsewhere"), "r1")
    assert any("access_tokens 201" in call for call in world.checked.checked)


async def test_a_credential_to_clone_is_for_one_repository_and_for_reading_only(world: World) -> None:
    app = world.forge.add_app(OWNER)
    auth = AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )
    credential = await auth.clone_credential(OWNER, REPO)
    token = world.forge.rest.tokens[credential.password]
    assert token.permissions == {"contents": "read"} and token.repositories == frozenset({REPO})
    assert credential.username == "x-access-token" and credential.password not in repr(credential)
    assert await auth.clone_credential(OWNER, REPO.upper()) == credential  # for as long as it is good
    await world.forge.add_repository(make_repository(world.tmp / "other"), owner=OWNER)

    async def fetched(repo: str) -> int:
        url = f"{clone_url(world.forge.url, OWNER, repo)}/info/refs?service=git-upload-pack"
        async with httpx.AsyncClient(trust_env=False) as git:
            return (await git.get(url, auth=(credential.username, credential.password))).status_code

    # It opens nothing else: no other repository, no registration.
    assert [await fetched(REPO), await fetched("other")] == [200, 401]
    with pytest.raises(Forbidden):
        await GitHub(
            auth=TokenAuth(credential.password), http=world.http, base_url=world.forge.url
        ).find_runner(SCOPE, "r")
    with pytest.raises(Unprocessable):
        await auth.clone_credential(OWNER, "no-such-repository")
    # The installation's own token is another one.
    assert (await auth.headers(SCOPE))["authorization"] != f"Bearer {credential.password}"


async def test_a_personal_token_clones_as_it_is() -> None:
    credential = await TokenAuth("ghp_x").clone_credential(OWNER, REPO)
    assert (credential.username, credential.password) == ("x-access-token", "ghp_x")


@pytest.mark.parametrize(
    ("api", "url"),
    [
        ("https://api.github.com", "https://github.com/o/r.git"),
        ("https://api.x.ghe.com", "https://x.ghe.com/o/r.git"),
        ("https://ghe.example/api/v3", "https://ghe.example/o/r.git"),
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234/o/r.git"),
    ],
)
def test_where_repositories_are_cloned_from(api: str, url: str) -> None:
    assert clone_url(api, "o", "r") == url


async def test_under_the_address_of_an_enterprise_server(tmp_path: Path, documents: list[OpenApi]) -> None:
    checked = CheckedTransport(httpx.AsyncHTTPTransport(), *documents, prefix="/api/v3")
    async with forge_world(tmp_path, WORKFLOW, transport=checked) as world:
        app = world.forge.add_app(OWNER)
        base = f"{world.forge.url}/api/v3"
        auth = AppAuth(
            client_id=app.client_id, private_key_pem=app.private_key_pem, http=world.http, base_url=base
        )
        github = GitHub(auth=auth, http=world.http, base_url=base)
        made = await github.generate_jit_config(SCOPE, name="r1", labels=LABELS)
        assert await github.delete_runner(SCOPE, made.runner_id) == "deleted"
    assert checked.problems == []


async def test_a_name_that_exists(world: World) -> None:
    first = await world.github.generate_jit_config(SCOPE, name="r1", labels=LABELS)
    with pytest.raises(Conflict):
        await world.github.generate_jit_config(SCOPE, name="R1", labels=LABELS)
    second = await world.github.generate_jit_config(SCOPE, name="r1", labels=LABELS, replace=True)
    assert second.runner_id != first.runner_id
    assert await world.github.get_runner(SCOPE, first.runner_id) is None
    # The same name elsewhere is another runner.
    await world.github.generate_jit_config(Scope.organization(OWNER), name="r1", labels=LABELS)


async def test_a_registration_whose_answer_was_lost_is_replaced(world: World) -> None:
    world.forge.fault("POST */generate-jitconfig", drop="after")
    with pytest.raises(Unavailable):
        await world.github.generate_jit_config(SCOPE, name="r1", labels=LABELS, replace=True)
    lost = await world.github.find_runner(SCOPE, "r1")
    made = await world.github.generate_jit_config(SCOPE, name="r1", labels=LABELS, replace=True)
    assert lost is not None and made.runner_id != lost.id
    assert len(world.forge.actions.runners) == 1


async def test_a_busy_runner_is_neither_deleted_nor_replaced(world: World) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    made = await world.github.generate_jit_config(SCOPE, name="r1", labels=LABELS)
    runner = world.forge.actions.runners[made.runner_id]
    world.forge.actions.open_session(runner, "2.329.0")
    world.forge.actions.acquire(runner, run.jobs[0])
    assert await world.github.delete_runner(SCOPE, made.runner_id) == "busy"
    with pytest.raises(Conflict):
        await world.github.generate_jit_config(SCOPE, name="r1", labels=LABELS, replace=True)
    job = await world.github.get_job(OWNER, REPO, run.jobs[0].id)
    assert job is not None and (job.status, job.runner_id, job.runner_name) == (
        "in_progress",
        made.runner_id,
        "r1",
    )


async def test_untaken_jobs_are_found_in_every_unfinished_run(world: World) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    again = await world.forge.queue_run(OWNER, REPO)
    one, two = run.jobs
    runner = world.forge.actions.register("repository", OWNER, REPO, "r1", ["microvm"], "_work")
    world.forge.actions.open_session(runner, "2.329.0")
    world.forge.actions.acquire(runner, one)
    queued = (await world.github.untaken_jobs(OWNER, REPO)).jobs
    assert [job.id for job in queued] == [two.id, *(job.id for job in again.jobs)]
    assert queued[0].labels == ("microvm", "gpu") and queued[0].run_attempt == 1
    assert queued[0].head_sha == run.sha and queued[0].created_at is not None
    world.forge.actions.complete(runner, one, "success", [])
    assert [job.name for job in (await world.github.untaken_jobs(OWNER, REPO)).jobs][:2] == ["two", "late"]
    assert await world.github.get_job(OWNER, REPO, 4711) is None


async def test_more_than_a_page(world: World) -> None:
    for number in range(101):
        world.forge.actions.register("repository", OWNER, REPO, f"r{number}", ["x"], "_work")
    # Servers that do not know the filter answer with everything.
    found = await world.github.find_runner(SCOPE, "r100")
    assert found is not None and found.name == "r100"
    for _ in range(51):
        await world.forge.queue_run(OWNER, REPO)
    assert len((await world.github.untaken_jobs(OWNER, REPO)).jobs) == 102


async def test_run_a_job_again(world: World) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    with pytest.raises(Forbidden):
        await world.github.rerun_job(OWNER, REPO, run.jobs[0].id)
    world.forge.actions.cancel(run)
    await world.github.rerun_job(OWNER, REPO, run.jobs[0].id)
    (queued,) = (await world.github.untaken_jobs(OWNER, REPO)).jobs
    assert queued.run_attempt == 2 and queued.id != run.jobs[0].id


async def test_a_run_and_its_attempts(world: World) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    found = await world.github.get_run(OWNER, REPO, run.id)
    assert (found.id, found.attempt, found.conclusion) == (run.id, 1, None)
    assert found.status != "completed"
    world.forge.actions.cancel(run)
    found = await world.github.get_run(OWNER, REPO, run.id)
    assert (found.status, found.conclusion) == ("completed", "cancelled")
    await world.github.rerun_job(OWNER, REPO, run.jobs[0].id)
    found = await world.github.get_run(OWNER, REPO, run.id)
    assert (found.attempt, found.status != "completed") == (2, True)
    with pytest.raises(NotFound):
        await world.github.get_run(OWNER, REPO, 4711)


async def test_an_order_to_run_a_job_again_is_for_one_attempt(world: World) -> None:
    forge = GitHubForge(world.github)
    run = await world.forge.queue_run(OWNER, REPO)
    job = run.jobs[0]
    scope = JobScope("repository", f"{OWNER}/{REPO}")

    async def order() -> str:
        return await forge.rerun(
            scope, str(job.id), owner=OWNER, repo=REPO, run_id=str(run.id), attempt=job.attempt
        )

    assert await order() == "not_over"
    runner = world.forge.actions.register("repository", OWNER, REPO, "r1", ["microvm", "gpu"], "_work")
    world.forge.actions.open_session(runner, "2.329.0")
    world.forge.actions.acquire(runner, job)
    world.forge.actions.complete(runner, job, "failure", [])
    other = await world.forge.queue_run(OWNER, REPO)
    for left in run.jobs[1:]:
        world.forge.actions._finish(left, "failure")
    assert await order() == "asked"
    assert await order() == "newer", "an answer that was lost is no reason to do it again"
    assert len([one for one in run.jobs if one.attempt == 2 and one.status == "queued"]) == 1
    world.forge.actions.cancel(other)
    job, run = other.jobs[0], other
    assert await order() == "cancelled"


async def test_what_is_not_there(world: World) -> None:
    nowhere = Scope.repository(OWNER, "nowhere")
    with pytest.raises(NotFound):
        await world.github.generate_jit_config(nowhere, name="r1", labels=LABELS)
    with pytest.raises(NotFound):
        await world.github.untaken_jobs(OWNER, "nowhere")


@pytest.mark.parametrize(
    "body",
    [
        {"runner_group_id": 1, "labels": ["x"]},
        {"name": "r", "labels": ["x"]},
        {"name": "r", "runner_group_id": 1, "labels": []},
        {"name": "r", "runner_group_id": 1, "labels": ["x"] * 101},
        {"name": "r", "runner_group_id": 1, "labels": [1]},
    ],
)
async def test_the_stand_in_refuses_what_github_would(
    tmp_path: Path, documents: list[OpenApi], body: Any
) -> None:
    async with forge_world(tmp_path) as world:
        url = f"{world.forge.url}/repos/{OWNER}/{REPO}/actions/runners/generate-jitconfig"
        headers = {"authorization": f"Bearer {world.forge.token}"}
        response = await world.http.post(url, json=body, headers=headers)
    assert response.status_code == 422
    wrong = documents[0].check_exchange(response.request, 422, response.headers, response.content)
    assert wrong and all("request" in problem for problem in wrong), "the answer is right, the request is not"


async def test_the_rest_of_the_stand_ins_routes(world: World) -> None:
    """Routes our client does not call yet, but later parts will; held to the document all the same."""
    run = await world.forge.queue_run(OWNER, REPO)
    base = f"{world.forge.url}/repos/{OWNER}/{REPO}/actions/runs/{run.id}"
    headers = {"authorization": f"Bearer {world.forge.token}"}
    assert (await world.http.get(base, headers=headers)).json()["status"] == "queued"
    assert (await world.http.post(f"{base}/cancel", headers=headers)).status_code == 202
    assert (await world.http.post(f"{base}/cancel", headers=headers)).status_code == 409
    assert (await world.http.get(base, headers=headers)).json()["conclusion"] == "cancelled"


async def test_lost_deliveries_are_found_and_sent_again(world: World) -> None:
    started = time.time() - 1
    hooks = world.forge.webhooks
    pings = [world.forge.ping(OWNER, REPO) for _ in range(150)]
    await hooks.settled()
    for number, ping in enumerate(pings):
        # Two out of three were lost; of these every other one arrived at the second try.
        if number % 3 == 0:
            ping.status_code = 202
        elif number % 2 == 0:
            again = hooks.redeliver(ping.guid)
            await hooks.settled()
            again.status_code = 200
    app = world.forge.add_app(OWNER)
    auth = AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )
    deliveries = Deliveries(auth=auth, http=world.http, base_url=world.forge.url)
    lost = await deliveries.lost(since=started)
    assert [found.guid for found in lost] == [
        ping.guid for number, ping in enumerate(pings) if number % 3 and number % 2
    ]
    assert lost[0].event == "ping" and lost[0].status_code == 502
    assert await deliveries.lost(since=time.time() + 60) == []
    await deliveries.redeliver(lost[0].id)
    assert hooks.sent[-1].guid == lost[0].guid and hooks.sent[-1].redelivery


async def test_an_unchanged_listing_costs_nothing_of_the_rate_limit(world: World) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    first = await world.github.untaken_jobs(OWNER, REPO)
    assert [job.id for job in first.jobs] == [job.id for job in run.jobs] and first.paid == first.calls == 4
    limit = world.github.limit(OWNER)
    assert limit is not None and (limit.limit, limit.remaining) == (5000, 4996)
    again = await world.github.untaken_jobs(OWNER, REPO)
    assert again.jobs == first.jobs and (again.calls, again.paid) == (4, 0)
    assert world.github.limit(OWNER) == limit
    assert [call for call in world.checked.checked[-4:] if not call.endswith(" 304")] == []
    # A job moved on, and its run with it.
    runner = world.forge.actions.register("repository", OWNER, REPO, "r1", ["microvm"], "_work")
    world.forge.actions.open_session(runner, "2.329.0")
    world.forge.actions.acquire(runner, run.jobs[0])
    changed = await world.github.untaken_jobs(OWNER, REPO)
    assert [job.id for job in changed.jobs] == [run.jobs[1].id] and changed.paid == 3


async def test_an_etag_is_good_for_its_token_only(world: World) -> None:
    app = world.forge.add_app(OWNER)
    auth = AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )
    github = GitHub(auth=auth, http=world.http, base_url=world.forge.url)
    await world.forge.queue_run(OWNER, REPO)
    first = await github.untaken_jobs(OWNER, REPO)
    assert (await github.untaken_jobs(OWNER, REPO)).paid == 0
    await auth.refused(SCOPE, await auth.headers(SCOPE))
    renewed = await github.untaken_jobs(OWNER, REPO)
    assert renewed.jobs == first.jobs and renewed.paid == renewed.calls
    # The hour's calls are the installation's, whichever its token.
    limit = github.limit(OWNER)
    assert limit is not None and limit.remaining == 5000 - 2 * first.calls


async def test_jobs_that_wait_for_an_approval_are_found_as_such(tmp_path: Path) -> None:
    workflow = (
        "jobs:\n"
        "  gated: {runs-on: microvm, environment: production, steps: [{run: 'true'}]}\n"
        "  free: {runs-on: microvm, steps: [{run: 'true'}]}\n"
    )
    async with forge_world(tmp_path, workflow) as world:
        await world.forge.queue_run(OWNER, REPO)
        found = (await world.github.untaken_jobs(OWNER, REPO)).jobs
        assert [(job.name, job.status) for job in found] == [("gated", "waiting"), ("free", "queued")]


async def test_a_look_goes_on_where_its_bound_ended_the_last(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("github_webhook.github.MAX_RUNS", 2)
    runs = [await world.forge.queue_run(OWNER, REPO) for _ in range(3)]
    first = await world.github.untaken_jobs(OWNER, REPO)
    assert {job.run_id for job in first.jobs} == {run.id for run in runs[:2]} and first.more == runs[1].id
    second = await world.github.untaken_jobs(OWNER, REPO, after=runs[1].id)
    assert {job.run_id for job in second.jobs} == {runs[2].id} and second.more is None


async def test_what_an_app_reaches(world: World) -> None:
    await world.forge.add_repository(make_repository(world.tmp / "other"), owner=OWNER)
    await world.forge.add_repository(make_repository(world.tmp / "foreign"), owner="elsewhere")
    app = world.forge.add_app(OWNER)
    auth = AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )
    reach = Reach(auth=auth, http=world.http, base_url=world.forge.url)
    assert await reach.owners() == [OWNER]
    assert [found.repo for found in await reach.repositories(OWNER)] == [REPO, "other"]


async def test_what_a_token_reaches(world: World) -> None:
    await world.forge.add_repository(make_repository(world.tmp / "foreign"), owner="elsewhere")
    reach = Reach(auth=TokenAuth(world.forge.token), http=world.http, base_url=world.forge.url)
    assert await reach.owners() == [OWNER, "elsewhere"]
    assert [found.repo for found in await reach.repositories("Elsewhere")] == ["foreign"]


async def test_limits_are_told_and_kept(world: World) -> None:
    response = await world.http.get(
        f"{world.forge.url}/repos/{OWNER}/{REPO}/actions/runners",
        headers={"authorization": f"Bearer {world.forge.token}"},
    )
    assert response.headers["x-ratelimit-remaining"] == "4999"
    assert response.headers["x-github-request-id"]
    anonymous = await world.http.get(f"{world.forge.url}/repos/{OWNER}/{REPO}/actions/runners")
    assert anonymous.status_code == 401


# -- the judge itself ----------------------------------------------------------------------------

RUNNER = {"id": 1, "name": "r", "os": "linux", "status": "online", "busy": False, "labels": []}
JIT = {"runner": RUNNER, "encoded_jit_config": "x"}
ASKED = {"name": "r", "runner_group_id": 1, "labels": ["x"]}
PATH = "/repos/o/r/actions/runners/generate-jitconfig"
RUNS = "/repos/o/r/actions/runs"
NONE = {"total_count": 0, "workflow_runs": []}
ODD_LABEL = {**RUNNER, "labels": [{"type": "custom"}]}


@pytest.mark.parametrize(
    ("method", "path", "asked", "status", "said", "wrong"),
    [
        ("POST", PATH, ASKED, 201, JIT, None),
        ("POST", PATH, ASKED, 201, {"runner": RUNNER}, "'encoded_jit_config' is a required property"),
        ("POST", PATH, ASKED, 201, {**JIT, "runner": {**RUNNER, "id": "1"}}, "$.runner.id"),
        ("POST", PATH, ASKED, 201, {**JIT, "runner": ODD_LABEL}, "labels[0]"),
        ("POST", PATH, ASKED, 201, {**JIT, "runner": {**RUNNER, "version": None}}, None),
        ("POST", PATH, ASKED, 201, {**JIT, "runner": {**RUNNER, "status": None}}, "$.runner.status"),
        ("POST", PATH, ASKED, 200, JIT, "status 200 is not documented"),
        ("POST", PATH, ASKED, 401, {"message": "no"}, None),
        ("POST", PATH, ASKED, 401, {"message": 5}, "401"),
        ("POST", PATH, None, 201, JIT, "no body"),
        ("POST", PATH, {**ASKED, "labels": []}, 201, JIT, "request"),
        ("POST", PATH, {**ASKED, "lables": []}, 201, JIT, "lables is not documented"),
        ("GET", RUNS + "?status=queued&page=1", None, 200, NONE, None),
        ("GET", RUNS + "?status=sleepy", None, 200, NONE, "status"),
        ("GET", RUNS + "?state=queued", None, 200, NONE, "state is not"),
        ("GET", "/repos/o/r/actions/runners/five", None, 200, RUNNER, "runner_id"),
        ("GET", "/repos/o/r/actions/runers", None, 200, {}, "not an operation"),
        ("DELETE", "/repos/o/r/actions/runners/5", None, 204, None, None),
        ("DELETE", "/repos/o/r/actions/runners/5", None, 204, {}, "no body"),
    ],
)  # fmt: skip
def test_a_wrong_request_or_answer_is_found(
    documents: list[OpenApi], method: str, path: str, asked: Any, status: int, said: Any, wrong: str | None
) -> None:
    request = httpx.Request(method, "https://api.github.com" + path, json=asked)
    body = b"" if said is None else json.dumps(said).encode()
    headers = httpx.Headers({"content-type": "application/json"})
    found = documents[0].check_exchange(request, status, headers, body)
    if wrong is None:
        assert found == []
    else:
        assert any(wrong in problem for problem in found), found
