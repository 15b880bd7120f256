"""What a bake installs: one step a directory and ecosystem, in an order that never changes."""

import posixpath
import shlex
from collections.abc import Collection, Sequence

import msgspec

from images.ecosystems import TABLE, kind, kind_of
from images.globs import matches
from images.lockfiles import Inventory, LockFile, within

_MAX_STEPS = 40
# Directories of what tests read, not of what the repository runs.
_FIXTURES = frozenset(("testdata", "fixtures", "__fixtures__", "test-fixtures", "__snapshots__"))
_ORDER = {row.name: index for index, row in enumerate(TABLE)}


class Install(msgspec.Struct, frozen=True):
    """One step: the script ``run`` for ``/bin/sh -eu`` in ``directory`` (of the work tree; "" is its root).
    Without the program ``needs`` on PATH it is left out. ``timeout`` in seconds."""

    ecosystem: str
    directory: str
    lockfile: str
    run: str
    needs: str
    timeout: float

    @property
    def name(self) -> str:
        return f"{self.ecosystem}: {self.lockfile}"


class InstallPlan(msgspec.Struct, frozen=True):
    """``steps`` in their order, and in words for people what is left out and why."""

    steps: tuple[Install, ...]
    notes: tuple[str, ...] = ()


def plan_installs(inventory: Inventory, *, paths: Sequence[str] = (), limit: int = _MAX_STEPS) -> InstallPlan:
    """The installs a commit asks for: upper directories first, then by name, toolchains before packages.

    ``paths`` narrow them, and name directories that would be left out otherwise. Pure.
    """
    groups: dict[tuple[str, str], list[LockFile]] = {}
    notes: list[str] = []
    for file in within(inventory.files, paths):
        row = kind(file.kind)
        if file.kind == "link":
            notes.append(f"{_shown(file.path)} links to no file of the repository: not installed")
        elif row is not None and row.run:
            groups.setdefault((_directory(file), row.ecosystem), []).append(file)
    steps: list[tuple[tuple[int, str, int], Install]] = []
    for (directory, _), files in groups.items():
        row_index = min(_ORDER[file.kind] for file in files)
        chosen = [file for file in files if _ORDER[file.kind] == row_index]
        ignored = [file for file in files if _ORDER[file.kind] != row_index]
        install = _install(row_index, directory, chosen)
        if reason := _left_out(install, groups, named=bool(paths)):
            notes.append(f"{_shown(install.lockfile)} {reason}")
            continue
        notes += [
            f"{_shown(file.path)} not installed: {_shown(install.lockfile)} goes first" for file in ignored
        ]
        steps.append(((_depth(directory), directory, row_index), install))
    ordered = [install for _, install in sorted(steps, key=lambda step: step[0])]
    if len(ordered) > limit:
        notes.insert(
            0,
            f"{len(ordered)} directories have something to install; the first {limit} are installed. "
            "Name the ones that matter under paths in .microvm.yml",
        )
    return InstallPlan(steps=tuple(ordered[:limit]), notes=tuple(notes))


def _directory(file: LockFile) -> str:
    """Where the command runs: gradle/wrapper/… belongs to the directory above all of that."""
    row = kind(file.kind)
    inner = next((glob for glob in row.files if matches(f"**/{glob}", file.path)), "") if row else ""
    return "/".join(file.path.split("/")[: -1 - inner.count("/")])


def _install(row_index: int, directory: str, files: list[LockFile]) -> Install:
    row = TABLE[row_index]
    names = [file.path[len(directory) + 1 if directory else 0 :] for file in files]
    names.sort(key=lambda name: (_place(row.files, name), name))
    run = row.run
    if "{file}" in run:
        run = "\n".join(run.replace("{file}", shlex.quote(name)) for name in names)
    return Install(
        ecosystem=row.ecosystem,
        directory=directory,
        lockfile=posixpath.join(directory, names[0]),
        run=run,
        needs=row.needs,
        timeout=row.timeout,
    )


def _place(globs: Sequence[str], name: str) -> int:
    return next(index for index, glob in enumerate(globs) if matches(glob, name))


def _left_out(install: Install, groups: Collection[tuple[str, str]], *, named: bool) -> str | None:
    """Why a step is not taken; None when it is."""
    parts = install.directory.split("/")
    if "\\" in install.directory or not install.directory.isprintable():
        return "is in a directory whose name no shell script should hold: not installed"
    if not named and not _FIXTURES.isdisjoint(parts):
        return "is a fixture of tests: not installed unless paths in .microvm.yml names it"
    row = kind_of(install.lockfile.encode())
    if row is not None and row.whole_tree:
        above = ["/".join(parts[:count]) for count in range(len(parts))] if install.directory else []
        covering = next((one for one in above if (one, install.ecosystem) in groups), None)
        if covering is not None:
            return f"is part of the {install.ecosystem} build in {_shown(covering) or 'the root'}"
    return None


def _depth(directory: str) -> int:
    return directory.count("/") + 1 if directory else 0


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in path)[:200]
