"""The REST routes of the stand-in GitHub, with its ways of refusing; under ``/api/v3`` too, as GHES."""

import hashlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import jwt

from tests.standins.github_http import Request, Response, answer
from tests.standins.github_model import Job, Repository, Run, Runner
from tests.standins.github_shapes import Shapes, iso
from tests.standins.github_state import Actions, Refused
from tests.standins.github_webhooks import Webhooks

DOCS = "https://docs.github.com/rest"
_PERMISSIONS = {"administration": "write", "actions": "read", "contents": "read", "metadata": "read"}
_LABEL = re.compile(r"[^\s,][^,]{0,255}")


@dataclass(slots=True)
class App:
    """A GitHub App: ``client_id`` and ``id`` are both accepted as issuer."""

    id: int
    client_id: str
    public_key: Any
    installations: dict[int, str] = field(default_factory=dict)
    suspended: set[int] = field(default_factory=set)
    former: dict[int, str] = field(default_factory=dict)
    hours: dict[int, "Hour"] = field(default_factory=dict)


@dataclass(slots=True)
class Hour:
    """A primary rate limit: that of an installation, whatever its tokens, or that of a personal token."""

    remaining: int
    reset_at: float = field(default_factory=lambda: time.time() + 3600.0)

    def left(self, calls_an_hour: int) -> int:
        """Calls left; a new hour begins when the last is over."""
        if time.time() >= self.reset_at:
            self.remaining, self.reset_at = calls_an_hour, time.time() + 3600.0
        return self.remaining


@dataclass(slots=True)
class Token:
    """Who a token speaks for. ``owner`` None: everything (a personal token of an administrator).

    ``repositories`` (lower-case names) and ``permissions`` are what it was narrowed to; None: not at all.
    """

    owner: str | None
    expires_at: float
    hour: Hour = field(default_factory=lambda: Hour(5000))
    repositories: frozenset[str] | None = None
    permissions: dict[str, str] | None = None

    def reads(self, repository: Repository) -> bool:
        """Whether it may fetch the contents of this repository."""
        if self.owner is not None and self.owner.lower() != repository.owner.lower():
            return False
        if self.repositories is not None and repository.name.lower() not in self.repositories:
            return False
        return self.permissions is None or "contents" in self.permissions


RestHandler = Callable[..., Awaitable[Response]]
_ROUTES: list[tuple[str, re.Pattern[str], str]] = []


def _route(method: str, template: str) -> Callable[[RestHandler], RestHandler]:
    pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", template))

    def keep(handler: RestHandler) -> RestHandler:
        _ROUTES.append((method, pattern, handler.__name__))
        return handler

    return keep


_SCOPES = ("/repos/{owner}/{repo}", "/orgs/{org}", "/enterprises/{enterprise}")


def _scoped(method: str, tail: str) -> Callable[[RestHandler], RestHandler]:
    def keep(handler: RestHandler) -> RestHandler:
        for scope in _SCOPES:
            _route(method, scope + tail)(handler)
        return handler

    return keep


