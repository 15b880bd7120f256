"""What is learned of a template's memory: kept, bounded, shared by processes, and never more than nominal."""

import multiprocessing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_core import working_set
from vmm_core.working_set import WorkingSets, percentile

MIB = 1 << 20


def test_until_enough_is_known_the_nominal_size_is_promised(tmp_path: Path) -> None:
    sets = WorkingSets(tmp_path)
    assert sets.need_mib("python-ci", 512) == 512
    for _ in range(working_set.READINGS_NEEDED - 1):
        sets.learn("python-ci", 40 * MIB)
    assert sets.need_mib("python-ci", 512) == 512
    sets.learn("python-ci", 40 * MIB)
    assert sets.need_mib("python-ci", 512) == int(40 * 1.25) + 32
    assert sets.need_mib("another", 512) == 512


def test_the_promise_follows_the_large_ones_and_stays_below_nominal(tmp_path: Path) -> None:
    sets = WorkingSets(tmp_path)
    for size in [20] * 90 + [300] * 10:
        sets.learn("mixed", size * MIB)
    assert sets.need_mib("mixed", 512) == int(300 * 1.25) + 32
    assert sets.need_mib("mixed", 256) == 256


def test_old_readings_are_forgotten(tmp_path: Path) -> None:
    sets = WorkingSets(tmp_path)
    for size in [400] * 64 + [10] * working_set.READINGS_KEPT:
        sets.learn("shrunk", size * MIB)
    assert sets.need_mib("shrunk", 512) == int(10 * 1.25) + 32


def test_it_survives_a_restart_and_others_see_it(tmp_path: Path) -> None:
    reader = WorkingSets(tmp_path)
    assert reader.need_mib("t", 512) == 512
    for _ in range(5):
        WorkingSets(tmp_path).learn("t", 8 * MIB)
    assert reader.need_mib("t", 512) == 42
    assert WorkingSets(tmp_path).need_mib("t", 512) == 42


def test_a_vm_that_was_never_read_teaches_nothing(tmp_path: Path) -> None:
    WorkingSets(tmp_path).learn("t", 0)
    assert not (tmp_path / working_set.FILE).exists()


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_set, "TEMPLATES_KEPT", 3)
    sets = WorkingSets(tmp_path)
    for number in range(10):
        sets.learn(f"{number}" + "x" * 1000, MIB)
    kept = msgspec.json.decode((tmp_path / working_set.FILE).read_bytes())
    assert [name[0] for name in kept] == ["7", "8", "9"]
    assert all(len(name) <= 128 for name in kept)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xff", b"[" * 100_000, b'{"t": 1}',
        b'{"t": {"peaks_mib": "x", "updated_at": 0}}',
        b'{"t": {"peaks_mib": [], "updated_at": 0}}', b'{"t": {"peaks_mib": [-5,-5,-5,-5,-5], "updated_at": 0}}',
        b'{"t": {"peaks_mib": [99999999999999999999999], "updated_at": 0}}',
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_written_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / working_set.FILE).write_bytes(content)
    sets = WorkingSets(tmp_path)
    assert sets.need_mib("t", 512) == 512
    for _ in range(5):
        sets.learn("t", 8 * MIB)
    assert sets.need_mib("t", 512) == 42


def _learn_many(directory: Path) -> None:
    sets = WorkingSets(directory)
    for _ in range(10):
        sets.learn("shared", MIB)


def test_processes_that_learn_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_learn_many, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    kept = msgspec.json.decode((tmp_path / working_set.FILE).read_bytes())
    assert len(kept["shared"]["peaks_mib"]) == 40


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=64), st.floats(0.01, 1.0))
def test_a_percentile_covers_its_share(values: list[int], share: float) -> None:
    found = percentile(tuple(values), share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
