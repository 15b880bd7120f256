"""Device state comes from a VMM that may have been taken over: it is capped, and nothing changes it afterwards."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmm_core import memory
from vmm_core.drivers import qemu
from vmm_core.drivers.base import Place
from vmm_core.drivers.qemu import QemuVm
from vmm_core.errors import VmmProtocolError

pytestmark = pytest.mark.anyio


class Vmm:
    """A monitor whose VMM writes what it likes to the descriptor it was given."""

    def __init__(self, writing: Callable[[int], None]) -> None:
        self._writing = writing
        self.fd = -1
        self.removed: list[int] = []

    async def add(self, fd: int) -> int:
        self.fd = os.dup(fd)
        return 7

    def send(self, command: str, **arguments: Any) -> asyncio.Future[Any]:
        assert (command, arguments) == ("xen-save-devices-state", {"filename": "/dev/fdset/7", "live": False})
        return asyncio.ensure_future(asyncio.to_thread(self._writing, self.fd))

    async def execute(self, command: str, *, fdset_id: int) -> None:
        assert command == "remove-fd"
        self.removed.append(fdset_id)


def machine(vmm: Vmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QemuVm:
    vm = QemuVm.__new__(QemuVm)
    vm._place = Place(id="vm-x", directory=tmp_path)  # pyright: ignore[reportPrivateUsage]

    async def connect() -> Vmm:
        return vmm

    monkeypatch.setattr(vm, "connect", connect)
    return vm


async def test_the_state_is_what_the_vmm_wrote_and_stays_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmm = Vmm(lambda fd: os.write(fd, b"devices") and None)
    await machine(vmm, tmp_path, monkeypatch).save_devices(tmp_path)
    assert (tmp_path / "state.bin").read_bytes() == b"devices"
    assert vmm.removed == [7]
    assert fcntl.fcntl(vmm.fd, fcntl.F_GET_SEALS) == memory.ALL_SEALS
    with pytest.raises(PermissionError):
        os.write(vmm.fd, b"and more")
    os.close(vmm.fd)


async def test_a_vmm_that_writes_without_end_is_stopped_and_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def flood(fd: int) -> None:
        nonlocal written
        with contextlib.suppress(PermissionError):
            while written < 64 << 30:
                written += os.write(fd, bytes(1 << 20))

    vmm = Vmm(flood)
    with pytest.raises(VmmProtocolError, match="do not trust it"):
        await machine(vmm, tmp_path, monkeypatch).save_devices(tmp_path)
    await asyncio.sleep(0.1)
    assert written < 4 << 30
    with pytest.raises(PermissionError):
        os.pwrite(vmm.fd, b"x", os.fstat(vmm.fd).st_size)
    assert not (tmp_path / "state.bin").exists()
    os.close(vmm.fd)


async def test_a_vmm_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "_DEVICES_SECONDS", 0.05)
    vmm = Vmm(lambda _: asyncio.run(asyncio.sleep(0.5)))
    with pytest.raises(VmmProtocolError, match="do not trust it"):
        await machine(vmm, tmp_path, monkeypatch).save_devices(tmp_path)
    os.close(vmm.fd)
