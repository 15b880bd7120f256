"""Equal keys mean equal dependencies: nothing else of a repository changes a key, and nothing of that escapes it."""

import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from images import git_objects, lockfiles
from images.ecosystems import TABLE, kind_of
from images.errors import MirrorDamaged, RepositoryTooLarge
from images.lockfiles import Inventory, LockFile, dependency_key, inventory, text_digest, within
from tests.unit.images.conftest import Link, Origin, Submodule

SHA = "1" * 40
NAMED = [
    "package-lock.json",
    "npm-shrinkwrap.json",
    "pnpm-lock.yaml",
    "yarn.lock",
    "bun.lock",
    "requirements.txt",
    "requirements-dev.txt",
    "poetry.lock",
    "uv.lock",
    "pdm.lock",
    "Pipfile.lock",
    "go.sum",
    "Cargo.lock",
    "Gemfile.lock",
    "composer.lock",
    "gradle.lockfile",
    "buildscript-gradle.lockfile",
    "gradle/dependency-locks/compile.lockfile",
    "gradle/wrapper/gradle-wrapper.properties",
    "pom.xml",
    "mix.lock",
    ".tool-versions",
    ".nvmrc",
    ".python-version",
    ".node-version",
    "rust-toolchain",
    "rust-toolchain.toml",
]


def stock(origin: Origin, *args, **kwargs) -> Inventory:
    return inventory(origin.path, origin.commit(*args, **kwargs))


def key(found: Inventory, **changed) -> str:
    return dependency_key(
        **{"base_digest": "base", "runner": "2.330.0", "inventory": found, "config": None, **changed}
    )


locks = st.builds(
    LockFile,
    path=st.sampled_from([f"{where}{name}" for where in ("", "a/", "a/b/") for name in NAMED]),
    kind=st.just("npm"),
    digest=st.binary(max_size=3).map(text_digest),
)
inventories = st.lists(locks, max_size=8, unique_by=lambda file: file.path).map(
    lambda files: Inventory(commit=SHA, files=tuple(files))
)


@given(inventories, st.randoms())
def test_the_order_of_files_is_none_of_the_key_s_business(found, random):
    shuffled = list(found.files)
    random.shuffle(shuffled)
    assert key(Inventory(commit="2" * 40, files=tuple(shuffled))) == key(found)


@given(inventories, inventories)
def test_equal_keys_mean_equal_files(one, other):
    same = {(f.path, f.digest) for f in one.files} == {(f.path, f.digest) for f in other.files}
    assert (key(one) == key(other)) == same


@given(
    st.tuples(*[st.sampled_from(["", "a", "ab", "b", '"', "[]"])] * 2),
    st.tuples(*[st.sampled_from(["", "a", "ab", "b", '"', "[]"])] * 2),
)
def test_no_part_runs_into_the_next(one, other):
    empty = Inventory(commit=SHA, files=())
    first, second = (
        dependency_key(base_digest=a, runner=b, inventory=empty, config=None) for a, b in (one, other)
    )
    assert (first == second) == (one == other)


def test_base_runner_and_config_are_part_of_the_key():
    empty = Inventory(commit=SHA, files=())
    different = [
        {},
        {"base_digest": "other"},
        {"runner": "2.331.0"},
        {"runner": None},
        {"runner": ""},
        {"config": b""},
        {"config": b"a: 1\n"},
    ]
    assert len({key(empty, **changed) for changed in different}) == len(different)
    assert key(empty, config=b"a: 1\r\n") == key(empty, config=b"a: 1\n")


def test_the_key_of_today_is_the_key_of_tomorrow():
    files = (
        LockFile(path="package-lock.json", kind="npm", digest=text_digest(b"{}\n"), size=3),
        LockFile(path=".nvmrc", kind="node-version", digest="git:" + SHA, size=3),
    )
    found = Inventory(commit=SHA, files=files)
    assert (
        key(found, config=b"install: true\n")
        == "cd2db5df83b7e1dc9be7eb46583fa281db53304c8fce45cb59468f849fc249e0"
    )


@given(st.text(alphabet=st.sampled_from("ab\n é\"'{}"), max_size=200))
def test_windows_line_endings_change_nothing(text):
    data = text.encode()
    assert text_digest(data.replace(b"\n", b"\r\n")) == text_digest(data)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_any_other_difference_counts(one, other):
    same = (
        one == other if b"\0" in one + other else one.replace(b"\r\n", b"\n") == other.replace(b"\r\n", b"\n")
    )
    assert (text_digest(one) == text_digest(other)) == same


