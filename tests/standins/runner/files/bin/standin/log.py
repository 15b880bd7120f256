"""The log of a job: live to the forge, to a file in _diag, and to stdout when asked for."""

import time

from standin import files

UPLOAD_AFTER = 0.2
UPLOAD_BYTES = 48 << 10
MAX_PENDING = 4 << 20
MAX_DIAG = 16 << 20


class Log:
    """The job's log: to the forge in pieces with offsets, to a file in _diag, to stdout when asked for."""

    def __init__(self, job, post, diag, echo, retry):
        self.job = job
        self.post = post
        self.diag = diag
        self.echo = echo
        self.retry = retry
        self.pending = bytearray()
        self.sent = 0
        self.first_at = None
        self.not_before = 0.0
        self.full = False
        self.diag_left = MAX_DIAG

    def line(self, text):
        self.write(text.encode() + b"\n")

    def write(self, data):
        data = data.decode("utf-8", "replace").encode()
        if self.echo:
            files.write_all(1, data)
        if self.diag_left > 0:
            files.write_all(self.diag, data[: self.diag_left])
            self.diag_left -= len(data)
        if self.full:
            return
        if not self.pending:
            self.first_at = time.monotonic()
        self.pending += data

    def wait(self):
        """Seconds until the next upload is due, None when there is nothing to send."""
        if not self.pending:
            return None
        due = self.first_at if len(self.pending) >= UPLOAD_BYTES else self.first_at + UPLOAD_AFTER
        return max(0.0, max(due, self.not_before) - time.monotonic())

    def upload(self, steps=None):
        """Send one piece. False if the forge cannot be reached; then not again before ``retry`` seconds."""
        end = min(UPLOAD_BYTES, len(self.pending))
        while end < len(self.pending) and self.pending[end] & 0xC0 == 0x80:
            end += 1  # not through the middle of a character
        piece = bytes(self.pending[:end])
        body = {"offset": self.sent, "data": piece.decode()}
        if steps is not None:
            body["steps"] = steps
        try:
            status, _ = self.post(f"/_standin/jobs/{self.job}/log", body)
        except OSError:
            status = 503
        if status >= 500 or status == 429:
            self.not_before = time.monotonic() + self.retry
            return False
        if status != 200:
            self.full = True
            self.pending.clear()
            return True
        self.sent += len(piece)
        del self.pending[: len(piece)]
        self.first_at = time.monotonic()
        return True
