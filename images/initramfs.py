"""The small initramfs: busybox, the virtio modules in dependency order, an ``/init`` that mounts the disk.

The archive is the kernel's own format (cpio "newc"), written here so that the same inputs give the same
bytes: sorted names, no times, no host uids. It stays uncompressed: it is small, and unpacking costs more
than reading under software emulation.
"""

import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

# What a machine on QEMU's microvm bus needs before its root disk exists, and what the agent needs at once.
BOOT_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "virtio_net")

INIT_SCRIPT = """\
#!/bin/busybox sh
# Loads the virtio modules, mounts the root disk, hands over to the guest agent as PID 1.
b=/bin/busybox
# init's end is a panic, a panic ends the VMM, and the host has the line on its console.
fail() { echo "microvm-init: $*" >/dev/console; exit 1; }

$b mount -t proc proc /proc && $b mount -t devtmpfs dev /dev || fail "cannot mount /proc or /dev"
while read -r module; do
    $b insmod "/modules/$module" || fail "cannot load $module"
done </modules/order

root=/dev/vda fstype=ext4 init=
set -- $($b cat /proc/cmdline)
for word in "$@"; do
    case $word in
        root=*) root=${word#root=} ;;
        rootfstype=*) fstype=${word#rootfstype=} ;;
        init=*) init=${word#init=} ;;
    esac
done
tries=0
until [ -b "$root" ]; do
    tries=$((tries + 1))
    [ $tries -gt 500 ] && fail "no root disk $root after 10 s"
    $b usleep 20000
done
$b mount -t "$fstype" -o rw,noatime "$root" /root || fail "cannot mount $root as $fstype"
$b umount /dev
$b umount /proc
if [ -n "$init" ]; then
    exec $b switch_root /root $init
fi
[ -e /root/usr/lib/microvm/agent.py ] || fail "no agent in the root file system"
exec $b switch_root /root /usr/bin/python3 -I -S /usr/lib/microvm/agent.py --init
"""


class Entry(msgspec.Struct, frozen=True):
    """One member of the archive. ``mode`` with its file type bits; ``device`` is (major, minor)."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def module_name(path: Path | str) -> str:
    """The kernel's name of a module file: ``virtio-rng.ko`` is ``virtio_rng``."""
    return Path(path).name.split(".", 1)[0].replace("-", "_")


def module_depends(image: bytes) -> tuple[str, ...]:
    """The modules one module needs, from the ``depends=`` string of its .modinfo section."""
    found = re.search(rb"\0depends=([^\0]*)\0", image)
    names = found.group(1).decode("ascii") if found else ""
    return tuple(name.replace("-", "_") for name in names.split(",") if name)


def load_order(
    wanted: Iterable[str], depends: Mapping[str, tuple[str, ...]], builtin: frozenset[str]
) -> list[str]:
    """Names in an order in which insmod works: every module after the ones it needs, each once.

    Raises KeyError with the name of a module that is neither a file nor built in.
    """
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name in builtin:
            return
        seen.add(name)
        for needed in depends[name]:
            visit(needed)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def write_cpio(entries: Mapping[str, Entry]) -> bytes:
    """A "newc" archive of the entries (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, name in enumerate([*sorted(entries), "TRAILER!!!"], start=1):
        entry = entries.get(name) or Entry(mode=0)
        encoded = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        out += b"\0" * (-len(out) % 4)
        out += entry.data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def build(busybox: bytes, modules: Mapping[str, bytes], order: Iterable[str]) -> bytes:
    """The archive. ``modules`` maps file name (``virtio.ko``) to image; ``order`` lists those names."""
    directory, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    entries = {name: Entry(mode=directory) for name in ("bin", "dev", "modules", "proc", "root")}
    # The kernel opens /dev/console for init's stdio before anything is mounted.
    entries["dev/console"] = Entry(mode=stat.S_IFCHR | 0o600, device=(5, 1))
    entries["bin/busybox"] = Entry(mode=program, data=busybox)
    entries["init"] = Entry(mode=program, data=INIT_SCRIPT.encode())
    entries["modules/order"] = Entry(
        mode=stat.S_IFREG | 0o644, data="".join(f"{n}\n" for n in order).encode()
    )
    for name, image in modules.items():
        entries[f"modules/{name}"] = Entry(mode=stat.S_IFREG | 0o644, data=image)
    return write_cpio(entries)
