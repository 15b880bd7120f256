"""The nouns of the control plane: jobs, runners, hosts, and the three answers a step can give."""

from typing import Literal

import msgspec

from vmm_core.machine import EgressRule, VmExit, VmUsage

JobState = Literal["waiting", "queued", "in_progress", "completed"]
Via = Literal["delivery", "poll", "asked"]
"""How something of a job was learned: a webhook told it, a look at the repository found it, or the forge was asked."""

RunnerState = Literal["wanted", "forking", "registering", "idle", "busy", "retiring", "gone"]

JOB_RANK: dict[JobState, int] = {"waiting": 0, "queued": 1, "in_progress": 2, "completed": 3}
"""Jobs only move to a higher rank. ``waiting`` (for an approval) is known but is not demand."""

STARTING_OR_IDLE: frozenset[RunnerState] = frozenset({"wanted", "forking", "registering", "idle"})
"""Runners that may still take a queued job, unless a job was seen on them already."""

WRITES_LOG: frozenset[RunnerState] = frozenset({"forking", "registering", "idle", "busy"})
"""Runners whose log may still grow."""


class Scope(msgspec.Struct, frozen=True):
    """Where a runner registers. ``path`` is ``owner/repo``, an organization or an enterprise."""

    kind: Literal["repository", "organization", "enterprise"]
    path: str

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.path}"


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What one event, or one look at the forge, says about a job. Times are Unix seconds. ``note`` is for its story."""

    forge: str
    forge_job_id: str
    owner: str
    repo: str
    state: JobState
    labels: tuple[str, ...]
    seen_at: float
    name: str = ""
    workflow: str = ""
    run_id: str = ""
    run_attempt: int = 1
    head_sha: str = ""
    head_branch: str = ""
    conclusion: str | None = None
    runner_name: str | None = None
    created_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    via: Via = "delivery"
    note: str = ""

    @property
    def job_id(self) -> str:
        return f"{self.forge}-{self.forge_job_id}"


class Push(msgspec.Struct, frozen=True, kw_only=True):
    """A branch of a repository moved to ``commit``; "" when it was deleted. ``default_branch`` may be unknown ("")."""

    forge: str
    owner: str
    repo: str
    branch: str
    commit: str
    default_branch: str = ""
    seen_at: float = 0.0


class Ignored(msgspec.Struct, frozen=True):
    """A delivery that changes no job; ``reason`` is a stable word for the counter."""

    reason: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job of a forge, as one row. ``waits_for`` says why a queued job has no runner yet.

    ``group_key`` is None while no template serves its labels. ``runner_id`` is the runner of ours
    that took it, ``runner_name`` whatever the forge named. ``event_at`` is the moment it was first seen queued.
    """

    id: str
    forge: str
    forge_job_id: str
    owner: str
    repo: str
    scope_kind: Literal["repository", "organization", "enterprise"]
    scope_path: str
    labels: tuple[str, ...]
    state: JobState
    event_at: float
    updated_at: float
    name: str = ""
    workflow: str = ""
    run_id: str = ""
    run_attempt: int = 1
    head_sha: str = ""
    head_branch: str = ""
    conclusion: str | None = None
    template: str | None = None
    group_key: str | None = None
    waits_for: str | None = None
    runner_id: str | None = None
    runner_name: str | None = None
    created_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None

    @property
    def scope(self) -> Scope:
        return Scope(self.scope_kind, self.scope_path)


