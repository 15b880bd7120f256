"""The service's HTTP API (Litestar): health, metrics, jobs with stories and logs, VMs; errors are problem documents.

GET  /healthz  /readyz  /metrics
GET  /jobs?limit=&state=      GET /jobs/{job}      GET /jobs/{job}/log?offset=&follow=
GET  /why?job=                the same story as /jobs/{job}; the job may be owner/repo#name or an address too
GET  /bakes?limit=&repository=   GET /bakes/{bake}    GET /bakes/{bake}/log?offset=&follow=
GET  /vms                     POST /vms/{vm}/kill

Webhooks come in on the same address. What a reverse proxy passes on (it says so in a header) reaches them only.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import structlog
from litestar import Litestar, MediaType, Request, Response, Router, get, post
from litestar.config.app import AppConfig
from litestar.datastructures import State
from litestar.exceptions import HTTPException, NotFoundException, PermissionDeniedException
from litestar.openapi import OpenAPIConfig
from litestar.params import FromPath, FromQuery, PathParameter, QueryParameter
from litestar.response import Stream
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from github_webhook.receiver import problem
from runner_service import views
from runner_service.domain import WRITES_LOG, Bake
from runner_service.joblog import JobLogs
from runner_service.store import bake_queries as bq
from runner_service.store import job_search
from runner_service.store import queries as q
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.errors import UnknownVm, VmmError

log = structlog.get_logger("api")
WebRequest = Request[Any, Any, State]
JobRunState = Literal["waiting", "queued", "in_progress", "completed"]
_BEFORE_RUNNER = 5.0
_BEFORE_ADOPTION = 1.0
# Logs come from guests: no browser may take them for anything but text.
_PLAIN = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
_FORWARDED = {b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"}


class Check(msgspec.Struct, frozen=True):
    """One thing the service needs; ``detail`` is one sentence."""

    name: str
    ok: bool
    detail: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether new jobs can be served now, and why not."""

    ready: bool
    checks: tuple[Check, ...]


class Health(msgspec.Struct, frozen=True):
    """The process answers."""

    status: Literal["ok"]
    uptime_s: float


class Killed(msgspec.Struct, frozen=True):
    """The order was taken; the VM is gone a moment later."""

    vm: str
    status: Literal["killing"]


