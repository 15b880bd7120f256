"""Mirrors follow their repository, tell what cannot be fetched and why, and keep a password to themselves."""

import asyncio
import contextlib
import io
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from rich.pretty import pretty_repr

from images import mirror as mirror_module
from images.errors import (
    BadRef,
    BadRepositoryUrl,
    MirrorDamaged,
    MirrorError,
    RepositoryDenied,
    RepositoryEmpty,
    RepositoryTimedOut,
    RepositoryTooLarge,
    RepositoryUnreachable,
)
from images.git_remote import parse_url
from images.lockfiles import inventory
from images.mirror import Commit, Credential, Mirror, fetch_mirror
from tests.standins import github_git
from tests.standins.github_http import HttpServer, Request, Response
from tests.unit.images.conftest import Link


@pytest.fixture
def fetch(tmp_path, origin):
    async def fetch(url: str | None = None, **options) -> Mirror:
        return await fetch_mirror(tmp_path / "mirrors", url or str(origin.path), **options)

    return fetch


# --- what a mirror tells ---------------------------------------------------------------------------------


async def test_a_mirror_knows_branches_tags_and_the_default(fetch, origin):
    first = origin.commit({"go.sum": "1"})
    second = origin.commit({"go.sum": "2"}, "release/1.2", parent=first)
    origin.git("tag", "-a", "-m", "x", "v1", first)
    mirror = await fetch()
    assert mirror.branches() == {"main": first, "release/1.2": second}
    assert mirror.default_branch() == "main"
    assert (
        mirror.resolve()
        == mirror.resolve("main")
        == mirror.resolve("refs/heads/main")
        == Commit(first, "main")
    )
    assert mirror.resolve("release/1.2") == mirror.resolve(second) == Commit(second, "release/1.2")
    assert mirror.resolve(first) == Commit(first, "main")
    assert mirror.resolve("v1") == mirror.resolve("refs/tags/v1") == Commit(first, None)
    assert mirror.read(second, "go.sum", 100) == b"2"
    assert [file.path for file in inventory(mirror.path, second).files] == ["go.sum"]


async def test_a_file_is_read_within_its_limit(fetch, origin):
    sha = origin.commit(
        {
            ".microvm.yml": Link("ci/vm.yml"),
            "ci/vm.yml": "install: no\n",
            "a/b": "",
            "out": Link("/etc/hosts"),
        }
    )
    mirror = await fetch()
    assert mirror.read(sha, ".microvm.yml", 12) == b"install: no\n"
    assert [mirror.read(sha, path, 9) for path in ("none", "a", "out", "a/b")] == [None, None, None, b""]
    with pytest.raises(RepositoryTooLarge, match=r"\.microvm\.yml .*larger than 11 bytes"):
        mirror.read(sha, ".microvm.yml", 11)


@pytest.mark.parametrize(
    "ref", ["mian", "1" * 40, "--all", "main^", "main:go.sum", "HEAD", "@{-1}", "../../x", "a\n\x1b[0m", ""]
)
async def test_a_bad_ref_is_named(fetch, origin, ref):
    origin.commit({"go.sum": "1"})
    with pytest.raises(BadRef) as caught:
        (await fetch()).resolve(ref)
    assert str(caught.value).isprintable()
    assert caught.value.code == "bad_ref"
    if ref == "mian":
        assert "did you mean 'main'?" in str(caught.value)


async def test_a_commit_of_a_fork_is_on_no_branch(fetch, origin):
    tip = origin.commit({"go.sum": "1"})
    foreign = origin.commit({"go.sum": "evil"}, "stranger")
    origin.git("update-ref", "refs/pull/1/head", foreign)  # as a forge keeps a fork's proposal
    origin.git("update-ref", "-d", "refs/heads/stranger")
    mirror = await fetch()
    assert mirror.on_branch(tip, "main")
    assert not mirror.on_branch(foreign, "main")
    assert not mirror.on_branch(tip, "stranger")
    assert not mirror.on_branch("main", "main")
    with pytest.raises(BadRef):
        mirror.resolve(foreign)


async def test_a_repository_whose_head_names_nothing_has_no_default(fetch, origin):
    origin.commit({"go.sum": "1"}, "work")
    mirror = await fetch()
    assert mirror.default_branch() is None
    assert mirror.resolve("work").branch == "work"
    with pytest.raises(BadRef, match="no default branch"):
        mirror.resolve()


# --- what happens to repositories ------------------------------------------------------------------------


