"""Programs run to their end: output, errors, deadlines; given up at any moment they leave nothing, not a word."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm_core import program
from vmm_core.errors import VmmMissing

pytestmark = pytest.mark.anyio


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


async def test_it_gets_its_input_and_says_what_it_says() -> None:
    text = b"x" * 300_000
    ended = await program.run(["sh", "-c", "cat; echo 'no good' >&2; exit 3"], stdin=text, timeout=10)
    assert (ended.status, ended.output, ended.errors.strip()) == (3, text, "no good")


async def test_a_signal_is_a_negative_status() -> None:
    assert (await program.run(["sh", "-c", "kill -9 $$"], timeout=10)).status == -9


async def test_a_missing_program_is_named() -> None:
    with pytest.raises(VmmMissing, match="no-such-program"):
        await program.run(["no-such-program"], timeout=10)


async def test_one_that_hangs_is_ended() -> None:
    before = children()
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        await program.run(["sleep", "30"], timeout=0.2)
    assert time.monotonic() - started < 5
    assert children() == before


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Ours and our children's: they take turns, so that what races with us comes early and late."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)


@pytest.mark.usefixtures("one_cpu")
async def test_given_up_at_any_moment_it_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before, files = children(), len(os.listdir("/proc/self/fd"))
    for number in range(100):
        running = asyncio.create_task(program.run(["true"], timeout=10))
        give_up = time.perf_counter() + 0.00005 * number
        while time.perf_counter() < give_up:
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files
    assert caplog.text == ""
