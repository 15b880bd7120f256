"""Kernel and initramfs for the microvm machine: Debian's cloud kernel, uncompressed, and busybox.

    apt-get download ─► dpkg-deb -x ─► bzImage ─► vmlinux (has the PVH note, starts 0.3 s faster)
                                    └► modules ─► initramfs with the few a boot needs; the rest for root disks

Cached by package versions. Everything in it is the host mirror's, so apt has checked its signatures.
"""

import bz2
import hashlib
import lzma
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from images import apt, commands, initramfs
from images.cache import Cache
from images.errors import BuildFailed

_META_PACKAGE = "linux-image-cloud-amd64"
# Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"
_SETUP_SECTS, _MAGIC, _PAYLOAD = 0x1F1, 0x202, 0x248


class Kernel(msgspec.Struct, frozen=True):
    """A kernel to boot. ``version`` is the Debian package's, ``release`` what ``uname -r`` says.

    ``modules`` is the directory lib/modules/<release>. ``key`` names all of it, initramfs included.
    """

    key: str
    version: str
    release: str
    vmlinux: Path
    initrd: Path
    modules: Path


async def kernel_key(cache: Cache, *, say: Callable[[str], None]) -> tuple[str, apt.Package, apt.Package]:
    """The key of the kernel this host would use now, and the two packages it is made of."""
    _, depends = await apt.candidate(cache, _META_PACKAGE, say=say)
    name = next((name for name in depends if name.startswith("linux-image-")), None)
    if name is None:
        raise BuildFailed(f"{_META_PACKAGE} depends on no kernel image. Run apt-get update and try again")
    image, _ = await apt.candidate(cache, name, say=say)
    busybox, _ = await apt.candidate(cache, "busybox-static", say=say)
    recipe = hashlib.sha256(initramfs.INIT_SCRIPT.encode())
    for word in (*initramfs.BOOT_MODULES, image.name, image.version, busybox.version):
        recipe.update(f"{word}\0".encode())
    return recipe.hexdigest()[:32], image, busybox


async def get_kernel(cache: Cache, *, say: Callable[[str], None]) -> Kernel:
    """The kernel, built when it is not in the cache. Raises BuildFailed."""
    key, image, busybox = await kernel_key(cache, say=say)

    async def build(directory: Path) -> None:
        work = directory / "work"
        work.mkdir()
        for package in (image, busybox):
            say(f"downloading {package.name} {package.version}")
            deb = await apt.download(package, work, say=say)
            await commands.run(
                ["dpkg-deb", "-x", str(deb), str(work)], timeout=120, doing=f"unpack {deb.name}"
            )
        say("extracting the kernel and writing the initramfs")
        release = next((work / "lib/modules").iterdir()).name
        vmlinux = await extract_vmlinux((work / "boot" / f"vmlinuz-{release}").read_bytes())
        (directory / "vmlinux").write_bytes(vmlinux)
        shutil.move(work / "lib/modules" / release, directory / "modules" / release)
        archive = _initramfs(directory / "modules" / release, (work / "bin/busybox").read_bytes())
        (directory / "initrd.img").write_bytes(archive)
        shutil.rmtree(work)

    waiting = lambda: say("waiting for another process that builds the same kernel")  # noqa: E731
    entry = await cache.get("kernel", key, build, waiting=waiting)
    modules = next((entry / "modules").iterdir())
    return Kernel(
        key=key,
        version=image.version,
        release=modules.name,
        vmlinux=entry / "vmlinux",
        initrd=entry / "initrd.img",
        modules=modules,
    )


async def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage (boot protocol ≥ 2.08). Raises BuildFailed when it is none of ours."""
    if len(bzimage) < 0x260 or bzimage[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise BuildFailed("the kernel package holds no bzImage: the setup header's magic is missing")
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD)
    start = ((bzimage[_SETUP_SECTS] or 4) + 1) * 512 + offset
    payload = bzimage[start : start + length]
    vmlinux = await _decompress(payload)
    if vmlinux[:4] != b"\x7fELF":
        raise BuildFailed("the payload of the kernel's bzImage is not an ELF file")
    (expected,) = struct.unpack("<I", payload[-4:])
    if len(vmlinux) != expected:
        raise BuildFailed(f"the kernel is {len(vmlinux)} bytes long where its bzImage says {expected}")
    return vmlinux


async def _decompress(payload: bytes) -> bytes:
    # All but gzip (which ends that way by itself) have the uncompressed size appended by the kernel's build.
    body = payload[:-4]
    if payload.startswith(b"\x02\x21\x4c\x18"):  # LZ4 legacy frame
        return await commands.run(["lz4", "-dc"], stdin=body, timeout=60, doing="decompress the kernel")
    if payload.startswith(b"\x28\xb5\x2f\xfd"):
        return await commands.run(["zstd", "-dcq"], stdin=body, timeout=60, doing="decompress the kernel")
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(payload)
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(body)
    if payload.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(body)
    raise BuildFailed(f"the kernel is compressed in a way we do not know (it begins {payload[:6].hex()})")


class ModuleTree:
    """The modules of one kernel: files by name, who needs whom, what is built in.

    ``root`` is lib/modules/<release>.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {initramfs.module_name(path): path for path in root.rglob("*.ko")}
        self.builtin = frozenset(
            initramfs.module_name(line) for line in (root / "modules.builtin").read_text().split()
        )

    def order(self, wanted: Iterable[str]) -> list[str]:
        """The wanted modules and all they need, in load order. Raises BuildFailed naming an unknown one."""
        depends = dict.fromkeys(self.files, ()) | self._depends(wanted)
        try:
            return initramfs.load_order(wanted, depends, self.builtin)
        except KeyError as error:
            raise BuildFailed(
                f"kernel {self.root.name} has no module {error.args[0]} (nor is it built in)"
            ) from None

    def _depends(self, wanted: Iterable[str]) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        queue = [name for name in wanted if name in self.files]
        while queue:
            name = queue.pop()
            if name not in found:
                found[name] = initramfs.module_depends(self.files[name].read_bytes())
                queue += [needed for needed in found[name] if needed in self.files]
        return found


def copy_modules(modules: Path, wanted: Iterable[str], tree: Path) -> list[str]:
    """Put the wanted modules, with what they need, under ``tree``/lib/modules. Returns the names copied.

    ``depmod`` has to run in the tree afterwards. Raises BuildFailed naming a module that does not exist.
    """
    source = ModuleTree(modules)
    names = source.order(sorted(set(wanted)))
    target = tree / "usr/lib/modules" / modules.name
    for path in [source.files[name] for name in names] + list(modules.glob("modules.*")):
        copy = target / path.relative_to(modules)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return names


def _initramfs(modules: Path, busybox: bytes) -> bytes:
    tree = ModuleTree(modules)
    files = [tree.files[name] for name in tree.order(initramfs.BOOT_MODULES)]
    images = {path.name: path.read_bytes() for path in files}
    return initramfs.build(busybox, images, [path.name for path in files])
