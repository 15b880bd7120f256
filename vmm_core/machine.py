"""The nouns of the engine: frozen values that say what a machine is, was forked from, and cost."""

from pathlib import Path
from typing import Literal

import msgspec

Accel = Literal["kvm", "tcg"]
NetworkMode = Literal["none", "list", "internet"]
StateKind = Literal["migration", "devices"]
ExitKind = Literal["destroyed", "frozen", "exited", "signaled", "expired", "vanished"]
ExitCause = Literal[
    "destroyed", "frozen", "expired",                    # because we said so
    "guest_poweroff", "guest_reboot", "guest_panic",     # by the guest; what it prints is its own word
    "disk_full", "out_of_memory",                        # the host had no more to give
    "vmm_killed", "vmm_crashed", "vmm_exited",           # by a signal from elsewhere, by a fault, with a status
    "unknown",
]  # fmt: skip


class EgressRule(msgspec.Struct, frozen=True):
    """Endpoints a guest may open. ``host`` is a name as the guest writes it, or an address or CIDR (slots only).

    ``port`` 0 means every port, for addresses only. ``via`` is where the host really connects for a name
    (``name:port``), when that differs from what the guest writes; ``None`` means the same endpoint.
    """

    host: str
    port: int
    via: str | None = None


class Network(msgspec.Struct, frozen=True):
    """``none``: no network card at all. ``list``: a card whose only way out is the list ``allow``.
    ``internet``: public addresses and the host's resolvers (and ``allow``); needs network slots.

    ``ipv6`` lets IPv6 out, by the same policy. ``mbit`` limits the bandwidth each way (Mbit/s; 0: no limit).
    """

    mode: NetworkMode = "none"
    allow: tuple[EgressRule, ...] = ()
    ipv6: bool = False
    mbit: int = 0


class MachineSpec(msgspec.Struct, frozen=True):
    """The shape of a machine. Sizes in MiB. A fork has the shape of its parent.

    ``disk_mbps`` (MB/s) and ``disk_iops`` limit its disk; 0: no limit. They hold for its forks as well.
    """

    vcpus: int = 1
    memory_mib: int = 512
    disk_mib: int = 4096
    network: Network = Network()
    disk_mbps: int = 0
    disk_iops: int = 0

    def on(self, network: Network) -> "MachineSpec":
        """The same machine on another network. With or without a card it must stay."""
        return msgspec.structs.replace(self, network=network)


class BootImage(msgspec.Struct, frozen=True):
    """What a fresh machine boots: uncompressed kernel, initramfs and a raw root disk to clone."""

    kernel: Path
    initrd: Path
    disk: Path
    cmdline: str = ""


