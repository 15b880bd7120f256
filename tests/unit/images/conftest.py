"""Real repositories, made in a moment, to mirror and to take stock of."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

_ENV = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{
        f"GIT_{who}_{what}": text
        for who in ("AUTHOR", "COMMITTER")
        for what, text in (("NAME", "n"), ("EMAIL", "n@localhost"))
    },
}


class Origin:
    """A bare repository that others push to. Trees are given as a whole: path → content, ``Link`` or ``Submodule``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "-q", "--bare", "--initial-branch=main")

    def git(self, *args: str, stdin: bytes | None = None) -> str:
        argv = ["git", "-C", str(self.path), *args]
        return (
            subprocess.run(argv, env=_ENV, input=stdin, check=True, capture_output=True, timeout=60)
            .stdout.decode()
            .strip()
        )

    def commit(
        self,
        files: Mapping[str | bytes, "bytes | str | Link | Submodule"],
        branch: str = "main",
        parent: str | None = None,
    ) -> str:
        """A commit of exactly these files on the branch, after its tip (``parent`` "" begins anew). Returns its id."""
        ref = f"refs/heads/{branch}"
        tips = self.git("for-each-ref", "--format=%(objectname)", ref)
        parent = tips if parent is None else parent
        lines = [f"commit {ref}\ncommitter n <n@localhost> 1700000000 +0000\ndata 1\nx\n".encode()]
        lines += [f"from {parent}\n".encode()] if parent else []
        lines += [b"deleteall\n"]
        for path, content in files.items():
            name = b'"' + _quoted(path if isinstance(path, bytes) else path.encode()) + b'"'
            if isinstance(content, Submodule):
                lines.append(b"M 160000 " + content.encode() + b" " + name + b"\n")
                continue
            data = content.encode() if isinstance(content, str) else content
            mode = b"120000" if isinstance(content, Link) else b"100644"
            lines += [b"M " + mode + b" inline " + name + b"\n", b"data %d\n" % len(data), data, b"\n"]
        self.git("fast-import", "--quiet", "--force", stdin=b"".join(lines))
        return self.git("rev-parse", ref)


class Link(str):
    """What a symbolic link says."""


class Submodule(str):
    """The commit a submodule is at."""


def _quoted(path: bytes) -> bytes:
    return b"".join(
        bytes([byte]) if 32 <= byte < 127 and byte not in b'"\\' else b"\\%03o" % byte for byte in path
    )


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin(tmp_path / "origin.git")