class Rest:
    """REST routes over the state. ``tokens`` and ``apps`` say who may call."""

    def __init__(self, actions: Actions, webhooks: Webhooks, jit_config: Callable[[Runner], str]) -> None:
        self.actions = actions
        self.webhooks = webhooks
        self.shapes = Shapes("", "")
        self.tokens: dict[str, Token] = {}
        self.apps: dict[str, App] = {}
        self.token_seconds = 3600.0
        self.calls_an_hour = 5000
        self.moved: dict[str, int] = {}
        """Old names (lower case) of repositories that were renamed, and their ids."""
        self._jit_config = jit_config

    async def handle(self, request: Request) -> Response | None:
        """The answer, or None when no route of ours fits."""
        path = self.operation_path(request)
        moved = self._moved(request, path)
        if moved is not None:
            return moved
        known = False
        for method, pattern, name in _ROUTES:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            known = True
            if method == request.method:
                return await self._guarded(request, getattr(self, name), found.groupdict())
        return answer(405, _problem(405, "Method Not Allowed")) if known else None

    def operation_path(self, request: Request) -> str:
        """The path of a call as the documents know it: GHES has a prefix, renamed repositories a number."""
        return self._by_number(request.path.removeprefix("/api/v3"))

    def _by_number(self, path: str) -> str:
        """``/repositories/ID/…`` is where renamed repositories are redirected to."""
        found = re.match(r"/repositories/(\d+)(/.*)?$", path)
        one = [r for r in self.actions.repositories.values() if found and str(r.id) == found[1]]
        return f"/repos/{one[0].full_name}{found[2] or ''}" if found and one else path

    def _moved(self, request: Request, path: str) -> Response | None:
        """GitHub answers 301 to reads of a renamed repository, 307 to everything else."""
        found = re.match(r"/repos/([^/]+/[^/]+)(/.*)?$", path)
        number = self.moved.get(found[1].lower()) if found else None
        if found is None or number is None:
            return None
        query = request.raw_path.partition("?")[2]
        url = f"{self.shapes.api}/repositories/{number}{found[2] or ''}{f'?{query}' if query else ''}"
        status = 301 if request.method == "GET" else 307
        return answer(status, {"message": "Moved Permanently", "url": url}, location=url)

    async def _guarded(self, request: Request, handler: RestHandler, parts: dict[str, str]) -> Response:
        token = None
        try:
            if "user-agent" not in request.headers:
                raise Refused(403, "Request forbidden by administrative rules: User-Agent is missing")
            token = self._who(request)
            if isinstance(token, Token):
                self._visible(token, parts)
                if token.permissions is not None and "administration" not in token.permissions:
                    raise Refused(403, "Resource not accessible by integration")
            response = self._conditional(request, token, await handler(request, token, **parts))
        except Refused as refusal:
            response = answer(refusal.status, _problem(refusal.status, refusal.message))
        if isinstance(token, Token) and response.status != 304 and token.hour.remaining > 0:
            token.hour.remaining -= 1
        response.headers.update(self._limits(token))
        return response

    def _conditional(self, request: Request, token: object, response: Response) -> Response:
        """Every JSON answer to a GET has a weak ETag that differs with the token; 304 has no body and no ``link``."""
        if request.method != "GET" or response.status != 200 or not isinstance(response.body, bytes):
            return response
        who = request.headers.get("authorization", "").encode()
        etag = f'W/"{hashlib.sha256(who + request.raw_path.encode() + response.body).hexdigest()}"'
        kept = {"etag": etag, "cache-control": "private, max-age=60", "vary": "Accept, Authorization, Cookie"}
        asked = [one.strip() for one in request.headers.get("if-none-match", "").split(",")]
        if isinstance(token, Token) and etag in asked:
            return Response(304, b"", kept)
        response.headers.update(kept)
        return response

    # -- who calls -------------------------------------------------------------------------------

    def _who(self, request: Request) -> "Token | App":
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() not in ("bearer", "token") or not value:
            raise Refused(401, "Requires authentication")
        token = self.tokens.get(value)
        if token is not None:
            if token.expires_at < time.time():
                raise Refused(401, "Bad credentials")
            if token.hour.left(self.calls_an_hour) <= 0:
                raise Refused(403, "API rate limit exceeded for installation.")
            return token
        if value.count(".") == 2 and not value.startswith("ghs_"):
            return self._app(value)
        raise Refused(401, "Bad credentials")

    def _app(self, value: str) -> App:
        try:
            issuer = str(jwt.decode(value, options={"verify_signature": False}).get("iss"))
            app = self.apps[issuer]
            claims = jwt.decode(
                value, app.public_key, algorithms=["RS256"], options={"require": ["iat", "exp"]}
            )
        except KeyError:
            raise Refused(404, "Integration not found") from None
        except jwt.PyJWTError as error:
            raise Refused(401, f"A JSON web token could not be decoded ({error})") from None
        if claims["exp"] - time.time() > 600:
            raise Refused(401, "'Expiration time' claim ('exp') is too far in the future")
        return app

    def _visible(self, token: Token, parts: dict[str, str]) -> None:
        owner = parts.get("owner") or parts.get("org")
        if not parts:
            return
        if token.owner is not None and (owner is None or token.owner.lower() != owner.lower()):
            raise Refused(404, "Not Found")
        if "repo" in parts and f"{owner}/{parts['repo']}".lower() not in self.actions.repositories:
            raise Refused(404, "Not Found")

    def _limits(self, token: "Token | App | None") -> dict[str, str]:
        limit = self.calls_an_hour
        remaining = min(limit, token.hour.remaining) if isinstance(token, Token) else limit
        reset_at = token.hour.reset_at if isinstance(token, Token) else time.time() + 1800.0
        return {
            "x-github-request-id": secrets.token_hex(8).upper(),
            "x-github-media-type": "github.v3; format=json",
            "x-ratelimit-limit": str(limit),
            "x-ratelimit-remaining": str(remaining),
            "x-ratelimit-used": str(limit - remaining),
            "x-ratelimit-reset": str(int(reset_at)),
            "x-ratelimit-resource": "core",
        }

    # -- the App ---------------------------------------------------------------------------------

    @_scoped("GET", "/installation")
    async def installation(self, _request: Request, who: object, **parts: str) -> Response:
        app = _as_app(who)
        owner = parts.get("owner") or parts.get("org") or parts["enterprise"]
        for number, account in app.installations.items():
            if account.lower() == owner.lower():
                return answer(200, self.shapes.installation(number, account, app.id))
        raise Refused(404, "Not Found")

    @_route("POST", "/app/installations/{installation_id}/access_tokens")
    async def access_token(self, request: Request, who: object, installation_id: str) -> Response:
        app = _as_app(who)
        account = app.installations.get(_number(installation_id))
        if account is None:
            raise Refused(404, "Not Found")
        if _number(installation_id) in app.suspended:
            raise Refused(403, "This installation has been suspended")
        # Longer than the 40 characters these tokens used to have: nobody may rely on a length.
        value = f"ghs_{app.id}_{secrets.token_urlsafe(180)}"
        expires_at = time.time() + self.token_seconds
        asked = _object(request) if request.body else {}
        permissions = asked.get("permissions")
        for name, level in (permissions or {}).items():
            if _PERMISSIONS.get(name) not in (level, "write"):
                raise Refused(422, "The permissions requested are not granted to this installation.")
        names = asked.get("repositories")
        chosen = [self.actions.repositories.get(f"{account}/{name}".lower()) for name in names or ()]
        if None in chosen:
            raise Refused(422, "There is at least one repository that does not exist or is not accessible.")
        only = frozenset(name.lower() for name in names) if names is not None else None
        hour = app.hours.setdefault(_number(installation_id), Hour(self.calls_an_hour))
        self.tokens[value] = Token(account, expires_at, hour, repositories=only, permissions=permissions)
        document = {"token": value, "expires_at": iso(expires_at), "permissions": permissions or _PERMISSIONS}
        if names is None:
            return answer(201, {**document, "repository_selection": "all"})
        shown = [self.shapes.repository(one) for one in chosen if one is not None]
        return answer(201, {**document, "repository_selection": "selected", "repositories": shown})

    @_route("GET", "/app/installations")
    async def installations(self, request: Request, who: object) -> Response:
        app = _as_app(who)
        shown = [
            self.shapes.installation(number, owner, app.id) for number, owner in app.installations.items()
        ]
        return answer(200, _page(request, shown))

    @_route("GET", "/installation/repositories")
    async def installation_repositories(self, request: Request, who: object) -> Response:
        if not isinstance(who, Token) or who.owner is None:
            raise Refused(403, "You must authenticate with an installation access token")
        found = [
            one
            for one in self.actions.repositories.values()
            if one.owner.lower() == (who.owner or "").lower()
        ]
        page = [self.shapes.repository(one) for one in _page(request, found)]
        return answer(200, {"total_count": len(found), "repositories": page})

    @_route("GET", "/user/repos")
    async def user_repositories(self, request: Request, who: object) -> Response:
        if not isinstance(who, Token) or who.owner is not None:
            raise Refused(403, "Resource not accessible by integration")
        found = list(self.actions.repositories.values())
        return answer(200, [self.shapes.repository(one) for one in _page(request, found)])

    @_route("GET", "/app/hook/deliveries")
    async def deliveries(self, request: Request, who: object) -> Response:
        _as_app(who)
        count = min(100, _number(request.query.get("per_page", "30")))
        before = _number(request.query.get("cursor", "v1_999999999").removeprefix("v1_"))
        found = [sent for sent in reversed(self.webhooks.sent) if sent.id < before and sent.delivered_at]
        response = answer(200, [_delivery(sent) for sent in found[:count]])
        if len(found) > count:
            cursor = f"cursor=v1_{found[count - 1].id}&per_page={count}"
            response.headers["link"] = f'<{self.shapes.api}/app/hook/deliveries?{cursor}>; rel="next"'
        return response

    @_route("POST", "/app/hook/deliveries/{delivery_id}/attempts")
    async def attempt(self, _request: Request, who: object, delivery_id: str) -> Response:
        _as_app(who)
        for sent in self.webhooks.sent:
            if sent.id == _number(delivery_id):
                self.webhooks.redeliver(sent.guid)
                return answer(202, {})
        raise Refused(404, "Not Found")

    # -- runners ---------------------------------------------------------------------------------

    @_scoped("POST", "/actions/runners/generate-jitconfig")
    async def generate_jitconfig(self, request: Request, _who: object, **parts: str) -> Response:
        body = _object(request)
        name, labels = body.get("name"), body.get("labels")
        work_folder = body.get("work_folder", "_work")
        if not isinstance(name, str) or not 1 <= len(name) <= 64:
            raise Refused(422, "Invalid request.\n\nname must be a string of 1 to 64 characters.")
        if not isinstance(body.get("runner_group_id"), int):
            raise Refused(422, 'Invalid request.\n\n"runner_group_id" wasn\'t supplied.')
        if body["runner_group_id"] != 1:
            raise Refused(404, "Not Found")
        if not isinstance(labels, list) or not 1 <= len(labels) <= 100:
            raise Refused(422, "Invalid request.\n\nlabels must have 1 to 100 items.")
        if not all(isinstance(label, str) and _LABEL.fullmatch(label) for label in labels):
            raise Refused(422, "Invalid request.\n\nlabels must be non-empty strings.")
        if not isinstance(work_folder, str):
            raise Refused(422, "Invalid request.\n\nwork_folder must be a string.")
        runner = self.actions.register(*_scope(parts), name, list(dict.fromkeys(labels)), work_folder)
        shape = self.shapes.runner(runner)
        return answer(201, {"runner": shape, "encoded_jit_config": self._jit_config(runner)})

    @_scoped("GET", "/actions/runners")
    async def runners(self, request: Request, _who: object, **parts: str) -> Response:
        found = self.actions.scope_runners(*_scope(parts))
        if name := request.query.get("name"):
            found = [runner for runner in found if runner.name.lower() == name.lower()]
        page = _page(request, found)
        return answer(200, {"total_count": len(found), "runners": [self.shapes.runner(r) for r in page]})

    @_scoped("GET", "/actions/runners/{runner_id}")
    async def runner(self, _request: Request, _who: object, runner_id: str, **parts: str) -> Response:
        return answer(200, self.shapes.runner(self._runner(runner_id, parts)))

    @_scoped("DELETE", "/actions/runners/{runner_id}")
    async def delete_runner(self, _request: Request, _who: object, runner_id: str, **parts: str) -> Response:
        self.actions.delete_runner(self._runner(runner_id, parts))
        return answer(204)

    # -- runs and jobs ---------------------------------------------------------------------------

    @_route("GET", "/repos/{owner}/{repo}/actions/runs")
    async def runs(self, request: Request, _who: object, owner: str, repo: str) -> Response:
        repository = self._repository(owner, repo)
        found = [run for run in self.actions.runs.values() if run.repository is repository]
        if status := request.query.get("status"):
            found = [run for run in found if status in (run.status, run.conclusion)]
        found.reverse()
        page = [self.shapes.run(run) for run in _page(request, found)]
        return answer(200, {"total_count": len(found), "workflow_runs": page})

    @_route("GET", "/repos/{owner}/{repo}/actions/runs/{run_id}")
    async def run(self, _request: Request, _who: object, owner: str, repo: str, run_id: str) -> Response:
        return answer(200, self.shapes.run(self._run(owner, repo, run_id)))

    @_route("GET", "/repos/{owner}/{repo}/actions/runs/{run_id}/jobs")
    async def run_jobs(self, request: Request, _who: object, owner: str, repo: str, run_id: str) -> Response:
        run = self._run(owner, repo, run_id)
        found = run.jobs if request.query.get("filter") == "all" else run.latest
        page = [self.shapes.job(job) for job in _page(request, found)]
        return answer(200, {"total_count": len(found), "jobs": page})

    @_route("POST", "/repos/{owner}/{repo}/actions/runs/{run_id}/cancel")
    async def cancel(self, _request: Request, _who: object, owner: str, repo: str, run_id: str) -> Response:
        self.actions.cancel(self._run(owner, repo, run_id))
        return answer(202, {})

    @_route("GET", "/repos/{owner}/{repo}/actions/jobs/{job_id}")
    async def job(self, _request: Request, _who: object, owner: str, repo: str, job_id: str) -> Response:
        return answer(200, self.shapes.job(self._job(owner, repo, job_id)))

    @_route("POST", "/repos/{owner}/{repo}/actions/jobs/{job_id}/rerun")
    async def rerun(self, _request: Request, _who: object, owner: str, repo: str, job_id: str) -> Response:
        self.actions.rerun(self._job(owner, repo, job_id))
        return answer(201, {})

    # -- finding things --------------------------------------------------------------------------

    def _repository(self, owner: str, repo: str) -> Repository:
        found = self.actions.repositories.get(f"{owner}/{repo}".lower())
        if found is None:
            raise Refused(404, "Not Found")
        return found

    def _run(self, owner: str, repo: str, run_id: str) -> Run:
        run = self.actions.runs.get(_number(run_id))
        if run is None or run.repository is not self._repository(owner, repo):
            raise Refused(404, "Not Found")
        return run

    def _job(self, owner: str, repo: str, job_id: str) -> Job:
        job = self.actions.jobs.get(_number(job_id))
        if job is None or job.run.repository is not self._repository(owner, repo):
            raise Refused(404, "Not Found")
        return job

    def _runner(self, runner_id: str, parts: dict[str, str]) -> Runner:
        for runner in self.actions.scope_runners(*_scope(parts)):
            if runner.id == _number(runner_id):
                return runner
        raise Refused(404, "Not Found")


