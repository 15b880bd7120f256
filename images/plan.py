"""Everything a bake depends on, gathered and checked before anything slow begins, and the digest of that."""

import asyncio
import hashlib
import os
from collections.abc import AsyncGenerator, Sequence
from importlib import resources
from pathlib import Path

import httpx
import msgspec

from images import apt, commands, registries, rootfs
from images.cache import Cache
from images.errors import BakeFailed, BuildFailed, RecipeError
from images.events import Step
from images.kernel import Kernel, get_kernel
from images.recipe import Recipe
from images.schema import INTERNET, PACKAGE_REGISTRIES, RunnerSource, TreeFile, parse_egress
from vmm_core.engine import Engine
from vmm_core.errors import BadRequest
from vmm_core.machine import BootImage, EgressRule, Network

_TOOLS = (
    "apt-get",
    "chroot",
    "dpkg-deb",
    "fallocate",
    "lz4",
    "mkfs.ext4",
    "mmdebstrap",
    "setpriv",
    "tar",
    "unshare",
)
_LOCAL_CAS = Path("/usr/local/share/ca-certificates")
_CHUNK = 1 << 20
_MAX_TARBALL = 2 << 30
# Raise it when the same inputs are baked in another way.
_FORMAT = 1


class Plan(msgspec.Struct, frozen=True):
    """A checked recipe with everything it needs at hand. ``inputs`` is the digest of all of it."""

    recipe: Recipe
    resolution: apt.Resolution
    wanted: tuple[str, ...]
    kernel: Kernel
    contents: rootfs.Contents
    inputs: str


async def make_plan(engine: Engine, cache: Cache, recipe: Recipe, step: Step) -> Plan:
    """Check the recipe against this host and work out its digest. Quick when the caches are warm.

    Raises BakeFailed, RecipeError (a file or tarball is missing or wrong) or BuildFailed.
    """
    step("checking the recipe and this host")
    _check_host()
    files = tuple(_read_file(recipe, item) for item in recipe.files)
    await _check_egress(engine, recipe)
    tarball, sha256 = await _runner(cache, recipe, step) if recipe.runner is not None else (None, "")
    certificates = _certificates() if recipe.ca == "host" else {}
    conf = await _registry_files(recipe, local_ca=bool(certificates))
    wanted = tuple(sorted({*rootfs.BASE_PACKAGES, *recipe.packages, *(("sudo",) if recipe.sudo else ())}))
    resolution = await apt.resolve(cache, wanted, say=step)
    kernel = await get_kernel(cache, say=Step("kernel", step.progress))
    contents = rootfs.Contents(
        agent=resources.files("vmm_core.guest").joinpath("agent.py").read_bytes(),
        certificates=certificates,
        modules=recipe.kernel_modules,
        files=(*conf, *files),
        sudo=recipe.sudo,
        disk_mib=recipe.machine.disk_mib,
        runner_tarball=tarball,
        runner_sha256=sha256,
    )
    # The probe behind the choice stops at the kernel's first line, so any file will do as its disk.
    image = BootImage(kernel=kernel.vmlinux, initrd=kernel.initrd, disk=kernel.initrd)
    words = [
        str(_FORMAT),
        rootfs.disk_key(rootfs.package_key(resolution), kernel, contents),
        engine.info.vmm,
        await engine.choose_accel(image),
        hashlib.sha256(settle_program()).hexdigest(),
        normalised(recipe),
    ]
    inputs = hashlib.sha256("\0".join(words).encode()).hexdigest()
    return Plan(
        recipe=recipe, resolution=resolution, wanted=wanted, kernel=kernel, contents=contents, inputs=inputs
    )


def normalised(recipe: Recipe) -> str:
    """What the recipe says, as one text: the same for the same meaning, wherever its files lie.

    Contents of files and of the runner's tarball are part of the root disk's key; their paths are not.
    """
    files = tuple(msgspec.structs.replace(item, source=None, content="") for item in recipe.files)
    runner = RunnerSource() if recipe.runner is not None else None
    stripped = msgspec.structs.replace(
        recipe, files=files, runner=runner, origin=(), made_from="", description=""
    )
    return msgspec.json.encode(stripped, order="sorted").decode()


def settle_program() -> bytes:
    """The program that runs in the guest at the end of a bake."""
    return resources.files("images").joinpath("settle.py").read_bytes()


async def open_networks(recipe: Recipe, step: Step) -> tuple[Network, Network]:
    """The network of the warm steps and that of jobs, ``package-registries`` looked up now."""
    warm, jobs = await open_cards(recipe.machine.network, (recipe.warm_egress, recipe.egress), step)
    return warm, jobs


async def open_cards(card: Network, lists: Sequence[Sequence[str]], step: Step) -> list[Network]:
    """The card, opened besides to what each of these egress lists names; ``package-registries`` is looked up once."""
    looked_up: tuple[EgressRule, ...] = ()
    if any(PACKAGE_REGISTRIES in names for names in lists):
        looked_up = await registries.package_registries(step)
    return [_opened(card, names, looked_up) for names in lists]


def _opened(card: Network, names: Sequence[str], looked_up: Sequence[EgressRule]) -> Network:
    rules = dict.fromkeys(card.allow)
    for name in names:
        if name != INTERNET:
            rules |= dict.fromkeys(looked_up if name == PACKAGE_REGISTRIES else (parse_egress(name),))
    mode = "internet" if INTERNET in names else card.mode
    return msgspec.structs.replace(card, mode=mode, allow=tuple(rules))


