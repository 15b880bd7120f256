"""The stand-in runner against the stand-in GitHub, on this host: real git, real HTTP, real processes.

What holds here is what the service may expect of ``bin/Runner.Listener run`` in a guest.
"""

import asyncio
import os
import random
import signal
import subprocess
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from images import warm_guest
from tests.standins.github import as_process
from tests.standins.github_model import Times
from tests.standins.github_world import (
    OWNER,
    REPO,
    SCOPE,
    ForgeWorld,
    forge_world,
    git,
    make_repository,
    workflow_of,
)
from tests.standins.runner import build_runner_tarball

pytestmark = pytest.mark.anyio


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ForgeWorld]:
    async with forge_world(tmp_path) as made:
        yield made


def alive(marker: str) -> list[str]:
    """Processes whose environment holds ``marker``."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            try:
                if marker.encode() in (directory / "environ").read_bytes():
                    found.append((directory / "cmdline").read_text())
            except OSError:
                continue
    return found


async def test_a_job_from_checkout_to_completion(world: ForgeWorld) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    runner = await world.runner(ACTIONS_RUNNER_PRINT_LOG_TO_STDOUT="1")
    done = await world.forge.wait_for(run.jobs[0])
    assert await runner.exit() == 0
    assert done.conclusion == "success" and done.runner_name == "r1"
    log = world.forge.log(done.id)
    assert f"hello from {run.sha}\n" in log and "good morning\n" in log
    assert [step["name"] for step in done.steps] == [
        "Set up job",
        "Run actions/checkout@v4",
        "Greet",
        "Complete job",
    ]
    assert {(s["status"], s["conclusion"]) for s in done.steps} == {("completed", "success")}
    for line in ("√ Connected to GitHub", "Listening for Jobs", "Running job: test", "result: Succeeded"):
        assert line in runner.text
    assert log in runner.text.replace(
        runner.text.partition("Running job: test\n")[0] + "Running job: test\n", ""
    )
    assert await world.github.get_runner(SCOPE, runner.id) is None, "ephemeral: gone with its job"
    assert next((runner.root / "_diag").glob("Worker_*.log")).read_text() == log
    assert done.token not in log + runner.text, "the token for the checkout shows nowhere"


async def test_one_job_only_then_it_ends(world: ForgeWorld) -> None:
    first = await world.forge.queue_run(OWNER, REPO)
    second = await world.forge.queue_run(OWNER, REPO)
    runner = await world.runner()
    assert await runner.exit() == 0
    assert first.status == "completed" and second.status == "queued"


async def test_any_matching_runner_takes_any_job(tmp_path: Path) -> None:
    """A registration is not tied to the job it was made for; labels decide, and all of them count."""
    workflow = """\
jobs:
  gpu: {runs-on: [microvm, GPU], steps: [{run: "true"}]}
  any: {runs-on: microvm, steps: [{run: "true"}]}
