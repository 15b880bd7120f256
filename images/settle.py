"""Runs in the guest, as root, last in a bake: reads files into the page cache, then zeroes the free memory.

    python3 -I -S -c PROGRAM PERCENT GLOB…

Free pages still hold what earlier programs wrote there; zeroed they are holes in the memory image, so that
every parent is small on disk and in the host's memory. At most PERCENT of the memory is filled with files.
Standard library only, Python ≥ 3.9.
"""

import glob
import mmap
import os
import sys

_MIB = 1 << 20
_PAGE = 4096
# Left alone for the kernel and this program.
_RESERVE_MIB = 24


def meminfo(name: str) -> int:
    """A figure of /proc/meminfo in bytes."""
    with open("/proc/meminfo") as file:  # noqa: PTH123  # pathlib takes long to import under emulation
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def read_files(patterns: "list[str]", limit: int) -> "tuple[int, int, int]":
    """Read matching files until ``limit`` bytes. Returns files read, bytes read, files left out."""
    files = size = skipped = 0
    for pattern in patterns:
        for path in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207
            if not os.path.isfile(path) or os.path.islink(path):  # noqa: PTH113, PTH114
                continue
            if size + os.path.getsize(path) > limit:  # noqa: PTH202
                skipped += 1
                continue
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                while chunk := file.read(_MIB):
                    size += len(chunk)
            files += 1
    return files, size, skipped


def zero_free_memory() -> int:
    """Take what is free now, zeroed, and give it back; returns how many bytes."""
    size = (meminfo("MemFree") // _MIB - _RESERVE_MIB) * _MIB
    if size <= 0:
        return 0
    with mmap.mmap(-1, size) as region:
        region.madvise(mmap.MADV_HUGEPAGE)  # one page fault for 2 MiB
        # A touch is enough: the kernel hands out zeroed pages only.
        region[::_PAGE] = bytes(size // _PAGE)
    return size


def main() -> None:
    percent, patterns = int(sys.argv[1]), sys.argv[2:]
    files, size, skipped = read_files(patterns, meminfo("MemTotal") * percent // 100)
    more = f", left out {skipped} files beyond {percent} % of the memory" if skipped else ""
    zeroed = zero_free_memory()
    sys.stdout.write(
        f"read {files} files ({size // _MIB} MiB){more}; zeroed {zeroed // _MIB} MiB of free memory\n"
    )


if __name__ == "__main__":
    main()
