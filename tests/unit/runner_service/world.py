"""A whole control plane over stand-ins: a host and a forge that survive, a service that can be killed and started."""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec

from images.mirror import Credential
from runner_service.bake_plan import Planner
from runner_service.bakes import Bakes, bake_logs
from runner_service.choice import Chooser
from runner_service.decide import Decider, Rules
from runner_service.domain import Held, Host, Job, JobEvent, Parent, Push, Repository, Runner, Scope, Template
from runner_service.facts import Limits
from runner_service.flow import Flow
from runner_service.frozen import Freezer
from runner_service.inbox import StoreInbox
from runner_service.joblog import JobLogs
from runner_service.limits import Limits as LimitSettings
from runner_service.polling import Poller
from runner_service.repositories import Origin
from runner_service.reruns import Reruns
from runner_service.scheduler import Scheduler
from runner_service.settings import Bakes as BakeSettings
from runner_service.settings import Frozen as FrozenSettings
from runner_service.settings import Runners
from runner_service.store import queries as q
from runner_service.store.store import Store, sqlite_url
from runner_service.telemetry import Metrics
from runner_service.views import Story, story
from tests.standins.engine import FakeEngine, FakeHost
from tests.standins.forge import FakeForge
from tests.standins.repositories import FakeRepositories, bake_command, key_on

TEMPLATE = Template(
    "github-runner", "d" * 64, ("microvm-1cpu-512mb",), 512, "/opt/actions-runner", runner="2.330.0"
)
SECRET = "ghs_the-secret-of-the-bake"
BAKES = BakeSettings(
    repositories=(), limit_s=5, attempts=2, retry_s=0.1, poll_s=0.3, look_limit_s=5, choice_limit_s=1, nice=0
)
RUNNERS = Runners(
    max_vms=4,
    fork_limit_s=5,
    online_limit_s=5,
    idle_limit_s=5,
    job_limit_s=20,
    exit_grace_s=1,
    retire_limit_s=5,
)


class Killed(BaseException):
    """The service process got SIGKILL."""


class Delivery(msgspec.Struct):
    """What the receiver hands to the inbox."""

    id: str
    payload: bytes
    received_at: float
    event: str = "workflow_job"
    action: str | None = None
    hook_id: str | None = None


