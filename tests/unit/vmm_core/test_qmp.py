"""The monitor's client against VMMs that answer, that flood, that talk nonsense and that read nothing."""

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from vmm_core.drivers import qmp as module
from vmm_core.drivers.qmp import Qmp
from vmm_core.errors import VmmProtocolError

pytestmark = pytest.mark.anyio


class FakeVmm:
    """A monitor's server whose every byte the test decides."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.received: list[dict[str, Any]] = []
        self.writer: asyncio.StreamWriter | None = None
        self.connected = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.connected.set()
        with contextlib.suppress(ConnectionError):
            await self._answer(reader)

    async def _answer(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            self.received.append(message)
            if message["execute"] == "echo":
                self.say({"return": message.get("arguments"), "id": message["id"]})
            if message["execute"] == "refuse":
                self.say({"error": {"class": "GenericError", "desc": "no\x07pe"}, "id": message["id"]})

    def say(self, message: object) -> None:
        self.raw(json.dumps(message).encode() + b"\n")

    def raw(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)


@pytest.fixture
async def vmm(tmp_path: Path) -> AsyncIterator[FakeVmm]:
    fake = FakeVmm(tmp_path / "qmp.sock")
    server = await asyncio.start_unix_server(fake.serve, fake.path)
    yield fake
    if fake.writer is not None:
        fake.writer.close()
    server.close()


async def _until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


async def test_a_command_gets_its_answer_and_a_refusal_is_an_error(vmm: FakeVmm) -> None:
    qmp = await Qmp.connect(vmm.path)
    assert await qmp.execute("echo", some_name=1) == {"some-name": 1}
    with pytest.raises(VmmProtocolError, match=r"no.*pe"):
        await qmp.execute("refuse")
    assert vmm.received[0]["execute"] == "qmp_capabilities"
    await qmp.close()


async def test_events_are_kept_heard_and_cut_to_one_line(vmm: FakeVmm) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    qmp = await Qmp.connect(vmm.path, on_event=lambda name, data: heard.append((name, data)))
    await vmm.connected.wait()
    vmm.say({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}})
    vmm.say({"event": "E" * 9999, "data": {"k": "a\nb\x1b[2J" + "x" * 9999, "nested": {"a": [1]}}})
    vmm.say({"event": ["not", "a name"], "data": 7})
    await _until(lambda: len(qmp.events) == 3)
    first, second, third = qmp.events
    assert (first.name, first.detail) == ("SHUTDOWN", "guest=true reason=guest-reset")
    assert len(second.name) == module.NAME_LIMIT
    assert "\n" not in second.detail
    assert "\x1b" not in second.detail
    assert len(second.detail) <= module.DETAIL_LIMIT
    assert third.detail == ""
    assert heard[0] == ("SHUTDOWN", {"guest": True, "reason": "guest-reset"})
    assert len(heard) == 2
    await qmp.close()


async def test_only_the_last_events_are_kept_and_repetitions_once(vmm: FakeVmm) -> None:
    qmp = await Qmp.connect(vmm.path)
    await vmm.connected.wait()
    for _ in range(100):
        vmm.say({"event": "RTC_CHANGE", "data": {"offset": 1}})
    await _until(lambda: qmp.events)
    assert len(qmp.events) == 1
    for number in range(100):
        vmm.say({"event": f"E{number}"})
    await _until(lambda: qmp.events[-1].name == "E99")
    assert [event.name for event in qmp.events] == [
        f"E{number}" for number in range(100 - module.EVENTS_KEPT, 100)
    ]
    await qmp.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"no json\n",
        b"[1,2]\n",
        b"\xff\xfe\n",
        b'"text"\n',
        b"[" * 100_000 + b"\n",
        b'{"event":"x","data":' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}\n",
        b"x" * (module.MESSAGE_LIMIT + 2),
        b"\0" * 100 + b"\n",
    ],
)
async def test_nonsense_closes_the_monitor_and_fails_what_waits(vmm: FakeVmm, garbage: bytes) -> None:
    qmp = await Qmp.connect(vmm.path)
    await vmm.connected.wait()
    waiting = qmp.send("silence")
    vmm.raw(garbage)
    with pytest.raises(VmmProtocolError, match="closed"):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(VmmProtocolError, match="closed"):
        await qmp.execute("echo")
    await qmp.last_words(5)
    await qmp.close()


async def test_answers_to_nobody_are_passed_over(vmm: FakeVmm) -> None:
    qmp = await Qmp.connect(vmm.path)
    await vmm.connected.wait()
    waiting = qmp.send("silence")
    vmm.say({"id": 2, "neither": "return nor error"})
    with pytest.raises(VmmProtocolError, match="refused"):
        await asyncio.wait_for(waiting, 5)
    for strange in (None, 77, -1, 1.0, True, "1", [1], {"a": 1}, 10**300):
        vmm.say({"return": "forged", "id": strange})
    assert await qmp.execute("echo", a=1) == {"a": 1}
    await qmp.close()


async def test_a_flood_is_read_at_its_pace_and_waits_in_the_vmms_own_socket(
    vmm: FakeVmm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BURST_BYTES", 64 << 10)
    heard = 0

    def count(_name: str, _data: dict[str, Any]) -> None:
        nonlocal heard
        heard += 1

    qmp = await Qmp.connect(vmm.path, on_event=count)
    await vmm.connected.wait()
    assert vmm.writer is not None
    began, busy = time.monotonic(), time.process_time()
    sent = 0
    while time.monotonic() - began < 1.0:
        vmm.raw(b'{"event":"X"}\n' * 1000)
        sent += 1000
        try:
            async with asyncio.timeout(0.05):
                await vmm.writer.drain()
        except TimeoutError:
            continue
    busy = time.process_time() - busy
    allowed = (module.BURST_BYTES + module.BYTES_PER_SECOND * 1.5) / module.MESSAGE_COST
    assert 100 < heard <= allowed < sent
    assert busy < 0.5
    assert vmm.writer.transport.get_write_buffer_size() > 0
    await qmp.close()


async def test_after_a_burst_commands_work_again(vmm: FakeVmm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST_BYTES", 16 << 10)
    qmp = await Qmp.connect(vmm.path)
    await vmm.connected.wait()
    vmm.raw(b'{"event":"X"}\n' * 500)
    assert await qmp.execute("echo", timeout=5, a=2) == {"a": 2}
    await qmp.close()


async def test_the_last_words_of_a_flood_are_read(vmm: FakeVmm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BURST_BYTES", 4 << 10)
    qmp = await Qmp.connect(vmm.path)
    await vmm.connected.wait()
    assert vmm.writer is not None
    vmm.raw(b'{"event":"NOISE"}\n' * 3000)
    vmm.say({"event": "SHUTDOWN", "data": {"reason": "guest-reset"}})
    await vmm.writer.drain()
    vmm.writer.close()
    await qmp.last_words(5)
    assert qmp.events[-1].detail == "reason=guest-reset"


async def test_a_vmm_that_reads_nothing_is_hung_up_on(tmp_path: Path) -> None:
    async def deaf(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(10)  # its buffer fills up at twice ``limit``, and then the socket's

    server = await asyncio.start_unix_server(deaf, tmp_path / "qmp.sock", limit=1024)
    qmp = await Qmp.connect(tmp_path / "qmp.sock")
    sent = [qmp.send("echo", text="x" * 60_000) for _ in range(40)]
    with pytest.raises(VmmProtocolError, match="does not read"):
        await sent[-1]
    await qmp.close()
    server.close()


async def test_a_silent_vmm_costs_a_deadline_and_an_absent_one_too(vmm: FakeVmm, tmp_path: Path) -> None:
    qmp = await Qmp.connect(vmm.path)
    with pytest.raises(VmmProtocolError, match="did not answer"):
        await qmp.execute("silence", timeout=0.05)
    await qmp.close()
    with pytest.raises(VmmProtocolError, match="no connection"):
        await Qmp.connect(tmp_path / "none.sock", timeout=0.05)


async def test_a_descriptor_is_handed_over(vmm: FakeVmm) -> None:
    qmp = await Qmp.connect(vmm.path)
    await vmm.connected.wait()
    with Path(os.devnull).open("rb") as null:
        handing = asyncio.create_task(qmp.lend("state", null.fileno()))
        await _until(lambda: any(message["execute"] == "getfd" for message in vmm.received))
        vmm.say({"return": {}, "id": 0})
        await handing
    await qmp.close()
