"""Runs in the guest: puts what the bake installed into place, where a job would install the same again.

    npm ci, pip install -r …  ── same inputs as in the bake ──► put in place, one line said
                              └── anything else ─────────────► the real npm or pip, as if this were not here

``actions/checkout`` removes ignored files and ``npm ci`` removes node_modules, so an installed tree would not
last until the job uses it. A bake ends with ``stash.py keep DIRECTORY…``, which moves each tree out of the
way, under a key of everything the installer looks at. The keys hold no secret: tokens are left out of them.
MICROVM_WARM=0 in a job's environment turns all of this off. Standard library only, on C modules where one
serves: every import costs a job time.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes long to import under emulation
    from collections.abc import Callable, Iterator, Sequence
    from hashlib import sha256
    from typing import Any, NoReturn
else:
    try:
        from _sha256 import sha256
    except ImportError:  # Python 3.12 and later
        from hashlib import sha256

STASH = "/var/lib/microvm/stash"
NPM = "/usr/local/lib/node_modules/npm"
REAL_NPM = NPM + "/bin/npm-cli.js"
REAL_PIP = "/usr/lib/microvm/real-pip"
PYTHON = "/usr/local/bin/python3"
LIFECYCLE = "/usr/lib/microvm/lifecycle.js"
# Raise it when the same inputs are to be stashed in another way.
_FORMAT = "1"
_MAX_FILE = 64 << 20
_MAX_NESTED = 32

# Of npm's flags and settings, those that change neither the tree nor the scripts that run.
_NPM_FLAGS = {
    *("--no-audit", "--audit=false", "--no-fund", "--fund=false", "--prefer-offline", "--no-progress"),
    *("--progress=false", "--no-update-notifier", "--silent", "--quiet", "--verbose", "-s", "-q", "-d"),
    *("--color=always", "--no-color", "--loglevel=error", "--loglevel=warn", "--loglevel=silent"),
}
_NPM_SETTINGS = {
    "audit",
    "fund",
    "prefer_offline",
    "progress",
    "update_notifier",
    "loglevel",
    "color",
    "cache",
}
# Of npm's settings, those that say who asks.
_NPM_AUTH = {"_authtoken", "_auth", "_password", "username", "email", "always-auth"}
# The first there is counts.
_LOCKS = ("npm-shrinkwrap.json", "package-lock.json")
# The root project's scripts that npm ci runs, in npm's order.
_LIFECYCLE = (
    *("preinstall", "install", "postinstall"),
    *("prepublish", "preprepare", "prepare", "postprepare"),
)
_PIP_FLAGS = {
    *("-q", "--quiet", "-qq", "-v", "--verbose", "--no-input", "--disable-pip-version-check", "--no-color"),
    *("--no-cache-dir", "--no-deps", "--require-hashes", "--prefer-binary", "--no-python-version-warning"),
    *("--progress-bar=off", "--no-warn-script-location", "--root-user-action=ignore"),
}
# Of what a requirements file may say for itself: what changes nothing about packages that are installed.
_PIP_LINES = {
    *("-i", "--index-url", "--extra-index-url", "--no-index", "--trusted-host", "--pre", "--prefer-binary"),
    *("--require-hashes", "--no-binary", "--only-binary"),
}
_PIP_SETTINGS = {
    *("DISABLE_PIP_VERSION_CHECK", "NO_INPUT", "NO_COLOR", "CACHE_DIR", "NO_CACHE_DIR", "PROGRESS_BAR"),
    *("INDEX_URL", "CERT", "ROOT_USER_ACTION", "DEFAULT_TIMEOUT", "RETRIES"),
}


class Unsuited(Exception):
    """Why the real installer has to do it."""


# -- npm -----------------------------------------------------------------------------------------------------


def npm(arguments: "Sequence[str]") -> None:
    """``npm ci`` and ``npm install`` in the directory of a stashed tree; anything else is npm's."""
    command = arguments[0]
    try:
        if os.environ.get("MICROVM_WARM") == "0" or not _NPM_FLAGS.issuperset(arguments[1:]):
            raise Unsuited
        directory = os.getcwd()
        entry = _node_entry(directory) + "/" + node_key(directory)
        # npm ci would remove what is there first, npm install would look into it: theirs to do.
        if os.path.lexists("node_modules"):
            raise Unsuited
        os.rename(entry + "/node_modules", "node_modules")
    except (Unsuited, OSError):
        _execute(REAL_NPM, arguments)
    if command not in ("ci", "clean-install"):
        _execute(REAL_NPM, arguments)  # looks at the tree, finds nothing to do, runs the scripts
    if os.path.exists(entry + "/scripts"):
        _say(f"npm {command}: node_modules comes from the warm parent, the project's own scripts run now")
        os.execvp("node", ["node", LIFECYCLE, NPM, *arguments])
    _say(f"npm {command}: node_modules comes from the warm parent, the lock file is the same")


