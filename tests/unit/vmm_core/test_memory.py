"""Memory images: sparse, checked as they are loaded, sealed; and the memory of a process read from outside."""

import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_core import memory
from vmm_core.disk import data_extents
from vmm_core.errors import SnapshotInvalid, VmDied, VmmProtocolError
from vmm_core.guest_memory import Copy, GuestMemory
from vmm_core.memory import MEMFD_NAME, PAGE

SIZE = 4 << 20
PAGES = SIZE // PAGE


def memory_with(pages: dict[int, int]) -> int:
    """A memory whose pages hold these bytes, all others nothing."""
    fd = memory.fresh_memory(SIZE)
    for page, byte in pages.items():
        os.pwrite(fd, bytes([byte]) * PAGE, page * PAGE)
    return fd


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE, 0)


page_contents = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 255), max_size=40)


@settings(max_examples=40, deadline=None)
@given(page_contents)
def test_an_image_holds_what_was_saved_and_no_zero_page(
    tmp_path_factory: pytest.TempPathFactory, pages: dict[int, int]
) -> None:
    image = tmp_path_factory.mktemp("image") / "memory.img"
    source = memory_with(pages)
    written = memory.save_sparse(source, image)
    assert written == PAGE * sum(byte != 0 for byte in pages.values())
    loaded = memory.load_sealed(image, SIZE, memory.sums_of(source, SIZE))
    assert content(loaded) == content(source)
    for fd in (source, loaded):
        os.close(fd)


@settings(max_examples=60, deadline=None)
@given(page_contents, page_contents)
def test_sums_follow_changes_without_reading_what_did_not_change(
    before: dict[int, int], changes: dict[int, int]
) -> None:
    base, changed, after = memory_with(before), memory_with(changes), memory_with(before | changes)
    ranges = [(page * PAGE, (page + 1) * PAGE) for page in sorted(changes)]
    assert memory.sums_with(memory.sums_of(base, SIZE), base, changed, ranges) == memory.sums_of(after, SIZE)
    for fd in (base, changed, after):
        os.close(fd)


