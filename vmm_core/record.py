"""What is written down of a VM, and who owns it: ``vm.json`` and ``lock`` in its directory.

A VM belongs to the process that holds the lock. When that process dies the lock is free and any engine of
the data directory may adopt the VM.
"""

import contextlib
import fcntl
import functools
import os
import uuid
from pathlib import Path

import msgspec

from vmm_core.machine import Identity, VmRecord

RECORD, LOCK = "vm.json", "lock"


def read_record(directory: Path) -> VmRecord:
    """Raises FileNotFoundError when the VM was never finished, msgspec.DecodeError for another release's."""
    return msgspec.json.decode((directory / RECORD).read_bytes(), type=VmRecord)


def write_record(directory: Path, record: VmRecord) -> None:
    draft = directory / f".{RECORD}"
    draft.write_bytes(msgspec.json.encode(record))
    draft.replace(directory / RECORD)


def read_records(vms: Path) -> list[VmRecord]:
    """Every readable record below ``vms``, oldest first."""
    found: list[VmRecord] = []
    for directory in vms.iterdir():
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found.append(read_record(directory))
    return sorted(found, key=lambda record: record.created_at)


def try_lock(directory: Path) -> int | None:
    """The lock that makes this process the owner of a VM; None when another holds it or the VM is gone."""
    try:
        fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@functools.cache
def host_boot() -> str:
    """This boot of the host: a pid and a start time name a process only within it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_identity(hostname: str | None = None) -> Identity:
    vm_id = f"vm-{uuid.uuid4().hex[:12]}"
    return Identity(
        id=vm_id, hostname=hostname or vm_id, machine_id=uuid.uuid4().hex, boot_id=str(uuid.uuid4())
    )
