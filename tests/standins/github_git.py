"""The repositories of the stand-in GitHub: real smart HTTP by ``git http-backend``, and their workflows."""

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml

from tests.standins.github_http import Request, Response

_ENV = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "HOME": "/nonexistent",
    "LANG": "C.UTF-8",
    "GIT_CONFIG_NOSYSTEM": "1",
    # As at GitHub: any commit can be asked for. And the repository may belong to somebody else than us.
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    "GIT_CONFIG_KEY_1": "uploadpack.allowAnySHA1InWant",
    "GIT_CONFIG_VALUE_1": "true",
}


class WorkflowError(Exception):
    """The workflow cannot be run here; the message says why."""


async def git(directory: Path, *args: str) -> str:
    """Output of a git command. Raises WorkflowError with git's own words."""
    process = await asyncio.create_subprocess_exec(
        "git", "-C", str(directory), *args, env=_ENV,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    if process.returncode:
        raise WorkflowError(f"git {' '.join(args)}: {err.decode(errors='replace').strip()}")
    return out.decode()


async def git_dir(path: Path) -> Path:
    """The git directory of a work tree or bare repository."""
    found = (await git(path, "rev-parse", "--absolute-git-dir")).strip()
    return Path(found)


async def commit(directory: Path, ref: str) -> dict[str, Any]:
    """The commit ``ref`` points at, as GitHub shows it."""
    pretty = "%H%x00%T%x00%cI%x00%an%x00%ae%x00%cn%x00%ce%x00%B"
    text = await git(directory, "log", "-1", f"--format={pretty}", ref, "--")
    sha, tree, at, author, author_mail, committer, committer_mail, message = text.split("\0", 7)
    return {
        "id": sha,
        "tree_id": tree,
        "message": message.strip(),
        "timestamp": at,
        "author": {"name": author, "email": author_mail},
        "committer": {"name": committer, "email": committer_mail},
    }


async def branches(directory: Path) -> list[str]:
    """The names of the branches."""
    return (await git(directory, "for-each-ref", "--format=%(refname:short)", "refs/heads")).split()


async def parent_of(directory: Path, sha: str) -> str | None:
    """The first parent of a commit; None for the first one of all."""
    parents = (await git(directory, "log", "-1", "--format=%P", sha)).split()
    return parents[0] if parents else None


async def workflow(directory: Path, sha: str, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Name and jobs (key → definition) of the workflow file at ``path``."""
    text = await git(directory, "show", f"{sha}:{path}")
    document = yaml.safe_load(text)
    if not isinstance(document, dict) or not isinstance(document.get("jobs"), dict) or not document["jobs"]:
        raise WorkflowError(f"{path}: no jobs")
    env = _strings(document.get("env"), f"{path}: env")
    jobs = {key: _job(f"{path}: jobs.{key}", key, job, env) for key, job in document["jobs"].items()}
    return str(document.get("name") or path), jobs


def _job(where: str, key: str, job: Any, env: dict[str, str]) -> dict[str, Any]:
    if not isinstance(job, dict) or "runs-on" not in job or not isinstance(job.get("steps"), list):
        raise WorkflowError(f"{where}: runs-on and steps are needed")
    runs_on = job["runs-on"]
    if isinstance(runs_on, dict):
        runs_on = runs_on.get("labels", [])
    environment = job.get("environment")
    needs = job.get("needs", [])
    return {
        "name": str(job.get("name") or key),
        "labels": [runs_on] if isinstance(runs_on, str) else [str(label) for label in runs_on],
        "needs": [needs] if isinstance(needs, str) else list(needs),
        "environment": environment.get("name") if isinstance(environment, dict) else environment,
        "env": {**env, **_strings(job.get("env"), f"{where}.env")},
        "steps": [_step(f"{where}.steps[{n}]", step) for n, step in enumerate(job["steps"])],
    }


def _step(where: str, step: Any) -> dict[str, Any]:
    if not isinstance(step, dict) or ("run" in step) == ("uses" in step):
        raise WorkflowError(f"{where}: exactly one of run and uses is needed")
    if "uses" in step and not str(step["uses"]).startswith("actions/checkout@"):
        raise WorkflowError(f"{where}: only actions/checkout can be used here, not {step['uses']}")
    body = {"run": str(step["run"])} if "run" in step else {"uses": str(step["uses"])}
    first_line = (body.get("run") or body["uses"]).strip().partition("\n")[0]
    return {
        **body,
        "name": str(step.get("name") or f"Run {first_line}"),
        "env": _strings(step.get("env"), f"{where}.env"),
        "working_directory": step.get("working-directory"),
        "continue_on_error": bool(step.get("continue-on-error", False)),
        "always": str(step.get("if", "")).strip().strip("${} ") == "always()",
    }


def _strings(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WorkflowError(f"{where}: a mapping is needed")
    return {str(k): str(v) for k, v in value.items()}


def password(headers: dict[str, str]) -> str | None:
    """The token of a git client: the password of Basic, or a Bearer."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except ValueError:
        return None


async def serve(request: Request, directory: Path, rest: str) -> Response:
    """Run ``git http-backend`` for ``rest`` (as ``/info/refs``) below the git directory."""
    service = request.query.get("service", rest.lstrip("/"))
    if service != "git-upload-pack":
        return Response(403, b"pushing over HTTP is not served here\n", {"content-type": "text/plain"})
    env = {
        **_ENV,
        "GATEWAY_INTERFACE": "CGI/1.1",
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_PROJECT_ROOT": str(directory),
        "PATH_INFO": rest,
        "QUERY_STRING": "&".join(f"{k}={v}" for k, v in request.query.items()),
        "REQUEST_METHOD": request.method,
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(request.body)),
        "REMOTE_ADDR": request.peer,
    }
    if "git-protocol" in request.headers:
        env["GIT_PROTOCOL"] = request.headers["git-protocol"]
    if "content-encoding" in request.headers:
        env["HTTP_CONTENT_ENCODING"] = request.headers["content-encoding"]
    process = await asyncio.create_subprocess_exec(
        "git", "http-backend", env=env,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        # It may answer, and end, without reading its input.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(request.body)
            await process.stdin.drain()
            process.stdin.close()
        status, headers = await _cgi_head(process.stdout)
    except BaseException:
        await _end(process)
        raise
    return Response(status, _body(process), headers)


async def _cgi_head(stdout: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status, headers = 200, {}
    async with asyncio.timeout(60):
        while line := (await stdout.readline()).decode("latin-1").strip():
            name, _, value = line.partition(":")
            if name.lower() == "status":
                status = int(value.split()[0])
            elif name.lower() != "content-length":
                headers[name.lower()] = value.strip()
    return status, headers


async def _body(process: asyncio.subprocess.Process) -> AsyncIterator[bytes]:
    assert process.stdout is not None
    try:
        while chunk := await process.stdout.read(65536):
            yield chunk
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        try:
            async with asyncio.timeout(0.5):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
