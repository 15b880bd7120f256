"""What this host's apt knows: its Debian sources and options, and the exact packages a request comes to.

apt's own tools are asked, never its files parsed: they know every format, which sources are disabled,
and whose they are (``Origin: Debian`` in the signed Release file). Their start-up takes about a second,
so answers are kept under a fingerprint of everything they depend on (configuration and package lists).
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from images import commands
from images.cache import Cache
from images.errors import BuildFailed

_APT = Path("/etc/apt")
_LISTS = Path("/var/lib/apt/lists")
_POCKET = re.compile(r"-(updates|security|backports|backports-sloppy|proposed-updates)$")
# Acquire options that say how this host reaches its mirrors. The rest is about its own indexes and files.
_OPTION = re.compile(
    r"^(Acquire::(?:Check-Valid-Until|Check-Date|Max-FutureTime|Retries|ForceIPv4|ForceIPv6|Queue-Mode|"
    r'(?:http|https)(?:::[^\s"]+)?)) "(.+)";$'
)


class Archive(msgspec.Struct, frozen=True):
    """The Debian archive as this host reaches it. ``sources`` are one-line apt sources."""

    suite: str
    sources: tuple[str, ...]


class Package(msgspec.Struct, frozen=True, order=True):
    name: str
    version: str


class Resolution(msgspec.Struct, frozen=True):
    """A request and the packages it comes to, sorted by name."""

    archive: Archive
    packages: tuple[Package, ...]


async def resolve(cache: Cache, request: Iterable[str], *, say: Callable[[str], None]) -> Resolution:
    """The archive and every package (with version) that ``request`` and the essential set come to.

    Raises BuildFailed when the host has no Debian sources or a package does not exist (named).
    """
    wanted = tuple(sorted(set(request)))

    async def build(directory: Path) -> None:
        archive = await _archive(say)
        packages = await _simulate(wanted)
        data = msgspec.json.encode(Resolution(archive=archive, packages=packages))
        (directory / "resolution.json").write_bytes(data)

    if not _has_lists():
        await _update(say)
    entry = await cache.get("apt", _digest("resolve", fingerprint(), *wanted), build)
    return msgspec.json.decode((entry / "resolution.json").read_bytes(), type=Resolution)


async def candidate(
    cache: Cache, name: str, *, say: Callable[[str], None]
) -> tuple[Package, tuple[str, ...]]:
    """The candidate version of one package, and the names in its Depends."""

    async def build(directory: Path) -> None:
        output = await commands.run(
            ["apt-cache", "--no-all-versions", "show", name],
            timeout=60,
            doing=f"look {name} up in apt's lists",
        )
        (directory / "show.txt").write_bytes(output)

    if not _has_lists():
        await _update(say)
    entry = await cache.get("apt", _digest("show", fingerprint(), name), build)
    text = (entry / "show.txt").read_text()
    version = re.search(r"^Version: (\S+)$", text, re.MULTILINE)
    if version is None:
        raise BuildFailed(f"apt on this host has no version of {name}. Run apt-get update and try again")
    depends = re.search(r"^Depends: (.+)$", text, re.MULTILINE)
    names = re.findall(r"(?:^|, )([a-z0-9][a-z0-9+.-]*)", depends.group(1)) if depends else []
    return Package(name=name, version=version.group(1)), tuple(names)


async def download(package: Package, into: Path, *, say: Callable[[str], None]) -> Path:
    """Fetch a .deb (apt checks its signature chain) and return its path.

    Package lists that are too old are updated once.
    """
    request = ["apt-get", "download", "-q", f"{package.name}={package.version}"]
    # apt would otherwise complain that its unprivileged user cannot write here.
    request[1:1] = ["-o", "APT::Sandbox::User=root"]
    try:
        await commands.run(request, timeout=600, doing=f"download {package.name}", cwd=into)
    except BuildFailed:
        await _update(say)
        await commands.run(request, timeout=600, doing=f"download {package.name}", cwd=into)
    found = list(into.glob(f"{package.name}_*.deb"))
    if len(found) != 1:
        raise BuildFailed(f"apt-get download {package.name} left {len(found)} files where one was expected")
    return found[0]


async def acquire_options() -> tuple[str, ...]:
    """apt.conf lines that say how this host reaches its mirrors. They may hold a proxy's password: keep them
    out of argv, out of images and out of caches."""
    dump = await commands.run(["apt-config", "dump"], timeout=60, doing="read apt's configuration")
    return tuple(line for line in dump.decode().splitlines() if _OPTION.match(line))


def fingerprint() -> str:
    """Digest of apt's configuration (bytes) and of its package lists (name, size, time)."""
    digest = hashlib.sha256()
    for path in sorted([*_APT.glob("*.conf"), *_APT.glob("sources.list"), *_APT.glob("*.d/*")]):
        if path.is_file():
            digest.update(f"{path}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(_LISTS.glob("*Packages*")):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


async def _archive(say: Callable[[str], None]) -> Archive:
    """Raises BuildFailed when none of the host's sources is Debian's."""
    targets = await _targets()
    if not targets:
        await _update(say)
        targets = await _targets()
    if not targets:
        raise BuildFailed(
            "this host's apt has no Debian source (none that says Origin: Debian). "
            "Images are made from the host's own Debian mirrors; configure one and run apt-get update"
        )
    grouped: dict[tuple[str, str], list[str]] = {}
    for uri, release, component in targets:
        grouped.setdefault((uri, release), []).append(component)
    suites = sorted({release for _, release in grouped if not _POCKET.search(release)})
    if len(suites) != 1:
        raise BuildFailed(
            f"this host's apt mixes several Debian suites ({', '.join(suites) or 'none'}); one is needed"
        )
    sources = tuple(f"deb {uri} {release} {' '.join(parts)}" for (uri, release), parts in grouped.items())
    return Archive(suite=suites[0], sources=sources)


async def _targets() -> list[tuple[str, str, str]]:
    """(URI, release, component) of every enabled source that is Debian's."""
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    output = await commands.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        timeout=60,
        doing="list apt's sources",
    )
    found: list[tuple[str, str, str]] = []
    for line in output.decode().splitlines():
        origin, uri, release, component = line.split("|")
        if origin != "Debian" or (uri, release, component) in found:
            continue
        parts = urlsplit(uri)
        if parts.password is not None or parts.username is not None:
            raise BuildFailed(
                f"the apt source for {release} has a password or token in its address, which would reach the image. "
                "Move it to /etc/apt/auth.conf.d"
            )
        found.append((uri, release, component))
    return found


async def _simulate(wanted: Sequence[str]) -> tuple[Package, ...]:
    """What apt would install into an empty system: what mmdebstrap's minbase variant does."""
    settings = (
        "Dir::State::status=/dev/null",
        "APT::Install-Recommends=0",
        "APT::Get::Show-User-Simulation-Note=0",
    )
    command = ["apt-get", "--simulate", *(word for setting in settings for word in ("-o", setting))]
    command += ["install", "?essential", "apt", *wanted]
    try:
        output = await commands.run(command, timeout=120, doing="resolve the packages of the recipe")
    except BuildFailed as error:
        raise BuildFailed(
            f"{error.message}: no such set of packages. Check the recipe's packages, or run apt-get update",
            output=error.output,
        ) from None
    matches = re.findall(r"^Inst (\S+) \((\S+) ", output.decode(), re.MULTILINE)
    return tuple(sorted(Package(name=name, version=version) for name, version in matches))


async def _update(say: Callable[[str], None]) -> None:
    say("updating apt's package lists")
    await commands.run(["apt-get", "update", "-q"], timeout=600, doing="update apt's package lists")


def _has_lists() -> bool:
    return any(_LISTS.glob("*Packages*"))


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()
