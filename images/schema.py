"""What a recipe file may say, and how an error in one is put: file, line, key, and what is allowed."""

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import inspect

from images.errors import RecipeError
from images.positions import Place, Plain, key_path
from vmm_core.machine import EgressRule

# Stands in an egress list for: the hosts of this machine's pip index and npm registry, and of their files.
PACKAGE_REGISTRIES = "package-registries"
# Stands in an egress list for: every public address, and the host's resolvers.
INTERNET = "internet"
WORDS = (PACKAGE_REGISTRIES, INTERNET)

# MiB, smallest and largest.
_SIZES = {"memory": (64, 1 << 20), "disk": (512, 16 << 20)}
_UNITS = {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024, "TiB": 1024 * 1024}
_T = TypeVar("_T")
_S = TypeVar("_S", bound=msgspec.Struct)

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=65536)]
Path_ = Annotated[str, msgspec.Meta(pattern=r"^/[^\0]*$", max_length=4096)]
User = Literal["runner", "root"]


class WarmStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A shell script that runs in the guest during the bake (``/bin/sh -eu``). ``timeout`` in seconds."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=80)]
    run: Text
    user: User = "runner"
    timeout: Annotated[float, msgspec.Meta(gt=0, le=7200)] = 600
    env: dict[str, str] = {}


class TreeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file in the root file system: ``content`` as it stands here, or ``source`` on this host (relative to
    the recipe). ``mode`` is an octal string."""

    dest: Path_
    content: str | None = None
    source: str | None = None
    mode: Annotated[str, msgspec.Meta(pattern=r"^0?[0-7]{3}$")] = "0644"
    user: User = "runner"


class RunnerSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where actions/runner comes from: a local ``tarball`` (``sha256`` optional), or ``url`` and ``sha256``.

    Neither: the recipe needs one and somebody has yet to say which; a bake refuses it.
    """

    tarball: str | None = None
    url: Annotated[str, msgspec.Meta(pattern=r"^https?://\S+$")] | None = None
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")] | None = None


class MachineSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    memory: str = "512 MiB"
    disk: str = "4 GiB"
    # Limits of the disk and of the network each way; 0: none. IPv6 is closed unless asked for.
    disk_mbps: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    disk_iops: Annotated[int, msgspec.Meta(ge=0, le=10_000_000)] = 0
    network_mbit: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 0
    ipv6: bool = False


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file as it is written. The order of the fields is that in which an error lists what is allowed."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    description: str = ""
    extends: str | None = None
    machine: MachineSource = MachineSource()
    packages: list[Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+$")]] = []
    ca: Literal["host", "none"] = "host"
    sudo: bool = False
    kernel_modules: list[Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]+$")]] = []
    files: list[TreeFile] = []
    egress: list[str] = []
    warm_egress: list[str] = []
    warm: list[WarmStep] = []
    page_cache: list[Path_] = []
    runner: RunnerSource | None = None
    labels: list[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]] = []


class RecipeFile(msgspec.Struct):
    """A recipe file: raw values and the lines they stand on. Overrides are one without lines."""

    path: Path | str
    values: dict[str, Plain]
    lines: Mapping[Place, int]

    def error(self, message: str, place: Place = ()) -> RecipeError:
        known = next(
            (self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines), None
        )
        return RecipeError(message, file=self.path, line=known, key=key_path(place))


