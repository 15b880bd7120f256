"""Cells under control groups of version 2, whatever this host has: the jailer runs inside a real guest."""

import json
import os
import secrets
import shutil
import signal
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from vmm_core import cell, jailer, kernel, seccomp
from vmm_core.cgroup import Cgroups, Hierarchy, Limits
from vmm_core.engine import Engine
from vmm_core.jailer_link import LAUNCH
from vmm_core.machine import Snapshot

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="jailing needs root"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="the attacker is compiled here (gcc)"),
]

# Speaks to the jailer as vmm_core.jail does, which needs more than a guest's Python has.
GUEST = """
import array, json, os, socket, subprocess, sys

order = json.load(open("/root/order.json"))
if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
    subprocess.run(["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"], check=True)
os.makedirs("/sys/fs/cgroup/microvm", exist_ok=True)
for place in ("/sys/fs/cgroup", "/sys/fs/cgroup/microvm"):
    open(place + "/cgroup.subtree_control", "w").write("+cpu +memory +pids +io")
for place in ("dev", "proc"):
    os.makedirs("/root/vmm/" + place, exist_ok=True)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
launch = [sys.executable, "-I", "-S", "-c", order["launch"], "/root/code", str(theirs.fileno())]
subprocess.Popen(launch, pass_fds=[theirs.fileno()])
theirs.close()

def hear(sock):
    data, ancillary, _, _ = sock.recvmsg(1 << 17, 1024)
    fds = array.array("i")
    for _, _, payload in ancillary:
        fds.frombytes(payload)
    return json.loads(data) if data else None, list(fds)

ours.send(json.dumps(order["settings"]).encode())
assert hear(ours)[0] == {"ready": True}
found = {}
for name, run in order["runs"].items():
    log = os.memfd_create("log")
    socket.send_fds(ours, [json.dumps(order["cell"]).encode()], [log])
    said, fds = hear(ours)
    cell = socket.socket(fileno=fds[0])
    ready = hear(cell)[0]
    assert ready == {}, ready
    group = "/sys/fs/cgroup/microvm/7/"
    found["joined"] = open(group + "cgroup.procs").read().split() == [str(said["pid"])]
    for limit in ("cpu.max", "cpu.weight", "memory.max", "memory.swap.max", "pids.max", "memory.oom.group", "io.max"):
        try:
            found[limit] = open(group + limit).read().strip()
        except FileNotFoundError:
            found[limit] = None
    found["status"] = [line for line in open(f"/proc/{said['pid']}/status") if line.startswith(("Cap", "Seccomp:"))]
    program = {"argv": ["/taken_over", *run], "env": {}, "rlimits": {"CORE": 0}, "cwd": "/", "fds": 0}
    cell.send(json.dumps(program).encode())
    _, status = os.waitpid(said["pid"], 0)
    ooms = [line.split()[1] for line in open(group + "memory.events") if line.startswith("oom_kill ")]
    found[name] = [os.waitstatus_to_exitcode(status), os.pread(log, 4096, 0).decode(), *ooms]
    os.rmdir(group)
print(json.dumps(found))
"""


async def test_limits_hold_under_version_2(engine: Engine, minimal: Snapshot, tmp_path: Path) -> None:
    program = tmp_path / "taken_over"
    source = Path(__file__).with_name("taken_over.c")
    subprocess.run(["gcc", "-static", "-O1", "-pthread", "-o", program, source], check=True)
    groups = Cgroups((Hierarchy(Path("/sys/fs/cgroup"), True, ("cpu", "memory", "pids", "io")),))
    limits = Limits(vcpus=1, memory_mib=32, vmm_mib=32, disk_mbps=5, disk_device="254:0")
    plan = groups.plan(7, limits)
    # This host need not count swap as the guest does.
    plan[0]["set"] = [*plan[0]["set"], ("memory.swap.max", "0")]  # type: ignore[misc]
    address = 0x10_0000_0000 + secrets.randbelow(1 << 30) * 4096
    order = {
        "launch": LAUNCH,
        "settings": {
            "root": "/root/vmm",
            "cgroups": ["/sys/fs/cgroup"],
            "exec_address": address,
            "filter": b64encode(seccomp.program(address)).decode(),
            "kvm": False,
        },
        "cell": {"do": "cell", "fds": 1, "id": 1, "uid": 70_000, "kvm": False, "cgroups": plan},
        "runs": {
            "nothing": ["nothing"],
            "threads": ["threads", "300"],
            "memory": ["memory", "200"],
            "fork": ["call", "57"],
        },
    }
    async with engine.fork(minimal) as vm:
        for module in (kernel, cell, jailer):
            code = Path(module.__file__)
            await vm.put(f"/root/code/{code.name}", code.read_bytes(), user="root")
        await vm.put("/root/vmm/taken_over", program.read_bytes(), mode=0o755, user="root")
        await vm.put("/root/order.json", json.dumps(order).encode(), user="root")
        await vm.put("/root/guest.py", GUEST.encode(), user="root")
        result = await vm.exec(["python3", "/root/guest.py"], user="root", timeout=110)
    assert result.code == 0, result
    found = json.loads(result.stdout)
    assert found["joined"], "born in its group"
    assert found["cpu.max"] == "150000 100000"
    assert found["cpu.weight"] == "100"
    assert found["memory.max"] == str(64 << 20)
    assert found["memory.oom.group"] == "1"
    assert found["pids.max"] == "97"
    assert found["io.max"] == "254:0 rbps=5000000 wbps=5000000 riops=max wiops=max"
    assert [line.split()[1].strip("0") for line in found["status"]] == [""] * 5 + ["2"]
    assert found["nothing"] == [0, "", "0"]
    assert found["threads"] == [10, "96 threads\n", "0"], "beside the first"
    assert found["memory"][:2] == [-signal.SIGKILL, ""]
    assert int(found["memory"][2]) >= 1, "some kernels count the group as well"
    assert found["fork"] == [-signal.SIGSYS, "", "0"]
