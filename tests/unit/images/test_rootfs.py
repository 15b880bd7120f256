"""Root disks: every input is in the key, and nothing is written outside the tree."""

import os
from pathlib import Path

import msgspec
import pytest

from images import apt, rootfs
from images.errors import BuildFailed
from images.kernel import Kernel

KERNEL = Kernel(key="k", version="1", release="r", vmlinux=Path("v"), initrd=Path("i"), modules=Path("m"))
CONTENTS = rootfs.Contents(
    agent=b"agent", certificates={"a.crt": b"A"}, modules=("overlay",), files=(), sudo=False, disk_mib=4096
)
FILE = rootfs.PlacedFile(dest="/a", data=b"x")


@pytest.mark.parametrize(
    "change",
    [
        {"agent": b"other"},
        {"certificates": {"a.crt": b"B"}},
        {"certificates": {"b.crt": b"A"}},
        {"modules": ()},
        {"files": (FILE,)},
        {"sudo": True},
        {"disk_mib": 8192},
        {"runner_sha256": "0" * 64},
    ],
)
def test_every_input_changes_the_disk_key(change):
    other = msgspec.structs.replace(CONTENTS, **change)
    assert rootfs.disk_key("p", KERNEL, other) != rootfs.disk_key("p", KERNEL, CONTENTS)


@pytest.mark.parametrize("change", [{"dest": "/b"}, {"data": b"y"}, {"mode": 0o600}, {"user": "runner"}])
def test_everything_about_a_file_changes_the_disk_key(change):
    one, two = (
        msgspec.structs.replace(CONTENTS, files=(file,))
        for file in (FILE, msgspec.structs.replace(FILE, **change))
    )
    assert rootfs.disk_key("p", KERNEL, one) != rootfs.disk_key("p", KERNEL, two)


def test_packages_and_kernel_change_the_disk_key_and_a_path_does_not():
    base = rootfs.disk_key("p", KERNEL, CONTENTS)
    assert rootfs.disk_key("q", KERNEL, CONTENTS) != base
    assert rootfs.disk_key("p", msgspec.structs.replace(KERNEL, key="other"), CONTENTS) != base
    moved = msgspec.structs.replace(CONTENTS, runner_tarball=Path("/elsewhere"))
    assert rootfs.disk_key("p", KERNEL, moved) == base


def test_versions_and_sources_change_the_package_key():
    archive = apt.Archive(suite="bookworm", sources=("deb http://mirror bookworm main",))
    one = apt.Resolution(archive=archive, packages=(apt.Package("git", "1"),))
    newer = apt.Resolution(archive=archive, packages=(apt.Package("git", "2"),))
    moved = msgspec.structs.replace(
        one, archive=msgspec.structs.replace(archive, sources=("deb http://x y z",))
    )
    assert len({rootfs.package_key(resolution) for resolution in (one, newer, moved)}) == 3


def test_links_are_followed_as_the_guest_would(tmp_path):
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "var").mkdir()
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "var/run").symlink_to("/run")
    (tmp_path / "up").symlink_to("../../../../etc")
    (tmp_path / "passwd").symlink_to("/etc/passwd")
    assert rootfs.inside(tmp_path, "/lib/x") == tmp_path / "usr/lib/x"
    assert rootfs.inside(tmp_path, "/var/run/x") == tmp_path / "run/x"
    assert rootfs.inside(tmp_path, "/up/x") == tmp_path / "etc/x"
    assert rootfs.inside(tmp_path, "/new/dir/x") == tmp_path / "new/dir/x"
    assert rootfs.inside(tmp_path, "/passwd") == tmp_path / "passwd"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(BuildFailed, match="circles"):
        rootfs.inside(tmp_path, "/a/x")


def test_a_placed_file_replaces_a_link_instead_of_following_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chown", lambda *_: None)
    (tmp_path / "tree").mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "tree/target").symlink_to(victim)
    rootfs._place(tmp_path / "tree", rootfs.PlacedFile(dest="/target", data=b"new", mode=0o640))
    assert victim.read_text() == "mine"
    assert (tmp_path / "tree/target").read_bytes() == b"new"
    assert (tmp_path / "tree/target").stat().st_mode & 0o777 == 0o640
