"""A recipe becomes a template: a snapshot that jobs fork from.

    plan ──► known inputs? ── yes ──► the template there is (cache hit)
      │ no
      ▼
    packages ──► rootfs ──► boot ──► warm steps ──► runner ──► settle ──► snapshot ──► name

``plan`` checks everything that can be checked before anything slow begins. Two bakes of the same inputs: one
waits for the other. What a killed bake leaves is never taken for a template: caches and snapshots appear
by one rename, and half-built directories are removed by the next bake.
"""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping

import msgspec

from images import rootfs
from images.cache import Cache
from images.catalog import Catalog
from images.errors import BakeFailed
from images.events import BakeEvent, Step
from images.plan import Plan, make_plan, open_networks
from images.recipe import Recipe
from images.steps import GuestWork, Steps
from vmm_core.engine import Engine
from vmm_core.errors import UnknownVm, VmFailed
from vmm_core.machine import BootImage, MachineSpec, Snapshot
from vmm_core.vm import RunningVm

__all__ = ["BakeEvent", "Baked", "bake"]

# Metadata key of a machine that is being baked; its value is the digest of the inputs, whose lock the baker holds.
BAKE = "bake"
# Where the files of a just-in-time configuration really are: in memory, where writing them is quick (it is on
# the way of every job) and where no disk ever holds them.
RUNNER_FILES = "/run/runner"
_RUNNER_FILE_NAMES = (".runner", ".credentials", ".credentials_rsaparams")
_LINK_FILES = f"""
install -d -o runner -g runner -m 700 {RUNNER_FILES}
for file in {" ".join(_RUNNER_FILE_NAMES)}; do
    ln -sfn {RUNNER_FILES}/$file {rootfs.RUNNER_DIR}/$file
done
"""
_LISTENER = f"{rootfs.RUNNER_DIR}/bin/Runner.Listener"
_RUNNER_TIMEOUT_S = 600.0


class Baked(msgspec.Struct, frozen=True):
    """A template, how long it took, and the seconds of each step (empty on a cache hit)."""

    snapshot: Snapshot
    cache_hit: bool
    seconds: float
    steps: tuple[tuple[str, float], ...] = ()


async def bake(
    engine: Engine,
    recipe: Recipe,
    *,
    progress: Callable[[BakeEvent], None],
    force: bool = False,
    named: bool = True,
) -> Baked:
    """Make the template of a recipe, or find the one already made of the same inputs, and name it.

    ``force`` bakes again; the name then means the new one. Not ``named``, it is for its children alone: no label
    finds it, and pruning may take it once nothing stands on it. Raises RecipeError, BuildFailed, BakeFailed, and
    VmmError where the host is unfit (HostUnfit: no memory, pool full, no QEMU).
    """
    return await _Bake(engine, recipe, progress).run(force=force, named=named)


async def root_disk(engine: Engine, recipe: Recipe, *, progress: Callable[[BakeEvent], None]) -> BootImage:
    """What a bake of the recipe boots: kernel, initramfs and root disk, made where missing. Errors as ``bake``."""
    return await _Bake(engine, recipe, progress).root_disk()


async def bake_machine(recipe: Recipe) -> MachineSpec:
    """The recipe's machine as its bake has it: open to what the warm steps may reach."""
    step = Step("egress", lambda _event: None)
    warm, _ = await open_networks(recipe, step)
    return recipe.machine.on(warm)


async def sweep(engine: Engine, cache: Cache) -> None:
    """Remove what killed bakes left: half-built directories, and machines that nobody bakes on with."""
    cache.sweep()
    engine.snapshots.sweep()
    for record in engine.records():
        inputs = record.metadata.get(BAKE)
        if inputs is not None and cache.is_free(lock_name(inputs)):
            with contextlib.suppress(UnknownVm):
                await engine.destroy(record.id)


def lock_name(inputs: str) -> str:
    """The lock that who bakes these inputs holds."""
    return f"template-{inputs}"


def runner_blanks(directory: str | None) -> list[str]:
    """The files the first command of a fork is started with, in its runner's directory for them (None: no runner)."""
    return [] if directory is None else [f"{directory}/{name}" for name in _RUNNER_FILE_NAMES]


