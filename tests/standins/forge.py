"""An in-memory forge with the part of the ``Forge`` protocol the control plane uses, and GitHub's habits.

Any online idle runner whose labels match takes any queued job of its scope; a registration serves one job and is
gone with it; a busy one is not let go; events may be repeated, lost, delayed or shuffled by whoever is given them.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from github_webhook.errors import Conflict, ForgeError, NotFound, Unavailable
from runner_service.domain import JobEvent, JobState, Listing, Registration, RemoteRunner, Scope
from runner_service.poll_plan import Allowance
from runner_service.ports import Listed
from tests.standins.engine import FakeMachine, Gate, Write


class ForgeJob(msgspec.Struct):
    """A job as the forge has it. ``runs`` counts how often its steps ran."""

    id: str
    owner: str
    repo: str
    labels: tuple[str, ...]
    state: JobState = "queued"
    conclusion: str | None = None
    runner: str | None = None
    runs: int = 0
    seconds: float = 0.01
    output: bytes = b"hello from the job\n"
    head_sha: str = ""
    head_branch: str = ""
    name: str = ""
    run: str = ""
    attempt: int = 1
    fails: bool = False


class ForgeRunner(msgspec.Struct):
    """A registration as the forge has it."""

    id: str
    name: str
    scope: Scope
    labels: frozenset[str]
    online: bool = False
    job: str | None = None


class FakeForge:
    """``gate`` hears of every call, before and after its effect, and may raise; ``faults`` are answers per call.

    ``in_reach`` are the repositories the credentials reach, ``unlisted`` jobs that listings leave out, ``delays`` are
    seconds per call.
    """

    def __init__(self, emit: Callable[[JobEvent], None], name: str = "github") -> None:
        self.name = name
        self.emit = emit
        self.jobs: dict[str, ForgeJob] = {}
        self.runners: dict[str, ForgeRunner] = {}
        self.faults: dict[str, list[ForgeError]] = {}
        self.lost_answers: set[str] = set()
        self.registrations = 0
        self.deleted: set[str] = set()
        self.delay = 0.0
        # False: a job whose VM died goes on in the books until ``lose``, as it does for minutes at GitHub.
        self.sees_lost_runners = True
        self.delays: dict[str, float] = {}
        self.in_reach: list[tuple[str, str]] = []
        self.unlisted: set[str] = set()
        self.allowances: dict[str, Allowance] = {}
        self.looks: list[str] = []
        self.asked: list[str] = []
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()

    # ── what people do ───────────────────────────────────────────────────────────────────────────

    def queue(self, labels: Sequence[str] = ("microvm",), *, repo: str = "o/r", **more: object) -> ForgeJob:
        owner, _, name = repo.partition("/")
        job = ForgeJob(str(next(self._numbers)), owner, name, tuple(labels))
        job.name, job.run = f"job {job.id}", f"9{job.id}"
        for key, value in more.items():
            setattr(job, key, value)
        self.jobs[job.id] = job
        self._tell(job)
        self._assign()
        return job

    def cancel(self, job: ForgeJob) -> None:
        if job.state == "queued":
            job.state, job.conclusion = "completed", "cancelled"
            self._tell(job)

    def lose(self, job: ForgeJob, conclusion: str = "failure") -> None:
        """The forge notices after a while that the runner of ``job`` is lost."""
        if job.state == "in_progress":
            job.state, job.conclusion = "completed", conclusion
            for runner in [one for one in self.runners.values() if one.job == job.id]:
                self.runners.pop(runner.id)
            self._tell(job)
            self._wake()

    def attempts(self, run: str) -> list[ForgeJob]:
        """The jobs of the newest attempt of a run."""
        jobs = [job for job in self.jobs.values() if job.run == run]
        newest = max((job.attempt for job in jobs), default=0)
        return [job for job in jobs if job.attempt == newest]

    def rerun(self, job: ForgeJob) -> ForgeJob:
        """Another attempt of its run: this job once more, the others carried over under new ids, announced again."""
        fresh = job
        for old in self.attempts(job.run):
            new = msgspec.structs.replace(old, id=str(next(self._numbers)), attempt=old.attempt + 1, runs=0)
            self.jobs[new.id] = new
            if old is job:
                new.state, new.conclusion, new.runner, fresh = "queued", None, None, new
            self._tell(new)
        self._assign()
        return fresh

    def event(self, job: ForgeJob, state: JobState | None = None) -> JobEvent:
        """What a webhook would say about ``job`` now (or when it was in ``state``)."""
        told = state or job.state
        return JobEvent(
            forge=self.name,
            forge_job_id=job.id,
            owner=job.owner,
            repo=job.repo,
            state=told,
            labels=job.labels,
            seen_at=time.time(),
            name=job.name,
            run_id=job.run,
            run_attempt=job.attempt,
            head_sha=job.head_sha,
            head_branch=job.head_branch,
            conclusion=job.conclusion if told == "completed" else None,
            runner_name=job.runner if told in ("in_progress", "completed") else None,
        )

    # ── what the control plane asks ──────────────────────────────────────────────────────────────

    def client(self, gate: Gate = lambda _what: None) -> "FakeClient":
        return FakeClient(self, gate)

    # ── what runs in the guest ───────────────────────────────────────────────────────────────────

    async def program(self, machine: FakeMachine, files: dict[str, bytes], write: Write) -> int:
        """``Runner.Listener run``: online, one job, exit code."""
        del machine
        runner = self.runners.get(files[".runner"].decode())
        if runner is None:
            return 1
        runner.online = True
        write(b"Connected\nListening for Jobs\n")
        self._assign()
        while runner.job is None:
            if runner.id not in self.runners:
                return 1
            await self._changed.wait()
        job = self.jobs[runner.job]
        job.runs += 1
        write(job.output)
        try:
            await asyncio.sleep(job.seconds)
        except asyncio.CancelledError:
            if not self.sees_lost_runners:
                raise
            job.state, job.conclusion = "completed", "failure"
            self.runners.pop(runner.id, None)
            self._tell(job)
            raise
        write(b"done\n")
        job.state, job.conclusion = "completed", "failure" if job.fails else "success"
        self.runners.pop(runner.id, None)
        self._tell(job)
        return 0

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _assign(self) -> None:
        idle = [runner for runner in self.runners.values() if runner.online and runner.job is None]
        for job in self.jobs.values():
            if not idle:
                break
            if job.state != "queued":
                continue
            wanted = {label.lower() for label in job.labels}
            for runner in idle:
                if wanted <= runner.labels and self._in_scope(job, runner):
                    runner.job, job.runner, job.state = job.id, runner.name, "in_progress"
                    self._tell(job)
                    idle.remove(runner)
                    break
        self._wake()

    def _in_scope(self, job: ForgeJob, runner: ForgeRunner) -> bool:
        return runner.scope.path in (f"{job.owner}/{job.repo}", job.owner)

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    def _tell(self, job: ForgeJob) -> None:
        self.emit(self.event(job))


class FakeClient:
    """One process's client of the forge."""

    def __init__(self, forge: FakeForge, gate: Gate) -> None:
        self._forge = forge
        self._gate = gate

    async def register(self, scope: Scope, *, name: str, labels: Sequence[str]) -> Registration:
        await self._begin("register")
        self._known(scope)
        forge = self._forge
        left = next((r for r in forge.runners.values() if r.name == name), None)
        if left is not None:
            if left.job is not None:
                raise Conflict("the runner exists and is busy", status=409)
            self._remove(left)
        runner = ForgeRunner(
            str(next(forge._numbers)), name, scope, frozenset(label.lower() for label in labels)
        )
        forge.runners[runner.id] = runner
        forge.registrations += 1
        self._end("register")
        return Registration(runner.id, {".runner": runner.id.encode(), ".credentials": b"s3cret-credentials"})

    async def find(self, scope: Scope, name: str) -> RemoteRunner | None:
        await self._begin("find")
        self._known(scope)
        found = next((r for r in self._forge.runners.values() if r.name == name and r.scope == scope), None)
        return None if found is None else _remote(found)

    async def look(self, scope: Scope, remote_id: str) -> RemoteRunner | None:
        await self._begin("look")
        found = self._forge.runners.get(remote_id)
        return None if found is None else _remote(found)

    async def registrations(self, scope: Scope) -> Listing:
        await self._begin("registrations")
        self._known(scope)
        return Listing(tuple(_remote(r) for r in self._forge.runners.values() if r.scope == scope), True)

    def _known(self, scope: Scope) -> None:
        if scope.path in self._forge.deleted:
            raise NotFound(f"{scope.path}: 404 Not Found", status=404)

    async def deregister(self, scope: Scope, remote_id: str) -> Literal["deleted", "gone", "busy"]:
        await self._begin("deregister")
        runner = self._forge.runners.get(remote_id)
        if runner is None:
            return "gone"
        if runner.job is not None and self._forge.jobs[runner.job].state == "in_progress":
            return "busy"
        self._remove(runner)
        self._end("deregister")
        return "deleted"

    async def job(self, scope: Scope, forge_job_id: str, *, owner: str, repo: str) -> JobEvent | None:
        await self._begin("job")
        self._forge.asked.append(forge_job_id)
        found = self._forge.jobs.get(forge_job_id)
        if found is None or (found.owner, found.repo) != (owner, repo):
            return None
        return msgspec.structs.replace(self._forge.event(found), via="asked")

    # ── what can be listed ───────────────────────────────────────────────────────────────────────

    async def owners(self) -> list[str]:
        await self._begin("owners")
        return sorted({owner for owner, _ in self._forge.in_reach})

    async def repositories(self, owner: str) -> list[tuple[str, str]]:
        await self._begin(f"repositories {owner}")
        return [one for one in self._forge.in_reach if one[0] == owner]

    async def untaken(self, owner: str, repo: str, *, after: int) -> Listed:
        await self._begin(f"untaken {owner}")
        await self._begin(f"untaken {owner}/{repo}")
        self._forge.looks.append(f"{owner}/{repo}")
        found = (job for job in self._forge.jobs.values() if (job.owner, job.repo) == (owner, repo))
        return Listed(
            tuple(
                msgspec.structs.replace(self._forge.event(job), via="poll")
                for job in found
                if job.state in ("queued", "waiting") and job.id not in self._forge.unlisted
            )
        )

    async def rerun(
        self, scope: Scope, forge_job_id: str, *, owner: str, repo: str, run_id: str, attempt: int
    ) -> Literal["asked", "not_over", "newer", "cancelled"]:
        await self._begin("rerun")
        newest = self._forge.attempts(run_id)
        if any(job.attempt > attempt for job in newest):
            return "newer"
        if any(job.state != "completed" for job in newest):
            return "not_over"
        if any(job.conclusion == "cancelled" for job in newest):
            return "cancelled"
        self._forge.rerun(self._forge.jobs[forge_job_id])
        self._end("rerun")
        return "asked"

    def allowance(self, owner: str) -> Allowance | None:
        return self._forge.allowances.get(owner)

    def _remove(self, runner: ForgeRunner) -> None:
        self._forge.runners.pop(runner.id, None)
        self._forge._wake()

    async def _begin(self, call: str) -> None:
        self._gate(f"before {call}")
        await asyncio.sleep(self._forge.delays.get(call, self._forge.delay))
        queue = self._forge.faults.get(call)
        if queue:
            raise queue.pop(0)

    def _end(self, call: str) -> None:
        self._gate(call)
        if call in self._forge.lost_answers:
            self._forge.lost_answers.discard(call)
            raise Unavailable(f"{call}: the answer was lost", retryable=True)


def _remote(runner: ForgeRunner) -> RemoteRunner:
    return RemoteRunner(runner.id, runner.name, runner.online, runner.job is not None)
