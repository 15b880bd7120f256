"""Repositories of a forge, and the command that bakes their parents, without git and without VMs.

``FakeRepositories`` has the ``Repositories`` protocol. ``bake_command`` is a program that honours the contract of
``microvm bake --repo … --json --credential-stdin``: what it does is told by ``<directory>/bake.json``, what it made
is a file in ``<directory>/baked``, and each start of it a line in ``<directory>/started``.
"""

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from runner_service.domain import Repository
from runner_service.ports import CannotLookError, Look

PROGRAM = Path(__file__).with_name("bake_program.py")


class FakeRepository(msgspec.Struct):
    """``commits``: commit → key of its dependencies; ``history``: branch → commits on it, newest last."""

    default_branch: str = "main"
    commits: dict[str, str] = {}
    history: dict[str, list[str]] = {}
    watched: tuple[str, ...] = ()
    template: str | None = None


class FakeRepositories:
    """``delay`` in seconds before each answer; ``trouble`` is raised instead of one."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepository] = {}
        self.delay = 0.0
        self.trouble: str | None = None
        self.asked: list[str] = []

    def push(self, repo: str, branch: str, commit: str, key: str) -> None:
        found = self.repos.setdefault(repo.lower(), FakeRepository())
        found.commits[commit] = key
        found.history.setdefault(branch, []).append(commit)

    async def look(self, repository: Repository) -> Look:
        found = await self._answer("look", repository)
        heads = {branch: commits[-1] for branch, commits in found.history.items()}
        watched = [found.default_branch, *(name for name in found.watched if name != found.default_branch)]
        return Look(
            found.default_branch, {name: heads[name] for name in watched if name in heads}, found.template
        )

    async def keys(
        self, repository: Repository, commit: str, bases: Mapping[str, str | None]
    ) -> dict[str, str]:
        found = await self._answer(f"keys {commit}", repository)
        if commit not in found.commits:
            return {}
        return {digest: key_on(digest, found.commits[commit]) for digest in bases}

    async def on_branch(self, repository: Repository, commit: str, branch: str) -> bool:
        found = await self._answer(f"on_branch {commit} {branch}", repository)
        return commit in found.history.get(branch, [])

    async def _answer(self, question: str, repository: Repository) -> FakeRepository:
        self.asked.append(question)
        await asyncio.sleep(self.delay)
        if self.trouble is not None:
            raise CannotLookError(f"{repository.name}: {self.trouble}")
        found = self.repos.get(repository.name)
        if found is None:
            raise CannotLookError(f"{repository.name}: there is no such repository")
        return found


def key_on(base_digest: str, words: str) -> str:
    """The key of dependencies ``words`` on a base."""
    return f"{words} on {base_digest[:4]}"


def bake_command(directory: Path) -> list[str]:
    return [sys.executable, str(PROGRAM), str(directory)]