def node_key(directory: str) -> str:
    """Of everything npm looks at before it installs. Raises Unsuited or OSError without a lock file."""
    settings = {name.lower(): value for name, value in os.environ.items()}
    config = settings.get("npm_config_userconfig") or os.path.expanduser("~/.npmrc")
    locks = [_digest(directory + "/" + name) for name in _LOCKS]
    if not any(locks):
        raise Unsuited("there is no lock file")
    node = os.path.realpath(_which("node"))
    found = os.stat(node)
    words = [
        *(_FORMAT, os.path.realpath(directory), str(os.geteuid())),
        *(_digest(directory + "/package.json"), *locks),
        *map(_npmrc, (directory + "/.npmrc", config, "/usr/local/etc/npmrc")),
        *(_digest(NPM + "/package.json"), node, str(found.st_size), str(found.st_mtime_ns)),
        *sorted(_npm_environment()),
    ]
    return sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()


def _npm_environment() -> "Iterator[str]":
    for name, value in os.environ.items():
        lower = name.lower()
        if lower in ("node_env", "node_options"):
            yield name + "=" + value
        elif lower.startswith("npm_config_"):
            setting = lower[len("npm_config_") :]
            if setting not in _NPM_SETTINGS and setting.replace("_", "-") not in _NPM_AUTH:
                yield lower + "=" + value


