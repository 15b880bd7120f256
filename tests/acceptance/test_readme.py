"""What README.md shows is what works: its marked commands and its library example are run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from images.recipe import load_recipe
from runner_service.settings import load

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def marked(language: str) -> list[str]:
    """The blocks of this language under a line ``<!-- tested -->``."""
    return re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [
        line.removeprefix("$ ").partition("   #")[0].strip()
        for block in marked("console")
        for line in block.splitlines()
    ]


def environment(data_dir: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "MICROVM_DATA_DIR": str(data_dir), "PYTHONPATH": str(ROOT)}


def test_there_is_something_to_run() -> None:
    assert len(commands()) >= 5
    assert len(marked("python")) == 1


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_works(command: str, data_dir: Path) -> None:
    result = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment(data_dir),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip(), "it says something"


def test_the_library_example_runs(data_dir: Path, tmp_path: Path) -> None:
    example = tmp_path / "example.py"
    example.write_text(marked("python")[0].replace("/var/lib/microvm", str(data_dir)))
    result = subprocess.run(
        [sys.executable, str(example)],
        env=environment(data_dir),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    vm = "vm-[0-9a-f]{12}"
    child, thawed = (
        rf"0 started in ({vm})\n(?!\1){vm}\n \d+ ms\n",
        r"started in \1\n VmUsage\(private_dirty_bytes=",
    )
    assert re.match(child + thawed, result.stdout), result.stdout


def test_the_recipe_it_shows_is_one(tmp_path: Path) -> None:
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "extends:" in block)
    (tmp_path / "my-team.yml").write_text(text)
    recipe = load_recipe(str(tmp_path / "my-team.yml"))
    assert (recipe.name, recipe.machine.vcpus, recipe.machine.memory_mib) == ("my-team", 2, 2048)


def test_the_settings_it_shows_are_right(tmp_path: Path) -> None:
    text = next(re.finditer(r"```toml\n(.*?)```", README, re.DOTALL))[1]
    (tmp_path / "microvm.toml").write_text(text)
    settings = load(tmp_path / "microvm.toml", environ={})
    assert settings.runners.max_vms == 8


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_a_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("script", ["demo", "test", "bench", "install", "bake"])
def test_every_script_explains_itself(script: str) -> None:
    result = subprocess.run(
        [ROOT / "scripts" / script, "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0
    assert len(result.stdout) > 100
