"""``Runner.Listener run``: one session, one job, the exit codes of the real one.

    read the three files → session (retried for ever) → message → acquire → job → complete → exit

0 done, 1 terminated or not configured, 2 retryable, 3 updating, 5 session conflict, 7 version deprecated.
Exit 0 says nothing about whether the job passed.
"""

import _signal
import posix
import select
import sys
import time

from standin import files, job, wire

VERSION = "2.329.0"
OK, TERMINATED, RETRYABLE, UPDATING, CONFLICT, DEPRECATED = 0, 1, 2, 3, 5, 7
CALL_TIMEOUT = 15.0
POLL_SECONDS = 50


class Exit(Exception):
    """Leave with this exit code."""

    def __init__(self, code, text):
        Exception.__init__(self, text)
        self.code = code


def main(argv, script):
    root = _absolute(script).rpartition("/")[0].rpartition("/")[0]
    command = argv[1] if len(argv) > 1 else ""
    if command == "--version":
        print(VERSION)
        return OK
    if command == "warmup":
        print("The stand-in runner is warm.")
        return OK
    if command == "--commit":
        print("standin")
        return OK
    if command != "run":
        print("usage: Runner.Listener run | warmup | --version", file=sys.stderr)
        return TERMINATED
    try:
        return Listener(root).run()
    except Exit as end:
        say(str(end))
        return end.code


