"""Parents of repositories, baked on real VMs: what is in them, what is not, and what happens when a bake fails."""

import base64
import mmap
import re
import shutil
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from images.bake import bake
from images.catalog import Catalog
from images.errors import BakeFailed, RecipeError
from images.events import BakeEvent
from images.warm import WarmBaked, bake_repository
from images.warm_guest import work_folder
from images.warm_plan import Request, parents_of
from scripts.programs.stage import git, runner_recipe
from vmm_core.drivers.base import DISK, MEMORY
from vmm_core.engine import Engine
from vmm_core.errors import WrongOwner
from vmm_core.machine import Network, Snapshot

pytestmark = pytest.mark.anyio

NAME = "octo-org/warm"
FOLDER = work_folder(NAME)
# Small, pure, and in no template of ours.
FIRST, SECOND = "wheel-filename==1.4.2", "tabulate==0.9.0"


class Repository:
    """A git repository that tests change."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def made(cls, path: Path) -> "Repository":
        path.mkdir()
        git(path, "init", "-q", "-b", "main")
        repository = cls(path)
        repository.commit({"README.md": "A repository.\n", "requirements.txt": f"{SECOND}\n"})
        return repository

    def copy(self, path: Path) -> "Repository":
        shutil.copytree(self.path, path)
        return Repository(path)

    def commit(self, files: dict[str, str | None]) -> str:
        for name, text in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if text is None:
                path.unlink()
            else:
                path.write_text(textwrap.dedent(text))
        git(self.path, "add", "-A")
        git(self.path, "commit", "-q", "--allow-empty", "-m", "change")
        return git(self.path, "rev-parse", "HEAD")


class Warmer:
    """Bakes the parent of one repository, and removes at the end what it made."""

    def __init__(self, engine: Engine, base: Snapshot, repository: Repository) -> None:
        self.engine = engine
        self.base = base
        self.repository = repository
        self.events: list[BakeEvent] = []

    async def __call__(self, *, ref: str | None = None, force: bool = False, name: str = NAME) -> WarmBaked:
        self.events.clear()
        request = Request(
            url=str(self.repository.path),
            spelled=name,
            template=self.base.manifest.labels["template"],
            ref=ref,
        )
        return await bake_repository(self.engine, request, progress=self.events.append, force=force)

    def steps(self) -> list[str]:
        return list(dict.fromkeys(event.step for event in self.events))


@pytest.fixture(scope="session")
async def base(engine: Engine) -> Snapshot:
    return (await bake(engine, runner_recipe(engine.data_dir), progress=lambda _event: None)).snapshot


class First(msgspec.Struct):
    """The parent that the tests stand on, and what it was made of."""

    repository: Repository
    made: WarmBaked


@pytest.fixture(scope="module")
async def first(
    engine: Engine, base: Snapshot, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[First]:
    for snapshot in parents_of(engine, NAME):  # of a run that was cut short
        engine.snapshots.remove(snapshot.digest)
    repository = Repository.made(tmp_path_factory.mktemp("first") / "repository")
    made = await Warmer(engine, base, repository)()
    yield First(repository, made)
    engine.snapshots.remove(made.digest)


@pytest.fixture
async def warm(engine: Engine, base: Snapshot, first: First, tmp_path: Path) -> AsyncIterator[Warmer]:
    before = {snapshot.digest for snapshot in engine.snapshots.list()}
    yield Warmer(engine, base, first.repository.copy(tmp_path / "repository"))
    made = [snapshot for snapshot in engine.snapshots.list() if snapshot.digest not in before]
    for snapshot in made:  # newest first: nothing stands on it
        engine.snapshots.remove(snapshot.digest)
    Catalog(engine).promote(first.made.name, first.made.digest, "after a test")


def offline(snapshot: Snapshot) -> Network:
    """The network card of the snapshot's machine, open to nothing."""
    return Network(mode="list" if snapshot.manifest.machine.network.mode != "none" else "none")


