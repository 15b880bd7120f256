"""The control port of the stand-in GitHub, for whoever runs it as another process (the demo, the bench).

POST /_standin/control/repositories  {"path", "owner"?, "name"?}      → {"full_name"}
POST /_standin/control/runs          {"owner", "repo", "ref"?, "workflow"?} → {"run_id", "sha", "jobs"}
POST /_standin/control/push          {"owner", "repo", "branch"?, "before"?} → {"guid"}; tells of a branch as it is
POST /_standin/control/runs/{id}/cancel
GET  /_standin/control/jobs/{id}[?status=completed&timeout=30]        → the job, after waiting
GET  /_standin/control/jobs/{id}/log                                  → text
POST /_standin/control/jobs/{id}/approve, …/rerun
GET  /_standin/control/runners                                        → every registered runner
GET  /_standin/control/deliveries                                     → every try to deliver an event
POST /_standin/control/redeliver     {"guid"}
POST /_standin/control/webhook       {"url"}
POST /_standin/control/faults        a fault, see github_faults.Fault; DELETE clears them
POST /_standin/control/mishaps       {"lose"?, "double"?, "delay"?}
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.standins.github_faults import Fault
from tests.standins.github_git import WorkflowError
from tests.standins.github_http import Request, Response, answer
from tests.standins.github_model import Job, Run
from tests.standins.github_state import Refused

if TYPE_CHECKING:
    from tests.standins.github import StandinGitHub

BASE = "/_standin/control/"


class Control:
    def __init__(self, forge: "StandinGitHub") -> None:
        self._forge = forge

    async def handle(self, request: Request) -> Response:
        if not request.path.startswith(BASE):
            return answer(404, {"message": "Not Found"})
        parts = request.path.removeprefix(BASE).split("/")
        body: Any = request.json()
        try:
            return await self._route(request, parts, body)
        except Refused as refusal:
            return answer(refusal.status, {"message": refusal.message})
        except TimeoutError as error:
            return answer(504, {"message": str(error)})
        except (KeyError, TypeError, ValueError, WorkflowError) as error:
            return answer(400, {"message": f"{type(error).__name__}: {error}"})

    async def _route(self, request: Request, parts: list[str], body: Any) -> Response:
        forge = self._forge
        match request.method, *parts:
            case "POST", "repositories":
                path = Path(body.pop("path"))
                return answer(201, {"full_name": (await forge.add_repository(path, **body)).full_name})
            case "POST", "runs":
                return answer(201, self._run(await forge.queue_run(**body)))
            case "POST", "push":
                return answer(201, {"guid": (await forge.push(**body)).guid})
            case "POST", "runs", number, "cancel":
                forge.actions.cancel(forge.actions.runs[int(number)])
                return answer(202, {})
            case "GET", "jobs", number:
                if status := request.query.get("status"):
                    await forge.wait_for(int(number), status, float(request.query.get("timeout", "30")))
                return answer(200, self._job(forge.job(int(number))))
            case "GET", "jobs", number, "log":
                return Response(200, bytes(forge.job(int(number)).log), {"content-type": "text/plain"})
            case "POST", "jobs", number, "approve":
                forge.actions.approve(forge.job(int(number)))
                return answer(202, {})
            case "POST", "jobs", number, "rerun":
                return answer(201, self._job(forge.actions.rerun(forge.job(int(number)))))
            case "GET", "runners":
                return answer(200, [forge.rest.shapes.runner(r) for r in forge.actions.runners.values()])
            case _:
                return self._faulty(request.method, parts, body)

    def _faulty(self, method: str, parts: list[str], body: Any) -> Response:
        forge = self._forge
        match method, *parts:
            case "GET", "deliveries":
                keys = ("id", "guid", "event", "action", "status_code", "redelivery", "delivered_at")
                return answer(200, [{key: getattr(s, key) for key in keys} for s in forge.webhooks.sent])
            case "POST", "redeliver":
                return answer(202, {"id": forge.webhooks.redeliver(body["guid"]).id})
            case "POST", "webhook":
                forge.webhooks.url = body["url"]
                return answer(200, {})
            case "POST", "faults":
                forge.faults.add(Fault(**body))
                return answer(201, {})
            case "DELETE", "faults":
                forge.faults.clear()
                return answer(200, {})
            case "POST", "mishaps":
                for key in ("lose", "double", "delay"):
                    if key in body:
                        setattr(forge.webhooks.mishaps, key, body[key])
                return answer(200, {})
            case _:
                return answer(404, {"message": "Not Found"})

    def _run(self, run: Run) -> dict[str, Any]:
        return {"run_id": run.id, "sha": run.sha, "jobs": [self._job(job) for job in run.jobs]}

    def _job(self, job: Job) -> dict[str, Any]:
        keys = ("id", "key", "name", "labels", "status", "conclusion", "runner_id", "runner_name")
        times = ("created_at", "started_at", "completed_at")
        return {
            **{key: getattr(job, key) for key in (*keys, *times)},
            "run_id": job.run.id,
            "log_bytes": len(job.log),
        }