class Manifest(msgspec.Struct, frozen=True):
    """What a snapshot is made of; ``manifest.json`` beside its files.

    ``argv_digest`` is a SHA-256 over the device part of the VMM's command line: a clone with other
    devices would be accepted silently and be broken. ``files`` maps file name to byte size.
    ``labels`` are the publisher's own words (template name, runner version, …).

    ``state``: what ``state.bin`` holds, a whole migration without the memory, or the devices alone (captured from
    a fork). ``base``: the snapshot whose blocks its files share. ``ephemeral``: it goes when
    nothing stands on it any more. ``checks``: SHA-256 of small files; ``seal``: SHA-256 of the manifest itself.
    ``owner``: the only one for whom it is forked (None: anybody).
    """

    digest: str
    created_at: float
    machine: MachineSpec
    accel: Accel
    vmm_version: str
    cpu_model: str
    argv_digest: str
    files: dict[str, int]
    labels: dict[str, str] = {}
    state: StateKind = "migration"
    base: str | None = None
    ephemeral: bool = False
    frozen: "Frozen | None" = None
    checks: dict[str, str] = {}
    seal: str = ""
    owner: str | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """A published snapshot: its directory and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest


class Identity(msgspec.Struct, frozen=True):
    """What a machine is known by, to its host (``id``) and within (the rest). A thaw gives it back."""

    id: str
    hostname: str
    machine_id: str
    boot_id: str


class VmRecord(msgspec.Struct, frozen=True):
    """What is written down about a VM so that another process can adopt it; ``vm.json`` in its directory.

    ``pid`` and ``start_ticks`` (field 22 of /proc/PID/stat) name the VMM process within one boot of the host,
    which ``host_boot`` (its boot id) names.
    Times are Unix seconds. ``metadata`` are the caller's tags. ``argv_digest``, ``cpu_model`` and ``vmm_version``
    are what a snapshot of it will be tied to (see Manifest). ``slot`` is the number of the slot it runs in.
    ``owner`` is for whom it runs: what is made of it is forked for no other (None: anybody).
    """

    id: str
    pid: int
    start_ticks: int
    machine: MachineSpec
    accel: Accel
    parent: str | None
    template: str | None
    created_at: float
    expires_at: float
    metadata: dict[str, str] = {}
    host_boot: str = ""
    hostname: str = ""
    machine_id: str = ""
    boot_id: str = ""
    argv_digest: str = ""
    cpu_model: str = ""
    vmm_version: str = ""
    slot: int | None = None
    owner: str | None = None

    @property
    def identity(self) -> Identity:
        return Identity(self.id, self.hostname, self.machine_id, self.boot_id)


class Frozen(msgspec.Struct, frozen=True):
    """A VM that was stopped into the snapshot ``digest``: its record, and until when (Unix seconds) it is kept."""

    digest: str
    record: VmRecord
    frozen_at: float
    expires_at: float

    @property
    def id(self) -> str:
        return self.record.id


class VmEvent(msgspec.Struct, frozen=True):
    """What the VMM said by itself, such as ``SHUTDOWN reason=guest-reset``. Untrusted text, capped. Unix seconds."""

    at: float
    name: str
    detail: str = ""


class VmUsage(msgspec.Struct, frozen=True):
    """What one VM costs. Bytes of the guest memory mapping, apart from the VMM's own heap.

    ``private_dirty_bytes`` are the guest's own pages, ``shared_bytes`` those it has in common with its parent.
    ``disk_private_bytes`` are the blocks only its disk holds, ``disk_read_bytes``/``disk_write_bytes`` what its
    VMM moved from and to storage, ``net_*`` what its network card moved as the guest sees it (0: user-mode network).
    ``peak_bytes`` is the most memory of its own (guest and heap) that any reading found.
    """

    private_dirty_bytes: int = 0
    shared_bytes: int = 0
    pss_bytes: int = 0
    vmm_private_bytes: int = 0
    cpu_seconds: float = 0.0
    disk_private_bytes: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    net_sent_bytes: int = 0
    net_received_bytes: int = 0
    peak_bytes: int = 0


class VmExit(msgspec.Struct, frozen=True):
    """How a VM ended. ``code``/``signal`` are the VMM's own; ``reason`` is one sentence that tells the ``cause``.

    Evidence, all of it capped and without control characters, because a hostile guest or VMM wrote it:
    ``console_tail`` (≤ 4 KiB) the last lines of the serial console, ``panic`` (≤ 4 KiB) its kernel's last words,
    ``guest_oom`` the line by which its kernel told that it ran out of memory, ``events`` (≤ 32) what the VMM said.
    ``usage`` is what the VM cost in all, as far as it could still be read.
    """

    kind: ExitKind
    code: int | None = None
    signal: int | None = None
    reason: str = ""
    console_tail: str = ""
    cause: ExitCause = "unknown"
    panic: str = ""
    guest_oom: str = ""
    events: tuple[VmEvent, ...] = ()
    usage: VmUsage | None = None


class ExecResult(msgspec.Struct, frozen=True):
    """A finished command. ``code`` is the exit status (128+N when ended by signal N, 124 on time-out).

    ``truncated`` says that more output came than the caller's bound kept.
    """

    code: int
    stdout: bytes = b""
    stderr: bytes = b""
    signal: int | None = None
    timed_out: bool = False
    truncated: bool = False


class Output(msgspec.Struct, frozen=True):
    """A piece of a command's output. ``offset`` counts bytes of that stream since its start."""

    stream: Literal["stdout", "stderr"]
    offset: int
    data: bytes


class GuestFile(msgspec.Struct, frozen=True):
    """A small file (≤ 256 KiB) the agent writes before it starts a command, owned by the command's user."""

    path: str
    data: bytes
    mode: int = 0o600


class ForkTimings(msgspec.Struct, frozen=True):
    """Milliseconds of each part of a fork, in order, from the first thing made on the host.

    ``disk_ms`` clones the disk; ``spawn_ms`` ends when the VMM has been told to load the state (on the first fork
    of a parent in a process it also covers the load of the parent's memory, unless that was prewarmed);
    ``revive_ms`` covers the load and the guest's first answer; ``record_ms`` writes down what lives. Before all that
    the machine that a live fork was made of stood still for ``pause_ms``.
    """

    disk_ms: float = 0.0
    spawn_ms: float = 0.0
    revive_ms: float = 0.0
    record_ms: float = 0.0
    pause_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.disk_ms + self.spawn_ms + self.revive_ms + self.record_ms


class EngineInfo(msgspec.Struct, frozen=True):
    """What this host offers. ``accel`` is None until a kernel was there to probe with; ``notes`` are sentences
    about what works less well than it could, and why."""

    vmm: str
    accel: Accel | None
    pool: str
    notes: tuple[str, ...] = ()