class Runner(msgspec.Struct, frozen=True, kw_only=True):
    """One ephemeral registration and its VM, as one row; ``id`` is also its name at the forge.

    Only the runner's own task writes ``state``; others write facts (``serving_job_id``, ``job_done_at``,
    ``cancelled_at``, ``killed_at``), which are read before each step. ``code`` and ``reason`` say why it retires.
    ``digest`` is what it is forked from, ``parent`` the name of that when it is a repository's parent.
    ``usage`` is what its VM cost in all, once it has ended; ``infra`` is the code when infrastructure failed under it.
    """

    id: str
    forge: str
    scope_kind: Literal["repository", "organization", "enterprise"]
    scope_path: str
    labels: tuple[str, ...]
    group_key: str
    template: str
    memory_mib: int
    state: RunnerState
    state_at: float
    deadline: float
    created_at: float
    event_at: float
    job_id: str | None = None
    serving_job_id: str | None = None
    job_done_at: float | None = None
    cancelled_at: float | None = None
    killed_at: float | None = None
    host: str | None = None
    digest: str | None = None
    parent: str | None = None
    vm_id: str | None = None
    remote_id: str | None = None
    deregistered: bool = False
    waits_for: str | None = None
    code: str | None = None
    reason: str | None = None
    exit_code: int | None = None
    infra: str | None = None
    usage: VmUsage | None = None
    ended_at: float | None = None
    lease_owner: str | None = None
    lease_until: float | None = None
    vcpus: int = 1

    @property
    def scope(self) -> Scope:
        return Scope(self.scope_kind, self.scope_path)

    @property
    def covers(self) -> bool:
        """Whether it may still take a queued job of its group, or took one already that no event named yet."""
        took_one = self.state == "busy" and self.job_id is not None and self.job_done_at is None
        return (
            (self.state in STARTING_OR_IDLE or took_one)
            and self.serving_job_id is None
            and self.cancelled_at is None
            and self.killed_at is None
        )

    @property
    def takes_room(self) -> bool:
        """Whether it holds a place on its host."""
        if self.state == "retiring":
            return self.vm_id is not None
        return self.state not in ("wanted", "gone")


class TimelineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's story. ``ms`` counts from the event that asked for the job; None if unknown."""

    at: float
    job_id: str | None
    runner_id: str | None
    step: str
    reason: str = ""
    waits_for: str | None = None
    ms: float | None = None


class Ending(msgspec.Struct, frozen=True):
    """How a runner's VM ended, with the evidence; a row of its own, because it may be some KiB large."""

    runner_id: str
    at: float
    exit: VmExit


class Template(msgspec.Struct, frozen=True):
    """A machine a runner can be forked from. ``labels`` are further labels it serves (sizes, tools).

    ``need_mib`` is what one fork is expected to take of the host's memory; ``runner_dir`` is where the
    forge's runner lives in the guest, or None when the template has no runner; ``runner_files`` is where the
    files of its configuration are written, when that is elsewhere. ``allow`` is what its forks may reach; None
    when they have no network card. ``runner`` is the version of the forge's runner.
    """

    name: str
    digest: str
    labels: tuple[str, ...]
    need_mib: int
    runner_dir: str | None
    runner_files: str | None = None
    allow: tuple[EgressRule, ...] | None = ()
    runner: str | None = None
    vcpus: int = 1


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """The warm parent of one branch of a repository: a machine like a template, and what it was made from.

    Its name is ``owner/repo@branch``; ``repository`` and ``owner`` are in lower case. ``base`` is the template it was
    baked on, ``base_digest`` what that was then. ``labels`` are those its repository's ``.microvm.yml`` asks for too.
    """

    machine: Template
    repository: str
    owner: str
    branch: str
    commit: str
    key: str
    base: str
    base_digest: str
    created_at: float

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def digest(self) -> str:
        return self.machine.digest


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """A repository that was heard of. ``name`` is ``owner/repo`` in lower case.

    ``used`` is when a job of it was last seen, ``moved_at`` when something of it changed that a bake may have to
    follow. ``trouble`` says why it cannot be looked at, when it cannot.
    """

    forge: str
    name: str
    owner: str
    repo: str
    seen_at: float
    default_branch: str | None = None
    used_at: float | None = None
    moved_at: float | None = None
    trouble: str | None = None


BakeState = Literal["queued", "baking", "done", "failed", "superseded"]


