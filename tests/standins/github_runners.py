"""The runner's side of the stand-in GitHub: our own protocol, because the real one is private.

    POST   /_standin/session                    → {"session"}; 401, 404 gone, 409 conflict, 426 too old
    GET    /_standin/session/{id}/message?wait=N → 200 {"type": "job"|"cancel", "job"}; 204 nothing
    DELETE /_standin/session/{id}
    POST   /_standin/jobs/{id}/acquire          → {}; 409 given to another
    POST   /_standin/jobs/{id}/log              {"offset", "data", "steps"?} → {"length"}
    POST   /_standin/jobs/{id}/complete         {"conclusion", "steps"} → {}

Every call carries ``Authorization: Bearer <clientId>.<secret>`` out of the runner's files, and each may be
repeated after a lost answer.
"""

import asyncio
import base64
import json
import re
import time
from typing import Any

from tests.standins.github_http import Request, Response, answer
from tests.standins.github_model import Job, Runner
from tests.standins.github_state import Actions, Refused

_PATH = re.compile(r"/_standin/(session|jobs)(?:/([^/]+))?(?:/([^/]+))?")


def jit_config(runner: Runner, guest_url: str) -> str:
    """``encoded_jit_config``: base64 of {file name: base64 of the file}, as actions/runner has it."""
    where = runner.owner if runner.repo is None else f"{runner.owner}/{runner.repo}"
    settings = {
        "agentId": runner.id,
        "agentName": runner.name,
        "poolId": 1,
        "poolName": "Default",
        "ephemeral": True,
        "serverUrl": guest_url,
        "gitHubUrl": f"{guest_url}/{where}",
        "workFolder": runner.work_folder,
        "useV2Flow": True,
    }
    credentials = {
        "scheme": "OAuth",
        "data": {"clientId": runner.client_id, "authorizationUrl": f"{guest_url}/_standin/session"},
    }
    files = {
        ".runner": settings,
        ".credentials": credentials,
        ".credentials_rsaparams": {"secret": runner.secret},
    }
    outer = {name: _base64(json.dumps(content, indent=2)) for name, content in files.items()}
    return _base64(json.dumps(outer))


class RunnerApi:
    """``guest_url`` is the address of this server as guests write it."""

    def __init__(self, actions: Actions) -> None:
        self.actions = actions
        self.guest_url = ""

    async def handle(self, request: Request) -> Response | None:
        found = _PATH.fullmatch(request.path)
        if found is None:
            return None
        kind, number, verb = found.groups()
        try:
            runner = self._runner(request)
            runner.seen_at = time.time()
            if kind == "session":
                return await self._session(request, runner, number, verb)
            return self._job(request, runner, number, verb)
        except Refused as refusal:
            return answer(refusal.status, {"message": refusal.message})

    def _runner(self, request: Request) -> Runner:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        client_id, _, secret = value.partition(".")
        everyone = (*self.actions.runners.values(), *self.actions.retired.values())
        for runner in everyone:
            if scheme == "Bearer" and runner.client_id == client_id and runner.secret == secret:
                return runner
        raise Refused(401, "The runner's credentials are not valid.")

    async def _session(
        self, request: Request, runner: Runner, number: str | None, verb: str | None
    ) -> Response:
        if request.method == "POST" and number is None:
            body: Any = request.json()
            session = self.actions.open_session(runner, str(body.get("version", "0")))
            return answer(200, {"session": session})
        if runner.session is None or number != runner.session:
            raise Refused(404, "The session is unknown.")
        if request.method == "DELETE" and verb is None:
            self.actions.close_session(runner)
            return answer(200, {})
        if request.method == "GET" and verb == "message":
            wait = min(float(request.query.get("wait", "0")), self.actions.times.poll)
            return await self._message(runner, wait)
        raise Refused(405, "Method Not Allowed")

    async def _message(self, runner: Runner, wait: float) -> Response:
        runner.polling += 1
        self.actions.changed()
        try:
            async with asyncio.timeout(wait):
                while (job := self.actions.message(runner)) is None:
                    if runner.session is None:
                        raise Refused(404, "The session is unknown.")
                    runner.wake.clear()
                    await runner.wake.wait()
        except TimeoutError:
            return answer(204)
        finally:
            runner.polling -= 1
            runner.seen_at = time.time()
        if job.cancelled_at is not None:
            return answer(200, {"type": "cancel", "job": {"id": job.id}})
        return answer(200, {"type": "job", "job": self._message_job(job)})

    def _message_job(self, job: Job) -> dict[str, Any]:
        run = job.run
        return {
            "id": job.id,
            "key": job.key,
            "name": job.name,
            "run_id": run.id,
            "run_number": run.number,
            "run_attempt": run.attempt,
            "repository": run.repository.full_name,
            "owner": run.repository.owner,
            "clone_url": f"{self.guest_url}/{run.repository.full_name}",
            "server_url": self.guest_url,
            "sha": run.sha,
            "ref": run.ref,
            "branch": run.branch,
            "event": run.event,
            "workflow": run.workflow_name,
            "token": job.token,
            "env": job.definition["env"],
            "steps": job.definition["steps"],
        }

    def _job(self, request: Request, runner: Runner, number: str | None, verb: str | None) -> Response:
        job = self.actions.jobs.get(int(number)) if number and number.isdecimal() else None
        if job is None or request.method != "POST":
            raise Refused(404, "Not Found")
        body: Any = request.json()
        if verb == "acquire":
            self.actions.acquire(runner, job)
            return answer(200, {})
        if job.runner_id != runner.id:
            raise Refused(403, "The job belongs to another runner.")
        if verb == "log":
            if "steps" in body and job.status == "in_progress":
                job.steps = body["steps"]
            length = self.actions.append_log(job, int(body["offset"]), body["data"].encode())
            return answer(200, {"length": length})
        if verb == "complete":
            self.actions.complete(runner, job, str(body["conclusion"]), body["steps"])
            return answer(200, {})
        raise Refused(404, "Not Found")


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
