"""What a repository locks says what a bake installs, in one order, once, and within bounds."""

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.ecosystems import TABLE, Kind, kind, kind_of
from images.installs import InstallPlan, plan_installs
from images.lockfiles import Inventory, LockFile


def plan(*paths: str, **options) -> InstallPlan:
    files = []
    for path in paths:
        row = kind_of(path.encode())
        assert row is not None, path
        files.append(LockFile(path=path, kind=row.name, digest="text:1"))
    return plan_installs(Inventory(commit="1" * 40, files=tuple(files)), **options)


@pytest.mark.parametrize(
    ("path", "directory", "needs", "command"),
    [
        ("package-lock.json", "", "npm", "npm ci --no-audit --no-fund --prefer-offline"),
        ("web/npm-shrinkwrap.json", "web", "npm", "npm ci --no-audit --no-fund --prefer-offline"),
        ("pnpm-lock.yaml", "", "pnpm", "pnpm install --frozen-lockfile --prefer-offline"),
        ("bun.lock", "", "bun", "bun install --frozen-lockfile"),
        ("uv.lock", "", "uv", "uv sync --frozen"),
        ("poetry.lock", "", "poetry", "poetry install --no-interaction --no-root"),
        ("pdm.lock", "", "pdm", "pdm sync --no-self --no-editable"),
        ("Pipfile.lock", "", "pipenv", "pipenv sync --dev"),
        ("a/b/go.sum", "a/b", "go", "go mod download"),
        ("Cargo.lock", "", "cargo", "cargo fetch --locked"),
        ("Gemfile.lock", "", "bundle", "BUNDLE_FROZEN=true bundle install --jobs 4 --retry 2"),
        (
            *("composer.lock", "", "composer"),
            "composer install --no-interaction --no-progress --prefer-dist --no-scripts",
        ),
        (
            *("x/gradle/wrapper/gradle-wrapper.properties", "x", "java"),
            "sh ./gradlew --no-daemon --console=plain dependencies",
        ),
        (
            *("gradle/dependency-locks/main.lockfile", "", "gradle"),
            "gradle --no-daemon --console=plain dependencies",
        ),
        ("pom.xml", "", "mvn", "mvn --batch-mode --no-transfer-progress dependency:go-offline"),
        ("rust-toolchain.toml", "", "rustup", "rustup show"),
    ],
)
def test_a_lock_file_means_its_tool_s_command(path, directory, needs, command):
    (step,) = plan(path).steps
    assert (step.directory, step.lockfile, step.needs, step.run) == (directory, path, needs, command)
    assert step.timeout > 0


@pytest.mark.parametrize("row", [row for row in TABLE if row.run], ids=lambda row: row.name)
def test_every_command_is_a_script_a_shell_can_read(row: Kind):
    assert row.needs, "a command without the program it needs would fail where there is none"
    script = row.run.replace("{file}", "x")
    subprocess.run(["/bin/sh", "-n", "-c", script], check=True, timeout=20)
    assert row.needs in script or row.needs == "java"


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_glob_finds_its_own_row(row: Kind):
    for glob in row.files:
        for where in ("", "deep/er/"):
            assert kind_of(f"{where}{glob.replace('*', '-x')}".encode()) is row
    assert kind(row.name) is row