async def test_a_mirror_follows_pushes_force_pushes_and_renames(fetch, origin):
    first = origin.commit({"go.sum": "1"})
    second = origin.commit({"go.sum": "2"})
    origin.commit({"go.sum": "1"}, "topic")
    assert (await fetch()).branches()["main"] == second
    forced = origin.commit({"go.sum": "3"}, parent=first)
    origin.git("update-ref", "-d", "refs/heads/topic")
    below = origin.commit({"go.sum": "4"}, "topic/below")
    origin.git("symbolic-ref", "HEAD", "refs/heads/topic/below")
    mirror = await fetch()
    assert mirror.branches() == {"main": forced, "topic/below": below}
    assert mirror.default_branch() == "topic/below"
    assert mirror.on_branch(first, "main")
    assert not mirror.on_branch(second, "main")


async def test_a_fetch_of_nothing_new_is_one_question(fetch, origin, monkeypatch):
    origin.commit({"go.sum": "1"})
    await fetch()
    monkeypatch.setattr(mirror_module, "_fetch", None)
    assert (await fetch()).resolve().branch == "main"


async def test_a_shallow_repository_is_taken_as_it_is(fetch, origin, tmp_path):
    origin.commit({"go.sum": "1"})
    origin.commit({"go.sum": "2"})
    origin.git("clone", "-q", "--bare", "--depth=1", f"file://{origin.path}", str(tmp_path / "shallow.git"))
    mirror = await fetch(str(tmp_path / "shallow.git"))
    commit = mirror.resolve()
    assert mirror.read(commit.sha, "go.sum", 9) == b"2"
    await mirror.work_tree_tar(commit, tmp_path / "tree.tar")


async def test_an_empty_repository_says_so_and_leaves_nothing(fetch, origin, tmp_path):
    with pytest.raises(RepositoryEmpty, match="Push a first commit"):
        await fetch()
    assert list((tmp_path / "mirrors").glob("*.git")) == []
    origin.commit({"go.sum": "1"})
    assert (await fetch()).default_branch() == "main"


async def test_what_a_killed_fetch_left_is_no_hindrance(fetch, origin):
    origin.commit({"go.sum": "1"})
    mirror = await fetch()
    left = [
        mirror.path / name
        for name in ("HEAD.lock", "packed-refs.lock", "refs/heads/main.lock", "objects/pack/tmp_pack_x")
    ]
    for path in left:
        path.write_bytes(b"x")
    second = origin.commit({"go.sum": "2"})
    origin.git("update-ref", "-d", "refs/heads/gone")
    assert (await fetch()).branches()["main"] == second
    assert not any(path.exists() for path in left)


async def test_a_killed_first_fetch_is_completed(fetch, origin, tmp_path):
    sha = origin.commit({"go.sum": "1"})
    path = (await fetch()).path
    shutil.rmtree(path / "refs")
    for pack in (path / "objects" / "pack").iterdir():
        pack.unlink()
    (path / "packed-refs").unlink(missing_ok=True)
    (path / "config").unlink()
    assert (await fetch()).branches() == {"main": sha}


async def test_a_damaged_mirror_is_made_anew(fetch, origin):
    sha = origin.commit({"go.sum": "1"})
    mirror = await fetch()
    for pack in (mirror.path / "objects" / "pack").iterdir():
        pack.unlink()
    with pytest.raises(MirrorDamaged, match="Fetch the repository again"):
        inventory(mirror.path, sha)
    said: list[str] = []
    assert (await fetch(say=said.append)).read(sha, "go.sum", 9) == b"1"
    assert any("damaged" in line for line in said)


async def test_damage_found_by_a_fetch_is_mended_by_it(fetch, origin):
    origin.commit({"go.sum": "1"})
    mirror = await fetch()
    for pack in (mirror.path / "objects" / "pack").iterdir():
        pack.unlink()
    sha = origin.commit({"go.sum": "1", "new": "2"})
    assert (await fetch()).read(sha, "go.sum", 9) == b"1"


async def test_fetches_of_one_repository_take_turns(fetch, origin):
    sha = origin.commit({"go.sum": "1"})
    mirrors = await asyncio.gather(*(fetch() for _ in range(4)))
    assert {mirror.resolve().sha for mirror in mirrors} == {sha}


