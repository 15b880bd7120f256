"""The real agent, as a subprocess on this host: gate, commands, kills, windows, reconnects, files."""

import asyncio
import json
import os
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from vmm_core.errors import BadRequest, ChannelClosed, GuestRefused, GuestTimeout
from vmm_core.guest.channel import Channel, Process
from vmm_core.machine import GuestFile

from .conftest import REVIVE, TOKEN, Agent, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent changes users, as root does")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that every user can reach, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


async def sh(channel: Channel, script: str, name: str = "x", **options: object) -> Process:
    return await channel.start(name, ["/bin/sh", "-c", script], user="root", cwd="/", **options)  # type: ignore[arg-type]


async def gone(pid: int) -> None:
    await until(lambda: not Path(f"/proc/{pid}").exists())  # reaped as well


# ------------------------------------------------------------------ the gate


async def test_nothing_runs_before_revive(guest: Agent, tmp_path: Path) -> None:
    async with guest.channel(revive=False) as channel:
        hello = await channel.hello(TOKEN)
        assert not hello.revived
        for attempt in (
            channel.start("a", ["true"], user="root"),
            channel.attach("a"),
            channel.put(str(tmp_path / "f"), b"", user="root"),
            channel.get("/etc/passwd"),
        ):
            with pytest.raises(GuestRefused, match="not_revived"):
                await attempt
        await channel.revive(REVIVE)
        assert (await (await sh(channel, "echo hi")).collect()).stdout == b"hi\n"


async def test_a_host_with_the_same_token_needs_no_second_revive_and_another_does(guest: Agent) -> None:
    async with guest.channel():
        pass
    async with guest.channel(revive=False) as channel:
        assert (await channel.hello(TOKEN)).revived
        assert (await (await sh(channel, "true")).collect()).code == 0
    async with guest.channel(revive=False) as channel:
        assert not (await channel.hello("of another VM")).revived
        with pytest.raises(GuestRefused, match="not_revived"):
            await sh(channel, "true")


async def test_a_connection_without_hello_may_do_nothing(guest: Agent) -> None:
    async with guest.channel():
        pass
    async with guest.channel(revive=False) as channel:
        with pytest.raises(GuestRefused, match="not_revived"):
            await sh(channel, "true")


async def test_revive_does_everything_once(guest: Agent) -> None:
    async with guest.channel(revive=False) as channel:
        before = time.time_ns()
        first = await channel.revive(REVIVE)
        second = await channel.revive(REVIVE)
    calls = guest.calls()
    assert [call[0] for call in calls] == [
        "add_entropy", "set_clock", "hostname", "mount", "add_entropy", "set_clock", "hostname"
    ]  # fmt: skip
    assert calls[0][1] == 64
    assert before <= int(str(calls[1][1])) <= time.time_ns()
    assert abs(first.clock_step_ns) < 1e9
    assert first.boot_id != second.boot_id
    assert (guest.record / "run/microvm/boot_id").read_text() == second.boot_id + "\n"
    assert (guest.record / "etc/hostname").read_text() == "fork-1\n"
    assert (guest.record / "etc/machine-id").read_text() == REVIVE.machine_id + "\n"
    assert "127.0.0.1 localhost fork-1" in (guest.record / "etc/hosts").read_text()
    assert "10.0.2.2 forge.test\n" in (guest.record / "etc/hosts").read_text()


async def test_a_revive_that_fails_leaves_the_gate_shut(guest: Agent) -> None:
    async with guest.channel() as channel:
        (guest.record / "etc/machine-id").unlink()
        (guest.record / "etc/machine-id").mkdir()
        with pytest.raises(GuestRefused, match="EISDIR"):
            await channel.revive(REVIVE)
        with pytest.raises(GuestRefused, match="not_revived"):
            await sh(channel, "true")


async def test_ssh_host_keys_of_the_parent_are_replaced(guest: Agent) -> None:
    keys = guest.record / "etc/ssh"
    async with guest.channel() as channel:
        keys.mkdir()
        (keys / "ssh_host_ed25519_key").write_text("old")
        await channel.quiesce()
        await channel.revive(REVIVE)
        await until((keys / "ssh_host_ed25519_key").exists, 20)


async def test_quiesce_forgets_and_shuts_the_gate(guest: Agent) -> None:
    async with guest.channel() as channel:
        running = await sh(channel, "sleep 60", "long")
        with pytest.raises(GuestRefused, match=r"busy: .*long"):
            await channel.quiesce()
        await running.kill()
        await running.wait(timeout=5)
        await channel.quiesce()
        assert ["sync"] in guest.calls()
        with pytest.raises(GuestRefused, match="not_revived"):
            await sh(channel, "true")
        hello = await channel.hello(TOKEN)
        assert (hello.revived, hello.execs) == (False, ())


