"""What tests of the GitHub side share: a repository with a workflow, and stand-in runners on this host."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx

from github_webhook import jit
from github_webhook.app_auth import Scope, TokenAuth
from github_webhook.github import GitHub
from tests.standins.github import StandinGitHub
from tests.standins.github_model import Times
from tests.standins.runner import build_runner_tarball

OWNER, REPO = "octo-org", "demo"
SCOPE = Scope.repository(OWNER, REPO)
LABELS = ("microvm", "self-hosted", "linux", "x64")

WORKFLOW = """\
name: CI
on: push
env: {GREETING: hello}
jobs:
  test:
    runs-on: [self-hosted, microvm]
    steps:
      - uses: actions/checkout@v4
      - name: Greet
        run: |
          echo "$GREETING from $GITHUB_SHA"
          cat greeting.txt
"""


def workflow_of(*steps: str, head: str = "") -> str:
    """A workflow of one job with these ``run`` steps."""
    lines = ["jobs:", "  test:", "    runs-on: microvm", *([f"    {head}"] if head else []), "    steps:"]
    return "\n".join([*lines, *(f"      - run: {json.dumps(step)}" for step in steps)]) + "\n"


def git(directory: Path, *args: str) -> str:
    identity = ("-c", "user.name=Mona", "-c", "user.email=mona@example.com")
    done = subprocess.run(
        ["git", "-C", str(directory), *identity, *args], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_repository(directory: Path, workflow: str = WORKFLOW) -> Path:
    """A git repository with one commit: a workflow and ``greeting.txt``."""
    (directory / ".github/workflows").mkdir(parents=True)
    (directory / ".github/workflows/ci.yml").write_text(workflow)
    (directory / "greeting.txt").write_text("good morning\n")
    git(directory, "init", "-q", "-b", "main")
    git(directory, "add", ".")
    git(directory, "commit", "-q", "-m", "First\n\nwith a body")
    return directory


class ForgeWorld:
    """A stand-in GitHub with the repository octo-org/demo, our client to it, and runners on this host."""

    def __init__(self, forge: StandinGitHub, http: httpx.AsyncClient, tmp: Path) -> None:
        self.forge = forge
        self.http = http
        self.tmp = tmp
        self.github = GitHub(auth=TokenAuth(forge.token), http=http, base_url=forge.url)
        self._started: list[HostRunner] = []

    async def runner(self, name: str = "r1", *, labels: tuple[str, ...] = LABELS, **env: str) -> "HostRunner":
        """Register a runner and start it."""
        made = await self.github.generate_jit_config(SCOPE, name=name, labels=labels)
        runner = HostRunner(self.tmp / f"runner-{name}", made.runner_id, name)
        runner.install(jit.decode(made.encoded_jit_config))
        await runner.start(env)
        self._started.append(runner)
        return runner

    async def until_online(self, runner: "HostRunner", timeout: float = 10.0) -> None:
        runners = self.forge.actions.runners
        await self.forge.actions.until(lambda: runners[runner.id].polling > 0, timeout)

    async def close(self) -> None:
        for runner in self._started:
            await runner.end()


class HostRunner:
    """A stand-in runner as a process of this host."""

    def __init__(self, root: Path, number: int, name: str) -> None:
        self.root = root
        self.id = number
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self.output = b""
        self._reader: asyncio.Task[None] | None = None

    def install(self, files: Mapping[str, bytes]) -> None:
        self.root.mkdir(exist_ok=True)  # a warm work folder may be there
        tarball = build_runner_tarball(self.root.with_suffix(".tar.gz"))
        with tarfile.open(tarball) as tar:
            tar.extractall(self.root, filter="data")
        for name, data in files.items():
            (self.root / name).write_bytes(data)

    async def start(self, env: Mapping[str, str]) -> None:
        self.process = await asyncio.create_subprocess_exec(
            str(self.root / "bin/Runner.Listener"), "run",
            cwd=self.root,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.root),
                "LANG": "C.UTF-8",
                "STANDIN_RUNNER_RETRY_SECONDS": "0.1",
                **env,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        while chunk := await self.process.stdout.read(65536):
            self.output += chunk

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")

    async def exit(self, timeout: float = 20.0) -> int:
        """The exit code. Raises TimeoutError that shows what it printed."""
        assert self.process is not None and self._reader is not None
        try:
            async with asyncio.timeout(timeout):
                code = await self.process.wait()
                await self._reader
                return code
        except TimeoutError:
            raise TimeoutError(f"the runner {self.name} does not exit:\n{self.text}") from None

    def signal(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def end(self) -> None:
        assert self.process is not None and self._reader is not None
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader


@contextlib.asynccontextmanager
async def forge_world(
    tmp: Path,
    workflow: str = WORKFLOW,
    *,
    transport: httpx.AsyncBaseTransport | None = None,
    webhook_url: str | None = None,
    secret: str = "",
    times: Times | None = None,
) -> AsyncIterator[ForgeWorld]:
    repository = make_repository(tmp / REPO, workflow)
    forge = StandinGitHub(webhook_url=webhook_url, secret=secret, times=times)
    async with forge, httpx.AsyncClient(transport=transport, trust_env=False) as http:
        await forge.add_repository(repository, owner=OWNER)
        world = ForgeWorld(forge, http, tmp)
        try:
            yield world
        finally:
            await world.close()
