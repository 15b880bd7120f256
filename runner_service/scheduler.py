"""Claim → step → persist, under leases: one task that decides, one task per runner, woken by events alone.

    wake() ─► pass: one deciding transaction ─► a task per started runner ─► Flow.step ─► one commit a transition
              ▲                                                    │
              └── an event was stored · a runner ended · a brake ran out · every 10 s at the latest

Start: adopt what runs, match it with the rows, go on where each row stands. Stop: tasks end, VMs run on.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service import demand
from runner_service.decide import Decider, Decision
from runner_service.domain import Answer, Done, Ending, Goto, Host, JobEvent, Runner, Wait, timeline
from runner_service.facts import BENIGN, Limits
from runner_service.flow import Flow
from runner_service.infrastructure import code_of
from runner_service.live import Live
from runner_service.ports import Hypervisor, RunnerVm
from runner_service.reaper import Reaper
from runner_service.store import queries as q
from runner_service.store.store import Store
from runner_service.telemetry import Metrics
from vmm_core.errors import VmmError

log = structlog.get_logger("scheduler")

_TICK = 10.0
_LEASE = 30.0
_LOOK_AGAIN = 30.0
_FORGET_EVERY = 3600.0
_RETIRE_STEP_LIMIT = 120.0
_ERROR_PAUSE = 5.0
_OBSERVED_BOUND = 10_000


class Scheduler:
    """Runs the control plane of one host. ``wake`` may be called from any task of its loop.

    ``moved`` is called when a repository is new or a branch of one moved, ``failed`` when infrastructure failed under
    a runner.
    """

    def __init__(
        self,
        *,
        store: Store,
        flow: Flow,
        decider: Decider,
        hypervisor: Hypervisor,
        host: Host,
        limits: Limits,
        metrics: Metrics,
        keep_seconds: float,
        prune_logs: Callable[[float], None],
        moved: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
        tick: float = _TICK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._steps = store.grouped(q.step_runners)
        self._rows = store.grouped_reads(q.each_runner)
        self._flow = flow
        self._decider = decider
        self._hypervisor = hypervisor
        self._host = host
        self._limits = limits
        self._metrics = metrics
        self._keep = keep_seconds
        self._prune_logs = prune_logs
        self._moved = moved
        self._failed = failed
        self._tick = tick
        self._clock = clock
        self._woken = asyncio.Event()
        self._observed: deque[JobEvent] = deque(maxlen=_OBSERVED_BOUND)
        self._brakes: dict[str, demand.Brake] = {}
        self._lives: dict[str, Live] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._reaper = Reaper(hypervisor, service=host.name)
        self._orphans: set[str] = set()
        self._looked_again = 0.0
        self._forgot = 0.0
        self._again = False
        self._renew_now = False
        # As the last pass saw it: an operator's order, or the end of this service.
        self.draining = False

    # ── from outside ─────────────────────────────────────────────────────────────────────────────

    def wake(self) -> None:
        """Something was committed that a pass should see; costs nothing when a pass is due anyway."""
        self._woken.set()

    def observe(self, event: JobEvent) -> None:
        """The forge was asked and said this about a job; worked like an event, in the next pass."""
        self._observed.append(event)
        self.wake()

    def lose(self, runner_id: str, reason: str, code: str) -> None:
        """Something that a runner of this process cannot do without is gone: it retires, unless it serves a job."""
        live = self._lives.get(runner_id)
        if live is not None:
            live.lose(reason, code)

    async def kill(self, vm_id: str) -> None:
        """Operator's order: end this VM. Its runner, if any, is retired; raises UnknownVm when there is no such VM."""
        runner_id = await self._store.write(lambda db: q.kill_runner_of_vm(db, vm_id, self._clock()))
        if runner_id is not None and runner_id in self._lives:
            self._lives[runner_id].wake()
            return
        await self._hypervisor.destroy(vm_id)

    def reconfigure(self, *, host: Host, limits: Limits, keep_seconds: float) -> None:
        """Other capacity and deadlines, from the next decision on; deadlines that run already stay."""
        self._host = msgspec.structs.replace(host, draining=self._host.draining)
        self._limits = limits
        self._keep = keep_seconds
        self._renew_now = True
        self.wake()

    async def drain(self) -> None:
        """Take no new work on this host until the next start; runners without a job are let go."""
        self._host = msgspec.structs.replace(self._host, draining=True)
        self.draining = True
        await self._renew()
        self.wake()

    async def emptied(self) -> None:
        """Wait until no runner is left on this host."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def end_vms(self) -> None:
        """End every VM of this host, and wait until all is given back; the jobs on them fail."""
        for live in self._lives.values():
            live.lose("the service was stopped, and its VMs with it", "host_stopped")
        await self.emptied()

    @property
    def driven(self) -> int:
        """Runners on this host that are not gone."""
        return len(self._tasks)

    @property
    def vms(self) -> int:
        """VMs that runners of this process hold now."""
        return sum(live.vm is not None for live in self._lives.values())

    @property
    def room(self) -> int:
        """VMs this host could still take."""
        return max(0, self._host.max_vms - len(self._tasks))

    # ── life ─────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Say that this host is here, adopt what runs, and go on with every runner of ours."""
        mine = await self._renew()
        adopted = {vm.record.metadata.get("runner_id", vm.id): vm for vm in await self._hypervisor.adopt()}
        for runner in mine:
            live = self._lives[runner.id] = Live(runner.id)
            await self._take_up(runner, live, adopted.get(runner.id))
        self._orphans = {vm.id for vm in adopted.values()} - {
            live.vm.id for live in self._lives.values() if live.vm is not None
        }
        log.info("recovered", runners=len(mine), adopted=len(adopted))
        for runner in mine:
            self._drive_soon(runner)

    async def _take_up(self, runner: Runner, live: Live, vm: RunnerVm | None) -> None:
        """Match a row with the VM it had. What is missing is said as a fact; the handlers do the rest."""
        if vm is not None:
            live.take_vm(vm)
            live.changes["vm_id"] = vm.id
            live.note(runner, self._clock(), "adopted", f"VM {vm.id} after a restart of the service")
        if runner.state in ("registering", "idle", "busy"):
            if vm is None:
                live.ending = self._hypervisor.ending(runner.vm_id) if runner.vm_id is not None else None
                how = f": {live.ending.reason}" if live.ending is not None else ""
                live.lose(f"the VM did not survive the restart of the service{how}")
            elif not await self._attached(runner, live):
                live.lose("the runner process is not there any more", "runner_lost")

    async def _attached(self, runner: Runner, live: Live) -> bool:
        try:
            return await self._flow.attach(runner, live)
        except VmmError as error:
            log.warning("attach_failed", runner=runner.id, error=str(error))
            return False

    async def run(self) -> None:
        """Pass after pass until cancelled. Call ``start`` first."""
        while True:
            self._woken.clear()
            try:
                await self._pass()
                await self._housekeeping()
            except Exception as error:
                log.exception("pass_failed", error=str(error))
                self._metrics.reasons.labels("pass_failed").inc()
                await asyncio.sleep(1.0)
                continue
            if not self._again:
                await self._rest()

    async def stop(self) -> None:
        """End all tasks; VMs and registrations stay as they are, the rows tell how to go on."""
        tasks, lives = list(self._tasks.values()), list(self._lives.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(live.stop() for live in lives))

    async def _rest(self) -> None:
        now = self._clock()
        brakes = (max(0.05, brake.until - now) for brake in self._brakes.values() if brake.until > now)
        due = min((self._tick, *brakes))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(due):
                await self._woken.wait()

    # ── deciding ─────────────────────────────────────────────────────────────────────────────────

    async def _pass(self) -> None:
        started = time.perf_counter()
        if self._renew_now:
            self._renew_now = False
            await self._renew()
        look_again = self._clock() - self._looked_again >= _LOOK_AGAIN
        taken: list[JobEvent] = []

        def observed() -> list[JobEvent]:
            taken.extend(self._observed)
            self._observed.clear()
            return taken

        try:
            decision = await self._store.write(
                lambda db: self._decider.decide(
                    db, observed=observed, brakes=self._brakes, look_again=look_again
                )
            )
        except BaseException:
            self._observed.extendleft(reversed(taken))
            raise
        if look_again:
            self._looked_again = self._clock()
        for runner in decision.started:
            if runner.host == self._host.name:
                self._lives[runner.id] = Live(runner.id)
                self._drive_soon(runner)
        for runner_id in decision.touched:
            if runner_id in self._lives:
                self._lives[runner_id].wake()
        if decision.moved:
            self._moved()
        self._again = decision.more
        self.draining = decision.draining
        self._count(decision, time.perf_counter() - started)

    def _count(self, decision: Decision, seconds: float) -> None:
        self._metrics.passes.observe(seconds)
        self._metrics.told(decision.lines)
        for outcome, count in decision.outcomes.items():
            self._metrics.events.labels(outcome).inc(count)
        for state, count in decision.entered.items():
            self._metrics.jobs.labels(state).inc(count)
        for via, count in decision.found.items():
            self._metrics.found.labels(via).inc(count)
        for reason in decision.reasons:
            self._metrics.reasons.labels(reason).inc()
        self._metrics.vms.set(self.vms)
        self._metrics.room.set(self.room)

    async def _housekeeping(self) -> None:
        """Every tick: leases, this host's sign of life, the reaper; every hour: forget what is old."""
        now = self._clock()
        if now - self._reaper.last_pass < self._tick:
            return
        mine = await self._renew()
        if now - self._forgot >= _FORGET_EVERY:
            self._forgot = now
            await self._store.write(lambda db: q.forget(db, now - self._keep))
            await asyncio.to_thread(self._prune_logs, now - self._keep)
        for runner in mine:
            # A lease that ran out elsewhere, or a task that ended by a bug: nobody else goes on with it.
            current = await self._reread(runner) if runner.id not in self._tasks else None
            if current is not None and runner.id not in self._tasks:
                live = self._lives[runner.id] = Live(runner.id)
                live.lose("the service lost track of it")
                self._drive_soon(current)
        self._brakes = {g: b for g, b in self._brakes.items() if b.until > now - 600.0}
        # VMs of programs that died meanwhile come to us: the engine ends them in time, the reaper ours at once.
        self._orphans |= {vm.id for vm in await self._hypervisor.adopt()}
        await self._reaper.sweep({runner.id for runner in mine} | set(self._lives), self._orphans, now)
        self._metrics.rss.set(resident_bytes())

    async def _renew(self) -> list[Runner]:
        """Say that this host lives, and keep or take the leases of its runners."""
        now = self._clock()

        async def work(db: AsyncConnection) -> list[Runner]:
            await q.save_host(db, self._host, now)
            return await q.renew_leases(db, self._host.name, now, now + _LEASE)

        return await self._store.write(work)

    # ── driving one runner ───────────────────────────────────────────────────────────────────────

    def _drive_soon(self, runner: Runner) -> None:
        task = asyncio.create_task(self._drive(runner), name=f"runner-{runner.id}")
        self._tasks[runner.id] = task
        task.add_done_callback(lambda _: self._driven(runner.id))

    def _driven(self, runner_id: str) -> None:
        self._tasks.pop(runner_id, None)
        self._lives.pop(runner_id, None)
        self.wake()

    async def _drive(self, runner: Runner) -> None:
        live = self._lives[runner.id]
        try:
            await self._live_out(runner, live)
        finally:
            await live.stop()

    async def _live_out(self, runner: Runner, live: Live) -> None:
        """Step after step until the runner is gone, or its row is not ours any more."""
        current: Runner | None = runner
        while current is not None:
            answer = await self._step(current, live)
            if isinstance(answer, Done):
                return
            current = await self._persist_surely(current, live, answer)
            if isinstance(answer, Wait) and current is not None:
                # A wait never outlasts the state's deadline; retiring minds its own.
                until = answer.until if current.state == "retiring" else min(answer.until, current.deadline)
                await live.woken(until)
                current = await self._reread(current)
        log.warning("lease_lost", runner=runner.id)

    async def _step(self, runner: Runner, live: Live) -> Answer:
        """A step that answers always: an unexpected error is a reason to retire, or to try the retiring again."""
        try:
            if runner.state != "retiring":
                return await self._flow.step(runner, live)
            async with asyncio.timeout(_RETIRE_STEP_LIMIT):
                return await self._flow.step(runner, live)
        except Exception as error:
            log.exception("step_failed", runner=runner.id, state=runner.state)
            self._metrics.reasons.labels("internal_error").inc()
            now = self._clock()
            what = f"{type(error).__name__}: {error}"[:500]
            if live.said != what:
                live.said = what
                live.note(runner, now, "internal error", what)
            if runner.state == "retiring":
                return Wait(now + _ERROR_PAUSE, "another try")
            return Goto("retiring", f"internal error: {what}", "internal_error")

    async def _persist_surely(self, runner: Runner, live: Live, answer: Goto | Wait) -> Runner | None:
        """Persist, and when the database fails, keep trying: what was done must be written before going on."""
        while True:
            try:
                return await self._persist(runner, live, answer)
            except Exception as error:
                log.exception("persist_failed", runner=runner.id, error=str(error))
                await asyncio.sleep(1.0)

    async def _persist(self, runner: Runner, live: Live, answer: Goto | Wait) -> Runner | None:
        """One commit: the transition or the wait, what the step changed, and its timeline rows."""
        now = self._clock()
        values = dict(live.changes)
        lines = list(live.lines)
        ending = live.ending if not live.ending_kept else None
        if ending is not None:
            values["usage"] = ending.usage
        if isinstance(answer, Goto):
            values |= self._entering(answer, now)
            infra = code_of(answer.code, live.ending, live.exit) if runner.infra is None else None
            values |= {"infra": infra} if infra is not None else {}
            entered = msgspec.structs.replace(runner, **values)
            lines.append(timeline(entered, now, answer.state, answer.reason))
        else:
            if answer.for_ != runner.waits_for:
                values["waits_for"] = answer.for_
                lines.append(timeline(runner, now, "waiting", "", answer.for_))
            if not values and not lines:
                return runner
        if not values:
            values["waits_for"] = runner.waits_for

        step = q.Step(
            runner_id=runner.id,
            was=runner.state,
            owner=self._host.name,
            values=values,
            lines=lines,
            ending=Ending(runner.id, now, ending) if ending is not None else None,
        )
        if isinstance(answer, Goto):
            # Before it is written: a pass that sees the runner retiring must see the brake too.
            self._hold_or_release(runner, answer, now, live.retry_at)
        after = await self._steps.do(step)
        live.changes = {}
        live.lines = []
        if after is not None:
            self._metrics.told(lines)
        live.ending_kept = live.ending_kept or ending is not None
        if isinstance(answer, Goto) and after is not None:
            self._entered(runner, answer, now)
            if runner.infra is None and after.infra is not None:
                self._failed()
            if answer.state == "gone":
                self._metrics.spent(live.repository, live.ending, since=live.vm_since, now=now)
        return after

    def _entering(self, answer: Goto, now: float) -> dict[str, object]:
        values: dict[str, object] = {
            "state": answer.state,
            "state_at": now,
            "deadline": now + self._limits.by_state[answer.state],
            "waits_for": None,
        }
        if answer.state == "retiring":
            values |= {"code": answer.code, "reason": answer.reason[:2000]}
        if answer.state == "gone":
            values |= {"ended_at": now, "lease_owner": self._host.name}
        return values

    def _hold_or_release(self, runner: Runner, answer: Goto, now: float, retry_at: float | None) -> None:
        """A runner that failed holds its group back, one that served a job releases it."""
        failed = answer.state == "retiring" and runner.serving_job_id is None and answer.code not in BENIGN
        if answer.state == "busy" or (answer.state == "retiring" and answer.code == "runner_exited"):
            self._brakes.pop(runner.group_key, None)
        elif failed:
            reason, before = f"{answer.code}: {answer.reason[:300]}", self._brakes.get(runner.group_key)
            self._brakes[runner.group_key] = demand.brake(
                before, runner.state_at, now, reason, retry_at=retry_at
            )

    def _entered(self, runner: Runner, answer: Goto, now: float) -> None:
        """Count the transition; let others see the room or the need."""
        self._metrics.state_seconds.labels(runner.state).observe(max(0.0, now - runner.state_at))
        self._metrics.steps.labels(answer.state).observe(max(0.0, now - runner.event_at))
        log.info(
            "runner", runner=runner.id, state=answer.state, reason=answer.reason[:300], job=runner.job_id
        )
        if answer.state == "retiring":
            self._metrics.reasons.labels(answer.code).inc()
            self.wake()

    async def _reread(self, runner: Runner) -> Runner | None:
        """The row with the facts of now; None when it is not ours any more."""
        while True:
            try:
                found = await self._rows.do(runner.id)
            except Exception as error:
                log.exception("reread_failed", runner=runner.id, error=str(error))
                await asyncio.sleep(1.0)
            else:
                mine = found is not None and found.lease_owner == self._host.name and found.state != "gone"
                return found if mine else None


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
