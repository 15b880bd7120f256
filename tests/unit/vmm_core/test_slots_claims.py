"""Claims: one process has a slot, its death frees the lock but not the slot, and asking disturbs nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm_core.errors import SlotsExhausted
from vmm_core.network import claims as module
from vmm_core.network.claims import Claims

_HOLDER = """
import sys
from pathlib import Path
from vmm_core.network.claims import Claims
claims = Claims(Path(sys.argv[1]))
number = claims.new(1)[0]
claims.assign(number, "/data/vms/vm-1")
print(number, flush=True)
sys.stdin.read()
"""


def test_two_processes_never_have_the_same_number(tmp_path: Path) -> None:
    one, other = Claims(tmp_path), Claims(tmp_path)
    assert one.new(3) == [0, 1, 2]
    assert other.new(3) == [3, 4, 5]
    one.release(1)
    assert other.new(2) == [1, 6]
    assert one.numbers() == [0, 1, 2, 3, 4, 5, 6]


def test_the_owner_is_written_down_and_replaced_whole(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    (number,) = claims.new(1)
    assert claims.owner(number) == ""
    claims.assign(number, "/data/vms/a-long-name")
    claims.assign(number, "/short")
    assert Claims(tmp_path).owner(number) == "/short"
    claims.release(number)
    assert claims.owner(number) is None


def test_asking_whether_a_claim_is_held_does_not_take_it(tmp_path: Path) -> None:
    holder, asker = Claims(tmp_path), Claims(tmp_path)
    (number,) = holder.new(1)
    assert asker.locked(number)
    assert holder.locked(number)
    assert not asker.take_over(number)
    holder.leave()
    assert not asker.locked(number)
    assert not asker.locked(number)
    assert asker.take_over(number)
    assert not holder.take_over(number)


def test_a_dead_process_loses_the_lock_and_keeps_the_file(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])},
    ) as holder:
        assert holder.stdout is not None
        number = int(holder.stdout.readline())
        claims = Claims(tmp_path)
        assert claims.locked(number)
        assert not claims.take_over(number)
        holder.kill()
    assert not claims.locked(number)
    assert claims.owner(number) == "/data/vms/vm-1"
    assert claims.new(1) == [number + 1]
    assert claims.take_over(number)


def test_a_claim_removed_between_open_and_lock_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = Claims(tmp_path)
    lock = module.fcntl.fcntl

    def reaped_meanwhile(fd: int, command: int, argument: bytes) -> bytes:
        (tmp_path / "slots" / "0").unlink()
        return lock(fd, command, argument)  # type: ignore[return-value]

    monkeypatch.setattr(module.fcntl, "fcntl", reaped_meanwhile)
    assert not claims.take_over(0)
    monkeypatch.undo()
    assert 0 not in claims
    assert claims.new(1) == [0]


def test_when_all_are_taken_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS", 2)
    claims = Claims(tmp_path)
    assert claims.new(5) == [0, 1]
    with pytest.raises(SlotsExhausted, match="all 2 network slots"):
        claims.new(1)


def test_a_torn_owner_reads_as_nobody(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    (tmp_path / "slots" / "7").write_bytes(b'{"owner": "/da')
    assert claims.owner(7) == ""
