"""The work folder that a bake leaves is the one that actions/checkout keeps."""

import json
import subprocess
from pathlib import Path

import pytest

from images import warm_guest

URL = "https://forge.example/Octo-Org/Hello"


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Repository:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "repository"
        self.path.mkdir()
        git(self.path, "init", "-q", "-b", "main")

    def commit(self, **files: str) -> str:
        for name, text in files.items():
            (self.path / name.replace("_", ".")).write_text(text)
        git(self.path, "add", ".")
        git(self.path, "commit", "-q", "-m", "A commit")
        return git(self.path, "rev-parse", "HEAD")

    def tar(self, commit: str) -> str:
        """A shallow ``.git`` of one commit, as the host's mirror makes it."""
        shallow = self.root / f"shallow-{commit[:8]}"
        subprocess.run(["git", "init", "-q", str(shallow)], check=True)
        git(shallow, "fetch", "-q", "--depth=1", f"file://{self.path}", commit)
        git(shallow, "update-ref", "refs/heads/main", commit)
        target = self.root / f"{commit[:8]}.tar"
        subprocess.run(["tar", "-cf", str(target), "-C", str(shallow), ".git"], check=True)
        return str(target)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


def unpack(repository: Repository, commit: str, url: str = URL) -> Path:
    directory = repository.root / "work/Hello/Hello"
    subprocess.run(warm_guest.unpack(str(directory), repository.tar(commit), commit, "main", url), check=True)
    return directory


def test_the_first_time_the_work_folder_is_as_a_checkout_wants_it(repository: Repository):
    repository.commit(a_txt="one", old_txt="x")
    commit = repository.commit(a_txt="two", _gitignore="ignored\n")
    work = unpack(repository, commit)
    assert (work / "a.txt").read_text() == "two"
    assert git(work, "config", "--local", "--get", "remote.origin.url") == URL
    assert git(work, "rev-parse", "HEAD", "refs/remotes/origin/main").split() == [commit, commit]
    assert git(work, "rev-parse", "--symbolic-full-name", "HEAD") == "HEAD", "detached"
    assert git(work, "for-each-ref", "--format=%(refname)").split() == [
        "refs/microvm/parent",
        "refs/remotes/origin/main",
    ]
    assert git(work, "rev-list", "--count", "HEAD") == "1"
    assert git(work, "status", "--porcelain") == ""


def test_the_second_time_ignored_files_stay_and_others_go(repository: Repository):
    first = repository.commit(a_txt="one", gone_txt="x", _gitignore="ignored\n")
    work = unpack(repository, first)
    inode = (work / ".git").stat().st_ino
    (work / "ignored").write_text("installed by the bake")
    (work / "left").write_text("by the bake")
    (work / "a.txt").write_text("changed by the bake")
    (repository.path / "gone.txt").unlink()
    second = repository.commit(a_txt="two")
    unpack(repository, second)
    assert (work / ".git").stat().st_ino == inode
    assert (work / "a.txt").read_text() == "two"
    assert (work / "ignored").exists()
    assert not (work / "left").exists() and not (work / "gone.txt").exists()
    assert git(work, "rev-parse", "HEAD", "refs/microvm/parent").split() == [second, second]
    assert git(work, "status", "--porcelain") == ""


def test_another_repositorys_folder_is_made_anew(repository: Repository):
    commit = repository.commit(a_txt="one", _gitignore="ignored\n")
    work = unpack(repository, commit, "https://forge.example/other/repository")
    (work / "ignored").write_text("of another")
    unpack(repository, commit)
    assert not (work / "ignored").exists()
    assert git(work, "config", "remote.origin.url") == URL


def test_hooks_of_the_tar_do_not_run(repository: Repository):
    commit = repository.commit(a_txt="one")
    tar = repository.tar(commit)
    hook = repository.root / f"shallow-{commit[:8]}/.git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {repository.root}/hooked\n")
    hook.chmod(0o755)
    subprocess.run(["tar", "-cf", tar, "-C", str(hook.parents[2]), ".git"], check=True)
    directory = repository.root / "work"
    subprocess.run(warm_guest.unpack(str(directory), tar, commit, "main", URL), check=True)
    assert not (repository.root / "hooked").exists()


def test_names_keep_their_spelling():
    assert warm_guest.work_folder("Octo-Org/Hello") == "/opt/actions-runner/_work/Hello/Hello"
    assert warm_guest.checkout_url("https://forge.example/", "Octo-Org/Hello") == URL


def test_tools_are_told_by_version():
    told = subprocess.run(warm_guest.tools(), check=True, capture_output=True, text=True).stdout
    found = json.loads(told)
    assert found["git"].startswith(git(Path("/"), "--version").split()[2][:4])
    assert set(found) >= {"python", "kernel"}


def test_a_guest_without_a_stash_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(warm_guest, "STASH_PROGRAM", str(tmp_path / "nowhere.py"))
    subprocess.run(warm_guest.stash([str(tmp_path)]), check=True)


def test_packages_of_node_are_told_without_starting_them(tmp_path: Path):
    package = tmp_path / "lib/node_modules/npm"
    (package / "bin").mkdir(parents=True)
    (package / "package.json").write_text('{"name": "npm", "version": "77.1.2"}')
    (package / "bin/npm-cli.js").write_text("#!/bin/sh\nexit 1\n")
    (package / "bin/npm-cli.js").chmod(0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/npm").symlink_to(package / "bin/npm-cli.js")
    environ = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    told = subprocess.run(warm_guest.tools(), check=True, capture_output=True, text=True, env=environ).stdout
    assert json.loads(told)["npm"] == "77.1.2"
