"""The repositories of the forges as this host mirrors them: what is watched, what a commit's key is, what is its own.

A mirror is fetched when it is looked at; a question about a commit fetches only what the mirror does not have.
Nothing here trusts a repository: its ``.microvm.yml`` is read from its default branch, within what is permitted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from github_webhook.errors import ForgeError
from images.errors import BadRef, ImageError
from images.globs import matches
from images.lockfiles import dependency_key, inventory
from images.mirror import Credential, Mirror, fetch_mirror
from images.repository import RepositoryRecipe
from images.warm_plan import Permitted, read_recipe
from runner_service.domain import Repository
from runner_service.ports import CannotLookError, Look
from runner_service.settings import Bakes

T = TypeVar("T")
BRANCHES_WATCHED = 20
_BRANCH_BYTES = 200


class Origin(msgspec.Struct, frozen=True):
    """Where a repository is cloned from, and with what."""

    url: str
    credential: Credential | None = None


def permitted_by(bakes: Bakes) -> Permitted:
    """What the operator's settings let a repository's ``.microvm.yml`` ask for."""
    return Permitted(
        egress=bakes.repository_egress,
        vcpus=bakes.most_vcpus,
        memory_mib=bakes.most_memory_mib,
        disk_mib=bakes.most_disk_mib,
    )


OriginOf = Callable[[Repository], Awaitable[Origin]]


class Mirrors:
    """The ``Repositories`` protocol over ``images.mirror``. Sizes in MiB, ``timeout`` of a fetch in seconds."""

    def __init__(
        self,
        root: Path,
        *,
        origin: OriginOf,
        permitted: Permitted,
        keep: int,
        most_mib: int,
        timeout: float,
    ) -> None:
        self._root = root
        self._origin = origin
        self._permitted = permitted
        self._keep = keep
        self._most_mib = most_mib
        self._timeout = timeout
        # Only how to find a mirror again without asking for its address.
        self._mirrors: dict[tuple[str, str], Mirror] = {}

    async def look(self, repository: Repository) -> Look:
        """Fetch it, and read what its default branch says is to be watched."""
        mirror = await self._fetch(repository)
        return await self._read(repository, lambda: _look(mirror, self._permitted))

    async def keys(
        self, repository: Repository, commit: str, bases: Mapping[str, str | None]
    ) -> dict[str, str]:
        mirror = await self._with_commit(repository, commit)
        return await self._read(repository, lambda: _keys(mirror, self._permitted, commit, bases))

    async def on_branch(self, repository: Repository, commit: str, branch: str) -> bool:
        mirror = await self._with_commit(repository, commit)
        return await self._read(repository, lambda: mirror.on_branch(commit, branch))

    async def _with_commit(self, repository: Repository, commit: str) -> Mirror:
        """The mirror; fetched first unless it has the commit already."""
        mirror = self._mirrors.get((repository.forge, repository.name))
        if mirror is not None and mirror.path.is_dir():
            known = mirror
            if await self._read(repository, lambda: _has(known, commit)):
                return mirror
        return await self._fetch(repository)

    async def _fetch(self, repository: Repository) -> Mirror:
        try:
            origin = await self._origin(repository)
            mirror = await fetch_mirror(
                self._root,
                origin.url,
                credential=origin.credential,
                timeout=self._timeout,
                keep=self._keep,
                max_mib=self._most_mib,
            )
        except (ImageError, ForgeError, OSError) as error:
            raise _cannot(repository, error) from error
        self._mirrors[repository.forge, repository.name] = mirror
        return mirror

    async def _read(self, repository: Repository, ask: Callable[[], T]) -> T:
        """Off the loop: each is a git process or two."""
        try:
            return await asyncio.to_thread(ask)
        except (ImageError, OSError) as error:
            raise _cannot(repository, error) from error


def _look(mirror: Mirror, permitted: Permitted) -> Look:
    default = mirror.default_branch()
    if default is None:
        raise BadRef(f"{mirror.url} has no commit on a default branch yet")
    recipe, _ = read_recipe(mirror, permitted)
    branches = mirror.branches()
    fitting = [name for name in sorted(branches) if name != default and _watched(recipe, name)]
    watched = [default, *fitting[: BRANCHES_WATCHED - 1]]
    return Look(default, {name: branches[name] for name in watched}, recipe.template)


def _watched(recipe: RepositoryRecipe, name: str) -> bool:
    """Whether a branch other than the default one gets a parent of its own."""
    return len(name.encode()) <= _BRANCH_BYTES and any(matches(pattern, name) for pattern in recipe.branches)


def _keys(
    mirror: Mirror, permitted: Permitted, commit: str, bases: Mapping[str, str | None]
) -> dict[str, str]:
    if not _has(mirror, commit):
        return {}
    recipe, config = read_recipe(mirror, permitted)
    found = inventory(mirror.path, commit)
    return {
        digest: dependency_key(
            base_digest=digest, runner=runner, inventory=found, config=config, paths=recipe.paths
        )
        for digest, runner in bases.items()
    }


def _has(mirror: Mirror, commit: str) -> bool:
    try:
        mirror.resolve(commit)
    except BadRef:
        return False
    return True


def _cannot(repository: Repository, error: Exception) -> CannotLookError:
    return CannotLookError(f"{repository.name}: {error}")
