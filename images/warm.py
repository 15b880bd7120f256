"""Bakes the parent of a repository: a fork of its base in which checkout, toolchain and dependencies are in place.

    plan ──► a parent of this key? ── yes ──► it is the branch's parent from now on (cache hit)
      │ no
      ▼
    fork of the base, or of an earlier parent ──► checkout ──► install ──► warm ──► services ──► verify
      ──► forget ──► settle ──► snapshot ──► promoted

No credential enters the guest: this host fetches the repository and the guest gets the files. Whatever fails, the
parent there was stays the one in use.
"""

import asyncio
import contextlib
import hashlib
import shlex
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import msgspec

from images import warm_guest
from images.bake import BAKE, lock_name, runner_blanks, sweep
from images.cache import Cache
from images.catalog import (
    BAKED_FROM,
    BASE,
    BASE_DIGEST,
    BRANCH,
    COMMIT,
    KEY,
    LOCKFILES,
    RECIPE,
    REPOSITORY,
    TEMPLATE,
    TOOLS,
    Catalog,
)
from images.errors import BakeFailed
from images.events import BakeEvent, Progress
from images.installs import Install, InstallPlan, plan_installs
from images.mirror import Mirror, fetch_mirror
from images.repository import Service
from images.schema import WarmStep
from images.steps import GuestWork, Steps
from images.warm_plan import (
    BASE_MADE,
    CONFIG,
    CONFIG_DIGEST,
    Request,
    WarmPlan,
    make_warm_plan,
    parent_name,
    parents_of,
)
from vmm_core.engine import Engine
from vmm_core.errors import VmFailed
from vmm_core.machine import Snapshot
from vmm_core.vm import RunningVm

_LIMIT_SECONDS = 3600.0
_GUEST_SECONDS = 600.0
_COPY_SECONDS = 600.0
_CHUNK = 256 << 10
_TAR = "/home/runner/.microvm-git.tar"
_MOST_LOCKFILES_TOLD = 200
_REACH = (
    "Its last output is above. What it needs beyond the package registries is named under warm_egress, a base with "
    f"other tools under template, in {CONFIG}; jobs go on with the parent there was."
)
_OURS = "Is the disk of its base large enough (machine.disk)? Its jobs go on with the parent there was."
_CORRECT = (
    f"Correct that in the repository ({CONFIG} says what is run); its jobs go on with the parent there was."
)


class WarmBaked(msgspec.Struct, frozen=True):
    """The parent of a branch: its name and digest, what it was made of, and the seconds of each step."""

    name: str
    digest: str
    key: str
    commit: str
    cache_hit: bool
    incremental: bool
    seconds: float
    steps: tuple[tuple[str, float], ...]


async def bake_repository(
    engine: Engine, request: Request, *, progress: Progress, force: bool = False
) -> WarmBaked:
    """Make the parent of a repository's branch, or find the one of the same key, and promote it.

    Raises MirrorError (the repository cannot be had, no such ref), RecipeError (``.microvm.yml``), BakeFailed (a step
    failed: with its last output and what to do), and what a fork raises.
    """
    return await _WarmBake(engine, request, progress).run(force=force)


