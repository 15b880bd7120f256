"""What GitHub lists for whoever polls: repositories in reach, their untaken jobs, and the rate limit of that."""

import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from github_webhook.errors import ForgeError
from github_webhook.github import GitHub
from github_webhook.patterns import fits, owner_fits
from github_webhook.reach import Reach
from runner_service.github_forge import job_event
from runner_service.poll_plan import Allowance
from runner_service.ports import Listed
from runner_service.settings import GitHubSettings

log = structlog.get_logger("github")

_WILD = frozenset("*?[")


class Reached(msgspec.Struct, frozen=True):
    """Credentials that reach more than the settings name, and the patterns of what is served with them."""

    name: str
    reach: Reach
    patterns: tuple[str, ...]


class GitHubListings:
    """The ``Listings`` protocol over the REST client; ``reached`` are those credentials that must be asked."""

    def __init__(
        self, client: GitHub, reached: Sequence[Reached], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._client = client
        self._reached = reached
        self._clock = clock
        self._whose: dict[str, list[Reached]] = {}

    async def owners(self) -> list[str]:
        """The accounts of all credentials. Raises the ForgeError of the last ones when none could be asked."""
        found: dict[str, list[Reached]] = {}
        names: dict[str, str] = {}
        trouble: ForgeError | None = None
        for one in self._reached:
            try:
                owners = await one.reach.owners()
            except ForgeError as error:
                # Of these credentials only: what they reached last time is still looked at.
                trouble = error
                log.warning("owners_unknown", credentials=one.name, code=error.code, error=str(error)[:300])
                continue
            for owner in owners:
                if not one.patterns or owner_fits(owner, one.patterns):
                    names[owner.lower()] = owner
                    found.setdefault(owner.lower(), []).append(one)
        if trouble is not None and not found:
            raise trouble
        self._whose |= found
        return list(names.values())

    async def repositories(self, owner: str) -> list[tuple[str, str]]:
        return [
            (repository.owner, repository.repo)
            for one in self._whose.get(owner.lower(), ())
            for repository in await one.reach.repositories(owner)
            if not one.patterns or fits(f"{repository.owner}/{repository.repo}", one.patterns)
        ]

    async def untaken(self, owner: str, repo: str, *, after: int) -> Listed:
        found = await self._client.untaken_jobs(owner, repo, after=after)
        now = self._clock()
        jobs = tuple(job_event(job, owner, repo, now, via="poll") for job in found.jobs)
        return Listed(jobs, found.more, found.calls, found.paid)

    def allowance(self, owner: str) -> Allowance | None:
        limit = self._client.limit(owner)
        return None if limit is None else Allowance(limit.limit, limit.remaining, limit.reset_at)


def needs_reach(patterns: Sequence[str]) -> bool:
    """Whether the credentials have to be asked which repositories these patterns mean."""
    return not patterns or any(_WILD.intersection(pattern) for pattern in patterns)


def named(settings: GitHubSettings) -> tuple[tuple[str, str], ...]:
    """The repositories (owner, name) that the settings name as such."""
    patterns = (pattern for app in settings.credentials for pattern in app.repositories)
    parts = (pattern.partition("/") for pattern in patterns if not _WILD.intersection(pattern))
    return tuple((owner, repo) for owner, _, repo in parts)


def served(settings: GitHubSettings) -> Callable[[str, str], bool]:
    """Whether jobs of this repository (owner, name) are served at all."""
    patterns = [app.repositories for app in settings.credentials]

    def is_served(owner: str, repo: str) -> bool:
        return any(not some or fits(f"{owner}/{repo}", some) for some in patterns)

    return is_served
