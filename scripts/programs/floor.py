"""The floor: the same restore driven by hand, with nothing but QEMU and a socket.

No engine, no jail, no records, no event loop: blocking calls in the order a person would type them. What the
engine adds to this is what it costs. The parent's memory is loaded and sealed beforehand, as the engine does.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vmm_core import memory
from vmm_core.disk import FICLONE
from vmm_core.drivers.qemu import EMULATED_CPU
from vmm_core.guest.agent import REQUEST, encode
from vmm_core.machine import Snapshot

_PATIENCE = 60.0
HELLO = encode(REQUEST, 1, json.dumps({"op": "hello", "token": "floor"}).encode())


class Floor:
    """Restores of one parent. ``directory`` must be on the pool, so that the disk is reflinked."""

    def __init__(self, snapshot: Snapshot, directory: Path) -> None:
        self.snapshot = snapshot
        self.directory = directory
        self.size = snapshot.manifest.machine.memory_mib
        self.memory = memory.load_sealed(snapshot.path / "memory.img", self.size << 20)

    def close(self) -> None:
        os.close(self.memory)

    def restore_ms(self) -> float:
        """Milliseconds from nothing to the guest's first answer."""
        with self._place() as place:
            started = time.perf_counter()
            process = self._restore(place)
            elapsed = time.perf_counter() - started
            process.kill()
            process.wait()
            return elapsed * 1e3

    def restore_at_once_ms(self, count: int) -> float:
        """Milliseconds until ``count`` restores begun at the same time have all answered."""
        with contextlib.ExitStack() as stack:
            places = [stack.enter_context(self._place()) for _ in range(count)]
            found: list[subprocess.Popen[bytes]] = []
            threads = [
                threading.Thread(target=lambda at=at: found.append(self._restore(at))) for at in places
            ]
            started = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            elapsed = time.perf_counter() - started
            for process in found:
                process.kill()
                process.wait()
            if len(found) != count:
                raise RuntimeError(f"{count - len(found)} of {count} restores by hand failed")
            return elapsed * 1e3

    @contextlib.contextmanager
    def _place(self) -> Iterator[Path]:
        place = Path(tempfile.mkdtemp(prefix="floor-", dir=self.directory))
        try:
            yield place
        finally:
            shutil.rmtree(place)

    def _restore(self, place: Path) -> subprocess.Popen[bytes]:
        with (
            (self.snapshot.path / "disk.img").open("rb") as source,
            (place / "disk.img").open("xb") as target,
        ):
            fcntl.ioctl(target.fileno(), FICLONE, source.fileno())
        with (self.snapshot.path / "state.bin").open("rb") as state:
            process = subprocess.Popen(
                self._argv(),
                cwd=place,
                pass_fds=[self.memory, state.fileno()],
                stdin=subprocess.DEVNULL,
            )
            try:
                self._load(place, state.fileno())
                self._first_answer(place)
            except BaseException:
                process.kill()
                process.wait()
                raise
        return process

    def _argv(self) -> list[str]:
        machine = self.snapshot.manifest.machine
        return [
            "qemu-system-x86_64",
            *("-M", "microvm,x-option-roms=off,rtc=on,acpi=on,memory-backend=mem"),
            *("-accel", self.snapshot.manifest.accel, "-smp", str(machine.vcpus), "-m", f"{self.size}M"),
            *(
                "-cpu",
                EMULATED_CPU if self.snapshot.manifest.accel == "tcg" else "host,arch-capabilities=off",
            ),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-global", "migration.store-global-state=off"),
            *(
                "-object",
                f"memory-backend-file,id=mem,size={self.size}M,mem-path=/proc/self/fd/{self.memory},share=off",
            ),
            *("-serial", "null", "-qmp", "unix:qmp.sock,server=on,wait=off"),
            *("-blockdev", "driver=raw,node-name=root,file.driver=file,file.filename=disk.img"),
            *("-device", "virtio-blk-device,drive=root", "-device", "virtio-serial-device"),
            *("-chardev", "socket,id=agent,path=agent.sock,server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=agent", "-device", "virtio-rng-device"),
            *self._network(),
            *("-incoming", "defer"),
        ]

    def _network(self) -> list[str]:
        """A closed network, where the parent has a card: its device state is part of the saved state."""
        if self.snapshot.manifest.machine.network.mode == "none":
            return []
        return ["-netdev", "user,id=net,restrict=on,ipv6=off", "-device", "virtio-net-device,netdev=net"]

    def _load(self, place: Path, state: int) -> None:
        with _connect(place / "qmp.sock") as sock, sock.makefile("rwb") as monitor:
            monitor.readline()
            for command, arguments in (
                ("qmp_capabilities", {}),
                (
                    "migrate-set-capabilities",
                    {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
                ),
                ("migrate-incoming", {"uri": f"fd:{state}"}),
            ):
                monitor.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                monitor.flush()
                answer = json.loads(monitor.readline())
                while "event" in answer:
                    answer = json.loads(monitor.readline())
                if "return" not in answer:
                    raise RuntimeError(f"{command} by hand: {answer}")

    def _first_answer(self, place: Path) -> None:
        with _connect(place / "agent.sock") as sock:
            sock.settimeout(_PATIENCE)
            sock.sendall(HELLO)
            if not sock.recv(4096):
                raise RuntimeError("the guest did not answer")


def _connect(path: Path) -> socket.socket:
    deadline = time.perf_counter() + _PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            if time.perf_counter() > deadline:
                raise
            time.sleep(0.001)
        else:
            return sock
