"""The GitHub client: just-in-time registrations, the runners that exist, and what GitHub says about jobs.

Every call ends within the time-out (twice that when a token must be had first; listings: per page) or raises a
ForgeError; see rest.py for what is repeated, circuit.py for when it is not made at all. Unknown fields in answers
are ignored.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Literal, TypeVar

import httpx
import msgspec

from github_webhook.app_auth import Auth, Scope
from github_webhook.circuit import Circuits, Held
from github_webhook.conditional import Conditional
from github_webhook.errors import (
    Conflict,
    ForgeError,
    NotFound,
    NotInstalled,
    RateLimited,
    Unauthorized,
    Unavailable,
    Unprocessable,
)
from github_webhook.events import seconds
from github_webhook.rest import Answer, Limit, Method, Rest, path

PER_PAGE = 100
MAX_PAGES = 50
MAX_LABELS = 100
MAX_LISTED = 10
MAX_RUNS = 200
"""Runs that one look at a repository goes into."""

_RUNNER_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
T = TypeVar("T")

JobStatus = Literal["queued", "in_progress", "completed", "waiting", "requested", "pending"]


class JitRegistration(msgspec.Struct, frozen=True):
    """An accepted just-in-time registration. ``encoded_jit_config`` is secret: in memory only."""

    runner_id: int
    name: str
    encoded_jit_config: str

    def __repr__(self) -> str:
        return f"JitRegistration(runner_id={self.runner_id}, name={self.name!r}, encoded_jit_config=<secret>)"

    def __rich_repr__(self) -> "list[tuple[str, object]]":
        return [("runner_id", self.runner_id), ("name", self.name)]


class RemoteRunner(msgspec.Struct, frozen=True):
    """A runner as GitHub shows it."""

    id: int
    name: str
    online: bool
    busy: bool
    labels: tuple[str, ...]
    ephemeral: bool | None = None


class RemoteJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job as GitHub's REST API shows it. Times are Unix seconds. It may lag behind the events."""

    id: int
    run_id: int
    run_attempt: int
    name: str
    workflow_name: str | None
    status: str
    conclusion: str | None
    labels: tuple[str, ...]
    head_sha: str
    head_branch: str | None
    runner_id: int | None
    runner_name: str | None
    created_at: float | None
    started_at: float | None
    completed_at: float | None
    html_url: str | None


class Untaken(msgspec.Struct, frozen=True):
    """What a look at a repository found. ``more``: not everything was looked at, go on there.

    ``calls`` were made, of which GitHub counted ``paid`` against the rate limit.
    """

    jobs: tuple[RemoteJob, ...]
    more: int | None
    calls: int
    paid: int


class _Count(msgspec.Struct):
    calls: int = 0
    paid: int = 0


class RemoteRun(msgspec.Struct, frozen=True):
    """A workflow run as GitHub shows it; each re-run of any of its jobs is another ``attempt``."""

    id: int
    status: str
    conclusion: str | None
    attempt: int


class _Label(msgspec.Struct):
    name: str


class _Runner(msgspec.Struct):
    id: int
    name: str
    status: str
    busy: bool
    labels: list[_Label] = []
    ephemeral: bool | None = None

    def public(self) -> RemoteRunner:
        return RemoteRunner(
            self.id,
            self.name,
            self.status == "online",
            self.busy,
            tuple(label.name for label in self.labels),
            self.ephemeral,
        )


class _Jit(msgspec.Struct):
    runner: _Runner
    encoded_jit_config: str


class _Runners(msgspec.Struct):
    total_count: int
    runners: list[_Runner]


class _Run(msgspec.Struct):
    id: int


class _RunState(msgspec.Struct):
    id: int
    status: str | None
    conclusion: str | None
    run_attempt: int = 1


class _Runs(msgspec.Struct):
    total_count: int
    workflow_runs: list[_Run]


