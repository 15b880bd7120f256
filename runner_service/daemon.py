"""The service as a process: the only file that names concrete classes and wires them together.

lock the data directory → store → engine → forge → scheduler → API
SIGTERM, SIGINT: no new work (``stopping.py``), streams end, VMs run on; the next start adopts them.
SIGHUP: the settings are read again (``reload.py``).
"""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable

import httpx
import structlog
from litestar import Router
from sqlalchemy.exc import SQLAlchemyError

from github_webhook.circuit import Circuits
from github_webhook.github import GitHub
from github_webhook.receiver import receiver
from github_webhook.rest import api_base_url
from github_webhook.routes import Routes
from runner_service import github_forge, serving, telemetry, tokens, views
from runner_service.access import Failures, Gate, reached_from_here_only
from runner_service.api import Api, Check, Readiness, webhooks_alone
from runner_service.bake_plan import Planner
from runner_service.bakes import Bakes, bake_logs
from runner_service.catalog import EngineCatalog
from runner_service.choice import Chooser
from runner_service.claims import address_of, announce, listen, only_one
from runner_service.client import SERVICE_FILE
from runner_service.credentials import (
    WebhookSecrets,
    deliveries,
    reached,
    routes,
    runner_groups,
    secret_variables,
)
from runner_service.decide import Decider, Rules
from runner_service.domain import Host, Job, JobEvent, Runner
from runner_service.egress import forge_rule
from runner_service.facts import Limits
from runner_service.flow import Flow
from runner_service.frozen import Freezer
from runner_service.github_listings import GitHubListings, named, served
from runner_service.holds import Probes, told
from runner_service.inbox import StoreInbox
from runner_service.ingest import ScopeOf
from runner_service.joblog import JobLogs
from runner_service.operation_routes import Orders
from runner_service.polling import Poller
from runner_service.ports import Forge
from runner_service.redelivery import Redeliveries
from runner_service.registrations import Registrations
from runner_service.reload import Reload
from runner_service.repositories import Mirrors, OriginOf, permitted_by
from runner_service.reruns import Reruns
from runner_service.scheduler import Scheduler
from runner_service.settings import GitHubSettings, Settings, SettingsError, read_secret
from runner_service.stopping import Stopping, wind_down
from runner_service.store import queries as q
from runner_service.store.store import Store, sqlite_url
from vmm_core.accounting import host_available_mib
from vmm_core.engine import Engine
from vmm_core.errors import UnknownTemplate, VmmError
from vmm_core.machine import EgressRule

log = structlog.get_logger("daemon")

_ROOM_BYTES = 1 << 30
_PREWARM_SECONDS = 60.0
_GREETING_SECONDS = 5.0


async def serve(settings: Settings, load: Callable[[], Settings] | None = None) -> None:
    """Run the service until SIGTERM or SIGINT; ``load`` reads the settings again when they are to be reloaded.

    Raises SettingsError, StoreError, VmmError before it serves.
    """
    telemetry.configure_logging(settings.service.log_format, settings.service.log_level)
    stopping, hangup = Stopping(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.signal)
    # From the first moment on: by default this signal would end the process.
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(only_one(settings.data_dir))
        listening = stack.enter_context(listen(settings.listen))
        webhooks = None
        if settings.webhook_listen is not None:
            webhooks = stack.enter_context(listen(settings.webhook_listen, "service.webhook_listen"))
        store = await stack.enter_async_context(Store.open(database_url(settings)))
        engine = await stack.enter_async_context(
            Engine.open(
                settings.data_dir,
                resolvers=settings.runners.resolvers or None,
                reap_every=settings.runners.reap_every_s,
            )
        )
        http = await stack.enter_async_context(_http())
        service = Service(settings, store, engine, http, load=load or (lambda: settings))
        await stack.enter_async_context(service.running(listening, webhooks, stopping))
        reloading = asyncio.create_task(service.reload_at(hangup), name="reload")
        await stopping.asked.wait()
        log.info("stopping", vms=service.scheduler.vms)
        reloading.cancel()
        end = service.reload.settings.service
        await wind_down(service.scheduler, stopping, grace=end.stop_grace_s, vms=end.stop_vms)


