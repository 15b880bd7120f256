"""One bounded exchange with GitHub's REST API: a deadline, a size cap, a typed error for every bad ending.

What is repeated here, within the deadline: reads and deletes (they say the same the second time) after a
5xx, a network error or a time-out of one try. A POST is never repeated: its answer may be lost after it
happened, and only the caller can look (forges.md). Rate limits are never waited out here: RateLimited
carries ``retry_at``, and until then further calls of the same bucket fail at once without reaching GitHub,
which bans integrations that keep calling. A secondary limit told to a call that creates something holds only
such calls (it is what GitHub limits: content created a minute), so that runners can still be seen and let go.

Of one bucket at most ``AT_ONCE`` calls are under way (GitHub allows a hundred), so that nobody's slowness takes
the connections of others.
"""

import asyncio
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Literal, TypeVar
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import httpx
import msgspec
import stamina

from github_webhook.errors import (
    AnswerInvalid,
    Conflict,
    Forbidden,
    ForgeError,
    NotFound,
    RateLimited,
    Unauthorized,
    Unavailable,
    Unprocessable,
)

API_VERSION = "2022-11-28"
MAX_ANSWER = 10 << 20
MAX_REDIRECTS = 3
SECONDARY_PAUSE = 60.0
AT_ONCE = 16
MAX_BUCKETS = 4096
MAX_PAUSE = 3600.0
"""A rate-limit header that names a moment further away than GitHub's hour is not believed."""

