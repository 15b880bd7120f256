"""Before a parent is saved its guest forgets: secrets go, what jobs need stays."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from images.guest import forget
from images.guest.forget import Forgetting

SECRET = "s3cr3t-4711"


def holding(root: Path) -> list[str]:
    """Files that hold the secret."""
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes()
    )


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.replace("SECRET", SECRET))


HOME = {
    ".netrc": "machine h login u password SECRET\n",
    ".npmrc": "save-exact=true\n//r.example/:_authToken=SECRET\n_auth = SECRET\nemail=a@b\n",
    ".yarnrc.yml": "nodeLinker: node-modules\nnpmAuthToken: SECRET\n",
    ".git-credentials": "https://u:SECRET@h\n",
    ".docker/config.json": '{"auths": {"h": {"auth": "SECRET"}}}',
    ".config/gh/hosts.yml": "h:\n  oauth_token: SECRET\n",
    ".config/pip/pip.conf": "[global]\nindex-url = https://u:SECRET@h/simple\ntimeout = 9\n",
    ".cargo/credentials.toml": 'token = "SECRET"\n',
    ".cargo/config.toml": '[net]\nretry = 3\n[registries.own]\ntoken = "SECRET"\n',
    ".aws/credentials": "aws_secret_access_key = SECRET\n",
    ".gradle/gradle.properties": "org.gradle.daemon=false\nnexusPassword=SECRET\n",
    ".m2/settings.xml": "<a><localRepository>x</localRepository>\n<password>SECRET</password>\n</a>",
    ".bash_history": "curl -H SECRET\n",
    ".python_history": "SECRET\n",
    ".ssh/id_ed25519": "-----BEGIN OPENSSH PRIVATE KEY-----\nSECRET\n",
    ".ssh/known_hosts": "h ssh-ed25519 AAAA\n",
    ".npm/_logs/1.log": "SECRET\n",
    ".profile": "export PATH=$HOME/bin:$PATH\nexport API_TOKEN=SECRET\n",
    ".gitconfig": '[user]\n\tname = warm\n[http]\n\textraheader = SECRET\n[url "https://u:SECRET@h/"]\n'
    "\tinsteadOf = https://h/\n[credential]\n\thelper = !echo SECRET\n",
    ".cache/pip/http/entry": "kept",
}


def test_a_home_keeps_what_is_no_secret(tmp_path: Path):
    plant(tmp_path, HOME)
    assert len(holding(tmp_path)) == len(HOME) - 2, "the check finds what there is to find"
    forgetting = Forgetting()
    forget.forget_home(forgetting, str(tmp_path))
    assert holding(tmp_path) == []
    assert forgetting.failed == []
    assert not any(SECRET in line for line in forgetting.removed)
    kept = {
        ".npmrc": "save-exact=true",
        ".yarnrc.yml": "nodeLinker: node-modules",
        ".config/pip/pip.conf": "https://h/simple\ntimeout = 9",
        ".cargo/config.toml": "retry = 3",
        ".gradle/gradle.properties": "org.gradle.daemon=false",
        ".m2/settings.xml": "<localRepository>x",
        ".profile": "export PATH=",
        ".gitconfig": "name = warm",
        ".ssh/known_hosts": "ssh-ed25519",
        ".cache/pip/http/entry": "kept",
    }
    for name, text in kept.items():
        assert text in (tmp_path / name).read_text(), name


def test_the_name_of_a_secret_is_none(tmp_path: Path):
    plant(tmp_path, {".npmrc": "//r.example/:_authToken=${NPM_TOKEN}\n"})
    forget.forget_home(Forgetting(), str(tmp_path))
    assert "${NPM_TOKEN}" in (tmp_path / ".npmrc").read_text()


def git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_work_folder_keeps_its_own_files_and_its_objects(tmp_path: Path):
    git(tmp_path, "init", "-q")
    plant(tmp_path, {".npmrc": "//r.example/:_authToken=${TOKEN}\n", ".docker/config.json": "{}"})
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "One")
    commit = git(tmp_path, "rev-parse", "HEAD")
    git(tmp_path, "remote", "add", "origin", f"https://u:{SECRET}@h.example/o/r")
    git(tmp_path, "remote", "add", "other", "https://h.example/o/r")
    git(tmp_path, "config", "http.https://h.example/.extraheader", f"AUTHORIZATION: basic {SECRET}")
    git(tmp_path, "config", "core.sshCommand", f"ssh -i {SECRET}")
    git(tmp_path, "config", f"url.https://u:{SECRET}@h/.insteadOf", "https://h/")
    plant(
        tmp_path, {".netrc": "SECRET", ".yarnrc.yml": "npmAuthToken: SECRET\n", ".git/FETCH_HEAD": "SECRET"}
    )
    plant(tmp_path, {".git/modules/sub/config": "[http]\n\textraheader = SECRET\n"})
    assert len(holding(tmp_path)) == 5
    forgetting = Forgetting()
    forget.forget_work(forgetting, str(tmp_path))
    assert holding(tmp_path) == []
    assert forgetting.failed == []
    assert git(tmp_path, "config", "remote.origin.url") == "https://h.example/o/r"
    assert git(tmp_path, "config", "remote.other.url") == "https://h.example/o/r"
    assert git(tmp_path, "rev-parse", "HEAD") == commit
    assert git(tmp_path, "status", "--porcelain", "--untracked-files=no") == ""


def test_temporary_files_go_but_for_those_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forget, "TEMPORARY", (str(tmp_path),))
    plant(tmp_path, {"a/b/left": "SECRET", "used": "x", "node-compile-cache/v24/code": "compiled"})
    (tmp_path / "link").symlink_to("/etc/passwd")
    with (tmp_path / "used").open() as used, socket.socket(socket.AF_UNIX) as service:
        service.bind(str(tmp_path / "service.sock"))
        forgetting = Forgetting()
        forget.forget_temporary(forgetting)
        assert used.read() == "x"
    assert sorted(os.listdir(tmp_path)) == ["node-compile-cache", "service.sock", "used"]
    assert (tmp_path / "node-compile-cache/v24/code").exists()
    assert forgetting.removed == [f"{tmp_path}: 2 files"]


def test_what_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plant(tmp_path, {".netrc": "SECRET"})
    monkeypatch.setattr(
        os, "unlink", lambda _path: (_ for _ in ()).throw(PermissionError(1, "Not permitted"))
    )
    forgetting = Forgetting()
    forget.forget_home(forgetting, str(tmp_path))
    assert forgetting.failed == [f"{tmp_path}/.netrc: Not permitted"]
    assert holding(tmp_path) == [], "its content went before its name"


def test_links_are_removed_and_never_followed(tmp_path: Path):
    outside = tmp_path / "outside"
    plant(outside, {"precious": "keep", "config": "[http]\n\textraheader = SECRET\n"})
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").symlink_to(outside / "precious")
    (home / ".aws").symlink_to(outside)
    (home / ".npmrc").symlink_to(outside / "config")
    forget.forget_home(Forgetting(), str(home))
    assert (outside / "precious").read_text() == "keep"
    assert SECRET in (outside / "config").read_text()