class _Job(msgspec.Struct):
    id: int
    run_id: int
    name: str
    status: str
    head_sha: str
    labels: list[str]
    conclusion: str | None = None
    run_attempt: int | None = None
    workflow_name: str | None = None
    head_branch: str | None = None
    runner_id: int | None = None
    runner_name: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    html_url: str | None = None

    def public(self) -> RemoteJob:
        return RemoteJob(
            id=self.id,
            run_id=self.run_id,
            run_attempt=self.run_attempt or 1,
            name=self.name,
            workflow_name=self.workflow_name,
            status=self.status,
            conclusion=self.conclusion,
            labels=tuple(self.labels),
            head_sha=self.head_sha,
            head_branch=self.head_branch,
            runner_id=self.runner_id or None,
            runner_name=self.runner_name or None,
            created_at=seconds(self.created_at),
            started_at=seconds(self.started_at),
            completed_at=seconds(self.completed_at),
            html_url=self.html_url,
        )


class _Jobs(msgspec.Struct):
    total_count: int
    jobs: list[_Job]


_jit = msgspec.json.Decoder(_Jit)
_runner = msgspec.json.Decoder(_Runner)
_runners = msgspec.json.Decoder(_Runners)
_run = msgspec.json.Decoder(_RunState)
_runs = msgspec.json.Decoder(_Runs)
_job = msgspec.json.Decoder(_Job)
_jobs = msgspec.json.Decoder(_Jobs)
_TAKEN = frozenset({"in_progress", "completed"})


