"""What a hostile guest does to its host, and what that costs a neighbour: played on real VMs.

Each attack is a program that runs as root in one VM while the time of a small command in another is
measured. The host is well when the neighbour hardly notices.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import msgspec

from vmm_core.engine import Engine
from vmm_core.machine import Network, Snapshot
from vmm_core.vm import RunningVm

# The agent's port is open already and opens only once: the attacker takes the agent's own descriptor.
_TAKE_PORT = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
agent = next(int(pid) for pid in os.listdir("/proc") if pid.isdecimal()
             and b"agent.py" in open(f"/proc/{pid}/cmdline", "rb").read() and int(pid) != os.getpid())
name = os.path.realpath(next("/dev/virtio-ports/" + port for port in os.listdir("/dev/virtio-ports"))) \\
    if os.path.isdir("/dev/virtio-ports") else next("/dev/" + d for d in os.listdir("/dev") if d.startswith("vport"))
held = next(int(fd) for fd in os.listdir(f"/proc/{agent}/fd") if os.readlink(f"/proc/{agent}/fd/{fd}") == name)
port = libc.syscall(438, libc.syscall(434, agent, 0), held, 0)  # pidfd_getfd, pidfd_open
assert port >= 0, os.strerror(ctypes.get_errno())
os.set_blocking(port, True)
"""
_FLOOD = _TAKE_PORT + "while True: os.write(port, data)\n"

ATTACKS: dict[str, str] = {
    "console flood": """
data = b"all work and no play\\n" * 1500
console = open("/dev/ttyS0", "wb", buffering=0)
while True: console.write(data)
""",
    "channel flood": """
import binascii, struct
body = struct.pack(">BI", 3, 7) + b"x"
data = (b"\\xc0" + body + struct.pack(">I", binascii.crc32(body)) + b"\\xc0") * 1500
"""
    + _FLOOD,
    "channel garbage": """
import os
data = os.urandom(30000)
"""
    + _FLOOD,
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "disk fill": """
import os
data = os.urandom(1 << 20)
while True:
    try:
        with open("/fill", "wb") as file:
            while True:
                file.write(data); file.flush(); os.fsync(file.fileno())
    except OSError: pass
""",
    "memory fill": """
import mmap
held = []
while True:
    try:
        block = mmap.mmap(-1, 1 << 20)
        held.append(block)
        for at in range(0, 1 << 20, 4096): block[at] = at >> 12 or 1
    except (OSError, MemoryError): pass
""",
    "packet blast": """
import socket
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
data = bytes(1400)
while True:
    for address in ("10.0.2.2", "10.0.2.100", "203.0.113.1"):
        try: out.sendto(data, (address, 53))
        except OSError: pass
""",
    "conntrack": """
import itertools, socket
for n in itertools.count():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try: out.sendto(b"x", (f"203.0.113.{n % 254 + 1}", 1024 + n % 60000))
        except OSError: pass
""",
}
COMMAND = ["/bin/true"]


async def latencies_ms(vm: RunningVm, count: int) -> list[float]:
    """How long each of ``count`` small commands took, one after the other."""
    times: list[float] = []
    for _ in range(count):
        started = time.perf_counter()
        await vm.exec(COMMAND, timeout=30)
        times.append((time.perf_counter() - started) * 1e3)
    return times


@contextlib.asynccontextmanager
async def under_attack(engine: Engine, parent: Snapshot, name: str) -> AsyncGenerator[RunningVm]:
    """A VM that does the attack ``name`` for as long as the block lasts."""
    async with engine.fork(_on_the_internet(parent), ttl=300) as attacker:
        program = ATTACKS[name].encode()
        await attacker.put("/root/attack.py", program, user="root")
        attack = await attacker.start(
            ["/usr/bin/python3", "-I", "-S", "/root/attack.py"], exec_id="attack", user="root"
        )
        try:
            await asyncio.sleep(1.0)  # until it is at full strength
            yield attacker
        finally:
            attack.release()


def _on_the_internet(parent: Snapshot) -> Snapshot:
    """The parent, its forks open to as much as a slot ever opens: an attacker is not to be held by a short list."""
    machine = parent.manifest.machine
    if machine.network.mode == "none":
        return parent
    opened = machine.on(Network("internet"))
    return msgspec.structs.replace(parent, manifest=msgspec.structs.replace(parent.manifest, machine=opened))


async def neighbour_ms(
    engine: Engine, parent: Snapshot, name: str, count: int
) -> tuple[list[float], list[float]]:
    """The latencies of a neighbour before and during the attack ``name``."""
    async with engine.fork(parent, ttl=300) as neighbour:
        await latencies_ms(neighbour, 5)
        before = await latencies_ms(neighbour, count)
        async with under_attack(engine, parent, name):
            during = await latencies_ms(neighbour, count)
    return before, during
