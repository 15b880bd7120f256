"""What a job can do to its own guest, on real VMs: the agent hears its host, starts commands and ends them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from vmm_core.engine import Engine
from vmm_core.errors import GuestError, GuestRefused
from vmm_core.machine import Snapshot
from vmm_core.vm import RunningVm

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]

PLAIN = "bomb() { bomb | bomb & }; bomb; sleep 1000"
# Each in a session of its own, without the environment that marks a command's processes, its parent gone.
ESCAPING = """again='setsid env -i PATH=$PATH /tmp/b &'
printf '#!/bin/sh\n%s\n%s\nsleep 100\n' "$again" "$again" >/tmp/b
chmod +x /tmp/b; setsid env -i PATH=$PATH /tmp/b & sleep 1000"""
GROUPS = "/sys/fs/cgroup/commands"


@pytest.fixture
async def vm(engine: Engine, minimal: Snapshot) -> AsyncIterator[RunningVm]:
    async with engine.fork(minimal) as running:
        yield running


async def word(vm: RunningVm, script: str, *, timeout: float = 30) -> str:
    async with asyncio.timeout(timeout):
        result = await vm.exec(script, user="root")
    assert result.code == 0, result
    return result.stdout.decode().strip()


async def test_the_agent_comes_first_and_its_commands_have_bounds(vm: RunningVm) -> None:
    assert await word(vm, "chrt -p 1 | grep -c SCHED_RR") == "1"
    assert await word(vm, "cat /proc/1/oom_score_adj") == "-1000"
    assert await word(vm, "chrt -p $$ | grep -c SCHED_OTHER; cat /proc/$$/oom_score_adj; nice") == "1\n0\n0"
    group = await word(vm, "sed s/0::// /proc/self/cgroup")
    assert group.startswith("/commands/")
    # Thousands of processes where there is memory for them: this machine has 512 MiB.
    each = int(await word(vm, f"cat {GROUPS}/*/pids.max | sort -n | head -1"))
    everybody = int(await word(vm, f"cat {GROUPS}/pids.max"))
    assert 1000 < each < everybody < int(await word(vm, "cat /proc/sys/kernel/threads-max"))


async def test_a_command_may_have_many_processes(vm: RunningVm) -> None:
    script = "i=0; while [ $i -lt 100 ]; do sleep 60 & i=$((i+1)); done; echo $(ls /proc | grep -c '^[0-9]')"
    process = await vm.start(["/bin/sh", "-c", script], exec_id="many")
    async for piece in process.output():
        assert int(piece.data) > 100
        break
    await process.kill()


@pytest.mark.parametrize(("user", "bomb"), [("runner", PLAIN), ("runner", ESCAPING), ("root", ESCAPING)])
async def test_a_fork_bomb_leaves_the_agent_able_to_start_and_to_kill(
    vm: RunningVm, user: str, bomb: str
) -> None:
    await word(vm, "true")
    process = await vm.start(["/bin/sh", "-c", bomb], exec_id="bomb", user=user)
    async with asyncio.timeout(60):  # commands start while it grows
        while int(await word(vm, f"cat {GROUPS}/pids.current", timeout=60)) < 40:
            await asyncio.sleep(0.5)
    again = await vm.attach("bomb")
    await again.kill()
    assert (await again.wait(timeout=20)).signal == 9
    await again.forget()
    async with asyncio.timeout(30):
        while int(await word(vm, f"cat {GROUPS}/pids.current")) > 10:
            await asyncio.sleep(0.2)
    assert await word(vm, "ls /proc/*/exe >/dev/null 2>&1; pgrep -x b || echo none") == "none"
    process.release()


async def test_a_memory_hog_is_ended_and_the_agent_answers_meanwhile(vm: RunningVm) -> None:
    await word(vm, "true")
    script = "x=[]\nwhile True: x.append(bytearray(b'x' * (1 << 20)))"
    process = await vm.start(["python3", "-c", script], exec_id="hog")
    for _ in range(5):
        assert await word(vm, "echo on") == "on"
    assert (await process.wait(timeout=60)).signal == 9
    assert await word(vm, "echo on") == "on"


async def test_full_disk_and_tmpfs_leave_what_needs_no_room(vm: RunningVm) -> None:
    """/run/lock is any user's, and /run what the agent's own files lie in; /dev/shm may be half the memory."""
    script = """for place in /run/lock /dev/shm; do cat /dev/zero >$place/fill 2>/dev/null; done
    fallocate -l 100G /home/runner/fill 2>/dev/null; cat /dev/zero >/home/runner/rest 2>/dev/null; df -k / /run | cat"""
    async with asyncio.timeout(120):
        await vm.exec(script)
        assert (await vm.exec("echo x >/home/runner/more")).code != 0
    running = await vm.start(["/bin/sh", "-c", "echo started; sleep 1000"], exec_id="after")
    async for piece in running.output():
        assert piece.data == b"started\n"
        break
    again = await vm.attach("after", stdout_from=0)
    await again.kill()
    assert (await again.wait(timeout=10)).signal == 9
    with pytest.raises(GuestRefused, match="ENOSPC"):
        await vm.put("/home/runner/file", bytes(100_000))
    assert await word(vm, "rm /home/runner/fill /home/runner/rest; echo on") == "on"


async def test_a_copy_takes_its_commands_over_where_the_parents_host_was(vm: RunningVm) -> None:
    """Output under way, an input half written and an upload half done while the machine is copied."""
    lines = await vm.start(["/bin/sh", "-c", "seq 1 120000; sleep 0.2; seq 120001 120010"], exec_id="lines")
    reader = await vm.start(["cat"], exec_id="cat", stdin=True)
    await reader.write(b"one\n")
    got = bytearray()
    output = lines.output()
    async for piece in output:
        if piece.stream == "stdout":
            got += piece.data
        if len(got) > 200_000:
            break

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(10_000)
            await asyncio.sleep(0.005)

    upload = asyncio.create_task(vm.put("/home/runner/up", endless()))
    try:
        await asyncio.sleep(0.3)
        async with vm.fork() as child:
            there = await child.attach("lines", stdout_from=None, stderr_from=None)
            rest, first = bytearray(), None
            async for piece in there.output():
                first = piece.offset if first is None else first
                assert piece.offset == first + len(rest)
                rest += piece.data
            expected = b"".join(b"%d\n" % n for n in range(1, 120_011))
            assert first is not None
            assert 0 < first <= len(got), "from what the parent's host had not acknowledged"
            assert expected[first:] == bytes(rest)
            assert expected.startswith(got)
            cat = await child.attach("cat", stdout_from=None, stderr_from=None)
            await cat.write(b"of the child\n")
            await cat.close_stdin()
            assert (await cat.collect(timeout=20)).stdout == b"one\nof the child\n"
            assert await word(child, "ls -A /home/runner | grep -c part || true") == "0"
            # The parent goes on as if nothing had been.
            await reader.write(b"of the parent\n")
            await reader.close_stdin()
            assert (await reader.collect(timeout=20)).stdout == b"one\nof the parent\n"
            assert not upload.done()
    finally:
        upload.cancel()
        with contextlib.suppress(asyncio.CancelledError, GuestError):
            await upload