class GitHub:
    """One GitHub (github.com or a GitHub Enterprise Server) with one set of credentials.

    ``base_url`` is the REST address (``rest.api_base_url`` makes it from a server's address);
    ``timeout`` is in seconds, for one call with all its tries. The caller owns ``http``.
    """

    def __init__(
        self,
        *,
        auth: Auth,
        http: httpx.AsyncClient,
        base_url: str = "https://api.github.com",
        timeout: float = 10.0,
        circuits: Circuits | None = None,
    ) -> None:
        self._auth = auth
        self._rest = Rest(base_url, http, timeout=timeout)
        self._timeout = timeout
        self.circuits = circuits or Circuits()
        self._conditional = Conditional()

    def limit(self, owner: str) -> Limit | None:
        """The primary rate limit for calls to what ``owner`` has, as GitHub told it last; None: nothing is known."""
        return self._rest.limit(self._auth.bucket(Scope.organization(owner)))

    def held(self, scope: Scope) -> Held | None:
        """Why registrations in this scope are not asked for now; None when they may be."""
        bucket = self._auth.bucket(scope)
        held = self.circuits.held(bucket, _place(bucket, scope))
        until = self._rest.limited_until(bucket, creating=True)
        if held is None and until is not None:
            return Held(bucket, RateLimited.code, "GitHub's rate limit is reached", until, until)
        return held

    async def probe(self, scope: Scope) -> None:
        """One cheap call with this scope's credentials; what it says is kept in ``circuits``. Never raises."""
        with contextlib.suppress(ForgeError):
            await self._call("GET", f"{scope.path}/actions/runners", scope, params={"per_page": "1"})

    async def generate_jit_config(
        self,
        scope: Scope,
        *,
        name: str,
        labels: Sequence[str],
        runner_group_id: int = 1,
        work_folder: str = "_work",
        replace: bool = False,
    ) -> JitRegistration:
        """Register an ephemeral runner that takes at most one job.

        Never repeated by itself: after Unavailable the runner may exist. Its configuration can not be had a
        second time, so Conflict (the name exists: usually our own lost answer) needs the old one gone first;
        ``replace`` does that, once. It still raises Conflict when the old one is busy with a job.
        """
        if not _RUNNER_NAME.fullmatch(name):
            raise ValueError(f"a runner's name has 1 to 64 letters, digits, '.', '_' or '-': {name!r}")
        if not 1 <= len(labels) <= MAX_LABELS:
            raise ValueError(f"a registration takes 1 to {MAX_LABELS} labels, not {len(labels)}")
        body = {
            "name": name,
            "runner_group_id": runner_group_id,
            "labels": list(labels),
            "work_folder": work_folder,
        }
        target = f"{scope.path}/actions/runners/generate-jitconfig"
        try:
            answer = await self._call("POST", target, scope, body=body)
        except Conflict:
            if not replace or not await self._remove(scope, name):
                raise
            answer = await self._call("POST", target, scope, body=body)
        made = answer.read(_jit)
        return JitRegistration(made.runner.id, made.runner.name, made.encoded_jit_config)

    async def find_runner(self, scope: Scope, name: str) -> RemoteRunner | None:
        """The runner of exactly this name (GitHub compares without case), or None."""
        # Older servers ignore the filter, so every page is looked through.
        async for page in self._pages(f"{scope.path}/actions/runners", scope, _runners, {"name": name}):
            for runner in page.runners:
                if runner.name.lower() == name.lower():
                    return runner.public()
            if len(page.runners) < PER_PAGE:
                break
        return None

    async def runners(self, scope: Scope) -> tuple[list[RemoteRunner], bool]:
        """The runners of a scope, and whether these are all: at most ``MAX_LISTED`` pages are read."""
        found: list[RemoteRunner] = []
        number = 0
        async for page in self._pages(f"{scope.path}/actions/runners", scope, _runners, {}):
            number += 1
            found += [runner.public() for runner in page.runners]
            if len(page.runners) < PER_PAGE:
                return found, True
            if number == MAX_LISTED:
                break
        return found, False

    async def get_runner(self, scope: Scope, runner_id: int) -> RemoteRunner | None:
        """The runner, or None when GitHub knows it no more (an ephemeral one goes with its job)."""
        try:
            answer = await self._call("GET", f"{scope.path}/actions/runners{path(runner_id)}", scope)
        except NotFound:
            return None
        return answer.read(_runner).public()

    async def delete_runner(self, scope: Scope, runner_id: int) -> Literal["deleted", "gone", "busy"]:
        """Deregister. ``busy``: GitHub refuses, because a job runs on it, and that is the truth."""
        try:
            await self._call("DELETE", f"{scope.path}/actions/runners{path(runner_id)}", scope)
        except NotFound:
            return "gone"
        except Unprocessable:
            return "busy"
        return "deleted"

    async def get_job(self, owner: str, repo: str, job_id: int) -> RemoteJob | None:
        """What GitHub says about a job now; None when it knows none of that id."""
        scope = Scope.repository(owner, repo)
        try:
            answer = await self._call("GET", f"{scope.path}/actions/jobs{path(job_id)}", scope)
        except NotInstalled:
            raise
        except NotFound:
            return None
        return answer.read(_job).public()

    async def get_run(self, owner: str, repo: str, run_id: int) -> RemoteRun:
        """A run and its newest attempt. Raises NotFound when GitHub knows none of that id."""
        scope = Scope.repository(owner, repo)
        found = (await self._call("GET", f"{scope.path}/actions/runs{path(run_id)}", scope)).read(_run)
        return RemoteRun(found.id, found.status or "", found.conclusion, found.run_attempt)

    async def untaken_jobs(self, owner: str, repo: str, *, after: int = 0) -> Untaken:
        """The jobs of a repository that no runner has yet (queued, or waiting for an approval), oldest run first.

        Three calls, and one more per unfinished run; what has not changed since the last time is not counted by
        GitHub. At most ``MAX_RUNS`` runs are looked into, beginning behind the run ``after``: ``Untaken.more`` is where
        to go on. Runs in progress are among them, since some of their jobs may still be queued, and so are waiting
        ones: a run is as far as its least advanced job. Raises a ForgeError.
        """
        scope = Scope.repository(owner, repo)
        count = _Count()
        runs: set[int] = set()
        for status in ("queued", "in_progress", "waiting"):
            asked = {"status": status, "exclude_pull_requests": "true"}
            async for page in self._kept_pages(f"{scope.path}/actions/runs", scope, _run_ids, asked, count):
                runs.update(page)
        todo, more = _some(sorted(runs), after)
        found: dict[int, RemoteJob] = {}
        for run_id in todo:
            target = f"{scope.path}/actions/runs{path(run_id)}/jobs"
            async for page in self._kept_pages(target, scope, _untaken, {"filter": "latest"}, count):
                found.update((job.id, job) for job in page)
        return Untaken(tuple(found.values()), more, count.calls, count.paid)

    async def rerun_job(self, owner: str, repo: str, job_id: int) -> None:
        """Ask for a job, and those that need it, to run again. Raises Forbidden while its run is not over."""
        scope = Scope.repository(owner, repo)
        await self._call("POST", f"{scope.path}/actions/jobs{path(job_id)}/rerun", scope)

    async def _remove(self, scope: Scope, name: str) -> bool:
        existing = await self.find_runner(scope, name)
        return existing is None or await self.delete_runner(scope, existing.id) != "busy"

    async def _pages(
        self, target: str, scope: Scope, decoder: "msgspec.json.Decoder[T]", params: Mapping[str, str]
    ) -> AsyncIterator[T]:
        for number in range(1, MAX_PAGES + 1):
            asked = {**params, "per_page": str(PER_PAGE), "page": str(number)}
            yield (await self._call("GET", target, scope, params=asked)).read(decoder)

    async def _kept_pages(
        self,
        target: str,
        scope: Scope,
        read: "Callable[[Answer], tuple[Sequence[T], int]]",
        params: Mapping[str, str],
        count: _Count,
    ) -> AsyncIterator[Sequence[T]]:
        """What ``read`` takes from each page, of which it also tells the length; unchanged ones are not read again."""
        bucket = self._auth.bucket(scope)
        for number in range(1, MAX_PAGES + 1):
            asked = {**params, "per_page": str(PER_PAGE), "page": str(number)}
            kept = self._conditional.find(bucket, target, asked)
            answer = await self._call("GET", target, scope, params=asked, etag=kept.etag if kept else None)
            count.calls += 1
            if kept is not None and answer.unchanged:
                items, length = kept.items, kept.length
            else:
                count.paid += 1
                items, length = read(answer)
                self._conditional.keep(bucket, target, asked, answer.etag, items, length)
            yield items
            if length < PER_PAGE:
                break

    async def _call(
        self,
        method: Method,
        target: str,
        scope: Scope,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        etag: str | None = None,
    ) -> Answer:
        bucket = self._auth.bucket(scope)
        where = _place(bucket, scope)
        self.circuits.admit(bucket, where)
        try:
            async with asyncio.timeout(self._timeout * 2):
                answer = await self._authorized(method, target, scope, params, body, etag)
        except TimeoutError:
            error = Unavailable(
                f"{method} {target}: no complete answer within {self._timeout * 2:g} s", retryable=True
            )
            self.circuits.failed(bucket, error, place=where, hint=scope)
            raise error from None
        except ForgeError as error:
            self.circuits.failed(bucket, error, place=where, hint=scope)
            raise
        except BaseException:
            self.circuits.abandoned(bucket, where)
            raise
        self.circuits.answered(bucket, where)
        return answer

    async def _authorized(
        self,
        method: Method,
        target: str,
        scope: Scope,
        params: Mapping[str, str] | None,
        body: object,
        etag: str | None,
    ) -> Answer:
        bucket = self._auth.bucket(scope)
        headers = await self._auth.headers(scope)
        try:
            return await self._rest.call(
                method, target, headers=headers, bucket=bucket, params=params, body=body, etag=etag
            )
        except Unauthorized:
            # A 401 means that nothing happened, so even a POST may be sent again, with a fresh token.
            if not await self._auth.refused(scope, headers):
                raise
        headers = await self._auth.headers(scope)
        return await self._rest.call(
            method, target, headers=headers, bucket=bucket, params=params, body=body, etag=etag
        )


def _place(bucket: str, scope: Scope) -> str:
    """The scope itself, where only that has trouble."""
    return f"{bucket} {scope.path}"


def _run_ids(answer: Answer) -> tuple[Sequence[int], int]:
    page = answer.read(_runs)
    return tuple(run.id for run in page.workflow_runs), len(page.workflow_runs)


def _untaken(answer: Answer) -> tuple[Sequence[RemoteJob], int]:
    page = answer.read(_jobs)
    return tuple(job.public() for job in page.jobs if job.status not in _TAKEN), len(page.jobs)


def _some(runs: Sequence[int], after: int) -> tuple[Sequence[int], int | None]:
    """At most ``MAX_RUNS`` of ``runs`` behind ``after``, and behind which to go on when there are others."""
    rest = [run for run in runs if run > after]
    if len(rest) > MAX_RUNS:
        return rest[:MAX_RUNS], rest[MAX_RUNS - 1]
    return rest, None