async def test_a_fork_finds_the_checkout_and_the_dependencies_without_any_network(
    first: First, base: Snapshot, engine: Engine, nothing_left: None
) -> None:
    del nothing_left
    made = first.made
    assert (made.name, made.cache_hit, made.incremental) == (f"{NAME}@main", False, False)
    assert made.commit == git(first.repository.path, "rev-parse", "HEAD")
    parent = engine.snapshots.resolve(made.name)
    assert parent.digest == made.digest
    assert parent.manifest.base == base.digest
    async with engine.fork(made.name, owner="octo-org", network=offline(parent)) as vm:
        at = (await vm.exec("git rev-parse HEAD && git status --porcelain", cwd=FOLDER)).stdout.decode()
        assert at.strip() == made.commit
        satisfied = await vm.exec("pip install -r requirements.txt", cwd=FOLDER)
        assert satisfied.code == 0, satisfied
        assert b"installed already" in satisfied.stdout
        assert (await vm.exec('python3 -c "import tabulate"')).code == 0
    # It shares what it did not change.
    own = engine.snapshots.private_bytes(made.digest)
    assert own < engine.snapshots.private_bytes(base.digest) / 2


async def test_the_same_key_is_baked_once_and_serves_every_branch(
    warm: Warmer, first: First, engine: Engine
) -> None:
    git(warm.repository.path, "checkout", "-q", "-b", "topic/one")
    warm.repository.commit({"README.md": "Changed, but no lock file.\n"})
    second = await warm(ref="topic/one")
    assert (second.name, second.cache_hit, second.digest) == (f"{NAME}@topic/one", True, first.made.digest)
    assert engine.snapshots.resolve(f"{NAME}@topic/one").digest == first.made.digest
    forced = await warm(ref="topic/one", force=True)
    assert (forced.cache_hit, forced.key) == (False, first.made.key)
    assert forced.digest != first.made.digest


async def test_a_changed_lock_file_is_baked_on_top_of_the_last_parent(
    warm: Warmer, first: First, engine: Engine
) -> None:
    commit = warm.repository.commit({"requirements.txt": f"{SECOND}\n{FIRST}\n"})
    second = await warm()
    assert (second.incremental, second.commit) == (True, commit)
    assert second.key != first.made.key
    assert engine.snapshots.resolve(second.name).manifest.base == first.made.digest
    async with engine.fork(second.name, owner="octo-org") as vm:
        assert (await vm.exec("git rev-parse HEAD", cwd=FOLDER)).stdout.decode().strip() == commit
        assert (await vm.exec('python3 -c "import tabulate, wheel_filename"')).code == 0
    history = Catalog(engine).history(second.name)
    assert [row.digest for row in history][:2] == [second.digest, first.made.digest]


async def test_a_bake_that_fails_says_where_and_leaves_the_parent_in_use(
    warm: Warmer, first: First, engine: Engine, nothing_left: None
) -> None:
    del nothing_left
    warm.repository.commit({"requirements.txt": "no-such-package-of-anybody==9.9.9\n"})
    with pytest.raises(BakeFailed) as failed:
        await warm()
    assert failed.value.step == "install: python: requirements.txt"
    assert any("no-such-package-of-anybody" in line for line in failed.value.output)
    assert "warm_egress" in failed.value.advice
    assert engine.snapshots.resolve(first.made.name).digest == first.made.digest


async def test_what_verify_refuses_is_not_promoted(warm: Warmer, first: First, engine: Engine) -> None:
    config = """
        install: false
        verify:
          - name: the answer
            run: echo it is not; exit 3
    """
    warm.repository.commit({".microvm.yml": config})
    with pytest.raises(BakeFailed) as failed:
        await warm()
    assert (failed.value.step, failed.value.status) == ("verify: the answer", 3)
    assert failed.value.output == ("it is not",)
    assert engine.snapshots.resolve(first.made.name).digest == first.made.digest


async def test_what_the_repository_may_not_open_is_refused_by_name(warm: Warmer) -> None:
    warm.repository.commit({".microvm.yml": "egress: [10.0.0.1:22]\n"})
    with pytest.raises(RecipeError, match=r"\.microvm\.yml.*egress.*10\.0\.0\.1:22.*repository_egress"):
        await warm()
    warm.repository.commit({".microvm.yml": "template: octo\n"})
    with pytest.raises(RecipeError, match=r"template.*octo"):
        await warm()