async def test_the_mirrors_used_last_are_kept(fetch, origin, tmp_path):
    origin.commit({"go.sum": "1"})
    paths = []
    for number in range(4):
        shutil.copytree(origin.path, tmp_path / f"copy{number}")
        paths.append((await fetch(str(tmp_path / f"copy{number}"), keep=3)).path)
        os.utime(paths[-1], (number, number))
        if number == 2:
            await fetch(str(tmp_path / "copy0"), keep=3)
    assert [path.exists() for path in paths] == [True, False, True, True]


# --- what cannot be fetched ------------------------------------------------------------------------------


async def test_a_repository_that_is_not_there_is_denied(fetch, tmp_path):
    with pytest.raises(RepositoryDenied, match="Check the address"):
        await fetch(str(tmp_path / "nothing"))
    (tmp_path / "file").mkdir()
    with pytest.raises(RepositoryDenied):
        await fetch(str(tmp_path / "file"))


async def test_a_server_that_does_not_answer_is_unreachable(fetch):
    with pytest.raises(RepositoryUnreachable, match="then try again") as caught:
        await fetch("http://127.0.0.1:9/octo/hello")
    assert caught.value.output


async def test_a_server_that_never_ends_is_given_up_and_its_git_with_it(fetch):
    async def handler(_request: Request) -> Response:
        await asyncio.sleep(60)
        return Response()

    async with serving(handler) as url:
        with pytest.raises(RepositoryTimedOut, match=r"fetching .* was not done after 0\.5 s"):
            await fetch(f"{url}/octo/hello", timeout=0.5)
        assert not [line for line in commands_running() if url.encode() in line]


async def test_a_fetch_waits_for_another_no_longer_than_its_time(fetch, origin, tmp_path):
    origin.commit({"go.sum": "1"})
    name = (await fetch()).path.name
    async with mirror_module.Cache(tmp_path / "mirrors").locked(name):
        with pytest.raises(RepositoryTimedOut, match="waiting for another fetch"):
            await fetch(timeout=0.3)


async def test_a_repository_larger_than_the_limit_is_not_kept(fetch, origin, tmp_path):
    origin.commit({"blob": secrets.token_bytes(2 << 20)})
    with pytest.raises(RepositoryTooLarge, match="more than 1 MiB"):
        await fetch(max_mib=1)
    assert list((tmp_path / "mirrors").glob("*.git")) == []


async def test_this_host_s_configuration_has_no_say(fetch, origin, tmp_path, monkeypatch):
    sha = origin.commit({"go.sum": "1"})
    (tmp_path / ".gitconfig").write_text('[url "file:///nowhere/"]\n\tinsteadOf = file:///\n')
    for name, value in {
        "HOME": str(tmp_path),
        "GIT_DIR": "/nowhere",
        "GIT_TRACE": str(tmp_path / "trace"),
    }.items():
        monkeypatch.setenv(name, value)
    mirror = await fetch()
    assert mirror.read(sha, "go.sum", 9) == b"1"


# --- addresses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://Example.COM/Octo/hello.git/", "https://example.com/Octo/hello.git"),
        ("https://example.com:443/o/r", "https://example.com/o/r"),
        ("http://127.0.0.1:8080/o/r", "http://127.0.0.1:8080/o/r"),
        ("https://[2001:db8::1]:8443/o/r", "https://[2001:db8::1]:8443/o/r"),
        ("git@example.com:o/r.git", "ssh://git@example.com/o/r.git"),
        ("ssh://example.com:22/o/r", "ssh://git@example.com/o/r"),
        ("/srv/git/r.git/", "file:///srv/git/r.git"),
        ("file:///srv/git/r", "file:///srv/git/r"),
    ],
)
def test_an_address_has_one_spelling(text, url):
    assert parse_url(text) == (url, None)
    assert parse_url(url) == (url, None)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "ext::sh -c id",
            "--upload-pack=id",
            "-x",
            "ftp://h/o/r",
            "https://h",
            "https://h/",
            "./relative",
            "",
            "hello",
        ),
        *(
            "https://-oProxy/o/r",
            "ssh://-oProxyCommand=id/o/r",
            "https://h/o/../r",
            "/srv/../etc",
            "https://h/o/r?x=1",
        ),
        *(
            "https://h/o/r\n",
            "https://h/o/'r",
            "https://h/$(id)/r",
            "file://host/o/r",
            "git@h:/-x",
            "https://h:99999999/o/r",
        ),
    ],
)
def test_any_other_address_is_refused(text):
    with pytest.raises(BadRepositoryUrl, match="write https://HOST/OWNER/REPOSITORY"):
        parse_url(text)


