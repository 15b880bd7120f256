"""The templates and parents of this host as the control plane sees them: read again only when a name changed."""

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from images import catalog as images
from images.errors import ImageError
from images.prune import prune
from runner_service.domain import Parent, Template
from vmm_core.engine import Engine
from vmm_core.errors import VmmError

log = structlog.get_logger("catalog")
# More than any machine has: tells that nothing was learned yet.
_UNKNOWN_MIB = 1 << 24


class EngineCatalog:
    """The ``Catalog`` protocol over an engine. What a fork needs of memory is what was learned of such forks."""

    def __init__(self, engine: Engine) -> None:
        self._store = engine.snapshots
        self._images = images.Catalog(engine.pool)
        self._working_sets = engine.ledger.working_sets
        self._names: dict[str, str] | None = None
        self._templates: tuple[Template, ...] = ()
        self._parents: tuple[Parent, ...] = ()

    def templates(self) -> Sequence[Template]:
        """What labels may name: never what belongs to somebody."""
        self._refresh()
        learned = self._working_sets
        return [
            msgspec.structs.replace(t, need_mib=learned.need_mib(t.name, t.need_mib)) for t in self._templates
        ]

    def parents(self) -> Sequence[Parent]:
        """Those that are in use: what the names of repositories' parents mean now."""
        self._refresh()
        learned = self._working_sets
        found: list[Parent] = []
        for parent in self._parents:
            machine = parent.machine
            # Until there are forks of its own to learn from: as much as forks of its base.
            own = learned.need_mib(parent.repository, _UNKNOWN_MIB)
            need = (
                min(own, machine.need_mib)
                if own != _UNKNOWN_MIB
                else learned.need_mib(parent.base, machine.need_mib)
            )
            found.append(
                msgspec.structs.replace(parent, machine=msgspec.structs.replace(machine, need_mib=need))
            )
        return found

    def has(self, digest: str) -> bool:
        try:
            self._store.load(digest)
        except VmmError:
            return False
        return True

    def withdrawn(self, name: str) -> frozenset[str]:
        return self._images.withdrawn(name)

    def touch(self, digest: str) -> None:
        self._images.touch(digest)

    async def prune(self, *, budget_bytes: int | None, keep: int) -> None:
        try:
            pruned = await asyncio.to_thread(prune, self._images, budget_bytes=budget_bytes, keep=keep)
        except (VmmError, ImageError, OSError) as error:
            log.warning("prune_failed", error=str(error))
            return
        for removal in pruned.removed:
            log.info(
                "pruned", name=removal.name, digest=removal.digest[:12], bytes=removal.bytes, why=removal.why
            )

    def _refresh(self) -> None:
        names = self._store.names()
        if names == self._names:
            return
        found = images.templates(self._store)
        self._templates = tuple(_machine(t) for t in found if t.repository is None and t.owner is None)
        self._parents = tuple(parent for t in found if (parent := _parent(t)) is not None)
        self._names = names


def _machine(template: images.Template) -> Template:
    network = template.machine.network
    return Template(
        name=template.name,
        digest=template.digest,
        labels=template.labels,
        need_mib=template.machine.memory_mib,
        runner_dir=template.runner_dir,
        runner_files=template.runner_files,
        allow=None if network.mode == "none" else network.allow,
        runner=template.runner,
        vcpus=template.machine.vcpus,
    )


def _parent(template: images.Template) -> Parent | None:
    """None for what is no parent of a repository, or does not say all that a choice must know."""
    repository, owner, branch = template.repository, template.owner, template.branch
    if repository is None or owner is None or branch is None or template.base is None:
        return None
    return Parent(
        machine=_machine(template),
        repository=repository,
        owner=owner.lower(),
        branch=branch,
        commit=template.commit or "",
        key=template.key or "",
        base=template.base,
        base_digest=template.base_digest or "",
        created_at=template.created_at,
    )