@pytest.mark.parametrize(("version", "flag"), [("1.22.22", "--frozen-lockfile"), ("4.1.0", "--immutable")])
def test_yarn_is_asked_for_its_version(tmp_path, version, flag):
    (tmp_path / "yarn").write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} || echo "$@"\n')
    (tmp_path / "yarn").chmod(0o755)
    (step,) = plan("yarn.lock").steps
    told = subprocess.run(
        ["/bin/sh", "-eu", "-c", step.run], check=True, capture_output=True, text=True, timeout=20,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert flag in told.stdout.split()


def test_of_two_locks_for_one_ecosystem_one_is_installed():
    found = plan("package-lock.json", "pnpm-lock.yaml", "yarn.lock", "go.sum", "npm-shrinkwrap.json")
    assert [step.lockfile for step in found.steps] == ["pnpm-lock.yaml", "go.sum"]
    assert sorted(found.notes) == [
        f"{name} not installed: pnpm-lock.yaml goes first"
        for name in ("npm-shrinkwrap.json", "package-lock.json", "yarn.lock")
    ]
    assert plan("package-lock.json", "npm-shrinkwrap.json").steps[0].lockfile == "npm-shrinkwrap.json"
    assert plan("requirements.txt", "uv.lock").steps[0].needs == "uv"


def test_requirements_are_installed_one_file_at_a_time_the_plain_one_first():
    (step,) = plan("requirements-dev.txt", "requirements.txt", "requirements a'b.txt").steps
    lines = step.run.splitlines()
    assert [line.rpartition(" -r ")[2] for line in lines] == [
        *("requirements.txt", "'requirements a'\"'\"'b.txt'", "requirements-dev.txt")
    ]
    assert step.lockfile == "requirements.txt"


def test_what_only_tells_a_version_is_not_installed():
    assert plan(".nvmrc", ".python-version", "constraints.txt", "gradle/libs.versions.toml").steps == ()


def test_upper_directories_come_first_and_toolchains_before_packages():
    found = plan(
        "b/a/go.sum",
        "a/yarn.lock",
        "a/.tool-versions",
        "b/Cargo.lock",
        "go.sum",
        "rust-toolchain",
        "a/go.sum",
    )
    assert [step.lockfile for step in found.steps] == [
        *(
            "rust-toolchain",
            "go.sum",
            "a/.tool-versions",
            "a/yarn.lock",
            "a/go.sum",
            "b/Cargo.lock",
            "b/a/go.sum",
        )
    ]


@given(
    st.permutations(
        [
            "go.sum",
            "a/go.sum",
            "a/yarn.lock",
            "a/package-lock.json",
            "b/pom.xml",
            "uv.lock",
            "requirements.txt",
        ]
    )
)
def test_the_order_of_the_inventory_does_not_matter(paths):
    assert plan(*paths).steps == plan(*sorted(paths)).steps


def test_a_build_of_many_modules_is_resolved_from_its_root():
    found = plan(
        "pom.xml", "core/pom.xml", "core/deep/pom.xml", "other/gradle.lockfile", "other/sub/gradle.lockfile"
    )
    assert [step.directory for step in found.steps] == ["", "other"]
    assert "core/pom.xml is part of the maven build in the root" in found.notes
    assert "other/sub/gradle.lockfile is part of the gradle build in other" in found.notes


def test_fixtures_of_tests_are_left_out_unless_they_are_named():
    found = plan("go.sum", "pkg/testdata/mod/go.sum")
    assert [step.directory for step in found.steps] == [""]
    assert "fixture" in found.notes[0]
    named = plan("go.sum", "pkg/testdata/mod/go.sum", paths=["pkg/testdata/mod"])
    assert [step.directory for step in named.steps] == ["pkg/testdata/mod"]


def test_paths_narrow_what_is_installed_but_keep_the_toolchain_above():
    found = plan(
        "go.sum", "rust-toolchain", "apps/a/go.sum", "apps/b/x/go.sum", "docs/yarn.lock", paths=["apps/*"]
    )
    assert [step.lockfile for step in found.steps] == ["rust-toolchain", "apps/a/go.sum", "apps/b/x/go.sum"]


def test_hundreds_of_directories_are_bounded_and_the_note_says_so():
    found = plan(*(f"apps/app{number:03}/package-lock.json" for number in range(300)))
    assert len(found.steps) == 40
    assert found.steps[0].directory == "apps/app000"
    assert found.notes[0].startswith("300 directories have something to install; the first 40")
    assert "paths in .microvm.yml" in found.notes[0]


def test_links_to_nothing_and_submodules_are_not_installed():
    files = (
        LockFile(path="package-lock.json", kind="link", digest="git:1"),
        LockFile(path="libs/core", kind="submodule", digest="git:2"),
    )
    found = plan_installs(Inventory(commit="1" * 40, files=files))
    assert found.steps == ()
    assert found.notes == ("package-lock.json links to no file of the repository: not installed",)


@pytest.mark.parametrize("directory", ["a\nb", "\x1b[2J", "bytes\\xff"])
def test_directories_that_cannot_be_named_safely_are_left_out(directory):
    file = LockFile(path=f"{directory}/go.sum", kind="go", digest="text:1")
    found = plan_installs(Inventory(commit="1" * 40, files=(file,)))
    assert found.steps == ()
    assert all(note.isprintable() for note in found.notes)
    assert len(found.notes) == 1
