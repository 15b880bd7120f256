"""Reads objects of a bare mirror through GitPython: trees of any size, blobs in bulk, never a work tree.

Whoever pushed wrote these objects: a tree may repeat itself without end, a name may hold any byte, a link may
point anywhere. Every reading here has a bound. All of it blocks, for milliseconds: call it on a thread.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import git
from git.exc import GitCommandError

from images.errors import MirrorDamaged, RepositoryTooLarge
from images.git_remote import ENVIRONMENT

_DEADLINE_S = 60.0
_CHUNK = 1 << 20
_MAX_ENTRIES = 2_000_000
_MAX_LISTING = 512 << 20
LINK, SUBMODULE = b"120000", b"160000"
# Left in a mirror in which something was missing; the next fetch begins it anew.
DAMAGED = "damaged"


class Entry(NamedTuple):
    """One line of a tree. Most of a tree is looked at and dropped: a tuple is quickest."""

    mode: bytes
    id: str
    path: bytes


@contextlib.contextmanager
def reading(mirror: Path) -> Generator[git.Git]:
    """git's commands in the mirror, without this host's configuration. Raises MirrorDamaged where one fails."""
    commands = git.Git(mirror)
    commands.update_environment(**ENVIRONMENT, GIT_DIR=str(mirror))
    try:
        yield commands
    except (GitCommandError, ValueError) as error:  # ValueError: an object that is not there
        with contextlib.suppress(OSError):
            (mirror / DAMAGED).touch()
        raise MirrorDamaged(
            f"the mirror {mirror} cannot be read: {str(error)[-300:]}. Fetch the repository again: it is made anew"
        ) from None
    finally:
        commands.clear_cache()


def entries(commands: git.Git, commit: str, wanted: Callable[[bytes, bytes], bool]) -> list[Entry]:
    """The entries below a commit for which ``wanted(mode, path)`` holds. Raises RepositoryTooLarge."""
    listing = _Listing(wanted)
    commands.execute(
        ["git", "ls-tree", "-r", "-z", "--full-tree", commit],
        output_stream=cast("BinaryIO", listing),
        kill_after_timeout=_DEADLINE_S,
        max_chunk_size=_CHUNK,
    )
    return listing.found


class _Listing:
    """Takes what ``ls-tree -z`` writes, as it comes."""

    def __init__(self, wanted: Callable[[bytes, bytes], bool]) -> None:
        self.found: list[Entry] = []
        self._wanted = wanted
        self._pending = b""
        self._count = self._size = 0

    def write(self, data: bytes) -> int:
        *records, self._pending = (self._pending + data).split(b"\0")
        self._count += len(records)
        self._size += len(data)
        if self._count > _MAX_ENTRIES or self._size > _MAX_LISTING:
            raise RepositoryTooLarge(
                f"the tree of the commit has more than {_MAX_ENTRIES} files or {_MAX_LISTING >> 20} MiB of names"
            )
        for record in records:
            about, _, path = record.partition(b"\t")
            mode = about[:6]
            if self._wanted(mode, path):
                self.found.append(Entry(mode, about.rpartition(b" ")[2].decode(), path))
        return len(data)


def size(commands: git.Git, blob: str) -> int:
    """Bytes of an object."""
    return commands.get_object_header(blob)[2]


def content(commands: git.Git, blob: str) -> bytes:
    """An object as a whole: ask for its size first."""
    return commands.get_object_data(blob)[3]


def follow(commands: git.Git, commit: str, paths: Sequence[bytes]) -> list[str | None]:
    """The blob each path means when links inside the repository are followed; None: a link that leads nowhere,
    out of the repository or in a circle, a directory, or a name with a line break, which git cannot be asked."""
    asked = [f"{commit}:".encode() + path for path in paths if b"\n" not in path]
    output = _batch(commands, ["--batch-check", "--follow-symlinks"], asked)
    answers = iter(_answers(output))
    return [None if b"\n" in path else next(answers) for path in paths]


def _batch(commands: git.Git, options: list[str], asked: Iterable[bytes]) -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(line + b"\n" for line in asked))
        file.seek(0)
        return commands.execute(
            ["git", "cat-file", *options],
            istream=cast("BinaryIO", file),
            stdout_as_string=False,
            strip_newline_in_stdout=False,
            kill_after_timeout=_DEADLINE_S,
        )


def _answers(output: bytes) -> Generator[str | None]:
    """``ID blob SIZE``, ``NAME missing``, or ``symlink|dangling|loop|notdir LENGTH`` and that many bytes."""
    while output:
        line, _, output = output.partition(b"\n")
        if special := re.fullmatch(rb"(?:symlink|dangling|loop|notdir) (\d+)", line):
            output = output[int(special[1]) + 1 :]
            yield None
        else:
            words = line.split(b" ")
            yield words[0].decode() if len(words) == 3 and words[1] == b"blob" else None