async def test_poweroff_answers_first(guest: Agent) -> None:
    async with guest.channel() as channel:
        await channel.poweroff()
        await channel.wait_closed()
    assert await asyncio.wait_for(guest.process.wait(), 5) == 0
    assert guest.calls()[-1] == ["poweroff"]


# ------------------------------------------------------------------ commands


async def test_output_status_environment_and_user(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await channel.start(
            "a",
            ["sh", "-c", "id -un; pwd; env; echo e >&2; exit 7"],
            user="nobody",
            cwd="/",
            env={"A": "b c"},
        )
        result = await process.collect()
    lines = result.stdout.decode().splitlines()
    assert (result.code, result.signal, result.stderr) == (7, None, b"e\n")
    assert lines[:2] == ["nobody", "/"]
    variables = dict(line.split("=", 1) for line in lines[2:])
    assert variables.pop("PWD") == "/"
    assert variables.pop("PATH").startswith("/usr/local/sbin:")
    assert variables == {
        "A": "b c", "HOME": "/nonexistent", "USER": "nobody", "LOGNAME": "nobody", "LANG": "C.UTF-8",
        "MICROVM_EXEC": "a",
    }  # fmt: skip


async def test_a_command_inherits_nothing_of_the_agent(guest: Agent) -> None:
    script = """ls -l /proc/self/fd | wc -l
    grep -E 'Sig(Ign|Blk)|NoNewPrivs' /proc/self/status
    cat /proc/self/oom_score_adj"""
    async with guest.channel() as channel:
        out = (await (await sh(channel, script)).collect()).stdout.decode().split()
    assert int(out[0]) <= 6  # total line, 0, 1, 2, the directory itself
    status = dict(zip(out[1:-1:2], out[2:-1:2], strict=True))
    assert int(status["SigBlk:"], 16) == 0
    assert int(status["SigIgn:"], 16) & ~(1 << 12) == 0
    assert status["NoNewPrivs:"] == "0"
    assert out[-1] == "0"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"user": "no-such-user"}, "no_such_user"),
        ({"cwd": "/no/such/dir"}, "exec_failed: working directory /no/such/dir: No such file"),
        ({"argv": ["no-such-program"]}, "exec_failed: no-such-program: No such file"),
        ({"argv": ["/etc/passwd"]}, "exec_failed: /etc/passwd: Permission denied"),
        ({"files": [GuestFile("relative", b"")]}, "bad_path"),
        ({"files": [GuestFile("/dev/null", b"")]}, "not_regular"),
        ({"files": [GuestFile("/proc/nowhere/x", b"")]}, "ENOENT"),
    ],
)
async def test_what_cannot_start_is_refused_and_leaves_nothing(
    guest: Agent, options: dict[str, object], reason: str
) -> None:
    async with guest.channel() as channel:
        base: dict[str, object] = {"argv": ["true"], "user": "root", "cwd": "/"}
        with pytest.raises(GuestRefused, match=reason):
            await channel.start("a", **{**base, **options})  # type: ignore[arg-type]
        assert len(list(Path(f"/proc/{guest.process.pid}/fd").iterdir())) < 12
        assert (await (await sh(channel, "echo ok", "a")).collect()).stdout == b"ok\n"


async def test_what_cannot_be_asked_is_not_sent(guest: Agent) -> None:
    async with guest.channel() as channel:
        for exec_id, argv, env in (
            ("", ["true"], {}), ("a/b", ["true"], {}), ("a", [], {}), ("a", ["x\0"], {}),
            ("a", ["x"], {"A=": ""}), ("a", ["x" * 70_000], {}), ("a", ["\ud800"], {}),
        ):  # fmt: skip
            with pytest.raises(BadRequest):
                await channel.start(exec_id, argv, env=env)
        with pytest.raises(BadRequest):
            await channel.start("a", ["x"], files=[GuestFile("/f", bytes(300_000))])


async def test_start_with_the_same_id_joins(guest: Agent) -> None:
    async with guest.channel() as channel:
        first = await sh(channel, "echo $$; sleep 0.2; echo end", "same")
        second = await sh(channel, "echo other", "same")
        assert first.pid == second.pid
        result = await second.collect()
        assert result.stdout == f"{first.pid}\nend\n".encode()


