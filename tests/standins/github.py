"""A GitHub to test against: REST, runners, jobs, signed webhooks, git over HTTP. Here or as its own process.

    python -m tests.standins.github --repo DIR --webhook URL --secret-file FILE [--port N] [--guest-url URL]

prints one JSON line when it is ready. Two ports: the forge itself, which guests may reach, and a control port
(``/_standin/control/…``, loopback only) to queue runs, read logs and inject faults, which they may not.
"""

import argparse
import asyncio
import contextlib
import json
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.standins import github_git
from tests.standins.github_checked import Checks
from tests.standins.github_control import Control
from tests.standins.github_faults import Fault, Faults
from tests.standins.github_http import HttpServer, Request, Response, answer
from tests.standins.github_model import Job, Repository, Run, Times
from tests.standins.github_rest import App, Rest, Token
from tests.standins.github_runners import RunnerApi, jit_config
from tests.standins.github_shapes import Shapes
from tests.standins.github_state import Actions
from tests.standins.github_webhooks import HOOK_ID, Sent, Webhooks

WORKFLOW = ".github/workflows/ci.yml"


@dataclass(frozen=True, slots=True)
class AppCredentials:
    client_id: str
    installation_id: int
    private_key_pem: str


class StandinGitHub:
    """``async with StandinGitHub(webhook_url=…, secret=…) as forge``.

    ``url`` is the REST address; ``guest_url`` the one written into runner configurations and clone addresses.
    """

    def __init__(
        self,
        *,
        webhook_url: str | None = None,
        secret: str = "",
        port: int = 0,
        guest_url: str | None = None,
        times: Times | None = None,
    ) -> None:
        self.webhooks = Webhooks(webhook_url, secret or secrets.token_urlsafe(24))
        self.actions = Actions(self._emit, times)
        self.faults = Faults()
        self.token = "ghp_" + secrets.token_urlsafe(30)
        self.rest = Rest(self.actions, self.webhooks, lambda runner: jit_config(runner, self.guest_url))
        self.rest.tokens[self.token] = Token(None, float("inf"))
        self.runner_api = RunnerApi(self.actions)
        self.calls: list[str] = []
        self.checks = Checks()
        self._guest_url = guest_url
        self._server = HttpServer(self._handle, port=port)
        self._control = HttpServer(Control(self).handle)
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://{self._server.host}:{self._server.port}"

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def control_url(self) -> str:
        return f"http://{self._control.host}:{self._control.port}/_standin/control"

    @property
    def guest_url(self) -> str:
        return (self._guest_url or self.url).replace("{port}", str(self.port)).rstrip("/")

    async def __aenter__(self) -> Self:
        await self._server.start()
        await self._control.start()
        await self.webhooks.start()
        self.rest.shapes = Shapes(self.url, self.url)
        self.runner_api.guest_url = self.guest_url
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await self._control.stop()
        await self._server.stop()
        await self.webhooks.stop()
        self.checks.fail_if_wrong()

    async def pause(self) -> None:
        """The server is away: no listener, every connection cut. State is kept."""
        await self._server.pause()

    async def resume(self) -> None:
        """The server is back on the same port."""
        await self._server.resume()

    # -- repositories, apps, runs ----------------------------------------------------------------

    async def add_repository(
        self, path: Path, *, owner: str = "octo-org", name: str | None = None, private: bool = True
    ) -> Repository:
        """Serve the git repository at ``path`` (work tree or bare) as ``owner/name``."""
        directory = await github_git.git_dir(path)
        branch = (await github_git.git(path, "symbolic-ref", "--short", "HEAD")).strip()
        repository = Repository(
            self.actions.new_id(), owner, name or path.name.removesuffix(".git"), directory, private, branch
        )
        self.actions.repositories[repository.full_name.lower()] = repository
        return repository

    def add_app(self, owner: str) -> AppCredentials:
        """A GitHub App with a fresh key, installed on ``owner``."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        client_id = "Iv23" + secrets.token_hex(8)
        app = App(self.actions.new_id(), client_id, key.public_key())
        installation_id = self.actions.new_id()
        app.installations[installation_id] = owner
        self.rest.apps[client_id] = self.rest.apps[str(app.id)] = app
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        return AppCredentials(client_id, installation_id, pem.decode())

    def rename(self, owner: str, repo: str, *, name: str) -> Repository:
        """The repository has another name from now on; the old one leads to it."""
        old = self.repository(owner, repo)
        del self.actions.repositories[old.full_name.lower()]
        self.rest.moved[old.full_name.lower()] = old.id
        for runner in self.actions.runners.values():
            if (runner.owner, runner.repo) == (old.owner, old.name):
                runner.repo = name
        old.name = name
        self.actions.repositories[old.full_name.lower()] = old
        return old

    def installation(self, app: AppCredentials, action: str) -> Sent:
        """Suspend, unsuspend, delete or create (again) an App's installation, and tell of it."""
        known = self.rest.apps[app.client_id]
        owner = known.installations.get(app.installation_id) or known.former.get(app.installation_id, "")
        if action == "suspend":
            known.suspended.add(app.installation_id)
        elif action == "deleted":
            known.former[app.installation_id] = known.installations.pop(app.installation_id)
        elif action in ("created", "unsuspend"):
            known.suspended.discard(app.installation_id)
            known.installations[app.installation_id] = owner
        for token in [v for v, one in self.rest.tokens.items() if one.owner == owner]:
            del self.rest.tokens[token]
        payload = {
            "action": action,
            "installation": {
                **self.rest.shapes.installation(app.installation_id, owner, known.id),
                "client_id": app.client_id,
            },
            "repositories": [
                {"id": one.id, "name": one.name, "full_name": one.full_name, "private": one.private}
                for one in self.actions.repositories.values()
                if one.owner == owner
            ],
            "sender": self.rest.shapes.user(owner),
        }
        return self.webhooks.send("installation", payload, installation_id=app.installation_id)

    async def queue_run(
        self, owner: str, repo: str, ref: str | None = None, *, workflow: str = WORKFLOW, event: str = "push"
    ) -> Run:
        """Run a workflow at ``ref`` (default: the default branch); sends the queued events."""
        repository = self.repository(owner, repo)
        branch = ref or repository.default_branch
        commit = await github_git.commit(repository.git_dir, branch)
        name, jobs = await github_git.workflow(repository.git_dir, commit["id"], workflow)
        run = Run(
            id=self.actions.new_id(),
            number=1 + sum(run.repository is repository for run in self.actions.runs.values()),
            repository=repository,
            sha=commit["id"],
            ref=f"refs/heads/{branch}",
            branch=branch,
            event=event,
            workflow_name=name,
            workflow_path=workflow,
            commit=commit,
            created_at=time.time(),
        )
        self.actions.add_run(run, jobs)
        return run

    async def push(
        self, owner: str, repo: str, branch: str | None = None, *, before: str | None = None
    ) -> Sent:
        """Tell of what the branch (default: the default branch) of the repository is now, as after a push.

        ``before``: what it was; by default the parent of its tip, or nothing. A branch that is gone was deleted.
        """
        repository = self.repository(owner, repo)
        branch = branch or repository.default_branch
        after, commits = "0" * 40, []
        if branch in await github_git.branches(repository.git_dir):
            tip = await github_git.commit(repository.git_dir, f"refs/heads/{branch}")
            after, commits = tip["id"], [tip]
            before = before or await github_git.parent_of(repository.git_dir, after) or "0" * 40
        payload = self.rest.shapes.push_event(
            repository,
            f"refs/heads/{branch}",
            before or "0" * 40,
            after,
            commits,
            self._installation(repository),
        )
        return self.webhooks.send(
            "push", payload, repository_id=repository.id, installation_id=self._installation(repository)
        )

    def repository(self, owner: str, repo: str) -> Repository:
        return self.actions.repositories[f"{owner}/{repo}".lower()]

    def ping(self, owner: str, repo: str) -> Sent:
        """What GitHub sends when a hook is set up."""
        repository = self.repository(owner, repo)
        url = f"{self.rest.shapes.repo_url(repository)}/hooks/{HOOK_ID}"
        config = {
            "content_type": "json",
            "insecure_ssl": "0",
            "url": self.webhooks.url or "",
            "secret": "********",
        }
        hook = {
            "type": "Repository",
            "id": HOOK_ID,
            "name": "web",
            "active": True,
            "events": ["push", "workflow_job"],
            "config": config,
            "updated_at": "2026-01-01T00:00:00Z",
            "created_at": "2026-01-01T00:00:00Z",
            "url": url,
            "test_url": f"{url}/test",
            "ping_url": f"{url}/pings",
            "deliveries_url": f"{url}/deliveries",
            "last_response": {"code": None, "status": "unused", "message": None},
        }
        payload = {
            "zen": "Keep it logically awesome.",
            "hook_id": HOOK_ID,
            "hook": hook,
            "repository": self.rest.shapes.repository(repository),
            "sender": self.rest.shapes.user("octocat"),
        }
        return self.webhooks.send("ping", payload, repository_id=repository.id)

    # -- watching --------------------------------------------------------------------------------

    def job(self, job_id: int) -> Job:
        return self.actions.jobs[job_id]

    def log(self, job_id: int) -> str:
        """The job's log so far."""
        return self.job(job_id).log.decode(errors="replace")

    async def wait_for(self, job: Job | int, status: str = "completed", timeout: float = 30.0) -> Job:
        """Until the job has this status or a later one. Raises TimeoutError that says where it stands."""
        job = self.job(job) if isinstance(job, int) else job
        order = ("waiting", "queued", "in_progress", "completed")
        try:
            await self.actions.until(lambda: order.index(job.status) >= order.index(status), timeout)
        except TimeoutError:
            raise TimeoutError(
                f"job {job.id} is {job.status}, not {status}; log:\n{self.log(job.id)[-2000:]}"
            ) from None
        return job

    async def wait_for_log(self, job: Job, text: str, timeout: float = 30.0) -> None:
        await self.actions.until(lambda: text.encode() in job.log, timeout)

    def fault(self, route: str, **kinds: Any) -> Fault:
        """Inject a fault; see ``github_faults.Fault``."""
        return self.faults.add(Fault(route, **kinds))

    # -- inside ----------------------------------------------------------------------------------

    def _emit(self, job: Job, action: str) -> None:
        repository = job.run.repository
        installation_id = self._installation(repository)
        payload = self.rest.shapes.workflow_job_event(job, action, installation_id)
        self.webhooks.send(
            "workflow_job", payload, repository_id=repository.id, installation_id=installation_id
        )

    def _installation(self, repository: Repository) -> int | None:
        return next(
            (
                number
                for app in self.rest.apps.values()
                for number, owner in app.installations.items()
                if owner.lower() == repository.owner.lower()
            ),
            None,
        )

    async def _handle(self, request: Request) -> Response:
        self.calls.append(f"{request.method} {request.path}")
        del self.calls[:-5000]
        path = self.rest.operation_path(request)
        routed = False

        async def route(asked: Request) -> Response:
            nonlocal routed
            routed = True
            response = await self._route(asked)
            self.checks.exchange(asked, path, response)
            return response

        try:
            return await self.faults.around(request, route)
        finally:
            if not routed:
                self.checks.request(request, path)

    async def _route(self, request: Request) -> Response:
        for part in (self.runner_api.handle, self.rest.handle, self._git):
            response = await part(request)
            if response is not None:
                return response
        return answer(404, {"message": "Not Found", "documentation_url": "", "status": "404"})

    async def _git(self, request: Request) -> Response | None:
        for repository in self.actions.repositories.values():
            for base in (f"/{repository.full_name}.git", f"/{repository.full_name}"):
                rest = request.path.removeprefix(base)
                if rest == request.path or rest not in (
                    "/info/refs",
                    "/git-upload-pack",
                    "/git-receive-pack",
                ):
                    continue
                if repository.private and not self._may_read(request, repository):
                    return Response(401, b"", {"www-authenticate": 'Basic realm="GitHub"'})
                return await github_git.serve(request, repository.git_dir, rest)
        return None

    def _may_read(self, request: Request, repository: Repository) -> bool:
        token = github_git.password(request.headers)
        known = self.rest.tokens.get(token or "")
        if known is not None and known.expires_at > time.time() and known.reads(repository):
            return True
        return any(
            job.token == token and job.run.repository is repository and job.status == "in_progress"
            for job in self.actions.jobs.values()
        )

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.actions.sweep()


