"""Repositories elsewhere: their addresses, what git is told to ask them, and what its complaints mean.

A password reaches git in a sealed memory file that it inherits. git's credential helper, three lines of shell,
prints that file when it is asked about the very scheme and host of the address, so a redirect elsewhere gets
nothing. Neither a command line, nor an environment, nor a disk ever holds it.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from images import commands
from images.errors import (
    BadRepositoryUrl,
    BuildFailed,
    MirrorDamaged,
    MirrorError,
    RepositoryDenied,
    RepositoryEmpty,
    RepositoryTooLarge,
    RepositoryUnreachable,
)

_HOST = r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])"
_WEB = re.compile(rf"(https?)://(?:([^/@]*)@)?({_HOST})(?::(\d{{1,5}}))?(/[\w.~%+@:/-]+)", re.ASCII)
_SSH = re.compile(rf"ssh://(?:(\w[\w.-]*)@)?({_HOST})(?::(\d{{1,5}}))?(/[\w.~%+@:/-]+)", re.ASCII)
_SCP = re.compile(rf"(\w[\w.-]*)@({_HOST}):(?!/)([\w.~+@/-]+)", re.ASCII)
_PORTS = {"http": "80", "https": "443"}

# What git gets of our environment: how this host reaches the outside, and its user's ssh agent.
_INHERITED = frozenset(
    (
        "PATH", "SSH_AUTH_SOCK", "SUDO_UID", "SSL_CERT_FILE", "SSL_CERT_DIR", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH",
        "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    )
)  # fmt: skip
# No configuration, no home and no terminal: what a fetch does depends on nothing but its arguments.
ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "file:http:https:ssh",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=30",
    "HOME": "/nonexistent",
}
_OPTIONS = (
    "core.hooksPath=/dev/null",
    "transfer.unpackLimit=1",
    "fetch.unpackLimit=1",
    "credential.helper=",
)
_MAX_REFERENCES = 500_000

# git's words, lower case → what they mean. The first that is found counts.
_MEANINGS: tuple[tuple[str, type[MirrorError], str], ...] = (
    (
        r"error: 40[134]|authentication failed|could not read (username|password)|permission denied|not found"
        r"|not appear to be a git repo|does not exist|dubious ownership|host key verification|access denied",
        RepositoryDenied,
        "there is no such repository, or it may not be read with the credential given. "
        "Check the address and the credential",
    ),
    (
        r"object file .* is empty|corrupt|bad object|unable to read|did not send all necessary|missing blob"
        r"|missing tree|not a git repository|bad pack|unresolved deltas|invalid index-pack|broken",
        MirrorDamaged,
        "the mirror on this host is damaged. Fetch again: it is made anew",
    ),
    (
        r"could not resolve|unable to access|connection|failed to connect|timed out|hung up|early eof|rpc failed"
        r"|network is unreachable|no route to host|unexpected disconnect",
        RepositoryUnreachable,
        "the server does not answer, or not as git expects. Check the address and this host's network, "
        "then try again",
    ),
)


class Credential(msgspec.Struct, frozen=True):
    """What opens a repository over http(s). Printing it shows no password. Raises ValueError for line breaks."""

    username: str
    password: str

    def __post_init__(self) -> None:
        if any(ord(char) < 32 for char in self.username + self.password):
            raise ValueError("a user name or password has a control character")

    def __repr__(self) -> str:
        return f"Credential(username={self.username!r}, password=…)"

    def __rich_repr__(self) -> list[tuple[str, str]]:
        return [("username", self.username), ("password", "…")]


class References(msgspec.Struct, frozen=True):
    """What a repository offers: full names of branches and tags to objects, and the default branch if it has one."""

    objects: dict[str, str]
    default: str | None


def parse_url(text: str) -> tuple[str, Credential | None]:
    """The address in one spelling and without user and password, and those as a credential.

    http, https, ssh (also ``git@host:path``), file, or an absolute path. Raises BadRepositoryUrl.
    """
    if text.startswith(("/", "file:///")):
        path = text.removeprefix("file://")
        if ".." not in Path(path).parts and path.isprintable():
            return f"file://{os.path.normpath(path)}", None
    elif (web := _WEB.fullmatch(text)) and ".." not in web[5].split("/"):
        scheme, user, host, port, path = web.groups()
        at = host.lower() if port in (None, _PORTS[scheme]) else f"{host.lower()}:{port}"
        return f"{scheme}://{at}{path.rstrip('/')}", _userinfo(user)
    elif (ssh := _SSH.fullmatch(text)) and ".." not in ssh[4].split("/"):
        user, host, port, path = ssh.groups()
        at = f"{user or 'git'}@{host.lower()}" + (f":{port}" if port not in (None, "22") else "")
        return f"ssh://{at}{path.rstrip('/')}", None
    elif (scp := _SCP.fullmatch(text)) and ".." not in scp[3].split("/"):
        return f"ssh://{scp[1]}@{scp[2].lower()}/{scp[3].rstrip('/')}", None
    raise BadRepositoryUrl(
        f"{_without_userinfo(text)!r} is no address of a repository; write https://HOST/OWNER/REPOSITORY, "
        "ssh://git@HOST/OWNER/REPOSITORY, or the absolute path of one on this host"
    )


def _userinfo(text: str | None) -> Credential | None:
    if not text:
        return None
    user, _, password = text.partition(":")
    try:
        return Credential(username=unquote(user), password=unquote(password))
    except ValueError as error:
        raise BadRepositoryUrl(f"the address cannot be used: {error}") from None


def _without_userinfo(text: str) -> str:
    return re.sub(r"//[^/]*@", "//…@", text)[:200]


async def references(git_dir: Path, url: str, credential: Credential | None) -> References:
    """The branches and tags of a repository. Raises MirrorError; RepositoryEmpty when it has no branch."""
    words = ["ls-remote", "--symref", "--", url, "HEAD", "refs/heads/*", "refs/tags/*"]
    text = await run(git_dir, words, url=url, credential=credential, doing="ask for the branches of")
    objects: dict[str, str] = {}
    head = default = None
    for line in text.decode(errors="surrogateescape").splitlines():
        value, _, name = line.partition("\t")
        if name == "HEAD":
            default, head = (
                (value.removeprefix("ref: "), head) if value.startswith("ref: ") else (default, value)
            )
        elif name.startswith(("refs/heads/", "refs/tags/")) and not name.endswith("^{}"):
            objects[name] = value
    branches = sorted(name for name in objects if name.startswith("refs/heads/"))
    if not branches:
        raise RepositoryEmpty(f"{url} has no branch. Push a first commit to it")
    if len(objects) > _MAX_REFERENCES:
        raise RepositoryTooLarge(f"{url} has more than {_MAX_REFERENCES} branches and tags")
    if default is None and head is not None:  # an old server tells the commit only
        likely = [
            name for name in ("refs/heads/main", "refs/heads/master", *branches) if objects.get(name) == head
        ]
        default = next(iter(likely), None)
    return References(objects=objects, default=default if default in objects else None)


async def run(
    git_dir: Path,
    words: Sequence[str],
    *,
    url: str,
    doing: str,
    credential: Credential | None = None,
    on_line: Callable[[str], None] | None = None,
) -> bytes:
    """git's output of a command that speaks with ``url``. The caller sets the deadline. Raises MirrorError."""
    with _handed(credential) as descriptors:
        helpers = [_helper(url, descriptor) for descriptor in descriptors]
        options = [*_OPTIONS, *(f"credential.helper={helper}" for helper in helpers)]
        argv = [
            "git",
            f"--git-dir={git_dir}",
            *(part for option in options for part in ("-c", option)),
            *words,
        ]
        try:
            return await commands.run(
                argv,
                timeout=_NEVER_S,
                doing=f"{doing} {url}",
                env=ENVIRONMENT,
                inherit=_INHERITED,
                pass_fds=descriptors,
                on_line=on_line,
            )
        except BuildFailed as error:
            raise _explain(url, doing, error, credential) from None


