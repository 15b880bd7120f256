"""A world for the soak: the whole service as a process, the stand-in GitHub, a fake host, and all that goes wrong.

What is random is drawn from one seed. The processes run in real time, so a seed replays what is done to the service,
and about when; not the order in which two processes get their turn.
"""

import asyncio
import contextlib
import json
import random
import secrets
import socket
import textwrap
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import httpx
import msgspec

from runner_service.domain import Runner as RunnerRow
from runner_service.domain import TimelineRow
from runner_service.store import queries as q
from runner_service.store.store import Store, sqlite_url
from tests.integration.verdict import Books, heard_of, untrue, waited_for_nothing
from tests.integration.waiting import Span, seconds
from tests.standins.distant import HostServer
from tests.standins.engine import FakeHost, FakeMachine, Write
from tests.standins.github import StandinGitHub
from tests.standins.github_faults import Fault, Faults
from tests.standins.github_http import Request
from tests.standins.github_model import Job, Repository, Run, Runner, Times
from tests.standins.github_state import Refused
from tests.standins.github_webhooks import Unruly
from tests.standins.service import TEMPLATES, ServiceProcess
from vmm_core.errors import BootFailed
from vmm_core.machine import VmExit

OWNERS = ("octo-org", "acme", "initech", "mona")
LABELS = (("microvm",), ("self-hosted", "microvm"), ("microvm-1cpu-512mb",))
# Short where GitHub is slow. ``pick_up``: a runner that died is given a job, and loses it again.
TIMES = Times(pick_up=3.0, lost_runner=3.0, session=2.0, cancel=5.0)


POLL_SECONDS = 2.0
# A few passes of the service, and a runner that died with a job it was given: until the forge takes that back. On a
# machine that takes seconds to start the service, passes take long as well.
UNEXPLAINED_SECONDS = 6.0
UNEXPLAINED_STARTS = 4.0


Happens = Callable[[random.Random], None]


class Scale(msgspec.Struct, frozen=True):
    """How much happens. ``at_once``: jobs that are not over, before more are queued."""

    jobs: int = 1000
    at_once: int = 100
    repositories: int = 20
    kills: int = 20
    max_vms: int = 32
    deaths: int = 60
    cancels: int = 60
    thieves: int = 30
    revocations: int = 3
    failed_forks: int = 20

    @classmethod
    def of(cls, jobs: int) -> "Scale":
        """The same for another number of jobs."""
        share = jobs / 1000
        whole = cls()
        names = ("kills", "deaths", "cancels", "thieves", "revocations", "failed_forks")
        return cls(jobs=jobs, **{name: max(1, round(getattr(whole, name) * share)) for name in names})


class Weather(Faults):
    """Each call of the service meets trouble with a chance of ``share``."""

    def __init__(self, chance: random.Random, share: float) -> None:
        super().__init__()
        self._chance = chance
        self.share = share
        self.seen: Counter[str] = Counter()

    def _take(self, request: Request) -> Fault | None:
        ours = "/actions/" in request.path or request.path.endswith("/access_tokens")
        if not ours or self._chance.random() >= self.share:
            return super()._take(request)
        writes = request.method in ("POST", "DELETE")
        name, fault = self._chance.choice(_TROUBLES if writes else _TROUBLES[:-1])
        self.seen[name] += 1
        return Fault("", **fault)


# The last: it happens, and its answer is lost.
_TROUBLES = (
    ("error", {"status": 500}),
    ("unavailable", {"status": 503, "delay": 0.2}),
    ("slow", {"delay": 0.5}),
    ("dropped", {"drop": "before"}),
    (
        "secondary limit",
        {
            "status": 403,
            "headers": {"retry-after": "1"},
            "body": '{"message": "You have exceeded a secondary rate limit."}',
        },
    ),
    ("unauthorized", {"status": 401, "body": '{"message": "Bad credentials"}'}),
    ("answer lost", {"drop": "after"}),
)


