"""A cache entry is complete or absent, built once, and a dead builder's leavings are removed."""

import asyncio
import fcntl
import os
from pathlib import Path

import pytest

from images.cache import Cache

pytestmark = pytest.mark.anyio


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path, keep=3)


def builder(text: str, log: list[str] | None = None, delay: float = 0.0):
    async def build(directory: Path) -> None:
        if log is not None:
            log.append(text)
        (directory / "half").write_text(text)
        await asyncio.sleep(delay)
        (directory / "file").write_text(text)

    return build


async def test_built_once_then_found(cache):
    log: list[str] = []
    first = await cache.get("kind", "key", builder("one", log))
    second = await cache.get("kind", "key", builder("two", log))
    assert first == second
    assert (first / "file").read_text() == "one"
    assert log == ["one"]


async def test_two_at_once_build_once_and_the_second_hears_that_it_waits(cache):
    log: list[str] = []
    waits: list[str] = []
    await asyncio.gather(
        *(
            cache.get("k", "x", builder("b", log, 0.3), waiting=lambda: waits.append("waiting"))
            for _ in range(3)
        )
    )
    assert log == ["b"]
    assert waits == ["waiting", "waiting"]


async def test_a_failed_or_cancelled_build_leaves_nothing(cache, tmp_path):
    async def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await cache.get("kind", "key", fail)
    task = asyncio.create_task(cache.get("kind", "other", builder("x", None, 60)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list((tmp_path / "kind").iterdir()) == []
    assert cache.find("kind", "key") is None


async def test_what_a_killed_builder_left_is_removed_and_never_found(cache, tmp_path):
    await cache.get("kind", "good", builder("x"))
    dead = tmp_path / "kind" / ".building-dead"
    dead.mkdir()
    (dead / "half").write_text("x")
    assert cache.find("kind", "dead") is None
    assert cache.sweep() == [dead]
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == ["good"]


async def test_a_living_builder_is_left_alone(cache, tmp_path):
    living = tmp_path / "kind" / ".building-key"
    living.mkdir(parents=True)
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks" / "kind-key").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cache.sweep() == []
        assert living.exists()
    assert cache.sweep() == [living]


async def test_the_least_recently_used_goes(cache, tmp_path):
    for number in range(3):
        await cache.get("kind", f"k{number}", builder("x"))
        os.utime(tmp_path / "kind" / f"k{number}", (number, number))
    cache.find("kind", "k0")
    await cache.get("kind", "k3", builder("x"))
    assert sorted(path.name for path in (tmp_path / "kind").iterdir()) == ["k0", "k2", "k3"]
