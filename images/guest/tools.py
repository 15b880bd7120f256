"""Runs in the guest at the end of a bake: prints the versions of the tools it has as one JSON object.

    python3 -I -S -c PROGRAM

A tool that is missing, fails or takes too long is left out. Standard library only, Python ≥ 3.9.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

_TIMEOUT_S = 60
_COMMANDS = {
    "bun": "bun --version",
    "cargo": "cargo --version",
    "composer": "composer --version",
    "deno": "deno --version",
    "dotnet": "dotnet --version",
    "gcc": "gcc --version",
    "git": "git --version",
    "go": "go version",
    "java": "java -version",
    "kernel": "uname -r",
    "maven": "mvn --version",
    "mix": "mix --version",
    "node": "node --version",
    "npm": "npm --version",
    "php": "php --version",
    "pip": "pip --version",
    "pnpm": "pnpm --version",
    "poetry": "poetry --version",
    "postgresql": "psql --version",
    "python": "python3 --version",
    "ruby": "ruby --version",
    "rustc": "rustc --version",
    "uv": "uv --version",
    "yarn": "yarn --version",
}
_VERSION = re.compile(r"\d+(?:\.\d+)+[0-9A-Za-z.+-]*")


def packaged(command: str) -> "str | None":
    """The version that a package of Node.js or Python tells of itself: starting it takes seconds under emulation."""
    name = command.split(maxsplit=1)[0]
    program = os.path.realpath(shutil.which(name) or "")
    directory, found, _ = program.partition(f"/node_modules/{name}/")
    if found:
        try:
            with open(f"{directory}{found}package.json", encoding="utf-8") as file:
                return str(json.load(file)["version"])[:40]
        except (OSError, ValueError, KeyError):
            return None
    if name == "pip":
        paths = glob.glob("/usr/local/lib/python3*/site-packages/pip-*.dist-info")
        return os.path.basename(paths[0])[4:-10] if len(paths) == 1 else None
    return None


def version(command: str) -> "str | None":
    """The first thing that looks like a version in what a command says."""
    try:
        told = subprocess.run(
            command.split(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION.search(told.stdout.decode("utf-8", "replace"))
    return found.group(0)[:40] if found and told.returncode == 0 else None


def main() -> None:
    found = {name: packaged(command) or version(command) for name, command in _COMMANDS.items()}
    sys.stdout.write(json.dumps({name: text for name, text in found.items() if text is not None}) + "\n")


if __name__ == "__main__":
    main()
