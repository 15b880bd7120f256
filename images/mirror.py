"""Bare mirrors of repositories on this host: fetched under a lock, read without a work tree, bounded in number.

    <root>/<id>.git            branches and tags of one address (``id`` is of the address); no others' commits
    <root>/locks/<id>.git      flock: one fetch at a time across processes

A fetch that dies leaves a mirror that the next one completes; one in which an object is missing is made anew.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from images import git_remote
from images.cache import Cache
from images.errors import BadRef, MirrorDamaged, MirrorError, RepositoryTimedOut, RepositoryTooLarge
from images.git_objects import DAMAGED, content, follow, reading, size
from images.git_remote import Credential, References, parse_url
from images.schema import closest

__all__ = ["Commit", "Credential", "Mirror", "fetch_mirror"]

_KEEP = 64
_MAX_MIB = 20 << 10
_WATCH_S = 0.5
_SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
# Of git's own counting, the tens of a per cent.
_PROGRESS = re.compile(r"Receiving objects: +(\d+)\d% ")
# What a mirror that was just begun points at: no branch of anybody.
_NO_BRANCH = "refs/microvm/none"
_CONFIG = (
    "[core]\n\trepositoryformatversion = 0\n\tbare = true\n"
    "[gc]\n\tautoDetach = false\n\tautoPackLimit = 30\n"
    # For the shallow copies of one commit that go into guests.
    "[uploadpack]\n\tallowAnySHA1InWant = true\n"
)


class Commit(msgspec.Struct, frozen=True):
    """``branch`` is the one asked for, or one the commit is on; None: the mirror knows of none."""

    sha: str
    branch: str | None


class Mirror(msgspec.Struct, frozen=True):
    """A repository as it was when last fetched. ``url`` has no user and password. Its methods block for
    milliseconds (one or two git processes each) and raise MirrorDamaged when it is incomplete or gone."""

    path: Path
    url: str

    @property
    def checkout_url(self) -> str:
        """The address as actions/checkout writes it: without ``.git`` at its end."""
        web = urlsplit(self.url).scheme in ("http", "https")
        return self.url.removesuffix(".git") if web else self.url

    def default_branch(self) -> str | None:
        """None: the repository's HEAD names no branch that exists."""
        with reading(self.path) as git:
            name = git.execute(["git", "symbolic-ref", "--quiet", "HEAD"]).removeprefix("refs/heads/")
        return name if name in self.branches() else None

    def branches(self) -> dict[str, str]:
        """Names of branches, without refs/heads/, to commits. Those that no screen can show are left out."""
        found = _references(self.path, "refs/heads/")
        return {name.removeprefix("refs/heads/"): sha for name, sha in found.items() if name.isprintable()}

    def resolve(self, ref: str | None = None) -> Commit:
        """A branch, a tag or a commit; the default branch for None. Raises BadRef."""
        branches, default = self.branches(), self.default_branch()
        if ref is None:
            if default is None:
                raise BadRef(f"{self.url} has no default branch; name a branch, tag or commit")
            return Commit(sha=branches[default], branch=default)
        if _SHA.fullmatch(ref) and (sha := self._commit(ref)):
            at = sorted(
                (name for name, tip in branches.items() if tip == sha),
                key=lambda name: (name != default, name),
            )
            if not at and default is not None and self.on_branch(sha, default):
                at = [default]
            return Commit(sha=sha, branch=next(iter(at), None))
        name = ref.removeprefix("refs/heads/")
        if name in branches:
            return Commit(sha=branches[name], branch=name)
        tag = f"refs/tags/{ref.removeprefix('refs/tags/')}"
        if tag in _references(self.path, "refs/tags/") and (sha := self._commit(tag)):
            return Commit(sha=sha, branch=None)
        shown = "".join(char if char.isprintable() else "?" for char in ref)[:200]
        raise BadRef(
            f"{shown!r} is no branch, tag or commit of {self.url}{closest(shown, list(branches)[:1000])}"
        )

    def on_branch(self, sha: str, branch: str) -> bool:
        """Whether the commit is the branch's tip or in its history. What others proposed (a pull request from
        a fork) is on no branch of this repository; what a force push took away is on it no longer."""
        tip = self.branches().get(branch)
        if tip is None or not _SHA.fullmatch(sha):
            return False
        with reading(self.path) as git:
            argv = ["git", "merge-base", "--is-ancestor", sha, tip]
            status, _, _ = git.execute(argv, with_extended_output=True, with_exceptions=False)
        return status == 0

    def read(self, commit: str, path: str, limit: int) -> bytes | None:
        """A file at a commit, links inside the repository followed; None when there is none. Raises
        RepositoryTooLarge when it has more than ``limit`` bytes."""
        with reading(self.path) as git:
            blob = follow(git, commit, [path.encode()])[0]
            if blob is None:
                return None
            if size(git, blob) > limit:
                raise RepositoryTooLarge(
                    f"{path} of {self.url} is larger than {limit} bytes. Make it shorter"
                )
            return content(git, blob)

    async def work_tree_tar(
        self, commit: Commit, target: Path, *, origin: str | None = None, timeout: float = 300
    ) -> None:
        """Write a tar with one directory, ``.git``: the commit without its history, HEAD on it, and its branch
        as the remote ``origin`` has it. ``git reset --hard`` then makes the work tree.

        ``origin`` is the remote's address in the guest; without it ``checkout_url``, so that a checkout there goes
        on with what it finds.
        Raises MirrorError.
        """
        name = f"refs/remotes/origin/{commit.branch}" if commit.branch else "refs/microvm/parent"
        words = ["fetch", "--quiet", "--no-tags", "--no-auto-gc", "--no-write-fetch-head", "--depth=1", "--"]
        words += [f"file://{self.path.absolute()}", f"{commit.sha}:{name}"]
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                git_dir = Path(scratch) / ".git"
                async with asyncio.timeout(timeout):
                    await asyncio.to_thread(_begin, git_dir)
                    await git_remote.run(git_dir, words, url=self.url, doing="copy a commit of")
                await asyncio.to_thread(_pack, git_dir, commit.sha, origin or self.checkout_url, target)
        except TimeoutError:
            message = f"copying {commit.sha} of {self.url} was not done after {timeout:g} s"
            raise RepositoryTimedOut(f"{message}. Is this host's disk busy?") from None

    def _commit(self, name: str) -> str | None:
        with reading(self.path) as git:
            argv = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
            _, sha, _ = git.execute(argv, with_extended_output=True, with_exceptions=False)
        return sha or None