class BakeStep(msgspec.Struct, frozen=True):
    """A step of a bake and how long it took."""

    step: str
    seconds: float


class Bake(msgspec.Struct, frozen=True, kw_only=True):
    """One bake of one repository at one dependency key on one host, as one row; unique while queued or baking.

    queued ─► baking ─► done
       │ ▲       ├────► failed      after the last attempt: with the step, its last output and advice
       │ └───────┘ again later, or at once when the service stops
       └► superseded                its branch moved on before it began
    """

    id: int
    host: str
    forge: str
    repository: str
    branch: str
    commit: str
    key: str
    base: str
    base_digest: str
    state: BakeState
    why: str
    created_at: float
    due_at: float
    force: bool = False
    attempts: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    pid: int | None = None
    start_ticks: int | None = None
    digest: str | None = None
    cache_hit: bool | None = None
    incremental: bool | None = None
    seconds: float | None = None
    steps: tuple[BakeStep, ...] = ()
    code: str | None = None
    step: str | None = None
    message: str | None = None
    advice: str | None = None
    output: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the parent it makes."""
        return f"{self.repository}@{self.branch}"


class Host(msgspec.Struct, frozen=True):
    """A machine that runs VMs, and how much of it is promised already.

    ``memory_mib`` and ``cpus`` are what may be promised; ``cpus`` 0: vCPUs are not counted.
    """

    name: str
    max_vms: int
    memory_mib: int
    vms: int = 0
    used_mib: int = 0
    draining: bool = False
    cpus: int = 0
    vcpus: int = 0


class Held(msgspec.Struct, frozen=True):
    """A forge, or one account of it, to which no call is made before ``until`` (Unix seconds).

    ``reason`` begins with a stable code.
    """

    until: float
    reason: str


class RemoteRunner(msgspec.Struct, frozen=True):
    """A registration as the forge shows it."""

    remote_id: str
    name: str
    online: bool
    busy: bool


class Listing(msgspec.Struct, frozen=True):
    """The registrations of a scope; ``complete``: there are no others."""

    runners: tuple[RemoteRunner, ...]
    complete: bool


class Registration(msgspec.Struct, frozen=True):
    """An accepted just-in-time registration. ``files`` (name → content) are secret: in memory only."""

    remote_id: str
    files: dict[str, bytes]

    def __repr__(self) -> str:
        return f"Registration(remote_id={self.remote_id!r}, files=<{len(self.files)} secret files>)"


class Goto(msgspec.Struct, frozen=True):
    """The step is over: enter ``state``. ``code`` is the stable word for the reason."""

    state: RunnerState
    reason: str
    code: str = "ok"


class Wait(msgspec.Struct, frozen=True):
    """Nothing to do until the clock reads ``until`` (Unix seconds) or an event comes in."""

    until: float
    for_: str


class Done(msgspec.Struct, frozen=True):
    """The life of this runner is over."""


Answer = Goto | Wait | Done


def concluded(job: Job, conclusion: str, note: str, at: float) -> JobEvent:
    """The end of a job that its forge tells nothing of any more, as an event; ``note`` says how that is known."""
    return JobEvent(
        forge=job.forge,
        forge_job_id=job.forge_job_id,
        owner=job.owner,
        repo=job.repo,
        state="completed",
        labels=job.labels,
        seen_at=at,
        conclusion=conclusion,
        via="asked",
        note=note,
    )


def timeline(
    runner: Runner, at: float, step: str, reason: str = "", waits_for: str | None = None
) -> TimelineRow:
    """A line of ``runner``'s story, filed under the job it serves or was made for."""
    return TimelineRow(
        at=at,
        job_id=runner.serving_job_id or runner.job_id,
        runner_id=runner.id,
        step=step,
        reason=reason,
        waits_for=waits_for,
        ms=round((at - runner.event_at) * 1000, 1),
    )