def _check_host() -> None:
    missing: list[str] = []
    for tool in _TOOLS:
        try:
            commands.require(tool)
        except BuildFailed as error:
            missing.append(error.message)
    if missing:
        raise BakeFailed("check", " ".join(missing), advice="Then bake again.")
    if os.geteuid() != 0:
        raise BakeFailed(
            "check", "building a root file system needs root", advice="Run the bake as root or with sudo."
        )


async def _check_egress(engine: Engine, recipe: Recipe) -> None:
    for key in ("egress", "warm_egress"):
        named: tuple[str, ...] = getattr(recipe, key)
        try:
            await engine.check_network(_opened(recipe.machine.network, named, ()))
        except BadRequest as error:
            raise RecipeError(str(error), file=recipe.origin[-1], key=key) from None


def _read_file(recipe: Recipe, item: TreeFile) -> rootfs.PlacedFile:
    if item.source is None:
        data = (item.content or "").encode()
    else:
        try:
            data = Path(item.source).read_bytes()
        except OSError as error:
            message = f"the source of {item.dest}, {item.source}, cannot be read: {error.strerror}"
            raise RecipeError(message, file=recipe.origin[-1], key="files") from None
    return rootfs.PlacedFile(dest=item.dest, data=data, mode=int(item.mode, 8), user=item.user)


async def _registry_files(recipe: Recipe, *, local_ca: bool) -> tuple[rootfs.PlacedFile, ...]:
    """How the guest's pip and npm reach what ``package-registries`` opens."""
    if PACKAGE_REGISTRIES not in (*recipe.egress, *recipe.warm_egress):
        return (rootfs.PlacedFile(dest="/etc/pip.conf", data=registries.pip_conf(None, local_ca=local_ca)),)
    conf = registries.pip_conf(await registries.pip_index(), local_ca=local_ca)
    files = (rootfs.PlacedFile(dest="/etc/pip.conf", data=conf),)
    registry = await registries.npm_registry()
    if registry is None:
        return files
    npmrc = registries.npmrc(registry, local_ca=local_ca)
    return (*files, rootfs.PlacedFile(dest=registries.NPMRC, data=npmrc, user="runner"))


def _certificates() -> dict[str, bytes]:
    """The CAs this host's administrator added, by file name (update-ca-certificates reads ``*.crt`` here)."""
    return {path.name: path.read_bytes() for path in sorted(_LOCAL_CAS.rglob("*.crt")) if path.is_file()}


async def _runner(cache: Cache, recipe: Recipe, step: Step) -> tuple[Path, str]:
    """The runner's tarball on this host and its sha256, checked."""
    source = recipe.runner
    assert source is not None  # noqa: S101  # the caller asked
    file = recipe.origin[-1]
    if source.tarball is not None:
        path = Path(source.tarball)
        if not path.is_file():
            raise RecipeError(f"there is no file {path}", file=file, key="runner.tarball")
        found = await asyncio.to_thread(_sha256, path)
        if source.sha256 is not None and found != source.sha256:
            message = f"{path} has sha256 {found}, not the {source.sha256} that is asked for"
            raise RecipeError(message, file=file, key="runner.sha256")
        return path, found
    if source.url is None or source.sha256 is None:
        raise RecipeError(
            f"{recipe.name} needs actions/runner: give runner.tarball=/path/to/actions-runner.tar.gz, "
            "or runner.url and runner.sha256",
            file=file,
            key="runner",
        )
    return await _download(cache, source.url, source.sha256, file, step), source.sha256


async def _download(cache: Cache, url: str, sha256: str, file: str, step: Step) -> Path:
    async def build(directory: Path) -> None:
        step(f"downloading {url}", 0.0)
        digest = hashlib.sha256()
        try:
            with (directory / "runner.tar.gz").open("wb") as target:
                async for chunk, fraction in _fetch(url):
                    digest.update(chunk)
                    target.write(chunk)
                    step(f"downloading {url}", fraction)
        except httpx.HTTPError as error:
            raise BuildFailed(f"could not download {url}: {error or type(error).__name__}") from error
        if digest.hexdigest() != sha256:
            message = f"{url} has sha256 {digest.hexdigest()}, not the {sha256} that is asked for"
            raise RecipeError(message, file=file, key="runner.sha256")

    return await cache.get("runner", sha256, build) / "runner.tar.gz"


async def _fetch(url: str) -> AsyncGenerator[tuple[bytes, float | None]]:
    """The body in pieces, each with the fraction that is here. Raises httpx.HTTPError or BuildFailed."""
    async with (
        httpx.AsyncClient(timeout=60, follow_redirects=True) as client,
        client.stream("GET", url) as answer,
    ):
        answer.raise_for_status()
        total = int(answer.headers.get("content-length", 0))
        done = 0
        async for chunk in answer.aiter_bytes(_CHUNK):
            done += len(chunk)
            if done > _MAX_TARBALL:
                raise BuildFailed(f"{url} is larger than {_MAX_TARBALL >> 30} GiB; that is no actions/runner")
            yield chunk, min(1.0, done / total) if total else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