def _references(path: Path, prefix: str) -> dict[str, str]:
    with reading(path) as git:
        argv = ["git", "for-each-ref", "--format=%(objectname) %(refname)", prefix]
        listing = git.execute(argv, stdout_as_string=False)
    rows = (line.partition(" ") for line in listing.decode(errors="surrogateescape").splitlines())
    return {name: sha for sha, _, name in rows}


async def fetch_mirror(
    root: Path,
    url: str,
    *,
    credential: Credential | None = None,
    timeout: float = 300,
    say: Callable[[str], None] = lambda _message: None,
    keep: int = _KEEP,
    max_mib: int = _MAX_MIB,
) -> Mirror:
    """Bring the branches and tags of a repository here, or up to date, and return their mirror.

    One request when nothing has changed. ``timeout`` covers waiting for another fetch of the same repository.
    A user and password in ``url`` serve as ``credential`` and are kept nowhere. The ``keep`` mirrors last used
    stay. Raises MirrorError, see its tree.
    """
    address, own = parse_url(url)
    name = f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.git"
    mirror = Mirror(path=root / name, url=address)
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    locks = Cache(root)
    doing = f"waiting for another fetch of {address}"
    try:
        async with asyncio.timeout(timeout), locks.locked(name, waiting=lambda: say(doing)):
            doing = f"fetching {address}"
            say(doing)
            try:
                await _update(mirror, credential or own, say, max_mib)
            except MirrorDamaged:
                say(f"the mirror of {address} is damaged: fetching everything again")
                await asyncio.to_thread(shutil.rmtree, mirror.path, ignore_errors=True)
                await _update(mirror, credential or own, say, max_mib)
    except TimeoutError:
        raise RepositoryTimedOut(
            f"{doing} was not done after {timeout:g} s. Allow it more time, or see what holds it up"
        ) from None
    await asyncio.to_thread(_prune, locks, root, keep, name)
    return mirror


