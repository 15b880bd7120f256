"""``microvm doctor | bake``: what this host offers, and what is made on it."""

import sys
from collections.abc import Mapping
from pathlib import Path

from images.bake import bake as bake_recipe
from images.recipe import load_recipe
from runner_service.commands import show
from runner_service.commands.progress import Progress
from vmm_core.doctor import check
from vmm_core.engine import Engine


async def doctor(data_dir: Path, *, as_json: bool) -> int:
    """Print the findings; 1 when something is missing that the service cannot do without."""
    findings = await check(data_dir)
    if as_json:
        show.print_json(findings)
    else:
        words = {True: "ok", False: "MISSING", None: "note"}
        rows = [(words[one.ok], one.name, one.detail, one.advice) for one in findings]
        show.table(("", "WHAT", "FOUND", "WHAT TO DO"), rows, empty="nothing to tell")
    return 1 if any(one.ok is False for one in findings) else 0


async def bake(
    data_dir: Path, recipe: str, overrides: Mapping[str, str], *, force: bool, as_json: bool
) -> int:
    """Bake with live progress on stderr; the result on stdout."""
    loaded = load_recipe(recipe, overrides=overrides)
    with Progress() as tell:
        async with Engine.open(data_dir) as engine:
            baked = await bake_recipe(engine, loaded, progress=tell, force=force)
    manifest = baked.snapshot.manifest
    if as_json:
        show.print_json(
            {
                "name": loaded.name,
                "digest": manifest.digest,
                "cache_hit": baked.cache_hit,
                "seconds": round(baked.seconds, 3),
                "steps": [{"step": step, "seconds": round(seconds, 3)} for step, seconds in baked.steps],
            }
        )
        return 0
    how = "was baked already" if baked.cache_hit else f"baked in {baked.seconds:.1f} s"
    sys.stdout.write(f"{loaded.name} {manifest.digest[:12]} {how}\n")
    return 0
