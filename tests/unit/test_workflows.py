"""The workflows that users copy: what GitHub would read, with no label but ours and no step we do not run."""

import re
from pathlib import Path

import pytest
import yaml

from images.recipe import load_recipe, shipped_recipes
from tests.acceptance.samples import NAMES, sample

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("github-*.yml"))


def test_there_is_one_for_each_ecosystem():
    assert {path.stem for path in WORKFLOWS} >= {"github-go", "github-node", "github-python", "github-rust"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_parses_and_runs_on_our_label_alone(path: Path):
    # "on" is a truth value in YAML 1.1, which is what this parser reads.
    whole = yaml.safe_load(path.read_text())
    assert set(whole) - {"env"} == {"name", True, "jobs"}
    assert whole[True] == ["push", "pull_request"]
    for job in whole["jobs"].values():
        assert job["runs-on"] == "microvm"
        assert job["steps"][0] == {"uses": "actions/checkout@v4"}
        assert all(set(step) <= {"name", "run", "env"} for step in job["steps"][1:])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_labels_in_its_comments_exist(path: Path):
    known = {label for name in shipped_recipes() for label in load_recipe(name).github_labels}
    named = re.findall(r"microvm-[a-z][a-z0-9-]*\b", path.read_text())
    assert set(named) <= known


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_names_no_registry_and_locks_every_package(name: str):
    files = sample(name)
    lock = files.get("package-lock.json") or files["requirements.txt"]
    assert "resolved" not in lock and "index-url" not in lock
    packages = lock.count('"integrity"') if name == "node" else lock.count("--hash=sha256:")
    assert packages == {"python": 41, "node": 163}[name]
    assert sum(map(len, files.values())) < 100_000
