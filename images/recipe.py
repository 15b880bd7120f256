"""Recipes: YAML files that say what a template is made of; every error in one names file, line and key.

``extends: other`` takes another recipe as the base: lists are appended to it, mappings are merged key by key,
single values replace. Overrides (``runner.tarball=/path``) come last and replace, whatever the type.
"""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal, cast

import msgspec

from images.errors import RecipeError
from images.positions import Plain, inline, load
from images.schema import (
    RecipeFile,
    RunnerSource,
    Source,
    TreeFile,
    WarmStep,
    check,
    closest,
    convert,
    parse_size,
)
from vmm_core.machine import MachineSpec, Network

_SHIPPED = Path(str(resources.files("images") / "recipes"))
_MAX_EXTENDS = 8


class Recipe(msgspec.Struct, frozen=True):
    """A complete recipe, bases and overrides merged in. Lists keep their order, base first, nothing twice.

    ``machine.network`` is a card when any egress is listed; what it is open to is filled in at the bake, because
    ``package-registries`` is known only then. ``page_cache`` are globs of files read before the snapshot.
    ``labels`` are GitHub labels besides those every template has. ``made_from`` is what it was loaded from (see
    ``load_again``).
    """

    name: str
    description: str = ""
    packages: tuple[str, ...] = ()
    machine: MachineSpec = MachineSpec()
    ca: Literal["host", "none"] = "host"
    sudo: bool = False
    kernel_modules: tuple[str, ...] = ()
    files: tuple[TreeFile, ...] = ()
    egress: tuple[str, ...] = ()
    warm_egress: tuple[str, ...] = ()
    warm: tuple[WarmStep, ...] = ()
    page_cache: tuple[str, ...] = ()
    runner: RunnerSource | None = None
    labels: tuple[str, ...] = ()
    origin: tuple[str, ...] = ()
    made_from: str = ""

    @property
    def github_labels(self) -> tuple[str, ...]:
        """``microvm-<template>``, ``microvm-<n>cpu-<m>gb`` (or ``-<m>mb``), and the recipe's own."""
        memory = self.machine.memory_mib
        size = f"{memory // 1024}gb" if memory % 1024 == 0 else f"{memory}mb"
        own = (f"microvm-{self.name}", f"microvm-{self.machine.vcpus}cpu-{size}")
        return tuple(dict.fromkeys((*own, *self.labels)))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with this package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yml"))}