class Service:
    """All parts of one service, wired."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        engine: Engine,
        http: httpx.AsyncClient,
        *,
        load: Callable[[], Settings],
    ) -> None:
        runners = settings.runners
        self._settings = settings
        self._store = store
        self._jobs = store.grouped_reads(q.each_job)
        self._engine = engine
        self._http = http
        self._metrics = telemetry.Metrics()
        self._recovered = False
        self._logs = JobLogs(settings.data_dir / "logs", limit=runners.log_limit_mib << 20)
        self._catalog = EngineCatalog(engine)
        self._forges: dict[str, Forge] = {}
        auth = self._routes = routes(settings.github, http) if settings.github is not None else None
        circuits = self._circuits = Circuits()
        interpret = github_forge.Interpreter(auth, circuits)
        self._probes: Probes | None = None
        self._poller: Poller | None = None
        self._redeliveries: Redeliveries | None = None
        forge: github_forge.GitHubForge | None = None
        if settings.github is not None and auth is not None:
            client = GitHub(
                base_url=api_base_url(settings.github.base_url),
                auth=auth,
                http=http,
                timeout=settings.github.timeout_s,
                circuits=circuits,
            )
            groups = runner_groups(settings.github, auth)
            forge = self._forges[github_forge.FORGE] = github_forge.GitHubForge(client, runner_group=groups)
            self._probes = Probes(client, self._metrics)
            self._poller = self._make_poller(settings.github, client, forge, auth)
            apps = deliveries(settings.github, auth, http) if settings.github.ingress == "webhook" else {}
            self._redeliveries = Redeliveries(
                store=store, forge=github_forge.FORGE, apps=apps, metrics=self._metrics
            )
        self._bakes: Bakes | None = None
        self._planner: Planner | None = None
        mirrors: Mirrors | None = None
        if settings.github is not None and auth is not None and settings.bakes.enabled:
            origin = github_forge.origin_of(auth, api_base_url(settings.github.base_url))
            mirrors = _mirrors(settings, origin)
            self._bakes = bakes = self._make_bakes(settings.github, origin)
            self._planner = Planner(
                store=store,
                host=settings.service.name,
                catalog=self._catalog,
                repositories=mirrors,
                settings=settings.bakes,
                default_template=runners.default_template,
                queued=bakes.wake,
            )
        chooser = Chooser(
            store=store,
            host=settings.service.name,
            catalog=self._catalog,
            repositories=mirrors,
            limit=settings.bakes.choice_limit_s,
        )
        limits = Limits.of(runners)
        self._freezer = Freezer(
            store=store,
            machines=engine,
            settings=settings.frozen,
            host=settings.service.name,
            size=lambda digest: asyncio.to_thread(engine.snapshots.private_bytes, digest),
            metrics=self._metrics,
        )
        flow = Flow(
            hypervisor=engine,
            forges=self._forges,
            catalog=self._catalog,
            logs=self._logs,
            limits=limits,
            service=settings.service.name,
            job=self._job,
            observe=self._observe,
            choose=chooser.choose,
            confirm=chooser.confirm,
            chosen=lambda code: self._metrics.parents.labels(code).inc(),
            freezer=self._freezer,
            egress=_egress(settings),
            forge_rules=self._forge_rules(),
        )
        decider = Decider(
            _rules(settings),
            interpret=interpret,
            scope_of=_scope_of(settings),
            templates=self._catalog.templates,
            parents=self._catalog.parents,
            held=lambda scope: forge.held(scope) if forge is not None else None,
        )
        self._reruns = Reruns(
            store=store,
            forges=self._forges,
            patterns=runners.rerun_on_infra_failure,
            metrics=self._metrics,
        )
        # Measured once: later it is our own VMs that have it.
        self._memory_mib = host_available_mib() * 8 // 10
        self.scheduler = Scheduler(
            store=store,
            flow=flow,
            decider=decider,
            hypervisor=engine,
            host=_host(settings, self._memory_mib),
            limits=limits,
            metrics=self._metrics,
            keep_seconds=settings.service.keep_days * 86400,
            prune_logs=self._logs.prune,
            moved=self._planner.wake if self._planner is not None else lambda: None,
            failed=self._reruns.wake,
        )
        self._registrations = Registrations(
            store=store,
            forges=self._forges,
            host=settings.service.name,
            lose=self.scheduler.lose,
            observe=self._observe,
        )
        # What was held back goes on at once when its calls get through again.
        circuits.changed = self.scheduler.wake

        self.reload = Reload(
            settings,
            load,
            [_configure_logging, lambda new: self._reconfigure(new, flow, decider), self._reconfigure_bakes],
        )

    def _reconfigure(self, settings: Settings, flow: Flow, decider: Decider) -> None:
        limits = Limits.of(settings.runners)
        flow.reconfigure(limits=limits, egress=_egress(settings))
        decider.reconfigure(_rules(settings), _scope_of(settings))
        if self._routes is not None and settings.github is not None:
            self._routes.reassign(
                {
                    app.name: (app.repositories, app.register_at == "organization")
                    for app in settings.github.credentials
                }
            )
            if self._poller is not None:
                self._poller.reconfigure(
                    listings=self._listings(settings.github),
                    allowed=served(settings.github),
                    named=named(settings.github),
                )
        self._freezer.reconfigure(settings.frozen)
        self._reruns.reconfigure(settings.runners.rerun_on_infra_failure)
        self.scheduler.reconfigure(
            host=_host(settings, self._memory_mib),
            limits=limits,
            keep_seconds=settings.service.keep_days * 86400,
        )

    def _reconfigure_bakes(self, settings: Settings) -> None:
        if self._bakes is not None and self._planner is not None:
            self._bakes.reconfigure(settings.bakes)
            self._planner.reconfigure(settings.bakes, settings.runners.default_template)

    async def reload_at(self, hangup: asyncio.Event) -> None:
        """Read the settings again whenever ``hangup`` is set; what is wrong with them is in the log."""
        while True:
            await hangup.wait()
            hangup.clear()
            with contextlib.suppress(SettingsError):
                self.reload()

    def _make_poller(
        self, github: GitHubSettings, client: GitHub, forge: Forge, credentials: Routes
    ) -> Poller:
        def listings(wanted: GitHubSettings) -> GitHubListings:
            return GitHubListings(client, reached(wanted, credentials, self._http))

        self._listings = listings
        return Poller(
            store=self._store,
            name=github_forge.FORGE,
            forge=forge,
            listings=self._listings(github),
            allowed=served(github),
            observe=self._observe,
            metrics=self._metrics,
            every=github.poll_every,
            named=named(github),
        )

    def _make_bakes(self, github: GitHubSettings, origin: OriginOf) -> Bakes:
        settings = self._settings
        config = ["--config", str(settings.source.absolute())] if settings.source is not None else []
        secret = (*secret_variables(github), settings.service.database_url_env)
        return Bakes(
            store=self._store,
            host=settings.service.name,
            settings=settings.bakes,
            command=[sys.executable, "-m", "runner_service.cli", "bake", *config],
            environ={name: value for name, value in os.environ.items() if name not in secret},
            data_dir=settings.data_dir,
            origin=origin,
            server=github.server_url,
            prewarm=self._engine.prewarm,
            catalog=self._catalog,
            metrics=self._metrics,
            keep_seconds=settings.service.keep_days * 86400,
            held=lambda: self.scheduler.draining,
        )

    @contextlib.asynccontextmanager
    async def running(
        self, listening: socket.socket, webhooks: socket.socket | None, stopping: Stopping
    ) -> AsyncGenerator[None]:
        """Serve: deliveries are taken (and kept) at once, runners are adopted and driven right after."""
        await self._token_for_commands()
        servers = self._servers(listening, webhooks)
        answering = [
            asyncio.create_task(server.serve(sockets=[address]), name="api") for server, address in servers
        ]
        working: list[asyncio.Task[None]] = []
        try:
            announce(self._settings.data_dir, listening, webhooks)
            await self._freezer.start()  # what is overdue goes before anything else
            await self._prepare()
            await self.scheduler.start()
            self._recovered = True
            working.append(asyncio.create_task(self.scheduler.run(), name="scheduler"))
            working.append(asyncio.create_task(self._registrations.run(), name="registrations"))
            if self._probes is not None:
                working.append(asyncio.create_task(self._probes.run(), name="probes"))
            working.append(asyncio.create_task(self._reruns.run(), name="reruns"))
            working.append(asyncio.create_task(self._freezer.run(), name="frozen"))
            if self._poller is not None:
                working.append(asyncio.create_task(self._poller.run(), name="poller"))
            if self._redeliveries is not None:
                working.append(asyncio.create_task(self._redeliveries.run(), name="redeliveries"))
            if self._bakes is not None and self._planner is not None:
                await self._bakes.start()
                working.append(asyncio.create_task(self._bakes.run(), name="bakes"))
                working.append(asyncio.create_task(self._planner.run(), name="planner"))
            for task in (*answering, *working):
                # None ends by itself: if one does, the process must not pretend to serve.
                task.add_done_callback(lambda _: stopping.broken())
            # What is here now stays: the collector need not look at it again and again.
            gc.collect()
            gc.freeze()
            log.info(
                "serving",
                address=address_of(listening),
                webhooks=address_of(webhooks or listening),
                access="local" if self._trusts_local else "token",
                forges=list(self._forges),
                vms=self.scheduler.vms,
            )
            yield
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            await self.scheduler.stop()
            self._logs.end()
            for server, _ in servers:
                server.should_exit = True
            await asyncio.gather(*answering, return_exceptions=True)
            (self._settings.data_dir / SERVICE_FILE).unlink(missing_ok=True)

    @property
    def _trusts_local(self) -> bool:
        service = self._settings.service
        return service.access == "local" and reached_from_here_only(self._settings.listen[0])

    async def _token_for_commands(self) -> None:
        """Where tokens are demanded, the command line of this host has one that only the service's user can read."""
        keep = tokens.drop_local if self._trusts_local else tokens.keep_local
        await keep(self._store, self._settings.data_dir, self._settings.service.name)

    def _servers(
        self, listening: socket.socket, webhooks: socket.socket | None
    ) -> list[tuple[serving.Server, socket.socket]]:
        """The API with the webhooks in it, or each at its own address."""
        routers = self._receivers()
        api = self._api().app(routers if webhooks is None else ())
        servers = [(serving.Server(serving.config(api)), listening)]
        if webhooks is not None:
            servers.append((serving.Server(serving.config(webhooks_alone(routers))), webhooks))
        return servers

    def _api(self) -> Api:
        gate = Gate(
            self._store,
            local_is_trusted=self._trusts_local,
            open_metrics=self._settings.service.open_metrics,
            refused=self._metrics.refused,
            failures=Failures(),
        )
        return Api(
            store=self._store,
            logs=self._logs,
            bake_logs=self._bakes.logs
            if self._bakes is not None
            else bake_logs(self._settings.data_dir, self._settings.bakes),
            metrics=self._metrics,
            readiness=self._readiness,
            vms=self._vms,
            kill=self.scheduler.kill,
            measure=self._measure,
            remove_frozen=self._freezer.remove,
            gate=gate,
            orders=Orders(self._settings.service.name, self.scheduler.wake, self.reload),
        )

    def _receivers(self) -> list[Router]:
        github = self._settings.github
        if github is None or github.ingress == "poll":
            return []
        inbox = StoreInbox(self._store, github_forge.FORGE, self.scheduler.wake)
        return [receiver(inbox, WebhookSecrets(github), counters=telemetry.DeliveryCounters(self._metrics))]

    async def _prepare(self) -> None:
        """Do beforehand what the first job would otherwise wait for."""
        await self._store.warm_up()
        try:
            async with asyncio.timeout(_PREWARM_SECONDS):
                await self._engine.prewarm(self._settings.runners.default_template)
        except UnknownTemplate as error:
            log.warning("default_template_missing", error=str(error))
        except (VmmError, TimeoutError) as error:
            log.warning("prewarm_failed", error=str(error))
        if self._settings.github is not None:
            # Opens the connection (and its TLS session) that the first registration will use.
            with contextlib.suppress(httpx.HTTPError, TimeoutError):
                async with asyncio.timeout(_GREETING_SECONDS):
                    await self._http.get(f"{api_base_url(self._settings.github.base_url)}/", timeout=5.0)

    def _forge_rules(self) -> dict[str, EgressRule]:
        github = self._settings.github
        rule = forge_rule(api_base_url(github.base_url)) if github is not None else None
        return {github_forge.FORGE: rule} if rule is not None else {}

    async def _job(self, job_id: str) -> Job | None:
        return await self._jobs.do(job_id)

    def _observe(self, event: JobEvent) -> None:
        self.scheduler.observe(event)

    async def _readiness(self) -> Readiness:
        checks = [
            Check("adopted", self._recovered, "running VMs were adopted" if self._recovered else "starting")
        ]
        try:
            await self._store.read(q.runner_counts)
            checks.append(Check("database", True, "answers"))
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            checks.append(Check("database", False, f"{type(error).__name__}: {error}"[:300]))
        draining = self.scheduler.draining
        checks.append(
            Check("draining", not draining, "takes no new work" if draining else "this host takes new work")
        )
        free = shutil.disk_usage(self._engine.staging).free
        checks.append(Check("pool", free >= _ROOM_BYTES, f"{free >> 20} MiB free in the disk pool"))
        default = self.reload.settings.runners.default_template
        baked = any(template.name == default for template in self._catalog.templates())
        detail = f"the default template '{default}' is {'baked' if baked else 'not baked: microvm bake ' + default}"
        checks.append(Check("template", baked, detail))
        # Never unready because of the forge: deliveries are taken all the same.
        checks.append(Check("forge", True, told(self._circuits.all())))
        return Readiness(all(check.ok for check in checks), tuple(checks))

    async def _vms(self) -> list[views.VmView]:
        """Every VM of the host, whoever made it; what those of this process cost."""
        runners: dict[str, Runner] = {
            runner.id: runner for runner in await self._store.read(q.active_runners)
        }
        own = {vm.id: vm for vm in self._engine.vms()}
        found: list[views.VmView] = []
        for record in self._engine.records():
            usage = None
            if record.id in own:
                with contextlib.suppress(VmmError, OSError):
                    usage = await own[record.id].usage()
            else:
                usage = await asyncio.to_thread(views.read_usage, record, self._engine.pool.vms)
            found.append(views.vm_view(record, runners.get(record.metadata.get("runner_id", "")), usage))
        return found

    def _measure(self) -> None:
        """The running VMs by their last readings, which the engine takes anyway: a scrape costs nothing."""
        self._metrics.live(
            ((vm.record.template, vm.last_usage) for vm in self._engine.vms()),
            {template.name: template.need_mib << 20 for template in self._catalog.templates()},
        )


