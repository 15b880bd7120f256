"""Control groups: which hierarchy of a host holds which controller, and what is written there for a VM."""

from pathlib import Path

import pytest

from vmm_core import cgroup
from vmm_core.cgroup import Cgroups, Hierarchy, Limits

pytestmark = pytest.mark.anyio

LIMITS = Limits(vcpus=2, memory_mib=1000, vmm_mib=24, cpu_weight=50, disk_mbps=10, disk_device="8:0")


def v1_line(path: Path, controllers: str) -> str:
    return f"30 29 0:25 / {path} rw,relatime shared:9 - cgroup cgroup rw,{controllers}\n"


def v2_line(path: Path) -> str:
    return f"31 29 0:26 / {path} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def unified(tmp_path: Path) -> Path:
    """A version 2 hierarchy with every controller, as plain files."""
    path = tmp_path / "unified"
    (path / cgroup.GROUP).mkdir(parents=True)
    (path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids\n")
    return path


def test_a_version_2_host_is_served_whole(unified: Path) -> None:
    found = cgroup.find(v2_line(unified))
    assert found.hierarchies == (Hierarchy(unified, True, ("cpu", "memory", "pids", "io")),)
    assert found.missing == ()
    assert found.describe() == "cpu and memory and pids and io by version 2"
    for directory in (unified, unified / cgroup.GROUP):
        assert (directory / "cgroup.subtree_control").read_text() == "+cpu +memory +pids +io"
    assert (unified / cgroup.GROUP / "cpu.weight").read_text() == "400", "all VMs together"


def test_a_version_1_host_is_served_from_three_hierarchies(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("cpu", "memory", "pids", "blkio")}
    for place in places.values():
        place.mkdir()
    lines = [v1_line(place, "cpu,cpuacct" if name == "cpu" else name) for name, place in places.items()]
    empty = tmp_path / "unified"
    empty.mkdir()
    (empty / "cgroup.controllers").write_text("hugetlb\n")
    found = cgroup.find("".join(lines) + v2_line(empty))
    assert {hierarchy.controllers for hierarchy in found.hierarchies} == {("cpu",), ("memory",), ("pids",)}
    assert not any(hierarchy.unified for hierarchy in found.hierarchies)
    assert found.describe() == "cpu by version 1; memory by version 1; pids by version 1"
    weight = int((places["cpu"] / cgroup.GROUP / "cpu.shares").read_text())
    assert weight >= 2 * 1024, "all VMs together"


def test_a_host_in_between_is_served_from_both(tmp_path: Path, unified: Path) -> None:
    (unified / "cgroup.controllers").write_text("memory pids\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    found = cgroup.find(
        v1_line(tmp_path / "cpu", "cpu") + v1_line(tmp_path / "memory", "memory") + v2_line(unified)
    )
    assert [(hierarchy.unified, hierarchy.controllers) for hierarchy in found.hierarchies] == [
        (True, ("memory", "pids")),
        (False, ("cpu",)),
    ]


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    found = cgroup.find(v1_line(tmp_path / "cpu", "cpu") + v1_line(tmp_path / "gone", "pids"))
    assert found.controllers == {"cpu"}
    assert found.missing == ("memory", "pids")
    assert "VMs have no limit of memory, pids" in found.describe()
    assert f"pids at {tmp_path / 'gone'} cannot be used (No such file or directory)" in found.describe()
    assert cgroup.find("").describe().startswith("no control groups; VMs have no limit of cpu, memory, pids")


def test_a_mount_point_with_a_space_is_understood(tmp_path: Path) -> None:
    place = tmp_path / "c groups"
    place.mkdir()
    line = v1_line(place, "pids").replace("c groups", "c\\040groups")
    assert cgroup.find(line).hierarchies[0].path == place


def test_version_2_settings(unified: Path) -> None:
    hierarchy = Hierarchy(unified, True, ("cpu", "memory", "pids", "io"))
    (unified / cgroup.GROUP / "memory.swap.max").touch()
    assert cgroup.settings(hierarchy, LIMITS) == [
        ("cpu.weight", "50"),
        ("cpu.max", "250000 100000"),
        ("memory.max", str(1 << 30)),
        ("memory.swap.max", "0"),
        ("memory.oom.group", "1"),
        ("pids.max", "98"),
        ("io.max", "8:0 rbps=10000000 wbps=10000000 riops=max wiops=max"),
    ]


def test_version_1_settings(tmp_path: Path) -> None:
    hierarchy = Hierarchy(tmp_path, False, ("cpu", "memory", "pids"))
    assert cgroup.settings(hierarchy, LIMITS) == [
        ("cpu.shares", "512"),
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "250000"),
        ("memory.limit_in_bytes", str(1 << 30)),
        ("pids.max", "98"),
    ]


def test_swap_is_limited_where_the_kernel_counts_it(tmp_path: Path) -> None:
    (tmp_path / cgroup.GROUP).mkdir()
    (tmp_path / cgroup.GROUP / "memory.memsw.limit_in_bytes").touch()
    written = cgroup.settings(Hierarchy(tmp_path, False, ("memory",)), LIMITS)
    assert [name for name, _ in written] == [
        "memory.memsw.limit_in_bytes",
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
    ]
    assert (written[0][1], written[2][1]) == ("-1", written[1][1])


async def test_groups_are_listed_read_and_removed(tmp_path: Path) -> None:
    groups = Cgroups((Hierarchy(tmp_path, True, ("memory", "pids")),))
    assert groups.numbers() == set()
    directory = tmp_path / cgroup.GROUP / "7"
    directory.mkdir(parents=True)
    (tmp_path / cgroup.GROUP / "probe-1").mkdir()
    assert groups.numbers() == {7}
    (directory / "cgroup.procs").write_text("12\n34\n")
    (directory / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert groups.pids(7) == {12, 34}
    assert groups.oom_kills(7) == 2
    for path in directory.iterdir():
        path.unlink()
    assert (groups.pids(7), groups.oom_kills(7)) == (set(), 0)
    await groups.remove(7)
    await groups.remove(7)
    assert groups.numbers() == set()
