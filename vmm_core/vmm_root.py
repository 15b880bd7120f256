"""The root directory of a VMM: the program, its libraries and its firmware, and nothing else.

    cache/vmm-root/<key>/     built once for these files (paths, sizes, times), mounted read-only by every jailer

A jailer holds a shared lock on the root it uses; when another root is built, those that nobody holds are removed.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

from vmm_core.errors import HostUnfit

_BUILD = 1
_DIRECTORIES = ("dev", "proc")
_STALE_SECONDS = 600
# What QEMU's x86 machines load; the rest of its data directories is for others.
_FIRMWARE = (
    "bios-microvm.bin",
    "qboot.rom",
    "bios-256k.bin",
    "linuxboot.bin",
    "linuxboot_dma.bin",
    "multiboot_dma.bin",
    "pvh.bin",
    "kvmvapic.bin",
)
_LOADER_CACHE = Path("/etc/ld.so.cache")


def build(data_dir: Path, program: Path) -> Path:
    """The root directory for ``program``, made when it is not there yet. Blocking; some hundred milliseconds then.

    Raises HostUnfit when a file cannot be read or there is no room.
    """
    roots = data_dir / "cache" / "vmm-root"
    try:
        files = closure(program)
        root = roots / _key(files)
        if not root.is_dir():
            roots.mkdir(parents=True, exist_ok=True, mode=0o711)
            _make(root, files)
            _remove_unused(roots, root)
    except OSError as error:
        raise HostUnfit(f"no root directory for {program.name} could be made in {roots}: {error}") from error
    return root


def closure(program: Path) -> dict[Path, Path]:
    """Every file ``program`` opens by itself: its path in the root, and where it comes from."""
    found = {program: program}
    for path in (program, *_modules(program)):
        found[path] = path
        found.update({library: library for library in _libraries(path)})
    if len(found) > 1 and _LOADER_CACHE.exists():
        found[_LOADER_CACHE] = _LOADER_CACHE
    for directory in _data_directories(program):
        for name in _FIRMWARE:
            if (directory / name).is_file():
                found[directory / name] = directory / name
    return found


def _libraries(path: Path) -> list[Path]:
    """What the loader maps for ``path``, itself included; nothing for a static program."""
    answer = _ask(["ldd", str(path)])
    missing = re.findall(r"^\s*(\S+) => not found", answer, re.MULTILINE)
    if missing:
        raise HostUnfit(f"{path} lacks the libraries {', '.join(missing)}: install it again")
    return [Path(name) for name in re.findall(r"(?:^|=>)\s*(/\S+) \(0x", answer, re.MULTILINE)]


def _modules(program: Path) -> list[Path]:
    """QEMU's software emulation, where it is a module."""
    if not program.name.startswith("qemu-"):
        return []
    prefix = program.parent.parent
    found = [
        path
        for pattern in ("lib*/qemu/accel-*-x86_64.so", "lib*/*/qemu/accel-*-x86_64.so")
        for path in prefix.glob(pattern)
    ]
    return sorted(path for path in found if "qtest" not in path.name)


def _data_directories(program: Path) -> list[Path]:
    if not program.name.startswith("qemu-"):
        return []
    answer = _ask([str(program), "-L", "help"])
    return [Path(os.path.normpath(line)) for line in answer.splitlines() if line.startswith("/")]


def _ask(argv: list[str]) -> str:
    try:
        return subprocess.run(argv, capture_output=True, timeout=10, check=False, text=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HostUnfit(f"{' '.join(argv)} failed: {error}") from error


def _key(files: dict[Path, Path]) -> str:
    digest = hashlib.sha256(f"{_BUILD}\n".encode())
    for target, source in sorted(files.items()):
        stat = source.stat()
        digest.update(f"{target}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _make(root: Path, files: dict[Path, Path]) -> None:
    """Fill a draft and rename it: a root that can be seen is complete."""
    draft = root.with_name(f".{root.name}.{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        for target, source in files.items():
            place = draft / target.relative_to("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
            place.chmod(0o755 if os.access(source, os.X_OK) else 0o644)
        for name in _DIRECTORIES:
            (draft / name).mkdir(exist_ok=True)
        for directory, _, _ in os.walk(draft):
            Path(directory).chmod(0o755)
        draft.rename(root)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was quicker
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _remove_unused(roots: Path, current: Path) -> None:
    for path in roots.iterdir():
        # Another process may be about the same, or build there.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            if path != current and not _being_made(path):
                _remove_unheld(path)


def _being_made(path: Path) -> bool:
    return path.name.startswith(".") and time.time() - path.stat().st_mtime < _STALE_SECONDS


def _remove_unheld(path: Path) -> None:
    """Raises BlockingIOError when a jailer holds it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(fd)
