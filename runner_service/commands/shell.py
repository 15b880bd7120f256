"""``microvm shell``: a copy of the VM in which a job failed, with this terminal's input and output.

The guest's agent knows no terminals: on one, a small Python program in the guest (which is there for the agent) holds a
pseudo-terminal for the shell, and ours passes every key on as it is. Its size is that of ours at the start.
"""

import contextlib
import os
import shutil
import sys
import termios
import time
import tty
from collections.abc import Generator, Sequence

import msgspec

from github_webhook.patterns import fits
from runner_service.client import NotThereError
from runner_service.commands import attached, show
from runner_service.commands.access import note
from runner_service.daemon import database_url
from runner_service.domain import Job
from runner_service.settings import Settings
from runner_service.store import frozen_queries as fq
from runner_service.store import job_search
from runner_service.store.frozen_queries import KeptVm
from runner_service.store.store import Store
from vmm_core.engine import Engine

_LONGEST = 86400.0
_IN_FOLDER = 'cd "$1" 2>/dev/null || echo "microvm: there is no folder $1 in the guest" >&2; shift; exec "$@"'
_SIZED = 'stty rows "$1" cols "$2" 2>/dev/null; shift 2; exec "$@"'
_PTY = (
    "import os, pty, sys\n"
    "code = os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:]))\n"
    "sys.exit(code if code >= 0 else 128 - code)\n"
)
_SHELL = ("bash", "-l")


class Wish(msgspec.Struct, frozen=True):
    """Which job's VM to open, and what to run there as whom; without ``argv`` a shell."""

    job: str
    argv: tuple[str, ...] = ()
    user: str = "runner"
    network: bool = False


async def shell(settings: Settings, wish: Wish) -> int:
    """The command's exit status. Raises NotThereError when there is nothing to open, and what the engine raises."""
    async with Store.open(database_url(settings), read_only=True) as store:
        kept = await _find(store, settings, wish.job)
    # Before it is opened: nobody can look into it without a line about it.
    await note(settings, "frozen.shell", kept.id, job=kept.job_id, user=wish.user, network=wish.network)
    terminal = not wish.argv and sys.stdin.isatty() and sys.stdout.isatty()
    return await attached.interruptible(_open(settings, wish, kept, terminal=terminal))


async def _open(settings: Settings, wish: Wish, kept: KeptVm, *, terminal: bool) -> int:
    ttl = max(1.0, min(_LONGEST, kept.expires_at - time.time()))
    metadata = {"purpose": "run", "frozen": kept.id, "job": kept.job_id}
    async with (
        Engine.open(settings.data_dir) as engine,
        engine.look_into(kept.id, ttl=ttl, metadata=metadata, network=wish.network) as vm,
    ):
        process = await vm.start(
            command(kept.folder, wish.argv, terminal=terminal),
            exec_id="shell",
            user=wish.user,
            env={"TERM": os.environ.get("TERM", "xterm")} if terminal else {},
            stdin=True,
        )
        if terminal:
            sys.stderr.write(f"microvm: a copy of {kept.id}, {_network(wish)}; exit destroys it\r\n")
        with _raw() if terminal else contextlib.nullcontext():
            return await attached.passed_through(vm, process)


def command(folder: str, argv: Sequence[str], *, terminal: bool) -> list[str]:
    """What is run in the guest: ``argv``, or a shell, in the job's folder, in a pseudo-terminal on a ``terminal``."""
    inner = ["/bin/sh", "-c", _IN_FOLDER, "sh", folder, *(argv or _SHELL)]
    if not terminal:
        return inner
    columns, rows = shutil.get_terminal_size()
    sized = ["/bin/sh", "-c", _SIZED, "sh", str(rows), str(columns), *inner]
    return ["python3", "-I", "-c", _PTY, *sized]


async def _find(store: Store, settings: Settings, ref: str) -> KeptVm:
    """The kept VM that ``ref`` means. Raises NotThereError that says why there is none."""
    job = await store.read(lambda db: job_search.find(db, ref))
    kept = await store.read(lambda db: fq.find(db, job.id if job is not None else ref))
    if kept is None and job is None:
        close = await store.read(lambda db: job_search.near(db, ref))
        raise NotThereError(job_search.unknown(ref, close, "microvm jobs and microvm frozen"))
    if kept is None and job is not None:
        raise NotThereError(why_not(job, settings))
    assert kept is not None, "the cases without one are above"  # noqa: S101
    if kept.state == "removed":
        ago = show.ago(kept.removed_at)
        raise NotThereError(f"the frozen VM of job {kept.job_id} was removed {ago} ago: {kept.why}")
    if kept.state == "removing":
        raise NotThereError(f"the frozen VM of job {kept.job_id} is being removed: {kept.why}")
    if kept.state == "freezing":
        raise NotThereError(f"the VM of job {kept.job_id} is being frozen right now: try again in a moment")
    if kept.host != settings.service.name:
        raise NotThereError(f"the VM of job {kept.job_id} is frozen on the host {kept.host}: open it there")
    return kept


def why_not(job: Job, settings: Settings) -> str:
    """Why there is no frozen VM of a job, and what to do."""
    repository = f"{job.owner}/{job.repo}"
    if job.state != "completed":
        return f"job {job.id} is {job.state}: only the VM of a job that failed can be opened"
    if job.conclusion == "success":
        return f"job {job.id} succeeded: only the VM of a job that failed is kept"
    if not fits(repository, settings.frozen.repositories):
        return f"VMs of {repository} are not kept: add it to repositories in [frozen], and run the job again"
    return f"the VM of job {job.id} ({job.conclusion}) was not kept: microvm why {job.id} tells more"


def _network(wish: Wish) -> str:
    return "with the network of the job" if wish.network else "without network"


@contextlib.contextmanager
def _raw() -> Generator[None]:
    """Every key goes to the guest; ours is as before at the end, whatever happens."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
