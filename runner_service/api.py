"""The service's HTTP API (Litestar): health, metrics, jobs with stories and logs, VMs; errors are problem documents.

GET  /healthz  /readyz  /metrics
GET  /jobs?limit=&state=      GET /jobs/{job}      GET /jobs/{job}/log?offset=&follow=
GET  /why?job=                the same story as /jobs/{job}; the job may be owner/repo#name or an address too
GET  /bakes?limit=&repository=   GET /bakes/{bake}    GET /bakes/{bake}/log?offset=&follow=
GET  /vms                     POST /vms/{vm}/kill

GET  /frozen                  POST /frozen/{vm}/remove              (frozen_routes.py)
GET  /hosts   POST /drain?host=   POST /undrain?host=   POST /reload   (operation_routes.py)
GET  /tokens  POST /tokens  DELETE /tokens/{name}   GET /audit   (access_routes.py)

Who may ask what is the business of access.py. Webhooks come in on the same address unless they have their own.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import structlog
from litestar import Litestar, MediaType, Response, Router, get, post
from litestar.config.app import AppConfig
from litestar.exceptions import HTTPException, NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.spec import Components, SecurityScheme
from litestar.params import FromPath, FromQuery, PathParameter, QueryParameter
from litestar.response import Stream
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from sqlalchemy.exc import DataError

from runner_service import audit, views
from runner_service.access import Failures, Gate, who
from runner_service.access_routes import access_routes
from runner_service.domain import WRITES_LOG, Bake
from runner_service.frozen_routes import Remove, frozen_routes, none_kept
from runner_service.joblog import JobLogs
from runner_service.operation_routes import Orders, operation_routes
from runner_service.problems import Document, WebRequest, data_problem, http_problem, unexpected, vmm_problem
from runner_service.store import bake_queries as bq
from runner_service.store import job_search
from runner_service.store import queries as q
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.errors import VmmError

log = structlog.get_logger("api")
JobRunState = Literal["waiting", "queued", "in_progress", "completed"]
_BEFORE_RUNNER = 5.0
_BEFORE_ADOPTION = 1.0
# Logs come from guests: no browser may take them for anything but text.
_PLAIN = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
_OPEN: dict[str, Any] = {"opt": {"access": "open"}, "security": [{}]}


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
        gate: Gate | None = None,
        remove_frozen: Remove = none_kept,
        orders: Orders | None = None,
    ) -> None:
        self.store = store
        self.logs = logs
        self.bake_logs = bake_logs
        self.metrics = metrics
        self.readiness = readiness
        self.vms = vms
        self.kill = kill
        self.measure = measure
        self.remove_frozen = remove_frozen
        self.gate = gate or Gate(
            store, local_is_trusted=True, open_metrics=False, refused=metrics.refused, failures=Failures()
        )
        self.orders = orders
        self.started = time.monotonic()

    def app(self, routers: Sequence[Router] = ()) -> Litestar:
        """The application, with ``routers`` (the webhook receivers, which know their senders) hung in."""
        return Litestar(
            route_handlers=[
                *self._routes(),
                *access_routes(self.store),
                *frozen_routes(self.store, self.remove_frozen, self.audited),
                *(operation_routes(self.store, self.orders, self.audited) if self.orders is not None else ()),
                Router("/", route_handlers=routers, opt={"access": "open"}, security=[{}]),
            ],
            guards=[self.gate],
            on_app_init=[_log_requests],
            exception_handlers={
                HTTPException: http_problem,
                VmmError: vmm_problem,
                DataError: data_problem,
                Exception: unexpected,
            },
            openapi_config=OpenAPIConfig(
                title="microvm runner service",
                version="1",
                path="/schema",
                render_plugins=[Document()],
                components=Components(
                    security_schemes={"token": SecurityScheme(type="http", scheme="bearer")}
                ),
                security=[{"token": []}],
            ),
            logging_config=None,
        )

    def _routes(self) -> list[Any]:
        @get("/readyz", responses={503: ResponseSpec(Readiness, description="Not ready, and why.")})
        async def readyz() -> Response[Readiness]:
            readiness = await self.readiness()
            return Response(readiness, status_code=200 if readiness.ready else 503)

        @get("/metrics", media_type=MediaType.TEXT, include_in_schema=False, opt={"access": "metrics"})
        async def metrics() -> Response[bytes]:
            counts = await self.store.read(q.runner_counts)
            for state in ("wanted", "forking", "registering", "idle", "busy", "retiring"):
                self.metrics.runners.labels(state).set(counts.get(state, 0))
            under_way = await self.store.read(bq.bake_counts)
            for state in ("queued", "baking"):
                self.metrics.bakes_under_way.labels(state).set(under_way.get(state, 0))
            queued, oldest = await self.store.read(job_search.queue)
            self.metrics.queue.set(queued)
            self.metrics.oldest.set(max(0.0, time.time() - oldest) if oldest is not None else 0.0)
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

        @post("/vms/{vm:str}/kill", status_code=202, raises=[NotFoundException], opt={"access": "operate"})
        async def kill(vm: FromPath[str], request: WebRequest) -> Killed:
            async with self.audited(request, "vm.kill", vm):
                await self.kill(vm)
            return Killed(vm, "killing")

        looks = [
            _healthz(self.started),
            readyz,
            metrics,
            jobs,
            job_story,
            why,
            job_log,
            bakes,
            one_bake,
            bake_log,
            vms,
        ]
        return [*looks, kill]

    @contextlib.asynccontextmanager
    async def audited(
        self, request: WebRequest, action: str, target: str, **details: Any
    ) -> AsyncGenerator[None]:
        """Write an order down with what came of it, whoever gave it; its failure goes on to the caller."""
        by = await who(request)
        outcome = audit.DONE
        try:
            yield
        except Exception as error:
            outcome = str(error) if isinstance(error, VmmError | HTTPException) else type(error).__name__
            raise
        finally:
            log.info("order", action=action, target=target[:200], by=by, outcome=outcome[:200])
            await self.store.write(
                lambda db: audit.record(
                    db, who=by, action=action, target=target, details=details, outcome=outcome
                )
            )

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


def webhooks_alone(routers: Sequence[Router]) -> Litestar:
    """The application of an address of its own for webhooks: these, and whether the process answers."""
    return Litestar(
        route_handlers=[_healthz(time.monotonic()), *routers],
        on_app_init=[_log_requests],
        exception_handlers={HTTPException: http_problem, Exception: unexpected},
        openapi_config=None,
        logging_config=None,
    )


def _healthz(started: float) -> HTTPRouteHandler:
    @get("/healthz", sync_to_thread=False, **_OPEN)
    def healthz() -> Health:
        return Health("ok", round(time.monotonic() - started, 1))

    return healthz


def _log_requests(config: AppConfig) -> AppConfig:
    config.middleware.append(log_requests)
    return config


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
