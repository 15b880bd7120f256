"""npm ci and pip install -r find what a bake installed exactly where a fresh install would make the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from images.guest import stash


class Executed(Exception):
    """The front handed over to this program."""


class World:
    """A project directory, a home, an npm and a node of its own, and the stash between them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.project = root / "project"
        self.home = root / "home"
        self.bin = root / "bin"
        for directory in (self.project, self.home, self.bin, root / "npm"):
            directory.mkdir()
        (self.bin / "node").write_text("#!/bin/sh\n")
        (self.bin / "node").chmod(0o755)
        (root / "npm/package.json").write_text('{"version": "1.0.0"}')
        self.npm_package = root / "npm/package.json"
        monkeypatch.setattr(stash, "STASH", str(root / "stash"))
        monkeypatch.setattr(stash, "NPM", str(root / "npm"))
        monkeypatch.setattr(stash, "_execute", self._execute)
        monkeypatch.setattr(os, "execvp", lambda _file, argv: self._execute("node", argv))
        for name in [name for name in os.environ if name.lower().startswith(("npm_", "pip_", "node_"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        monkeypatch.delenv("MICROVM_WARM", raising=False)
        monkeypatch.chdir(self.project)
        self.write({}, {"node_modules/a": {"version": "1.0.0"}})

    def _execute(self, program: str, _arguments: object) -> None:
        raise Executed(Path(program).name)

    def write(
        self, package: dict[str, object], packages: dict[str, dict[str, object]], **lock: object
    ) -> None:
        (self.project / "package.json").write_text(json.dumps({"name": "p", **package}))
        whole = {"lockfileVersion": 3, "packages": {"": {}, **packages}, **lock}
        (self.project / "package-lock.json").write_text(json.dumps(whole))

    def install(self) -> None:
        """As npm ci leaves it."""
        tree = self.project / "node_modules"
        (tree / "a").mkdir(parents=True)
        (tree / "a/index.js").write_text("")
        (tree / ".package-lock.json").write_text("{}")

    def bake(self) -> None:
        self.install()
        stash.keep([str(self.project)])

    @property
    def installed(self) -> bool:
        return (self.project / "node_modules/a/index.js").exists()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


@pytest.mark.parametrize("flags", [(), ("--no-audit", "--no-fund"), ("--prefer-offline",)])
def test_the_same_project_finds_its_tree(
    world: World, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
):
    world.bake()
    assert not world.installed
    stash.npm(["ci", *flags])
    assert world.installed
    assert "warm parent" in capsys.readouterr().out


def test_npm_install_finds_its_tree_and_looks_at_it_itself(world: World):
    world.bake()
    with pytest.raises(Executed, match="npm-cli"):
        stash.npm(["install"])
    assert world.installed


def test_the_projects_own_scripts_run(world: World):
    world.write({"scripts": {"prepare": "husky", "test": "node --test"}}, {"node_modules/a": {}})
    world.bake()
    with pytest.raises(Executed, match="node"):
        stash.npm(["ci"])
    assert world.installed


CHANGES = {
    "the lock": lambda w: (w.project / "package-lock.json").write_text('{"packages": {"": {}}}'),
    "package.json": lambda w: (w.project / "package.json").write_text('{"name": "q"}'),
    "a shrinkwrap": lambda w: (w.project / "npm-shrinkwrap.json").write_text("{}"),
    "the project's npmrc": lambda w: (w.project / ".npmrc").write_text("legacy-peer-deps=true\n"),
    "the user's npmrc": lambda w: (w.home / ".npmrc").write_text("omit=dev\n"),
    "npm": lambda w: w.npm_package.write_text('{"version": "2.0.0"}'),
    "node": lambda w: (w.bin / "node").write_text("#!/bin/sh\n# another\n"),
    "NODE_ENV": lambda w: w.monkeypatch.setenv("NODE_ENV", "production"),
    "npm_config_omit": lambda w: w.monkeypatch.setenv("npm_config_omit", "dev"),
    "NPM_CONFIG_IGNORE_SCRIPTS": lambda w: w.monkeypatch.setenv("NPM_CONFIG_IGNORE_SCRIPTS", "true"),
    "MICROVM_WARM": lambda w: w.monkeypatch.setenv("MICROVM_WARM", "0"),
    "a tree that is there": lambda w: w.install(),
    "no lock": lambda w: (w.project / "package-lock.json").unlink(),
    "no package.json": lambda w: (w.project / "package.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_input_is_npms_to_install(world: World, change: str):
    world.bake()
    CHANGES[change](world)
    with pytest.raises(Executed, match="npm-cli"):
        stash.npm(["ci"])
    assert world.installed == (change == "a tree that is there")


@pytest.mark.parametrize(
    "flag", ["--omit=dev", "--ignore-scripts", "--legacy-peer-deps", "--prefix=x", "extra"]
)
def test_flags_that_mean_something_are_npms(world: World, flag: str):
    world.bake()
    with pytest.raises(Executed, match="npm-cli"):
        stash.npm(["ci", flag])
    assert not world.installed


def test_who_asks_makes_no_other_tree(world: World):
    (world.home / ".npmrc").write_text("save-exact=true\n//npm.example/:_authToken=one\n")
    world.bake()
    (world.home / ".npmrc").write_text("save-exact=true\n//npm.example/:_authToken=two\n_auth = three\n")
    stash.npm(["ci"])
    assert world.installed


@pytest.mark.parametrize(
    ("package", "packages"),
    [
        ({"workspaces": ["packages/*"]}, {"node_modules/a": {}}),
        ({}, {"packages/b": {}, "node_modules/b": {"link": True}}),
        ({}, {"node_modules/b": {"resolved": "file:b.tgz"}}),
        ({}, {}),
        ({}, {"node_modules/b": ["hostile"]}),
        ({"scripts": 7}, {"node_modules/a": {}}),
    ],
)
def test_a_tree_that_depends_on_more_is_not_stashed(
    world: World, capsys: pytest.CaptureFixture[str], package: dict[str, object], packages: dict[str, object]
):
    world.write(package, packages)  # pyright: ignore[reportArgumentType]
    if not packages:
        (world.project / "package-lock.json").write_text('{"lockfileVersion": 1, "dependencies": {}}')
    world.bake()
    assert "not stashed" in capsys.readouterr().out
    assert world.installed


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', "{", '{"packages": 5}', "\x00" * 100])
def test_hostile_locks_are_left_to_npm(world: World, capsys: pytest.CaptureFixture[str], text: str):
    (world.project / "package-lock.json").write_text(text)
    world.bake()
    assert "not stashed" in capsys.readouterr().out
    with pytest.raises(Executed, match="npm-cli"):
        stash.npm(["ci"])


def test_what_an_install_script_wrote_beside_the_tree_would_be_lost(
    world: World, capsys: pytest.CaptureFixture[str]
):
    world.write({}, {"node_modules/a": {"hasInstallScript": True}})
    subprocess.run(["git", "init", "-q", "."], check=True)
    subprocess.run(["git", "add", "."], check=True)
    (world.project / "generated.js").write_text("")
    world.bake()
    assert "generated.js" in capsys.readouterr().out
    assert world.installed
    (world.project / "generated.js").unlink()
    stash.keep([str(world.project)])
    assert not world.installed


def test_one_tree_a_directory_is_kept(world: World):
    world.bake()
    world.write({"version": "2"}, {"node_modules/a": {}})
    world.bake()
    trees = list(Path(stash.STASH).glob("node/*/*/node_modules"))
    assert len(trees) == 1
    stash.npm(["ci"])
    assert world.installed


# -- pip -----------------------------------------------------------------------------------------------------


class Pip(World):
    """The same, with a pip that says what it is told to."""

    def requirements(self, text: str, name: str = "requirements.txt") -> None:
        (self.project / name).write_text(text)

    def bake_pip(self, would_install: str = "[]", status: int = 0) -> None:
        pip = self.home / "real-pip"
        pip.write_text(f"import sys\nprint('{{\"install\": {would_install}}}')\nsys.exit({status})\n")
        self.monkeypatch.setattr(stash, "REAL_PIP", str(pip))
        self.monkeypatch.setattr(stash, "PYTHON", sys.executable)
        stash.keep([str(self.project)])


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    made = Pip(tmp_path, monkeypatch)
    made.requirements(
        "a==1 \\\n    --hash=sha256:00\n-r more.txt\n# comment\n--index-url https://index.example\n"
    )
    made.requirements("b>=2 ; python_version > '3'\n", "more.txt")
    return made


@pytest.mark.parametrize(
    "words",
    [
        ("-r", "requirements.txt"),
        ("--requirement=requirements.txt", "--no-cache-dir", "-q"),
        ("--require-hashes", "--requirement", "requirements.txt"),
        ("--no-input", "--progress-bar", "off", "-r", "requirements.txt"),
    ],
)
def test_satisfied_requirements_need_no_pip(
    pip: Pip, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
):
    pip.bake_pip()
    stash.pip(["install", *words])
    assert "requirements.txt is installed already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.requirements("a==2\n"),
        lambda w: w.requirements("c\n", "more.txt"),
        lambda w: w.monkeypatch.setenv("PIP_TARGET", "/elsewhere"),
        lambda w: w.monkeypatch.setenv("MICROVM_WARM", "0"),
        lambda w: (w.home / ".local/lib/python3.11/site-packages/new-1.dist-info").mkdir(parents=True),
    ],
)
def test_another_environment_is_pips_to_judge(pip: Pip, change):
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the directory above is Python 3.11's")
    pip.bake_pip()
    change(pip)
    with pytest.raises(Executed):
        stash.pip(["install", "-r", "requirements.txt"])


@pytest.mark.parametrize(
    "words",
    [
        ("-r", "requirements.txt", "-U"),
        ("requests",),
        ("-r", "other.txt"),
        ("-r",),
        ("-e", "."),
        ("-r", "requirements.txt", "--target=x"),
        (),
    ],
)
def test_other_requests_are_pips(pip: Pip, words: tuple[str, ...]):
    pip.bake_pip()
    with pytest.raises(Executed):
        stash.pip(["install", *words])


@pytest.mark.parametrize(
    "line",
    [
        *("-e .", ".", "./local", "../x", "a @ https://files.example/a.whl", "https://files.example/a.whl"),
        *("-rother.txt", "--find-links dir", "${TOKEN}", "-r requirements.txt", "dir/a.whl"),
    ],
)
def test_requirements_that_name_more_than_packages_are_not_noted(
    pip: Pip, capsys: pytest.CaptureFixture[str], line: str
):
    pip.requirements(line + "\n")
    pip.bake_pip()
    assert "not stashed" in capsys.readouterr().out
    with pytest.raises(Executed):
        stash.pip(["install", "-r", "requirements.txt"])


def test_requirements_that_are_not_satisfied_are_not_noted(pip: Pip, capsys: pytest.CaptureFixture[str]):
    pip.bake_pip(would_install='[{\\"x\\": 1}]')
    pip.bake_pip(status=1)
    assert capsys.readouterr().out.count("not stashed") == 2
    with pytest.raises(Executed):
        stash.pip(["install", "-r", "requirements.txt"])
