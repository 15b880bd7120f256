"""What can go wrong with a microVM, one class per failure a caller can act on.

    VmmError
    ├── HostUnfit            this machine lacks something: QEMU, rights, memory, a file system
    │   ├── VmmMissing         no usable QEMU
    │   ├── HostOutOfMemory    not enough memory for one more VM
    │   ├── PoolFull           the disk pool has no room
    │   ├── SlotsUnavailable   this host can not make network slots
    │   └── SlotsExhausted     every network slot of this host is taken
    ├── BadRequest           the caller asked for something that cannot be
    │   ├── UnknownTemplate    no template of that name or digest
    │   ├── UnknownVm          no VM of that id
    │   ├── SnapshotInUse      VMs or other snapshots stand on it
    │   └── WrongOwner         a snapshot of one owner was asked for by, or for, another
    ├── SnapshotInvalid      a snapshot's files do not fit its manifest or this host
    ├── VmFailed             this one VM is of no use any more
    │   ├── BootFailed         never said hello
    │   ├── VmDied             its VMM ended, or the guest panicked or powered off
    │   └── VmmProtocolError   QEMU answered an error or not at all
    └── GuestError           the guest side of the channel
        ├── ChannelClosed      the byte stream ended
        ├── GuestProtocolError the guest sent what the protocol does not allow
        ├── GuestTimeout       no answer within the deadline
        └── GuestRefused       the agent answered with an error (no such file, no such user, …)

Every class has a stable ``code``: the log key, the metric label and the problem type.
Messages say what was tried, what happened and what to do next.
"""

from typing import ClassVar


class VmmError(Exception):
    """Root of the engine's errors."""

    code: ClassVar[str] = "vmm_error"


class HostUnfit(VmmError):
    code: ClassVar[str] = "host_unfit"


class VmmMissing(HostUnfit):
    code: ClassVar[str] = "vmm_missing"


class HostOutOfMemory(HostUnfit):
    code: ClassVar[str] = "host_out_of_memory"


class PoolFull(HostUnfit):
    code: ClassVar[str] = "pool_full"


class SlotsUnavailable(HostUnfit):
    code: ClassVar[str] = "slots_unavailable"


class SlotsExhausted(HostUnfit):
    code: ClassVar[str] = "slots_exhausted"


class BadRequest(VmmError):
    code: ClassVar[str] = "bad_request"


class UnknownTemplate(BadRequest):
    code: ClassVar[str] = "unknown_template"


class UnknownVm(BadRequest):
    code: ClassVar[str] = "unknown_vm"


class SnapshotInUse(BadRequest):
    code: ClassVar[str] = "snapshot_in_use"


class WrongOwner(BadRequest):
    code: ClassVar[str] = "wrong_owner"


class SnapshotInvalid(VmmError):
    code: ClassVar[str] = "snapshot_invalid"


class VmFailed(VmmError):
    code: ClassVar[str] = "vm_failed"


class BootFailed(VmFailed):
    code: ClassVar[str] = "boot_failed"


class VmDied(VmFailed):
    code: ClassVar[str] = "vm_died"


class VmmProtocolError(VmFailed):
    code: ClassVar[str] = "vmm_protocol_error"


class GuestError(VmmError):
    code: ClassVar[str] = "guest_error"


class ChannelClosed(GuestError):
    code: ClassVar[str] = "channel_closed"


class GuestProtocolError(GuestError):
    code: ClassVar[str] = "guest_protocol_error"


class GuestTimeout(GuestError):
    code: ClassVar[str] = "guest_timeout"


class GuestRefused(GuestError):
    code: ClassVar[str] = "guest_refused"
