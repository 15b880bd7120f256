"""Packages and files into the root disk of a machine, in two layers that are cached apart.

    packages ── mmdebstrap ──► packages/<key>/tree.tar      slow; key: suite, sources, exact versions
                                    │ + agent, user, CAs, modules, files, runner
                                    └── mkfs.ext4 -d ──► rootfs/<key>/disk.img   seconds; key: all of it

The disk has no journal: nothing ever recovers it, since it belongs to a memory image, for better or worse.
"""

import asyncio
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from images import apt, commands
from images.cache import Cache
from images.errors import BuildFailed
from images.events import Step
from images.kernel import Kernel, copy_modules

RUNNER_UID = 1000
RUNNER_DIR = "/opt/actions-runner"
AGENT_PATH = "/usr/lib/microvm/agent.py"
# Every image has these: the agent runs on Python (python3-minimal has no json), modprobe comes with kmod.
BASE_PACKAGES = ("ca-certificates", "kmod", "python3")
# Raise it when what is done with the same inputs changes.
_LAYOUT = 1
# Manuals and translations are left out, licences stay. dpkg's fsyncs protect nothing here, nor in a job.
_DPKG_OPTIONS = (
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)
_NAMESPACE = uuid.UUID("6d1c0f43-58a5-4d0e-9c1b-6a3d2a4f7e10")


class PlacedFile(msgspec.Struct, frozen=True):
    """A file of the image, its bytes at hand. ``user`` is runner or root."""

    dest: str
    data: bytes
    mode: int = 0o644
    user: str = "root"


class Contents(msgspec.Struct, frozen=True):
    """All that goes into a root disk besides its packages. ``certificates`` are the host's local CAs by file
    name. ``runner_sha256`` is the checked digest of ``runner_tarball``."""

    agent: bytes
    certificates: Mapping[str, bytes]
    modules: tuple[str, ...]
    files: tuple[PlacedFile, ...]
    sudo: bool
    disk_mib: int
    runner_tarball: Path | None = None
    runner_sha256: str = ""


def package_key(resolution: apt.Resolution) -> str:
    """The key of the first layer."""
    words = [str(_LAYOUT), resolution.archive.suite, *resolution.archive.sources, *_DPKG_OPTIONS]
    words += [f"{package.name}={package.version}" for package in resolution.packages]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]


def disk_key(packages: str, kernel: Kernel, contents: Contents) -> str:
    """The key of the second layer."""
    digest = hashlib.sha256(f"{_LAYOUT}\0{packages}\0{kernel.key}\0{contents.runner_sha256}\0".encode())
    digest.update(f"{contents.sudo}\0{contents.disk_mib}\0{sorted(contents.modules)}\0".encode())
    parts = [("agent", contents.agent), *sorted(contents.certificates.items())]
    parts += [(f"{file.dest}\0{file.mode:o}\0{file.user}", file.data) for file in contents.files]
    for name, data in parts:
        digest.update(f"{name}\0".encode() + hashlib.sha256(data).digest())
    return digest.hexdigest()[:32]


async def get_packages(cache: Cache, resolution: apt.Resolution, wanted: tuple[str, ...], step: Step) -> Path:
    """The package layer, a tar of the installed system. Raises BuildFailed with the last lines."""

    async def build(directory: Path) -> None:
        if os.geteuid() != 0:
            raise BuildFailed("building a root file system needs root. Run the bake with sudo")
        options = directory / "apt.conf"
        options.touch(mode=0o600)
        options.write_text("\n".join(await apt.acquire_options()) + "\n")
        counter = _PackageCounter(len(resolution.packages), step)
        step(f"installing {len(resolution.packages)} packages of Debian {resolution.archive.suite}", 0.0)
        # In namespaces of its own: it mounts /proc, /sys and /dev into the tree, and when it is killed
        # neither a mount nor a child of it may stay behind.
        command = [
            "unshare",
            "--mount",
            "--propagation=private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        command += ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", "--verbose"]
        command += [f"--include={','.join(wanted)}", f"--aptopt={options}"]
        command += [f"--dpkgopt={rule}" for rule in _DPKG_OPTIONS]
        # The host's way to its mirrors (a proxy, its password) must not travel in the image.
        command += ['--customize-hook=rm -f "$1/etc/apt/apt.conf.d/99mmdebstrap"']
        command += [resolution.archive.suite, str(directory / "tree.tar"), "-"]
        await commands.run(
            command,
            timeout=1800,
            doing="install the packages",
            stdin="\n".join(resolution.archive.sources).encode() + b"\n",
            env={"TMPDIR": str(directory)},
            on_line=counter.line,
        )
        options.unlink()

    def waiting() -> None:
        step("waiting for another process that installs the same packages")

    entry = await cache.get("packages", package_key(resolution), build, waiting=waiting)
    return entry / "tree.tar"


async def get_disk(cache: Cache, tree_tar: Path, kernel: Kernel, contents: Contents, step: Step) -> Path:
    """The root disk: a sparse ext4 image of ``contents.disk_mib``. Raises BuildFailed."""
    key = disk_key(tree_tar.parent.name, kernel, contents)

    async def build(directory: Path) -> None:
        tree = directory / "tree"
        tree.mkdir()
        step("unpacking the packages", 0.0)
        await commands.run(
            [
                "tar",
                "-xf",
                str(tree_tar),
                "-C",
                str(tree),
                "--numeric-owner",
                "--xattrs",
                "--xattrs-include=*",
            ],
            timeout=600,
            doing="unpack the packages",
        )
        step("adding the agent, the kernel's modules and the recipe's files", 0.3)
        await _furnish(tree, kernel, contents)
        step("making the ext4 image", 0.7)
        await _make_ext4(tree, directory / "disk.img", contents.disk_mib, key)
        await asyncio.to_thread(shutil.rmtree, tree)
        step("root disk ready", 1.0)

    def waiting() -> None:
        step("waiting for another process that makes the same root disk")

    entry = await cache.get("rootfs", key, build, waiting=waiting)
    return entry / "disk.img"


