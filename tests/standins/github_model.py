"""The things of the stand-in GitHub: repositories, runs, jobs, runners. Their lives are in github_state."""

import asyncio
import secrets
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True, eq=False)
class Repository:
    id: int
    owner: str
    name: str
    git_dir: Path
    private: bool
    default_branch: str
    organization: bool = True

    @property
    def full_name(self) -> str:
        return f"{self.owner}/{self.name}"


@dataclass(slots=True, eq=False)
class Runner:
    id: int
    name: str
    kind: str
    owner: str
    repo: str | None
    labels: list[str]
    work_folder: str
    created_at: float
    client_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    session: str | None = None
    version: str | None = None
    seen_at: float = 0.0
    polling: int = 0
    job: "Job | None" = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def online(self) -> bool:
        return self.session is not None

    @property
    def busy(self) -> bool:
        return self.job is not None

    def serves(self, repository: Repository) -> bool:
        if self.kind == "enterprise":
            return True
        if self.owner.lower() != repository.owner.lower():
            return False
        return self.kind == "organization" or (self.repo or "").lower() == repository.name.lower()

    def fits(self, labels: Iterable[str]) -> bool:
        return {label.lower() for label in labels} <= {label.lower() for label in self.labels}


@dataclass(slots=True, eq=False)
class Job:
    id: int
    run: "Run"
    key: str
    name: str
    labels: list[str]
    definition: dict[str, Any]
    attempt: int
    created_at: float
    environment: str | None = None
    status: str = "queued"
    conclusion: str | None = None
    runner_id: int | None = None
    runner_name: str | None = None
    assigned_at: float | None = None
    started_at: float | None = None
    completed_at: float | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    log: bytearray = field(default_factory=bytearray)
    log_cut: bool = False
    cancelled_at: float | None = None
    token: str = field(default_factory=lambda: "ghs_" + secrets.token_urlsafe(32))


@dataclass(slots=True, eq=False)
class Run:
    id: int
    number: int
    repository: Repository
    sha: str
    ref: str
    branch: str
    event: str
    workflow_name: str
    workflow_path: str
    commit: dict[str, Any]
    created_at: float
    attempt: int = 1
    pending: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)

    @property
    def latest(self) -> list[Job]:
        return [job for job in self.jobs if job.attempt == self.attempt]

    @property
    def status(self) -> str:
        states = {job.status for job in self.latest}
        if states <= {"completed"} and not self.pending:
            return "completed"
        if states & {"in_progress", "completed"}:
            return "in_progress"
        return "waiting" if "waiting" in states and "queued" not in states else "queued"

    @property
    def conclusion(self) -> str | None:
        if self.status != "completed":
            return None
        ends = {job.conclusion for job in self.latest}
        for worst in ("cancelled", "failure"):
            if worst in ends:
                return worst
        return "success"


@dataclass(slots=True)
class Times:
    """Seconds. GitHub's own; tests shorten them."""

    pick_up: float = 60.0
    registration: float = 300.0
    lost_runner: float = 600.0
    session: float = 60.0
    poll: float = 50.0
    queued: float = 24 * 3600.0
    cancel: float = 300.0
