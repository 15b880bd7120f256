"""``microvm templates …``: what can be forked, what is in it, what its name has meant, and what may go."""

import asyncio
import contextlib
import fnmatch
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import msgspec

from images.catalog import Catalog, Template
from images.catalog import templates as list_templates
from images.contents import Contents, contents
from images.history import Row, withdrawn
from images.prune import Pruned
from images.prune import prune as prune_catalog
from images.schema import parse_size
from runner_service.commands import show
from vmm_core.disk import open_pool
from vmm_core.errors import UnknownTemplate

_LINES_SHOWN = 12
_MOST_CHARS = 4000
# Labels that tell what is inside, beside those with a line of their own.
_NOTED = ("suite", "kernel", "inputs", "made.from")


class Wish(msgspec.Struct, frozen=True):
    """What to prune to."""

    budget_bytes: int | None
    keep: int
    dry_run: bool


async def listing(data_dir: Path, repository: str | None, *, as_json: bool) -> int:
    found: list[Template] = []
    if data_dir.is_dir():
        async with open_pool(data_dir) as pool:
            found = await asyncio.to_thread(list_templates, Catalog(pool).store)
    if repository is not None:
        wanted = repository.lower()
        found = [t for t in found if t.repository and fnmatch.fnmatchcase(t.repository, wanted)]
    if as_json:
        show.print_json(found)
        return 0
    # Those that everybody uses before those of repositories.
    found.sort(key=lambda t: (t.repository is not None, t.name))
    rows = [
        (_plain(t.name), t.digest[:12], f"{t.machine.vcpus}×{t.machine.memory_mib}", t.runner, " ".join(t.labels),
         show.ago(t.created_at), show.ago(t.last_used_at), _plain(_described(t)))
        for t in found
    ]  # fmt: skip
    columns = ("NAME", "DIGEST", "CPU×MIB", "RUNNER", "LABELS", "AGE", "USED", "DESCRIPTION")
    empty = (
        "no template yet: microvm bake python-ci"
        if repository is None
        else f"no parent of {repository}: microvm bake --repo URL"
    )
    show.table(columns, rows, empty=empty, right=("AGE", "USED"))
    return 0


def _described(t: Template) -> str:
    return t.description if t.repository is None else f"commit {(t.commit or '?')[:12]} on {t.base or '?'}"


async def show_one(data_dir: Path, ref: str, *, as_json: bool) -> int:
    async with _catalog(data_dir) as catalog:
        found = await asyncio.to_thread(contents, catalog, ref)
    if as_json:
        show.print_json(found)
    else:
        show.table(("WHAT", "IS"), [(what, _plain(text)) for what, text in _told(found) if text], empty="")
    return 0


def _told(found: Contents) -> list[tuple[str, str]]:
    """All of it in lines."""
    t, machine = found.template, found.template.machine
    files = ", ".join(f"{name} {show.mib(size)}" for name, size in found.files.items())
    bases = [
        f"{base.digest[:12]} {base.name}{'' if base.there else ' (gone)'}".strip() for base in found.bases
    ]
    return [
        ("name", t.name),
        ("digest", t.digest),
        ("names that mean it", " ".join(found.names) or "none any more"),
        ("description", t.description),
        ("made", f"{show.ago(t.created_at)} ago, last used {show.ago(t.last_used_at)} ago"),
        ("repository", f"{t.repository}, branch {t.branch}, for {t.owner} only" if t.repository else ""),
        ("commit", t.commit or ""),
        ("dependency key", t.key or ""),
        ("baked from", " ".join(filter(None, (found.baked_from, t.base, (t.base_digest or "")[:12])))),
        ("stands on", "\n".join(bases)),
        ("recipe", msgspec.json.encode(found.recipe).decode() if found.recipe else ""),
        ("lock files", _some([" ".join(one) for one in found.lockfiles])),
        ("tools", _some([f"{name} {version}" for name, version in found.tools.items()])),
        ("machine", f"{machine.vcpus} vCPU, {machine.memory_mib} MiB memory, {machine.disk_mib} MiB disk"),
        ("network", _network(t)),
        ("GitHub labels", " ".join(t.labels)),
        ("runner", t.runner or ""),
        ("made with", f"{found.vmm_version}, {found.accel}, CPU {found.cpu_model}"),
        ("noted", "\n".join(f"{key}: {text}" for key, text in found.labels.items() if key in _NOTED)),
        ("files (MiB)", f"{files}, holes included"),
        ("takes of the pool", f"{show.mib(found.own_bytes)} MiB that nothing else shares"),
        ("pinned", "yes" if found.pinned else "no"),
        ("used by", _some(list(found.users)) or "nothing"),
        ("history", _some([_sentence(row) for row in found.history])),
    ]


def _network(t: Template) -> str:
    network = t.machine.network
    allowed = _some([f"{rule.host}:{rule.port or '*'}" for rule in network.allow])
    return {"none": "none", "list": f"only\n{allowed}", "internet": f"internet\n{allowed}"}[network.mode]


