"""Warm parents as users meet them: a push is baked by itself, and unchanged workflows find everything in place."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from scripts.programs.stage import OWNER, Stage, git, make_repository
from tests.acceptance.conftest import eventually_async, gone, told
from tests.acceptance.samples import sample
from tests.standins.github_state import Job
from vmm_core.engine import Engine

pytestmark = pytest.mark.anyio

CI = ".github/workflows/ci.yml"
BAKE_SECONDS = 400.0
FILES = {
    "README.md": "A repository.\n",
    "requirements.txt": "tabulate==0.9.0\n",
    "test_it.py": "import tabulate\n\n\ndef test_it():\n    assert tabulate.tabulate([[1]])\n",
    CI: sample("python")[CI],
}


PACKAGE = {
    "name": "small",
    "version": "1.0.0",
    "private": True,
    "scripts": {"test": "node -e \"require('ms')\""},
}
NODE_FILES = {
    "package.json": json.dumps(PACKAGE | {"dependencies": {"ms": "2.1.3"}}),
    # As the large sample locks it, which takes minutes to install.
    "package-lock.json": json.dumps(
        {
            **{key: PACKAGE[key] for key in ("name", "version")},
            "lockfileVersion": 3,
            "requires": True,
            "packages": {
                "": {"name": "small", "version": "1.0.0", "dependencies": {"ms": "2.1.3"}},
                "node_modules/ms": json.loads(sample("node")["package-lock.json"])["packages"][
                    "node_modules/ms"
                ],
            },
        }
    ),
    CI: sample("node")[CI],
}


class Project:
    """A repository on the stage that tests push to."""

    def __init__(self, stage: Stage, name: str, path: Path) -> None:
        self.stage = stage
        self.name = name
        self.path = path

    def commit(self, files: Mapping[str, str], branch: str = "main") -> str:
        git(self.path, "checkout", "-q", "-B", branch)
        for name, text in files.items():
            (self.path / name).write_text(text)
        git(self.path, "add", "-A")
        git(self.path, "commit", "-q", "-m", "change")
        return git(self.path, "rev-parse", "HEAD")

    async def push(self, branch: str = "main") -> None:
        await self.stage.forge.push(OWNER, self.name, branch)

    async def bakes(self) -> list[dict[str, Any]]:
        answer = await self.stage.http.get("/bakes", params={"repository": f"{OWNER}/{self.name}"})
        return answer.json()

    async def baked(self, commit: str) -> dict[str, Any]:
        """The bake of this commit once it is over."""

        async def over() -> dict[str, Any] | None:
            found = [bake for bake in await self.bakes() if bake["commit"] == commit]
            return next((bake for bake in found if bake["state"] in ("done", "failed")), None)

        return await eventually_async(over, f"the bake of {commit[:12]}", timeout=BAKE_SECONDS)

    async def run(self, ref: str | None = None) -> tuple[Job, dict[str, Any], str]:
        """A run of its workflow: the job, its story and its log."""
        run = await self.stage.forge.queue_run(OWNER, self.name, ref, workflow=CI)
        story = await gone(self.stage, run.jobs[0])
        return run.jobs[0], story, self.stage.forge.log(run.jobs[0].id)


@pytest.fixture(scope="module")
def bakes() -> Mapping[str, float]:
    return {"poll_s": 0, "attempts": 1, "choice_limit_s": 20}


@pytest.fixture(scope="module", autouse=True)
async def no_parent_stays(engine: Engine, stage: Stage) -> AsyncIterator[None]:
    """What is baked here is of this run's forge: nobody finds it again."""
    del stage
    yield
    for snapshot in engine.snapshots.list():  # newest first: nothing stands on it
        if snapshot.manifest.owner == OWNER:
            engine.snapshots.remove(snapshot.digest)


async def project(stage: Stage, directory: Path, name: str, files: Mapping[str, str]) -> Project:
    path = await make_repository(directory, files)
    await stage.forge.add_repository(path, owner=OWNER, name=name)
    return Project(stage, name, path)


async def test_a_push_is_baked_and_the_next_job_is_forked_from_it(stage: Stage, tmp_path: Path) -> None:
    warm = await project(stage, tmp_path, f"warm-{time.time_ns()}", FILES)
    job, story, log = await warm.run()
    assert job.conclusion == "success", f"{log}\n{stage.log_tail()}"
    assert "no parent yet" in told(story, "parent")
    assert "installed already" not in log

    # The first job made the repository known: its parent is baked without being asked for.
    first = await eventually_async(warm.bakes, "a bake", timeout=BAKE_SECONDS)
    made = await warm.baked(first[0]["commit"])
    assert made["state"] == "done", f"{made}\n{stage.log_tail()}"
    job, story, log = await warm.run()
    assert job.conclusion == "success", f"{log}\n{stage.log_tail()}"
    assert f"{OWNER}/{warm.name}@main" in told(story, "parent")
    assert "exact key" in told(story, "parent")
    assert "installed already" in log

    # No lock file changed: the same key, no bake, the same parent.
    commit = warm.commit({"README.md": "Changed.\n"})
    await warm.push()
    job, story, log = await warm.run()
    assert (job.conclusion, f"exact key of commit {commit[:12]}" in told(story, "parent")) == (
        "success",
        True,
    )
    assert "installed already" in log
    assert len(await warm.bakes()) == 1

    # A lock file changed for the worse: the bake fails and says where, jobs go on with the parent there was.
    commit = warm.commit({"requirements.txt": "tabulate==0.9.0\nno-such-package-of-anybody==9.9.9\n"})
    await warm.push()
    failed = await warm.baked(commit)
    assert (failed["state"], failed["step"]) == ("failed", "install: python: requirements.txt")
    assert any("no-such-package-of-anybody" in line for line in failed["output"])
    assert failed["advice"]
    shown = (await stage.http.get(f"/bakes/{failed['id']}/log")).text
    assert "no-such-package-of-anybody" in shown
    job, story, log = await warm.run()
    assert job.conclusion == "failure"
    assert f"{OWNER}/{warm.name}@main" in told(story, "parent")
    assert "failed at step install" in told(story, "parent")


async def test_npm_ci_takes_its_tree_from_the_parent(stage: Stage, tmp_path: Path) -> None:
    warm = await project(stage, tmp_path, f"node-{time.time_ns()}", NODE_FILES)
    await warm.push()
    made = await eventually_async(warm.bakes, "a bake", timeout=BAKE_SECONDS)
    made = await warm.baked(made[0]["commit"])
    assert made["state"] == "done", f"{made}\n{stage.log_tail()}"
    job, story, log = await warm.run()
    assert job.conclusion == "success", f"{log}\n{stage.log_tail()}"
    assert "exact key" in told(story, "parent")
    assert "node_modules comes from the warm parent" in log
