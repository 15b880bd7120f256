"""The pool where blocks cannot be shared, and where it cannot be made at all."""

import os
from pathlib import Path

import pytest

from vmm_core import disk
from vmm_core.errors import HostUnfit, PoolFull

pytestmark = pytest.mark.anyio


async def test_the_last_resort_copies_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_reflinks", lambda _directory: False)
    monkeypatch.setattr(disk, "_loop_obstacle", lambda _image: "mounting a loop file needs root")
    async with disk.open_pool(tmp_path) as pool:
        assert pool.kind == "copy"
        assert "every fork copies its disk" in pool.note
        assert "needs root" in pool.note
        (pool.vms / "vm-x").mkdir()
    # Later, when a mount would be possible, it must not hide what is there already.
    monkeypatch.setattr(disk, "_loop_obstacle", lambda _image: None)
    async with disk.open_pool(tmp_path) as pool:
        assert pool.kind == "copy"
        assert (pool.vms / "vm-x").exists()


async def test_a_copy_keeps_its_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"data" * 4096)
    disk.clone_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20
    with pytest.raises(FileExistsError):
        disk.clone_file(source, target)


async def test_a_directory_that_cannot_be_made_is_told_with_what_to_do() -> None:
    with pytest.raises(HostUnfit, match=r"/proc/nope cannot be used: .*MICROVM_DATA_DIR"):
        async with disk.open_pool(Path("/proc/nope")):
            pass


async def test_a_disk_too_small_for_a_pool_is_told_in_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_reflinks", lambda _directory: False)
    monkeypatch.setattr(disk, "_loop_obstacle", lambda _image: None)
    monkeypatch.setattr(disk, "_free", lambda _path: 1 << 30)
    with pytest.raises(PoolFull, match="1024 MiB free"):
        async with disk.open_pool(tmp_path):
            pass
    assert not (tmp_path / "pool.xfs").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a loop file needs root")
async def test_the_loop_pool_is_unmounted_by_the_last_one_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "LOOP_POOL_MAX", 3 << 30)  # sparse
    monkeypatch.setattr(disk, "_reflinks", lambda _directory: False)
    async with disk.open_pool(tmp_path) as first:
        if first.kind != "xfs-loop":
            pytest.skip(f"no loop pool here: {first.note}")
        async with disk.open_pool(tmp_path) as second:
            (second.staging / "a").write_bytes(b"x" * 8192)
            assert disk.clone_file(second.staging / "a", second.staging / "b") == "reflink"
            assert disk.private_bytes(second.staging / "b") == 0
        assert first.root.is_mount()
    assert not first.root.is_mount()
    async with disk.open_pool(tmp_path) as again:
        assert (again.staging / "b").stat().st_size == 8192
