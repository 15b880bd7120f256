"""HTTP/1.1 and JSON for the stand-in runner, on C modules alone.

Importing ``http.client`` and ``json`` costs three times the start of the interpreter, and under software
emulation that is a third of a second of every job; ``_socket`` and ``_json`` cost nothing.
"""

import _socket
from _json import encode_basestring_ascii, make_scanner

MAX_ANSWER = 8 << 20


class _Plain:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float
    memo = {}  # noqa: RUF012


_scan = make_scanner(_Plain())


def loads(data):
    """The value of a JSON document (bytes). Raises ValueError."""
    text = data.decode("utf-8").strip()
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("not JSON: extra data")
    return value


def dumps(value):
    """JSON text of None, bool, int, str, list and dict."""
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, dict):
        return "{" + ",".join(dumps(key) + ":" + dumps(item) for key, item in value.items()) + "}"
    return "[" + ",".join(dumps(item) for item in value) + "]"


class Server:
    """Where the forge is: ``http://host[:port][/prefix]``. Raises ValueError."""

    def __init__(self, url, authorization):
        scheme, _, rest = url.partition("://")
        if scheme != "http" or not rest:
            raise ValueError("the stand-in runner speaks http only, not " + url)
        netloc, slash, prefix = rest.partition("/")
        host, colon, port = netloc.rpartition(":")
        self.host, self.port = (host, int(port)) if colon else (netloc, 80)
        self.netloc = netloc
        self.prefix = (slash + prefix).rstrip("/")
        self.authorization = authorization


class Connection:
    """One kept-alive connection; failures are OSErrors. Calls may be repeated, so it reconnects once."""

    def __init__(self, server, timeout):
        self.server = server
        self.timeout = timeout
        self.sock = None
        self._buffer = b""

    def fileno(self):
        return self.sock.fileno()

    def close(self):
        if self.sock is not None:
            self.sock.close()
        self.sock = None
        self._buffer = b""

    def call(self, method, path, value=None):
        """(status, value) of one call."""
        again = self.sock is not None
        try:
            self.send(method, path, value)
            return self.receive()
        except OSError:
            self.close()
            if not again:
                raise
        self.send(method, path, value)
        return self.receive()

    def send(self, method, path, value=None):
        if self.sock is None:
            self._open()
        body = b"" if value is None else dumps(value).encode()
        head = (
            method + " " + self.server.prefix + path + " HTTP/1.1\r\n"
            "host: " + self.server.netloc + "\r\n"
            "user-agent: GitHubActionsRunner-standin\r\n"
            "authorization: " + self.server.authorization + "\r\n"
            "content-type: application/json\r\n"
            "content-length: " + str(len(body)) + "\r\n\r\n"
        )
        try:
            self.sock.sendall(head.encode() + body)
        except OSError:
            self.close()
            raise

    def receive(self):
        try:
            return self._receive()
        except OSError:
            self.close()
            raise
        except (ValueError, IndexError):
            self.close()
            raise OSError("the server's answer is not understood") from None

    def _open(self):
        sock = None
        error = OSError("no address for " + self.server.host)
        for family, kind, proto, _, address in _socket.getaddrinfo(
            self.server.host, self.server.port, 0, _socket.SOCK_STREAM
        ):
            sock = _socket.socket(family, kind | _socket.SOCK_CLOEXEC, proto)
            try:
                sock.settimeout(self.timeout)
                sock.connect(address)
                sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
            except OSError as failed:
                sock.close()
                error = failed
                continue
            self.sock = sock
            return
        raise error

    def _receive(self):
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(head[0].split(" ")[1])
        length, closing = 0, False
        for line in head[1:]:
            name, _, value = line.partition(":")
            name = name.lower()
            if name == "content-length":
                length = int(value)
            elif name == "connection" and value.strip().lower() == "close":
                closing = True
        if length > MAX_ANSWER:
            raise ValueError
        while len(self._buffer) < length:
            self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        if closing:
            self.close()
        return status, loads(body) if body else None

    def _until(self, mark):
        while mark not in self._buffer:
            if len(self._buffer) > 65536:
                raise ValueError
            self._more()
        head, _, self._buffer = self._buffer.partition(mark)
        return head

    def _more(self):
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._buffer += data
