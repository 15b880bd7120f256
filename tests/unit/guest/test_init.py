"""The agent as PID 1 and with the real system calls, inside namespaces of its own."""

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmm_core.errors import GuestRefused

from .conftest import REVIVE, run_agent

UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--uts")


def can_unshare() -> bool:
    return (
        os.geteuid() == 0
        and shutil.which("unshare") is not None
        and subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    )


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs root and namespaces")


async def test_as_pid_1_it_reaps_what_commands_leave_behind(tmp_path: Path) -> None:
    async with run_agent(tmp_path / "g", prefix=UNSHARE) as guest, guest.channel() as channel:
        script = "for i in 1 2 3 4 5 6 7 8; do (setsid sh -c 'sleep 0.2; exit 3' & ) ; done; echo $PPID"
        process = await channel.start("a", ["sh", "-c", script], user="root", cwd="/")
        assert (await process.collect(timeout=10)).stdout == b"1\n"
        await asyncio.sleep(0.5)
        count = await channel.start(
            "b", ["sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status; ls -d /proc/[0-9]* | wc -l"],
            user="root", cwd="/",
        )  # fmt: skip
        lines = (await count.collect(timeout=10)).stdout.split()
        assert lines == [b"4"]  # the agent, sh, ls, wc


async def test_real_hostname_and_boot_id_in_namespaces(tmp_path: Path) -> None:
    host = os.uname().nodename
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    real = {"REAL": "hostname mount"}
    async with run_agent(tmp_path / "g", prefix=UNSHARE, env=real) as guest, guest.channel() as channel:
        for n in range(2):
            revived = await channel.revive(REVIVE)
            script = "uname -n; cat /proc/sys/kernel/random/boot_id"
            process = await channel.start(f"a{n}", ["sh", "-c", script], user="root", cwd="/")
            out = (await process.collect(timeout=10)).stdout.decode().split()
            assert out == ["fork-1", revived.boot_id]
    assert os.uname().nodename == host
    assert Path("/proc/sys/kernel/random/boot_id").read_text() == boot_id


async def test_killing_as_pid_1_finds_what_escaped(tmp_path: Path) -> None:
    async with run_agent(tmp_path / "g", prefix=UNSHARE) as guest, guest.channel() as channel:
        script = "(setsid sh -c '(setsid sleep 307 &)' &); sleep 0.2; echo ready; sleep 300"
        process = await channel.start("a", ["sh", "-c", script], user="nobody", cwd="/")
        async for piece in process.output():
            if b"ready" in piece.data:
                break
        await process.kill()
        await process.collect(timeout=5)
        left = await channel.start(
            "b", ["sh", "-c", "grep -c 307 /proc/[0-9]*/cmdline"], user="root", cwd="/"
        )
        assert b"sleep" not in (await left.collect(timeout=5)).stdout
        again = await channel.start(
            "c", ["sh", "-c", "cat /proc/[0-9]*/comm | sort -u"], user="root", cwd="/"
        )
        assert b"sleep" not in (await again.collect(timeout=5)).stdout


async def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    async with run_agent(tmp_path / "g", prefix=UNSHARE) as guest, guest.channel() as channel:
        mount = await channel.start(
            "a", ["mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"], user="root", cwd="/"
        )
        assert (await mount.collect(timeout=5)).code == 0
        with pytest.raises(GuestRefused, match="ENOSPC"):
            await channel.put("/mnt/big", bytes(1 << 20), user="root")
        listing = await channel.start("b", ["ls", "-A", "/mnt"], user="root", cwd="/")
        assert (await listing.collect(timeout=5)).stdout == b""