def _some(lines: Sequence[str]) -> str:
    """The first lines, and how many more there are."""
    more = len(lines) - _LINES_SHOWN
    return "\n".join([*lines[:_LINES_SHOWN], *([f"and {more} more (--json shows all)"] if more > 0 else [])])


def _plain(text: str) -> str:
    """Some of it was written by a repository or a guest: text, and nothing that a terminal obeys."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text[:_MOST_CHARS])


def _sentence(row: Row) -> str:
    return f"{show.ago(row.at)} ago: {row.action} {row.digest[:12]} ({row.why})"


async def history(data_dir: Path, name: str, *, as_json: bool) -> int:
    async with _catalog(data_dir) as catalog:
        rows = await asyncio.to_thread(catalog.history, name)
        there = {snapshot.digest for snapshot in await asyncio.to_thread(catalog.store.list)}
        now = catalog.store.names().get(name)
    bad = withdrawn(rows[::-1])

    def state(digest: str) -> str:
        if digest == now:
            return "current"
        if digest not in there:
            return "gone"
        return "rolled back" if digest in bad else "kept"

    states = [(row, state(row.digest)) for row in rows]
    if as_json:
        show.print_json([{**msgspec.to_builtins(row), "state": word} for row, word in states])
        return 0
    table = [
        (show.ago(row.at), row.action, row.digest[:12], word, (row.commit or "")[:12], row.why)
        for row, word in states
    ]
    show.table(("AGE", "ACTION", "DIGEST", "STATE", "COMMIT", "WHY"), table, empty="", right=("AGE",))
    return 0


async def promote(data_dir: Path, name: str, ref: str, why: str, *, as_json: bool) -> int:
    async with _catalog(data_dir) as catalog:
        digest = (await asyncio.to_thread(catalog.store.resolve, ref)).digest
        return _turned(name, await asyncio.to_thread(catalog.promote, name, digest, why), as_json=as_json)


async def rollback(data_dir: Path, name: str, *, as_json: bool) -> int:
    async with _catalog(data_dir) as catalog:
        return _turned(name, await asyncio.to_thread(catalog.rollback, name), as_json=as_json)


def _turned(name: str, row: Row, *, as_json: bool) -> int:
    if as_json:
        show.print_json({"name": name, **msgspec.to_builtins(row)})
    else:
        sys.stdout.write(f"{name} means {row.digest[:12]} ({row.why})\n")
    return 0


async def pin(data_dir: Path, ref: str, *, pinned: bool, as_json: bool) -> int:
    async with _catalog(data_dir) as catalog:
        digest = (await asyncio.to_thread(catalog.store.resolve, ref)).digest
        await asyncio.to_thread(catalog.pin if pinned else catalog.unpin, digest)
    if as_json:
        show.print_json({"digest": digest, "pinned": pinned})
    else:
        sys.stdout.write(f"{digest[:12]} {'is never pruned' if pinned else 'may be pruned'}\n")
    return 0


def parse_budget(text: str | None) -> int | None:
    """Bytes. Raises ValueError that says what is allowed."""
    return None if text is None else parse_size(text) << 20


async def prune(data_dir: Path, wish: Wish, *, as_json: bool) -> int:
    async with _catalog(data_dir) as catalog:
        done = await asyncio.to_thread(
            prune_catalog, catalog, budget_bytes=wish.budget_bytes, keep=wish.keep, dry_run=wish.dry_run
        )
    if as_json:
        show.print_json(done)
        return 0
    rows = [
        (one.name, one.digest[:12], show.mib(one.bytes), show.ago(one.last_used), one.why)
        for one in done.removed
    ]
    columns = ("NAME", "DIGEST", "MIB", "USED", "WHY")
    show.table(columns, rows, empty="nothing to remove", right=("MIB", "USED"))
    sys.stdout.write(_result(done, wish))
    return 0


def _result(done: Pruned, wish: Wish) -> str:
    verb = "would take" if wish.dry_run else "take"
    text = f"templates {verb} {show.mib(done.bytes_after)} MiB of the pool, before {show.mib(done.bytes_before)}\n"
    if wish.budget_bytes is not None and done.bytes_after > wish.budget_bytes:
        text += f"over the budget by {show.mib(done.bytes_after - wish.budget_bytes)} MiB, and nothing else may go:\n"
        text += "".join(f"  {one.name} {one.digest[:12]}: {one.why}\n" for one in done.stays)
    return text


@contextlib.asynccontextmanager
async def _catalog(data_dir: Path) -> AsyncGenerator[Catalog]:
    if not data_dir.is_dir():
        raise UnknownTemplate(
            f"there is no data directory {data_dir}, so no template: microvm bake python-ci"
        )
    async with open_pool(data_dir) as pool:
        yield Catalog(pool)