def _npmrc(path: str) -> str:
    """The digest of a configuration of npm's without what says who asks."""
    try:
        text = _read(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    kept: list[str] = []
    for line in text.splitlines():
        setting = line.partition("=")[0].strip().rpartition(":")[2].lower()
        if line.strip() and setting not in _NPM_AUTH:
            kept.append(line.strip())
    return sha256("\n".join(kept).encode()).hexdigest() if kept else ""


def _node_entry(directory: str) -> str:
    """Where the trees of one directory are stashed, each under its key; at most one is kept."""
    name = os.path.realpath(directory).encode("utf-8", "surrogateescape")
    return STASH + "/node/" + sha256(name).hexdigest()[:32]


def keep_node(directory: str, name: str) -> str:
    """Move node_modules of one directory into the stash. Raises Unsuited."""
    tree = directory + "/" + name
    if not os.path.isfile(tree + "/.package-lock.json") or os.path.islink(tree):
        raise Unsuited("npm ci left no node_modules here")
    package = _json(directory + "/package.json")
    lock = next((name for name in _LOCKS if os.path.exists(directory + "/" + name)), None)
    if lock is None:
        raise Unsuited("there is no lock file")
    packages: dict[str, dict[str, Any]] = _json(directory + "/" + lock).get("packages") or {}
    if not packages:
        raise Unsuited(f"{lock} is of an old format, or empty")
    if "workspaces" in package:
        raise Unsuited("it has workspaces")
    if os.path.exists(directory + "/binding.gyp"):
        raise Unsuited("it builds a native addon of its own")
    for place, one in packages.items():
        if place and (not place.startswith("node_modules/") or one.get("link")):
            raise Unsuited(f"{place} is a directory of the repository")
        if place and str(one.get("resolved", "")).startswith("file:"):
            raise Unsuited(f"{place} comes from a file of the repository")
    if any(place and one.get("hasInstallScript") for place, one in packages.items()):
        _check_left_behind(directory, tree)
    own = [name for name in _LIFECYCLE if name in (package.get("scripts") or {})]
    key = node_key(directory)
    entry = _node_entry(directory)
    _remove(entry)
    os.makedirs(f"{entry}/{key}")
    if own:
        with open(f"{entry}/{key}/scripts", "w") as file:
            file.write("\n".join(own) + "\n")
    os.rename(tree, f"{entry}/{key}/node_modules")
    return f"node_modules of {len(packages) - 1} packages is stashed" + (
        f"; {', '.join(own)} will run in each job" if own else ""
    )


def _check_left_behind(directory: str, tree: str) -> None:
    """Install scripts of packages may write beside node_modules; the checkout of a job removes that."""
    import subprocess

    asked = ["git", "-C", directory, "ls-files", "--others", "--directory", "-z"]
    others = subprocess.run(asked, stdout=subprocess.PIPE, timeout=120).stdout
    installed_at = os.stat(tree + "/.package-lock.json").st_mtime
    for name in os.fsdecode(others).split("\0"):
        if name and name != "node_modules/" and os.lstat(directory + "/" + name).st_ctime <= installed_at:
            raise Unsuited(f"a package's install script may have written {name}, which a checkout removes")


# -- pip -----------------------------------------------------------------------------------------------------


def pip(arguments: "Sequence[str]") -> None:
    """``pip install -r FILE`` of files that are satisfied already; anything else is pip's."""
    try:
        if os.environ.get("MICROVM_WARM") == "0":
            raise Unsuited
        names = _requirement_files(arguments[1:])
        for name in os.environ:
            if name.startswith("PIP_") and name[4:] not in _PIP_SETTINGS:
                raise Unsuited
        for name in names:
            if not os.path.exists(STASH + "/pip/" + pip_key(name)):
                raise Unsuited
    except (Unsuited, OSError):
        _execute(PYTHON, [REAL_PIP, *arguments])
    _say(f"pip install: everything in {', '.join(names)} is installed already, as the warm parent was baked")


def _requirement_files(arguments: "Sequence[str]") -> "list[str]":
    names: list[str] = []
    pending = iter(arguments)
    for word in pending:
        if word in ("-r", "--requirement"):
            names.append(next(pending, ""))
        elif word.startswith("--requirement="):
            names.append(word.partition("=")[2])
        elif word == "--progress-bar":
            next(pending, "")
        elif word not in _PIP_FLAGS:
            raise Unsuited
    if not names:
        raise Unsuited
    return names


def pip_key(name: str) -> str:
    """Of a requirements file, those it names, and every distribution that is installed."""
    words = [_FORMAT, str(os.geteuid()), os.path.realpath(PYTHON)]
    _add_requirements(name, words, 0)
    home = os.path.expanduser("~")
    for path in ("/etc/pip.conf", home + "/.config/pip/pip.conf", home + "/.pip/pip.conf"):
        words += [_digest(path)]
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = f"/lib/{version}/site-packages"
    for path in ("/usr/local" + site, home + "/.local" + site, "/usr/lib/python3/dist-packages"):
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            names = []
        words += sorted(n for n in names if n.endswith((".dist-info", ".egg-info", ".egg-link", ".pth")))
    return sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()


def _add_requirements(name: str, words: "list[str]", depth: int) -> None:
    """The text of a file and of those it names. Raises Unsuited where a line means a tree or an address."""
    if depth > _MAX_NESTED or "://" in name:
        raise Unsuited("it names too many files, or files elsewhere")
    data = _read(name)
    words.append(sha256(data).hexdigest())
    for text in data.decode("utf-8", "replace").replace("\\\n", " ").splitlines():
        line = text.partition(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        first, _, rest = line.replace("=", " ", line.startswith("--")).partition(" ")
        if first in ("-r", "--requirement", "-c", "--constraint"):
            _add_requirements(os.path.join(os.path.dirname(name), rest.strip()), words, depth + 1)
        elif first not in _PIP_LINES and (first[0] in "-./" or "/" in first or "${" in line or " @ " in line):
            raise Unsuited(f"the line {line[:60]!r} is no package of the index")


def keep_pip(directory: str, name: str) -> str:
    """Note that a requirements file is satisfied, if pip says so. Raises Unsuited."""
    import subprocess

    path = directory + "/" + name
    key = pip_key(path)
    command = [
        PYTHON,
        REAL_PIP,
        "install",
        "--dry-run",
        "--no-index",
        "--no-input",
        "--quiet",
        "--report",
        "-",
    ]
    told = subprocess.run([*command, "-r", path], capture_output=True, timeout=300)
    if told.returncode != 0:
        last = os.fsdecode(told.stderr).strip().splitlines()[-1:]
        raise Unsuited("pip does not find it satisfied: " + "".join(last)[:200])
    import json

    if json.loads(told.stdout)["install"]:
        raise Unsuited("pip would install more")
    os.makedirs(STASH + "/pip", exist_ok=True)
    with open(STASH + "/pip/" + key, "w"):
        pass
    return "is satisfied; pip install -r will say so at once"


# -- both ----------------------------------------------------------------------------------------------------


def keep(directories: "Sequence[str]") -> None:
    """At the end of a bake: stash what these directories have installed. What cannot be is left as it is."""
    for directory in map(os.path.realpath, directories):
        if os.path.isdir(directory + "/node_modules"):
            _try(keep_node, directory, "node_modules")
        for name in _requirements_in(directory)[:_MAX_NESTED]:
            _try(keep_pip, directory, name)


def _try(keeping: "Callable[[str, str], str]", directory: str, name: str) -> None:
    try:
        _say(f"{directory}/{name}: {keeping(directory, name)}")
    except Exception as error:  # noqa: BLE001  # a repository may hold anything; a bake goes on
        _say(f"{directory}/{name}: not stashed: {error or type(error).__name__}")


def _requirements_in(directory: str) -> "list[str]":
    found: list[str] = []
    for place in ("", "requirements/"):
        try:
            names = os.listdir(directory + "/" + place)
        except OSError:
            continue
        found += [
            place + n for n in sorted(names) if n.endswith(".txt") and (place or n.startswith("requirements"))
        ]
    return [name for name in found if os.path.isfile(directory + "/" + name)]


def _execute(program: str, arguments: "Sequence[str]") -> "NoReturn":
    os.execv(program, [program, *arguments])


def _which(name: str) -> str:
    for directory in os.environ.get("PATH", "").split(":"):
        path = (directory or ".") + "/" + name
        if os.access(path, os.X_OK):
            return path
    raise Unsuited(f"there is no {name}")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise Unsuited(f"{path} is too large")
    return data


def _digest(path: str) -> str:
    """The digest of a file; empty where there is none."""
    try:
        return sha256(_read(path)).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _json(path: str) -> "dict[str, Any]":
    import json

    value: Any = json.loads(_read(path))
    return value


def _remove(path: str) -> None:
    if os.path.lexists(path):
        import shutil

        shutil.rmtree(path)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    {"npm": npm, "pip": pip, "keep": keep}[sys.argv[1]](sys.argv[2:])