class World:
    """``kill_at``: the number of the effect at which the service is killed; None lets it live."""

    def __init__(
        self,
        directory: Path,
        *,
        runners: Runners = RUNNERS,
        templates: tuple[Template, ...] = (TEMPLATE,),
        bakes: BakeSettings | None = None,
        frozen: FrozenSettings | None = None,
        limits: LimitSettings | None = None,
        cpus: int = 0,
    ) -> None:
        """``bakes``: with a planner and a worker of bakes, over fake repositories; without, it bakes nothing."""
        self.directory = directory
        self.runners = runners
        self.bakes = bakes
        self.frozen = frozen or FrozenSettings()
        self.limits = limits or LimitSettings()
        self.cpus = cpus
        self.repositories = FakeRepositories()
        self.host = FakeHost(templates)
        self.forge = FakeForge(self._deliver)
        self.host.programs["Runner.Listener"] = self.forge.program
        self.outbox: list[JobEvent | Push] = []
        self.deliver_now = True
        self.tick = 0.1
        self.memory_mib = 16384
        # Every how many seconds repositories are looked at (0: never), and those known without an event.
        self.poll_s = 0.0
        self.named: tuple[tuple[str, str], ...] = ()
        self.mangle: Callable[[JobEvent], list[JobEvent]] = lambda event: [event]
        self.held: Callable[[Scope], Held | None] = lambda _scope: None
        self.kill_at: int | None = None
        self.effects: list[str] = []
        self.dead = asyncio.Event()
        self.service: Service | None = None
        self._guids = itertools.count(1)
        self._delivering: set[asyncio.Task[None]] = set()

    # ── the way in ───────────────────────────────────────────────────────────────────────────────

    def _deliver(self, event: JobEvent) -> None:
        for one in self.mangle(event):
            self.outbox.append(one)
        if self.deliver_now:
            task = asyncio.get_running_loop().create_task(self.flush())
            self._delivering.add(task)
            task.add_done_callback(self._delivering.discard)

    async def push(self, repo: str, branch: str, commit: str, key: str) -> None:
        """Somebody pushed: the forge has the commit, and tells of it."""
        self.repositories.push(repo, branch, commit, key)
        self.write_keys()
        owner, _, name = repo.partition("/")
        self.outbox.append(
            Push(
                forge="github", owner=owner, repo=name, branch=branch, commit=commit,
                default_branch=self.repositories.repos[repo.lower()].default_branch, seen_at=time.time(),
            )
        )  # fmt: skip
        if self.deliver_now:
            await self.flush()

    def write_keys(self) -> None:
        """Let the bakes know the key of each commit, which the real ones compute."""
        keys = {
            one: key_on(self.host.templates[0].digest, words)
            for found in self.repositories.repos.values()
            for one, words in found.commits.items()
        }
        (self.directory / "keys.json").write_bytes(msgspec.json.encode(keys))
        (self.directory / "base").write_text(self.host.templates[0].digest)

    def repository(self, name: str, default_branch: str) -> Repository:
        """The row of a repository that was heard of."""
        owner, _, repo = name.partition("/")
        return Repository(
            forge="github",
            name=name,
            owner=owner,
            repo=repo,
            seen_at=time.time(),
            default_branch=default_branch,
        )

    async def flush(self) -> None:
        """Give what is in the outbox to a living service; what was not accepted is sent again later."""
        while self.outbox and self.service is not None and not self.dead.is_set():
            event = self.outbox.pop(0)
            delivery = Delivery(
                f"guid-{next(self._guids)}",
                msgspec.json.encode(event),
                time.time(),
                event="push" if isinstance(event, Push) else "workflow_job",
            )
            try:
                await self.service.inbox.store(delivery)
            except BaseException:
                self.outbox.insert(0, event)
                return

    # ── the service ──────────────────────────────────────────────────────────────────────────────

    def gate(self, generation: "asyncio.Event") -> Callable[[str], None]:
        def effect(what: str) -> None:
            if generation.is_set():
                raise Killed
            self.effects.append(what)
            if self.kill_at is not None and len(self.effects) >= self.kill_at:
                generation.set()
                raise Killed

        return effect

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator["Service"]:
        """A service until the block ends or it is killed; then nothing of it does anything any more."""
        self.dead = asyncio.Event()
        async with Store.open(sqlite_url(self.directory / "service.db")) as store:
            service = self.service = Service(self, store, self.gate(self.dead))
            try:
                with contextlib.suppress(Killed):
                    await service.start()
                await self.flush()
                yield service
            finally:
                self.dead.set()
                self.service = None
                await asyncio.gather(*self._delivering, return_exceptions=True)
                await service.end()
                await service.store.settle()

    async def until_quiet(self, seconds: float = 10.0) -> None:
        """Wait until every job is over and nothing is left; or fail, saying what is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.dead.is_set():
                return
            left = await self.left()
            if not left:
                return
            if self.deliver_now and not self._delivering:
                await self.flush()
            await asyncio.sleep(0.01)
        raise AssertionError(f"still there after {seconds} s: {await self.left()}")

    async def left(self) -> list[str]:
        found = [f"job {job.id} {job.state}" for job in self.forge.jobs.values() if job.state != "completed"]
        found += [f"vm {vm}" for vm in self.host.machines]
        found += [f"registration {runner.name}" for runner in self.forge.runners.values()]
        found += [f"event {event.forge_job_id} {event.state}" for event in self.outbox]
        service = self.service
        if service is not None:
            async with service.store.reading() as db:
                found += [f"runner {r.id} {r.state} {r.reason}" for r in await q.active_runners(db)]
                found += [
                    f"row {j.id} {j.state}"
                    for j in await q.list_jobs(db, limit=1000)
                    if j.state != "completed"
                ]
        return found


class Service:
    """The parts of a daemon, over the stand-ins."""

    def __init__(self, world: World, store: Store, gate: Callable[[str], None]) -> None:
        self.store = GatedStore(store, gate)
        self._jobs = self.store.grouped_reads(q.each_job)
        self.engine = FakeEngine(world.host, gate)
        self.logs = JobLogs(world.directory / "logs", limit=world.runners.log_limit_mib << 20)
        self.metrics = Metrics()
        limits = Limits.of(world.runners)
        catalog = Catalog(world.host, world.directory)
        forges = {"github": world.forge.client(gate)}
        self.bakes: Bakes | None = None
        self.planner: Planner | None = None
        if world.bakes is not None:
            self.bakes = Bakes(
                store=self.store,
                host="host-1",
                settings=world.bakes,
                command=bake_command(world.directory),
                environ=dict(os.environ),
                data_dir=world.directory,
                origin=_origin,
                server="",
                prewarm=self.engine.prewarm,
                catalog=catalog,
                metrics=self.metrics,
                keep_seconds=86400,
            )
            self.planner = Planner(
                store=self.store,
                host="host-1",
                catalog=catalog,
                repositories=world.repositories,
                settings=world.bakes,
                default_template=world.runners.default_template,
                queued=self.bakes.wake,
                tick=0.05,
            )
        self.bake_logs = self.bakes.logs if self.bakes is not None else bake_logs(world.directory, BAKES)
        self.chooser = Chooser(
            store=self.store,
            host="host-1",
            catalog=catalog,
            repositories=world.repositories if world.bakes is not None else None,
            limit=(world.bakes or BAKES).choice_limit_s,
        )
        self.freezer = Freezer(
            store=self.store,
            machines=self.engine,
            settings=world.frozen,
            host="host-1",
            size=self.engine.frozen_size,
            metrics=self.metrics,
            tick=0.1,
        )
        flow = self.flow = Flow(
            hypervisor=self.engine,
            forges=forges,
            catalog=catalog,
            logs=self.logs,
            limits=limits,
            service="host-1",
            job=self._job,
            observe=self._observe,
            choose=self.chooser.choose,
            confirm=self.chooser.confirm,
            chosen=lambda code: self.metrics.parents.labels(code).inc(),
            freezer=self.freezer,
        )
        rules = Rules(
            service="host-1",
            default_template=world.runners.default_template,
            extra_labels=world.runners.extra_labels,
            name_prefix="microvm",
            fork_limit=world.runners.fork_limit_s,
            limits=world.limits,
        )
        decider = Decider(
            rules,
            interpret=lambda row: msgspec.json.decode(
                row.payload, type=Push if row.event == "push" else JobEvent
            ),
            scope_of=lambda event: Scope("repository", f"{event.owner}/{event.repo}"),
            templates=catalog.templates,
            parents=catalog.parents,
            held=lambda scope: world.held(scope),  # noqa: PLW0108 - tests change it
        )
        self.reruns = Reruns(
            store=self.store,
            forges=forges,
            patterns=world.runners.rerun_on_infra_failure,
            metrics=self.metrics,
            tick=0.1,
            pauses=(0.05, 0.1),
        )
        self.scheduler = Scheduler(
            store=self.store,
            flow=flow,
            decider=decider,
            hypervisor=self.engine,
            host=Host("host-1", world.runners.max_vms, world.memory_mib, cpus=world.cpus),
            limits=limits,
            metrics=self.metrics,
            keep_seconds=86400,
            prune_logs=self.logs.prune,
            moved=self.planner.wake if self.planner is not None else lambda: None,
            failed=self.reruns.wake,
            tick=world.tick,
        )
        client = forges["github"]
        self.poller = Poller(
            store=self.store,
            name="github",
            forge=client,
            listings=client,
            allowed=lambda _owner, _repo: True,
            observe=self._observe,
            metrics=self.metrics,
            every=world.poll_s,
            named=world.named,
            tick=0.1,
        )
        self.inbox = StoreInbox(self.store, "github", self.scheduler.wake)
        self._tasks: list[asyncio.Task[None]] = []

    async def _job(self, job_id: str) -> Job | None:
        return await self._jobs.do(job_id)

    def _observe(self, event: JobEvent) -> None:
        self.scheduler.observe(event)

    async def start(self) -> None:
        await self.freezer.start()
        await self.scheduler.start()
        self._tasks.append(asyncio.create_task(self.freezer.run()))
        self._tasks.append(asyncio.create_task(self.scheduler.run()))
        self._tasks.append(asyncio.create_task(self.reruns.run()))
        self._tasks.append(asyncio.create_task(self.poller.run()))
        if self.bakes is not None and self.planner is not None:
            await self.bakes.start()
            self._tasks += [asyncio.create_task(self.bakes.run()), asyncio.create_task(self.planner.run())]

    async def end(self) -> None:
        """After ``dead`` is set this is SIGKILL: every task ends, no effect gets through the gate."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
        with contextlib.suppress(BaseException):
            await self.scheduler.stop()
        self.logs.end()
        # The tasks died with Killed, as they should: nobody needs to be told.
        for task in asyncio.all_tasks():
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def story(self, job: str) -> Story:
        """The story of a job, as soon as it is known."""
        async with asyncio.timeout(5):
            while True:
                found = await self.store.read(lambda db: story(db, job))
                if found is not None:
                    return found
                await asyncio.sleep(0.01)

    async def runners(self) -> list[Runner]:
        async with self.store.reading() as db:
            return await q.active_runners(db)


