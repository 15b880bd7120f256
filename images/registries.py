"""Where this host gets Python and Node packages: what ``package-registries`` in an egress list stands for.

pip and npm are asked, so no registry's name stands in our code: their configuration names the index, a dry run
or a look at one package tells which hosts serve the files. A host without npm has no registry of npm's to
tell: its guests then reach none.
"""

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import msgspec

from images import commands
from images.errors import BuildFailed
from vmm_core.machine import EgressRule

# Any package serves to see where files come from; these every index has.
_PROBE, _NPM_PROBE = "pip", "npm"
# npm's global configuration in a guest whose Node.js stands in /usr/local.
NPMRC = "/usr/local/etc/npmrc"
_QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "NO_COLOR": "1", "COLUMNS": "400"}


class PipIndex(msgspec.Struct, frozen=True):
    """``url`` of the index; ``default`` when that is what pip uses unless told otherwise."""

    url: str
    default: bool


async def pip_index() -> PipIndex:
    """The index this host's pip is configured for. Raises BuildFailed when its address holds credentials."""
    listed = await _pip("config", "list", doing="read pip's configuration")
    # Later lines win, as in pip: files first, then the environment.
    found = re.findall(r"^(?:global|install|download|:env:)\.index-url='([^']+)'", listed, re.MULTILINE)
    if found:
        url = found[-1]
        if has_credentials(url):
            raise BuildFailed(
                "this host's pip index has a password or token in its address, which would reach the template. "
                "Give pip the password through ~/.netrc, or set PIP_INDEX_URL to an address without one"
            )
        return PipIndex(url=url, default=False)
    told = await _pip("install", "--help", doing="ask pip for its default index")
    default = re.search(r"--index-url.*?\(default\s+(https?://[^\s)]+)\)", told, re.DOTALL)
    if default is None:
        raise BuildFailed("pip on this host does not say what its default index is. Set PIP_INDEX_URL")
    return PipIndex(url=default.group(1), default=True)


async def npm_registry() -> str | None:
    """The registry this host's npm is configured for; None without npm. Raises BuildFailed when its address
    holds credentials."""
    if shutil.which("npm") is None:
        return None
    url = await _npm("config", "get", "registry", doing="read npm's configuration")
    if has_credentials(url):
        raise BuildFailed(
            "this host's npm registry has a password or token in its address, which would reach the template. "
            "Give npm the password through _authToken in ~/.npmrc, and registry an address without one"
        )
    return url


async def package_registries(say: Callable[[str], None]) -> tuple[EgressRule, ...]:
    """The endpoints a guest needs to install Python and Node packages as this host does. Takes seconds."""
    say("asking pip and npm which hosts serve packages")
    async with asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(part()) for part in (_python_urls, _node_urls)]
    return endpoints([url for task in found for url in task.result()])


async def _node_urls() -> list[str]:
    registry = await npm_registry()
    if registry is None:
        return []
    # Files may come from another host than the index. A registry that does not know the package serves its own.
    with contextlib.suppress(BuildFailed):
        return [
            registry,
            await _npm("view", _NPM_PROBE, "dist.tarball", doing="find what serves npm's files"),
        ]
    return [registry]


async def _python_urls() -> list[str]:
    index = await pip_index()
    report = await _pip(
        *(
            "install",
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--no-cache-dir",
            "--quiet",
            "--report",
            "-",
        ),
        *("--index-url", index.url, "--only-binary", ":all:", _PROBE),
        doing="find the hosts that serve Python packages",
        plain=True,
    )
    found = msgspec.json.decode(report, type=dict[str, msgspec.Raw])
    items = msgspec.json.decode(found["install"], type=list[_Item])
    return [index.url, *(item.download_info.url for item in items)]


def endpoints(urls: Sequence[str]) -> tuple[EgressRule, ...]:
    """One rule per distinct host and port of http and https addresses."""
    rules: dict[EgressRule, None] = {}
    for url in urls:
        parts = urlsplit(url)
        if parts.hostname and parts.scheme in ("http", "https"):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            rules[EgressRule(host=parts.hostname, port=port)] = None
    return tuple(rules)


def pip_conf(index: PipIndex | None, *, local_ca: bool) -> bytes:
    """/etc/pip.conf for a guest: the host's index where it is not the default one, and the system's CA bundle
    where the host has CAs of its own (pip would use the bundle it brings along)."""
    lines = ["[global]", "disable-pip-version-check = true", "no-input = true"]
    if index is not None and not index.default:
        lines.append(f"index-url = {urlunsplit(urlsplit(index.url))}")
    if local_ca:
        lines.append("cert = /etc/ssl/certs/ca-certificates.crt")
    return "\n".join(lines).encode() + b"\n"


def npmrc(registry: str, *, local_ca: bool) -> bytes:
    """npm's global configuration for a guest: the host's registry, and the system's CA bundle where the host
    has CAs of its own. Tokens of the host's npmrc stay on the host."""
    # A guest may be slow to read what comes: a connection that is reset is tried again, more often than by default.
    lines = [f"registry={registry}", "update-notifier=false", "fetch-retries=5"]
    if local_ca:
        lines.append("cafile=/etc/ssl/certs/ca-certificates.crt")
    return "\n".join(lines).encode() + b"\n"


def has_credentials(url: str) -> bool:
    """Whether the address carries a password, or a token where the user's name stands."""
    parts = urlsplit(url)
    return parts.password is not None or parts.username is not None


class _Download(msgspec.Struct):
    url: str


class _Item(msgspec.Struct):
    download_info: _Download


async def _pip(*arguments: str, doing: str, plain: bool = False) -> str:
    """pip's output. ``plain`` leaves out further indexes and local directories the host may have configured:
    they serve the host, not a guest."""
    environment = dict(_QUIET)
    command = [sys.executable, "-m", "pip"]
    if plain:
        certificate = await _pip("config", "list", doing="read pip's configuration")
        bundle = re.findall(r"\.cert='([^']+)'", certificate)
        command = ["env", *(f"--unset={name}" for name in os.environ if name.startswith("PIP_")), *command]
        environment = {"PIP_CONFIG_FILE": os.devnull}
        arguments = (*arguments, *(("--cert", bundle[-1]) if bundle else ()))
    output = await commands.run([*command, *arguments], timeout=180, doing=doing, env=environment)
    return output.decode()


async def _npm(*arguments: str, doing: str) -> str:
    """npm's output, asked where no project's .npmrc has a say."""
    output = await commands.run(["npm", *arguments], timeout=180, doing=doing, env=_QUIET, cwd=Path("/"))
    return output.decode().strip()
