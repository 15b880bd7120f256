"""Runs in the guest, as root, before a parent is saved: removes secrets, and what they left on the disk.

    python3 -I -S -c PROGRAM WORK_DIRECTORY…

Files that hold nothing but secrets or history are overwritten in place and unlinked (the file system has no
journal and moves no block). Of configurations the lines with secrets go, the rest stays. Then every free
block of the disk is discarded: what any program deleted earlier cannot be read from the disk either.
What is free in memory is zeroed by ``settle.py`` afterwards. Prints a line for all it removed, never a value.
Ends with status 1 where something could not be removed. Standard library only, Python ≥ 3.9.
"""

import fcntl
import os
import re
import stat
import struct
import subprocess
import sys

# Relative to a home directory; a directory goes with all in it.
SECRET_FILES = (
    *(
        ".netrc",
        ".git-credentials",
        ".config/git/credentials",
        ".git-credential-cache",
        ".cache/git/credential",
    ),
    *(".docker/config.json", ".config/containers/auth.json", ".config/gh/hosts.yml", ".config/hub"),
    *(
        ".config/glab-cli",
        ".cargo/credentials",
        ".cargo/credentials.toml",
        ".aws",
        ".azure",
        ".config/gcloud",
    ),
    *(
        ".kube/config",
        ".pypirc",
        ".config/pypoetry/auth.toml",
        ".local/share/uv/credentials",
        ".gem/credentials",
    ),
    *(".local/share/gem/credentials", ".composer/auth.json", ".config/composer/auth.json", ".vault-token"),
    *(
        ".m2/settings-security.xml",
        ".terraform.d/credentials.tfrc.json",
        ".terraformrc",
        ".pgpass",
        ".my.cnf",
    ),
    *(".config/rclone/rclone.conf", ".s3cfg", ".boto", ".subversion/auth", ".hex/hex.config", ".gnupg"),
    *(".local/share/keyrings", ".config/op", ".config/doctl", ".fly", ".config/configstore", ".npm/_logs"),
)
HISTORY_FILES = (
    *(".bash_history", ".zsh_history", ".sh_history", ".ash_history", ".local/share/fish/fish_history"),
    *(".python_history", ".node_repl_history", ".psql_history", ".mysql_history", ".sqlite_history"),
    *(".rediscli_history", ".irb_history", ".lesshst", ".viminfo", ".wget-hsts", ".sudo_as_admin_successful"),
)
# Configurations of which single lines go: those with a value under one of the names, and passwords in addresses.
CONFIGURATIONS = (
    *(".npmrc", ".yarnrc", ".yarnrc.yml", ".bundle/config", ".gradle/gradle.properties", ".condarc"),
    *(".config/pip/pip.conf", ".pip/pip.conf", ".config/uv/uv.toml", ".config/NuGet/NuGet.Config"),
    *(
        ".nuget/NuGet/NuGet.Config",
        ".cargo/config.toml",
        ".cargo/config",
        ".m2/settings.xml",
        ".curlrc",
        ".wgetrc",
    ),
    *(".config/pypoetry/config.toml", ".profile", ".bashrc", ".bash_profile", ".zshrc", ".pam_environment"),
)
SYSTEM_CONFIGURATIONS = ("/etc/pip.conf", "/usr/local/etc/npmrc", "/etc/environment", "/etc/npmrc")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm")
# Compiled JavaScript that Node keeps there: it saves every job seconds.
KEPT = ("node-compile-cache",)

_LINE = re.compile(
    rb"(?i)(_auth|_authtoken|_password|npmauthtoken|npmauthident|password|passwd|secret|token|api_?key|"
    rb"access_?key|private_?key|credential|cleartextpassword)s?[\"']?\s*[=:>]"
)
_USERINFO = re.compile(rb"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s:@\"'<>]+(?::[^/\s@\"'<>]*)?@")
_GIT_KEYS = re.compile(
    r"(?i)^(http\.(.*\.)?(extraheader|cookiefile|sslkey|sslcertpasswordprotected|proxy)|credential\..*|"
    r"core\.(sshcommand|askpass)|url\..*|includeif\..*|include\..*)$"
)
_FITRIM = 0xC0185879