"""
    async with forge_world(tmp_path, workflow) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        gpu, plain = run.jobs
        small = await world.runner("small", labels=("MicroVM",))
        await world.forge.wait_for(plain)
        assert gpu.status == "queued" and plain.runner_name == "small"
        await world.runner("big", labels=("microvm", "gpu", "x64"))
        await world.forge.wait_for(gpu)
        assert gpu.runner_name == "big" and await small.exit() == 0


async def test_a_failing_step_fails_the_job_but_not_the_runner(tmp_path: Path) -> None:
    async with forge_world(tmp_path, workflow_of("echo before; false; echo behind", "echo never")) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner()
        assert await runner.exit() == 0
        done = run.jobs[0]
        assert done.conclusion == "failure"
        log = world.forge.log(done.id)
        assert "before\n" in log and "\nbehind\n" not in log and "Process completed with exit code 1." in log
        assert [s["conclusion"] for s in done.steps] == ["success", "failure", "skipped", "success"]
        assert "result: Failed" in runner.text


async def test_steps_hand_on_environment_and_path(tmp_path: Path) -> None:
    workflow = workflow_of(
        "mkdir tools; printf '#!/bin/sh\\necho tool ran\\n' > tools/tool; chmod +x tools/tool\n"
        'echo "$PWD/tools" >> "$GITHUB_PATH"\n'
        'echo "ANSWER=42" >> "$GITHUB_ENV"\n'
        'printf "LONG<<END\\none\\ntwo\\nEND\\n" >> "$GITHUB_ENV"',
        'tool; echo "answer $ANSWER"; echo "$LONG"; echo "$FROM_JOB"',
        head="env: {FROM_JOB: of-the-job}",
    )
    async with forge_world(tmp_path, workflow) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        await world.runner()
        done = await world.forge.wait_for(run.jobs[0])
        assert done.conclusion == "success"
        assert "tool ran\nanswer 42\none\ntwo\nof-the-job\n" in world.forge.log(done.id)


async def test_the_log_is_live(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with forge_world(
        tmp_path, workflow_of(f"echo first; while [ ! -e {gate} ]; do sleep 0.05; done; echo last")
    ) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner(ACTIONS_RUNNER_PRINT_LOG_TO_STDOUT="1")
        await world.forge.wait_for_log(run.jobs[0], "\nfirst\n")
        assert run.jobs[0].status == "in_progress" and "\nfirst\n" in runner.text
        assert [s["status"] for s in run.jobs[0].steps] == ["completed", "in_progress", "queued"]
        gate.touch()
        await world.forge.wait_for(run.jobs[0])
        assert "\nlast\n" in world.forge.log(run.jobs[0].id)


async def test_much_output_arrives_whole_and_in_order(tmp_path: Path) -> None:
    async with forge_world(
        tmp_path, workflow_of("for i in $(seq 1 60000); do echo line-$i-ü; done")
    ) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        await world.runner()
        await world.forge.wait_for(run.jobs[0])
        lines = world.forge.log(run.jobs[0].id).splitlines()
        start = lines.index("line-1-ü")
        assert lines[start : start + 60000] == [f"line-{i}-ü" for i in range(1, 60001)]


async def test_odd_output_does_no_harm(tmp_path: Path) -> None:
    steps = (
        "printf 'no newline'",
        "printf '\\377\\376 bytes\\n'",
        "head -c 300000 /dev/zero | tr '\\0' x; echo; echo tail",
    )
    async with forge_world(tmp_path, workflow_of(*steps)) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        await world.runner()
        done = await world.forge.wait_for(run.jobs[0])
        log = world.forge.log(done.id)
        assert done.conclusion == "success"
        assert "\nno newline\n" in log and "\ufffd\ufffd bytes\n" in log and "x" * 300000 + "\ntail\n" in log


async def test_a_cancel_ends_the_steps_and_what_they_started(tmp_path: Path) -> None:
    steps = ("(sleep 300 &) ; trap '' INT; echo started; sleep 300", "echo never")
    async with forge_world(tmp_path, workflow_of(*steps)) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner(MARKER="cancel-me-7c1f")
        await world.forge.wait_for_log(run.jobs[0], "\nstarted\n")
        world.forge.actions.cancel(run)
        assert run.jobs[0].status == "in_progress", "it is the runner that ends it"
        done = await world.forge.wait_for(run.jobs[0])
        assert await runner.exit() == 0
        assert done.conclusion == "cancelled" and "The operation was canceled." in world.forge.log(done.id)
        assert [s["conclusion"] for s in done.steps] == ["success", "cancelled", "skipped", "skipped"]
        assert sum(call.endswith("/message") for call in world.forge.calls) < 6, "it does not ask in a loop"
        assert not alive("cancel-me-7c1f")


async def test_background_processes_live_between_steps_and_end_with_the_job(tmp_path: Path) -> None:
    steps = ("sleep 300 & echo $! > pid", "kill -0 $(cat pid) && echo still there")
    async with forge_world(tmp_path, workflow_of(*steps)) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner(MARKER="background-91aa")
        done = await world.forge.wait_for(run.jobs[0])
        assert await runner.exit() == 0
        assert done.conclusion == "success" and "still there" in world.forge.log(done.id)
        assert not alive("background-91aa")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_terminated_while_idle(world: ForgeWorld, number: int) -> None:
    runner = await world.runner()
    await world.until_online(runner)
    runner.signal(number)
    assert await runner.exit() == 1
    found = await world.github.get_runner(SCOPE, runner.id)
    assert found is not None and not found.online, "still registered: deregistering is the service's task"


async def test_terminated_in_the_middle_of_a_job(tmp_path: Path) -> None:
    async with forge_world(tmp_path, workflow_of("echo started; sleep 300")) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner(MARKER="terminate-55d0")
        await world.forge.wait_for_log(run.jobs[0], "\nstarted\n")
        runner.signal()
        assert await runner.exit() == 1
        assert run.jobs[0].conclusion == "cancelled" and not alive("terminate-55d0")


async def test_killed_in_the_middle_of_a_job(tmp_path: Path) -> None:
    """GitHub notices only after a while, fails the job, and the registration is gone."""
    times = Times(lost_runner=1.0)
    async with forge_world(tmp_path, workflow_of("echo started; sleep 300"), times=times) as world:
        run = await world.forge.queue_run(OWNER, REPO)
        runner = await world.runner(MARKER="killed-3b20")
        await world.forge.wait_for_log(run.jobs[0], "\nstarted\n")
        runner.signal(signal.SIGKILL)
        assert await runner.exit() == -9
        assert await world.github.delete_runner(SCOPE, runner.id) == "busy"
        await world.forge.wait_for(run.jobs[0])
        assert run.jobs[0].conclusion == "failure"
        assert await world.github.delete_runner(SCOPE, runner.id) == "gone"
    for pid in [
        p.name for p in Path("/proc").iterdir() if p.name.isdecimal() and "killed-3b20" in _environ(p)
    ]:
        os.kill(int(pid), signal.SIGKILL)


def _environ(directory: Path) -> str:
    try:
        return (directory / "environ").read_text(errors="replace")
    except OSError:
        return ""


# -- checkout ------------------------------------------------------------------------------------


def make_warm(world: ForgeWorld, root: Path, commit: str, url: str) -> Path:
    """The work folder as a bake leaves it: made by the very script, from a tar of a shallow ``.git``."""
    source = world.tmp / f"source-{commit[:7]}"
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    git(source, "fetch", "-q", "--depth=1", f"file://{world.tmp / REPO}", commit)
    git(source, "update-ref", "refs/remotes/origin/main", commit)
    tar = world.tmp / f"{commit[:7]}.tar"
    subprocess.run(["tar", "-cf", str(tar), "-C", str(source), ".git"], check=True)
    directory = root / "_work" / REPO / REPO
    subprocess.run(warm_guest.unpack(str(directory), str(tar), commit, "main", url), check=True)
    return directory


async def test_a_warm_work_folder_is_kept_and_only_the_difference_is_fetched(world: ForgeWorld) -> None:
    (world.tmp / REPO / "large.bin").write_bytes(random.Random(4).randbytes(300_000))
    git(world.tmp / REPO, "add", ".")
    git(world.tmp / REPO, "commit", "-q", "-m", "Large")
    old = git(world.tmp / REPO, "rev-parse", "HEAD")
    (world.tmp / REPO / "greeting.txt").write_text("good evening\n")
    git(world.tmp / REPO, "commit", "-q", "-am", "Second")
    run = await world.forge.queue_run(OWNER, REPO)
    root = world.tmp / "runner-r1"
    directory = make_warm(world, root, old, warm_guest.checkout_url(world.forge.url, f"{OWNER}/{REPO}"))
    kept = (directory / ".git").stat().st_ino
    (directory / "left-over.txt").write_text("from the bake\n")
    (directory / "greeting.txt").write_text("changed by the bake\n")
    await world.runner("r1")
    assert (await world.forge.wait_for(run.jobs[0])).conclusion == "success", world.forge.log(run.jobs[0].id)
    assert (directory / ".git").stat().st_ino == kept
    assert "good evening\n" in world.forge.log(run.jobs[0].id)
    assert not (directory / "left-over.txt").exists()
    assert git(directory, "status", "--porcelain") == ""
    assert git(directory, "symbolic-ref", "HEAD") == "refs/heads/main"
    packs = sum(path.stat().st_size for path in (directory / ".git/objects").rglob("*") if path.is_file())
    assert packs < 310_000, "the large file came a second time"


async def test_a_work_folder_of_another_origin_is_made_anew(world: ForgeWorld) -> None:
    run = await world.forge.queue_run(OWNER, REPO)
    root = world.tmp / "runner-r1"
    commit = git(world.tmp / REPO, "rev-parse", "HEAD")
    url = warm_guest.checkout_url(world.forge.url, f"{OWNER}/{REPO}") + ".git"
    directory = make_warm(world, root, commit, url)
    await world.runner("r1")
    assert (await world.forge.wait_for(run.jobs[0])).conclusion == "success"
    assert git(directory, "config", "remote.origin.url") == url.removesuffix(".git")
    assert "Deleting the contents" in world.forge.log(run.jobs[0].id)


async def test_an_older_commit_than_the_branchs(world: ForgeWorld) -> None:
    old = git(world.tmp / REPO, "rev-parse", "HEAD")
    run = await world.forge.queue_run(OWNER, REPO)
    (world.tmp / REPO / "greeting.txt").write_text("good evening\n")
    git(world.tmp / REPO, "commit", "-q", "-am", "Second")
    await world.runner()
    done = await world.forge.wait_for(run.jobs[0])
    assert run.sha == old and "good morning\n" in world.forge.log(done.id)


async def test_a_private_repository_is_private(world: ForgeWorld) -> None:
    url = f"{world.forge.url}/{OWNER}/{REPO}"
    assert (await world.http.get(f"{url}/info/refs?service=git-upload-pack")).status_code == 401
    wrong = await world.http.get(f"{url}/info/refs?service=git-upload-pack", auth=("x", "wrong"))
    assert wrong.status_code == 401
    push = f"{url}/info/refs?service=git-receive-pack"
    assert (await world.http.get(push, auth=("x", world.forge.token))).status_code == 403
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    target = url.replace("://", f"://x:{world.forge.token}@") + ".git"
    process = await asyncio.create_subprocess_exec(
        "git", "clone", "-q", target, str(world.tmp / "clone"), env=env
    )
    assert await process.wait() == 0
    assert (world.tmp / "clone/greeting.txt").read_text() == "good morning\n"


# -- the tarball and its speed -------------------------------------------------------------------


def test_the_tarball_is_the_same_every_time(tmp_path: Path) -> None:
    first = build_runner_tarball(tmp_path / "a.tar.gz").read_bytes()
    assert first == build_runner_tarball(tmp_path / "b.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        names = {member.name: member for member in tar}
        assert {"./bin/Runner.Listener", "./run.sh", "./config.sh", "./env.sh", "./externals"} <= set(names)
        assert names["./bin/Runner.Listener"].mode == 0o755
        assert {member.uid for member in names.values()} == {0}
        tar.extractall(tmp_path / "r", filter="data")
    listener = tmp_path / "r/bin/Runner.Listener"
    version = subprocess.run([listener, "--version"], capture_output=True, text=True, timeout=10, check=True)
    assert version.stdout == "2.329.0\n"
    assert subprocess.run([listener, "warmup"], capture_output=True, timeout=10, check=False).returncode == 0
    assert list((tmp_path / "r/bin/standin/__pycache__").glob("*.pyc")), "a warm-up compiles it"
    refused = subprocess.run([listener, "frobnicate"], capture_output=True, timeout=10, check=False)
    assert refused.returncode == 1 and b"usage" in refused.stderr


def test_it_imports_next_to_nothing(tmp_path: Path) -> None:
    """Under software emulation each import of the usual kind costs tens of milliseconds of every job."""
    with tarfile.open(build_runner_tarball(tmp_path / "r.tar.gz")) as tar:
        tar.extractall(tmp_path, filter="data")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'bin')!r}); import standin.listener; "
        "print(sorted(n for n, m in sys.modules.items() if getattr(m, '__file__', None)))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-IS", "-c", code], capture_output=True, text=True, timeout=10, check=True
    )
    for heavy in ("json", "re", "socket", "ssl", "http", "subprocess", "enum", "os"):
        assert f"'{heavy}'" not in done.stdout


# -- as a process of its own ---------------------------------------------------------------------


async def test_the_stand_in_as_its_own_process(tmp_path: Path) -> None:
    import httpx

    make_repository(tmp_path / REPO)
    (tmp_path / "secret").write_text("s3cret\n")
    arguments = (
        "--repo", str(tmp_path / REPO), "--secret-file", str(tmp_path / "secret"),
        "--token-file", str(tmp_path / "token"), "--guest-url", "http://github.test:{port}",
    )  # fmt: skip
    async with as_process(*arguments) as ready, httpx.AsyncClient(base_url=ready["control"]) as control:
        assert ready["guest_url"] == f"http://github.test:{ready['port']}"
        assert ready["repositories"] == [f"{OWNER}/{REPO}"]
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
        run = (await control.post("/runs", json={"owner": OWNER, "repo": REPO})).json()
        (made,) = run["jobs"]
        assert (await control.get(f"/jobs/{made['id']}")).json()["status"] == "queued"
        late = await control.get(f"/jobs/{made['id']}", params={"status": "completed", "timeout": "0.1"})
        assert late.status_code == 504
        assert (await control.post(f"/runs/{run['run_id']}/cancel")).status_code == 202
        assert (await control.get(f"/jobs/{made['id']}?status=completed")).json()["conclusion"] == "cancelled"
        assert (await control.post("/runs", json={"owner": OWNER, "repo": "nope"})).status_code == 400
        assert [d["action"] for d in (await control.get("/deliveries")).json()] == ["queued", "completed"]
        # The port that guests can reach knows nothing of this.
        outside = await httpx.AsyncClient().get(f"{ready['url']}/_standin/control/runners")
        assert outside.status_code == 404
