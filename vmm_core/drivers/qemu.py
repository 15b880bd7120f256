"""QEMU's ``microvm`` machine: KVM where it really boots, software emulation elsewhere.

    boot ──► running ──► save: stop → device state → memory → disk ──► killed
    restore (sealed memory + device state) ──► running by itself as soon as the state is loaded
    running ──pause──► paused: its memory and disk are read, save_devices ──resume──► running

A clone has the device arguments of its parent to the letter (``device_args`` is a pure function of the
machine); what may differ is what the devices are backed by: memory, disk, sockets, the network's list.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from vmm_core import clock, evidence, memory
from vmm_core.berths import Berth
from vmm_core.disk import clone_file
from vmm_core.drivers.base import (
    AGENT_SOCKET,
    CONSOLE_SOCKET,
    DISK,
    MEMORY,
    QMP_SOCKET,
    STATE,
    SUMS,
    DriverInfo,
    Place,
    Saved,
    short_path,
)
from vmm_core.drivers.qmp import Json, Qmp
from vmm_core.errors import VmmError, VmmMissing, VmmProtocolError
from vmm_core.machine import Accel, BootImage, MachineSpec, StateKind, VmEvent, VmExit
from vmm_core.network import user
from vmm_core.process import VmmProcess

BINARY = "qemu-system-x86_64"
OLDEST = (7, 2)
# A guest that is told of quick string instructions copies and clears its memory with them, and emulated they go byte
# by byte: reading files is twice as quick without, compression and hashing a quarter.
EMULATED_CPU = "max,-erms,-fsrm"
_SAVE_SECONDS = 60.0
_LAST_WORDS_SECONDS = 0.3
_DEVICES_SECONDS = 10.0
_STATE_CAP = 4 << 20
# Devices alone come without the section that tells a migration's configuration.
_STATE_ARGS: dict[StateKind, tuple[str, ...]] = {
    "migration": (),
    "devices": ("-global", "migration.send-configuration=off"),
}


def find_qemu() -> DriverInfo:
    """The QEMU of this host. Raises VmmMissing, saying what to install, when there is none or it is too old."""
    binary = shutil.which(BINARY)
    if binary is None:
        raise VmmMissing(f"{BINARY} is not on PATH: install it (Debian: apt-get install qemu-system-x86)")
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, timeout=10, check=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise VmmMissing(f"{binary} --version failed: {error}") from error
    found = re.search(r"version (\d+)\.(\d+)(\.\d+)?", answer.stdout)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise VmmMissing(
            f"{binary} is too old ({answer.stdout.splitlines()[0]}): QEMU {OLDEST[0]}.{OLDEST[1]} or newer"
        )
    return DriverInfo(name="qemu", version=found[0].removeprefix("version "), binary=binary)


def cpu_model(accel: Accel) -> str:
    """What a snapshot is tied to: the host's CPU under KVM, QEMU's own under software emulation."""
    if accel == "tcg":
        return EMULATED_CPU
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def device_args(machine: MachineSpec, accel: Accel) -> list[str]:
    """The part of the command line that a clone must share with its parent."""
    args = [
        "-M", "microvm,x-option-roms=off,rtc=on,acpi=on,memory-backend=mem",
        "-cpu", EMULATED_CPU if accel == "tcg" else "host,arch-capabilities=off",
        "-smp", str(machine.vcpus),
        "-m", f"{machine.memory_mib}M",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        # The saved state does not say "paused": a clone runs as soon as its state is loaded.
        "-global", "migration.store-global-state=off",
        "-serial", "chardev:console",
        "-device", "virtio-blk-device,drive=root",
        "-device", "virtio-serial-device",
        "-device", "virtserialport,chardev=agent,name=agent",
        "-device", "virtio-rng-device",
    ]  # fmt: skip
    if machine.network.mode != "none":
        args += ["-device", f"virtio-net-device,netdev=net,mac={user.GUEST_MAC}"]
    return args


def argv_digest(machine: MachineSpec, accel: Accel) -> str:
    return hashlib.sha256(json.dumps(device_args(machine, accel)).encode()).hexdigest()


class Descriptors:
    """The descriptors a VMM is started with; each is told as the number it has there: 3 and up, in this order."""

    def __init__(self, directory: Path) -> None:
        self._stack = contextlib.ExitStack()
        self.all: list[int] = []
        self._directory = directory

    def listen(self, name: str) -> int:
        """Bind ``name`` in the VM's directory. Bound before the VMM starts, so nobody has to wait for it to appear."""
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        with short_path(self._directory / name) as address:
            sock.bind(address)
        sock.listen(4)
        return self._keep(sock.fileno())

    def open(self, path: Path, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, fd)
        return self._keep(fd)

    def lend(self, fd: int) -> int:
        """Pass on a descriptor that stays the caller's."""
        return self._keep(fd)

    def _keep(self, fd: int) -> int:
        self.all.append(fd)
        return 2 + len(self.all)

    def close(self) -> None:
        self._stack.close()


