"""One job: its steps, its live log, its cancellation. One thread, one poll loop.

While a step runs the loop watches the step's output, the forge's message channel (for a cancel) and signals.
An unreachable forge never stops the job: the log is kept (up to a bound, then the step's output is not read
any more) and sent when the forge is back.
"""

import _signal
import binascii
import posix
import time

from standin import files, log

MAX_LINE = 64 << 10
DRAIN = 0.2
STAGES = ((0.0, _signal.SIGINT), (2.0, _signal.SIGTERM), (4.0, _signal.SIGKILL))


class Job:
    """``host`` is the listener: it owns the connections, the signals and the directories."""

    def __init__(self, message, host):
        self.message = message
        self.host = host
        self.id = message["id"]
        self.name = host.settings["agentName"]
        self.steps = []
        self.groups = []
        self.cancelled_at = None
        self.stage = 0
        repo = message["repository"].rpartition("/")[2]
        self.work = host.root + "/" + host.settings.get("workFolder", "_work")
        self.workspace = self.work + "/" + repo + "/" + repo
        self.temp = self.work + "/_temp"
        self.commands = self.temp + "/_runner_file_commands"
        self.path = []
        self.env = {}
        diag = host.diag + "/Worker_" + time.strftime("%Y%m%d-%H%M%S-utc.log", time.gmtime())
        self.diag = files.append_to(diag)
        echo = host.env.get("ACTIONS_RUNNER_PRINT_LOG_TO_STDOUT", "").lower() in ("1", "true")
        self.log = log.Log(self.id, host.post, self.diag, echo, min(host.retry, 5.0))

    def run(self):
        """Every step; returns the conclusion. The forge was not told of it yet."""
        for directory in (self.workspace, self.commands):
            files.make(directory)
        plan = self._plan()
        self.steps = [_step(number, name) for number, (name, _, _) in enumerate(plan, 1)]
        conclusion = "success"
        for number, (_, action, options) in enumerate(plan):
            step = self.steps[number]
            if self.cancelled_at is not None:
                conclusion = "cancelled"
            if conclusion != "success" and not (options.get("always") and conclusion != "cancelled"):
                step.update(status="completed", conclusion="skipped")
                continue
            step.update(status="in_progress", started_at=_now())
            self.log.upload(self.steps)
            ok = action() == 0
            ended = "success" if ok else "cancelled" if self.cancelled_at is not None else "failure"
            step.update(status="completed", conclusion=ended, completed_at=_now())
            if not ok and (ended == "cancelled" or not options.get("continue_on_error")):
                conclusion = ended
        if self.cancelled_at is not None:
            conclusion = "cancelled"
            self.log.line("##[error]The operation was canceled.")
        self._end_groups()
        return conclusion

    def finish(self):
        """Send the rest of the log, however long the forge is away, unless the listener was told to stop."""
        while self.log.pending:
            if not self.log.upload() and not self.host.pause(self.log.retry):
                break
        posix.close(self.diag)

    def cancel(self):
        if self.cancelled_at is None:
            self.cancelled_at = time.monotonic()

    # -- what is done ----------------------------------------------------------------------------

    def _plan(self):
        """(name, function that returns an exit status, options) of every step."""
        plan = [("Set up job", self._set_up, {})]
        started = self.host.env.get("ACTIONS_RUNNER_HOOK_JOB_STARTED")
        completed = self.host.env.get("ACTIONS_RUNNER_HOOK_JOB_COMPLETED")
        if started:
            plan.append(("Set up runner", lambda: self._hook(started), {}))
        for step in self.message["steps"]:
            action = self._checkout if "uses" in step else self._run
            plan.append((step["name"], lambda step=step, action=action: action(step), step))
        if completed:
            plan.append(("Complete runner", lambda: self._hook(completed), {"always": True}))
        plan.append(("Complete job", lambda: 0, {"always": True}))
        return plan

    def _set_up(self):
        self.log.line(f"Current runner version: '{self.host.version}'")
        self.log.line(f"Runner name: '{self.name}'")
        self.log.line(f"Machine name: '{posix.uname().nodename}'")
        return 0

    def _hook(self, path):
        self.log.line(f"##[group]A job hook was started: '{path}'")
        self.log.line("##[endgroup]")
        return self._report(self._command(["/bin/bash", "-e", path], {}))

    def _run(self, step):
        script = step["run"]
        self.log.line("##[group]" + step["name"])
        for line in script.rstrip("\n").split("\n"):
            self.log.line(line)
        self.log.line("shell: /usr/bin/bash -e {0}")
        self.log.line("##[endgroup]")
        path = self.temp + "/step.sh"
        files.write(path, script.encode() + b"\n")
        where = step.get("working_directory")
        cwd = self.workspace + "/" + where if where else self.workspace
        status = self._command(["/bin/bash", "-e", path], step.get("env") or {}, cwd)
        self._read_commands()
        return self._report(status)

    def _checkout(self, step):
        """As actions/checkout: the work folder of before is kept where its origin is the same (clean, reset), else
        made anew; then one fetch of depth 1 and a checkout. Its questions to git that change nothing are left out."""
        message = self.message
        self.log.line("##[group]Run " + step["uses"])
        self.log.line("Syncing repository: " + message["repository"])
        self.log.line("##[endgroup]")
        basic = binascii.b2a_base64(b"x-access-token:" + message["token"].encode(), newline=False).decode()
        # By environment, because arguments can be read by everyone on the machine.
        env = {
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": "http." + message["server_url"] + "/.extraheader",
            "GIT_CONFIG_VALUE_0": "AUTHORIZATION: basic " + basic,
            "GIT_CONFIG_KEY_1": "gc.auto",
            "GIT_CONFIG_VALUE_1": "0",
        }
        git = self.host.which("git")
        url = message["server_url"].rstrip("/") + "/" + message["repository"]
        if not self._kept(git, url, env):
            self._recreate(url, env)
        ref = message["ref"]
        kind, _, short = ref.removeprefix("refs/").partition("/")
        remote = "refs/remotes/" + ("pull/" if kind == "pull" else "origin/") + short
        spec = "+" + message["sha"] + ":" + (ref if kind == "tags" else remote)
        fetch = [git, "-c", "protocol.version=2", "fetch", "--no-tags", "--prune", "--no-recurse-submodules"]
        status = self._command([*fetch, "--depth=1", "origin", spec], env)
        if status != 0:
            return self._report(status)
        where = ["-B", short, remote] if kind == "heads" else [ref if kind == "tags" else remote]
        checkout = [git, "-c", "advice.detachedHead=false", "checkout", "-q", "--force", *where]
        return self._report(self._command(checkout, env))

    def _kept(self, git, url, env):
        """Whether the repository that is there can be used, and is then clean."""
        directory = self.workspace + "/.git"
        if not files.exists(directory) or _origin(directory + "/config") != url:
            return False
        for name in ("/index.lock", "/shallow.lock"):
            if files.exists(directory + name):
                posix.unlink(directory + name)
        commands = []
        if files.read(directory + "/HEAD").startswith(b"ref: refs/heads/"):
            commands.append(["checkout", "-q", "--detach"])
        if files.exists(directory + "/packed-refs") or posix.listdir(directory + "/refs/heads"):
            branches = "git for-each-ref --format='delete %(refname)' refs/heads | git update-ref --stdin"
            commands.append(["-c", "alias.forget-branches=!" + branches, "forget-branches"])
        commands += [["clean", "-q", "-ffdx"], ["reset", "-q", "--hard", "HEAD", "--"]]
        for command in commands:
            if self._command([git, *command], env, quiet=True) != 0:
                self.log.line("##[warning]The repository will be recreated instead.")
                return False
        return True

    def _recreate(self, url, env):
        """An empty repository with its origin (laid out by hand: cheaper than ``git init``)."""
        if posix.listdir(self.workspace):
            self.log.line(f"Deleting the contents of '{self.workspace}'")
            self._command(["/usr/bin/find", self.workspace, "-mindepth", "1", "-delete"], env)
        directory = self.workspace + "/.git"
        for name in ("/objects/info", "/objects/pack", "/refs/heads", "/refs/tags"):
            files.make(directory + name)
        files.write(directory + "/HEAD", b"ref: refs/heads/main\n")
        config = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n"
        origin = "\turl = " + url + "\n\tfetch = +refs/heads/*:refs/remotes/origin/*\n"
        files.write(directory + "/config", (config + '[remote "origin"]\n' + origin).encode())

    def _report(self, status):
        if status != 0 and self.cancelled_at is None:
            self.log.line(f"##[error]Process completed with exit code {status}.")
        return status

    def _environment(self, extra):
        message = self.message
        env = dict(self.host.env)
        owner, _, _ = message["repository"].partition("/")
        env.update(
            CI="true",
            GITHUB_ACTIONS="true",
            GITHUB_ACTOR="octocat",
            GITHUB_API_URL=message["server_url"] + "/api/v3",
            GITHUB_EVENT_NAME=message["event"],
            GITHUB_JOB=message["key"],
            GITHUB_REF=message["ref"],
            GITHUB_REF_NAME=message["branch"],
            GITHUB_REPOSITORY=message["repository"],
            GITHUB_REPOSITORY_OWNER=owner,
            GITHUB_RUN_ATTEMPT=str(message["run_attempt"]),
            GITHUB_RUN_ID=str(message["run_id"]),
            GITHUB_RUN_NUMBER=str(message["run_number"]),
            GITHUB_SERVER_URL=message["server_url"],
            GITHUB_SHA=message["sha"],
            GITHUB_WORKFLOW=message["workflow"],
            GITHUB_WORKSPACE=self.workspace,
            RUNNER_ARCH="X64",
            RUNNER_NAME=self.name,
            RUNNER_OS="Linux",
            RUNNER_TEMP=self.temp,
            RUNNER_TOOL_CACHE=self.work + "/_tool",
            RUNNER_WORKSPACE=self.workspace.rpartition("/")[0],
        )
        for name in ("env", "path", "output", "step_summary", "state"):
            env["GITHUB_" + name.upper()] = self.commands + "/" + name
        env.update(message.get("env") or {})
        env.update(self.env)
        env.update(extra)
        if self.path:
            env["PATH"] = ":".join([*self.path, env.get("PATH", "")])
        return env

    def _read_commands(self):
        """What the step wrote into GITHUB_ENV and GITHUB_PATH counts for the steps after it."""
        for name in ("env", "path", "output", "step_summary", "state"):
            path = self.commands + "/" + name
            try:
                text = files.read(path, 1 << 20).decode("utf-8", "replace")
                posix.unlink(path)
            except OSError:
                continue
            if name == "path":
                self.path[:0] = [line for line in reversed(text.split("\n")) if line]
            elif name == "env":
                self.env.update(_assignments(text))

    # -- the poll loop ---------------------------------------------------------------------------

    def _command(self, argv, extra, cwd=None, quiet=False):
        """Run a command in a session of its own, its output into the log; returns its exit status."""
        env = self._environment(extra)
        for name in ("env", "path", "output", "step_summary", "state"):
            files.write(env["GITHUB_" + name.upper()], b"")
        out, theirs = posix.pipe2(posix.O_CLOEXEC)
        null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
        target = null if quiet else theirs
        actions = [
            (posix.POSIX_SPAWN_DUP2, null, 0),
            (posix.POSIX_SPAWN_DUP2, target, 1),
            (posix.POSIX_SPAWN_DUP2, target, 2),
        ]
        try:
            # posix_spawn has no working directory, so ours is changed for a moment; there is one thread.
            posix.chdir(cwd or self.workspace)
            pid = posix.posix_spawn(
                argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=[_signal.SIGPIPE]
            )
        except OSError as error:
            self.log.line(f"##[error]{argv[0]}: {error.strerror}")
            posix.close(out)
            return 127
        finally:
            posix.close(theirs)
            posix.close(null)
            posix.chdir(self.host.root)
        self.groups.append(pid)
        posix.set_blocking(out, False)
        try:
            return self._watch(pid, out)
        finally:
            posix.close(out)

    def _watch(self, pid, out):
        status, drained_by, rest, is_open = None, None, b"", True
        self.stage = 0
        while True:
            if status is None:
                status = _exited(pid)
                if status is not None:
                    drained_by = time.monotonic() + DRAIN
            room = len(self.log.pending) < log.MAX_PENDING
            if is_open and room:
                data = _read(out)
                if data == b"":
                    is_open = False
                elif data:
                    rest = self._take(rest + data)
                    if status is not None:
                        drained_by = time.monotonic() + DRAIN
                    if len(self.log.pending) < log.UPLOAD_BYTES:
                        continue
            if status is not None and (not is_open or time.monotonic() >= drained_by):
                self.log.write(rest + b"\n" if rest and not rest.endswith(b"\n") else rest)
                return status
            self._escalate(pid, status)
            self._wait(out if is_open and room else None, status, drained_by)

    def _take(self, data):
        """Whole lines go to the log; what is left over is returned."""
        cut = data.rfind(b"\n") + 1
        if cut == 0 and len(data) >= MAX_LINE:
            cut = len(data)
        if cut:
            self.log.write(data[:cut])
        return data[cut:]

    def _wait(self, out, status, drained_by):
        waits = [self.log.wait(), None if status is None else drained_by - time.monotonic()]
        if self.cancelled_at is not None and self.stage < len(STAGES):
            waits.append(self.cancelled_at + STAGES[self.stage][0] - time.monotonic())
        waits = [wait for wait in waits if wait is not None]
        ready = self.host.poll(out, max(0.0, min(waits)) if waits else None)
        if "cancel" in ready or self.host.stopping:
            self.cancel()
        if self.log.pending and self.log.wait() == 0.0:
            self.log.upload()

    def _escalate(self, pid, status):
        """Interrupt, then terminate, then kill, as long as the step lives."""
        if self.cancelled_at is None or status is not None:
            return
        while self.stage < len(STAGES) and time.monotonic() >= self.cancelled_at + STAGES[self.stage][0]:
            _kill_group(pid, STAGES[self.stage][1])
            self.stage += 1

    def _end_groups(self):
        """What steps left running in the background ends with the job."""
        for pid in self.groups:
            _kill_group(pid, _signal.SIGKILL)


