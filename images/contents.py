"""What is in a template or parent: what it was made from and when, what stands below and on it, what it takes."""

from typing import Any, TypeVar

import msgspec

from images.catalog import (
    BAKED_FROM,
    LOCKFILES,
    RECIPE,
    TOOLS,
    Catalog,
    Template,
    made_as,
    template_of,
)
from images.history import Row
from vmm_core.errors import SnapshotInvalid, UnknownTemplate
from vmm_core.machine import Manifest

_MOST_BASES = 32

T = TypeVar("T")


class Base(msgspec.Struct, frozen=True):
    """A snapshot below. ``name`` is what means it, else what it was baked for."""

    digest: str
    name: str
    there: bool = True


class Contents(msgspec.Struct, frozen=True):
    """The answer to "what is in here".

    ``names`` all mean it now. ``bases`` is what it stands on, nearest first. ``files`` are bytes by name, ``own_bytes``
    what its removal would give back to the pool. ``recipe`` is what its bake was asked for, ``lockfiles`` are (path,
    kind, digest), ``tools`` versions by name: words of the repository and its guest, not of ours. ``labels`` is what
    else was noted at the bake. ``history`` of its name, newest first.
    """

    template: Template
    names: tuple[str, ...]
    pinned: bool
    users: tuple[str, ...]
    baked_from: str | None
    bases: tuple[Base, ...]
    recipe: dict[str, Any]
    lockfiles: tuple[tuple[str, str, str], ...]
    tools: dict[str, str]
    accel: str
    vmm_version: str
    cpu_model: str
    files: dict[str, int]
    own_bytes: int
    labels: dict[str, str]
    history: tuple[Row, ...]


def contents(catalog: Catalog, ref: str) -> Contents:
    """Of a name or digest. Blocking. Raises UnknownTemplate and SnapshotInvalid."""
    store = catalog.store
    snapshot = store.resolve(ref)
    manifest, digest = snapshot.manifest, snapshot.digest
    names = store.names()
    mine = tuple(sorted(name for name, meaning in names.items() if meaning == digest))
    name = ref if ref in names else next(iter(mine), made_as(manifest))
    labels = dict(manifest.labels)
    return Contents(
        template=template_of(name, snapshot),
        names=mine,
        pinned=digest in catalog.pinned(),
        users=tuple(store.users(digest)),
        baked_from=labels.pop(BAKED_FROM, None),
        bases=_bases(catalog, manifest, names),
        recipe=_noted(labels, RECIPE, dict[str, Any], {}),
        lockfiles=_noted(labels, LOCKFILES, tuple[tuple[str, str, str], ...], ()),
        tools=_noted(labels, TOOLS, dict[str, str], {}),
        accel=manifest.accel,
        vmm_version=manifest.vmm_version,
        cpu_model=manifest.cpu_model,
        files=dict(manifest.files),
        own_bytes=store.private_bytes(digest),
        labels=labels,
        history=catalog.rows(name, names)[::-1] if name else (),
    )


def _bases(catalog: Catalog, manifest: Manifest, names: dict[str, str]) -> tuple[Base, ...]:
    found: list[Base] = []
    below = manifest.base
    while below is not None and len(found) < _MOST_BASES:
        name = min((name for name, meaning in names.items() if meaning == below), default="")
        try:
            manifest = catalog.store.load(below).manifest
        except (UnknownTemplate, SnapshotInvalid):
            found.append(Base(below, name, there=False))
            break
        found.append(Base(below, name or made_as(manifest)))
        below = manifest.base
    return tuple(found)


def _noted(labels: dict[str, str], label: str, kind: type[T], nothing: T) -> T:
    """Take what a label holds as JSON. One that holds something else stays where it is."""
    try:
        found = msgspec.json.decode(labels.get(label, ""), type=kind)
    except (msgspec.MsgspecError, RecursionError):
        return nothing
    del labels[label]
    return found