class _Bake:
    def __init__(self, engine: Engine, recipe: Recipe, progress: Callable[[BakeEvent], None]) -> None:
        self._engine = engine
        self._recipe = recipe
        self._progress = progress
        self._cache = Cache(engine.data_dir / "cache")
        self._started = time.monotonic()
        self._steps = Steps(progress)

    async def run(self, *, force: bool, named: bool) -> Baked:
        plan = await self._plan()
        step = Step("check", self._progress)

        def waiting() -> None:
            step("waiting for another process that bakes the same template")

        begun = time.time()
        async with self._cache.locked(lock_name(plan.inputs), waiting=waiting):
            found = self._find(plan.inputs)
            # With force, one that somebody else has baked while we waited is as new as ours would be.
            if found is not None and (not force or found.manifest.created_at >= begun):
                if named:
                    await self._promote(found, "baked already")
                step(f"{self._recipe.name} is baked already: {found.digest[:12]}", 1.0)
                return Baked(snapshot=found, cache_hit=True, seconds=time.monotonic() - self._started)
            snapshot = await self._make(plan)
            if named:
                await self._promote(snapshot, "baked")
        return Baked(
            snapshot=snapshot,
            cache_hit=False,
            seconds=time.monotonic() - self._started,
            steps=self._steps.times,
        )

    def _find(self, inputs: str) -> Snapshot | None:
        """The newest template of these inputs that this host can still fork."""
        usable = [
            snapshot
            for snapshot in self._engine.snapshots.list()
            if snapshot.manifest.labels.get("inputs") == inputs
            and self._engine.misfit(snapshot.manifest) is None
        ]
        return max(usable, key=lambda snapshot: snapshot.manifest.created_at, default=None)

    async def _make(self, plan: Plan) -> Snapshot:
        image = await self._image(plan)
        with self._steps.step("egress") as step:
            warm_network, job_network = await open_networks(self._recipe, step)
        async with self._booted(image, self._recipe.machine.on(warm_network), plan.inputs) as vm:
            work = GuestWork(vm, self._steps)
            for warm in self._recipe.warm:
                await work.script(
                    "warm", warm, advice=f"Correct it in recipe {self._recipe.name} and bake again."
                )
            version = await self._runner(work) if self._recipe.runner is not None else None
            await work.settle(self._recipe.page_cache)
            with self._steps.step("snapshot") as step:
                step("saving memory and disk")
                return await self._engine.snapshot(
                    vm,
                    digest=self._digest(plan.inputs),
                    labels=self._labels(plan, version),
                    # Forks are open to what jobs may reach, not to what the warm steps needed.
                    network=job_network,
                    blanks=runner_blanks(None if version is None else RUNNER_FILES),
                )

    async def _promote(self, snapshot: Snapshot, why: str) -> None:
        await asyncio.to_thread(Catalog(self._engine).promote, self._recipe.name, snapshot.digest, why)

    async def root_disk(self) -> BootImage:
        return await self._image(await self._plan())

    async def _plan(self) -> Plan:
        with self._steps.step("check") as step:
            await sweep(self._engine, self._cache)
            return await make_plan(self._engine, self._cache, self._recipe, step)

    async def _image(self, plan: Plan) -> BootImage:
        with self._steps.step("packages") as step:
            tree = await rootfs.get_packages(self._cache, plan.resolution, plan.wanted, step)
        with self._steps.step("rootfs") as step:
            disk = await rootfs.get_disk(self._cache, tree, plan.kernel, plan.contents, step)
        return BootImage(kernel=plan.kernel.vmlinux, initrd=plan.kernel.initrd, disk=disk)

    def _digest(self, inputs: str) -> str:
        """The inputs' own digest; another where that is taken (a forced bake): digests are immutable."""
        taken = {snapshot.digest for snapshot in self._engine.snapshots.list()}
        if inputs not in taken:
            return inputs
        return hashlib.sha256(f"{inputs}\0{time.time_ns()}".encode()).hexdigest()

    def _labels(self, plan: Plan, version: str | None) -> Mapping[str, str]:
        recipe = plan.recipe
        labels = {
            "template": recipe.name,
            "description": recipe.description,
            "inputs": plan.inputs,
            "made.from": recipe.made_from,
            "labels": ",".join(recipe.github_labels),
            "suite": plan.resolution.archive.suite,
            "kernel": plan.kernel.version,
        }
        if version is not None:
            labels |= {
                "runner.dir": rootfs.RUNNER_DIR,
                "runner.files": RUNNER_FILES,
                "runner.version": version,
            }
        return labels

    @contextlib.asynccontextmanager
    async def _booted(self, image: BootImage, machine: MachineSpec, inputs: str) -> AsyncGenerator[RunningVm]:
        limit = 1800.0 + sum(warm.timeout for warm in self._recipe.warm)
        async with contextlib.AsyncExitStack() as stack:
            with self._steps.step("boot") as step:
                step(f"booting {machine.vcpus} vCPU, {machine.memory_mib} MiB")
                try:
                    vm = await stack.enter_async_context(
                        self._engine.boot(
                            image, machine, ttl=limit, metadata={BAKE: inputs, "recipe": self._recipe.name}
                        )
                    )
                except VmFailed as error:
                    raise BakeFailed(
                        "boot",
                        str(error),
                        advice="The lines above are the console's last; microvm doctor checks the host.",
                    ) from error
            yield vm

    async def _runner(self, work: GuestWork) -> str:
        """Ask the runner for its version, and let it warm itself up where it can. Returns the version."""
        with self._steps.step("runner") as step:
            step("starting the runner once")
            argv = [_LISTENER, "--version"]
            result, tail = await work.run(step, argv, cwd=rootfs.RUNNER_DIR, timeout=_RUNNER_TIMEOUT_S)
            if result.code != 0 or not tail:
                raise BakeFailed(
                    "runner",
                    f"{_LISTENER} --version exited with status {result.code}",
                    advice="Is this actions/runner for linux-x64, with its libraries among the packages?",
                    status=result.code,
                    output=tail,
                )
            version = tail[-1].strip()[:40]
            argv = ["/bin/sh", "-eu", "-c", _LINK_FILES]
            result, tail = await work.run(step, argv, user="root", timeout=_RUNNER_TIMEOUT_S)
            if result.code != 0:
                raise BakeFailed(
                    "runner",
                    "its configuration could not be linked into memory",
                    advice="Is there room on the disk of the recipe's machine?",
                    status=result.code,
                    output=tail,
                )
            step(f"warming up runner {version}")
            argv = [_LISTENER, "warmup"]
            result, _ = await work.run(step, argv, cwd=rootfs.RUNNER_DIR, timeout=_RUNNER_TIMEOUT_S)
            if result.code != 0:
                step(f"runner {version} has no warmup command (status {result.code}): less of it is warm")
            return version
