"""The names of snapshots: what may be one, and the link that says which snapshot it means.

    names/<name, percent-quoted> ──► ../snapshots/<digest>, replaced by rename: it never means nothing
    names/%%<SHA-256 of the name> ──► ../snapshots/<digest>/<name, percent-quoted>, where that is too long for a file

Names are those of templates (``python-ci``) and of the parents of repositories, ``owner/repo@branch``. Whoever
chose the branch is hostile: no name, whatever is in it, is a path.
"""

import contextlib
import hashlib
import os
import re
import uuid
from pathlib import Path
from urllib.parse import quote, unquote

from vmm_core.errors import BadRequest

_TEMPLATE = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
# GitLab nests groups: the repository is the last of two or more words.
_REPOSITORY = re.compile(r"[a-z0-9_][a-z0-9._-]{0,99}(?:/(?!\.{1,2}(?:/|$))[a-z0-9._-]{1,100}){1,20}")
_REPOSITORY_BYTES, _BRANCH_BYTES, _FILE_BYTES = 300, 200, 200
# git-check-ref-format(1), for a branch.
_NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|/$|\.$|(?:^|/)\.|\.lock(?:/|$)|^@$")


class Names:
    """The names in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def all(self) -> dict[str, str]:
        """Every name and the digest it means."""
        return {name: digest for _, name, digest in self._links()}

    def set(self, name: str, digest: str) -> None:
        """Let ``name`` mean ``digest``, durably. BadRequest when that is no name."""
        link = self._directory / _file_of(name)
        target = Path("..") / "snapshots" / digest
        draft = self._directory / f".{uuid.uuid4().hex}"
        draft.symlink_to(target / quote(name, safe="") if link.name.startswith("%%") else target)
        draft.replace(link)
        self._sync()

    def unset(self, name: str) -> None:
        """Let ``name`` mean nothing, durably; also when it did before. BadRequest when that is no name."""
        (self._directory / _file_of(name)).unlink(missing_ok=True)
        self._sync()

    def forget(self, digest: str) -> None:
        """Let no name mean ``digest`` any more."""
        for link, _, meaning in self._links():
            if meaning == digest:
                link.unlink(missing_ok=True)
        self._sync()

    def _links(self) -> list[tuple[Path, str, str]]:
        """Each link, its name and its digest."""
        found: list[tuple[Path, str, str]] = []
        for link in self._directory.iterdir():
            with contextlib.suppress(OSError):  # unset meanwhile, or no link
                target = link.readlink()
                if link.name.startswith("%%"):
                    found.append((link, unquote(target.name), target.parent.name))
                elif not link.name.startswith("."):
                    found.append((link, unquote(link.name), target.name))
        return found

    def _sync(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_name(name: str) -> None:
    """Raise BadRequest, saying what may be one, unless ``name`` can be the name of a snapshot."""
    repository, at, branch = name.partition("@")
    if not at:
        good = _TEMPLATE.fullmatch(name) is not None
    else:
        good = (
            len(repository) <= _REPOSITORY_BYTES
            and _REPOSITORY.fullmatch(repository) is not None
            and 0 < _size(branch) <= _BRANCH_BYTES
            and not _NO_BRANCH.search(branch)
        )
    if not good:
        raise BadRequest(
            f"{name[:300]!r} is no name of a snapshot: it is a template's (lower-case letters, digits, '.', '_' "
            f"and '-', at most 100) or a repository's, owner/repo@branch (owner and repo in lower case, branch as "
            f"git has it, at most {_BRANCH_BYTES} bytes)"
        )


def _size(branch: str) -> int:
    """In bytes; 0 for what is no UTF-8, as git lets a branch be."""
    try:
        return len(branch.encode())
    except UnicodeEncodeError:
        return 0


def _file_of(name: str) -> str:
    check_name(name)
    quoted = quote(name, safe="")
    return quoted if len(quoted) <= _FILE_BYTES else f"%%{hashlib.sha256(name.encode()).hexdigest()}"