class QemuVm:
    """One QEMU process. ``_memory`` is the shared memory of a machine that booted; a clone has none to save."""

    def __init__(self, place: Place, machine: MachineSpec, accel: Accel, process: VmmProcess) -> None:
        self._place = place
        self._machine = machine
        self._accel: Accel = accel
        self._process = process
        self._qmp: Qmp | None = None
        self._connecting = asyncio.Lock()
        self._events: tuple[VmEvent, ...] = ()
        self._disk_full = False
        self._listening: asyncio.Task[None] | None = None
        self._memory: int | None = None
        self._state: int | None = None
        self._version = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def start_ticks(self) -> int:
        return self._process.start_ticks

    @property
    def agent_socket(self) -> Path:
        return self._place.directory / AGENT_SOCKET

    def own(self, memory_fd: int, state_fd: int, version: str) -> None:
        """Keep what a later save needs: the memory and the descriptor the VMM writes its state to."""
        self._memory, self._state, self._version = memory_fd, state_fd, version

    async def connect(self) -> Qmp:
        """The monitor, which stays open as long as the VM lives: it tells how the machine ends."""
        async with self._connecting:  # QEMU serves one client; a second would wait for ever
            if self._qmp is None:
                self._qmp = await Qmp.connect(self._place.directory / QMP_SOCKET, on_event=self._heard)
            return self._qmp

    def listen(self) -> None:
        """Open the monitor of an adopted VM, and see whether its guest was stopped while nobody listened."""
        self._listening = asyncio.create_task(self._catch_up(), name=f"monitor-{self._place.id}")

    async def _catch_up(self) -> None:
        with contextlib.suppress(VmmProtocolError):
            qmp = await self.connect()
            answer = await qmp.execute("query-status")
            status = cast("Json", answer).get("status") if isinstance(answer, dict) else None
            if status == "io-error":
                self._end_full()
            elif status in ("paused", "save-vm"):
                await qmp.execute("cont")  # its owner died while it was captured

    def _heard(self, name: str, data: Json) -> None:
        if name == "BLOCK_IO_ERROR" and data.get("nospace") is True and data.get("action") == "stop":
            self._end_full()

    def _end_full(self) -> None:
        """The guest was stopped in the middle of a write for want of room: nobody would ever let it go on."""
        self._disk_full = True
        self._process.signal(signal.SIGKILL)

    async def hang_up(self) -> None:
        """Close the monitor; ``connect`` opens it again."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
        if self._qmp is not None:
            qmp, self._qmp = self._qmp, None
            self._events = qmp.events
            await qmp.close()

    async def save(self, directory: Path) -> Saved:
        if self._memory is None or self._state is None:
            raise VmmProtocolError(f"VM {self._place.id} is a clone: only a machine that booted can be saved")
        qmp = await self.connect()
        await qmp.execute("stop")
        await qmp.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}]
        )
        await qmp.lend("state", self._state)
        await qmp.execute("migrate", uri="fd:state")
        await self._migrated(qmp)
        # Same pause: memory, device state and disk belong to one instant.
        await asyncio.to_thread(memory.save_sparse, self._memory, directory / MEMORY)
        sums = await asyncio.to_thread(memory.sums_of, self._memory, self._machine.memory_mib << 20)
        (directory / SUMS).write_bytes(sums)
        await asyncio.to_thread(clone_file, self._place.directory / STATE, directory / STATE)
        await asyncio.to_thread(clone_file, self._place.directory / DISK, directory / DISK)
        await self.kill()
        return Saved(
            argv_digest=argv_digest(self._machine, self._accel),
            cpu_model=cpu_model(self._accel),
            vmm_version=self._version,
        )

    async def pause(self) -> None:
        await (await self.connect()).execute("stop")

    async def resume(self) -> None:
        await (await self.connect()).execute("cont")

    async def save_devices(self, directory: Path) -> None:
        qmp = await self.connect()
        state = os.memfd_create("microvm-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            await self._write_devices(qmp, state)
            # Whatever the VMM still holds of it can not change it any more.
            fcntl.fcntl(state, fcntl.F_ADD_SEALS, memory.ALL_SEALS)
            (directory / STATE).write_bytes(os.pread(state, _STATE_CAP, 0))
        finally:
            os.close(state)

    async def _write_devices(self, qmp: Qmp, state: int) -> None:
        """Let the VMM write its devices' state to the memfd ``state``, and no more than _STATE_CAP of it."""
        # QEMU opens members of a set in the very mode they have, and this command opens for writing alone.
        writer = os.open(f"/proc/self/fd/{state}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            number = await qmp.add(writer)
        finally:
            os.close(writer)
        saving = qmp.send("xen-save-devices-state", filename=f"/dev/fdset/{number}", live=False)
        deadline = time.monotonic() + _DEVICES_SECONDS
        while not saving.done():
            await asyncio.wait({saving}, timeout=0.002)
            if os.fstat(state).st_size > _STATE_CAP or time.monotonic() > deadline:
                fcntl.fcntl(state, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
                raise VmmProtocolError(
                    f"QEMU wrote more than {_STATE_CAP >> 20} MiB as its devices' state, or nothing in "
                    f"{_DEVICES_SECONDS:.0f} s: destroy VM {self._place.id}, do not trust it"
                )
        saving.result()
        await qmp.execute("remove-fd", fdset_id=number)

    async def _migrated(self, qmp: Qmp) -> None:
        deadline = time.monotonic() + _SAVE_SECONDS
        while time.monotonic() < deadline:
            answer = await qmp.execute("query-migrate")
            status = answer.get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise VmmProtocolError(f"QEMU could not save its state: {answer.get('error-desc', status)}")
            await asyncio.sleep(0.005)
        raise VmmProtocolError(f"QEMU did not save its state within {_SAVE_SECONDS:.0f} s")

    async def wait(self) -> VmExit:
        status = await self._process.wait()
        said = self._process.log_text()
        if self._qmp is not None:
            # Its last words may lie in the socket still.
            await self._qmp.last_words(_LAST_WORDS_SECONDS)
        events = self._qmp.events if self._qmp is not None else self._events
        return evidence.of_vmm(
            status, said=said, events=events, disk_full=self._disk_full, usage=self._process.final_usage
        )

    async def kill(self) -> None:
        await self._process.end()
        await self.detach()

    async def detach(self) -> None:
        await self.hang_up()
        for fd in (self._memory, self._state):
            if fd is not None:
                os.close(fd)
        self._memory = self._state = None
        self._process.close()


class QemuDriver:
    """Starts QEMU. ``info`` is found at construction (VmmMissing when there is no usable QEMU)."""

    def __init__(self, info: DriverInfo | None = None) -> None:
        self.info = info or find_qemu()

    async def boot(
        self, place: Place, berth: Berth, machine: MachineSpec, image: BootImage, accel: Accel
    ) -> QemuVm:
        fds = Descriptors(place.directory)
        memory_fd = memory.fresh_memory(machine.memory_mib << 20)
        state_fd = -1
        try:
            state_fd = os.open(place.directory / STATE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            kernel, initrd = (fds.open(path, os.O_RDONLY) for path in (image.kernel, image.initrd))
            arguments = [
                *("-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initrd}"),
                *("-append", kernel_command_line(accel, image.cmdline)),
            ]
            process = await self._spawn(place, berth, machine, accel, fds, memory_fd, arguments, share=True)
        except BaseException:
            os.close(memory_fd)
            if state_fd >= 0:
                os.close(state_fd)
            raise
        finally:
            fds.close()
        vm = QemuVm(place, machine, accel, process)
        vm.own(memory_fd, state_fd, self.info.version)
        try:
            await vm.connect()
        except BaseException:
            await vm.kill()
            raise
        return vm

    async def restore(
        self,
        place: Place,
        berth: Berth,
        machine: MachineSpec,
        accel: Accel,
        memory: int,
        state: Path,
        kind: StateKind,
    ) -> QemuVm:
        fds = Descriptors(place.directory)
        try:
            state_fd = fds.open(state, os.O_RDONLY)
            arguments = ["-incoming", "defer", *_STATE_ARGS[kind]]
            process = await self._spawn(place, berth, machine, accel, fds, memory, arguments, share=False)
        finally:
            fds.close()
        vm = QemuVm(place, machine, accel, process)
        try:
            qmp = await vm.connect()
            # Pipelined: the monitor answers when it is up, nobody waits in between.
            qmp.send(
                "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}]
            )
            await qmp.execute("migrate-incoming", uri=f"fd:{state_fd}")
        except BaseException as error:
            await process.end()
            said = process.log_text().strip()
            await vm.kill()
            if isinstance(error, VmmError) and said:
                raise VmmProtocolError(f"{error}; QEMU said: {said[-500:]}") from error
            raise
        return vm

    def adopt(self, place: Place, pid: int, start_ticks: int) -> QemuVm | None:
        process = VmmProcess.adopt(pid, start_ticks)
        if process is None:
            return None
        vm = QemuVm(place, MachineSpec(), "tcg", process)
        vm.listen()
        return vm

    def fingerprint(self, machine: MachineSpec, accel: Accel) -> Saved:
        return Saved(
            argv_digest=argv_digest(machine, accel), cpu_model=cpu_model(accel), vmm_version=self.info.version
        )

    def snapshot_fits(self, machine: MachineSpec, accel: Accel, saved: Saved) -> str | None:
        if saved.state not in _STATE_ARGS:
            return f"its device state is of a kind, {saved.state!r}, that QEMU is not given by this release"
        if saved.argv_digest != argv_digest(machine, accel):
            return "it was saved with other devices than this release gives a machine"
        if saved.vmm_version.split(".")[:2] != self.info.version.split(".")[:2]:
            return f"it was saved by QEMU {saved.vmm_version} and this host has {self.info.version}"
        if saved.cpu_model != cpu_model(accel):
            return f"it was saved on CPU {saved.cpu_model!r} and this host has {cpu_model(accel)!r}"
        return None

    async def _spawn(
        self,
        place: Place,
        berth: Berth,
        machine: MachineSpec,
        accel: Accel,
        fds: Descriptors,
        memory_fd: int,
        arguments: Sequence[str],
        *,
        share: bool,
    ) -> VmmProcess:
        qmp, agent, console = fds.listen(QMP_SOCKET), fds.listen(AGENT_SOCKET), fds.listen(CONSOLE_SOCKET)
        disk = fds.open(place.directory / DISK, os.O_RDWR)
        memory_at = fds.lend(memory_fd)
        backing = (
            f"size={machine.memory_mib}M,mem-path=/proc/self/fd/{memory_at},share={'on' if share else 'off'}"
        )
        argv = [
            self.info.binary,
            *("-name", place.id),
            *("-accel", accel),
            *device_args(machine, accel),
            *("-object", f"memory-backend-file,id=mem,{backing}"),
            *("-chardev", f"socket,id=qmp,fd={qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=agent,fd={agent},server=on,wait=off"),
            *("-chardev", f"socket,id=console,fd={console},server=on,wait=off"),
            *_disk_args(machine, disk),
            *("-sandbox", _sandbox(relays=berth.tap is None and bool(place.network.allow))),
            *_network_args(machine, place, None if berth.tap is None else fds.lend(berth.tap)),
            *arguments,
        ]
        return await berth.cell.run(argv, fds=fds.all, deadline=place.expires_at, cwd=place.directory)


def _sandbox(*, relays: bool) -> str:
    """QEMU's seccomp filter. A relay is a child of QEMU that calls setsid, which counts as raising
    privileges: only a VM without any relay is denied that, and to start programs."""
    rights = "elevateprivileges=allow,spawn=allow" if relays else "elevateprivileges=deny,spawn=deny"
    return f"on,obsolete=deny,resourcecontrol=deny,{rights}"


def _disk_args(machine: MachineSpec, disk: int) -> list[str]:
    """The disk is a descriptor: a VMM in its jail has no path to it. Limits are a filter on top of it."""
    limits = {"bps-total": machine.disk_mbps * 1_000_000, "iops-total": machine.disk_iops}
    limited = ",".join(f"x-{name}={value}" for name, value in limits.items() if value)
    image = "image" if limited else "root"
    file = "file.driver=file,file.filename=/dev/fdset/1"
    args = [
        *("-add-fd", f"fd={disk},set=1"),
        *("-blockdev", f"driver=raw,node-name={image},discard=unmap,{file}"),
    ]
    if limited:
        args += ["-object", f"throttle-group,id=disk,{limited}"]
        args += ["-blockdev", "driver=throttle,node-name=root,throttle-group=disk,file=image"]
    return args


def _network_args(machine: MachineSpec, place: Place, tap: int | None) -> list[str]:
    if machine.network.mode == "none":
        return []
    if tap is not None:
        return ["-netdev", f"tap,id=net,fd={tap},vhost=off"]
    return ["-netdev", user.netdev_argument(place.network.allow, place.directory)]


def kernel_command_line(accel: Accel, extra: str) -> str:
    """What every guest kernel is told; under emulation also the speed of the clock it cannot measure under load."""
    words = ["console=ttyS0", "quiet", "panic=-1", "reboot=t", "root=/dev/vda", "rw", "random.trust_cpu=on"]
    if accel == "tcg":
        words.append(f"tsc_early_khz={clock.tsc_khz()}")
        # Its watchdog compares the time stamp counter with timer ticks, of which a busy host loses many: then it
        # would take those for its clock, and the clock of every fork would lag.
        words.append("tsc=reliable")
    return " ".join([*words, extra]).strip()
