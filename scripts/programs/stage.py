"""A stage for the main job: a stand-in GitHub with a small real repository, and the service as its own process.

The demo plays one job on it, the bench many.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from images.bake import Baked, bake
from images.events import BakeEvent
from images.recipe import Recipe, load_recipe
from tests.standins.github import StandinGitHub
from tests.standins.github_state import Job, Times
from tests.standins.runner import build_runner_tarball
from vmm_core.engine import Engine

TEMPLATE = "github-runner"
OWNER, REPOSITORY = "octo-org", "hello"
FORGE_HOST = "forge.test"
_START_SECONDS = 60.0
_JOB_SECONDS = 180.0
_CALM_SECONDS = 0.2
_REAP_SECONDS = (
    2.0  # what a killed service leaves is gone after two passes: nobody should wait a minute for it
)

# What users copy is what is played.
WORKFLOW = (Path(__file__).parents[2] / "workflows" / "github-python.yml").read_text()
TRIVIAL = """\
name: trivial
on: [push]
jobs:
  trivial:
    runs-on: microvm
    steps:
      - run: echo hello
"""
WAITING = """\
name: waiting
on: [push]
jobs:
  waiting:
    runs-on: microvm
    steps:
      - run: sleep 600
"""
FILES: Mapping[str, str] = {
    ".github/workflows/ci.yml": WORKFLOW,
    ".github/workflows/trivial.yml": TRIVIAL,
    ".github/workflows/waiting.yml": WAITING,
    "README.md": "A small repository with tests.\n",
    "requirements.txt": "pytest\npyyaml\n",
    "hello.py": textwrap.dedent(
        """\
        import yaml


        def greet(text: str) -> str:
            return "hello " + yaml.safe_load(text)["name"]
        """
    ),
    "test_hello.py": textwrap.dedent(
        """\
        import pytest

        from hello import greet


        @pytest.mark.parametrize("name", ["world", "microvm"])
        def test_greet(name: str) -> None:
            assert greet(f"name: {name}") == f"hello {name}"
        """
    ),
}


class StageError(Exception):
    """The service did not do what the scene needs; the message carries the end of its log."""


def runner_recipe(data_dir: Path) -> Recipe:
    """The shipped github-runner recipe with the stand-in for actions/runner in it."""
    directory = data_dir / "cache" / "standin-runner"
    directory.mkdir(parents=True, exist_ok=True)
    tarball = build_runner_tarball(directory / "actions-runner-standin.tar.gz")
    return load_recipe(TEMPLATE, overrides={"runner.tarball": str(tarball)})


async def make_repository(directory: Path, files: Mapping[str, str] = FILES) -> Path:
    """A git repository with ``files`` in one commit."""
    path = directory / REPOSITORY
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    for arguments in (("init", "-q", "-b", "main"), ("add", "."), ("commit", "-q", "-m", "A greeting")):
        await asyncio.to_thread(git, path, *arguments)
    return path


def git(path: Path, *arguments: str) -> str:
    """What git says, run in ``path`` as a user of the stage."""
    identity = ("-c", "user.name=Octo", "-c", "user.email=octo@localhost", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=path, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


class Stage:
    """Everything a job needs outside the guest. ``Stage.open`` makes it, ``Stage.prepare`` bakes beforehand."""

    def __init__(
        self, forge: StandinGitHub, service: asyncio.subprocess.Process, url: str, config: Path, log: Path
    ) -> None:
        self.forge = forge
        self.service = service
        self.url = url
        self.config = config
        self.log = log
        self.http = httpx.AsyncClient(base_url=url, timeout=30, trust_env=False)

    @staticmethod
    async def prepare(engine: Engine, *, progress: Callable[[BakeEvent], None]) -> Baked:
        """Bake the template the jobs are forked from, unless it is there."""
        return await bake(engine, runner_recipe(engine.data_dir), progress=progress)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        engine: Engine,
        *,
        max_vms: int = 8,
        files: Mapping[str, str] = FILES,
        limits: Mapping[str, float] = MappingProxyType({}),
        bakes: Mapping[str, float] | None = None,
        frozen: Mapping[str, object] = MappingProxyType({}),
        times: Times | None = None,
        github: Mapping[str, str | float] = MappingProxyType({}),
    ) -> AsyncGenerator["Stage"]:
        """Start the forge and the service; at the end both are stopped and no VM of the service is left.

        ``files`` are the repository's; ``limits`` go into [runners] of the settings, ``bakes`` into [bakes] (None:
        none are made), ``frozen`` into [frozen]; ``times`` are the forge's; ``github`` goes into [github]: with
        ``ingress = "poll"`` there is neither a webhook nor a secret for one.
        """
        async with contextlib.AsyncExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="microvm-stage-")))
            port = _free_port()
            url = f"http://127.0.0.1:{port}"
            secret = secrets.token_urlsafe(24)
            forge = await stack.enter_async_context(
                StandinGitHub(
                    webhook_url=None if github.get("ingress") == "poll" else f"{url}/webhooks/github",
                    secret=secret,
                    guest_url=f"http://{FORGE_HOST}:{{port}}",
                    times=times,
                )
            )
            await forge.add_repository(await make_repository(work, files), owner=OWNER, name=REPOSITORY)
            runners = {"max_vms": max_vms, "reap_every_s": _REAP_SECONDS, **limits}
            warm = {"enabled": False} if bakes is None else {"enabled": True, **bakes}
            config = _write_config(work, engine.data_dir, port, forge, secret, runners, warm, frozen, github)
            log = work / "service.log"
            stage = cls(forge, await _start(config, log), url, config, log)
            stack.push_async_callback(_end_vms, engine)
            stack.push_async_callback(stage.stop)
            stack.push_async_callback(stage.http.aclose)
            await stage._ready()
            yield stage

    @property
    def server(self) -> str:
        """The forge as jobs see it."""
        return f"http://{FORGE_HOST}:{self.forge.port}"

    async def kill(self) -> None:
        """End the service as a crash would: SIGKILL, at whatever it is doing."""
        self.service.kill()
        await self.service.wait()

    async def stop(self) -> None:
        """End the service as an operator would; SIGKILL if it does not end."""
        with contextlib.suppress(ProcessLookupError):
            self.service.terminate()
        try:
            async with asyncio.timeout(30):
                await self.service.wait()
        except TimeoutError:
            await self.kill()

    async def start(self) -> None:
        """Start the service again, where the last one left off; its log goes on."""
        self.service = await _start(self.config, self.log)
        await self._ready()

    async def queue(self, workflow: str = ".github/workflows/ci.yml") -> Job:
        """Queue a run of ``workflow``: the forge delivers the signed event of its one job."""
        run = await self.forge.queue_run(OWNER, REPOSITORY, workflow=workflow)
        return run.jobs[0]

    async def story(self, job: Job) -> dict[str, Any]:
        """What the service tells of the job; empty as long as it has not heard of it."""
        answer = await self.http.get(f"/jobs/{job.id}")
        return answer.json() if answer.status_code == 200 else {}

    async def until(self, job: Job, met: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Wait until the job's story is as it should be. StageError with the service's log after three minutes."""
        deadline = time.monotonic() + _JOB_SECONDS
        while time.monotonic() < deadline:
            story = await self.story(job)
            if story and met(story):
                return story
            if self.service.returncode is not None:
                break
            await asyncio.sleep(0.05)
        raise StageError(f"the job {job.id} did not get to: {what}. The service said:\n{self.log_tail()}")

    async def event_to_runner_ms(self) -> float:
        """One trivial job: milliseconds from the stored event to the runner's process running in the guest."""
        await asyncio.sleep(_CALM_SECONDS)  # what the last job set in motion shall not weigh on this one
        job = await self.queue(".github/workflows/trivial.yml")
        # The forge tells when the job is done; asking the service meanwhile would slow what is measured.
        await self.forge.wait_for(job, "completed", _JOB_SECONDS)
        story = await self.until(job, lambda story: step_at(story, "gone") is not None, "gone")
        accepted, started = step_at(story, "queued"), step_at(story, "started")
        if accepted is None or started is None or job.conclusion != "success":
            raise StageError(f"the job {job.id} ended as {job.conclusion}: {story}\n{self.log_tail()}")
        return (started - accepted) * 1e3

    async def rss_with_vms(self, count: int) -> int:
        """Resident bytes of the service while ``count`` jobs run, each in its VM."""
        jobs = [await self.queue(".github/workflows/waiting.yml") for _ in range(count)]
        for job in jobs:
            await self.until(job, lambda story: story["job"]["state"] == "in_progress", "in progress")
        status = Path(f"/proc/{self.service.pid}/status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        for job in jobs:
            self.forge.actions.cancel(job.run)
        for job in jobs:
            await self.until(job, lambda story: step_at(story, "gone") is not None, "gone")
        return rss * 1024

    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    async def _ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.service.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await self.http.get("/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.05)
        raise StageError(f"the service did not become ready:\n{self.log_tail()}")


def step_at(story: Mapping[str, Any], step: str) -> float | None:
    """Unix time of the first timeline row of this name; None when there is none."""
    return next((row["at"] for row in story["timeline"] if row["step"] == step), None)


def _write_config(
    work: Path,
    data_dir: Path,
    port: int,
    forge: StandinGitHub,
    secret: str,
    runners: Mapping[str, float],
    bakes: Mapping[str, float],
    frozen: Mapping[str, object],
    github: Mapping[str, str | float],
) -> Path:
    for name, value in (("webhook.secret", secret), ("forge.token", forge.token)):
        path = work / name
        path.touch(mode=0o600)
        path.write_text(value)
    signed = {} if github.get("ingress") == "poll" else {"webhook_secret_files": [f"{work}/webhook.secret"]}
    config = work / "microvm.toml"
    config.write_text(
        textwrap.dedent(
            f"""\
            [service]
            listen = "127.0.0.1:{port}"
            data_dir = "{data_dir}"
            database_url = "sqlite+aiosqlite:///{work}/service.db"
            log_format = "json"

            [github]
            base_url = "{forge.url}"
            server_url = "http://{FORGE_HOST}:{forge.port}"
            token_file = "{work}/forge.token"
            # github

            [runners]
            default_template = "{TEMPLATE}"
            # runners

            [[runners.egress]]
            host = "{FORGE_HOST}"
            port = {forge.port}
            via = "127.0.0.1:{forge.port}"

            [bakes]
            # bakes

            [frozen]
            # frozen
            """
        )
        .replace("# github", _lines({**signed, **github}))
        .replace("# runners", _lines(runners))
        .replace("# bakes", _lines(bakes))
        .replace("# frozen", _lines(frozen))
    )
    return config


def _lines(values: Mapping[str, Any]) -> str:
    """The keys of one table of TOML, of which JSON's simple values are a part."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())


async def _start(config: Path, log: Path) -> asyncio.subprocess.Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MICROVM_")}
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "runner_service.cli", "serve", "--config", str(config),
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
        )  # fmt: skip


async def _end_vms(engine: Engine) -> None:
    """End the VMs the service left running, since nobody will adopt them."""
    for record in engine.records():
        if "runner_id" in record.metadata:
            await engine.destroy(record.id)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