class Forgetting:
    """What was removed, and what could not be."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.failed: list[str] = []

    def remove(self, path: str) -> None:
        """A file, link or directory with all in it; regular files are overwritten first."""
        try:
            found = os.lstat(path)
        except OSError:
            return
        try:
            if stat.S_ISDIR(found.st_mode):
                for directory, names, files in os.walk(path, topdown=False):
                    for name in files:
                        _overwrite(os.path.join(directory, name))
                        os.unlink(os.path.join(directory, name))
                    for name in names:
                        place = os.path.join(directory, name)
                        (os.unlink if os.path.islink(place) else os.rmdir)(place)
                os.rmdir(path)
            else:
                _overwrite(path)
                os.unlink(path)
            self.removed.append(path)
        except OSError as error:
            self.failed.append(f"{path}: {error.strerror}")

    def clean(self, path: str) -> None:
        """A configuration: its lines with secrets go, passwords in addresses too."""
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return
            with open(path, "rb") as file:
                data = file.read(1 << 20)
            # ${NAME} is no secret but the name of one.
            kept = [
                line
                for line in data.splitlines(True)
                if not _LINE.search(line) or re.search(rb"\$\{?\w", line)
            ]
            cleaned = _USERINFO.sub(rb"\1", b"".join(kept))
            if cleaned != data:
                _overwrite(path)
                with open(path, "r+b") as file:
                    file.write(cleaned)
                    file.truncate()
                    os.fsync(file.fileno())
                self.removed.append(f"{path}: {len(data.splitlines()) - len(cleaned.splitlines())} lines")
        except FileNotFoundError:
            return
        except OSError as error:
            self.failed.append(f"{path}: {error.strerror}")

    def git_config(self, path: str) -> None:
        """A configuration of git's: ways to authenticate go, addresses lose their passwords."""
        if not os.path.isfile(path) or os.path.islink(path):
            return
        listed = _git("config", "--file", path, "--null", "--list")
        before, owner = len(self.removed), os.stat(path)
        with open(path, "rb") as file:
            original = file.read()
        for entry in listed.split(b"\0"):
            key, _, value = entry.partition(b"\n")
            name = os.fsdecode(key)
            if _GIT_KEYS.match(name):
                _git("config", "--file", path, "--unset-all", name)
                self.removed.append(f"{path}: {name.split('.')[0]}.…{name.rpartition('.')[2]}")
            elif _USERINFO.search(value):
                _git(
                    "config", "--file", path, "--replace-all", name, os.fsdecode(_USERINFO.sub(rb"\1", value))
                )
                self.removed.append(f"{path}: the password in {name}")
        if len(self.removed) > before:
            # git wrote another file in its place, as root; the old one's blocks are free, and discarded below.
            os.chown(path, owner.st_uid, owner.st_gid)
            with open(path, "rb") as file:
                changed = file.read()
            if changed == original or any(_GIT_KEYS.match(n) for n in _git_names(path)):
                self.failed.append(f"{path}: its secrets could not be removed")