Method = Literal["GET", "POST", "DELETE"]
Headers = Mapping[str, str]
T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """A 2xx answer, or 304 to a call that named an ``etag``. ``body`` may be a secret: it is kept out of the repr."""

    status: int
    request_id: str | None
    body: bytes
    next_cursor: str | None = None
    etag: str | None = None

    @property
    def unchanged(self) -> bool:
        """GitHub says 304: what was answered with this etag is still so, and the call is not counted."""
        return self.status == 304

    def __repr__(self) -> str:
        return f"Answer(status={self.status}, request_id={self.request_id!r}, <{len(self.body)} bytes>)"

    def read(self, decoder: "msgspec.json.Decoder[T]") -> T:
        """The body as the decoder's type; AnswerInvalid if it is something else."""
        try:
            return decoder.decode(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            # A ValidationError names the field and never its value; any other error names the position.
            detail = str(error) if isinstance(error, msgspec.ValidationError) else "not JSON"
            raise AnswerInvalid(
                f"GitHub's answer is not understood: {detail}",
                status=self.status,
                request_id=self.request_id,
                retryable=True,
            ) from None


class Limit(msgspec.Struct, frozen=True):
    """What GitHub said last of a primary rate limit: calls per hour, calls left, when it begins anew (Unix seconds)."""

    limit: int
    remaining: int
    reset_at: float


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    method: Method
    url: str
    what: str
    headers: Headers
    bucket: str
    params: Mapping[str, str] | None
    content: bytes | None
    timeout: float

    def __repr__(self) -> str:
        return f"_Call({self.what})"


class _Message(msgspec.Struct):
    message: str = ""


_message = msgspec.json.Decoder(_Message)


def api_base_url(server: str) -> str:
    """The REST address of a GitHub server as people write it.

    ``https://github.com`` → ``https://api.github.com``; ``https://x.ghe.com`` → ``https://api.x.ghe.com``;
    any other bare host is GitHub Enterprise Server and gets ``/api/v3``. An address with a path stays.
    """
    parts = urlsplit(server.rstrip("/"))
    host = (parts.hostname or "").lower()
    if host in ("github.com", "api.github.com"):
        return "https://api.github.com"
    if parts.path:
        return server.rstrip("/")
    if host.endswith(".ghe.com"):
        return f"https://{host}" if host.startswith("api.") else f"https://api.{host}"
    return f"{server.rstrip('/')}/api/v3"


def clone_url(api_url: str, owner: str, repo: str) -> str:
    """Where ``git`` finds a repository of the server whose REST address is ``api_url``."""
    parts = urlsplit(api_url)
    server = parts.netloc
    if server.lower() == "api.github.com" or server.lower().endswith(".ghe.com"):
        server = server.removeprefix("api.")
    return f"{parts.scheme}://{server}{path(owner, f'{repo}.git')}"


def path(*segments: str | int) -> str:
    """An address path of these segments, each quoted as a whole; no segment can climb out."""
    quoted = [quote(str(segment), safe="") for segment in segments]
    if any(segment in ("", ".", "..") for segment in quoted):
        raise ValueError(f"not a path segment in {segments!r}")
    return "/" + "/".join(quoted)


class Rest:
    """The address of one GitHub and what is known about its limits. Not tied to credentials."""

    def __init__(self, base_url: str, http: httpx.AsyncClient, *, timeout: float = 10.0) -> None:
        self._base = base_url.rstrip("/")
        self._origin = _origin(self._base)
        self._http = http
        self._timeout = timeout
        self._paused: dict[tuple[str, bool], float] = {}
        self._limited: dict[str, int] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._limits: dict[str, Limit] = {}

    def limited_until(self, bucket: str, *, creating: bool) -> float | None:
        """When calls of the bucket (those that create something, or any) may be made again; None: now."""
        now = time.time()
        until = max(self._paused.get((bucket, False), 0.0), self._paused.get((bucket, creating), 0.0))
        return until if until > now else None

    def limit(self, bucket: str) -> Limit | None:
        """The rate limit of ``bucket`` as of its last answer; None when nothing is known of this hour."""
        known = self._limits.get(bucket)
        return known if known is not None and known.reset_at > time.time() else None

    async def call(
        self,
        method: Method,
        target: str,
        *,
        headers: Headers,
        bucket: str,
        params: Mapping[str, str] | None = None,
        body: object = None,
        etag: str | None = None,
    ) -> Answer:
        """One call within the time-out, all tries together. ``bucket`` names who is rate limited together.

        ``etag`` is that of an earlier answer to the same GET with the same credentials: 304 is an answer then. It does
        not count against the primary rate limit (GitHub's "Best practices for using the REST API").
        Raises a ForgeError.
        """
        once = method == "POST"
        self._refuse_while_paused(bucket, creating=once)
        call = _Call(
            method=method,
            url=self._base + target,
            what=f"{method} {target}",
            headers=_headers(
                {**headers, **({"if-none-match": etag} if etag else {})}, has_body=body is not None
            ),
            bucket=bucket,
            params=params,
            content=None if body is None else msgspec.json.encode(body),
            # A try that may be repeated must leave time to repeat it.
            timeout=self._timeout if once else self._timeout * 0.4,
        )
        try:
            async with asyncio.timeout(self._timeout), self._slot(bucket):
                # Its wait may have been long enough for others of its kind to be told to stop.
                self._refuse_while_paused(bucket, creating=once)
                return await (self._exchange(call) if once else self._repeated(call))
        except TimeoutError:
            raise Unavailable(
                f"{call.what}: no complete answer within {self._timeout:g} s", retryable=True
            ) from None

    async def _repeated(self, call: "_Call") -> Answer:
        async for attempt in stamina.retry_context(
            on=_worth_repeating,
            attempts=3,
            timeout=self._timeout,
            wait_initial=0.2,
            wait_max=2.0,
            wait_jitter=0.2,
        ):
            with attempt:
                return await self._exchange(call)
        raise AssertionError("unreachable: the last attempt raises")

    async def _exchange(self, call: "_Call") -> Answer:
        url, params = call.url, call.params
        try:
            for _ in range(MAX_REDIRECTS + 1):
                request = self._http.build_request(
                    call.method,
                    url,
                    params=params,
                    headers=call.headers,
                    content=call.content,
                    timeout=call.timeout,
                )
                response = await self._http.send(request, stream=True, follow_redirects=False)
                try:
                    moved = self._moved(response)
                    if moved is None:
                        return await self._finish(response, call.what, call.bucket)
                    url, params = moved, None
                finally:
                    await response.aclose()
        except httpx.HTTPError as error:
            # str(error) of httpx names the failure and never header or body.
            raise Unavailable(f"{call.what}: {type(error).__name__}: {error}"[:500], retryable=True) from None
        raise AnswerInvalid(f"{call.what}: more than {MAX_REDIRECTS} redirects")

    def _moved(self, response: httpx.Response) -> str | None:
        """Where a renamed repository lives now; only on the same server, because the token goes along."""
        if response.status_code not in (301, 302, 307, 308):
            return None
        url = urljoin(str(response.request.url), response.headers.get("location", ""))
        if _origin(url) != self._origin:
            raise AnswerInvalid("a redirect to another server is not followed", status=response.status_code)
        return url

    async def _finish(self, response: httpx.Response, what: str, bucket: str) -> Answer:
        status = response.status_code
        request_id = response.headers.get("x-github-request-id")
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER:
                raise AnswerInvalid(
                    f"{what}: the answer is larger than {MAX_ANSWER} bytes",
                    status=status,
                    request_id=request_id,
                )
        self._note_limit(bucket, response.headers)
        if 200 <= status < 300 or (status == 304 and "if-none-match" in response.request.headers):
            self._limited.pop(bucket, None)
            etag = response.headers.get("etag")
            return Answer(status, request_id, bytes(body), _next_cursor(response), etag)
        error = _error(what, response, bytes(body), self._limited.get(bucket, 0))
        if isinstance(error, RateLimited):
            self._pause(bucket, error)
        raise error

    def _note_limit(self, bucket: str, headers: httpx.Headers) -> None:
        """Servers without limits (GHES by default) say nothing; resources other than "core" have their own."""
        limit = _limit(headers)
        if limit is None or headers.get("x-ratelimit-resource", "core") != "core":
            return
        if len(self._limits) > MAX_BUCKETS:
            now = time.time()
            self._limits = {key: known for key, known in self._limits.items() if known.reset_at > now}
        self._limits[bucket] = limit

    def _pause(self, bucket: str, error: RateLimited) -> None:
        if len(self._paused) > MAX_BUCKETS:
            now = time.time()
            self._paused = {key: at for key, at in self._paused.items() if at > now}
            self._limited = {
                key: count for key, count in self._limited.items() if (key, True) in self._paused
            }
        key = (bucket, error.creating)
        self._paused[key] = max(error.retry_at, self._paused.get(key, 0.0))
        self._limited[bucket] = self._limited.get(bucket, 0) + 1

    def _refuse_while_paused(self, bucket: str, *, creating: bool) -> None:
        until = self.limited_until(bucket, creating=creating)
        if until is not None:
            raise RateLimited("still rate limited by GitHub; not called", retry_at=until)

    def _slot(self, bucket: str) -> asyncio.Semaphore:
        if len(self._slots) >= MAX_BUCKETS and bucket not in self._slots:
            self._slots = {key: one for key, one in self._slots.items() if one.locked()}
        return self._slots.setdefault(bucket, asyncio.Semaphore(AT_ONCE))


def _headers(headers: Headers, *, has_body: bool) -> Headers:
    common = {
        "accept": "application/vnd.github+json",
        "user-agent": "microvm-runner",
        "x-github-api-version": API_VERSION,
    }
    return {**common, **({"content-type": "application/json"} if has_body else {}), **headers}


def _worth_repeating(error: Exception) -> bool:
    return isinstance(error, Unavailable)


def _error(what: str, response: httpx.Response, body: bytes, limited: int = 0) -> ForgeError:
    """The error for an answer that is not 2xx. GitHub's own ``message`` is public text and is passed on.

    ``limited``: how often in a row a limit was told before.
    """
    status = response.status_code
    request_id = response.headers.get("x-github-request-id")
    try:
        said = _message.decode(body).message[:300]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = ""
    text = f"{what}: {status}{f' {said}' if said else ''}"
    if status in (403, 429):
        retry_at = _retry_at(response, said, limited)
        if retry_at is not None:
            primary = response.headers.get("x-ratelimit-remaining") == "0"
            creating = response.request.method == "POST" and not primary
            return RateLimited(
                text, retry_at=retry_at, status=status, request_id=request_id, creating=creating
            )
    if status in _BY_STATUS:
        return _BY_STATUS[status](text, status=status, request_id=request_id)
    if status >= 500 or status == 408:
        return Unavailable(text, status=status, request_id=request_id, retryable=True)
    return ForgeError(text, status=status, request_id=request_id)


_BY_STATUS: dict[int, type[ForgeError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: NotFound,
    422: Unprocessable,
}


def _next_cursor(response: httpx.Response) -> str | None:
    """The ``cursor`` of the next page, where a listing has cursors instead of page numbers."""
    try:
        query = urlsplit(response.links.get("next", {}).get("url", "")).query
    except ValueError:
        return None
    return next(iter(parse_qs(query).get("cursor", [])), None)


def _limit(headers: httpx.Headers) -> Limit | None:
    """The primary rate limit an answer tells of; a reset further away than GitHub's hour is not believed."""
    told = [headers.get(f"x-ratelimit-{name}", "") for name in ("limit", "remaining", "reset")]
    if not all(text.isdecimal() and len(text) < 12 for text in told):
        return None
    limit, remaining, reset = map(int, told)
    return Limit(limit, remaining, min(float(reset), time.time() + MAX_PAUSE))


def _retry_at(response: httpx.Response, said: str, limited: int) -> float | None:
    """When to call again (Unix seconds), or None when a 403 is about permissions.

    Order as documented by GitHub ("Rate limits for the REST API"): ``retry-after``, else ``x-ratelimit-reset``,
    else at least a minute, and exponentially longer when it goes on.
    """
    now = time.time()
    after = _delay(response.headers.get("retry-after"), now)
    if after is not None:
        return now + min(after, MAX_PAUSE)
    pause = min(MAX_PAUSE, SECONDARY_PAUSE * 2.0 ** min(limited, 10))
    headers = response.headers
    if headers.get("x-ratelimit-remaining") == "0":
        reset = headers.get("x-ratelimit-reset", "")
        if reset.isdecimal() and len(reset) < 12:
            return min(max(float(reset), now + 1), now + MAX_PAUSE)
        return now + pause
    if response.status_code == 429 or "rate limit" in said.lower():
        return now + pause
    return None


def _delay(value: str | None, now: float) -> float | None:
    """Seconds to wait from a ``retry-after``: a number of seconds or an HTTP date."""
    if value is None:
        return None
    if value.isdecimal() and len(value) < 10:
        return max(float(value), 1.0)
    try:
        return max(parsedate_to_datetime(value).timestamp() - now, 1.0)
    except (ValueError, TypeError):
        return SECONDARY_PAUSE


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return (
        parts.scheme,
        (parts.hostname or "").lower(),
        parts.port or (443 if parts.scheme == "https" else 80),
    )