class Listener:
    """The directories, the connections, the signals. Talks to the forge for the job too."""

    def __init__(self, root):
        self.root = root
        self.version = VERSION
        self.env = {k.decode("utf-8", "surrogateescape"): _text(v) for k, v in posix.environ.items()}
        self.retry = float(self.env.pop("STANDIN_RUNNER_RETRY_SECONDS", "30"))
        self.conflict = float(self.env.pop("STANDIN_RUNNER_CONFLICT_SECONDS", "240"))
        self.diag = root + "/_diag"
        files.make(self.diag)
        self.settings, server = self._configuration()
        self.calls = wire.Connection(server, CALL_TIMEOUT)
        self.messages = wire.Connection(server, CALL_TIMEOUT)
        self.session = None
        self.listening = False
        self.listen_at = 0.0
        self.cancelled = False
        self.stopping = False
        self.interruptible = False
        self._signals()

    def _configuration(self):
        try:
            loaded = [
                wire.loads(files.read(self.root + "/" + name, 1 << 20))
                for name in (".runner", ".credentials", ".credentials_rsaparams")
            ]
            settings, credentials, key = loaded
            secret = "Bearer " + credentials["data"]["clientId"] + "." + key["secret"]
            return settings, wire.Server(settings["serverUrl"], secret)
        except (OSError, ValueError, KeyError, TypeError) as error:
            # The name of the field or file, never the content.
            raise Exit(TERMINATED, f"Not configured: {type(error).__name__}: {_blamed(error)}") from None

    def _signals(self):
        self.wake, wake_write = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        _signal.set_wakeup_fd(wake_write)
        _signal.signal(_signal.SIGTERM, self._stop)
        _signal.signal(_signal.SIGINT, self._stop)
        _signal.signal(_signal.SIGCHLD, _nothing)
        _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)

    def _stop(self, number, frame):
        self.stopping = True
        if self.interruptible:
            raise Exit(TERMINATED, f"Runner listener exiting: signal {number}")

    def run(self):
        try:
            self.interruptible = True
            self._connect()
            message = self._next_job()
            self.interruptible = False
            if self.stopping:
                raise Exit(TERMINATED, "Runner listener exiting.")
            return self._work(message)
        except Exit:
            self.interruptible = False
            self._end_session()
            raise

    # -- the session -----------------------------------------------------------------------------

    def _connect(self):
        conflict_until = time.monotonic() + self.conflict
        while True:
            try:
                status, answer = self.calls.call("POST", "/_standin/session", {"version": VERSION})
            except OSError as error:
                status, answer = 503, {"message": str(error)}
            if status == 200:
                self.session = answer["session"]
                say(f"\n√ Connected to GitHub\n\nCurrent runner version: '{VERSION}'")
                say(_stamp() + "Listening for Jobs")
                return
            text = (answer or {}).get("message", "")
            if status == 426:
                raise Exit(DEPRECATED, text)
            if status == 409 and time.monotonic() >= conflict_until:
                raise Exit(CONFLICT, text)
            if status in (401, 403, 404):
                raise Exit(TERMINATED, "Failed to create a session. " + text)
            say(f"{_stamp()}Runner connect error: {text or status}. Retrying until reconnected.")
            self.pause(self.retry)

    def _end_session(self):
        if self.session is None:
            return
        self.calls.timeout = 2.0
        self.calls.close()
        try:  # noqa: SIM105 - contextlib would be one more import
            self.calls.call("DELETE", "/_standin/session/" + self.session)
        except OSError:
            pass

    def _next_job(self):
        while True:
            for kind, body in self._messages(None, None):
                if kind == "update":
                    raise Exit(UPDATING, "Runner update in process, do not shutdown runner.")
                if kind != "job":
                    continue
                status = self._insist(f"/_standin/jobs/{body['id']}/acquire", {})
                if status == 200:
                    return body

    def _messages(self, out, timeout):
        """Wait for the forge's channel, a signal or ``out``; yields (kind, job) of what came."""
        poller = select.poll()
        poller.register(self.wake, select.POLLIN)
        if out is not None:
            poller.register(out, select.POLLIN)
        now = time.monotonic()
        if not self.listening and not self.cancelled and now >= self.listen_at:
            self._listen()
        if self.listening:
            poller.register(self.messages.fileno(), select.POLLIN)
        elif not self.cancelled:
            pause = max(0.0, self.listen_at - now)
            timeout = pause if timeout is None else min(timeout, pause)
        ready = [fd for fd, _ in poller.poll(None if timeout is None else timeout * 1000 + 1)]
        if self.wake in ready:
            posix.read(self.wake, 512)
        if self.listening and self.messages.fileno() in ready:
            return self._heard()
        return ()

    def _listen(self):
        try:
            self.messages.send("GET", f"/_standin/session/{self.session}/message?wait={POLL_SECONDS}")
            self.listening = True
        except OSError:
            self._deaf()

    def _heard(self):
        self.listening = False
        try:
            status, answer = self.messages.receive()
        except OSError:
            self._deaf()
            return ()
        if status == 200:
            # A cancel is repeated for as long as the job runs; hearing it once is enough.
            self.cancelled = answer["type"] == "cancel"
            return ((answer["type"], answer["job"]),)
        if status in (401, 404) and self.interruptible:
            raise Exit(TERMINATED, "The runner registration has been deleted from the server.")
        if status != 204:
            self._deaf()
        return ()

    def _deaf(self):
        """The channel broke: try again after the pause."""
        self.messages.close()
        self.listening = False
        if self.interruptible:
            say(_stamp() + "Runner connect error. Retrying until reconnected.")
        self.listen_at = time.monotonic() + self.retry

    # -- for the job -----------------------------------------------------------------------------

    def _work(self, message):
        say(_stamp() + "Running job: " + message["name"])
        work = job.Job(message, self)
        conclusion = work.run()
        work.finish()
        body = {"conclusion": conclusion, "steps": work.steps}
        self._insist(f"/_standin/jobs/{work.id}/complete", body)
        result = {"success": "Succeeded", "failure": "Failed", "cancelled": "Canceled"}[conclusion]
        say(f"{_stamp()}Job {message['name']} completed with result: {result}")
        if self.stopping:
            return TERMINATED
        return OK

    def post(self, path, body):
        return self.calls.call("POST", path, body)

    def _insist(self, path, body):
        """POST until the forge answers something final, or we are told to stop; returns the status."""
        while True:
            try:
                status, _ = self.calls.call("POST", path, body)
            except OSError:
                status = 503
            if status < 500 and status != 429:
                return status
            if not self.pause(self.retry):
                return status

    def poll(self, out, timeout):
        """For a running step: wait for its output, a message or a signal; returns the kinds of messages."""
        return [kind for kind, _ in self._messages(out, timeout)]

    def pause(self, seconds):
        """Sleep; False when told to stop."""
        until = time.monotonic() + seconds
        while not self.stopping:
            left = until - time.monotonic()
            if left <= 0:
                return True
            poller = select.poll()
            poller.register(self.wake, select.POLLIN)
            if poller.poll(left * 1000 + 1):
                posix.read(self.wake, 512)
        return False

    def which(self, name):
        for directory in self.env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":"):
            if files.exists(directory + "/" + name):
                return directory + "/" + name
        return "/usr/bin/" + name


def say(text):
    files.write_all(1, text.encode() + b"\n")


def _stamp():
    return time.strftime("%Y-%m-%d %H:%M:%SZ: ", time.gmtime())


def _absolute(path):
    return path if path.startswith("/") else posix.getcwd() + "/" + path


def _text(data):
    return data.decode("utf-8", "surrogateescape")


def _blamed(error):
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _nothing(number, frame):
    """A handler, so that the wake-up pipe is written to."""