async def test_input_flows_and_ends(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "sha256sum", stdin=True)
        data = os.urandom(3_000_000)

        async def feed() -> None:
            await process.write(data)
            await process.close_stdin()

        feeding = asyncio.create_task(feed())
        result = await process.collect(timeout=20)
        await feeding
    import hashlib

    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


async def test_input_of_a_command_that_does_not_read(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "exec <&-; sleep 0.3", stdin=True)
        async with asyncio.timeout(10):
            await process.write(bytes(2_000_000))
        assert (await process.collect(timeout=5)).code == 0
        closed = await sh(channel, "cat", "c")
        with pytest.raises(ChannelClosed):
            await closed.write(b"x")
        assert (await closed.collect(timeout=5)).code == 0  # without input, reading finds the end at once


async def test_twelve_megabytes_come_whole_through_a_window(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "seq 1 1600000; seq 1 100000 >&2")
        result = await process.collect(max_bytes=64 << 20, timeout=60)
    assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 1600001))
    assert result.stderr == b"".join(b"%d\n" % n for n in range(1, 100001))
    assert not result.truncated


async def test_a_consumer_that_waits_stops_the_command_and_costs_bounded_memory(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "head -c 12000000 /dev/zero; echo done >&2")
        await asyncio.sleep(0.5)
        rss = int(Path(f"/proc/{guest.process.pid}/statm").read_text().split()[1]) * 4096
        assert rss < 40 << 20
        with pytest.raises(GuestTimeout):
            await process.wait(timeout=0.2)
        result = await process.collect(max_bytes=1000, timeout=30)
        assert (len(result.stdout), result.truncated, result.code) == (1000, True, 0)


async def test_other_commands_go_on_beside_a_stopped_one(guest: Agent) -> None:
    async with guest.channel() as channel:
        await sh(channel, "cat /dev/zero", "stopped")
        for n in range(3):
            assert (await (await sh(channel, "echo ok", f"n{n}")).collect(timeout=10)).stdout == b"ok\n"
        ticks = guest.cpu_ticks()
        await asyncio.sleep(0.6)
        assert guest.cpu_ticks() - ticks <= 2


async def test_ended_by_a_signal(guest: Agent) -> None:
    async with guest.channel() as channel:
        result = await (await sh(channel, "kill -TERM $$")).collect()
        assert (result.code, result.signal, result.timed_out) == (143, 15, False)
        process = await sh(
            channel, "trap 'echo got; exit 5' INT; echo ready; while :; do sleep 0.05; done", "y"
        )
        async for piece in process.output():
            if b"ready" in piece.data:
                await process.kill(2)
            if b"got" in piece.data:
                break
        assert (await process.wait(timeout=5)).code == 5


async def test_kill_ends_everything_a_command_started(guest: Agent) -> None:
    script = """
    sleep 301 & echo $!
    setsid sleep 302 & echo $!
    (setsid sh -c 'setsid sleep 303 & echo $!' &)
    setsid env -i sleep 304 & echo $!
    sleep 0.3; echo ready; wait
    """
    async with guest.channel() as channel:
        process = await sh(channel, script)
        text = b""
        async for piece in process.output():
            text += piece.data
            if b"ready" in text:
                break
        pids = [int(word) for word in text.split() if word.isdigit()]
        assert len(pids) == 4
        await process.kill()
        result = await process.collect(timeout=5)
        assert (result.code, result.signal) == (137, 9)
        for pid in pids:
            await gone(pid)


async def test_the_agent_enforces_the_time_out(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "echo before; setsid sleep 300 & sleep 300", timeout=0.3)
        result = await process.collect(timeout=10)
        assert (result.code, result.signal, result.timed_out, result.stdout) == (124, 9, True, b"before\n")
        late = await sh(channel, "echo before; sleep 300", "late")
        result = await late.collect(timeout=0.3)
        assert (result.code, result.timed_out, result.stdout) == (124, True, b"before\n")


async def test_a_left_over_background_process_does_not_hold_the_output_open(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "(while sleep 0.1; do echo noise; done) & echo $!; exit 3")
        result = await process.collect(timeout=10)
        assert result.code == 3
        pid = int(result.stdout.split()[0])
        assert b" Z " not in Path(f"/proc/{pid}/stat").read_bytes()
        os.kill(pid, 9)


async def test_all_output_of_an_ended_command_is_kept_for_a_slow_reader(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "seq 1 50000")
        await process.wait(timeout=10)
        await asyncio.sleep(2.5)  # longer than the linger
        assert (await process.collect(timeout=10)).stdout.endswith(b"\n50000\n")


