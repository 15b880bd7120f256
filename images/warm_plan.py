"""What a bake of a repository will do, decided before anything slow begins: its commit, base, key, network and start.

mirror ──► .microvm.yml of the default branch ──► base template ──► lock files at the commit ──► key
                                                                                 └──► the parent to start from
"""

import asyncio
import fnmatch
import hashlib
import re
from collections.abc import Sequence

import msgspec

from images.bake import bake
from images.catalog import BRANCH, REPOSITORY, TEMPLATE
from images.errors import BakeFailed, RecipeError
from images.events import Progress, Step
from images.lockfiles import Inventory, dependency_key, inventory
from images.mirror import Commit, Credential, Mirror
from images.plan import open_cards
from images.recipe import Recipe, load_again
from images.repository import RepositoryRecipe, parse_repository_recipe
from images.schema import PACKAGE_REGISTRIES
from images.steps import Steps
from vmm_core.engine import Engine
from vmm_core.errors import BadRequest, SnapshotInvalid, UnknownTemplate
from vmm_core.machine import Network, Snapshot

CONFIG = ".microvm.yml"
# Labels of a parent's manifest that only a bake looks at: the digests of its ``.microvm.yml``, and of what is under it.
CONFIG_DIGEST, BASE_MADE = "config", "base.made"
_CONFIG_BYTES = 64 << 10
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}/[A-Za-z0-9_.-]{1,100}")
# Beyond this a parent is made afresh from its base: what was removed meanwhile goes, and a fork's chain stays short.
MOST_LAYERS = 6


class Permitted(msgspec.Struct, frozen=True):
    """What the operator lets a repository's ``.microvm.yml`` ask for. Egress by patterns of what is written there."""

    egress: tuple[str, ...] = (PACKAGE_REGISTRIES,)
    vcpus: int = 4
    memory_mib: int = 8192
    disk_mib: int = 32768


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Which repository to bake, from where, and with what rights.

    ``spelled`` is ``Owner/Repo`` as the forge spells it, ``server`` the forge's address as jobs see it (None: that of
    ``url``). ``ref`` is a branch, tag or commit (None: the default branch), ``branch`` the one it is the parent of,
    where ``ref`` does not tell. ``template`` is the base unless the repository names another. So many ``mirrors`` of
    repositories stay on this host, each of so many MiB at most.
    """

    url: str
    spelled: str
    template: str
    server: str | None = None
    ref: str | None = None
    branch: str | None = None
    credential: Credential | None = None
    permitted: Permitted = Permitted()
    mirrors: int = 64
    mirror_mib: int = 20480

    @property
    def repository(self) -> str:
        """What we call it: forges tell no cases apart."""
        return self.spelled.lower()

    @property
    def owner(self) -> str:
        return self.repository.partition("/")[0]


class WarmPlan(msgspec.Struct, frozen=True):
    """A bake of a repository, decided. ``template`` is the base that was named, ``base`` that or, with the repository's
    own size and packages, one made of it; ``start`` is what the bake is forked from.

    ``warm`` is the network of the bake, ``jobs`` that of the jobs. ``config`` is the digest of ``.microvm.yml``.
    """

    commit: Commit
    branch: str
    recipe: RepositoryRecipe
    inventory: Inventory
    config: str
    key: str
    template: str
    template_digest: str
    base: Snapshot
    start: Snapshot
    warm: Network
    jobs: Network

    @property
    def incremental(self) -> bool:
        return self.start.digest != self.base.digest


def check_repository(name: str) -> str:
    """``Owner/Repo``, if it is one. Raises RecipeError that says what is allowed."""
    if not _REPOSITORY.fullmatch(name) or name.endswith(("/.", "/..")):
        raise RecipeError("is no owner/repository of letters, digits, '.', '_' and '-'", file=repr(name))
    return name


def parent_name(repository: str, branch: str) -> str:
    """What the parent of a branch is called."""
    return f"{repository}@{branch}"


async def make_warm_plan(
    engine: Engine, mirror: Mirror, request: Request, steps: Steps, progress: Progress
) -> WarmPlan:
    """Raises RecipeError (``.microvm.yml``), MirrorError, BakeFailed, and what a bake of the base raises."""
    with steps.step("plan"):
        commit = mirror.resolve(request.ref)
        default = mirror.default_branch()
        branch = request.branch or commit.branch or default
        if branch is None:
            raise BakeFailed(
                "plan", "the repository has no default branch", advice="Say which with --branch."
            )
        recipe, config = read_recipe(mirror, request.permitted)
    template = _template(engine, recipe, request)
    base = await _base(engine, template, recipe, progress)
    with steps.step("network") as step:
        warm, jobs = await _networks(base.manifest.machine.network, recipe, step)
        try:
            await engine.check_network(warm)
            await engine.check_network(jobs)
        except BadRequest as error:
            raise RecipeError(str(error), file=CONFIG, key="egress") from None
    with steps.step("key") as step:
        found = await asyncio.to_thread(inventory, mirror.path, commit.sha)
        # Of the template: what the repository wants of its own above that stands in ``config``. So the service, which
        # knows no own base before it is baked, comes to the same key.
        key = dependency_key(
            base_digest=template.digest,
            runner=template.manifest.labels.get("runner.version"),
            inventory=found,
            config=config,
            paths=recipe.paths,
        )
        step(f"{len(found.files)} lock and toolchain files at {commit.sha[:12]}: key {key[:12]}")
    digest = hashlib.sha256(config or b"").hexdigest()
    parents = parents_of(engine, request.repository) if recipe.incremental else []
    return WarmPlan(
        commit=Commit(commit.sha, branch),
        branch=branch,
        recipe=recipe,
        inventory=found,
        config=digest,
        key=key,
        template=recipe.template or request.template,
        template_digest=template.digest,
        base=base,
        start=_start(engine, parents, base, digest, (branch, default)) or base,
        warm=warm,
        jobs=jobs,
    )


def read_recipe(mirror: Mirror, permitted: Permitted) -> tuple[RepositoryRecipe, bytes | None]:
    """The repository's own words, from its default branch only, held against what is permitted; and their text."""
    default = mirror.default_branch()
    config = mirror.read(mirror.resolve(default).sha, CONFIG, _CONFIG_BYTES) if default is not None else None
    recipe = parse_repository_recipe(config, file=CONFIG)
    check_permitted(recipe, permitted)
    return recipe, config