async def _update(
    mirror: Mirror, credential: Credential | None, say: Callable[[str], None], max_mib: int
) -> None:
    path = mirror.path
    fresh = not (path / "HEAD").exists()
    if (path / DAMAGED).exists():
        raise MirrorDamaged(f"the mirror {path} is incomplete")
    try:
        await asyncio.to_thread(_begin, path)
        theirs = await git_remote.references(path, mirror.url, credential)
        ours = await asyncio.to_thread(_references, path, "refs/")
        if ours != theirs.objects:
            await _fetch(mirror, credential, say, max_mib)
        await asyncio.to_thread(_point, path, theirs)
    except BaseException:
        if fresh:  # a mirror that exists has been fetched
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
        raise
    os.utime(path)


async def _fetch(
    mirror: Mirror, credential: Credential | None, say: Callable[[str], None], max_mib: int
) -> None:
    told = ""

    def heard(line: str) -> None:
        nonlocal told
        progress = _PROGRESS.match(line)
        if progress is not None and progress[1] != told:
            told = progress[1]
            say(f"fetching {mirror.url}: {told}0 %")

    words = [
        "fetch",
        "--progress",
        "--prune",
        "--force",
        "--no-tags",
        "--no-auto-gc",
        "--no-write-fetch-head",
    ]
    words += ["--update-shallow", "--", mirror.url, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]
    fetching = asyncio.create_task(
        git_remote.run(
            mirror.path, words, url=mirror.url, doing="fetch", credential=credential, on_line=heard
        )
    )
    try:
        while not (await asyncio.wait([fetching], timeout=_WATCH_S))[0]:
            _check_size(mirror, max_mib)
        await fetching
        _check_size(mirror, max_mib)
    finally:
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
    with contextlib.suppress(MirrorError):  # what is fetched is fetched
        await git_remote.run(
            mirror.path, ["gc", "--auto", "--quiet"], url=mirror.url, doing="tidy the mirror of"
        )


def _check_size(mirror: Mirror, max_mib: int) -> None:
    size = 0
    with os.scandir(mirror.path / "objects" / "pack") as files:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                size += file.stat().st_size
    if size > max_mib << 20:
        raise RepositoryTooLarge(
            f"{mirror.url} needs more than {max_mib} MiB, the most this host keeps of one repository"
        )


def _begin(path: Path) -> None:
    """Make it a bare repository, and remove what a killed git left. The caller holds the lock."""
    for part in ("objects/pack", "objects/info", "refs/heads", "refs/tags"):
        (path / part).mkdir(parents=True, exist_ok=True, mode=0o700)
    config = path / "config"
    if not config.exists() or config.read_text() != _CONFIG:  # somebody may be reading it
        config.write_text(_CONFIG)
    if not (path / "HEAD").exists():
        (path / "HEAD").write_text(f"ref: {_NO_BRANCH}\n")
    left = [*path.glob("*.lock"), *(path / "refs").rglob("*.lock"), *path.glob("objects/pack/tmp_*")]
    for file in left:
        file.unlink(missing_ok=True)


def _point(path: Path, theirs: References) -> None:
    with reading(path) as git:
        git.execute(["git", "symbolic-ref", "HEAD", theirs.default or _NO_BRANCH])


def _prune(locks: Cache, root: Path, keep: int, newest: str) -> None:
    """Remove the mirrors used longest ago, but none that is being fetched."""
    found = sorted(
        root.glob("*.git"), key=lambda path: (path.name == newest, path.stat().st_mtime), reverse=True
    )
    for path in found[keep:]:
        if locks.is_free(path.name):
            doomed = path.with_suffix(".old")
            with contextlib.suppress(OSError):
                path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _pack(git_dir: Path, sha: str, origin: str, target: Path) -> None:
    """The repository's directory as a tar. Nothing of this host is in it: no owner, no path, no time of today."""
    with reading(git_dir) as git:
        for key, value in (
            ("core.bare", "false"),
            ("remote.origin.url", origin),
            ("remote.origin.fetch", "+refs/heads/*:refs/remotes/origin/*"),
        ):
            git.execute(["git", "config", "--file", str(git_dir / "config"), key, value])
        for section in ("gc", "uploadpack"):
            git.execute(["git", "config", "--file", str(git_dir / "config"), "--remove-section", section])
    (git_dir / "HEAD").write_text(f"{sha}\n")

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(target, "w") as tar:
        tar.add(git_dir, arcname=".git", filter=plain)