async def test_forgotten_commands_are_unknown_and_their_number_is_bounded(guest: Agent) -> None:
    async with guest.channel() as channel:
        await (await sh(channel, "true", "a")).collect()
        with pytest.raises(GuestRefused, match="unknown_exec"):
            await channel.attach("a")
        for n in range(70):
            await (await sh(channel, ":", f"n{n}")).wait(timeout=10)
        execs = (await channel.hello(TOKEN)).execs
        assert len(execs) <= 64
        assert execs[-1] == "n69"


# ------------------------------------------------------------------ reconnect


async def test_output_goes_on_without_a_gap_after_a_reconnect(guest: Agent) -> None:
    got = {"stdout": b"", "stderr": b""}
    async with guest.channel() as channel:
        process = await sh(channel, "for i in $(seq 1 300000); do echo $i; done; echo end >&2", "job")
        async for piece in process.output():
            got[piece.stream] += piece.data
            if len(got["stdout"]) > 600_000:
                break
    for _ in range(3):
        async with guest.channel(revive=False) as channel:
            assert (await channel.hello(TOKEN)).execs == ("job",)
            process = await channel.attach(
                "job", stdout_from=len(got["stdout"]), stderr_from=len(got["stderr"])
            )
            start = len(got["stdout"])
            async for piece in process.output():
                assert piece.offset == len(got[piece.stream])
                got[piece.stream] += piece.data
                if len(got["stdout"]) - start > 300_000:
                    break
    async with guest.channel(revive=False) as channel:
        await channel.hello(TOKEN)
        process = await channel.attach("job", stdout_from=len(got["stdout"]), stderr_from=len(got["stderr"]))
        async for piece in process.output():
            got[piece.stream] += piece.data
        assert (await process.wait(timeout=5)).code == 0
    assert got["stdout"] == b"".join(b"%d\n" % n for n in range(1, 300001))
    assert got["stderr"] == b"end\n"


async def test_a_command_ends_while_no_host_is_there(guest: Agent) -> None:
    async with guest.channel() as channel:
        await sh(channel, "sleep 0.2; echo late; exit 9", "job")
    await asyncio.sleep(0.5)
    async with guest.channel(revive=False) as channel:
        await channel.hello(TOKEN)
        result = await (await channel.attach("job")).collect(timeout=5)
        assert (result.code, result.stdout) == (9, b"late\n")


async def test_attach_refuses_offsets_it_cannot_serve(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "seq 1 100000", "job")
        async for piece in process.output():
            if piece.offset > 200_000:
                break
        with pytest.raises(GuestRefused, match="bad_offset"):
            await channel.attach("job")  # acknowledged long ago
        with pytest.raises(GuestRefused, match="bad_offset"):
            await channel.attach("job", stdout_from=10**9)
        again = await channel.attach("job", stdout_from=None)
        assert (await again.collect(timeout=10)).stdout.endswith(b"\n100000\n")


async def test_input_goes_on_after_a_reconnect(guest: Agent) -> None:
    async with guest.channel() as channel:
        process = await sh(channel, "cat", "cat", stdin=True)
        await process.write(b"one\n")
        async for _ in process.output():
            break
    async with guest.channel(revive=False) as channel:
        await channel.hello(TOKEN)
        process = await channel.attach("cat", stdout_from=4)
        await process.write(b"two\n")
        await process.close_stdin()
        assert (await process.collect(timeout=5)).stdout == b"two\n"


async def test_a_new_connection_replaces_the_old(guest: Agent) -> None:
    async with guest.channel() as old, guest.channel(revive=False) as new:
        assert (await new.hello(TOKEN)).revived
        await asyncio.wait_for(old.wait_closed(), 5)
        with pytest.raises(ChannelClosed):
            await sh(old, "true")


async def test_an_idle_agent_burns_nothing(guest: Agent) -> None:
    async with guest.channel() as channel:
        await (await sh(channel, "echo hello")).collect()
        ticks = guest.cpu_ticks()
        await asyncio.sleep(0.5)
    await asyncio.sleep(0.5)
    assert guest.cpu_ticks() - ticks <= 1
    wake_ups = Path(f"/proc/{guest.process.pid}/status").read_text()
    await asyncio.sleep(0.3)
    assert wake_ups == Path(f"/proc/{guest.process.pid}/status").read_text()  # not one context switch


# ------------------------------------------------------------------ files


