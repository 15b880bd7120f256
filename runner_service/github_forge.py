"""GitHub as the control plane sees a forge: registrations by name, runners by id, jobs as events."""

import time
from collections.abc import Callable, Sequence
from typing import Literal

from github_webhook import events, github
from github_webhook.app_auth import Auth
from github_webhook.app_auth import Scope as GitHubScope
from github_webhook.circuit import Circuits
from github_webhook.errors import AnswerInvalid, DeliveryRefused, JitConfigInvalid, NotInstalled, Suspended
from github_webhook.jit import decode
from github_webhook.patterns import fits
from github_webhook.rest import clone_url
from github_webhook.routes import Routes
from images.mirror import Credential
from runner_service.domain import (
    Held,
    Ignored,
    JobEvent,
    JobState,
    Listing,
    Push,
    Registration,
    RemoteRunner,
    Repository,
    Scope,
    Via,
)
from runner_service.repositories import Origin, OriginOf
from runner_service.settings import GitHubSettings
from runner_service.store.queries import InboxRow

FORGE = "github"
# Statuses of the REST API; those not named here (requested, pending, waiting) come before "queued".
_STATES: dict[str, JobState] = {"queued": "queued", "in_progress": "in_progress", "completed": "completed"}


class GitHubForge:
    """The ``Forge`` protocol over the REST client."""

    def __init__(
        self,
        client: github.GitHub,
        *,
        runner_group: Callable[[Scope], int] = lambda _scope: 1,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._group = runner_group
        self._clock = clock

    async def register(self, scope: Scope, *, name: str, labels: Sequence[str]) -> Registration:
        """A fresh registration. A name that exists is our own lost answer: it is replaced unless it is busy."""
        made = await self._client.generate_jit_config(
            _scope(scope), name=name, labels=labels, runner_group_id=self._group(scope), replace=True
        )
        try:
            files = decode(made.encoded_jit_config)
        except JitConfigInvalid as error:
            raise AnswerInvalid(f"the forge's just-in-time configuration cannot be used: {error}") from None
        return Registration(str(made.runner_id), files)

    async def find(self, scope: Scope, name: str) -> RemoteRunner | None:
        return _remote(await self._client.find_runner(_scope(scope), name))

    async def look(self, scope: Scope, remote_id: str) -> RemoteRunner | None:
        return _remote(await self._client.get_runner(_scope(scope), int(remote_id)))

    async def registrations(self, scope: Scope) -> Listing:
        """Everything registered in the scope, as far as a bounded number of pages goes."""
        found, complete = await self._client.runners(_scope(scope))
        return Listing(tuple(_shown(runner) for runner in found), complete)

    async def deregister(self, scope: Scope, remote_id: str) -> Literal["deleted", "gone", "busy"]:
        return await self._client.delete_runner(_scope(scope), int(remote_id))

    async def job(self, scope: Scope, forge_job_id: str, *, owner: str, repo: str) -> JobEvent | None:
        del scope
        found = await self._client.get_job(owner, repo, int(forge_job_id))
        return None if found is None else job_event(found, owner, repo, self._clock(), via="asked")

    def held(self, scope: Scope) -> Held | None:
        """Why nothing is registered in this scope now; None when nothing speaks against it."""
        held = self._client.held(_scope(scope))
        if held is None:
            return None
        return Held(held.until, f"{held.code}: {held.reason}")

    async def rerun(
        self, scope: Scope, forge_job_id: str, *, owner: str, repo: str, run_id: str, attempt: int
    ) -> Literal["asked", "not_over", "newer", "cancelled"]:
        """A run's attempt grows with each re-run: the order is given for one attempt, so it can not be given twice."""
        del scope
        run = await self._client.get_run(owner, repo, int(run_id))
        if run.attempt > attempt:
            return "newer"
        if run.status != "completed":
            return "not_over"
        if run.conclusion == "cancelled":
            return "cancelled"
        await self._client.rerun_job(owner, repo, int(forge_job_id))
        return "asked"


def origin_of(auth: Auth, api_url: str) -> OriginOf:
    """Where the forge's repositories are cloned from, each with a credential for that one."""

    async def origin(repository: Repository) -> Origin:
        credential = await auth.clone_credential(repository.owner, repository.repo)
        url = clone_url(api_url, repository.owner, repository.repo)
        return Origin(url, Credential(username=credential.username, password=credential.password))

    return origin


class Interpreter:
    """Reads stored deliveries; tells the credentials which installations come and go."""

    def __init__(self, routes: Routes | None = None, circuits: Circuits | None = None) -> None:
        self._routes = routes or Routes(())
        self._circuits = circuits or Circuits()

    def __call__(self, row: InboxRow) -> JobEvent | Push | Ignored:
        """What a stored delivery says about a job or a branch."""
        try:
            event = events.parse(row.event, row.payload)
        except DeliveryRefused as error:
            return Ignored(error.code)
        if isinstance(event, events.Ignored):
            return Ignored(event.reason)
        if isinstance(event, events.WorkflowJobEvent | events.PushEvent):
            if event.installation_id is not None:
                self._routes.learn(GitHubScope.repository(event.owner, event.repo), event.installation_id)
            return _event(event, row) if isinstance(event, events.WorkflowJobEvent) else _push(event, row)
        if isinstance(event, events.InstallationEvent):
            self._installation(event)
        return Ignored(row.event)

    def _installation(self, event: events.InstallationEvent) -> None:
        """Suspended or removed: its jobs wait from now on. Back again: they are served at once."""
        if event.action in ("deleted", "suspend"):
            self._routes.forget(event)
            gone = event.action == "deleted"
            what = f"the App's installation on {event.account} was {'removed' if gone else 'suspended'}"
            error = (NotInstalled if gone else Suspended)(f"{what}, as an event said")
            owner, _, repo = next(iter(event.repositories), "").partition("/")
            hint = GitHubScope.repository(owner, repo) if repo else None
            for bucket in self._routes.buckets(event):
                self._circuits.hold(bucket, error, hint)
        elif event.action in ("created", "unsuspend", "new_permissions_accepted"):
            for bucket in self._routes.buckets(event):
                self._circuits.lift(bucket)


def _event(event: events.WorkflowJobEvent, row: InboxRow) -> JobEvent:
    return JobEvent(
        forge=row.forge,
        forge_job_id=str(event.job_id),
        owner=event.owner,
        repo=event.repo,
        state=event.state,
        labels=event.labels,
        seen_at=row.received_at,
        name=event.name,
        workflow=event.workflow_name or "",
        run_id=str(event.run_id),
        run_attempt=event.run_attempt,
        head_sha=event.head_sha,
        head_branch=event.head_branch or "",
        conclusion=event.conclusion,
        runner_name=event.runner_name,
        created_at=event.created_at,
        started_at=event.started_at,
        completed_at=event.completed_at,
    )


def _push(event: events.PushEvent, row: InboxRow) -> Push | Ignored:
    branch = event.ref.removeprefix("refs/heads/")
    if branch == event.ref:
        return Ignored("tag")
    return Push(
        forge=row.forge,
        owner=event.owner,
        repo=event.repo,
        branch=branch,
        commit="" if event.deleted else event.after,
        default_branch=event.default_branch,
        seen_at=row.received_at,
    )


def scope_chooser(settings: GitHubSettings) -> Callable[[JobEvent | Push], Scope | None]:
    """Where a job's runner registers; None for a repository that is not to be served."""
    apps = settings.credentials

    def scope_of(event: JobEvent | Push) -> Scope | None:
        path = f"{event.owner}/{event.repo}"
        app = next((app for app in apps if not app.repositories or fits(path, app.repositories)), None)
        if app is None:
            return None
        if app.register_at == "organization":
            return Scope("organization", event.owner)
        return Scope("repository", path)

    return scope_of


def _scope(scope: Scope) -> GitHubScope:
    owner, _, repo = scope.path.partition("/")
    return GitHubScope(kind=scope.kind, owner=owner, repo=repo or None)


def _remote(runner: github.RemoteRunner | None) -> RemoteRunner | None:
    return None if runner is None else _shown(runner)


def _shown(runner: github.RemoteRunner) -> RemoteRunner:
    return RemoteRunner(str(runner.id), runner.name, runner.online, runner.busy)


def job_event(job: github.RemoteJob, owner: str, repo: str, now: float, *, via: Via) -> JobEvent:
    """What the REST API says about a job, as an event; ``via``: why it was asked."""
    return JobEvent(
        forge=FORGE,
        forge_job_id=str(job.id),
        owner=owner,
        repo=repo,
        state=_STATES.get(job.status, "waiting"),
        labels=job.labels,
        seen_at=now,
        via=via,
        name=job.name,
        workflow=job.workflow_name or "",
        run_id=str(job.run_id),
        run_attempt=job.run_attempt,
        head_sha=job.head_sha,
        head_branch=job.head_branch or "",
        conclusion=job.conclusion,
        runner_name=job.runner_name,
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
    )
