"""What the doctor says of the network, the jail and the control groups, where they are whole and where they lack."""

from pathlib import Path

import pytest

from vmm_core import doctor
from vmm_core.cgroup import Cgroups
from vmm_core.drivers.base import DriverInfo
from vmm_core.jail import Jailer

pytestmark = pytest.mark.anyio


async def _findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jailer: Jailer
) -> dict[str, doctor.Finding]:
    async def opened(*_args: object, **_kwargs: object) -> Jailer:
        return jailer

    async def slots() -> str:
        return "the program nft is missing"

    monkeypatch.setattr(Jailer, "open", opened)
    monkeypatch.setattr(doctor.host, "usable", slots)
    monkeypatch.setattr(doctor, "find_qemu", lambda: DriverInfo("qemu", "9.0.0", "/bin/true"))
    return {one.name: one for one in await doctor.check(tmp_path)}


async def test_user_mode_is_told_as_the_lesser_choice_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jailer = Jailer(None, Cgroups(()))
    jailer.why = "it needs root"
    found = await _findings(tmp_path, monkeypatch, jailer)
    network = found["network"]
    assert network.ok is None
    assert "user-mode, because the program nft is missing" in network.detail
    assert "no 'internet'" in network.detail
    assert network.advice
    assert found["jail"].ok is None
    assert "it needs root" in found["jail"].detail
    assert found["jail"].advice
    assert found["cgroup"].ok is None


async def test_a_jail_without_control_groups_is_whole_but_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await _findings(
        tmp_path, monkeypatch, Jailer(tmp_path, Cgroups((), obstacles=("none is mounted",)))
    )
    assert found["jail"].ok is True
    assert "own uid" in found["jail"].detail
    assert found["cgroup"].ok is None
    assert "none is mounted" in found["cgroup"].detail
    assert found["cgroup"].advice


async def test_without_a_vmm_there_is_nothing_to_jail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {one.name: one for one in await doctor.check(tmp_path)}
    assert found["vmm"].ok is False
    assert "jail" not in found
    assert "network" in found
