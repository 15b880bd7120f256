"""The package's front door: boots, snapshots, forks, adopts and destroys the VMs of one data directory.

    async with Engine.open("/var/lib/microvm") as engine:
        async with engine.fork("python-ci") as vm:
            print((await vm.exec("python3 --version")).stdout)

Several processes may have engines on the same directory: a VM belongs to the process that holds the
lock in its directory. When that process dies the VM lives on, and any engine may adopt it.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from vmm_core import accel as acceleration
from vmm_core.accounting import host_available_mib
from vmm_core.adoption import Adoption
from vmm_core.berths import Berths, open_berths
from vmm_core.disk import Pool, open_pool
from vmm_core.drivers.base import DISK, Driver, Saved
from vmm_core.drivers.qemu import QemuDriver
from vmm_core.errors import (
    BadRequest,
    HostOutOfMemory,
    SnapshotInvalid,
    UnknownVm,
)
from vmm_core.ledger import Ledger
from vmm_core.live import Live
from vmm_core.machine import (
    Accel,
    BootImage,
    EgressRule,
    EngineInfo,
    Frozen,
    Identity,
    MachineSpec,
    Manifest,
    Network,
    Snapshot,
    VmExit,
    VmRecord,
)
from vmm_core.names import check_name
from vmm_core.owner import common_owner
from vmm_core.process import VmmProcess
from vmm_core.reaper import Reaper, reap_on
from vmm_core.record import new_identity, read_records, try_lock
from vmm_core.residents import Residents
from vmm_core.snapshot import SnapshotStore
from vmm_core.start import Order, Starter
from vmm_core.vm import Parts, RunningVm

_MEMORY_RESERVE_MIB = 256
_CLOSE_SECONDS = 30.0
# What a fresh clone and its VMM need at once; what it writes later is its own affair.
_FORK_MEMORY_MIB = 96

T = TypeVar("T")


class Engine:
    """Made by ``Engine.open``. ``on_step`` hears the name of each step of a fork as it begins."""

    def __init__(
        self,
        data_dir: Path,
        pool: Pool,
        driver: Driver,
        on_step: Callable[[str], None] | None,
        slots: bool | None,
        resolvers: Sequence[str] | None,
    ) -> None:
        self.data_dir = data_dir
        self.pool = pool
        self.driver = driver
        self.snapshots = SnapshotStore(pool)
        self._on_step = on_step or _unheard
        self._want_slots = slots
        self._resolvers = resolvers
        self._vms: dict[str, RunningVm] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._residents = Residents()
        self._live = Live(self, self._residents, start=self._clone, require=self._require)
        self.ledger = Ledger(data_dir, self.vms)
        self._starter = Starter(pool, driver, self._residents, self._get_berths, self._on_step)
        self._adoption = Adoption(driver, self.ledger, self._get_berths, self._live.frozen.has)
        self._berths: Berths | None = None
        self._opening = asyncio.Lock()
        self._reaping: asyncio.Task[None] | None = None
        self._stack = contextlib.AsyncExitStack()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        data_dir: Path | str,
        *,
        driver: Driver | None = None,
        on_step: Callable[[str], None] | None = None,
        slots: bool | None = None,
        resolvers: Sequence[str] | None = None,
        reap_every: float | None = None,
    ) -> AsyncGenerator["Engine"]:
        """Open the engine of ``data_dir``, making its pool where needed.

        ``slots``: whether VMs run in jails with a network slot each. None: where the host gives the rights;
        True: HostUnfit at the first VM where it does not; False: plain processes with user-mode networking.
        ``resolvers``: IPv4 name servers that VMs open to the internet may ask (None: those of the host).
        ``reap_every``: seconds between looks for what nothing owns on this host, which is removed when seen twice
        (None: never; what one engine of a host does is enough).
        At the end the VMs made by ``launch`` run on (adopt them later); those of ``fork`` and ``boot`` are gone.
        Raises HostUnfit, VmmMissing or PoolFull, each saying what to do.
        """
        chosen = driver or QemuDriver()
        directory = Path(data_dir).absolute()
        async with open_pool(directory) as pool:
            engine = cls(directory, pool, chosen, on_step, slots, resolvers)
            engine._live.frozen.watch_time()
            if reap_every is not None:
                engine._reaping = asyncio.create_task(reap_on(engine.reaper, reap_every), name="reaper")
            try:
                yield engine
            finally:
                await engine._close()

    @property
    def staging(self) -> Path:
        """A scratch directory on the pool: what is made there can be cloned without copying."""
        return self.pool.staging

    @property
    def info(self) -> EngineInfo:
        choice = acceleration.cached(self._accel_cache)
        obstacle = acceleration.kvm_obstacle()
        notes = [self.pool.note] if self.pool.note else []
        if obstacle is not None or (choice is not None and choice.accel == "tcg"):
            notes.append(f"software emulation: {obstacle or (choice and choice.why)}")
        decided: Accel | None = (
            "tcg" if obstacle is not None else choice.accel if choice is not None else None
        )
        vmm = f"{self.driver.info.name} {self.driver.info.version}"
        return EngineInfo(vmm=vmm, accel=decided, pool=self.pool.kind, notes=tuple(notes))

    async def choose_accel(self, image: BootImage) -> Accel:
        """KVM where the kernel of ``image`` boots under it, else software emulation; cached per host and kernel."""
        return (await acceleration.choose(self.driver.info, image, self._accel_cache)).accel

    @contextlib.asynccontextmanager
    async def boot(
        self,
        image: BootImage,
        machine: MachineSpec,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[RunningVm]:
        """A fresh machine from a kernel and a disk, ready when its agent has answered; destroyed at the end."""
        vm = await self._boot(image, machine, ttl, metadata)
        try:
            yield vm
        finally:
            await vm.destroy()

    @contextlib.asynccontextmanager
    async def fork(
        self,
        parent: str | Snapshot,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
        allow: Sequence[EgressRule] | None = None,
        network: Network | None = None,
        hostname: str | None = None,
        owner: str | None = None,
    ) -> AsyncGenerator[RunningVm]:
        """A clone of ``parent``, revived; destroyed at the end. Arguments and errors as ``launch``."""
        vm = await self.launch(
            parent, ttl=ttl, metadata=metadata, allow=allow, network=network, hostname=hostname, owner=owner
        )
        try:
            yield vm
        finally:
            await vm.destroy()

    async def launch(
        self,
        parent: str | Snapshot,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
        allow: Sequence[EgressRule] | None = None,
        network: Network | None = None,
        hostname: str | None = None,
        owner: str | None = None,
    ) -> RunningVm:
        """A clone of ``parent`` (a name, digest or snapshot) that lives until destroyed or ``ttl`` seconds old.

        ``allow`` narrows or replaces the endpoints its template is open to, ``network`` all of its network (with or
        without a card it must stay). ``owner`` is for whom it runs: a parent
        that has an owner is forked for no other. When this raises, nothing is left. Raises UnknownTemplate,
        WrongOwner, SnapshotInvalid, PoolFull, HostOutOfMemory, BadRequest, VmFailed, GuestError.
        """
        self._on_step("resolve")
        snapshot = parent if isinstance(parent, Snapshot) else self.snapshots.resolve(parent)
        manifest = snapshot.manifest
        owner = common_owner(manifest.owner, owner, f"a fork of {_called(manifest)}")
        if manifest.frozen is not None:
            raise BadRequest(
                f"{manifest.digest[:12]} is the frozen VM {manifest.frozen.id}, which is no template"
            )
        network = _opened(network or manifest.machine.network, allow)
        return await self._launch(snapshot, network, ttl, metadata, hostname=hostname, owner=owner)

    async def _launch(
        self,
        snapshot: Snapshot,
        network: Network,
        ttl: float,
        metadata: Mapping[str, str] | None,
        *,
        hostname: str | None,
        owner: str | None,
    ) -> RunningVm:
        """A clone of ``snapshot`` that stands on it."""
        manifest = snapshot.manifest
        machine = manifest.machine.on(network)
        await self._require(machine, _FORK_MEMORY_MIB)
        self._require_fit(manifest)
        identity = new_identity(hostname)
        with self.snapshots.kept(manifest.digest):  # until the VM's record says that it stands on it
            return await self._clone(
                snapshot, machine, identity, ttl, metadata, parent=manifest.digest, owner=owner
            )

    async def _clone(
        self,
        snapshot: Snapshot,
        machine: MachineSpec,
        identity: Identity,
        ttl: float,
        metadata: Mapping[str, str] | None,
        *,
        parent: str | None,
        owner: str | None,
    ) -> RunningVm:
        """A clone of ``snapshot`` known as ``identity``, which stands on the snapshot ``parent``."""
        manifest = snapshot.manifest
        order = Order(
            machine=machine,
            accel=manifest.accel,
            identity=identity,
            disk=snapshot.path / DISK,
            ttl=ttl,
            metadata=metadata or {},
            parent=parent,
            template=manifest.labels.get("template") or self._name_of(manifest.digest),
            owner=owner,
        )
        return self._enroll(await self._starter.clone(snapshot, order))

    async def snapshot(
        self,
        vm: RunningVm,
        *,
        digest: str,
        labels: Mapping[str, str],
        name: str | None = None,
        network: Network | None = None,
        blanks: Sequence[str] = (),
        owner: str | None = None,
    ) -> Snapshot:
        """Quiesce a VM, publish it as the snapshot ``digest`` and, with ``name``, let that name mean it.

        A VM that is a fork itself becomes a child of what it was forked from: it stores what it changed and shares
        the rest, so its base stays as long as it. Forks have ``network``, or, when left out, that of the VM.
        ``blanks`` are files on a tmpfs of the guest that the first command of a fork will be started with (see
        ``Channel.quiesce``). ``owner``: it is forked for no other; what was forked for an owner stays that one's.
        The VM is gone afterwards, also on failure. Raises PoolFull when there is no room for its memory and disk,
        WrongOwner, GuestRefused while a command runs in it, BadRequest for what is no name.
        """
        try:
            if name is not None:
                check_name(name)
            owner = common_owner(vm.record.owner, owner or vm.record.owner, f"a snapshot of VM {vm.id}")

            def finish(saved: Manifest) -> Manifest:
                machine = saved.machine if network is None else saved.machine.on(network)
                return msgspec.structs.replace(
                    saved, machine=machine, labels=dict(sorted(labels.items())), owner=owner
                )

            await vm.channel.quiesce(blanks=blanks)
            await vm.channel.close()
            published = await self._live.save(vm, digest, finish)
            if name is not None:
                self.snapshots.set_name(name, digest)
            return published
        finally:
            await vm.destroy()

    async def prewarm(self, parent: str | Snapshot) -> None:
        """Load the memory of ``parent`` now, so that its first fork does not wait for it."""
        snapshot = parent if isinstance(parent, Snapshot) else self.snapshots.resolve(parent)
        await self._residents.memory_of(snapshot)

    async def adopt(self) -> list[RunningVm]:
        """Take over every VM whose process is gone. Expired, half-made and dead ones are removed instead.

        A guest that does not answer within half a minute is left as it is, for the next call and until its TTL.
        """
        claims: list[tuple[Path, int]] = []
        for directory in sorted(self.pool.vms.iterdir()):
            lock = try_lock(directory) if directory.name not in self._vms else None
            if lock is not None:
                claims.append((directory, lock))
        found = await asyncio.gather(*(self._take_over(*claim) for claim in claims))
        await asyncio.to_thread(self.snapshots.sweep)
        return [vm for vm in found if vm is not None]

    def records(self) -> list[VmRecord]:
        """Every VM of the data directory, whoever owns it, oldest first."""
        return read_records(self.pool.vms)

    def vms(self) -> list[RunningVm]:
        """The VMs this process owns."""
        return list(self._vms.values())

    def ending(self, vm_id: str) -> VmExit | None:
        """How a VM ended that ``adopt`` found dead; None when nothing is known of it."""
        return self.ledger.ending(vm_id)

    async def destroy(self, vm_id: str) -> None:
        """End a VM, whoever owns it (its owner sees it end). UnknownVm when there is none of that id."""
        own = self._vms.get(vm_id)
        if own is not None:
            await own.destroy()
            return
        record = next((record for record in self.records() if record.id == vm_id), None)
        if record is None:
            raise UnknownVm(f"there is no VM {vm_id}: see microvm ps")
        process = VmmProcess.adopt(record.pid, record.start_ticks)
        if process is not None:
            await process.end()
            process.close()
        lock = try_lock(self.pool.vms / vm_id)
        if lock is not None:
            await self._adoption.clear(self.pool.vms / vm_id)
            os.close(lock)

    # ── frozen machines ──────────────────────────────────────────────────────────────────────────

    def frozen(self) -> list[Frozen]:
        """Every frozen VM of the data directory, oldest first."""
        return self._live.frozen.all()

    async def thaw(self, vm_id: str, *, ttl: float = 3600.0) -> RunningVm:
        """Run a frozen VM again: the same machine, its processes go on (``attach`` to their streams).

        Its clock is set and its entropy fresh. It stays frozen when this raises: UnknownVm when there is none of
        that id, SnapshotInvalid when its files or this host do not fit, and what ``launch`` raises.
        """
        return await self._live.thaw(vm_id, ttl)

    @contextlib.asynccontextmanager
    async def look_into(
        self,
        vm_id: str,
        *,
        ttl: float = 3600.0,
        metadata: Mapping[str, str] | None = None,
        network: bool = False,
    ) -> AsyncGenerator[RunningVm]:
        """A copy of a frozen VM, under a name of its own and on no network (or on that of the frozen one), destroyed
        at the end; what is frozen stays as it is. Its processes go on. Raises UnknownVm, and what ``launch`` raises.
        """
        frozen = next((each for each in self.frozen() if each.id == vm_id), None)
        if frozen is None:
            raise UnknownVm(f"there is no frozen VM {vm_id}: it was removed, or its time has passed")
        snapshot = self.snapshots.load(frozen.digest)
        opened = snapshot.manifest.machine.network
        if not network and opened.mode != "none":
            opened = Network("list")  # the card stays, since the guest has seen it; nothing is open
        owner = snapshot.manifest.owner
        vm = await self._launch(snapshot, opened, ttl, metadata, hostname=None, owner=owner)
        try:
            yield vm
        finally:
            await vm.destroy()

    async def discard(self, vm_id: str) -> None:
        """Remove a frozen VM. UnknownVm when there is none of that id."""
        await self._live.frozen.discard(vm_id)

    # ── parts of a fork ──────────────────────────────────────────────────────────────────────────

    async def _boot(
        self, image: BootImage, machine: MachineSpec, ttl: float, metadata: Mapping[str, str] | None
    ) -> RunningVm:
        for path in (image.kernel, image.initrd, image.disk):
            if not path.is_file():
                raise BadRequest(f"cannot boot: {path} is not a file")
        await self._require(machine, machine.memory_mib)
        accel = await self.choose_accel(image)
        return self._enroll(await self._starter.boot(image, machine, accel, ttl, metadata or {}))

    async def check_network(self, network: Network) -> None:
        """Raise BadRequest, naming what is wrong, unless this host can give a VM this network."""
        if network.allow and network.mode == "none":
            raise BadRequest("this machine has no network card, so it cannot be opened to any host")
        (await self._get_berths()).check(network)

    async def _get_berths(self) -> Berths:
        """Opened when first needed: listing VMs or templates takes no slot."""
        async with self._opening:
            if self._berths is None:
                kvm = acceleration.kvm_obstacle() is None
                opening = open_berths(
                    self.data_dir,
                    self.driver.info.binary,
                    kvm=kvm,
                    slots=self._want_slots,
                    resolvers=self._resolvers,
                )
                self._berths = await self._stack.enter_async_context(opening)
            return self._berths

    async def _require(self, machine: MachineSpec, memory_mib: int) -> None:
        """Refuse early, by name, what cannot work."""
        await self.check_network(machine.network)
        self.pool.require_room()
        available = host_available_mib()
        if available < memory_mib + _MEMORY_RESERVE_MIB:
            raise HostOutOfMemory(
                f"the host has {available} MiB of memory available; one more VM needs "
                f"{memory_mib + _MEMORY_RESERVE_MIB} MiB: end VMs (microvm kill) or lower [runners] max_vms"
            )

    def misfit(self, manifest: Manifest) -> str | None:
        """Why this host cannot fork a snapshot with this manifest, in one sentence; None when it can."""
        saved = Saved(
            argv_digest=manifest.argv_digest,
            cpu_model=manifest.cpu_model,
            vmm_version=manifest.vmm_version,
            state=manifest.state,
        )
        return self.driver.snapshot_fits(manifest.machine, manifest.accel, saved)

    def _require_fit(self, manifest: Manifest) -> None:
        problem = self.misfit(manifest)
        if problem is not None:
            name = _called(manifest)
            raise SnapshotInvalid(
                f"template {name} cannot be forked: {problem}; bake it again (microvm bake {name})"
            )

    def _name_of(self, digest: str) -> str | None:
        return min(
            (name for name, meaning in self.snapshots.names().items() if meaning == digest), default=None
        )

    # ── the VMs of this process ──────────────────────────────────────────────────────────────────

    def _enroll(self, parts: Parts) -> RunningVm:
        vm = RunningVm(parts, self._gone, self._live)
        self._vms[vm.id] = vm
        self.ledger.opened(vm)
        delay = max(0.0, vm.record.expires_at - time.time())
        self._timers[vm.id] = asyncio.get_running_loop().call_later(delay, self._expire, vm)
        return vm

    def _expire(self, vm: RunningVm) -> None:
        task = asyncio.create_task(vm.expire(), name=f"expire-{vm.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _gone(self, vm: RunningVm) -> None:
        self._vms.pop(vm.id, None)
        timer = self._timers.pop(vm.id, None)
        if timer is not None:
            timer.cancel()
        self._live.gone(vm)
        self.ledger.closed(vm)

    async def _take_over(self, directory: Path, lock: int) -> RunningVm | None:
        # Ours at once: should another VM's adoption fail, this one's lock has an owner.
        parts = await self._adoption.adopt_or_clear(directory, lock)
        return None if parts is None else self._enroll(parts)

    async def reaper(self) -> Reaper:
        """What looks for things that nothing owns, on this host and in this data directory."""
        berths = await self._get_berths()
        return Reaper(
            self.pool, self.snapshots, berths, owned=self._vms.keys, clear=self._adoption.clear_dead
        )

    async def _close(self) -> None:
        if self._reaping is not None:
            self._reaping.cancel()
            await asyncio.gather(self._reaping, return_exceptions=True)
        for timer in self._timers.values():
            timer.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for vm in list(self._vms.values()):
            if (ending := vm.being_destroyed) is not None:
                await asyncio.wait({ending}, timeout=_CLOSE_SECONDS)
            else:
                await vm.detach()
        await self.ledger.close()
        await self._live.close()
        await self._residents.close()
        await self._stack.aclose()

    @property
    def _accel_cache(self) -> Path:
        return self.data_dir / "cache" / "accel.json"


def _unheard(_step: str) -> None:
    pass


def _called(manifest: Manifest) -> str:
    return manifest.labels.get("template", manifest.digest[:12])


def _opened(network: Network, allow: Sequence[EgressRule] | None) -> Network:
    """A template's network, open to ``allow`` instead of its own list where one is given."""
    return network if allow is None else msgspec.structs.replace(network, allow=tuple(allow))