def load_recipe(name_or_path: str, *, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe by shipped name or by path (has a slash or ends in .yml), with everything it extends.

    ``overrides`` are dotted keys (``runner.tarball``, ``machine.memory``) to values; a list or mapping is
    written as YAML in one line. Relative paths in them start here, those in a file start at the file.
    Raises RecipeError with file, line, key and what is allowed.
    """
    chain = _read_chain(name_or_path)
    merged: dict[str, Plain] = {}
    for file in chain:
        for key, value in file.values.items():
            merged[key] = _merge(merged.get(key), value)
    merged.pop("extends", None)
    whole = RecipeFile(path=chain[-1].path, values=merged, lines={})
    if overrides:
        extra = _overrides(overrides)
        for key, value in extra.items():
            merged[key] = _replace(merged.get(key), value)
        whole = RecipeFile(path="override", values=_absolute(merged, Path.cwd()), lines={})
    source = convert(whole, Source, strict=not overrides)
    check(source, whole)
    name = name_or_path if name_or_path in shipped_recipes() else str(chain[-1].path)
    made_from = msgspec.json.encode(_MadeFrom(name, _from_anywhere(overrides or {}))).decode()
    return _finish(source, tuple(Path(file.path).name for file in chain), made_from)


def load_again(made_from: str) -> Recipe:
    """The recipe that ``Recipe.made_from`` tells of, as it is now. Errors as ``load_recipe``."""
    words = msgspec.json.decode(made_from, type=_MadeFrom)
    return load_recipe(words.recipe, overrides=words.overrides)


def _from_anywhere(overrides: Mapping[str, str]) -> dict[str, str]:
    """The overrides, their paths no longer relative to this directory."""
    path = "runner.tarball"
    return {key: str(Path.cwd() / value) if key == path else value for key, value in overrides.items()}


class _MadeFrom(msgspec.Struct, frozen=True):
    recipe: str
    overrides: dict[str, str]


def _read_chain(name_or_path: str) -> list[RecipeFile]:
    """The file and its bases, base first, each checked by itself: an error stands where it was written."""
    chain: list[RecipeFile] = []
    seen: list[Path] = []
    path = _locate(name_or_path, None)
    while True:
        if path in seen:
            loop = " → ".join(one.stem for one in [*seen, path])
            raise chain[0].error(f"extends itself: {loop}", ("extends",))
        if len(seen) >= _MAX_EXTENDS:
            raise chain[0].error(f"has more than {_MAX_EXTENDS} bases", ("extends",))
        seen.append(path)
        values, lines = load(path)
        file = RecipeFile(path=path, values=_absolute(values, path.parent), lines=lines)
        chain.insert(0, file)
        source = convert(file, Source)
        check(source, file)
        if source.extends is None:
            return chain
        path = _locate(source.extends, file)


def _locate(name: str, file: RecipeFile | None) -> Path:
    shipped = shipped_recipes()
    if "/" in name or name.endswith((".yml", ".yaml")):
        base = Path(file.path).parent if file else Path()
        path = (base / name).resolve()
        if path.is_file():
            return path
        message = f"no recipe file {path}"
    elif name in shipped:
        return shipped[name]
    else:
        message = f"no recipe is called {name!r}{closest(name, list(shipped))}. Shipped: {', '.join(shipped)}"
    raise file.error(message, ("extends",)) if file else RecipeError(message, file=name)


def _merge(base: Plain, own: Plain) -> Plain:
    if isinstance(base, dict) and isinstance(own, dict):
        return {key: _merge(base.get(key), own[key]) if key in own else base[key] for key in {**base, **own}}
    if isinstance(base, list) and isinstance(own, list):
        return [*base, *own]
    return own


def _replace(base: Plain, own: Plain) -> Plain:
    if isinstance(base, dict) and isinstance(own, dict):
        return {
            key: _replace(base.get(key), own[key]) if key in own else base[key] for key in {**base, **own}
        }
    return own


def _overrides(overrides: Mapping[str, str]) -> dict[str, Plain]:
    found: dict[str, Plain] = {}
    for dotted, text in overrides.items():
        *parents, last = dotted.split(".")
        place = found
        for parent in parents:
            place = cast("dict[str, Plain]", place.setdefault(parent, {}))
        try:
            place[last] = inline(text)
        except ValueError as error:
            raise RecipeError(str(error), file="override", key=dotted) from None
    return found


def _absolute(values: dict[str, Plain], base: Path) -> dict[str, Plain]:
    """The paths on this host made absolute, before files of several directories are merged."""
    result = dict(values)
    runner, files = values.get("runner"), values.get("files")
    if isinstance(runner, dict) and isinstance(tarball := runner.get("tarball"), str):
        result["runner"] = {**runner, "tarball": str(base / Path(tarball).expanduser())}
    if isinstance(files, list):
        result["files"] = [
            {**item, "source": str(base / source)}
            if isinstance(item, dict) and isinstance(source := item.get("source"), str)
            else item
            for item in files
        ]
    return result


def _finish(source: Source, origin: tuple[str, ...], made_from: str) -> Recipe:
    online = bool(source.egress or source.warm_egress)
    return Recipe(
        name=source.name,
        description=source.description,
        packages=_once(source.packages),
        machine=MachineSpec(
            vcpus=source.machine.vcpus,
            memory_mib=parse_size(source.machine.memory),
            disk_mib=parse_size(source.machine.disk),
            disk_mbps=source.machine.disk_mbps,
            disk_iops=source.machine.disk_iops,
            network=Network(
                mode="list" if online else "none",
                mbit=source.machine.network_mbit,
                ipv6=source.machine.ipv6,
            ),
        ),
        ca=source.ca,
        sudo=source.sudo,
        kernel_modules=_once(source.kernel_modules),
        files=tuple(source.files),
        egress=_once(source.egress),
        warm_egress=_once(source.warm_egress),
        warm=tuple(source.warm),
        page_cache=_once(source.page_cache),
        runner=source.runner,
        labels=_once(source.labels),
        origin=origin,
        made_from=made_from,
    )


def _once(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
