"""What can be known to be wrong is said before anything is built."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from images import plan
from images.cache import Cache
from images.errors import RecipeError
from images.events import Step
from images.recipe import load_recipe

pytestmark = pytest.mark.anyio


@pytest.fixture
def tarball(tmp_path):
    path = tmp_path / "runner.tar.gz"
    path.write_bytes(b"a runner")
    return path


async def ask(tmp_path: Path, **overrides: str) -> tuple[Path, str]:
    recipe = load_recipe(
        "github-runner", overrides={f"runner.{key}": value for key, value in overrides.items()}
    )
    return await plan._runner(Cache(tmp_path / "cache"), recipe, Step("check", lambda _: None))


async def test_a_missing_tarball_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"/nowhere/runner\.tar\.gz") as caught:
        await ask(tmp_path, tarball="/nowhere/runner.tar.gz")
    assert caught.value.key == "runner.tarball"


async def test_a_wrong_sha256_names_both(tmp_path, tarball):
    found = hashlib.sha256(b"a runner").hexdigest()
    with pytest.raises(RecipeError, match=found) as caught:
        await ask(tmp_path, tarball=str(tarball), sha256="0" * 64)
    assert caught.value.key == "runner.sha256"
    assert "0" * 64 in str(caught.value)


async def test_the_right_sha256_or_none_passes(tmp_path, tarball):
    found = hashlib.sha256(b"a runner").hexdigest()
    assert await ask(tmp_path, tarball=str(tarball)) == (tarball, found)
    assert await ask(tmp_path, tarball=str(tarball), sha256=found) == (tarball, found)


async def test_a_runner_template_without_a_runner_says_what_to_give(tmp_path):
    with pytest.raises(RecipeError, match=r"runner\.tarball=/"):
        await ask(tmp_path)


def test_the_meaning_of_a_recipe_does_not_depend_on_where_its_files_lie(tmp_path):
    texts = []
    for name in ("one", "two"):
        directory = tmp_path / name
        directory.mkdir()
        recipe = "name: mine\nfiles: [{dest: /a, source: data.txt}]\nrunner: {tarball: r.tgz}\n"
        (directory / "mine.yml").write_text(recipe)
        texts.append(plan.normalised(load_recipe(str(directory / "mine.yml"))))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "change", [{"page_cache": ("/x",)}, {"labels": ("x",)}, {"egress": ()}, {"warm": ()}, {"name": "other"}]
)
def test_what_a_recipe_says_is_in_its_meaning(change):
    recipe = load_recipe("python-ci")
    assert plan.normalised(recipe) != plan.normalised(msgspec.structs.replace(recipe, **change))


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "mine.yml").write_text("name: mine\nfiles: [{dest: /a, source: nowhere.txt}]\n")
    recipe = load_recipe(str(tmp_path / "mine.yml"))
    with pytest.raises(RecipeError, match=r"nowhere\.txt"):
        plan._read_file(recipe, recipe.files[0])


async def test_the_word_package_registries_is_looked_up_once(monkeypatch):
    from images import registries
    from vmm_core.machine import EgressRule

    asked: list[int] = []

    async def look_up(_say):
        asked.append(1)
        return (EgressRule("index.example", 443),)

    monkeypatch.setattr(registries, "package_registries", look_up)
    recipe = load_recipe("python-ci", overrides={"egress": "['forge.example:443', package-registries]"})
    warm, jobs = await plan.open_networks(recipe, Step("x", lambda _: None))
    assert warm.allow == (EgressRule("index.example", 443),)
    assert jobs.allow == (EgressRule("forge.example", 443), EgressRule("index.example", 443))
    assert warm.mode == jobs.mode == "list"
    assert asked == [1]


async def test_the_word_internet_opens_jobs_to_it_and_the_warm_steps_only_where_it_stands():
    recipe = load_recipe(
        "minimal", overrides={"egress": "[internet, '10.1.2.0/24:5432']", "machine.network_mbit": "50"}
    )
    warm, jobs = await plan.open_networks(recipe, Step("x", lambda _: None))
    assert (warm.mode, warm.allow) == ("list", ())
    assert (jobs.mode, jobs.mbit) == ("internet", 50)
    assert [(rule.host, rule.port) for rule in jobs.allow] == [("10.1.2.0/24", 5432)]