async def test_a_service_runs_in_every_fork(warm: Warmer, engine: Engine) -> None:
    config = """
        install: false
        services:
          - name: beacon
            run: exec python3 -m http.server 8099 --bind 127.0.0.1
            ready: curl -sf http://127.0.0.1:8099/ >/dev/null
            timeout: 60
    """
    warm.repository.commit({".microvm.yml": config})
    made = await warm()
    async with engine.fork(made.name, owner="octo-org") as vm:
        answer = await vm.exec("curl -sf http://127.0.0.1:8099/ | grep -c requirements.txt")
        assert (answer.code, answer.stdout.strip()) == (0, b"1")


async def test_a_parent_is_forked_for_its_owner_only(first: First, engine: Engine) -> None:
    made = first.made
    with pytest.raises(WrongOwner):
        await engine.launch(made.name, owner="mallory")
    with pytest.raises(WrongOwner):
        await engine.launch(made.name)
    async with engine.fork(made.name, owner="Octo-Org") as vm:
        assert vm.record.template == NAME


PLANTED = {
    ".netrc": "machine forge.test login octo password {}",
    ".git-credentials": "https://octo:{}@forge.test",
    ".npmrc": "//forge.test/:_authToken={}",
    ".bash_history": "curl -H 'authorization: {}'",
    ".docker/config.json": '{{"auths": {{"forge.test": {{"auth": "{}"}}}}}}',
    ".config/pip/pip.conf": "[global]\nextra-index-url = https://octo:{}@forge.test/simple",
    ".cargo/credentials.toml": '[registry]\ntoken = "{}"',
}


async def test_credentials_that_a_bake_came_by_are_in_neither_memory_nor_disk(
    warm: Warmer, engine: Engine
) -> None:
    secrets = [
        f"planted-{number}-{base64.b32encode(name.encode()).decode().strip('=')}"
        for number, name in enumerate(PLANTED)
    ]
    # Written in disguise, so that the secret itself stands nowhere but where it is planted.
    plant = ['decode() { printf %s "$1" | base64 -d; }']
    for (name, text), secret in zip(PLANTED.items(), secrets, strict=True):
        hidden = base64.b64encode((text.format(secret) + "\n").encode()).decode()
        plant.append(f'mkdir -p "$HOME/$(dirname {name})"; decode {hidden} > "$HOME/{name}"')
    remote = "planted-remote-8c1d"
    hidden = base64.b64encode(f"https://octo:{remote}@forge.test/octo-org/warm".encode()).decode()
    plant.append(
        f'git remote set-url origin "$(decode {hidden})"; git config http.extraheader "$(decode {hidden})"'
    )
    # A control: what nobody asked to forget is still there, so the search can find something.
    kept = "kept-on-purpose-5b7e"
    hidden = base64.b64encode(kept.encode()).decode()
    plant.append(f'decode {hidden} > "$HOME/kept"; cat "$HOME/kept" "$HOME/.netrc" >/dev/null; sync')
    script = textwrap.indent("\n".join(plant), " " * 14).strip()
    config = f"install: false\nwarm:\n  - name: plant\n    run: |\n{textwrap.indent(script, ' ' * 6)}\n"
    warm.repository.commit({".microvm.yml": config})
    made = await warm()
    found = held(engine.snapshots.resolve(made.name), [*secrets, remote, kept])
    assert found.pop(kept) == {"disk", "memory"}
    assert found == {secret: set() for secret in [*secrets, remote]}
    async with engine.fork(made.name, owner="octo-org") as vm:
        origin = (await vm.exec("git remote get-url origin", cwd=FOLDER)).stdout.decode()
        assert "@" not in origin


def held(snapshot: Snapshot, words: list[str]) -> dict[str, set[str]]:
    """In which of a snapshot's images each word stands."""
    found: dict[str, set[str]] = {word: set() for word in words}
    for what, name in (("memory", MEMORY), ("disk", DISK)):
        with (
            (snapshot.path / name).open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as image,
        ):
            for match in re.finditer(b"|".join(re.escape(word.encode()) for word in words), image):
                found[match[0].decode()].add(what)
    return found