def inside(tree: Path, path: str) -> Path:
    """Where an absolute path of the image lies on this host. Links are followed as the guest would follow
    them, so that none leads out of the tree; the last part is not followed."""
    *parents, last = [part for part in path.split("/") if part not in ("", ".")]
    place: list[str] = []
    pending = parents[::-1]
    hops = 0
    while pending:
        part = pending.pop()
        if part == "..":
            place = place[:-1]
            continue
        candidate = tree.joinpath(*place, part)
        if not candidate.is_symlink():
            place.append(part)
            continue
        hops += 1
        if hops > 40:
            raise BuildFailed(f"{path} cannot be placed in the image: its links go round in circles")
        target = str(candidate.readlink())
        if target.startswith("/"):
            place = []
        pending += [piece for piece in target.split("/") if piece not in ("", ".")][::-1]
    return tree.joinpath(*place, last)


async def _furnish(tree: Path, kernel: Kernel, contents: Contents) -> None:
    async def chroot(*argv: str, doing: str) -> None:
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        await commands.run(["chroot", str(tree), *argv], timeout=300, doing=doing, env=environment)

    await chroot(
        *(
            "useradd",
            "--create-home",
            "--uid",
            str(RUNNER_UID),
            "--user-group",
            "--shell",
            "/bin/bash",
            "runner",
        ),
        doing="make the user runner",
    )
    await asyncio.to_thread(_place_files, tree, contents)
    await asyncio.to_thread(copy_modules, kernel.modules, contents.modules, tree)
    await chroot("depmod", "-a", kernel.release, doing="index the kernel's modules")
    if contents.certificates:
        await chroot("update-ca-certificates", doing="install the host's CA certificates")
    if contents.runner_tarball is not None:
        home = inside(tree, RUNNER_DIR)
        home.mkdir(parents=True)
        await commands.run(
            ["tar", "-xf", str(contents.runner_tarball), "-C", str(home), "--no-same-owner"],
            timeout=600,
            doing=f"unpack {contents.runner_tarball.name}",
        )
        owner = f"{RUNNER_UID}:{RUNNER_UID}"
        await commands.run(["chown", "-RP", owner, str(home)], timeout=300, doing="give the runner its files")


def _place_files(tree: Path, contents: Contents) -> None:
    files = [
        PlacedFile(dest=AGENT_PATH, data=contents.agent, mode=0o755),
        PlacedFile(dest="/etc/hostname", data=b"microvm\n"),
        PlacedFile(dest="/etc/hosts", data=b"127.0.0.1 localhost microvm\n::1 localhost\n"),
        PlacedFile(dest="/etc/machine-id", data=b""),
        # Names are resolved by /etc/hosts alone unless revive names a resolver.
        PlacedFile(dest="/etc/resolv.conf", data=b""),
    ]
    files += [
        PlacedFile(dest=f"/usr/local/share/ca-certificates/{name}", data=data)
        for name, data in contents.certificates.items()
    ]
    if contents.sudo:
        rule = b"runner ALL=(ALL) NOPASSWD: ALL\n"
        files.append(PlacedFile(dest="/etc/sudoers.d/runner", data=rule, mode=0o440))
    for file in [*files, *contents.files]:
        _place(tree, file)
    for useless in ("var/log", "var/cache/apt", "var/lib/apt/lists"):
        for path in [path for path in (tree / useless).rglob("*") if path.is_file()]:
            path.unlink()


def _place(tree: Path, file: PlacedFile) -> None:
    owner = RUNNER_UID if file.user == "runner" else 0
    path = inside(tree, file.dest)
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        os.chown(parent, owner, owner)
    path.unlink(missing_ok=True)
    path.write_bytes(file.data)
    path.chmod(file.mode)
    os.chown(path, owner, owner)


async def _make_ext4(tree: Path, image: Path, disk_mib: int, key: str) -> None:
    usage = await commands.run(["du", "-sxk", str(tree)], timeout=120, doing="measure the root file system")
    needed = int(usage.split()[0]) // 1024
    if needed * 5 // 4 + 64 > disk_mib:
        raise BuildFailed(
            f"the root file system holds {needed} MiB, too much for a disk of {disk_mib} MiB. "
            f"Set machine.disk to at least {needed * 3 // 2 + 64} MiB"
        )
    with image.open("xb") as file:
        file.truncate(disk_mib << 20)
    identity = str(uuid.uuid5(_NAMESPACE, key))
    # Everything is initialised now: a guest that did it lazily would dirty the blocks of every fork.
    extended = f"hash_seed={identity},lazy_itable_init=0,nodiscard"
    command = ["mkfs.ext4", "-q", "-F", "-d", str(tree), "-L", "root", "-U", identity, "-m", "0"]
    command += ["-O", "^has_journal", "-E", extended, str(image)]
    await commands.run(command, timeout=600, doing="make the ext4 image")
    await commands.run(["fallocate", "--dig-holes", str(image)], timeout=300, doing="make the image sparse")


class _PackageCounter:
    """Turns the installer's output into a fraction: every package is fetched, unpacked and set up once."""

    _LINE = re.compile(r"(?:Get:\d+ |Unpacking |Setting up )")

    def __init__(self, packages: int, step: Step) -> None:
        self._total = max(1, packages * 3)
        self._seen = 0
        self._step = step

    def line(self, line: str) -> None:
        if self._LINE.match(line):
            self._seen += 1
        self._step.log(line, min(1.0, self._seen / self._total))
