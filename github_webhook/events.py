"""Turns a verified delivery into a typed event: strict about what we use, blind to everything else.

Field meanings are those of GitHub's "Webhook events and payloads"; the eight official ``workflow_job``
examples are parsed in the unit tests. ``action`` and ``status`` are kept apart, because a job that waits
for an environment's approval is sent as ``action: queued`` with ``status: waiting``.
"""

import re
from datetime import datetime
from typing import Literal

import msgspec

from github_webhook.errors import PayloadInvalid, PayloadNotJson, UnknownEvent

JobAction = Literal["queued", "waiting", "in_progress", "completed"]
JobState = Literal["waiting", "queued", "in_progress", "completed"]

KNOWN_EVENTS = frozenset({"workflow_job", "ping", "push", "installation"})
"""What is stored."""

UNWANTED_EVENTS = frozenset({"installation_repositories", "installation_target", "github_app_authorization"})
"""What GitHub sends to every App without being asked and cannot be told to stop: acknowledged, not stored."""

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_REPO = re.compile(r"[A-Za-z0-9._-]{1,100}")
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class WorkflowJobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one job. Times are Unix seconds. ``runner_id`` 0 and an empty name become None."""

    action: JobAction
    status: str
    owner: str
    repo: str
    job_id: int
    run_id: int
    run_attempt: int
    name: str
    workflow_name: str | None
    head_sha: str
    head_branch: str | None
    labels: tuple[str, ...]
    conclusion: str | None
    runner_id: int | None
    runner_name: str | None
    runner_group_name: str | None
    created_at: float | None
    started_at: float | None
    completed_at: float | None
    html_url: str | None
    organization: str | None
    installation_id: int | None
    environment: str | None

    @property
    def state(self) -> JobState:
        """Where the job stands. A job is demand only when action *and* status say queued."""
        if self.action in ("completed", "in_progress"):
            return self.action
        if self.action == "queued" and self.status == "queued":
            return "queued"
        return "waiting"


class PingEvent(msgspec.Struct, frozen=True):
    """The hook was set up, or somebody pressed "ping". ``events`` are those it is subscribed to."""

    hook_id: int
    zen: str
    events: tuple[str, ...]


class PushEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A ref moved. ``after`` is forty zeros when it was deleted."""

    owner: str
    repo: str
    ref: str
    before: str
    after: str
    deleted: bool
    default_branch: str
    installation_id: int | None

    @property
    def on_default_branch(self) -> bool:
        return not self.deleted and self.ref == f"refs/heads/{self.default_branch}"


class InstallationEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An App was installed, changed or removed on ``account``; ``app_id`` and ``client_id`` say which, if known."""

    action: str
    installation_id: int
    account: str
    repositories: tuple[str, ...]
    app_id: int | None = None
    client_id: str | None = None


class Ignored(msgspec.Struct, frozen=True):
    """A sound delivery that changes nothing; ``reason`` is a stable word."""

    reason: str


Event = WorkflowJobEvent | PingEvent | PushEvent | InstallationEvent | Ignored


def parse(event_name: str, payload: bytes) -> Event:
    """The event in ``payload``. Raises UnknownEvent, PayloadNotJson or PayloadInvalid."""
    if event_name in UNWANTED_EVENTS:
        return Ignored("unwanted_event")
    reader = _READERS.get(event_name)
    if reader is None:
        known = ", ".join(sorted(KNOWN_EVENTS))
        raise UnknownEvent(
            f"the event {_shown(event_name)} is not handled here; subscribe the hook to: {known}"
        )
    try:
        return reader(payload)
    except msgspec.ValidationError as error:
        raise PayloadInvalid(f"{event_name}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PayloadNotJson(f"{event_name}: not well-formed JSON ({type(error).__name__})") from None


class _Repository(msgspec.Struct):
    full_name: str
    default_branch: str = ""

    def split(self) -> tuple[str, str]:
        """Owner and name; both end up in addresses, so nothing else than GitHub allows may pass."""
        owner, _, repo = self.full_name.partition("/")
        if not _OWNER.fullmatch(owner) or not _REPO.fullmatch(repo) or repo in (".", ".."):
            raise msgspec.ValidationError("not a repository name - at `$.repository.full_name`")
        return owner, repo


class _Installation(msgspec.Struct):
    id: int


class _Login(msgspec.Struct):
    login: str


class _Job(msgspec.Struct):
    id: int
    run_id: int
    name: str
    head_sha: str
    status: str
    labels: list[str]
    conclusion: str | None = None
    run_attempt: int | None = None
    workflow_name: str | None = None
    head_branch: str | None = None
    runner_id: int | None = None
    runner_name: str | None = None
    runner_group_name: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    html_url: str | None = None


class _Deployment(msgspec.Struct):
    environment: str | None = None


class _WorkflowJobPayload(msgspec.Struct):
    action: str
    workflow_job: _Job
    repository: _Repository
    organization: _Login | None = None
    installation: _Installation | None = None
    deployment: _Deployment | None = None


class _Hook(msgspec.Struct):
    events: list[str] = []


class _PingPayload(msgspec.Struct):
    hook_id: int
    zen: str = ""
    hook: _Hook | None = None


class _PushPayload(msgspec.Struct):
    ref: str
    before: str
    after: str
    repository: _Repository
    deleted: bool = False
    installation: _Installation | None = None


class _Account(msgspec.Struct):
    login: str | None = None
    slug: str | None = None  # an enterprise has a slug and no login


class _FullInstallation(msgspec.Struct):
    id: int
    account: _Account | None = None
    app_id: int | None = None
    client_id: str | None = None


class _InstallationRepository(msgspec.Struct):
    full_name: str


class _InstallationPayload(msgspec.Struct):
    action: str
    installation: _FullInstallation
    repositories: list[_InstallationRepository] | None = None


_workflow_job = msgspec.json.Decoder(_WorkflowJobPayload)
_ping = msgspec.json.Decoder(_PingPayload)
_push = msgspec.json.Decoder(_PushPayload)
_installation = msgspec.json.Decoder(_InstallationPayload)


def _read_workflow_job(payload: bytes) -> Event:
    data = _workflow_job.decode(payload)
    job = data.workflow_job
    owner, repo = data.repository.split()
    if not _SHA.fullmatch(job.head_sha):
        raise msgspec.ValidationError("not a commit id - at `$.workflow_job.head_sha`")
    if data.action not in ("queued", "waiting", "in_progress", "completed"):
        return Ignored("unknown_action")
    return WorkflowJobEvent(
        action=data.action,
        status=job.status,
        owner=owner,
        repo=repo,
        job_id=job.id,
        run_id=job.run_id,
        run_attempt=job.run_attempt or 1,
        name=job.name,
        workflow_name=job.workflow_name,
        head_sha=job.head_sha,
        head_branch=job.head_branch,
        labels=tuple(job.labels),
        conclusion=job.conclusion,
        runner_id=job.runner_id or None,
        runner_name=job.runner_name or None,
        runner_group_name=job.runner_group_name or None,
        created_at=seconds(job.created_at),
        started_at=seconds(job.started_at),
        completed_at=seconds(job.completed_at),
        html_url=job.html_url,
        organization=data.organization.login if data.organization else None,
        installation_id=data.installation.id if data.installation else None,
        environment=data.deployment.environment if data.deployment else None,
    )


def _read_ping(payload: bytes) -> Event:
    data = _ping.decode(payload)
    return PingEvent(data.hook_id, data.zen, tuple(data.hook.events) if data.hook else ())


def _read_push(payload: bytes) -> Event:
    data = _push.decode(payload)
    owner, repo = data.repository.split()
    if not _SHA.fullmatch(data.after) or not _SHA.fullmatch(data.before):
        raise msgspec.ValidationError("not a commit id - at `$.after` or `$.before`")
    return PushEvent(
        owner=owner,
        repo=repo,
        ref=data.ref,
        before=data.before,
        after=data.after,
        deleted=data.deleted,
        default_branch=data.repository.default_branch,
        installation_id=data.installation.id if data.installation else None,
    )


def _read_installation(payload: bytes) -> Event:
    data = _installation.decode(payload)
    account = data.installation.account
    return InstallationEvent(
        action=data.action,
        installation_id=data.installation.id,
        account=(account.login or account.slug or "") if account else "",
        repositories=tuple(repository.full_name for repository in data.repositories or ()),
        app_id=data.installation.app_id,
        client_id=data.installation.client_id,
    )


_READERS = {
    "workflow_job": _read_workflow_job,
    "ping": _read_ping,
    "push": _read_push,
    "installation": _read_installation,
}


def seconds(moment: datetime | None) -> float | None:
    """Unix seconds of a moment, None for none."""
    return None if moment is None else moment.timestamp()


def _shown(word: str) -> str:
    return repr(word[:64])