async def test_put_is_atomic_owned_and_makes_directories(guest: Agent, tmp_path: Path) -> None:
    target = tmp_path / "new/dir/file"
    async with guest.channel() as channel:

        async def pieces() -> AsyncIterator[bytes]:
            for n in range(40):
                yield bytes([n]) * 50_000
                assert not target.exists()

        await channel.put(str(target), pieces(), mode=0o640, user="nobody")
        status = target.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, target.parent.stat().st_uid) == (
            0o640,
            65534,
            65534,
        )
        assert target.parent.parent.stat().st_uid == 65534
        data = await channel.get(str(target))
        assert data == b"".join(bytes([n]) * 50_000 for n in range(40))
        await channel.put(str(target), b"", user="root")
        assert await channel.get(str(target)) == b""
        assert [entry.name for entry in target.parent.iterdir()] == ["file"]


async def test_put_refuses_what_is_no_file(guest: Agent, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with guest.channel() as channel:
        for path, reason in (
            (str(tmp_path), "not_regular"), (str(fifo), "not_regular"), ("/dev/null", "not_regular"),
            ("relative", "bad_path"), (str(tmp_path) + "/", "bad_path"), ("/etc/passwd/x", "ENOTDIR|EEXIST"),
        ):  # fmt: skip
            with pytest.raises(GuestRefused, match=reason):
                await channel.put(path, b"x" * 100_000, user="root")
        with pytest.raises(GuestRefused, match="no_such_user"):
            await channel.put(str(tmp_path / "f"), b"x", user="nobody-here")
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fifo", "g"]


async def test_a_put_that_breaks_off_leaves_the_old_file(guest: Agent, tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("old")

    async def stuck() -> AsyncIterator[bytes]:
        yield b"new" * 1000
        await asyncio.sleep(60)

    async def broken() -> AsyncIterator[bytes]:
        yield b"new"
        raise RuntimeError("the source broke")

    async with guest.channel() as channel:
        with pytest.raises(GuestTimeout):
            await channel.put(str(target), stuck(), user="root", timeout=0.3)
        with pytest.raises(RuntimeError):
            await channel.put(str(target), broken(), user="root")
        assert (await (await sh(channel, "echo still")).collect()).stdout == b"still\n"
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "g"]
        task = asyncio.create_task(channel.put(str(target), stuck(), user="root"))
        await asyncio.sleep(0.2)
        assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ChannelClosed):
        await task
    await asyncio.sleep(0.2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "g"]
    assert target.read_text() == "old"


async def test_a_file_that_says_it_is_empty_is_read_to_its_end(guest: Agent) -> None:
    async with guest.channel() as channel:
        assert b"proc" in await channel.get("/proc/self/mounts")


async def test_get_refuses(guest: Agent, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "big").write_bytes(bytes(1001))
    async with guest.channel() as channel:
        for path, reason in (
            (str(tmp_path), "not_regular|EISDIR"), (str(fifo), "not_regular"), ("/dev/zero", "not_regular"),
            (str(tmp_path / "big"), "too_large"), ("/proc/kmsg", "not_regular|EPERM|EBUSY|too_large"),
            ("/no/such", "ENOENT"),
        ):  # fmt: skip
            with pytest.raises(GuestRefused, match=reason):
                await channel.get(path, max_bytes=1000, timeout=5)
        with pytest.raises(GuestRefused, match="too_large"):
            await channel.get("/proc/kallsyms", max_bytes=1000)
        assert len(await channel.get(str(tmp_path / "big"), max_bytes=1001)) == 1001


async def test_secret_files_are_in_place_before_the_command_and_nowhere_else(
    guest: Agent, open_path: Path
) -> None:
    tmp_path = open_path
    secret = b"s3cr3t-" + os.urandom(8).hex().encode()
    inline = GuestFile(str(tmp_path / "runner/.credentials"), secret)
    large = GuestFile(str(tmp_path / "runner/.large"), secret + bytes(200_000), 0o640)
    async with guest.channel() as channel:
        for name, files in (("a", (inline,)), ("b", (inline, large))):
            process = await channel.start(name, ["cat", files[-1].path], user="nobody", cwd="/", files=files)
            result = await process.collect(timeout=10)
            assert result.stdout == files[-1].data
            status = Path(files[-1].path).stat()
            assert (stat.S_IMODE(status.st_mode), status.st_uid) == (files[-1].mode, 65534)
    assert secret.decode() not in json.dumps(guest.calls())
    cmdline = Path(f"/proc/{guest.process.pid}/cmdline").read_bytes()
    assert secret not in cmdline