class Soak:
    """``async with Soak.open(directory, seed) as soak``: then ``play`` and look at what is left and what was told."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        scale: Scale,
        forge: StandinGitHub,
        service: ServiceProcess,
        url: str,
    ) -> None:
        self.directory = directory
        self.seed = seed
        self.scale = scale
        self.forge = forge
        self.service = service
        self.url = url
        self.host = FakeHost(TEMPLATES)
        self.host.programs["Runner.Listener"] = self._listener
        self.http = httpx.AsyncClient(base_url=url, timeout=5.0, trust_env=False)
        self.chance = random.Random(seed)
        self.repositories: list[Repository] = []
        self.runs_of: Counter[int] = Counter()
        self.seconds_of: dict[int, float] = {}
        self.killed: dict[str, str] = {}
        self.foreign: set[str] = set()
        self.broken_off: list[str] = []
        self.cancelled: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.most_vms = 0
        self.down: list[tuple[float, float]] = []
        self.starts: list[float] = []
        self.longest: list[tuple[float, str]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, directory: Path, seed: int, scale: Scale = Scale()) -> AsyncGenerator["Soak"]:  # noqa: B008
        chance = random.Random(f"weather {seed}")
        port = _free_port()
        url = f"http://127.0.0.1:{port}"
        async with contextlib.AsyncExitStack() as stack:
            secret = secrets.token_urlsafe(24)
            forge = StandinGitHub(webhook_url=f"{url}/webhooks/github", secret=secret, times=TIMES)
            forge.faults = Weather(chance, 0.1)
            forge.webhooks.mishaps.unruly = Unruly(chance)
            await stack.enter_async_context(forge)
            app = forge.add_app(OWNERS[0])
            for owner in OWNERS[1:]:
                forge.rest.apps[app.client_id].installations[forge.actions.new_id()] = owner
            config = _write_config(directory, port, forge, secret, app.client_id, app.private_key_pem, scale)
            service = await stack.enter_async_context(ServiceProcess.open(config, directory / "service.log"))
            soak = cls(directory, seed, scale, forge, service, url)
            await stack.enter_async_context(HostServer(soak.host, directory))
            stack.push_async_callback(soak.host.close)
            stack.push_async_callback(soak.http.aclose)
            for number in range(scale.repositories):
                soak._add_repository(OWNERS[number % len(OWNERS)], f"repo-{number}")
            yield soak

    def _add_repository(self, owner: str, name: str) -> None:
        repository = Repository(
            self.forge.actions.new_id(), owner, name, self.directory / "nothing", True, "main"
        )
        self.forge.actions.repositories[repository.full_name.lower()] = repository
        self.repositories.append(repository)

    # ── what happens ─────────────────────────────────────────────────────────────────────────────

    async def play(self) -> None:
        """Everything at once; back when the last job was queued and the last kill is over, the service running.

        What happens, happens after a number of ended jobs: a slow machine takes longer, and sees the same.
        """
        await self.start()
        scale = self.scale
        mishaps = [
            *self._plan(scale.deaths, self._kill_vm),
            *self._plan(scale.cancels, self._cancel),
            *self._plan(scale.thieves, self._steal),
            *self._plan(scale.revocations, self._revoke),
            *self._plan(scale.failed_forks, self._fail_fork),
        ]
        watching = asyncio.create_task(self._watch())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._queue_jobs())
                tasks.create_task(self._kill_service())
                tasks.create_task(self._happen(sorted(mishaps, key=lambda one: one[0])))
        finally:
            watching.cancel()

    @property
    def ended(self) -> int:
        """Jobs that are over at the forge."""
        return sum(job.status == "completed" for job in self.forge.actions.jobs.values())

    def _plan(self, times: int, happens: Happens) -> list[tuple[int, Happens, random.Random]]:
        chance = random.Random(f"{happens.__name__} {self.seed}")
        return [(self._moment(chance), happens, chance) for _ in range(times)]

    def _moment(self, chance: random.Random) -> int:
        """A number of ended jobs that is reached for sure."""
        return chance.randrange(self.scale.jobs * 9 // 10)

    async def _happen(self, mishaps: list[tuple[int, Happens, random.Random]]) -> None:
        for moment, happens, chance in mishaps:
            while self.ended < moment:
                await asyncio.sleep(0.01)
            await asyncio.sleep(chance.random() * 0.02)
            happens(chance)

    async def start(self) -> None:
        began = time.time()
        await self.service.start()
        async with asyncio.timeout(30):
            while not await self._ready():
                await asyncio.sleep(0.03)
        self.starts.append(time.time() - began)
        if self.down:
            self.down[-1] = (self.down[-1][0], time.time())

    async def _ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await self.http.get("/readyz")).status_code == 200
        return False

    async def _queue_jobs(self) -> None:
        chance = random.Random(f"jobs {self.seed}")
        queued = 0
        while queued < self.scale.jobs:
            count = min(self.scale.jobs - queued, chance.choice((1, 1, 1, 2, 3, 8)))
            while queued - self.ended > self.scale.at_once:
                await asyncio.sleep(0.01)
            self._queue(chance, count)
            queued += count
            await asyncio.sleep(chance.random() * 0.05)

    def _queue(self, chance: random.Random, count: int) -> None:
        repository = chance.choice(self.repositories)
        labels = list(chance.choice(LABELS))
        sha = f"{chance.getrandbits(160):040x}"
        now = time.time()
        run = Run(
            id=self.forge.actions.new_id(), number=1, repository=repository, sha=sha, ref="refs/heads/main",
            branch="main", event="push", workflow_name="CI", workflow_path=".github/workflows/ci.yml",
            commit=_commit(sha), created_at=now,
        )  # fmt: skip
        definition = {"needs": [], "labels": labels, "env": {}, "steps": []}
        self.forge.actions.add_run(
            run, {f"job-{n}": {**definition, "name": f"job-{n}"} for n in range(count)}
        )
        for job in run.jobs:
            self.seconds_of[job.id] = chance.choice((0.0, 0.02, 0.1, 0.4))

    async def _kill_service(self) -> None:
        chance = random.Random(f"kills {self.seed}")
        for moment in sorted(self._moment(chance) for _ in range(self.scale.kills)):
            while self.ended < moment:
                await asyncio.sleep(0.003)
            await asyncio.sleep(chance.random() * 0.2)
            await self.service.kill()
            self.down.append((time.time(), 0.0))
            await asyncio.sleep(chance.random() * 0.3)
            if chance.random() < 0.2:  # the next one does not live to serve
                await self.service.start()
                await asyncio.sleep(chance.random())
                await self.service.kill()
            await self.start()

    def _kill_vm(self, chance: random.Random) -> None:
        by_stage: dict[str, list[FakeMachine]] = {}
        for one in self.host.machines.values():
            by_stage.setdefault(self._stage(one.record.metadata["runner_id"]), []).append(one)
        if not by_stage:
            return
        stage = chance.choice(sorted(by_stage))
        machine = chance.choice(by_stage[stage])
        runner = machine.record.metadata["runner_id"]
        self.stages[f"death while {stage}"] += 1
        self.killed[runner] = machine.record.id
        ending = VmExit(
            kind="signaled", signal=9, reason="the VMM was killed by signal 9", cause="vmm_killed"
        )
        self.host.endings[machine.record.id] = ending
        machine.end(ending)

    def _stage(self, name: str) -> str:
        runner = next((r for r in self.forge.actions.runners.values() if r.name == name), None)
        if runner is None:
            return "unregistered"
        if runner.job is not None:
            return "busy" if runner.job.status == "in_progress" else "assigned"
        return "idle" if runner.online else "starting"

    def _cancel(self, chance: random.Random) -> None:
        """A run with jobs in a stage that was chosen first: most of all runs are over or wait."""
        by_stage: dict[str, list[Run]] = {}
        for job in self.forge.actions.jobs.values():
            if job.status == "completed" or job.cancelled_at is not None:
                continue
            stage = "assigned" if job.status == "queued" and job.assigned_at else job.status
            by_stage.setdefault(stage, []).append(job.run)
        if not by_stage:
            return
        stage = chance.choice(sorted(by_stage))
        self.stages[f"cancelled while {stage}"] += 1
        with contextlib.suppress(Refused):
            self.forge.actions.cancel(chance.choice(by_stage[stage]))

    def _steal(self, chance: random.Random) -> None:
        """Somebody else's runner, with the same labels, takes a job that waits for one of ours."""
        waiting = [
            job for job in self.forge.actions.jobs.values() if job.status == "queued" and not job.assigned_at
        ]
        if not waiting:
            return
        job = chance.choice(waiting)
        repository = job.run.repository
        name = f"other-{len(self.foreign)}"
        self.foreign.add(name)
        runner = self.forge.actions.register(
            "repository", repository.owner, repository.name, name, list(job.labels), "_work"
        )
        task = asyncio.create_task(self._work(runner, lambda _line: None, patience=0.5))
        task.add_done_callback(lambda _: self.stages.update([f"foreign runner took {self.runs_by(name)}"]))

    def runs_by(self, name: str) -> int:
        return sum(job.runner_name == name for job in self.forge.actions.jobs.values())

    def _revoke(self, chance: random.Random) -> None:
        """Every token of the App is revoked."""
        del chance
        for value in [value for value, token in self.forge.rest.tokens.items() if token.owner is not None]:
            del self.forge.rest.tokens[value]

    def _fail_fork(self, chance: random.Random) -> None:
        del chance
        self.host.fork_errors.append(BootFailed("the VM never said hello"))

    async def _watch(self) -> None:
        while True:
            for _ in range(50):
                self.most_vms = max(self.most_vms, len(self.host.machines))
                await asyncio.sleep(0.01)

    # ── what runs in a VM ────────────────────────────────────────────────────────────────────────

    async def _listener(self, machine: FakeMachine, files: dict[str, bytes], write: Write) -> int:
        """``Runner.Listener run`` for the runner of these files."""
        runner = self.forge.actions.runners.get(json.loads(files[".runner"])["agentId"])
        await asyncio.sleep(0.02)
        if runner is None or runner.id not in self.forge.actions.runners:
            return 1
        try:
            return await self._work(runner, write)
        except asyncio.CancelledError:
            job = runner.job
            if (
                job is not None
                and job.status == "in_progress"
                and machine.record.id not in self.killed.values()
            ):
                self.broken_off.append(f"job {job.id} on {runner.name}")
            raise

    async def _work(self, runner: Runner, write: Write, *, patience: float | None = None) -> int:
        """Online, one job, exit code. ``patience``: seconds to wait for a job before giving up."""
        actions = self.forge.actions
        try:
            actions.open_session(runner, "2.330.0")
        except Refused:
            return 1
        runner.polling += 1
        try:
            write(b"Connected\nListening for Jobs\n")
            actions.dispatch()
            job = await self._given(runner, patience)
            if job is None:
                return 1
            self.runs_of[job.id] += 1
            write(b"hello from the job\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds_of.get(job.id, 0.0)):
                    while job.cancelled_at is None:
                        runner.wake.clear()
                        await runner.wake.wait()
            write(b"done\n")
            with contextlib.suppress(Refused):
                actions.complete(runner, job, "cancelled" if job.cancelled_at is not None else "success", [])
            return 0
        finally:
            runner.polling -= 1
            runner.seen_at = time.time()

    async def _given(self, runner: Runner, patience: float | None) -> Job | None:
        actions = self.forge.actions
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while True:
                    job = actions.message(runner)
                    if runner.session is None:
                        return None
                    if job is not None:
                        with contextlib.suppress(Refused):
                            actions.acquire(runner, job)
                            return job
                    runner.wake.clear()
                    await runner.wake.wait()
        with contextlib.suppress(Refused):
            actions.delete_runner(runner)
        return None

    # ── how it ends ──────────────────────────────────────────────────────────────────────────────

    def calm(self) -> None:
        """Nothing goes wrong any more; what was lost is still lost."""
        assert isinstance(self.forge.faults, Weather)
        self.forge.faults.share = 0.0
        self.forge.webhooks.mishaps.unruly = None
        self.host.fork_errors.clear()

    async def until_over(self, seconds: float) -> list[str]:
        """Wait until nothing is left, for as long; what is left then."""
        deadline = time.monotonic() + seconds
        while (left := await self.left()) and time.monotonic() < deadline:
            await asyncio.sleep(0.25)
        return left

    async def left(self) -> list[str]:
        actions = self.forge.actions
        found = [f"job {job.id} {job.status}" for job in actions.jobs.values() if job.status != "completed"]
        found += [f"vm {vm} of {m.record.metadata['runner_id']}" for vm, m in self.host.machines.items()]
        found += [f"registration {runner.name}" for runner in actions.runners.values()]
        books = await self.books()
        found += [
            f"runner {r.id} {r.state} {r.waits_for or r.reason}"
            for r in books.runners.values()
            if r.state != "gone"
        ]
        return found + [
            f"row {job.id} {job.state}" for job in books.jobs.values() if job.state != "completed"
        ]

    async def books(self) -> Books:
        url = sqlite_url(self.directory / "runner_service.db")
        async with Store.open(url, read_only=True) as store, store.reading() as db:
            jobs = {job.forge_job_id: job for job in await q.list_jobs(db, limit=10_000)}
            return Books(jobs, await _all_runners(db), await _all_lines(db))

    async def wrong(self) -> list[str]:
        """Everything that is not as it must be, one sentence each; to be asked when all is over."""
        books, now = await self.books(), time.time()
        jobs = list(self.forge.actions.jobs.values())
        heard = heard_of(self.forge.webhooks.sent)
        found = [f"a VM with a running job was destroyed: {what}" for what in self.broken_off]
        if self.most_vms > self.scale.max_vms:
            found.append(f"{self.most_vms} VMs at once, more than {self.scale.max_vms}")
        for job in jobs:
            runner = books.runners.get(job.runner_name or "")
            died, row = job.runner_name in self.killed, books.jobs.get(str(job.id))
            what = untrue(job, self.runs_of[job.id], row, runner, died=died, heard=job.id in heard)
            found += [f"job {job.id}: {what}"] if what is not None else []
        down = [Span(start, end, "the service is down") for start, end in self.down]
        gaps = waited_for_nothing(jobs, self.forge.webhooks.sent, books, down, now)
        self.longest = sorted(((seconds(gap), job) for job, gap in gaps.items()), reverse=True)[:10]
        return found + [
            f"job {job}: waited {seconds(gap):.1f} s for nothing: {[(round(a, 2), round(b, 2)) for a, b in gap]}"
            for job, gap in gaps.items()
            if seconds(gap) > UNEXPLAINED_SECONDS + UNEXPLAINED_STARTS * max(self.starts)
        ]

    def summary(self) -> str:
        """What happened, for who wants to know how much the run proved."""
        deliveries = Counter(
            "lost" if sent.lost else "received" if sent.received else "failed"
            for sent in self.forge.webhooks.sent
        )
        ends = Counter(str(job.conclusion) for job in self.forge.actions.jobs.values())
        assert isinstance(self.forge.faults, Weather)
        return "\n".join(
            (
                f"seed {self.seed}: {self.scale}",
                f"jobs {dict(ends)}; {self.host.launches} VMs, at most {self.most_vms} at once",
                f"deliveries {dict(deliveries)}; faults {dict(self.forge.faults.seen)}; {dict(self.stages)}",
                f"{len(self.starts)} starts, {max(self.starts):.1f} s the longest; unexplained {self.longest[:3]}",
            )
        )


async def _all_runners(db) -> dict[str, RunnerRow]:
    import sqlalchemy as sa

    ids = [row[0] for row in await db.execute(sa.text("SELECT id FROM runners"))]
    return await q.runners_by_id(db, ids)


async def _all_lines(db) -> list[TimelineRow]:
    import sqlalchemy as sa

    columns = ", ".join(TimelineRow.__struct_fields__)
    rows = await db.execute(sa.text(f"SELECT {columns} FROM timeline ORDER BY at, seq"))
    return [TimelineRow(**row._mapping) for row in rows]


def _commit(sha: str) -> dict[str, object]:
    person = {"name": "Mona", "email": "mona@example.com"}
    stamp = "2026-01-01T00:00:00Z"
    return {
        "id": sha,
        "tree_id": sha,
        "message": "A change",
        "timestamp": stamp,
        "author": person,
        "committer": person,
    }


def _write_config(
    directory: Path, port: int, forge: StandinGitHub, secret: str, app: str, key: str, scale: Scale
) -> Path:
    for name, value in (("webhook.secret", secret), ("app.pem", key)):
        path = directory / name
        path.touch(mode=0o600)
        path.write_text(value)
    config = directory / "microvm.toml"
    config.write_text(
        textwrap.dedent(
            f"""\
            [service]
            name = "host-1"
            listen = "127.0.0.1:{port}"
            data_dir = "{directory}"
            log_format = "json"

            [github]
            base_url = "{forge.url}"
            app_id = "{app}"
            private_key_file = "{directory}/app.pem"
            webhook_secret_files = ["{directory}/webhook.secret"]
            timeout_s = 3.0
            poll_s = {POLL_SECONDS}

            [runners]
            max_vms = {scale.max_vms}
            memory_mib = {scale.max_vms * 1024}
            fork_limit_s = 20.0
            online_limit_s = 20.0
            idle_limit_s = 10.0
            job_limit_s = 60.0
            exit_grace_s = 2.0
            retire_limit_s = 60.0

            [bakes]
            enabled = false
            """
        )
    )
    return config


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