def check_permitted(recipe: RepositoryRecipe, permitted: Permitted) -> None:
    """Raises RecipeError, naming key and setting, for what the operator has not opened to repositories."""
    for key in ("egress", "warm_egress"):
        for wanted in getattr(recipe, key):
            if not any(fnmatch.fnmatchcase(wanted, pattern) for pattern in permitted.egress):
                allowed = ", ".join(permitted.egress) or "nothing"
                raise RecipeError(
                    f"{wanted!r} is not among what repositories may open here: {allowed} "
                    "(the operator's [bakes] repository_egress)",
                    file=CONFIG,
                    key=key,
                )
    for key in ("vcpus", "memory_mib", "disk_mib"):
        wanted, most = getattr(recipe, key), getattr(permitted, key)
        if wanted is not None and wanted > most:
            raise RecipeError(
                f"{wanted} is more than the {most} a repository may have here (the operator's [bakes] most_{key})",
                file=CONFIG,
                key=f"machine.{key.removesuffix('_mib')}",
            )


def parents_of(engine: Engine, repository: str) -> list[Snapshot]:
    """The repository's parents that this host can fork, newest first."""
    return [
        snapshot
        for snapshot in engine.snapshots.list()
        if snapshot.manifest.labels.get(REPOSITORY) == repository
        and snapshot.manifest.owner == repository.partition("/")[0]
        and engine.misfit(snapshot.manifest) is None
    ]


def _template(engine: Engine, recipe: RepositoryRecipe, request: Request) -> Snapshot:
    """The template that the repository or the request names."""
    name = recipe.template or request.template
    try:
        found = engine.snapshots.resolve(name)
    except (UnknownTemplate, SnapshotInvalid) as error:
        if recipe.template is not None:
            raise RecipeError(str(error), file=CONFIG, key="template") from None
        raise BakeFailed("plan", str(error), advice=f"Bake the base first: microvm bake {name}") from error
    if found.manifest.owner is not None:
        raise RecipeError(f"{name} is a repository's parent, not a template", file=CONFIG, key="template")
    return found


async def _base(engine: Engine, template: Snapshot, recipe: RepositoryRecipe, progress: Progress) -> Snapshot:
    """What is under the parent: the template, or one of the size and with the packages that the repository wants."""
    wanted = _own_base(template, recipe)
    return (
        template if wanted is None else (await bake(engine, wanted, progress=progress, named=False)).snapshot
    )


def _own_base(template: Snapshot, recipe: RepositoryRecipe) -> Recipe | None:
    """The template's recipe with the repository's size and packages; None when it wants none of its own."""
    machine = template.manifest.machine
    name = template.manifest.labels.get(TEMPLATE, template.digest[:12])
    size = msgspec.structs.replace(
        machine,
        vcpus=recipe.vcpus or machine.vcpus,
        memory_mib=recipe.memory_mib or machine.memory_mib,
        disk_mib=recipe.disk_mib or machine.disk_mib,
    )
    if size == machine and not recipe.packages:
        return None
    made_from = template.manifest.labels.get("made.from")
    if made_from is None:
        raise BakeFailed(
            "plan",
            f"template {name} does not tell what recipe it was made from, so no size or packages can be added to it",
            advice=f"Bake it again: microvm bake {name} --force",
        )
    source = load_again(made_from)
    words = "\0".join(
        [name, str(size.vcpus), str(size.memory_mib), str(size.disk_mib), *sorted(recipe.packages)]
    )
    return msgspec.structs.replace(
        source,
        name=f"{name[:27]}-own-{hashlib.sha256(words.encode()).hexdigest()[:8]}",
        machine=size.on(source.machine.network),
        packages=tuple(dict.fromkeys((*source.packages, *recipe.packages))),
    )


async def _networks(card: Network, recipe: RepositoryRecipe, step: Step) -> tuple[Network, Network]:
    installing = (
        *recipe.egress,
        *recipe.warm_egress,
        *((PACKAGE_REGISTRIES,) if card.mode != "none" else ()),
    )
    warm, jobs = await open_cards(card, (installing, recipe.egress), step)
    return warm, jobs


def _start(
    engine: Engine,
    parents: Sequence[Snapshot],
    base: Snapshot,
    config: str,
    branches: Sequence[str | None],
) -> Snapshot | None:
    """The parent that most of the work is done in already: the branch's newest, else the default branch's."""
    for branch in branches:
        for parent in parents:
            labels = parent.manifest.labels
            fits = labels.get(BASE_MADE) == base.digest and labels.get(CONFIG_DIGEST) == config
            if fits and labels.get(BRANCH) == branch and _layers(engine, parent) < MOST_LAYERS:
                return parent
    return None


def _layers(engine: Engine, snapshot: Snapshot) -> int:
    """How many snapshots it stands on."""
    count, below = 0, snapshot.manifest.base
    while below is not None:
        count += 1
        try:
            below = engine.snapshots.load(below).manifest.base
        except (UnknownTemplate, SnapshotInvalid):
            return MOST_LAYERS  # damaged: not to be built upon
    return count