def test_a_binary_file_keeps_its_bytes():
    assert text_digest(b"\0\r\n") != text_digest(b"\0\n")


@pytest.mark.parametrize("name", NAMED)
def test_every_file_of_the_issue_counts_wherever_it_lies(origin, name):
    bare = stock(origin, {"src/main.c": "x"})
    for where in ("", "services/api/"):
        one, two = (stock(origin, {"src/main.c": text, f"{where}{name}": "1"}) for text in ("x", "y"))
        assert [file.path for file in one.files] == [f"{where}{name}"]
        assert key(one) == key(two) != key(bare)
        assert key(stock(origin, {"src/main.c": "x", f"{where}{name}": "2"})) != key(one)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "node_modules/a/package-lock.json",
            "a/vendor/b/go.sum",
            ".venv/x/requirements.txt",
            "vendor/Cargo.lock",
        ),
        *(
            "package-lock.json.orig",
            "my-yarn.lock",
            "requirements/base.txt",
            "requirements.txt/readme",
            "wrapper.properties",
        ),
        *("requirements-old/notes.txt", "README.md", "lockfile"),
    ],
)
def test_what_is_vendored_or_only_looks_alike_does_not(origin, name):
    assert stock(origin, {name: "1", "README": ""}).files == ()
    assert kind_of(name.encode()) is None


def test_a_checkout_of_windows_committed_as_it_was_has_the_same_key(origin):
    unix = stock(origin, {"package-lock.json": '{\n  "a": 1\n}\n', ".nvmrc": "20\n"})
    windows = stock(origin, {"package-lock.json": '{\r\n  "a": 1\r\n}\r\n', ".nvmrc": "20\r\n"})
    assert unix.files != windows.files
    assert key(unix) == key(windows)


def test_what_no_tool_can_read_has_a_key_as_well(origin):
    broken = stock(
        origin, {"package-lock.json": b"<<<<<<< HEAD\n{", "poetry.lock": b"\xff\xfe\0\0", "go.sum": b""}
    )
    assert len(broken.files) == 3
    assert key(broken) == key(
        stock(
            origin, {"package-lock.json": b"<<<<<<< HEAD\r\n{", "poetry.lock": b"\xff\xfe\0\0", "go.sum": b""}
        )
    )


def test_a_submodule_counts_by_its_commit(origin):
    one = stock(origin, {"README": "", "libs/core": Submodule("1" * 40)})
    assert one.files == (LockFile(path="libs/core", kind="submodule", digest="git:" + "1" * 40),)
    assert key(one) != key(stock(origin, {"README": "", "libs/core": Submodule("2" * 40)}))
    assert stock(origin, {"README": "", "vendor/core": Submodule("1" * 40)}).files == ()


def test_a_link_counts_by_what_it_leads_to(origin):
    def linked(text: str, target: str = "../shared/deps") -> Inventory:
        return stock(
            origin, {"shared/deps": text, "dir": Link("shared"), "app/requirements.txt": Link(target)}
        )

    one = linked("a==1\n")
    assert one.files[0].kind == "pip"
    assert one.files[0].digest == text_digest(b"a==1\n")
    assert key(one) == key(linked("a==1\r\n")) != key(linked("a==2\n"))
    assert key(one) == key(linked("a==1\n", "../dir/deps"))


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../etc/passwd", "nowhere", "package-lock.json", "src", "a\nb"]
)
def test_a_link_out_of_the_repository_or_to_nothing_is_not_followed(origin, target):
    files = {"src/main": "x", "package-lock.json": Link(target), "z/yarn.lock": "1"}
    found = stock(origin, files)
    assert [(file.path, file.kind) for file in found.files] == [
        ("package-lock.json", "link"),
        ("z/yarn.lock", "yarn"),
    ]
    assert key(found) != key(stock(origin, {**files, "package-lock.json": Link("other")}))


def test_names_of_any_bytes_are_told_apart(origin):
    names = [
        b"\xff/go.sum",
        b"\xfe/go.sum",
        "ü/go.sum",
        b"a\nb/go.sum",
        'q"\\/go.sum',
        b"a\tb/go.sum",
        "-rf/go.sum",
    ]
    found = stock(origin, dict.fromkeys(names, "1"))
    assert len({file.path for file in found.files}) == len(names)
    assert len(key(found)) == 64


