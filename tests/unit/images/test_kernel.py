"""The kernel inside a bzImage, and the modules beside it."""

import bz2
import gzip
import lzma
import struct

import pytest

from images.errors import BuildFailed
from images.kernel import ModuleTree, copy_modules, extract_vmlinux

VMLINUX = b"\x7fELF" + bytes(range(256)) * 40


def bzimage(payload: bytes, *, setup_sects: int = 3) -> bytes:
    header = bytearray(512 * (setup_sects + 1))
    header[0x1F1] = setup_sects
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", header, 0x248, 16, len(payload))
    return bytes(header) + b"\x90" * 16 + payload + b"trailing sections"


def sized(compressed: bytes) -> bytes:
    return compressed + struct.pack("<I", len(VMLINUX))


@pytest.mark.parametrize(
    "payload",
    [gzip.compress(VMLINUX), sized(lzma.compress(VMLINUX)), sized(bz2.compress(VMLINUX))],
    ids=["gzip", "xz", "bzip2"],
)
async def test_the_payload_is_found_and_unpacked(payload):
    assert await extract_vmlinux(bzimage(payload)) == VMLINUX


async def test_lz4_as_debian_packs_it():
    # A legacy frame by hand: one block of literals alone.
    block = bytearray([0xF0])
    rest = len(VMLINUX) - 15
    block += b"\xff" * (rest // 255) + bytes([rest % 255]) + VMLINUX
    frame = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + bytes(block)
    assert await extract_vmlinux(bzimage(sized(frame))) == VMLINUX


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"MZ" + bytes(4096), "setup header"),
        (b"", "setup header"),
        (bzimage(b"whatever it is 1234"), "do not know"),
        (bzimage(gzip.compress(b"no elf")), "not an ELF"),
        (bzimage(lzma.compress(VMLINUX) + b"\1\0\0\0"), "bytes long"),
    ],
)
async def test_what_is_no_kernel_is_refused(image, says):
    with pytest.raises(BuildFailed, match=says):
        await extract_vmlinux(image)


@pytest.fixture
def modules(tmp_path):
    root = tmp_path / "6.1.0-test"
    (root / "kernel/fs").mkdir(parents=True)
    (root / "kernel/fs/overlay.ko").write_bytes(b"\0depends=libcrc\0")
    (root / "kernel/fs/libcrc.ko").write_bytes(b"\0depends=\0")
    (root / "kernel/fs/other.ko").write_bytes(b"\0depends=\0")
    (root / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (root / "modules.order").write_text("")
    return root


def test_modules_come_with_what_they_need_and_no_more(modules, tmp_path):
    tree = tmp_path / "tree"
    assert copy_modules(modules, ["overlay", "ext4"], tree) == ["libcrc", "overlay"]
    copied = sorted(path.name for path in tree.rglob("*") if path.is_file())
    assert copied == ["libcrc.ko", "modules.builtin", "modules.order", "overlay.ko"]


def test_an_unknown_module_is_named(modules):
    with pytest.raises(BuildFailed, match="no module nothere"):
        ModuleTree(modules).order(["nothere"])