def test_a_loaded_memory_can_not_be_changed_by_anybody(tmp_path: Path) -> None:
    source = memory_with({1: 7})
    memory.save_sparse(source, tmp_path / "image")
    loaded = memory.load_sealed(tmp_path / "image", SIZE)
    again = os.open(f"/proc/self/fd/{loaded}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(again, 0)
    for fd in (source, loaded, again):
        os.close(fd)


def test_a_damaged_image_is_refused_with_the_place(tmp_path: Path) -> None:
    source = memory_with(dict.fromkeys(range(100, 200), 9))
    sums = memory.sums_of(source, SIZE)
    image = tmp_path / "image"
    memory.save_sparse(source, image)
    with image.open("r+b") as file:
        file.seek(150 * PAGE)
        file.write(b"\0")
    with pytest.raises(SnapshotInvalid, match=str(150 * PAGE // memory.SUM_CHUNK * memory.SUM_CHUNK)):
        memory.load_sealed(image, SIZE, sums)
    os.close(source)


def test_an_image_whose_data_vanished_is_refused_though_its_size_is_right(tmp_path: Path) -> None:
    """What is left after a power cut: the length is there, the blocks are not."""
    source = memory_with(dict.fromkeys(range(100, 200), 9))
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    with pytest.raises(SnapshotInvalid, match="damaged"):
        memory.load_sealed(image, SIZE, memory.sums_of(source, SIZE))
    os.close(source)


@pytest.mark.parametrize("size", [0, SIZE - PAGE, SIZE + PAGE])
def test_a_cut_or_grown_image_is_refused_with_both_sizes(tmp_path: Path, size: int) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, size)
    with pytest.raises(SnapshotInvalid, match=f"{size} bytes .* {SIZE}"):
        memory.load_sealed(image, SIZE)


def test_cut_sums_are_refused(tmp_path: Path) -> None:
    source = memory_with({1: 1})
    memory.save_sparse(source, tmp_path / "image")
    with pytest.raises(SnapshotInvalid, match="sums"):
        memory.load_sealed(tmp_path / "image", SIZE, b"")
    os.close(source)


def test_zero_pages_of_a_change_become_holes_in_the_image(tmp_path: Path) -> None:
    base, changed = memory_with(dict.fromkeys(range(256), 5)), memory_with({})
    image = tmp_path / "image"
    memory.save_sparse(base, image)
    with image.open("r+b") as file:
        written = memory.write_ranges(changed, [(0, 128 * PAGE)], file.fileno())
        assert written == 0
        assert data_extents(file.fileno(), SIZE) == [(128 * PAGE, 256 * PAGE)]
    for fd in (base, changed):
        os.close(fd)


# ── another process's ────────────────────────────────────────────────────────────────────────────

MAPPER = """
import mmap, os, sys
fd, size, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
flags = mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE
pieces = [(0, size)] if kind != "half" else [(0, size // 2)]
maps = [mmap.mmap(fd, length, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=at) for at, length in pieces]
for word in sys.stdin:
    if word == "read\\n":
        bytes(maps[0])
    else:
        page = int(word.split()[-1])
        byte = 0 if word.startswith("zero") else 200
        maps[0][page * 4096 : (page + 1) * 4096] = bytes([byte]) * 4096
    print("done", flush=True)
"""


class Mapper:
    """A process that maps a memory as a VMM does, and writes to pages when told."""

    def __init__(self, fd: int, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAPPER, str(fd), str(SIZE), kind],
            pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.tell("0") if kind == "half" else self.tell("read")

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def __enter__(self) -> "Mapper":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def parent_memory() -> int:
    fd = memory_with(dict.fromkeys(range(0, PAGES, 3), 3))
    memory.seal(fd)
    return fd


def test_the_pages_a_process_wrote_are_found_and_no_others() -> None:
    parent = parent_memory()
    written = sorted(random.Random(1).sample(range(PAGES), 60))
    with Mapper(parent, "private") as mapper:
        for page in written:
            mapper.tell(str(page))
        with GuestMemory.of(mapper.process.pid, SIZE) as guest:
            assert not guest.shared
            pages = [page for start, end in guest.changes() for page in range(start // PAGE, end // PAGE)]
            assert pages == written
            assert guest.private_bytes() == 60 * PAGE
            copy = Copy(guest)
            copy.before()
            copy.during()
            fd = copy.finished()
    expected = bytearray(content(parent))
    for page in written:
        expected[page * PAGE : (page + 1) * PAGE] = bytes([200]) * PAGE
    assert content(fd) == bytes(expected)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    for each in (parent, fd):
        os.close(each)


def test_into_an_image_of_its_base_go_the_private_pages_alone_and_zeros_as_holes(tmp_path: Path) -> None:
    parent = parent_memory()
    memory.save_sparse(parent, tmp_path / "image")
    with Mapper(parent, "private") as mapper:
        mapper.tell("5")
        mapper.tell("zero 9")
        with GuestMemory.of(mapper.process.pid, SIZE) as guest:
            copy = Copy(guest, os.open(tmp_path / "image", os.O_RDWR))
            copy.during()
            assert copy.ranges == [(5 * PAGE, 6 * PAGE), (9 * PAGE, 10 * PAGE)]
            fd = copy.finished()
    expected = bytearray(content(parent))
    expected[5 * PAGE : 6 * PAGE] = bytes([200]) * PAGE
    expected[9 * PAGE : 10 * PAGE] = bytes(PAGE)
    assert content(fd) == bytes(expected)
    assert not any(start <= 9 * PAGE < end for start, end in data_extents(fd, SIZE))
    for each in (parent, fd):
        os.close(each)


def test_a_machine_that_booted_writes_to_its_file_and_all_of_that_counts() -> None:
    own = memory_with({1: 1, 2: 2})
    with Mapper(own, "shared") as mapper:
        mapper.tell("700")
        with GuestMemory.of(mapper.process.pid, SIZE) as guest:
            assert guest.shared
            copy = Copy(guest)
            copy.before()
            mapper.tell("2")
            copy.during()
            fd = copy.finished()
    assert content(fd) == content(own)
    for each in (own, fd):
        os.close(each)


def test_a_vmm_that_maps_less_than_its_machine_has_is_not_believed() -> None:
    parent = parent_memory()
    with (
        Mapper(parent, "half") as mapper,
        pytest.raises(VmmProtocolError, match="once and whole"),
        GuestMemory.of(mapper.process.pid, SIZE),
    ):
        pass
    os.close(parent)


def test_a_vmm_whose_memory_has_another_size_is_not_believed() -> None:
    parent = parent_memory()
    with (
        Mapper(parent, "private") as mapper,
        pytest.raises(VmmProtocolError),
        GuestMemory.of(mapper.process.pid, SIZE * 2),
    ):
        pass
    os.close(parent)


def test_a_vmm_that_has_ended_is_told_as_that() -> None:
    parent = parent_memory()
    with Mapper(parent, "private") as mapper:
        pid = mapper.process.pid
    with pytest.raises(VmDied), GuestMemory.of(pid, SIZE):
        pass
    os.close(parent)


def test_this_process_maps_no_guest_memory() -> None:
    assert MEMFD_NAME not in Path("/proc/self/maps").read_text()
    with mmap.mmap(-1, PAGE), pytest.raises(VmmProtocolError), GuestMemory.of(os.getpid(), SIZE):
        pass