class Api:
    """What the routes need, wired by the daemon."""

    def __init__(
        self,
        *,
        store: Store,
        logs: JobLogs,
        bake_logs: JobLogs,
        metrics: Metrics,
        readiness: Callable[[], Awaitable[Readiness]],
        vms: Callable[[], Awaitable[list[views.VmView]]],
        kill: Callable[[str], Awaitable[None]],
        measure: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.logs = logs
        self.bake_logs = bake_logs
        self.metrics = metrics
        self.readiness = readiness
        self.vms = vms
        self.kill = kill
        self.measure = measure
        self.started = time.monotonic()

    def app(self, routers: Sequence[Router] = ()) -> Litestar:
        """The application, with ``routers`` (the webhook receivers) hung in."""

        def configure(config: AppConfig) -> AppConfig:
            config.middleware.extend((log_requests, refuse_forwarded))
            return config

        return Litestar(
            route_handlers=[*self._routes(), *routers],
            on_app_init=[configure],
            exception_handlers={HTTPException: _http_problem, VmmError: _vmm_problem, Exception: _unexpected},
            openapi_config=OpenAPIConfig(title="microvm runner service", version="1", path="/schema"),
            logging_config=None,
        )

    def _routes(self) -> list[Any]:
        @get("/healthz", sync_to_thread=False)
        def healthz() -> Health:
            return Health("ok", round(time.monotonic() - self.started, 1))

        @get("/readyz")
        async def readyz() -> Response[Readiness]:
            readiness = await self.readiness()
            return Response(readiness, status_code=200 if readiness.ready else 503)

        @get("/metrics", media_type=MediaType.TEXT, include_in_schema=False)
        async def metrics() -> Response[bytes]:
            counts = await self.store.read(q.runner_counts)
            for state in ("wanted", "forking", "registering", "idle", "busy", "retiring"):
                self.metrics.runners.labels(state).set(counts.get(state, 0))
            under_way = await self.store.read(bq.bake_counts)
            for state in ("queued", "baking"):
                self.metrics.bakes_under_way.labels(state).set(under_way.get(state, 0))
            self.measure()
            return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

        @get("/jobs")
        async def jobs(
            limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
            in_state: Annotated[JobRunState | None, QueryParameter(name="state")] = None,
        ) -> list[views.JobView]:
            return await self.store.read(lambda db: views.list_jobs(db, limit=limit, state=in_state))

        @get("/jobs/{job:str}", raises=[NotFoundException])
        async def job_story(job: FromPath[str]) -> views.Story:
            return await self._story(job)

        @get("/why", raises=[NotFoundException])
        async def why(job: Annotated[str, QueryParameter(min_length=1, max_length=500)]) -> views.Story:
            return await self._story(job)

        @get("/jobs/{job:str}/log", raises=[NotFoundException], media_type=MediaType.TEXT)
        async def job_log(
            job: FromPath[str],
            offset: Annotated[int, QueryParameter(ge=0, le=1 << 40)] = 0,
            follow: FromQuery[bool] = False,
        ) -> Stream:
            story = await self._story(job)
            return Stream(
                self._log(story, offset, follow=follow),
                media_type="text/plain; charset=utf-8",
                headers=_PLAIN,
            )

        @get("/bakes")
        async def bakes(
            limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
            repository: Annotated[str | None, QueryParameter(max_length=300)] = None,
        ) -> list[Bake]:
            return await self.store.read(lambda db: views.list_bakes(db, limit=limit, repository=repository))

        @get("/bakes/{bake:int}", raises=[NotFoundException])
        async def one_bake(bake: Annotated[int, PathParameter(ge=0, le=1 << 31)]) -> Bake:
            return await self._bake(bake)

        @get("/bakes/{bake:int}/log", raises=[NotFoundException], media_type=MediaType.TEXT)
        async def bake_log(
            bake: Annotated[int, PathParameter(ge=0, le=1 << 31)],
            offset: Annotated[int, QueryParameter(ge=0, le=1 << 40)] = 0,
            follow: FromQuery[bool] = False,
        ) -> Stream:
            found = await self._bake(bake)
            return Stream(
                self._bake_log(found, offset, follow=follow),
                media_type="text/plain; charset=utf-8",
                headers=_PLAIN,
            )

        @get("/vms")
        async def vms() -> list[views.VmView]:
            return await self.vms()

        @post("/vms/{vm:str}/kill", status_code=202, raises=[NotFoundException, PermissionDeniedException])
        async def kill(vm: FromPath[str], request: WebRequest) -> Killed:
            if "origin" in request.headers:
                raise PermissionDeniedException("a web page may not give orders to this service")
            await self.kill(vm)
            log.info("vm_killed", vm=vm, by=request.client.host if request.client else None)
            return Killed(vm, "killing")

        return [healthz, readyz, metrics, jobs, job_story, why, job_log, bakes, one_bake, bake_log, vms, kill]

    async def _story(self, ref: str) -> views.Story:
        found = await self.store.read(lambda db: views.story(db, ref))
        if found is None:
            close = await self.store.read(lambda db: job_search.near(db, ref))
            raise NotFoundException(job_search.unknown(ref, close, "GET /jobs"))
        return found

    async def _bake(self, number: int) -> Bake:
        found = await self.store.read(lambda db: bq.bake(db, number))
        if found is None:
            raise NotFoundException(f"there is no bake {number}: see GET /bakes")
        return found

    async def _bake_log(self, bake: Bake, offset: int, *, follow: bool) -> AsyncIterator[bytes]:
        """The log of all its attempts; with ``follow`` until it is over, over all attempts."""
        while True:
            async for piece in self.bake_logs.read(str(bake.id), offset=offset, follow=follow):
                offset += len(piece)
                yield piece
            if not follow or self.bake_logs.ending or bake.state not in ("queued", "baking"):
                return
            await self.bake_logs.opened(_BEFORE_RUNNER)
            bake = await self._bake(bake.id)

    async def _log(self, story: views.Story, offset: int, *, follow: bool) -> AsyncIterator[bytes]:
        """The log of the job's runner; with ``follow`` it is waited for, and read until the runner ends."""
        while follow and not self._has_log(story) and story.job.state != "completed" and not self.logs.ending:
            await self.logs.opened(_BEFORE_RUNNER)
            story = await self._story(story.job.id)
        runner = story.job.runner
        while runner is not None:
            async for piece in self.logs.read(runner, offset=offset, follow=follow):
                offset += len(piece)
                yield piece
            if not follow or self.logs.ending:
                return
            story = await self._story(story.job.id)
            if story.job.runner != runner or story.job.runner_state not in WRITES_LOG:
                return
            # The runner lives and its log is not open: this service was just started and will take it up.
            await self.logs.opened(_BEFORE_ADOPTION)

    def _has_log(self, story: views.Story) -> bool:
        return story.job.runner is not None and self.logs.path(story.job.runner).exists()


def log_requests(app: ASGIApp) -> ASGIApp:
    """Log method, path and status of each request; never a query, a header or a body."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, watched)
        finally:
            spent = round((time.perf_counter() - started) * 1e3, 1)
            log.debug("request", method=scope["method"], path=scope["path"][:200], status=status, ms=spent)

    return middleware


def refuse_forwarded(app: ASGIApp) -> ASGIApp:
    """Only webhooks and /healthz for requests that a proxy passed on: the rest has no password of its own."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path != "/healthz" and not path.startswith("/webhooks/"):
            names = {name.lower() for name, _ in scope["headers"]}
            if names & _FORWARDED:
                raise PermissionDeniedException("forward only /webhooks/ to this service")
        await app(scope, receive, send)

    return middleware


def _http_problem(_: WebRequest, error: HTTPException) -> Response[bytes]:
    detail = error.detail
    if isinstance(error.extra, list) and error.extra:
        # Which parameter, and what is wrong with it.
        detail = "; ".join(f"{one.get('key', '')}: {one.get('message', '')}" for one in error.extra)[:500]
    code = type(error).__name__.removesuffix("Exception")
    return problem(error.status_code, code.lower() or "http", code or "HTTP error", detail)


def _vmm_problem(_: WebRequest, error: VmmError) -> Response[bytes]:
    status = 404 if isinstance(error, UnknownVm) else 500
    return problem(status, error.code, type(error).__name__, str(error))


def _unexpected(request: WebRequest, error: Exception) -> Response[bytes]:
    log.exception("request_failed", path=request.url.path[:200], error=type(error).__name__)
    return problem(500, "internal_error", "Internal error", "see the log of the service")
