"""What a repository's bake runs in the guest, and the work folder that actions/checkout then keeps.

    unpack ──► install commands, warm steps ──► stash ──► forget ──► tools ──► settle (images/settle.py)

What the work folder must look like, after the sources of actions/runner (PipelineDirectoryManager, TrackingManager)
and of actions/checkout (git-directory-helper, git-source-provider, url-helper, git-command-manager):

- It is ``<runner>/_work/<name>/<name>``, the name of the repository in the forge's own spelling: GITHUB_WORKSPACE is
  made of it, and Linux tells cases apart. The runner keeps directories that exist, with or without its tracking file
  (``_work/_PipelineMapping/…``); only ``workspace: clean`` in a workflow, of which GitHub has none, removes them.
- The checkout keeps ``.git`` when ``git config --local --get remote.origin.url`` is to the letter the address it would
  fetch from: ``<server>/<owner>/<name>``, without ``.git`` and without a user. Otherwise it deletes everything.
- It then detaches HEAD (so it is detached already), deletes local branches (so there are none), runs
  ``git clean -ffdx`` and ``git reset --hard HEAD``, and fetches ``+<sha>:refs/remotes/origin/<branch>`` (a pull
  request's ``+<sha>:refs/remotes/pull/<n>/merge``) with ``--depth=1 --prune --no-tags``.
- A fetch offers the server the commits of refs, not a detached HEAD. ``refs/remotes/origin/<branch>`` is one; older
  versions of the checkout delete it, so ``refs/microvm/parent`` is another. With either only the difference comes.
- What git ignores (node_modules, .venv) does not survive the clean: hence the stash, see ``guest/stash.py``.
"""

from collections.abc import Sequence
from importlib import resources
from urllib.parse import quote

from images.rootfs import RUNNER_DIR

WORK = f"{RUNNER_DIR}/_work"
STASH_PROGRAM = "/usr/lib/microvm/stash.py"
_PYTHON = ("/usr/bin/python3", "-I", "-S")


def work_folder(repository: str) -> str:
    """Where a job of ``owner/name`` (in the forge's spelling) has its checkout."""
    name = repository.rpartition("/")[2]
    return f"{WORK}/{name}/{name}"


def checkout_url(server: str, repository: str) -> str:
    """The address actions/checkout fetches ``owner/name`` from, to the letter. ``server``: GITHUB_SERVER_URL."""
    owner, _, name = repository.partition("/")
    return f"{server.rstrip('/')}/{quote(owner, safe='')}/{quote(name, safe='')}"


def unpack(directory: str, tar: str, commit: str, branch: str, url: str) -> list[str]:
    """As the job's user: put a commit into ``directory`` from a tar of a ``.git`` directory in the guest.

    ``url`` is that of ``checkout_url``. Where the directory has this origin already, the commit is fetched from the
    tar and ignored files stay. Commands for five minutes at most, for a repository of a few hundred MiB.
    """
    return ["/bin/sh", "-c", _program("unpack.sh"), "unpack.sh", directory, tar, commit, branch, url]


def stash(directories: Sequence[str]) -> list[str]:
    """As the job's user, after installs and warm steps: move what ``directories`` have installed where a checkout
    does not remove it. One line a directory; it fails only where the guest is broken."""
    # The image's own program, not this host's: the front of npm and pip in the image must find the same keys.
    script = f'[ ! -f {STASH_PROGRAM} ] || exec {" ".join(_PYTHON)} {STASH_PROGRAM} keep "$@"'
    return ["/bin/sh", "-c", script, "stash", *directories]


def forget(directories: Sequence[str]) -> list[str]:
    """As root, last before ``settle``: remove secrets from homes, work folders, temporary files and free blocks.

    Status 1 where one could not be removed: such a machine must not be saved.
    """
    return [*_PYTHON, "-c", _program("forget.py"), *directories]


def tools() -> list[str]:
    """As the job's user: one JSON object of tool names and versions on standard output."""
    return [*_PYTHON, "-c", _program("tools.py")]


def _program(name: str) -> str:
    return resources.files("images").joinpath("guest", name).read_text()
