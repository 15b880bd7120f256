"""What the control plane needs from its neighbours, as narrow protocols; ``daemon.py`` plugs in the real ones."""

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from runner_service.domain import (
    JobEvent,
    Listing,
    Parent,
    Registration,
    RemoteRunner,
    Repository,
    Scope,
    Template,
)
from runner_service.poll_plan import Allowance
from vmm_core.machine import EgressRule, ExecResult, ForkTimings, Frozen, GuestFile, Output, VmExit, VmRecord


class GuestProcess(Protocol):
    """A command in a guest, as ``vmm_core.guest.channel.Process``."""

    def output(self) -> AsyncIterator[Output]: ...
    async def wait(self, *, timeout: float | None = None) -> ExecResult: ...


class RunnerVm(Protocol):
    """A running VM, as ``vmm_core.vm.RunningVm``."""

    @property
    def id(self) -> str: ...
    @property
    def record(self) -> VmRecord: ...

    timings: ForkTimings

    async def start(
        self,
        argv: Sequence[str],
        *,
        exec_id: str,
        user: str = "runner",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stdin: bool = False,
        timeout: float | None = None,
        files: Sequence[GuestFile] = (),
    ) -> GuestProcess: ...
    async def attach(self, exec_id: str, *, stdout_from: int = 0, stderr_from: int = 0) -> GuestProcess: ...
    async def wait(self) -> VmExit: ...
    async def freeze(self, *, ttl: float = ...) -> Frozen: ...
    async def destroy(self) -> None: ...


class Hypervisor(Protocol):
    """The engine of this host, as ``vmm_core.engine.Engine``."""

    def launch(
        self,
        parent: str,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
        allow: Sequence[EgressRule] | None = None,
        hostname: str | None = None,
        owner: str | None = None,
    ) -> Awaitable[RunnerVm]: ...
    def adopt(self) -> Awaitable[Sequence[RunnerVm]]: ...
    def records(self) -> list[VmRecord]: ...
    def destroy(self, vm_id: str) -> Awaitable[None]: ...
    def ending(self, vm_id: str) -> VmExit | None: ...


class Catalog(Protocol):
    """The templates and repositories' parents of this host; cheap enough to be asked for every decision."""

    def templates(self) -> Sequence[Template]: ...
    def parents(self) -> Sequence[Parent]: ...
    def has(self, digest: str) -> bool:
        """Whether the snapshot still exists, named or not."""
        ...

    def withdrawn(self, name: str) -> frozenset[str]:
        """The digests that a parent's name was rolled back from."""
        ...

    def touch(self, digest: str) -> None:
        """It was forked just now."""
        ...

    async def prune(self, *, budget_bytes: int | None, keep: int) -> None:
        """Make room among the parents."""
        ...


class Look(msgspec.Struct, frozen=True):
    """A repository as it is now. ``watched`` are the branches that get parents, with their commits.

    ``template`` is the base that its ``.microvm.yml`` names, if it does.
    """

    default_branch: str
    watched: dict[str, str]
    template: str | None = None


class CannotLookError(Exception):
    """A repository cannot be looked at: the message says what was tried, what happened and what to do."""

    code = "cannot_look"


class Repositories(Protocol):
    """The mirrors of repositories on this host. Raise CannotLookError; the caller sets the deadline."""

    async def look(self, repository: Repository) -> Look:
        """Fetch it and read what it wants."""
        ...

    async def keys(
        self, repository: Repository, commit: str, bases: Mapping[str, str | None]
    ) -> dict[str, str]:
        """The dependency key of a commit on each of ``bases`` (digest → version of the runner in it).

        Fetches only what the mirror does not have. Empty when the repository itself has no such commit.
        """
        ...

    async def on_branch(self, repository: Repository, commit: str, branch: str) -> bool:
        """Whether the commit is on that branch of the repository itself. Fetches as ``keys``."""
        ...


class Listed(msgspec.Struct, frozen=True):
    """What a look at a repository found. ``more``: it was not complete, go on there.

    ``calls`` were made, of which the forge counted ``paid`` against its rate limit.
    """

    jobs: tuple[JobEvent, ...]
    more: int | None = None
    calls: int = 1
    paid: int = 1


class Listings(Protocol):
    """What a forge lists when it is looked at. Every call ends within the client's time-outs, or raises ForgeError."""

    async def owners(self) -> Sequence[str]:
        """The accounts whose repositories must be asked for, since the settings do not name them."""
        ...

    async def repositories(self, owner: str) -> Sequence[tuple[str, str]]:
        """The repositories (owner, name) of such an account that the credentials reach."""
        ...

    async def untaken(self, owner: str, repo: str, *, after: int) -> Listed:
        """The jobs of a repository that no runner has taken; ``after``: go on behind what the last look ended with."""
        ...

    def allowance(self, owner: str) -> Allowance | None:
        """The rate limit of calls to what this owner has; None: nothing is known, or there is none."""
        ...


class Forge(Protocol):
    """One forge at one address. Every call ends within the client's own time-out, or raises ForgeError."""

    async def register(self, scope: Scope, *, name: str, labels: Sequence[str]) -> Registration:
        """A fresh registration; a left-over one of the same name is replaced."""
        ...

    async def find(self, scope: Scope, name: str) -> RemoteRunner | None:
        """The registration of this name, or None."""
        ...

    async def look(self, scope: Scope, remote_id: str) -> RemoteRunner | None:
        """The registration of this id, or None when the forge knows it no more."""
        ...

    async def registrations(self, scope: Scope) -> Listing:
        """All registrations of a scope. Raises NotFound when the forge knows no such scope."""
        ...

    async def deregister(self, scope: Scope, remote_id: str) -> Literal["deleted", "gone", "busy"]:
        """Remove a registration. ``busy``: the forge refuses, a job runs on it."""
        ...

    async def job(self, scope: Scope, forge_job_id: str, *, owner: str, repo: str) -> JobEvent | None:
        """What the forge says about a job now; None when it knows none."""
        ...

    async def rerun(
        self, scope: Scope, forge_job_id: str, *, owner: str, repo: str, run_id: str, attempt: int
    ) -> Literal["asked", "not_over", "newer", "cancelled"]:
        """Have a job of its run's ``attempt`` run again, if that is the newest attempt, over, and was not cancelled."""
        ...