async def until(holds: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until something outside of any task's hands is true."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


class Catalog:
    def __init__(self, host: FakeHost, directory: Path) -> None:
        self._host = host
        self._directory = directory
        self._read: set[str] = set()

    def templates(self) -> list[Template]:
        return list(self._host.templates)

    def parents(self) -> list[Parent]:
        """What the fake bakes left behind is read as the real ones are: from files."""
        for file in sorted(
            (self._directory / "baked").glob("*.json"), key=lambda file: file.stat().st_mtime_ns
        ):
            if file.name not in self._read:
                self._read.add(file.name)
                made = msgspec.json.decode(file.read_bytes(), type=Made)
                self._host.replaced += [p for p in self._host.parents if p.name == made.name]
                self._host.parents = [p for p in self._host.parents if p.name != made.name]
                self._host.parents.append(
                    parent(
                        made.name,
                        made.key,
                        commit=made.commit,
                        digest=made.digest,
                        base=msgspec.structs.replace(self._host.templates[0], digest=made.base),
                    )
                )
                self._host.snapshots.add(made.digest)
        return list(self._host.parents)

    def has(self, digest: str) -> bool:
        return digest in self._host.snapshots

    def withdrawn(self, name: str) -> frozenset[str]:
        return self._host.withdrawn.get(name, frozenset())

    def touch(self, digest: str) -> None:
        self._host.touched.append(digest)

    async def prune(self, *, budget_bytes: int | None, keep: int) -> None:
        self._host.pruned.append((budget_bytes, keep))


class Made(msgspec.Struct):
    """What a fake bake left behind."""

    name: str
    digest: str
    key: str
    commit: str
    base: str


def parent(name: str, key: str, *, commit: str = "", digest: str = "", base: Template = TEMPLATE) -> Parent:
    """A parent as the catalog shows it, of today's ``base``."""
    repository, _, branch = name.partition("@")
    machine = msgspec.structs.replace(base, name=name, digest=digest or f"digest of {name} {key}")
    return Parent(
        machine=machine, repository=repository, owner=repository.partition("/")[0], branch=branch, commit=commit,
        key=key, base=base.name, base_digest=base.digest, created_at=time.time(),
    )  # fmt: skip


async def _origin(repository: Repository) -> Origin:
    return Origin(
        f"http://forge/{repository.name}.git", Credential(username="x-access-token", password=SECRET)
    )


class GatedStore(Store):
    """A store whose commits are effects: killed before one, it is rolled back; after one, it is there."""

    def __init__(self, store: Store, gate: Callable[[str], None]) -> None:
        super().__init__(store.url, store._writer, store._reader)
        self._gate = gate

    @contextlib.asynccontextmanager
    async def writing(self):
        async with super().writing() as db:
            yield db
            self._gate("before commit")
        self._gate("commit")