# commands.run wants a time; every caller here is inside a shorter asyncio.timeout.
_NEVER_S = 86400.0


@contextlib.contextmanager
def _handed(credential: Credential | None) -> Generator[tuple[int, ...]]:
    """Descriptors for a child to inherit: of a memory file in the words of a credential helper, or none."""
    if credential is None:
        yield ()
        return
    descriptor = os.memfd_create("credential", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, f"username={credential.username}\npassword={credential.password}\n".encode())
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield (descriptor,)
    finally:
        os.close(descriptor)


def _helper(url: str, descriptor: int) -> str:
    """The credential helper: git gives it lines of key=value and an empty one, and takes such lines back."""
    parts = urlsplit(url)  # of our own spelling: nothing in it needs quoting
    return (
        '!f() { test "$1" = get || return 0; s=; h=; '
        'while IFS= read -r line && test -n "$line"; do case "$line" in '
        f"'protocol={parts.scheme}') s=1;; 'host={parts.netloc}') h=1;; esac; done; "
        f'test -z "$s" || test -z "$h" || cat /proc/self/fd/{descriptor}; }}; f'
    )


def _explain(url: str, doing: str, error: BuildFailed, credential: Credential | None) -> MirrorError:
    """What git said, as the failure it is; a server's words without control characters or our password."""
    secret = credential.password if credential else ""
    lines = ["".join(char if char.isprintable() else "?" for char in line) for line in error.output]
    lines = [line for line in lines if not re.search(r"\d+% \(", line)]  # progress
    lines = [line.replace(secret, "…") if secret else line for line in lines]
    text = "\n".join(lines).lower()
    for pattern, kind, meaning in _MEANINGS:
        if re.search(pattern, text):
            return kind(f"could not {doing} {url}: {meaning}", output=lines[-8:])
    return MirrorError(error.message, output=lines[-8:])
