"""``.microvm.yml``: what a repository asks of its own parents. Every error names file, line and key.

It is read from the default branch alone, and its authors are not trusted: what it may open or use up is for the
operator's settings to say (images/warm_plan.py holds it against them).
"""

from typing import Annotated

import msgspec

from images.positions import parse
from images.schema import (
    Path_,
    RecipeFile,
    Text,
    User,
    WarmStep,
    check_egress,
    check_size,
    convert,
)

_Glob = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\\:]+$", max_length=200)]
_Steps = Annotated[list[WarmStep], msgspec.Meta(max_length=32)]
_Globs = Annotated[list[_Glob], msgspec.Meta(max_length=32)]
_Egress = Annotated[list[str], msgspec.Meta(max_length=64)]


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be running in every fork: a database, say. ``run`` stays in the foreground; ``ready`` is a
    script that succeeds once it serves. ``timeout`` in seconds until then."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    run: Text
    ready: Annotated[str, msgspec.Meta(max_length=65536)] = ""
    timeout: Annotated[float, msgspec.Meta(gt=0, le=7200)] = 60
    user: User = "runner"


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    memory: str | None = None
    disk: str | None = None


class RepositorySource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file as it is written. The order of the fields is that in which an error lists what is allowed."""

    template: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")] | None = None
    machine: Size = Size()
    packages: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+$", max_length=100)]],
        msgspec.Meta(max_length=200),
    ] = []
    install: bool = True
    paths: _Globs = []
    warm: _Steps = []
    services: Annotated[list[Service], msgspec.Meta(max_length=16)] = []
    verify: _Steps = []
    page_cache: Annotated[list[Path_], msgspec.Meta(max_length=64)] = []
    egress: _Egress = []
    warm_egress: _Egress = []
    labels: Annotated[
        list[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]],
        msgspec.Meta(max_length=16),
    ] = []
    branches: _Globs = []
    incremental: bool = True


class RepositoryRecipe(msgspec.Struct, frozen=True):
    """What a repository asks for; without a file, the defaults. None: as the base template has it.

    ``paths``: directories, or globs of them, whose lock files count (none: all). ``branches``: globs of those
    that get a parent of their own (none: the default branch). ``install``: whether lock files are installed.
    """

    template: str | None = None
    vcpus: int | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    packages: tuple[str, ...] = ()
    services: tuple[Service, ...] = ()
    warm: tuple[WarmStep, ...] = ()
    install: bool = True
    paths: tuple[str, ...] = ()
    egress: tuple[str, ...] = ()
    warm_egress: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    verify: tuple[WarmStep, ...] = ()
    incremental: bool = True
    page_cache: tuple[str, ...] = ()


def parse_repository_recipe(data: bytes | None, *, file: str = ".microvm.yml") -> RepositoryRecipe:
    """The recipe in the text of a file; the defaults when there is none, or nothing in it. Raises RecipeError."""
    if data is None or not any(
        line.strip() and not line.lstrip().startswith(b"#") for line in data.splitlines()
    ):
        return RepositoryRecipe()
    values, lines = parse(data, file)
    read = RecipeFile(path=file, values=values, lines=lines)
    source = convert(read, RepositorySource)
    _check(source, read)
    memory, disk = source.machine.memory, source.machine.disk
    return RepositoryRecipe(
        template=source.template,
        vcpus=source.machine.vcpus,
        memory_mib=None if memory is None else check_size(read, "memory", memory),
        disk_mib=None if disk is None else check_size(read, "disk", disk),
        packages=_once(source.packages),
        services=tuple(source.services),
        warm=tuple(source.warm),
        install=source.install,
        paths=_once(source.paths),
        egress=_once(source.egress),
        warm_egress=_once(source.warm_egress),
        labels=_once(source.labels),
        branches=_once(source.branches),
        verify=tuple(source.verify),
        incremental=source.incremental,
        page_cache=_once(source.page_cache),
    )


def _check(source: RepositorySource, file: RecipeFile) -> None:
    """What types alone cannot say. Raises RecipeError at the value that is wrong."""
    check_egress(file, "egress", source.egress)
    check_egress(file, "warm_egress", source.warm_egress)
    for index, path in enumerate(source.paths):
        if path.startswith("/") or ".." in path.split("/"):
            raise file.error(
                "must be a directory of the repository, written without / at its start and ..",
                ("paths", index),
            )
    for key, named in (("warm", source.warm), ("services", source.services), ("verify", source.verify)):
        names = [one.name for one in named]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise file.error(f"{name!r} is the name of an earlier one", (key, index, "name"))


def _once(words: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(words))
