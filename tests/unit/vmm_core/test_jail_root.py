"""The root directory of a VMM: complete, built once, and removed when nobody holds it any more."""

import fcntl
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vmm_core import vmm_root
from vmm_core.errors import HostUnfit

LS = Path(shutil.which("ls") or "/bin/ls").resolve()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "program"
    path.parent.mkdir()
    shutil.copy(LS, path)
    return path


def roots(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "cache" / "vmm-root").iterdir()}


def test_a_root_holds_the_program_its_libraries_and_nothing_else(tmp_path: Path, program: Path) -> None:
    root = vmm_root.build(tmp_path, program)
    assert (root / program.relative_to("/")).read_bytes() == program.read_bytes()
    files = {Path("/") / path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert {path for path in files if ".so" in path.name and path.name != "ld.so.cache"} == {
        Path(word) for word in libraries.split() if word.startswith("/")
    }
    assert files - {path for path in files if ".so" in path.name} == {program}
    assert (root / "dev").is_dir()
    assert (root / "proc").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
def test_the_program_runs_in_its_root(tmp_path: Path, program: Path) -> None:
    root = vmm_root.build(tmp_path, program)
    answer = subprocess.run(["chroot", root, program, "/"], capture_output=True, text=True, check=True)
    assert {"dev", "proc"} <= set(answer.stdout.split())


def test_nobody_but_root_may_write_in_it_whatever_the_umask(tmp_path: Path, program: Path) -> None:
    before = os.umask(0o077)
    try:
        root = vmm_root.build(tmp_path, program)
    finally:
        os.umask(before)
    for path in (root, *root.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode in ((0o755,) if path.is_dir() else (0o755, 0o644)), path


def test_it_is_built_once_and_again_when_the_program_changes(tmp_path: Path, program: Path) -> None:
    first = vmm_root.build(tmp_path, program)
    made = first.stat().st_mtime_ns
    assert vmm_root.build(tmp_path, program) == first
    assert first.stat().st_mtime_ns == made
    os.utime(program, (1, 1))
    second = vmm_root.build(tmp_path, program)
    assert second != first
    assert roots(tmp_path) == {second.name}, "nobody held the first one"


def test_a_root_in_use_is_kept(tmp_path: Path, program: Path) -> None:
    first = vmm_root.build(tmp_path, program)
    held = os.open(first, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    try:
        os.utime(program, (1, 1))
        second = vmm_root.build(tmp_path, program)
        assert roots(tmp_path) == {first.name, second.name}
    finally:
        os.close(held)
    os.utime(program, (2, 2))
    third = vmm_root.build(tmp_path, program)
    assert roots(tmp_path) == {third.name}


def test_half_made_roots_are_never_used_and_removed_later(tmp_path: Path, program: Path) -> None:
    stale = tmp_path / "cache" / "vmm-root" / ".half"
    fresh = tmp_path / "cache" / "vmm-root" / ".being-made"
    stale.mkdir(parents=True)
    fresh.mkdir()
    os.utime(stale, (time.time() - 3600,) * 2)
    root = vmm_root.build(tmp_path, program)
    assert roots(tmp_path) == {root.name, ".being-made"}


def test_many_may_build_at_once(tmp_path: Path, program: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        built = set(threads.map(lambda _: vmm_root.build(tmp_path, program), range(8)))
    assert len(built) == 1
    assert roots(tmp_path) == {path.name for path in built}


def test_a_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(HostUnfit, match="no-such-vmm"):
        vmm_root.build(tmp_path, Path("/usr/bin/no-such-vmm"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU here")
def test_qemu_has_its_firmware_and_its_emulation() -> None:
    names = {path.name for path in vmm_root.closure(Path(shutil.which("qemu-system-x86_64") or ""))}
    assert "bios-microvm.bin" in names
    assert any(name.startswith("libglib") for name in names)
    assert any(name.startswith("ld-linux") for name in names)