def _exited(pid):
    """The exit status in a shell's manner, None while it runs."""
    done, status = posix.waitpid(pid, posix.WNOHANG)
    if done == 0:
        return None
    return 128 + posix.WTERMSIG(status) if posix.WIFSIGNALED(status) else posix.WEXITSTATUS(status)


def _read(fd):
    """Bytes, b"" at the end, None when there is nothing now."""
    try:
        return posix.read(fd, 65536)
    except BlockingIOError:
        return None


def _kill_group(pid, number):
    try:  # noqa: SIM105 - contextlib would be one more import
        posix.killpg(pid, number)
    except OSError:
        pass


def _assignments(text):
    """``NAME=value`` lines and ``NAME<<END`` blocks of a GITHUB_ENV file."""
    found, lines = {}, iter(text.split("\n"))
    for line in lines:
        name, equals, value = line.partition("=")
        head, block, end = line.partition("<<")
        if block and (not equals or len(head) < len(name)):
            body = []
            for inner in lines:
                if inner == end:
                    break
                body.append(inner)
            found[head] = "\n".join(body)
        elif equals:
            found[name] = value
    return found


def _origin(path):
    """The address of origin in a configuration of git's, as far as git itself writes such files."""
    found, inside = "", False
    try:
        text = files.read(path, 1 << 20).decode("utf-8", "replace")
    except OSError:
        return found
    for line in text.split("\n"):
        if line.startswith("["):
            inside = line.strip() == '[remote "origin"]'
        name, _, value = line.partition("=")
        if inside and name.strip() == "url":
            found = value.strip()
    return found


def _step(number, name):
    return {
        "number": number,
        "name": name,
        "status": "queued",
        "conclusion": None,
        "started_at": None,
        "completed_at": None,
    }


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