def database_url(settings: Settings) -> str:
    """Where the database is: SQLite in the data directory unless configured otherwise."""
    service = settings.service
    from_env = read_secret(file="", variable=service.database_url_env, what="service.database_url_env")
    return from_env or service.database_url or sqlite_url(settings.data_dir / "runner_service.db")


def _mirrors(settings: Settings, origin: OriginOf) -> Mirrors:
    bakes = settings.bakes
    return Mirrors(
        settings.data_dir / "cache" / "mirrors",
        origin=origin,
        permitted=permitted_by(bakes),
        keep=bakes.mirrors,
        most_mib=bakes.mirror_mib,
        timeout=bakes.look_limit_s,
    )


def _host(settings: Settings, measured_mib: int) -> Host:
    """This host with what may be promised of it; ``measured_mib`` is what it had to spare when the service started."""
    runners, limits = settings.runners, settings.limits
    memory = runners.memory_mib or measured_mib
    cpus = max(1, int((os.cpu_count() or 1) * limits.cpu_overcommit)) if limits.cpu_overcommit else 0
    return Host(settings.service.name, runners.max_vms, int(memory * limits.memory_overcommit), cpus=cpus)


def _http() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=400, max_keepalive_connections=20, keepalive_expiry=600.0)
    return httpx.AsyncClient(limits=limits, timeout=10.0, headers={"user-agent": "microvm-runner"})


def _configure_logging(settings: Settings) -> None:
    telemetry.configure_logging(settings.service.log_format, settings.service.log_level)


def _rules(settings: Settings) -> Rules:
    runners = settings.runners
    return Rules(
        service=settings.service.name,
        default_template=runners.default_template,
        extra_labels=runners.extra_labels,
        name_prefix=runners.name_prefix,
        fork_limit=runners.fork_limit_s,
        limits=settings.limits,
    )


def _scope_of(settings: Settings) -> ScopeOf:
    return github_forge.scope_chooser(settings.github or GitHubSettings())


def _egress(settings: Settings) -> tuple[EgressRule, ...]:
    return tuple(EgressRule(rule.host, rule.port, rule.via or None) for rule in settings.runners.egress)