def test_a_password_in_an_address_is_taken_out_of_it():
    url, credential = parse_url("https://me:s%40cret@example.com/o/r")
    assert url == "https://example.com/o/r"
    assert credential == Credential("me", "s@cret")
    with pytest.raises(BadRepositoryUrl) as caught:
        parse_url("https://me:s3cret@example.com/o/../r")
    assert "s3cret" not in str(caught.value)


def test_a_credential_is_printed_without_its_password():
    credential = Credential(username="x-access-token", password="s3cret")
    for text in (repr(credential), str(credential), f"{credential}", pretty_repr(credential)):
        assert "s3cret" not in text
        assert "x-access-token" in text
    with pytest.raises(ValueError, match="control character"):
        Credential("me", "a\nhost=elsewhere")


# --- passwords -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(handler: Callable) -> AsyncIterator[str]:
    server = HttpServer(handler)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        await server.stop()


class Private:
    """Repositories behind a password, served slowly enough to look at who asks."""

    def __init__(self, directory: Path, password: str) -> None:
        self.directory = directory
        self.password = password
        self.asked: list[str | None] = []

    async def __call__(self, request: Request) -> Response:
        self.asked.append(github_git.password(request.headers))
        if self.asked[-1] != self.password:
            return Response(401, b"", {"www-authenticate": 'Basic realm="here"'})
        await asyncio.sleep(0.3)
        return await github_git.serve(request, self.directory, request.path.removeprefix("/octo/hello"))


def processes() -> dict[str, bytes]:
    """Command line and environment of every process but this one, by pid."""
    found: dict[str, bytes] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        if directory.name != str(os.getpid()):
            with contextlib.suppress(OSError):
                found[directory.name] = (
                    (directory / "cmdline").read_bytes() + b"\n" + (directory / "environ").read_bytes()
                )
    return found


def commands_running() -> list[bytes]:
    return [text.partition(b"\n")[0] for text in processes().values()]


def holders(secret: str) -> list[str]:
    return [pid for pid, text in processes().items() if secret.encode() in text]


async def watched(work: asyncio.Task, secret: str) -> set[bytes]:
    """The programs seen while ``work`` went on. Fails when one showed the secret."""
    seen: set[bytes] = set()
    told = 0
    while not work.done():
        for text in processes().values():
            told += secret.encode() in text
            seen.add(text.partition(b"\n")[0].replace(b"\0", b" "))
        await asyncio.sleep(0.005)
    assert told == 0
    return seen


def test_the_search_for_passwords_finds_one():
    secret = secrets.token_hex(16)
    sleep = [sys.executable, "-c", "input()"]
    for argv, env in ([*sleep, secret], {}), (sleep, {"TOKEN": secret}):
        child = subprocess.Popen(argv, env={**os.environ, **env}, stdin=subprocess.PIPE)
        try:
            assert holders(secret) == [str(child.pid)]
        finally:
            child.communicate(b"\n")


@pytest.mark.parametrize("where", ["credential", "address"])
async def test_a_password_reaches_git_and_no_command_line_environment_or_disk(fetch, origin, tmp_path, where):
    secret = secrets.token_hex(16)
    sha = origin.commit({"go.sum": "1"})
    server = Private(origin.path, secret)
    async with serving(server) as url:
        address = f"{url}/octo/hello"
        if where == "address":
            work = fetch(address.replace("//", f"//me:{secret}@"))
        else:
            work = fetch(address, credential=Credential("x-access-token", secret))
        task = asyncio.create_task(work)
        seen = await watched(task, secret)
        mirror = await task
        await mirror.work_tree_tar(mirror.resolve(), tmp_path / "tree.tar")
    assert mirror.branches() == {"main": sha}
    assert mirror.url == address
    assert secret in server.asked
    assert any(b"remote-http" in program for program in seen), "nothing was watched"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if secret.encode() in path.read_bytes()]


async def test_without_the_right_password_it_is_denied_and_nothing_is_told(fetch, origin):
    origin.commit({"go.sum": "1"})
    wrong = secrets.token_hex(16)
    async with serving(Private(origin.path, "right")) as url:
        for credential in (None, Credential("me", wrong)):
            with pytest.raises(RepositoryDenied) as caught:
                await fetch(f"{url}/octo/hello", credential=credential)
            assert wrong not in str(caught.value)


