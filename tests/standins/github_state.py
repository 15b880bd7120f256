"""The lives of runs, jobs and runners in the stand-in GitHub.

    job:     waiting ──approve──► queued ──assign──► (assigned) ──acquire──► in_progress ──► completed
                                    ▲                    │ not picked up in time
                                    └────────────────────┘
    runner:  registered ──session──► online, idle ──assign──► busy ──complete──► gone (ephemeral)

A queued job goes to the first idle online runner of its scope whose labels contain the job's; which job a
runner was made for plays no part, exactly as at GitHub.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from tests.standins.github_model import Job, Repository, Run, Runner, Times

MAX_LOG = 16 << 20


class Refused(Exception):
    """A call that cannot be served; ``status`` and the message become the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Actions:
    """All runs, jobs and runners. ``emit(job, action)`` is called for every change GitHub would announce."""

    def __init__(self, emit: Callable[[Job, str], None], times: Times | None = None) -> None:
        self._emit = emit
        self.times = times or Times()
        self.repositories: dict[str, Repository] = {}
        self.runners: dict[int, Runner] = {}
        self.retired: dict[str, Runner] = {}
        self.runs: dict[int, Run] = {}
        self.jobs: dict[int, Job] = {}
        self.minimum_version: tuple[int, ...] = (0,)
        self._last_id = 1000
        self._changed = asyncio.Event()

    # -- waiting ---------------------------------------------------------------------------------

    def changed(self) -> None:
        """Wake everyone who waits for a state."""
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    async def until(self, condition: Callable[[], bool], timeout: float) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            while not condition():
                await self._changed.wait()

    def new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    # -- runs ------------------------------------------------------------------------------------

    def add_run(self, run: Run, definitions: dict[str, dict[str, Any]]) -> None:
        """Queue every job whose needs are met; the others wait for theirs."""
        self.runs[run.id] = run
        run.pending = dict(definitions)
        self._release(run)

    def _release(self, run: Run) -> None:
        ended = {job.key: job.conclusion for job in run.latest if job.status == "completed"}
        for key, definition in list(run.pending.items()):
            needs = definition["needs"]
            if not all(need in ended for need in needs):
                continue
            del run.pending[key]
            met = all(ended[need] == "success" for need in needs)
            job = self._new_job(run, key, definition)
            if met:
                self._queue(job)
            else:
                job.status, job.conclusion = "completed", "skipped"
                job.started_at = job.completed_at = time.time()
                self._emit(job, "completed")
                self._release(run)
                break
        self.dispatch()

    def _new_job(self, run: Run, key: str, definition: dict[str, Any]) -> Job:
        job = Job(
            id=self.new_id(),
            run=run,
            key=key,
            name=definition["name"],
            labels=definition["labels"],
            definition=definition,
            attempt=run.attempt,
            created_at=time.time(),
            environment=definition.get("environment"),
        )
        run.jobs.append(job)
        self.jobs[job.id] = job
        return job

    def _queue(self, job: Job) -> None:
        # A job for a protected environment is announced twice: queued/waiting, then queued/queued.
        job.status = "waiting" if job.environment else "queued"
        self._emit(job, "queued")
        if job.environment:
            self._emit(job, "waiting")
        self.changed()

    def approve(self, job: Job) -> None:
        if job.status != "waiting":
            raise Refused(422, "the job does not wait for an approval")
        job.status = "queued"
        self._emit(job, "queued")
        self.changed()
        self.dispatch()

    def cancel(self, run: Run) -> None:
        if run.status == "completed":
            raise Refused(409, "Cannot cancel a workflow run that is completed.")
        run.pending.clear()
        for job in run.latest:
            if job.status == "completed":
                continue
            job.cancelled_at = time.time()
            if job.status == "in_progress":
                self._wake(job)
            else:
                self._unassign(job)
                self._finish(job, "cancelled")

    def rerun(self, job: Job) -> Job:
        """A new attempt with this job again; the others of the run are carried over and announced again."""
        run = job.run
        if run.status != "completed":
            raise Refused(403, "The workflow run containing this job is already running")
        before = run.latest
        run.attempt += 1
        fresh: Job | None = None
        for old in before:
            new = self._new_job(run, old.key, old.definition)
            if old is job:
                fresh = new
                continue
            new.status, new.conclusion = "completed", old.conclusion
            new.runner_id, new.runner_name, new.steps = old.runner_id, old.runner_name, old.steps
            new.started_at, new.completed_at, new.log = old.started_at, old.completed_at, old.log
            self._emit(new, "completed")
        assert fresh is not None, "only a job of the latest attempt can run again"
        self._queue(fresh)
        self.dispatch()
        return fresh

    # -- runners ---------------------------------------------------------------------------------

    def register(
        self, kind: str, owner: str, repo: str | None, name: str, labels: list[str], work_folder: str
    ) -> Runner:
        if any(r.name.lower() == name.lower() for r in self.scope_runners(kind, owner, repo)):
            raise Refused(409, f"Already exists - A runner with the name {name} already exists.")
        runner = Runner(self.new_id(), name, kind, owner, repo, labels, work_folder, time.time())
        self.runners[runner.id] = runner
        self.changed()
        return runner

    def scope_runners(self, kind: str, owner: str, repo: str | None) -> list[Runner]:
        return [
            r
            for r in self.runners.values()
            if r.kind == kind
            and r.owner.lower() == owner.lower()
            and (r.repo or "").lower() == (repo or "").lower()
        ]

    def delete_runner(self, runner: Runner) -> None:
        if runner.busy:
            raise Refused(422, f"Bad request - Runner {runner.name} is still running a job")
        self._retire(runner)

    def _retire(self, runner: Runner) -> None:
        self.runners.pop(runner.id, None)
        self.retired[runner.client_id] = runner
        while len(self.retired) > 1000:
            self.retired.pop(next(iter(self.retired)))
        runner.session = None
        runner.wake.set()
        self.changed()

    # -- the runner's side -----------------------------------------------------------------------

    def open_session(self, runner: Runner, version: str) -> str:
        if runner.id not in self.runners:
            raise Refused(404, "The runner registration has been deleted from the server.")
        if tuple(int(part) for part in version.split(".")) < self.minimum_version:
            raise Refused(426, f"Runner version v{version} is deprecated and cannot receive messages.")
        if runner.session is not None and (runner.polling or time.time() - runner.seen_at < 2.0):
            raise Refused(409, "A session for this runner already exists.")
        if runner.session is None and time.time() - runner.created_at > self.times.registration:
            raise Refused(401, "The just-in-time registration has expired.")
        runner.session = secrets.token_hex(16)
        runner.version = version
        runner.seen_at = time.time()
        self.changed()
        self.dispatch()
        return runner.session

    def close_session(self, runner: Runner) -> None:
        runner.session = None
        self.changed()

    def message(self, runner: Runner) -> Job | None:
        """The job this runner should acquire or cancel, if any. Repeats until it was acted on."""
        job = runner.job
        if job is None or (job.status == "in_progress" and job.cancelled_at is None):
            return None
        return job

    def acquire(self, runner: Runner, job: Job) -> None:
        if runner.job is not job:
            raise Refused(409, "The job is no longer assigned to this runner.")
        if job.status == "in_progress":
            return
        job.status = "in_progress"
        job.started_at = time.time()
        job.runner_id, job.runner_name = runner.id, runner.name
        self._emit(job, "in_progress")
        self.changed()

    def append_log(self, job: Job, offset: int, data: bytes) -> int:
        """Returns the length now. What was there already is skipped; a gap is refused."""
        if offset > len(job.log):
            raise Refused(416, f"the log ends at {len(job.log)}")
        fresh = data[len(job.log) - offset :]
        if len(job.log) + len(fresh) > MAX_LOG:
            job.log_cut = True
            raise Refused(413, "the log is full")
        job.log += fresh
        self.changed()
        return len(job.log)

    def complete(self, runner: Runner, job: Job, conclusion: str, steps: list[dict[str, Any]]) -> None:
        if job.status == "completed" and job.runner_id == runner.id:
            return
        if runner.job is not job or job.status != "in_progress":
            raise Refused(409, "The job is not running on this runner.")
        job.steps = steps
        runner.job = None
        self._retire(runner)
        self._finish(job, conclusion)

    def _finish(self, job: Job, conclusion: str) -> None:
        now = time.time()
        job.status, job.conclusion = "completed", conclusion
        job.started_at = job.started_at or job.created_at
        job.completed_at = now
        for step in job.steps:
            if step["status"] != "completed":
                step.update(status="completed", conclusion=conclusion)
        self._emit(job, "completed")
        self.changed()
        self._release(job.run)

    # -- hand out and tidy up --------------------------------------------------------------------

    def dispatch(self) -> None:
        """Give every queued job, oldest first, to the first idle online runner that fits."""
        for job in self.jobs.values():
            if job.status != "queued" or job.assigned_at is not None:
                continue
            for runner in self.runners.values():
                if (
                    runner.online
                    and not runner.busy
                    and runner.serves(job.run.repository)
                    and runner.fits(job.labels)
                ):
                    runner.job, job.assigned_at = job, time.time()
                    runner.wake.set()
                    break

    def _wake(self, job: Job) -> None:
        for runner in self.runners.values():
            if runner.job is job:
                runner.wake.set()

    def _unassign(self, job: Job) -> None:
        job.assigned_at = None
        for runner in self.runners.values():
            if runner.job is job:
                runner.job = None

    def sweep(self) -> None:
        """What happens by itself with time; called every half second."""
        now, times = time.time(), self.times
        # Jobs first: a silent runner that one is taken back from is offline before it could be given it again.
        for job in list(self.jobs.values()):
            if job.status == "queued" and job.assigned_at and now - job.assigned_at > times.pick_up:
                self._unassign(job)
            if job.status == "queued" and now - job.created_at > times.queued:
                self._unassign(job)
                self._finish(job, "failure")
        for runner in list(self.runners.values()):
            silent = 0.0 if runner.polling else now - runner.seen_at
            if runner.session is not None and not runner.busy and silent > times.session:
                self.close_session(runner)
            job = runner.job
            if job is None or job.status != "in_progress":
                continue
            deaf = job.cancelled_at is not None and now - job.cancelled_at > times.cancel
            if silent > times.lost_runner or deaf:
                runner.job = None
                self._retire(runner)
                self._finish(job, "cancelled" if deaf else "failure")
        self.dispatch()
