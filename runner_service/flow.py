"""The life of a runner after the decision to make one: one handler a state, each safe to run again.

    wanted ─► forking ─► registering ─► idle ─► busy ─► retiring ─► gone
      │          │            │          │        ▲ │      │  ▲
      │          └────────────┴──────────┴────────│─┴──────│──┘
      └► gone                                     └────────┘ the forge says: busy

wanted       a queued job needs it. Like ``placed`` a line of the timeline and no state that lasts: jobs wait, and when
             its turn has come a place is promised and the fork begun in one commit (``dispatch.py``). Rows in this
             state are an older version's.
forking      the VM is forked and the registration asked for, both at once; then the runner process is started
             with one call over the channel.
registering  the process runs in the guest; waits until it listens for jobs.
idle         waits for the forge to give it a job.
busy         a job runs on it; waits for the job's end, the process's exit or the job limit.
retiring     deregistered if the forge still knows it, VM destroyed. Busy there means: believed, back to busy.
gone         nothing of it is left.

Each handler answers Goto, Wait or Done. Each state has a deadline; lateness is a reason to retire. That it was
cancelled, killed or lost is read before the step, from the row and from what the VM did.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import structlog

from github_webhook.errors import ForgeError, NotFound, RateLimited, Unavailable
from runner_service.domain import (
    Answer,
    Done,
    Goto,
    Job,
    JobEvent,
    Parent,
    Registration,
    Runner,
    RunnerState,
    Template,
    Wait,
)
from runner_service.egress import merged
from runner_service.facts import EXIT_MEANING, FORCED, Limits, facts, late, spent
from runner_service.frozen import FAILED, KEEPS, Freezer, result_in
from runner_service.joblog import JobLogs
from runner_service.live import EXEC_ID, Live
from runner_service.parents import Choice
from runner_service.ports import Catalog, Forge, Hypervisor, RunnerVm
from vmm_core.errors import GuestRefused, SnapshotInvalid, UnknownTemplate, UnknownVm, VmmError, WrongOwner
from vmm_core.machine import EgressRule, GuestFile

log = structlog.get_logger("flow")
T = TypeVar("T")

_REGISTER_PAUSES = (0.25, 1.0, 3.0)
_LOOK_EVERY = (2.0, 5.0, 10.0, 15.0)
_BUSY_EVERY = 15.0
_UNNAMED_SECONDS = 10.0
_RETRY_EVERY = 5.0
_ENDING_SECONDS = 5.0


class Flow:
    """The handlers, and what they need. ``job`` looks one up; ``observe`` is told what the forge says about jobs.

    ``choose`` names the parent for a job (its id) whose labels ask for a template, ``confirm`` tells later whether it
    has the exact key after all; ``chosen`` hears of the kind.

    Every VM may reach what its template is open to, ``egress``, and the one of ``forge_rules`` for its forge.
    """

    def __init__(
        self,
        *,
        hypervisor: Hypervisor,
        forges: Mapping[str, Forge],
        catalog: Catalog,
        logs: JobLogs,
        limits: Limits,
        service: str,
        job: Callable[[str], Awaitable[Job | None]],
        observe: Callable[[JobEvent], None],
        choose: Callable[[str, Template], Awaitable[Choice | None]],
        confirm: Callable[[str, Template], Awaitable[Choice | None]],
        chosen: Callable[[str], None] = lambda _code: None,
        freezer: Freezer | None = None,
        egress: tuple[EgressRule, ...] = (),
        forge_rules: Mapping[str, EgressRule] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._hypervisor = hypervisor
        self._forges = forges
        self._catalog = catalog
        self._logs = logs
        self._limits = limits
        self._service = service
        self._job = job
        self._observe = observe
        self._choose = choose
        self._confirm = confirm
        self._chosen = chosen
        self._freezer = freezer
        self._egress = egress
        self._forge_rules = forge_rules or {}
        self.clock = clock
        self._handlers: dict[RunnerState, Callable[[Runner, Live], Awaitable[Answer]]] = {
            "forking": self._forking,
            "registering": self._registering,
            "idle": self._idle,
            "busy": self._busy,
            "retiring": self._retiring,
            "gone": self._gone,
        }

    def reconfigure(self, *, limits: Limits, egress: tuple[EgressRule, ...]) -> None:
        """Other limits and further endpoints, for every VM that is started from now on."""
        self._limits = limits
        self._egress = egress

    async def step(self, runner: Runner, live: Live) -> Answer:
        """One step from the runner's state: facts first, then the state's handler within its deadline."""
        now = self.clock()
        fact = facts(runner, live, now)
        if fact is not None:
            return fact
        handler = self._handlers[runner.state]
        if runner.state in ("retiring", "gone"):
            return await handler(runner, live)
        try:
            async with asyncio.timeout(max(0.05, runner.deadline - now)):
                return await handler(runner, live)
        except TimeoutError:
            return late(runner)

    # ── forking ──────────────────────────────────────────────────────────────────────────────────

    async def _forking(self, runner: Runner, live: Live) -> Answer:
        """Fork and register at once, then start the runner. After a crash the VM may be there already."""
        template = self._template(runner)
        if template is None or template.runner_dir is None:
            return Goto(
                "retiring", f"the template '{runner.template}' is gone or holds no runner", "no_template"
            )
        if live.vm is not None and await self._resumed(runner, live):
            return Goto("registering", "the runner process was started before the restart")
        try:
            vm, registration = await self._both(
                self._fork(runner, live, template), self._register(runner, live)
            )
            await self._start(runner, live, vm, registration, template)
        except ForgeError as error:
            # A rate limit names its end. Whatever else holds calls back is lifted by an answer, or by an event.
            live.retry_at = error.retry_at if isinstance(error, RateLimited) else None
            return Goto("retiring", f"cannot register with the forge: {error}", error.code)
        except VmmError as error:
            return Goto("retiring", f"cannot start the VM: {error}", error.code)
        return Goto("registering", "the runner process runs in the guest")

    def _template(self, runner: Runner) -> Template | None:
        """The template it was made for, or what bears its name by now."""
        known = self._catalog.templates()
        same = (t for t in known if t.digest == runner.digest)
        return next(same, None) or next((t for t in known if t.name == runner.template), None)

    async def _both(
        self, fork: Awaitable[RunnerVm], register: Awaitable[Registration]
    ) -> tuple[RunnerVm, Registration]:
        """Both results; when one fails or we are stopped, the other is ended before the error goes on."""
        tasks = (asyncio.ensure_future(fork), asyncio.ensure_future(register))
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _fork(self, runner: Runner, live: Live, template: Template) -> RunnerVm:
        """Forked from the job's parent; from the template when there is none, or that one is not to be had any more."""
        if live.vm is not None:
            return live.vm
        parent = await self._parent(runner, live, template)
        vm: RunnerVm | None = None
        if parent is not None:
            try:
                vm = await self._launch(runner, parent.machine)
                live.changes["parent"] = parent.name
            except (UnknownTemplate, SnapshotInvalid, WrongOwner) as error:
                self._chosen("gone")
                why = f"fallback: template {template.name}: {parent.name} cannot be forked: {error}"
                live.note(runner, self.clock(), "parent", why)
        machine = parent.machine if parent is not None and vm is not None else template
        vm = vm or await self._launch(runner, template)
        live.take_vm(vm)
        live.changes |= {"vm_id": vm.id, "digest": machine.digest}
        self._catalog.touch(machine.digest)
        t = vm.timings
        closed = machine.allow is None and self._egress
        live.note(
            runner, self.clock(), "forked",
            f"VM {vm.id} in {t.total_ms:.0f} ms (disk {t.disk_ms:.0f}, start {t.spawn_ms:.0f}, revive {t.revive_ms:.0f})"  # noqa: E501
            + ("; its template has no network card: [[runners.egress]] does not apply" if closed else ""),
        )  # fmt: skip
        return vm

    async def _parent(self, runner: Runner, live: Live, template: Template) -> Parent | None:
        """The parent its job gets; which one and why is a line of the job's story."""
        choice = await self._choose(runner.job_id, template) if runner.job_id is not None else None
        if choice is None:
            return None
        self._chosen(choice.code)
        live.note(runner, self.clock(), "parent", choice.reason)
        if choice.parent is not None and choice.code != "exact":
            live.beside(self._confirmed(runner, live, template, choice.parent))
        return choice.parent

    async def _confirmed(self, runner: Runner, live: Live, template: Template, parent: Parent) -> None:
        """While the job runs: what its parent was worth."""
        choice = await self._confirm(runner.job_id or "", template)
        if choice is not None and choice.code == "exact" and choice.parent == parent:
            live.note(runner, self.clock(), "parent", choice.reason)

    def _launch(self, runner: Runner, machine: Template) -> Awaitable[RunnerVm]:
        return self._hypervisor.launch(
            machine.digest,
            ttl=self._limits.ttl,
            metadata={
                "runner_id": runner.id,
                "service": self._service,
                "scope": runner.scope_path,
                "job": runner.job_id or "",
            },
            allow=self._allowed(runner, machine),
            hostname=runner.id,
            # An enterprise's runner may be taken by a job of any of its organizations.
            owner=runner.scope_path.partition("/")[0].lower() if runner.scope_kind != "enterprise" else None,
        )

    def _allowed(self, runner: Runner, template: Template) -> tuple[EgressRule, ...] | None:
        """Template, forge and settings together; without a network card there is nothing to allow."""
        if template.allow is None:
            return None
        forge = self._forge_rules.get(runner.forge)
        return merged([forge] if forge is not None else [], template.allow, self._egress)

    async def _register(self, runner: Runner, live: Live) -> Registration:
        """Ask for the registration; what is worth a retry is tried again a few times while the VM starts."""
        forge = self._forge(runner)
        for pause in (*_REGISTER_PAUSES, None):
            try:
                registration = await forge.register(runner.scope, name=runner.id, labels=runner.labels)
            except ForgeError as error:
                if pause is None or not error.retryable or error.retry_at is not None:
                    raise
                live.note(
                    runner, self.clock(), "register again", str(error), f"{pause:g} s after {error.code}"
                )
                await asyncio.sleep(pause)
            else:
                live.changes["remote_id"] = registration.remote_id
                live.note(
                    runner,
                    self.clock(),
                    "registered",
                    f"runner {registration.remote_id} of {runner.scope_path}",
                )
                return registration
        raise AssertionError("the last try raises or returns")

    async def _start(
        self, runner: Runner, live: Live, vm: RunnerVm, registration: Registration, template: Template
    ) -> None:
        directory = template.runner_dir or "/"
        files = template.runner_files or directory
        process = await vm.start(
            [f"{directory}/bin/Runner.Listener", "run"],
            exec_id=EXEC_ID,
            cwd=directory,
            env={"ACTIONS_RUNNER_PRINT_LOG_TO_STDOUT": "1"},
            files=[GuestFile(f"{files}/{name}", data) for name, data in registration.files.items()],
        )
        live.note(runner, self.clock(), "started", "the runner process runs in the guest")
        live.follow(process, self._logs.open(runner.id))

    async def _resumed(self, runner: Runner, live: Live) -> bool:
        """Whether the runner process of an adopted VM runs (or ran) already; then its streams are ours again."""
        if not await self.attach(runner, live):
            return False
        if runner.remote_id is None:
            remote = await self._ask(runner, live, lambda: self._forge(runner).find(runner.scope, runner.id))
            live.changes["remote_id"] = remote.remote_id if remote is not None else None
        return True

    async def attach(self, runner: Runner, live: Live) -> bool:
        """Take up the process and its log where they were left; False when the guest knows no such process."""
        if live.process is not None:
            return True
        assert live.vm is not None, "only called for a runner with a VM"  # noqa: S101
        joblog = self._logs.open(runner.id)
        try:
            process = await live.vm.attach(
                EXEC_ID, stdout_from=joblog.offsets["stdout"], stderr_from=joblog.offsets["stderr"]
            )
        except GuestRefused:
            return False
        live.follow(process, joblog)
        return True

    # ── registering, idle, busy ──────────────────────────────────────────────────────────────────

    async def _registering(self, runner: Runner, live: Live) -> Answer:
        """Online is what the runner itself prints, or what the forge shows when asked now and then."""
        if runner.serving_job_id is not None:
            return Goto("busy", "the forge gave it a job")
        if live.exit is not None:
            return await self._exited(runner, live)
        if live.listening:
            return Goto("idle", "the runner listens for jobs")
        waited = self.clock() - runner.state_at
        remote_id = runner.remote_id
        if waited >= _LOOK_EVERY[0] and remote_id is not None:
            remote = await self._ask(runner, live, lambda: self._forge(runner).look(runner.scope, remote_id))
            if remote is not None and remote.online and remote.busy:
                # Its event may be late, and until then its job looks like one that nobody took.
                await self._refresh_job(runner, live)
                return Goto("busy", "the forge shows it online and busy")
            if remote is not None and remote.online:
                return Goto("idle", "the forge shows it online")
        pause = _LOOK_EVERY[min(live.looks, len(_LOOK_EVERY) - 1)]
        live.looks += 1
        return Wait(self.clock() + pause, "the runner to come online")

    async def _idle(self, runner: Runner, live: Live) -> Answer:
        if runner.serving_job_id is not None:
            return Goto("busy", "the forge gave it a job")
        if live.exit is not None:
            return await self._exited(runner, live)
        return Wait(runner.deadline, "a job from the forge")

    async def _busy(self, runner: Runner, live: Live) -> Answer:
        if live.exit is not None:
            return await self._exited(runner, live)
        if runner.job_done_at is not None:
            until = runner.job_done_at + self._limits.exit_grace
            if self.clock() >= until:
                return Goto("retiring", "the job is completed", "completed")
            return Wait(until, "the runner to exit after its job")
        if runner.serving_job_id is None and runner.job_id is not None:
            return await self._unnamed(runner, live)
        return Wait(runner.deadline, "the job to end")

    async def _unnamed(self, runner: Runner, live: Live) -> Answer:
        """Busy by the forge's word, and no event named its job yet: asked for, until it is known whose it is not."""
        event = await self._refresh_job(runner, live)
        settled = self.clock() - runner.state_at >= _UNNAMED_SECONDS
        if event is not None and settled and event.runner_name != runner.id:
            # It took a job we know nothing of: the one it was made for needs another runner.
            live.changes["job_id"] = None
            live.note(runner, self.clock(), "runner taken", f"runner {runner.id} serves a job nobody told of")
            return Wait(runner.deadline, "the job to end")
        return Wait(min(self.clock() + _UNNAMED_SECONDS, runner.deadline), "the job to end")

    async def _exited(self, runner: Runner, live: Live) -> Answer:
        """The process is over. What the forge knows by now about the job is asked for, since its events may be late."""
        assert live.exit is not None, "only called after the exit"  # noqa: S101
        code = live.changes["exit_code"] = live.exit.code
        event = await self._refresh_job(runner, live)
        served = runner.state == "busy" or runner.serving_job_id is not None
        served = served or (event is not None and event.runner_name == runner.id)
        reason = f"the runner process {EXIT_MEANING.get(code, 'failed')} (exit code {code})"
        if served:
            return Goto("retiring", reason, "runner_exited")
        if code == 0 and await self._used_up(runner, live):
            return Goto("retiring", f"{reason} after a job that no event told of yet", "runner_exited")
        return Goto("retiring", f"{reason} without a job", "runner_failed")

    async def _used_up(self, runner: Runner, live: Live) -> bool:
        """Whether it served a job nobody told us of: then the forge has let the ephemeral registration go.

        A forge that does not answer is no reason to hold a runner that was online for a failed one.
        """
        forge, remote_id = self._forge(runner), runner.remote_id or live.changes.get("remote_id")
        try:
            if remote_id is None:  # it was registered before a restart
                return await forge.find(runner.scope, runner.id) is None
            return await forge.look(runner.scope, remote_id) is None
        except ForgeError:
            return live.listening

    # ── retiring ─────────────────────────────────────────────────────────────────────────────────

    async def _retiring(self, runner: Runner, live: Live) -> Answer:
        """Give everything back. While the VM may still work for somebody, the forge has the first word."""
        now = self.clock()
        overdue = now >= runner.deadline
        alive = live.vm is not None and live.ended is None and live.exit is None
        if alive and runner.code not in FORCED and not overdue:
            answer = await self._deregister(runner, live)
            if answer == "busy":
                live.changes |= {"cancelled_at": None}
                await self._refresh_job(runner, live)
                return Goto("busy", "the forge says that a job runs on it")
            if runner.code in ("late_idle", "registration_gone") and answer != "failed":
                # Nobody wanted it: perhaps its job was over long ago and no event told us.
                await self._refresh_job(runner, live)
            if answer == "failed":
                return Wait(min(now + _RETRY_EVERY, runner.deadline), "the forge to deregister it")
        if (waiting := await self._keep(runner, live)) is not None:
            return waiting
        await self._destroy(runner, live)
        answer = "gone" if _deregistered(runner, live) else await self._deregister(runner, live)
        if answer in ("busy", "failed") and not overdue:
            pause = _BUSY_EVERY if answer == "busy" else _RETRY_EVERY
            return Wait(min(now + pause, runner.deadline), "the forge to deregister it")
        if answer in ("busy", "failed"):
            live.note(runner, now, "not deregistered", "the forge did not let it go within the deadline")
        return Goto("gone", runner.reason or "retired", runner.code or "ok")

    async def _keep(self, runner: Runner, live: Live) -> Wait | None:
        """Freeze the VM of a failed job where its repository wants that; its registration must be gone before."""
        job = await self._failed_job(runner, live)
        if job is None or self._freezer is None or live.vm is None:
            return None
        answer = "gone" if _deregistered(runner, live) else await self._deregister(runner, live)
        now = self.clock()
        if answer in ("busy", "failed"):
            if now < runner.deadline:
                return Wait(min(now + _RETRY_EVERY, runner.deadline), "the forge to deregister it")
            live.note(runner, now, "not frozen", "the forge did not let its registration go in time")
            return None
        try:
            kept = await self._freezer.freeze(runner, job, live.vm)
        except VmmError as error:
            live.note(runner, self.clock(), "not frozen", str(error))
        else:
            hours = (kept.expires_at - kept.created_at) / 3600
            live.note(
                runner, self.clock(), "frozen", f"kept as {kept.id} for {hours:.3g} h: microvm shell {job.id}"
            )
        return None

    async def _failed_job(self, runner: Runner, live: Live) -> Job | None:
        """The job that failed in its VM, if that shall be kept; the forge's word counts, else the runner's own."""
        job_id = runner.serving_job_id or runner.job_id
        if self._freezer is None or runner.code not in KEEPS or live.vm is None or job_id is None:
            return None
        job = await self._job(job_id) if live.ended is None else None
        if job is None or not self._freezer.wants(job):
            return None
        if live.verdict is None:
            live.verdict = job.conclusion if job.runner_name == runner.id else None
        if live.verdict is None:
            event = await self._ask(runner, live, lambda: self._look_at(runner, job))
            mine = event is not None and event.runner_name == runner.id
            said = result_in(self._logs.path(runner.id)) if mine or runner.serving_job_id else None
            live.verdict = (event.conclusion if event is not None and mine else None) or said or "unknown"
        return job if live.verdict in FAILED else None

    async def _deregister(self, runner: Runner, live: Live) -> str:
        """``deleted``, ``gone`` (the forge knows it no more), ``busy``, or ``failed`` (told in the timeline)."""
        remote_id = runner.remote_id or live.changes.get("remote_id")
        try:
            forge = self._forge(runner)
            if remote_id is None:
                # A registration may have been made and its answer lost: its name tells.
                remote = await forge.find(runner.scope, runner.id)
                if remote is None:
                    live.changes["deregistered"] = True
                    return "gone"
                remote_id = live.changes["remote_id"] = remote.remote_id
            answer = await forge.deregister(runner.scope, remote_id)
        except ForgeError as error:
            if type(error) is NotFound:
                live.changes["deregistered"] = True
                live.note(
                    runner, self.clock(), "deregistered", f"the forge knows no {runner.scope_path} (any more)"
                )
                return "gone"
            if live.said != str(error):
                live.said = str(error)
                live.note(runner, self.clock(), "deregister again", str(error), "the forge")
            return "failed"
        if answer == "busy":
            return "busy"
        live.changes["deregistered"] = True
        said = "deregistered" if answer == "deleted" else "the forge had let it go already"
        live.note(runner, self.clock(), "deregistered", said)
        return answer

    async def _destroy(self, runner: Runner, live: Live) -> None:
        vm_id = runner.vm_id or live.changes.get("vm_id")
        had_vm = live.vm is not None or vm_id is not None
        if live.vm is not None:
            await live.vm.destroy()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ENDING_SECONDS):
                    live.ended = live.ending = await live.vm.wait()
        elif vm_id is not None:
            with contextlib.suppress(UnknownVm):
                await self._hypervisor.destroy(vm_id)
        await live.stop()
        live.vm = None
        self._logs.close(runner.id)
        live.changes["vm_id"] = None
        if had_vm:
            await self._tell_end(runner, live)

    async def _tell_end(self, runner: Runner, live: Live) -> None:
        """What the VM cost, and what its kernel complained of, as lines of the job's story."""
        ending = live.ending
        if ending is not None and ending.guest_oom:
            live.note(runner, self.clock(), "guest out of memory", ending.guest_oom)
        cost = spent(ending.usage) if ending is not None and ending.usage is not None else ""
        if ending is not None and ending.cause == "frozen":
            live.note(runner, self.clock(), "given back", f"its memory and network; it is frozen{cost}")
        else:
            live.note(runner, self.clock(), "destroyed", f"the VM and all it held are given back{cost}")
        job_id = runner.serving_job_id or runner.job_id
        job = await self._job(job_id) if job_id is not None else None
        live.repository = f"{job.owner}/{job.repo}" if job is not None else runner.scope_path

    async def _gone(self, runner: Runner, live: Live) -> Answer:
        del runner, live  # nothing is left to look at
        return Done()

    def _forge(self, runner: Runner) -> Forge:
        forge = self._forges.get(runner.forge)
        if forge is None:
            raise Unavailable(f"no forge '{runner.forge}' is configured any more")
        return forge

    # ── asking the forge ─────────────────────────────────────────────────────────────────────────

    async def _refresh_job(self, runner: Runner, live: Live) -> JobEvent | None:
        """Ask the forge about the job this runner serves or was made for, as if an event had come."""
        job_id = runner.serving_job_id or runner.job_id
        job = await self._job(job_id) if job_id is not None and runner.job_done_at is None else None
        if job is None:
            return None
        event = await self._ask(runner, live, lambda: self._look_at(runner, job))
        if event is not None:
            self._observe(event)
        return event

    def _look_at(self, runner: Runner, job: Job) -> Awaitable[JobEvent | None]:
        return self._forge(runner).job(job.scope, job.forge_job_id, owner=job.owner, repo=job.repo)

    async def _ask(self, runner: Runner, live: Live, question: Callable[[], Awaitable[T]]) -> T | None:
        """The answer, or None when the forge fails: then the timeline says so once, and life goes on."""
        try:
            return await question()
        except ForgeError as error:
            if live.said != str(error):
                live.said = str(error)
                live.note(runner, self.clock(), "forge failed", str(error))
            return None


def _deregistered(runner: Runner, live: Live) -> bool:
    return runner.deregistered or live.changes.get("deregistered", False)
