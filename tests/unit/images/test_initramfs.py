"""The initramfs: an archive the kernel reads, and modules in an order in which they load."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images import initramfs
from images.initramfs import Entry, load_order, module_depends, module_name, write_cpio


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    found: dict[str, tuple[int, bytes]] = {}
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * n : position + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[position + 110 : position + 110 + name_size - 1].decode()
        data_at = (position + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[data_at : data_at + size])
        position = (data_at + size + 3) & ~3


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,12}(/[a-z]{1,9})?", fullmatch=True), st.binary(max_size=40), max_size=8
    )
)
def test_what_is_written_is_what_is_read(files):
    entries = {name: Entry(mode=0o100644, data=data) for name, data in files.items()}
    assert {name: data for name, (_, data) in read_cpio(write_cpio(entries)).items()} == files


def test_the_same_inputs_give_the_same_bytes_and_parents_come_first():
    archive = initramfs.build(b"busybox", {"virtio.ko": b"v"}, ["virtio.ko"])
    assert archive == initramfs.build(b"busybox", {"virtio.ko": b"v"}, ["virtio.ko"])
    names = list(read_cpio(archive))
    assert names.index("modules") < names.index("modules/virtio.ko")
    assert read_cpio(archive)["modules/order"][1] == b"virtio.ko\n"
    assert read_cpio(archive)["init"][0] & 0o111


@given(st.dictionaries(st.integers(1, 30), st.sets(st.integers(0, 29)), max_size=20), st.data())
def test_every_module_comes_after_what_it_needs(graph, data):
    # Edges lead to smaller numbers only, as the kernel's do (no circles).
    numbers = set(graph) | {n for needed in graph.values() for n in needed}
    depends = {str(n): tuple(str(m) for m in graph.get(n, ()) if m < n) for n in numbers}
    wanted = data.draw(st.lists(st.sampled_from(sorted(depends)), max_size=6)) if depends else []
    order = load_order(wanted, depends, frozenset())
    assert len(order) == len(set(order))
    assert set(wanted) <= set(order)
    for position, name in enumerate(order):
        assert set(depends[name]) <= set(order[:position])


def test_built_in_modules_are_left_out_and_unknown_ones_named():
    assert load_order(["ext4", "a"], {"a": ("ext4",)}, frozenset({"ext4"})) == ["a"]
    with pytest.raises(KeyError, match="nothere"):
        load_order(["nothere"], {}, frozenset())


def test_dependencies_are_read_from_the_module_itself():
    image = b"\x7fELF...\0license=GPL\0depends=virtio,virtio-ring\0retpoline=Y\0"
    assert module_depends(image) == ("virtio", "virtio_ring")
    assert module_depends(b"\0depends=\0") == ()
    assert module_name("kernel/drivers/char/hw_random/virtio-rng.ko") == "virtio_rng"
