"""``.microvm.yml`` says what it may, and every error in it says where it stands."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.errors import RecipeError
from images.repository import RepositoryRecipe, Service, parse_repository_recipe
from images.schema import WarmStep

WHOLE = b"""
template: python-ci
machine: {vcpus: 2, memory: 2 GiB, disk: 8 GiB}
packages: [libpq-dev, libpq-dev]
install: false
incremental: false
paths: [services/api, "packages/*"]
warm:
  - {name: build, run: make, user: root, timeout: 60}
services:
  - name: postgres
    run: exec postgres -D /var/lib/data
    ready: pg_isready
    timeout: 30
    user: root
verify:
  - {name: tests, run: pytest -x}
page_cache: [/usr/lib/python3/**/*.pyc]
egress: [package-registries]
warm_egress: ["example.com:443"]
labels: [database]
branches: [main, release/*]
"""


def refused(text: bytes) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_repository_recipe(text, file=".microvm.yml")
    assert str(caught.value).startswith(".microvm.yml")
    return caught.value


@pytest.mark.parametrize("text", [None, b"", b"\n  \n", b"# nothing yet\n\t\n"])
def test_without_a_file_the_defaults_hold(text):
    assert parse_repository_recipe(text) == RepositoryRecipe()
    assert RepositoryRecipe().install
    assert RepositoryRecipe().incremental


def test_everything_a_repository_may_say():
    assert parse_repository_recipe(WHOLE) == RepositoryRecipe(
        template="python-ci",
        vcpus=2,
        memory_mib=2048,
        disk_mib=8192,
        packages=("libpq-dev",),
        services=(
            Service(
                name="postgres",
                run="exec postgres -D /var/lib/data",
                ready="pg_isready",
                timeout=30,
                user="root",
            ),
        ),
        warm=(WarmStep(name="build", run="make", user="root", timeout=60),),
        install=False,
        paths=("services/api", "packages/*"),
        egress=("package-registries",),
        warm_egress=("example.com:443",),
        labels=("database",),
        branches=("main", "release/*"),
        verify=(WarmStep(name="tests", run="pytest -x"),),
        incremental=False,
        page_cache=("/usr/lib/python3/**/*.pyc",),
    )


def test_line_endings_of_windows_are_line_endings():
    assert parse_repository_recipe(WHOLE.replace(b"\n", b"\r\n")) == parse_repository_recipe(WHOLE)


def test_a_recipe_can_be_written_into_a_manifest_and_read_back():
    recipe = parse_repository_recipe(WHOLE)
    assert msgspec.json.decode(msgspec.json.encode(recipe), type=RepositoryRecipe) == recipe


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        (b"install: true\ntemplat: x\n", 2, "templat", "did you mean 'template'?"),
        (b"machine:\n  vcpu: 2\n", 2, "machine.vcpu", "Allowed: vcpus, memory, disk"),
        (
            b"services:\n  - name: db\n    run: x\n    redy: y\n",
            4,
            "services[0].redy",
            "did you mean 'ready'?",
        ),
        (b"services:\n  - name: db\n", 2, "services[0]", "the key run is missing"),
        (b"services:\n  - {name: ../x, run: y}\n", 2, "services[0].name", "regex"),
        (b"verify:\n  - name: a\n    run: b\n    user: nobody\n", 4, "verify[0].user", "nobody"),
        (b"verify: pytest\n", 1, "verify", "expected a list"),
        (b"\ninstall: maybe\n", 2, "install", "true or false"),
        (b"machine:\n  memory: 2GB\n", 2, "machine.memory", "is not a size"),
        (b"machine:\n  disk: 1 MiB\n", 2, "machine.disk", "outside 512 MiB"),
        (b"machine:\n  vcpus: 0\n", 2, "machine.vcpus", ">= 1"),
        (b"egress:\n  - package-registries\n  - everywhere\n", 3, "egress[1]", "is not host:port"),
        (b"warm_egress: [x]\n", 1, "warm_egress[0]", "is not host:port"),
        (b"paths:\n  - /etc\n", 2, "paths[0]", "directory of the repository"),
        (b"paths:\n  - a/../../b\n", 2, "paths[0]", "directory of the repository"),
        (b"warm:\n  - {name: a, run: x}\n  - {name: a, run: y}\n", 3, "warm[1].name", "an earlier one"),
        (b"warm:\n  - {name: a, run: x, timeout: .inf}\n", 2, "warm[0].timeout", "<= 7200"),
        (b"warm:\n  - {name: a, run: x, timeout: .nan}\n", 2, "warm[0].timeout", "> 0"),
        (b"template: other/repository@main\n", 1, "template", "regex"),
        (b"packages: [--force-yes]\n", 1, "packages[0]", "regex"),
        (b"labels: [a b]\n", 1, "labels[0]", "regex"),
        (b"install: true\ninstall: false\n", 2, "install", "twice"),
        (b"- install\n", 1, "", "must hold a mapping"),
        (b"install: [\n", 2, "", "is not YAML"),
        (b"install: !!python/object:os.system x\n", 1, "", "cannot be read"),
        (b"install: !!timestamp never\n", 1, "", "does not suit its tag"),
        (b"\xff\xfe\x00", None, "", "is not YAML"),
    ],
)
def test_an_error_names_file_line_and_key(text, line, key, words):
    error = refused(text)
    assert (error.line, error.key) == (line, key)
    assert words in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text",
    [
        b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 10)) for c in range(ord("b"), ord("k"))
        ),
        b"warm: " + b"[" * 5000,
        b"warm: &x [*x]\n",
        b"x: " + b"1:" * 20_000 + b"1\n",
        b"packages: [" + b"aa," * 50_000 + b"]\n",
        b"# " + b"x" * (300 << 10) + b"\ninstall: true\n",
    ],
    ids=["laughs", "deep", "itself", "sexagesimal", "many", "large"],
)
def test_hostile_files_are_refused_soon(text):
    started = time.perf_counter()
    refused(text)
    assert time.perf_counter() - started < 20


@given(st.binary(max_size=60) | st.text(alphabet="abc:[]{}!&*-#'\"\n <|>%@`", max_size=60).map(str.encode))
def test_any_bytes_are_a_recipe_or_a_recipe_error(text):
    try:
        parse_repository_recipe(text)
    except RecipeError as error:
        assert error.code == "recipe_invalid"