def _git(*arguments: str) -> bytes:
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    try:
        told = subprocess.run(
            ["git", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
            env=environment,
        )
    except FileNotFoundError:  # nothing here is git's
        return b""
    return told.stdout


def _git_names(path: str) -> "list[str]":
    listed = _git("config", "--file", path, "--null", "--list", "--name-only")
    return os.fsdecode(listed).split("\0")


def _overwrite(path: str) -> None:
    """Zeroes in place of what a regular file holds, on the disk too."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        left = os.fstat(fd).st_size
        while left > 0:
            left -= os.write(fd, bytes(min(left, 1 << 20)))
        os.fsync(fd)
    finally:
        os.close(fd)


def homes() -> "list[str]":
    """Root's home and everybody's in /home."""
    found = ["/root"]
    if os.path.isdir("/home"):
        found += [os.path.join("/home", name) for name in sorted(os.listdir("/home"))]
    return [home for home in found if os.path.isdir(home) and not os.path.islink(home)]


def forget_home(forgetting: Forgetting, home: str) -> None:
    for name in (*SECRET_FILES, *HISTORY_FILES):
        forgetting.remove(os.path.join(home, name))
    for name in CONFIGURATIONS:
        forgetting.clean(os.path.join(home, name))
    for name in (".gitconfig", ".config/git/config"):
        forgetting.git_config(os.path.join(home, name))
    keys = os.path.join(home, ".ssh")
    if os.path.isdir(keys):
        for name in os.listdir(keys):
            path = os.path.join(keys, name)
            if os.path.isfile(path) and not os.path.islink(path) and _is_private_key(path):
                forgetting.remove(path)


def _is_private_key(path: str) -> bool:
    with open(path, "rb") as file:
        return b"PRIVATE KEY" in file.read(4096)


def forget_work(forgetting: Forgetting, directory: str) -> None:
    """A work tree: git's ways to authenticate, and secret files that are not the repository's own."""
    git = os.path.join(directory, ".git")
    configurations = [os.path.join(git, "config"), os.path.join(git, "config.worktree")]
    for place, _, names in os.walk(os.path.join(git, "modules")):
        configurations += [os.path.join(place, name) for name in names if name == "config"]
    for path in configurations:
        forgetting.git_config(path)
    for name in ("FETCH_HEAD", "ORIG_HEAD", "logs", "COMMIT_EDITMSG"):
        forgetting.remove(os.path.join(git, name))
    listed = _git(
        "-C", directory, "-c", "safe.directory=*", "ls-files", "-z", "--", *SECRET_FILES, *CONFIGURATIONS
    )
    tracked = set(os.fsdecode(listed).split("\0"))
    for name in (*SECRET_FILES, *HISTORY_FILES):
        if not any(path == name or path.startswith(name + "/") for path in tracked):
            forgetting.remove(os.path.join(directory, name))
    for name in CONFIGURATIONS:
        if name not in tracked:
            forgetting.clean(os.path.join(directory, name))


def forget_temporary(forgetting: Forgetting) -> None:
    """Temporary files, but for those in use: a service that was started may have its socket there."""
    used = _open_files()
    for top in TEMPORARY:
        count = 0
        for directory, names, files in os.walk(top, topdown=True):
            names[:] = [name for name in names if name not in KEPT]
            for name in files:
                path = os.path.join(directory, name)
                found = os.lstat(path)
                ordinary = stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)
                if ordinary and (found.st_dev, found.st_ino) not in used:
                    forgetting.remove(path)
                    forgetting.removed.pop()
                    count += 1
        for directory, _, _ in os.walk(top, topdown=False):
            if directory != top and os.path.basename(directory) not in KEPT:
                try:  # noqa: SIM105
                    os.rmdir(directory)  # where something is left in it, it stays
                except OSError:
                    pass
        if count:
            forgetting.removed.append(f"{top}: {count} files")


def _open_files() -> "set[tuple[int, int]]":
    found: set[tuple[int, int]] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for kind in ("fd", "map_files"):
            try:
                places = os.listdir(f"/proc/{pid}/{kind}")
            except OSError:
                continue
            for name in places:
                try:
                    one = os.stat(f"/proc/{pid}/{kind}/{name}")
                except OSError:
                    continue
                found.add((one.st_dev, one.st_ino))
    return found


def discard_free_blocks() -> int:
    """Give every free block of the root disk back; what stood there reads as zeroes. Returns bytes."""
    os.sync()
    fd = os.open("/", os.O_RDONLY)
    try:
        told = fcntl.ioctl(fd, _FITRIM, struct.pack("QQQ", 0, (1 << 64) - 1, 0))
    finally:
        os.close(fd)
    return int(struct.unpack("QQQ", told)[1])


def shrink_caches() -> None:
    """Let the kernel give back what it keeps of deleted files and closed connections, to be zeroed with the rest."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")
    for name in os.listdir("/sys/kernel/slab") if os.path.isdir("/sys/kernel/slab") else ():
        try:
            with open(f"/sys/kernel/slab/{name}/shrink", "w") as file:
                file.write("1")
        except OSError:
            continue


def main() -> int:
    forgetting = Forgetting()
    for home in homes():
        forget_home(forgetting, home)
    for path in SYSTEM_CONFIGURATIONS:
        forgetting.clean(path)
    forgetting.git_config("/etc/gitconfig")
    for directory in sys.argv[1:]:
        forget_work(forgetting, directory)
    forget_temporary(forgetting)
    try:
        forgetting.removed.append(f"{discard_free_blocks() >> 20} MiB of free blocks")
    except OSError as error:
        forgetting.failed.append(f"the free blocks of the disk: {error.strerror}")
    shrink_caches()
    for line in forgetting.removed:
        sys.stdout.write(f"removed {line}\n")
    for line in forgetting.failed:
        sys.stdout.write(f"could not remove {line}\n")
    return 1 if forgetting.failed else 0


if __name__ == "__main__":
    sys.exit(main())