async def test_a_password_is_not_for_where_a_server_sends_git_next(fetch, origin):
    origin.commit({"go.sum": "1"})
    secret = secrets.token_hex(16)
    elsewhere = Private(origin.path, secret)
    async with serving(elsewhere) as other:

        async def redirect(request: Request) -> Response:
            where = f"{other}{request.path}?service={request.query['service']}"
            return Response(302, b"", {"location": where})

        async with serving(redirect) as url:
            with pytest.raises(RepositoryDenied):
                await fetch(f"{url}/octo/hello", credential=Credential("me", secret))
    assert set(elsewhere.asked) == {None}


async def test_a_server_s_words_come_without_control_characters(fetch):
    async def handler(_request: Request) -> Response:
        return Response(500, b"\x1b[2Jboo", {"content-type": "text/plain"})

    async with serving(handler) as url:
        with pytest.raises(MirrorError) as caught:
            await fetch(f"{url}/octo/hello")
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", str(caught.value)) is None


# --- what a guest gets -----------------------------------------------------------------------------------


def unpacked(tar: Path, target: Path) -> Callable[..., str]:
    with tarfile.open(tar) as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {".git"}
        assert {(member.uid, member.uname, member.mtime) for member in archive} == {(0, "", 0)}
        archive.extractall(target, filter="data")

    def git(*args: str) -> str:
        argv = ["git", "-C", str(target), *args]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()

    return git


async def test_a_guest_gets_one_commit_and_goes_on_from_it(fetch, origin, tmp_path):
    old = origin.commit({"go.sum": "old" * 1000})
    sha = origin.commit({"go.sum": "1", "run.sh": "exit\n", "link": Link("go.sum")})
    mirror = await fetch()
    await mirror.work_tree_tar(mirror.resolve(), tmp_path / "tree.tar", origin=str(origin.path))
    git = unpacked(tmp_path / "tree.tar", tmp_path / "guest")
    git("reset", "-q", "--hard")
    assert (tmp_path / "guest" / "link").read_text() == "1"
    assert git("status", "--porcelain") == ""
    assert git("rev-parse", "HEAD", "origin/main") == f"{sha}\n{sha}"
    assert git("rev-list", "--count", "HEAD") == "1"
    git("fsck", "--strict")
    new = origin.commit({"go.sum": "2"})
    git("fetch", "-q", "--depth=1", "origin", f"+{new}:refs/remotes/origin/main")
    git("checkout", "-q", new)
    git("fetch", "-q", "--unshallow", "origin")
    assert old in git("rev-list", "HEAD")


async def test_a_guest_learns_nothing_of_this_host(fetch, origin, tmp_path):
    origin.commit({"go.sum": "1"})
    origin.git("config", "uploadpack.allowAnySHA1InWant", "true")
    async with serving(Private(origin.path, "right")) as url:
        mirror = await fetch(f"{url}/octo/hello", credential=Credential("me", "right"))
    tag = Commit(mirror.resolve().sha, None)
    await mirror.work_tree_tar(tag, tmp_path / "tree.tar")
    git = unpacked(tmp_path / "tree.tar", tmp_path / "guest")
    assert git("config", "remote.origin.url") == f"{url}/octo/hello"
    assert str(tmp_path).encode() not in (tmp_path / "tree.tar").read_bytes()
    assert git("for-each-ref", "--format=%(refname)") == "refs/microvm/parent"
    assert git("config", "--local", "--list").splitlines() == [
        *("core.repositoryformatversion=0", "core.bare=false", f"remote.origin.url={url}/octo/hello"),
        "remote.origin.fetch=+refs/heads/*:refs/remotes/origin/*",
    ]


async def test_the_origin_is_written_as_a_checkout_writes_it(origin, tmp_path, fetch):
    origin.commit({"go.sum": "1"})
    fetched = await fetch()
    mirror = Mirror(path=fetched.path, url="https://example.com/octo/hello.git")
    await mirror.work_tree_tar(mirror.resolve(), tmp_path / "tree.tar")
    with tarfile.open(tmp_path / "tree.tar") as archive:
        config = io.TextIOWrapper(archive.extractfile(".git/config")).read()
    assert "url = https://example.com/octo/hello\n" in config


async def test_a_copy_of_a_commit_that_is_not_there_fails(fetch, origin, tmp_path):
    origin.commit({"go.sum": "1"})
    with pytest.raises(MirrorError):
        await (await fetch()).work_tree_tar(Commit("1" * 40, "main"), tmp_path / "tree.tar")
    assert not (tmp_path / "tree.tar").exists()