def _as_app(who: object) -> App:
    if not isinstance(who, App):
        raise Refused(401, "A JSON web token could not be decoded")
    return who


def _scope(parts: dict[str, str]) -> tuple[str, str, str | None]:
    if "owner" in parts:
        return "repository", parts["owner"], parts["repo"]
    if "org" in parts:
        return "organization", parts["org"], None
    return "enterprise", parts["enterprise"], None


def _number(text: str) -> int:
    if not text.isdecimal():
        raise Refused(404, "Not Found")
    return int(text)


def _object(request: Request) -> dict[str, Any]:
    try:
        body = request.json()
    except ValueError:
        raise Refused(400, "Problems parsing JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "Body should be a JSON object")
    return body


def _page(request: Request, items: list[Any]) -> list[Any]:
    size = max(1, min(100, _number(request.query.get("per_page", "30"))))
    start = (max(1, _number(request.query.get("page", "1"))) - 1) * size
    return items[start : start + size]


def _delivery(sent: Any) -> dict[str, Any]:
    return {
        "id": sent.id,
        "guid": sent.guid,
        "delivered_at": iso(sent.delivered_at),
        "redelivery": sent.redelivery,
        "duration": round(sent.duration, 3),
        "status": sent.status,
        "status_code": sent.status_code,
        "event": sent.event,
        "action": sent.action,
        "installation_id": sent.installation_id,
        "repository_id": sent.repository_id,
    }


def _problem(status: int, message: str) -> dict[str, str]:
    return {"message": message, "documentation_url": DOCS, "status": str(status)}
