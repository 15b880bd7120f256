"""Recipes say what they mean, and every error says where it stands and what is allowed."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.errors import RecipeError
from images.recipe import load_again, load_recipe, shipped_recipes
from images.schema import parse_egress, parse_size


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "mine.yml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def refused(path: str, **overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides={key.replace("__", "."): value for key, value in overrides.items()})
    assert caught.value.code == "recipe_invalid"
    return caught.value


def test_every_shipped_recipe_loads():
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    assert {"minimal", "python-ci", "github-runner"} <= set(recipes)
    assert all(name == recipe.name for name, recipe in recipes.items())


def test_shipped_machines_are_small_and_their_labels_say_so():
    recipe = load_recipe("python-ci")
    assert (recipe.machine.memory_mib, recipe.machine.disk_mib) == (512, 4096)
    assert recipe.github_labels == ("microvm-python-ci", "microvm-1cpu-512mb")
    big = load_recipe("python-ci", overrides={"machine.memory": "8 GiB", "machine.vcpus": "4"})
    assert big.github_labels == ("microvm-python-ci", "microvm-4cpu-8gb")


def test_extends_appends_lists_and_replaces_values():
    base, child = load_recipe("python-ci"), load_recipe("github-runner")
    assert child.packages[: len(base.packages)] == base.packages
    assert "libicu72" in child.packages
    assert child.warm[: len(base.warm)] == base.warm
    assert child.sudo
    assert child.name == "github-runner"
    assert child.origin == ("minimal.yml", "python-ci.yml", "node-ci.yml", "github-runner.yml")


def test_no_network_card_without_egress():
    assert load_recipe("minimal").machine.network.mode == "none"
    assert load_recipe("python-ci").machine.network.mode == "list"


def test_an_unknown_key_names_line_and_the_nearest_one(write):
    error = refused(write("name: mine\ndescription: x\npackges: [git]\n"))
    assert (error.line, error.key) == (3, "packges")
    assert "did you mean 'packages'?" in str(error)
    assert "mine.yml:3: packges" in str(error)


def test_an_unknown_key_inside_names_what_is_allowed_there(write):
    error = refused(
        write("name: mine\nwarm:\n  - name: a\n    run: x\n  - name: b\n    run: x\n    timout: 3\n")
    )
    assert (error.line, error.key) == (7, "warm[1].timout")
    assert "did you mean 'timeout'?" in str(error)
    assert "vcpus" not in str(error)


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("name: mine\nsudo: maybe\n", 2, "sudo"),
        ("name: mine\nmachine:\n  vcpus: many\n", 3, "machine.vcpus"),
        ("name: mine\nmachine:\n  vcpus: 0\n", 3, "machine.vcpus"),
        ("name: mine\nmachine:\n  memory: 512\n", 3, "machine.memory"),
        ("name: mine\nmachine:\n  memory: 512 MB\n", 3, "machine.memory"),
        ("name: mine\nmachine: {disk: 1 MiB}\n", 2, "machine.disk"),
        ("name: My Recipe\n", 1, "name"),
        ("name: mine\npackages: [git, Bad_Name]\n", 2, "packages[1]"),
        ("name: mine\negress:\n  - example.com\n", 3, "egress[0]"),
        ("name: mine\negress: ['example.com:99999']\n", 2, "egress[0]"),
        ("name: mine\nca: mine\n", 2, "ca"),
        ("name: mine\nfiles:\n  - dest: relative\n    content: x\n", 3, "files[0].dest"),
        ("name: mine\nfiles:\n  - dest: /a/../b\n    content: x\n", 3, "files[0].dest"),
        ("name: mine\nfiles:\n  - dest: /a\n", 3, "files[0]"),
        ("name: mine\nfiles:\n  - {dest: /a, content: x, source: y}\n", 3, "files[0]"),
        ("name: mine\nrunner: {url: 'https://example.com/x'}\n", 2, "runner.url"),
        (
            "name: mine\nrunner: {tarball: x, url: 'https://example.com/x', sha256: '%s'}\n" % ("0" * 64),
            2,
            "runner",
        ),
        ("name: mine\nrunner: {tarball: x, sha256: abc}\n", 2, "runner.sha256"),
        ("name: mine\nwarm:\n  - name: a\n    run: x\n    timeout: 0\n", 5, "warm[0].timeout"),
        ("name: mine\nname: yours\n", 2, "name"),
        ("name: mine\nextends: pythn-ci\n", 2, "extends"),
        ("description: nameless\n", 1, ""),
        ("- a\n- b\n", 1, ""),
        ("name: [\n", 2, ""),
        ("name: mine\npackages: &a [*a]\n", 2, None),
    ],
)
def test_what_is_wrong_is_refused_where_it_stands(write, text, line, key):
    error = refused(write(text))
    assert error.line == line
    if key is not None:
        assert error.key == key


def test_a_base_that_is_wrong_is_blamed_itself(write):
    write("name: base\nsudo: 3\n", "base.yml")
    error = refused(write("name: mine\nextends: ./base.yml\n"))
    assert error.file.endswith("base.yml")
    assert error.line == 2


def test_a_circle_of_bases_is_refused(write):
    write("name: a\nextends: ./b.yml\n", "a.yml")
    error = refused(write("name: b\nextends: ./a.yml\n", "b.yml"))
    assert "b → a → b" in str(error)


def test_unknown_recipe_names_those_there_are():
    error = refused("pyton-ci")
    assert "did you mean 'python-ci'?" in str(error)
    assert "minimal" in str(error)
    assert "no recipe file" in str(refused("./nowhere.yml"))


def test_overrides_replace_and_keep_text_as_text():
    digits = "1" * 64
    recipe = load_recipe(
        "github-runner", overrides={"runner.tarball": "/t/r.tar.gz", "runner.sha256": digits}
    )
    assert recipe.runner is not None
    assert (recipe.runner.tarball, recipe.runner.sha256) == ("/t/r.tar.gz", digits)
    assert load_recipe("python-ci", overrides={"egress": "[]"}).egress == ()
    assert load_recipe("python-ci", overrides={"sudo": "false"}).sudo is False


def test_a_wrong_override_names_its_key():
    assert "did you mean 'runner'?" in str(refused("github-runner", runer__tarball="/x"))
    assert refused("minimal", machine__memory="lots").key == "machine.memory"
    assert refused("minimal", machine__vcpus="many").key == "machine.vcpus"
    assert refused("minimal", machine="big").key == "machine"


def test_paths_start_at_the_file_or_at_the_command_line(write, monkeypatch, tmp_path):
    path = write("name: mine\nfiles: [{dest: /a, source: data.txt}]\nrunner: {tarball: r.tgz}\n")
    recipe = load_recipe(path)
    assert recipe.files[0].source == str(tmp_path / "data.txt")
    assert recipe.runner is not None and recipe.runner.tarball == str(tmp_path / "r.tgz")
    monkeypatch.chdir("/")
    again = load_recipe(path, overrides={"runner.tarball": "x/r.tgz"})
    assert again.runner is not None and again.runner.tarball == "/x/r.tgz"


@given(st.integers(1, 1 << 20))
def test_sizes_are_mebibytes(size):
    assert parse_size(f"{size} MiB") == size
    assert parse_size(f"{size}GiB") == size * 1024


@given(st.text(max_size=30))
def test_no_text_breaks_the_parsers(text):
    for parse in (parse_size, parse_egress):
        try:
            parse(text)
        except ValueError as error:
            assert repr(text) in str(error)


@given(st.text(alphabet="abn:[]{}&*!|>-\n \t'\"#%@,", max_size=60))
def test_no_yaml_breaks_the_loader(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(str(path))


def test_no_shipped_recipe_names_a_registry():
    for path in shipped_recipes().values():
        assert "pypi" not in Path(path).read_text()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("Forge.example:443", "forge.example", 443),
        ("10.1.2.3:80", "10.1.2.3", 80),
        ("10.1.2.0/24:*", "10.1.2.0/24", 0),
        ("[fd00::/8]:443", "fd00::/8", 443),
        ("[fd00::1]:*", "fd00::1", 0),
    ],
)
def test_an_egress_is_a_name_or_an_address_and_a_port(text, host, port):
    rule = parse_egress(text)
    assert (rule.host, rule.port) == (host, port)


@pytest.mark.parametrize(
    "text", ["forge.example:*", "forge.example", "10.1.2.3/24:80", "10.1.2.3:65536", ":80", "a b:80"]
)
def test_what_is_no_egress_is_refused(text):
    with pytest.raises(ValueError, match="is not host:port"):
        parse_egress(text)


def test_what_a_recipe_was_made_from_makes_it_again_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yml").write_text("name: own\nextends: github-runner\npackages: [tree]\n")
    made = load_recipe("./own.yml", overrides={"runner.tarball": "runner.tar.gz", "machine.memory": "1 GiB"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_again(made.made_from)
    assert again == made
    assert again.runner is not None
    assert again.runner.tarball == str(tmp_path / "runner.tar.gz")