async def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.standins.github", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--repo", type=Path, action="append", default=[], help="a git repository to serve")
    parser.add_argument("--owner", default="octo-org")
    parser.add_argument("--webhook", help="where to deliver events")
    parser.add_argument("--secret-file", type=Path, help="holds the webhook secret")
    parser.add_argument("--token-file", type=Path, help="written: a personal access token")
    parser.add_argument("--app-key-file", type=Path, help="written: the private key of an App on the owner")
    parser.add_argument("--guest-url", help="this server's address as guests write it; {port} is filled in")
    options = parser.parse_args(argv)
    secret = options.secret_file.read_text().strip() if options.secret_file else ""
    forge = StandinGitHub(
        webhook_url=options.webhook, secret=secret, port=options.port, guest_url=options.guest_url
    )
    async with forge:
        ready: dict[str, Any] = {
            "url": forge.url,
            "port": forge.port,
            "control": forge.control_url,
            "guest_url": forge.guest_url,
            "repositories": [],
        }
        for path in options.repo:
            repository = await forge.add_repository(path.resolve(), owner=options.owner)
            ready["repositories"].append(repository.full_name)
        if options.token_file:
            _write_secret(options.token_file, forge.token)
            ready["token_file"] = str(options.token_file)
        if options.app_key_file:
            app = forge.add_app(options.owner)
            _write_secret(options.app_key_file, app.private_key_pem)
            ready |= {"client_id": app.client_id, "installation_id": app.installation_id}
        print(json.dumps(ready), flush=True)
        await _until_signal()


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


async def _until_signal() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


@contextlib.asynccontextmanager
async def as_process(*argv: str) -> AsyncIterator[dict[str, Any]]:
    """The stand-in as its own process, for as long as the block lasts; yields what it printed when ready."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.standins.github", *argv, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        yield json.loads(line)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
