"""``microvm bakes``: what the service bakes by itself, and what became of it."""

import asyncio
import sys
from collections.abc import Sequence

from runner_service import client
from runner_service.commands import show
from runner_service.domain import Bake
from runner_service.settings import Settings


async def bakes(settings: Settings, api: str | None, limit: int, *, as_json: bool) -> int:
    """The newest bakes, with why the failed ones failed."""
    async with client.source(settings, api) as source:
        found = await source.bakes(limit)
    if as_json:
        show.print_json(found)
        return 0
    rows = [
        (bake.id, bake.name, bake.key[:12], bake.commit[:12], _state(bake), bake.attempts,
         show.ago(bake.created_at), show.seconds(bake.seconds), bake.why, _trouble(bake))
        for bake in found
    ]  # fmt: skip
    columns = ("BAKE", "PARENT", "KEY", "COMMIT", "STATE", "TRIES", "QUEUED", "SECONDS", "WHY", "TROUBLE")
    show.table(columns, rows, empty="nothing was baked yet", right=("BAKE", "TRIES", "QUEUED", "SECONDS"))
    return 0


async def log(settings: Settings, api: str | None, bake: int, *, follow: bool) -> int:
    """The raw log of all attempts; on a terminal only text and colours of it."""
    terminal = sys.stdout.isatty()
    async with client.source(settings, api) as source:
        async for piece in source.bake_log(bake, follow=follow):
            await asyncio.to_thread(show.write, show.for_terminal(piece) if terminal else piece)
    return 0


def _state(bake: Bake) -> str:
    if bake.state == "done":
        return "done (was there)" if bake.cache_hit else "done (incremental)" if bake.incremental else "done"
    if bake.state == "queued" and bake.attempts:
        return "queued again"
    return bake.state


def _trouble(bake: Bake) -> str:
    """Where and why it failed, in one line; the output is a guest's, so only its text is shown."""
    if bake.code is None or bake.state == "done":
        return ""
    where = f"{bake.step}: " if bake.step else ""
    return _plain([f"{where}{bake.message or bake.code}", bake.advice or ""])


def _plain(parts: Sequence[str]) -> str:
    text = " — ".join(part for part in parts if part).partition("\n")[0][:300]
    return show.for_terminal(text.encode()).decode(errors="replace")
