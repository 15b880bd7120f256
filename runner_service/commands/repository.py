"""``microvm bake --repo``: the parent of a repository, made here and now."""

import re
import sys
from typing import Any
from urllib.parse import urlsplit

import msgspec

from images.errors import BakeFailed, ImageError
from images.mirror import Credential
from images.warm import WarmBaked, bake_repository
from images.warm_plan import Request, check_repository
from runner_service.commands import show
from runner_service.commands.progress import Progress
from runner_service.repositories import permitted_by
from runner_service.settings import Settings
from vmm_core.engine import Engine
from vmm_core.errors import VmmError

_CREDENTIAL_BYTES = 16 << 10


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said. ``name`` is owner/repo, where the URL does not tell."""

    url: str
    ref: str | None
    branch: str | None
    name: str | None
    server: str | None
    template: str | None
    force: bool
    credential_stdin: bool


async def bake(settings: Settings, wish: Wish, *, as_json: bool) -> int:
    """Bake with live progress on stderr; the result, or with ``--json`` the failure too, on stdout."""
    request = Request(
        url=wish.url,
        spelled=check_repository(wish.name or name_in(wish.url)),
        server=wish.server,
        template=wish.template or settings.runners.default_template,
        ref=wish.ref,
        branch=wish.branch,
        credential=_read_credential() if wish.credential_stdin else None,
        permitted=permitted_by(settings.bakes),
        mirrors=settings.bakes.mirrors,
        mirror_mib=settings.bakes.mirror_mib,
    )
    try:
        with Progress() as tell:
            async with Engine.open(settings.data_dir, resolvers=settings.runners.resolvers or None) as engine:
                baked = await bake_repository(engine, request, progress=tell, force=wish.force)
    except (ImageError, VmmError) as error:
        if not as_json:
            raise
        show.print_json(_failure(error))
        return 1
    if as_json:
        show.print_json(_told(baked))
    else:
        sys.stdout.write(_sentence(baked))
    return 0


def name_in(url: str) -> str:
    """``owner/repo``: the last two parts of a repository's URL or path, without ``.git``."""
    path = urlsplit(url).path if "://" in url else re.sub(r"^[^/]*:", "", url)
    parts = [part for part in path.removesuffix("/").removesuffix(".git").split("/") if part]
    return "/".join(parts[-2:])


def _read_credential() -> Credential | None:
    words = sys.stdin.buffer.read(_CREDENTIAL_BYTES)
    return msgspec.json.decode(words, type=Credential) if words.strip() else None


def _told(baked: WarmBaked) -> dict[str, Any]:
    told = msgspec.to_builtins(baked)
    steps = [{"step": step, "seconds": round(seconds, 3)} for step, seconds in baked.steps]
    return {**told, "seconds": round(baked.seconds, 3), "steps": steps}


def _sentence(baked: WarmBaked) -> str:
    if baked.cache_hit:
        how = "was baked already"
    else:
        how = f"baked in {baked.seconds:.1f} s" + (" from the last parent" if baked.incremental else "")
    return f"{baked.name} {baked.digest[:12]} {how}\n"


def _failure(error: ImageError | VmmError) -> dict[str, Any]:
    if isinstance(error, BakeFailed):
        return {
            "error": error.code,
            "step": error.step,
            "message": error.message,
            "advice": error.advice,
            "output": list(error.output),
        }
    return {"error": error.code, "step": None, "message": str(error), "advice": "", "output": []}