class _WarmBake:
    def __init__(self, engine: Engine, request: Request, progress: Progress) -> None:
        self._engine = engine
        self._request = request
        self._progress = progress
        self._cache = Cache(engine.data_dir / "cache")
        self._catalog = Catalog(engine)
        self._steps = Steps(progress)

    async def run(self, *, force: bool) -> WarmBaked:
        started = time.monotonic()
        await sweep(self._engine, self._cache)
        with self._steps.step("fetch") as step:
            mirror = await fetch_mirror(
                self._engine.data_dir / "cache" / "mirrors",
                self._request.url,
                credential=self._request.credential,
                say=step,
                keep=self._request.mirrors,
                max_mib=self._request.mirror_mib,
            )
        plan = await make_warm_plan(self._engine, mirror, self._request, self._steps, self._progress)
        name = parent_name(self._request.repository, plan.branch)

        def waiting() -> None:
            self._progress(BakeEvent("plan", "waiting for another process that bakes the same key"))

        async with self._cache.locked(lock_name(plan.key), waiting=waiting):
            known = None if force else await asyncio.to_thread(self._find, plan, name)
            snapshot = known or await self._make(plan, mirror)
        hit = snapshot is known
        why = (
            "the same key"
            if hit
            else f"baked from {'the last parent' if plan.incremental else plan.template}"
        )
        await asyncio.to_thread(
            self._catalog.promote, name, snapshot.digest, f"{why}, commit {plan.commit.sha[:12]}"
        )
        return WarmBaked(
            name=name,
            digest=snapshot.digest,
            key=plan.key,
            commit=plan.commit.sha,
            cache_hit=hit,
            incremental=not hit and plan.incremental,
            seconds=time.monotonic() - started,
            steps=self._steps.times,
        )

    def _find(self, plan: WarmPlan, name: str) -> Snapshot | None:
        """The newest parent of this key that nobody has rolled this name back from."""
        bad = self._catalog.withdrawn(name)
        parents = parents_of(self._engine, self._request.repository)
        good = (parent for parent in parents if parent.digest not in bad)
        return next((parent for parent in good if parent.manifest.labels.get(KEY) == plan.key), None)

    async def _make(self, plan: WarmPlan, mirror: Mirror) -> Snapshot:
        async with self._forked(plan) as vm:
            work = GuestWork(vm, self._steps)
            folder = warm_guest.work_folder(self._request.spelled)
            await self._check_out(work, plan, mirror, folder)
            kept = await self._install(work, plan, folder)
            await self._own_steps(work, "warm", plan.recipe.warm, folder)
            for service in plan.recipe.services:
                await self._serve(work, service, folder)
            await self._own_steps(work, "verify", plan.recipe.verify, folder)
            await self._ours(work, "stash", warm_guest.stash(kept))
            tools = await self._ours(work, "tools", warm_guest.tools())
            await self._ours(work, "forget", warm_guest.forget([folder]), user="root")
            await work.settle(plan.recipe.page_cache)
            with self._steps.step("snapshot") as step:
                step("saving what changed of memory and disk")
                return await self._engine.snapshot(
                    vm,
                    digest=_new_digest(plan),
                    labels=self._labels(plan, tools[-1] if tools else "{}"),
                    network=plan.jobs,
                    blanks=runner_blanks(plan.base.manifest.labels.get("runner.files")),
                    owner=self._request.owner,
                )

    @contextlib.asynccontextmanager
    async def _forked(self, plan: WarmPlan) -> AsyncGenerator[RunningVm]:
        with self._steps.step("fork") as step:
            step(
                f"from {'the last parent' if plan.incremental else plan.template} ({plan.start.digest[:12]})"
            )
            try:
                vm = await self._engine.launch(
                    plan.start,
                    ttl=_LIMIT_SECONDS,
                    metadata={BAKE: plan.key, "repository": self._request.repository},
                    network=plan.warm,
                    owner=self._request.owner,
                )
            except VmFailed as error:
                raise BakeFailed("fork", str(error), advice="microvm doctor checks the host.") from error
        try:
            yield vm
        finally:
            await vm.destroy()

    async def _check_out(self, work: GuestWork, plan: WarmPlan, mirror: Mirror, folder: str) -> None:
        request = self._request
        url = mirror.checkout_url
        if request.server is not None:
            url = warm_guest.checkout_url(request.server, request.spelled)
        with (
            self._steps.step("copy") as step,
            tempfile.TemporaryDirectory(dir=self._engine.staging) as scratch,
        ):
            step(f"{request.spelled} at {plan.commit.sha[:12]}")
            tar = Path(scratch) / "git.tar"
            async with asyncio.timeout(_COPY_SECONDS):
                await mirror.work_tree_tar(plan.commit, tar, origin=url)
                await work.vm.put(_TAR, _pieces(tar), mode=0o600)
        unpacking = warm_guest.unpack(folder, _TAR, plan.commit.sha, plan.branch, url)
        await self._ours(work, "checkout", unpacking)

    async def _install(self, work: GuestWork, plan: WarmPlan, folder: str) -> list[str]:
        """What the lock files ask for, one step each; the directories it was installed in."""
        wanted = (
            plan_installs(plan.inventory, paths=plan.recipe.paths) if plan.recipe.install else InstallPlan(())
        )
        with self._steps.step("install") as step:
            for note in wanted.notes:
                step(note)
        for install in wanted.steps:
            script = WarmStep(name=install.name[:80], run=_with_tool(install), timeout=install.timeout)
            await work.script("install", script, advice=_REACH, cwd=_inside(folder, install.directory))
        return [_inside(folder, install.directory) for install in wanted.steps]

    async def _ours(self, work: GuestWork, name: str, argv: list[str], *, user: str = "runner") -> list[str]:
        """A step that is not the repository's doing."""
        return await work.command(name, argv, user=user, timeout=_GUEST_SECONDS, advice=_OURS)

    async def _own_steps(
        self, work: GuestWork, kind: str, scripts: tuple[WarmStep, ...], folder: str
    ) -> None:
        for script in scripts:
            await work.script(kind, script, advice=_CORRECT, cwd=folder)

    async def _serve(self, work: GuestWork, service: Service, folder: str) -> None:
        """Start what is to be running in every fork, and wait until it says that it is ready."""
        log = f"/var/tmp/{service.name}.log"  # noqa: S108  # in the guest
        run = f"setsid nohup /bin/sh -eu -c {shlex.quote(service.run)} >{log} 2>&1 </dev/null &\n"
        ready = f"until {{ {service.ready}\n}}; do sleep 0.2; done\n" if service.ready else ""
        step = WarmStep(name=service.name, run=run + ready, user=service.user, timeout=service.timeout)
        await work.script("service", step, advice=f"Its own output is in {log}. {_CORRECT}", cwd=folder)

    def _labels(self, plan: WarmPlan, tools: str) -> dict[str, str]:
        base = plan.base.manifest.labels
        files = [[file.path, file.kind, file.digest] for file in plan.inventory.files[:_MOST_LOCKFILES_TOLD]]
        labels = [label for label in (base.get("labels"), *plan.recipe.labels) if label]
        return {
            **{
                key: value
                for key, value in base.items()
                if key.startswith("runner.") or key in ("suite", "kernel")
            },
            TEMPLATE: self._request.repository,
            "description": f"{self._request.spelled} at {plan.commit.sha[:12]}, with its dependencies",
            "labels": ",".join(labels),
            REPOSITORY: self._request.repository,
            BRANCH: plan.branch,
            COMMIT: plan.commit.sha,
            KEY: plan.key,
            CONFIG_DIGEST: plan.config,
            BASE: plan.template,
            BASE_DIGEST: plan.template_digest,
            BASE_MADE: plan.base.digest,
            BAKED_FROM: "previous" if plan.incremental else "base",
            RECIPE: msgspec.json.encode(plan.recipe).decode(),
            LOCKFILES: msgspec.json.encode(files).decode(),
            TOOLS: tools,
        }


def _with_tool(install: Install) -> str:
    """The install's script, left out and told where its tool is not in the base."""
    tool = shlex.quote(install.needs)
    told = shlex.quote(f"{install.lockfile} is not installed: there is no {install.needs} in this base")
    return f"command -v {tool} >/dev/null || {{ echo {told}; exit 0; }}\n{install.run}\n"


def _inside(folder: str, directory: str) -> str:
    return f"{folder}/{directory}" if directory not in ("", ".") else folder


def _new_digest(plan: WarmPlan) -> str:
    return hashlib.sha256(f"{plan.key}\0{plan.branch}\0{time.time_ns()}".encode()).hexdigest()


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, _CHUNK):
            yield piece
