"""The process prepared before a snapshot: the first command takes it, later ones do without."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vmm_core.errors import GuestRefused
from vmm_core.machine import GuestFile

from .conftest import REVIVE, Agent, run_agent, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent changes users, as root does")


@pytest.fixture
async def prepared(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent that was quiesced, as in every fork."""
    async with run_agent(tmp_path / "g", env={"ZYGOTE_USER": "nobody"}) as agent:
        async with agent.channel() as channel:
            await channel.quiesce()
        yield agent


def children(agent: Agent) -> set[int]:
    return {
        int(pid)
        for pid in Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    }


async def test_the_first_command_is_the_prepared_process_and_the_second_is_not(prepared: Agent) -> None:
    (ready,) = children(prepared)
    async with prepared.channel() as channel:
        script = "echo $$; id -un; id -gn; pwd; echo $GREETING; ps -o sid= -p $$; echo err >&2; exit 3"
        argv = ["/bin/sh", "-c", script]
        first = await channel.start("a", argv, user="nobody", cwd="/usr", env={"GREETING": "hi there"})
        result = await first.collect()
        words = result.stdout.decode().split("\n")
        assert words[:5] == [str(ready), "nobody", "nogroup", "/usr", "hi there"]
        assert words[5].strip() == str(ready), "in a session of its own"
        assert (result.code, result.stderr) == (3, b"err\n")
        second = await (
            await channel.start("b", ["/bin/sh", "-c", "echo $$; id -un"], user="nobody", cwd="/")
        ).collect()
        assert second.stdout.split()[1] == b"nobody"
        assert int(second.stdout.split()[0]) != ready


async def test_another_user_and_a_command_with_input_leave_it_alone(prepared: Agent) -> None:
    (ready,) = children(prepared)
    async with prepared.channel() as channel:
        root = await (await channel.start("a", ["id", "-un"], user="root", cwd="/")).collect()
        assert root.stdout == b"root\n"
        reader = await channel.start("b", ["cat"], user="nobody", cwd="/", stdin=True)
        await reader.write(b"in")
        await reader.close_stdin()
        assert (await reader.collect()).stdout == b"in"
        assert ready in children(prepared)


@pytest.mark.parametrize(
    ("argv", "cwd", "words"),
    [(["/no-such-thing"], "/", "no-such-thing"), (["true"], "/no-such-place", "no-such-place")],
)
async def test_a_command_that_cannot_start_is_refused_with_its_reason(
    prepared: Agent, argv: list[str], cwd: str, words: str
) -> None:
    async with prepared.channel() as channel:
        with pytest.raises(GuestRefused, match=words):
            await channel.start("a", argv, user="nobody", cwd=cwd)
        assert (
            await (await channel.start("b", ["echo", "on"], user="nobody", cwd="/")).collect()
        ).stdout == b"on\n"


async def test_when_it_was_killed_the_command_starts_all_the_same(prepared: Agent) -> None:
    (ready,) = children(prepared)
    os.kill(ready, 9)
    await until(lambda: not children(prepared))
    async with prepared.channel() as channel:
        assert (
            await (await channel.start("a", ["echo", "on"], user="nobody", cwd="/")).collect()
        ).stdout == b"on\n"


async def test_a_large_environment_fits(prepared: Agent) -> None:
    async with prepared.channel() as channel:
        env = {f"V{number}": "x" * 1000 for number in range(40)}
        process = await channel.start(
            "a", ["/bin/sh", "-c", "env | grep -c ^V"], user="nobody", cwd="/", env=env
        )
        assert (await process.collect()).stdout == b"40\n"


async def test_a_second_quiesce_replaces_it_and_the_end_of_the_agent_ends_it(prepared: Agent) -> None:
    (ready,) = children(prepared)
    async with prepared.channel() as channel:
        await channel.revive(REVIVE)
        await channel.quiesce()
    await until(lambda: ready not in children(prepared))
    (next_one,) = children(prepared)
    prepared.process.kill()
    await prepared.process.wait()
    await until(lambda: not Path(f"/proc/{next_one}").exists())


async def test_a_blank_made_before_the_snapshot_takes_its_content_in_place(tmp_path: Path) -> None:
    blank, other = (Path("/dev/shm") / f"{name}-{os.getpid()}" for name in ("blank", "other"))
    secret, later = b"s" * 3000, b"other"
    try:
        async with run_agent(tmp_path / "g", env={"ZYGOTE_USER": "nobody"}) as agent:
            async with agent.channel() as channel:
                await channel.quiesce(blanks=[str(blank)])
            inode = blank.stat().st_ino
            assert (blank.stat().st_size, blank.stat().st_mode & 0o777) == (0, 0o600)
            async with agent.channel() as channel:
                files = [GuestFile(str(blank), secret), GuestFile(str(other), later)]
                argv = ["/bin/sh", "-c", f"stat -c '%U %a %s %i' {blank}; cat {blank} {other} | wc -c"]
                process = await channel.start("a", argv, user="nobody", cwd="/", files=files)
                words = (await process.collect()).stdout.split()
                assert words == [b"nobody", b"600", b"3000", str(inode).encode(), b"3005"]
                # A second command finds it used up: the file is replaced as any other.
                argv = ["/bin/sh", "-c", f"cat {blank}"]
                process = await channel.start(
                    "b", argv, user="nobody", cwd="/", files=[GuestFile(str(blank), later)]
                )
                assert (await process.collect()).stdout == later
    finally:
        blank.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
