"""Mirrors of repositories as the service asks them, with real git, over the stand-in GitHub and its narrowed tokens."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from github_webhook.app_auth import AppAuth
from images.warm_plan import Permitted
from runner_service import github_forge
from runner_service.domain import Repository
from runner_service.ports import CannotLookError
from runner_service.repositories import BRANCHES_WATCHED, Mirrors
from tests.standins.github_world import OWNER, REPO, ForgeWorld, forge_world, git

pytestmark = pytest.mark.anyio
THIS = Repository(forge="github", name=f"{OWNER}/{REPO}", owner=OWNER, repo=REPO, seen_at=0.0)
BASES = {"b" * 64: "2.330.0", "c" * 64: None}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ForgeWorld]:
    async with forge_world(tmp_path) as made:
        yield made


def mirrors(world: ForgeWorld) -> Mirrors:
    app = world.forge.add_app(OWNER)
    auth = AppAuth(
        client_id=app.client_id,
        private_key_pem=app.private_key_pem,
        http=world.http,
        base_url=world.forge.url,
    )
    return Mirrors(
        world.tmp / "mirrors",
        origin=github_forge.origin_of(auth, world.forge.url),
        permitted=Permitted(),
        keep=8,
        most_mib=100,
        timeout=30,
    )


def commit(world: ForgeWorld, name: str, text: str, branch: str = "main") -> str:
    directory = world.tmp / REPO
    git(directory, "checkout", "-q", "-B", branch)
    (directory / name).write_text(text)
    git(directory, "add", ".")
    git(directory, "commit", "-q", "-m", name)
    sha = git(directory, "rev-parse", "HEAD")
    git(directory, "checkout", "-q", "main")
    return sha


async def test_a_look_tells_the_default_branch_and_those_its_recipe_names(world: ForgeWorld) -> None:
    asked = mirrors(world)
    first = git(world.tmp / REPO, "rev-parse", "HEAD")
    look = await asked.look(THIS)
    assert (look.default_branch, look.watched, look.template) == ("main", {"main": first}, None)
    told = commit(world, ".microvm.yml", "template: python-ci\nbranches: [release/*, 'x-*']\n")
    for number in range(BRANCHES_WATCHED + 5):
        git(world.tmp / REPO, "branch", f"x-{number:03}", first)
    git(world.tmp / REPO, "branch", "release/1", first)
    git(world.tmp / REPO, "branch", "other", first)
    look = await asked.look(THIS)
    assert look.template == "python-ci" and look.watched["main"] == told
    assert (
        len(look.watched) == BRANCHES_WATCHED and "release/1" in look.watched and "other" not in look.watched
    )


async def test_keys_follow_the_lock_files_and_the_base(world: ForgeWorld) -> None:
    asked = mirrors(world)
    none = git(world.tmp / REPO, "rev-parse", "HEAD")
    locked = commit(world, "requirements.txt", "requests==2.0\n")
    readme = commit(world, "README.md", "hello\n")
    keys = [await asked.keys(THIS, sha, BASES) for sha in (none, locked, readme)]
    assert keys[0] != keys[1] == keys[2]
    assert len(set(keys[1].values())) == 2 and set(keys[1]) == set(BASES)
    assert await asked.keys(THIS, "f" * 40, BASES) == {}


async def test_what_is_on_a_branch_of_the_repository_itself(world: ForgeWorld) -> None:
    asked = mirrors(world)
    await asked.look(THIS)
    dev = commit(
        world, "dev.txt", "dev", "dev"
    )  # pushed after the last look: it is fetched when it is asked for
    assert await asked.on_branch(THIS, dev, "dev")
    assert not await asked.on_branch(THIS, dev, "main")
    # A pull request from a fork: the commit is at the forge, and on no branch.
    git(world.tmp / REPO, "update-ref", "refs/pull/1/head", commit(world, "evil.txt", "evil", "theirs"))
    theirs = git(world.tmp / REPO, "rev-parse", "theirs")
    git(world.tmp / REPO, "branch", "-q", "-D", "theirs")
    assert not await asked.on_branch(THIS, theirs, "dev")
    assert await asked.keys(THIS, theirs, BASES) == {}


async def test_every_trouble_is_one_sentence_without_a_secret(world: ForgeWorld) -> None:
    asked = mirrors(world)
    with pytest.raises(CannotLookError, match="octo-org/none: "):
        await asked.look(
            Repository(forge="github", name=f"{OWNER}/none", owner=OWNER, repo="none", seen_at=0.0)
        )
    commit(world, ".microvm.yml", "templat: x\n")
    with pytest.raises(CannotLookError, match=r"octo-org/demo: \.microvm\.yml:1: .*templat"):
        await asked.look(THIS)
    (world.tmp / REPO / ".git").rename(world.tmp / "gone")
    with pytest.raises(CannotLookError) as raised:
        await asked.look(THIS)
    assert not any(token in str(raised.value) for token in world.forge.rest.tokens)