def test_a_name_that_would_climb_out_is_no_lock_file(origin):
    blob = origin.git("hash-object", "-w", "--stdin", stdin=b"1")
    inner = bytes.fromhex(origin.git("mktree", stdin=f"100644 blob {blob}\tgo.sum\n".encode()))
    tree = origin.git(
        "hash-object",
        "-w",
        "-t",
        "tree",
        "--literally",
        "--stdin",
        stdin=b"40000 ..\0" + inner + b"40000 .git\0" + inner,
    )
    commit = origin.git("commit-tree", "-m", "x", tree)
    assert inventory(origin.path, commit).files == ()


def test_huge_files_count_by_git_s_digest(origin, monkeypatch):
    monkeypatch.setattr(lockfiles, "_MAX_FILE", 1000)
    one, two = (stock(origin, {"yarn.lock": "x" * 2000 + end, "go.sum": "1" + end}) for end in ("a\n", "b\n"))
    assert [file.digest[:4] for file in one.files] == ["text", "git:"]
    assert key(one) != key(two)


def test_hundreds_of_files_share_one_budget_of_reading(origin, monkeypatch):
    monkeypatch.setattr(lockfiles, "_MAX_CONTENT", 10_000)
    files = {f"p{number:03}/package-lock.json": f"{number}" * 100 for number in range(300)}
    found = stock(origin, files)
    assert len(found.files) == 300
    assert {file.digest[:4] for file in found.files} == {"text", "git:"}
    for changed in ("p000", "p299"):
        assert key(stock(origin, {**files, f"{changed}/package-lock.json": "new"})) != key(found)


def test_a_tree_without_end_is_given_up(origin, monkeypatch):
    monkeypatch.setattr(git_objects, "_MAX_ENTRIES", 20_000)
    blob = origin.git("hash-object", "-w", "--stdin", stdin=b"1")
    tree = origin.git("mktree", stdin="".join(f"100644 blob {blob}\tgo{n}.sum\n" for n in range(10)).encode())
    for _ in range(9):  # ten to the tenth files
        tree = origin.git("mktree", stdin="".join(f"040000 tree {tree}\td{n}\n" for n in range(10)).encode())
    commit = origin.git("commit-tree", "-m", "x", tree)
    with pytest.raises(RepositoryTooLarge):
        inventory(origin.path, commit)


def test_a_commit_that_is_not_here_is_damage(origin):
    stock(origin, {"go.sum": "1"})
    with pytest.raises(MirrorDamaged, match="Fetch the repository again"):
        inventory(origin.path, "1" * 40)


def test_paths_narrow_the_key_but_keep_the_toolchain_above(origin):
    files = {
        ".nvmrc": "20",
        "go.sum": "1",
        "apps/web/yarn.lock": "1",
        "apps/api/go.sum": "1",
        "docs/yarn.lock": "1",
    }
    found = stock(origin, files)
    assert [file.path for file in within(found.files, ["apps/*"])] == [
        ".nvmrc",
        "apps/api/go.sum",
        "apps/web/yarn.lock",
    ]
    elsewhere = stock(origin, {**files, "docs/yarn.lock": "2", "go.sum": "2"})
    assert key(found, paths=["apps"]) == key(elsewhere, paths=["apps"])
    assert key(found) != key(elsewhere)
    assert key(found, paths=["apps"]) != key(stock(origin, {**files, ".nvmrc": "22"}), paths=["apps"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(NAMED), st.sampled_from(["1\n", "2\n"]), max_size=5),
    st.sampled_from(["1\n", "2\n"]),
)
def test_keys_of_real_commits_follow_their_lock_files_alone(origin, files, other):
    one = stock(origin, {"README": "1\n", **files})
    two = stock(origin, {"README": other, "src/new.py": other, **dict(reversed(files.items()))})
    assert key(one) == key(two)
    for name in files:
        changed = {**files, name: "3\n"}
        assert key(stock(origin, {"README": "1\n", **changed})) != key(one)


def test_twenty_thousand_files_take_a_moment(origin):
    files = {f"src/package{n // 100}/module{n}.py": str(n) for n in range(19_900)}
    files |= {f"apps/app{n}/package-lock.json": f"{n}\n" + "x" * 20_000 for n in range(100)}
    commit = origin.commit(files)
    times: list[float] = []
    for _ in range(5):
        before = processor_seconds()
        key(inventory(origin.path, commit))
        times.append(processor_seconds() - before)
    assert min(times) < 0.3, times


def processor_seconds() -> float:
    """Of ours and of git: on a busy machine the clock on the wall tells of others."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def test_the_table_names_each_file_once():
    globs = [glob for row in TABLE for glob in row.files]
    assert len(globs) == len(set(globs))
    assert len({row.name for row in TABLE}) == len(TABLE)
