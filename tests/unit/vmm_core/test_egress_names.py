"""Names are looked up on the host: bounded, remembered, kept when the resolver fails."""

import asyncio
import time

import pytest

from vmm_core.network import names as module
from vmm_core.network.names import Names

pytestmark = pytest.mark.anyio


class Resolver:
    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): found for name, found in answers.items()}
        self.asked: list[str] = []
        self.hang = False

    async def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        if self.hang:
            await asyncio.sleep(60)
        if name not in self.answers:
            raise OSError("no such name")
        return self.answers[name]


async def test_an_answer_is_remembered_and_a_name_without_one_is_left_out() -> None:
    resolver = Resolver(a_test=["198.51.100.1", "198.51.100.2"])
    names = Names(resolver)
    assert await names.targets(["a.test", "b.test"]) == {"a.test": "198.51.100.1"}
    assert await names.targets(["a.test"]) == {"a.test": "198.51.100.1"}
    assert sorted(resolver.asked) == ["a.test", "b.test"]
    names.close()


async def test_it_keeps_an_address_while_the_name_has_it_and_moves_when_not() -> None:
    resolver = Resolver(a_test=["198.51.100.1", "198.51.100.2"])
    names = Names(resolver)
    await names.targets(["a.test"])
    resolver.answers["a.test"] = ["198.51.100.2", "198.51.100.1"]
    assert await names.refresh(["a.test"]) == {"a.test": "198.51.100.1"}
    resolver.answers["a.test"] = ["198.51.100.2", "198.51.100.3"]
    assert await names.refresh(["a.test"]) == {"a.test": "198.51.100.2"}
    names.close()


async def test_a_resolver_that_fails_does_not_cut_what_works() -> None:
    resolver = Resolver(a_test=["198.51.100.1"])
    names = Names(resolver)
    await names.targets(["a.test"])
    resolver.answers.clear()
    assert await names.refresh(["a.test"]) == {"a.test": "198.51.100.1"}
    names.close()


async def test_a_resolver_that_hangs_delays_only_the_first_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOKUP_SECONDS", 0.2)
    resolver = Resolver()
    resolver.hang = True
    names = Names(resolver)
    started = time.monotonic()
    assert await names.targets(["a.test"]) == {}
    assert 0.15 < time.monotonic() - started < 1.0
    await asyncio.sleep(0.05)
    started = time.monotonic()
    assert await names.targets(["a.test"]) == {}
    assert time.monotonic() - started < 0.1
    names.close()


async def test_an_old_answer_is_used_while_a_new_one_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = Resolver(a_test=["198.51.100.1"])
    names = Names(resolver)
    await names.targets(["a.test"])
    monkeypatch.setattr(module, "FRESH_SECONDS", -1.0)
    resolver.hang = True
    started = time.monotonic()
    assert await names.targets(["a.test"]) == {"a.test": "198.51.100.1"}
    assert time.monotonic() - started < 0.1
    assert resolver.asked == ["a.test"]
    await asyncio.sleep(0)
    assert resolver.asked == ["a.test", "a.test"]
    names.close()


async def test_the_host_itself_is_asked_off_the_loop() -> None:
    names = Names()
    assert await names.targets(["localhost"]) == {"localhost": "127.0.0.1"}
    names.close()