def parse_size(text: str) -> int:
    """Such as "512 MiB" or "4 GiB" in MiB. Raises ValueError that says what is allowed."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB)\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is not a size; write one such as 512 MiB or 4 GiB")
    mib = float(found.group(1)) * _UNITS[found.group(2)]
    if mib != int(mib) or mib < 1:
        raise ValueError(f"{text!r} is not a whole number of MiB")
    return int(mib)


def parse_egress(text: str) -> EgressRule:
    """``host:port``, ``address:port`` or ``address/bits:port`` as a rule; an address may have ``*`` as its port
    and, of IPv6, stands in brackets. Raises ValueError that says what is allowed."""
    host, _, port = text.rpartition(":")
    network = _address(host)
    name = re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", host)
    if network is not None and port == "*":
        return EgressRule(host=network, port=0)
    if (network is None and name is None) or not (port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise ValueError(
            f"{text!r} is not host:port, address:port, address/bits:port, nor one of the words {', '.join(WORDS)}"
        )
    return EgressRule(host=network or host.lower(), port=int(port))


def _address(text: str) -> str | None:
    """An address or a network in its usual spelling; None for anything else."""
    try:
        network = ipaddress.ip_network(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None
    return str(network if network.num_addresses > 1 else network.network_address)


def convert(file: RecipeFile, kind: type[_S], *, strict: bool = True) -> _S:
    """The values of a file as typed. Not ``strict``: "2" may stand for 2, as on a command line."""
    try:
        return msgspec.convert(file.values, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _explain(str(error), file, kind) from None


def _explain(text: str, file: RecipeFile, kind: type[msgspec.Struct]) -> RecipeError:
    """msgspec's message, with its ``$.warm[0].run`` turned into file, line and key."""
    message, _, where = text.partition(" - at `$")
    place: Place = tuple(
        int(index) if index else key
        for key, index in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", where.rstrip("`"))
    )
    unknown = re.search(r"unknown field `(.*)`", message)
    if unknown:
        allowed = _fields_at(kind, place)
        key = unknown.group(1)
        return file.error(f"unknown key{closest(key, allowed)}. Allowed: {', '.join(allowed)}", (*place, key))
    missing = re.search(r"missing required field `(.*)`", message)
    if missing:
        return file.error(f"the key {missing.group(1)} is missing", place)
    return file.error(_plain_words(message), place)


def _plain_words(message: str) -> str:
    for technical, plain in (
        ("`str`", "a text"),
        ("`int`", "a number"),
        ("`float`", "a number"),
        ("`bool`", "true or false"),
        ("`array`", "a list"),
        ("`object`", "a mapping"),
        ("`null`", "nothing"),
    ):
        message = message.replace(technical, plain)
    return message[:1].lower() + message[1:]


def _fields_at(kind: type[msgspec.Struct], place: Place) -> list[str]:
    """The keys allowed in the mapping at a place."""
    node = inspect.type_info(kind)
    for part in place:
        inside = [node, *(node.types if isinstance(node, inspect.UnionType) else ())]
        for one in inside:
            if isinstance(one, inspect.StructType):
                node = next(field.type for field in one.fields if field.encode_name == part)
            elif isinstance(one, inspect.ListType):
                node = one.item_type
    return [field.encode_name for field in node.fields] if isinstance(node, inspect.StructType) else []


def closest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check(source: Source, file: RecipeFile) -> None:
    """What types alone cannot say. Raises RecipeError at the value that is wrong."""
    check_size(file, "memory", source.machine.memory)
    check_size(file, "disk", source.machine.disk)
    check_egress(file, "egress", source.egress)
    check_egress(file, "warm_egress", source.warm_egress)
    for index, item in enumerate(source.files):
        if (item.content is None) == (item.source is None):
            raise file.error("give either content or source", ("files", index))
        if ".." in Path(item.dest).parts or item.dest.endswith("/"):
            raise file.error("must be the absolute path of a file, without ..", ("files", index, "dest"))
    _check_runner(source.runner, file)


def check_size(file: RecipeFile, key: str, text: str) -> int:
    """MiB of ``machine.memory`` or ``machine.disk``. Raises RecipeError."""
    place: Place = ("machine", key)
    smallest, largest = _SIZES[key]
    size = _parsed(file, place, parse_size, text)
    if not smallest <= size <= largest:
        raise file.error(f"{size} MiB is outside {smallest} MiB to {largest} MiB", place)
    return size


def check_egress(file: RecipeFile, key: str, rules: Sequence[str]) -> None:
    """Raises RecipeError at the first that is neither a rule nor one of the words."""
    for index, rule in enumerate(rules):
        if rule not in WORDS:
            _parsed(file, (key, index), parse_egress, rule)


def _check_runner(runner: RunnerSource | None, file: RecipeFile) -> None:
    if runner is None:
        return
    if runner.tarball is not None and runner.url is not None:
        raise file.error("give either tarball or url, not both", ("runner",))
    if runner.url is not None and runner.sha256 is None:
        raise file.error("a url needs the sha256 of what it serves", ("runner", "url"))


def _parsed(file: RecipeFile, place: Place, parse: Callable[[str], _T], text: str) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise file.error(str(error), place) from None
