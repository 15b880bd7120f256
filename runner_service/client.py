"""The command line's view of a service: its API when it answers, else the database of the data directory, read-only."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import httpx
import msgspec

from runner_service import views
from runner_service.domain import WRITES_LOG, Bake
from runner_service.joblog import JobLogs
from runner_service.settings import Settings, SettingsError, read_secret
from runner_service.store import bake_queries as bq
from runner_service.store import job_search

if TYPE_CHECKING:
    from runner_service.store.store import Store

T = TypeVar("T")
SERVICE_FILE = "service.json"
TOKEN_FILE = "api-token"  # noqa: S105
"""In the data directory: the token of the command line of this host, kept by a service that demands tokens."""

_RESTART_SECONDS = 60.0


class NotThereError(Exception):
    """What was asked for does not exist; the message is a sentence."""


class NobodyThereError(NotThereError):
    """No service listens at that address."""


class Source(Protocol):
    """Where the command line reads from."""

    async def jobs(self, limit: int) -> list[views.JobView]: ...
    async def story(self, job: str) -> views.Story: ...
    def log(self, job: str, *, follow: bool) -> AsyncIterator[bytes]: ...
    async def vms(self) -> list[views.VmView] | None: ...
    async def bakes(self, limit: int) -> list[Bake]: ...
    def bake_log(self, bake: int, *, follow: bool) -> AsyncIterator[bytes]: ...


class ServiceAnswer(msgspec.Struct, frozen=True):
    """``service.json``: where the running service answers, and where webhooks go if that is elsewhere."""

    address: str
    pid: int
    webhooks: str = ""


@contextlib.asynccontextmanager
async def source(settings: Settings, api: str | None) -> AsyncGenerator[Source]:
    """The running service of these settings (or at ``api``); without one, its database."""
    address = api or announced(settings.data_dir)
    if address is not None:
        async with http_client(settings, api, address, httpx.Timeout(10.0, read=60.0)) as http:
            try:
                (await http.get("/healthz")).raise_for_status()
            except httpx.HTTPError as error:
                if api is not None:
                    raise SettingsError(f"no service answers at {api}: {error}") from error
            else:
                yield _Api(http, settings.data_dir)
                return
    from runner_service.daemon import database_url  # noqa: PLC0415
    from runner_service.store.store import Store  # noqa: PLC0415

    async with Store.open(database_url(settings), read_only=True) as store:
        yield _Database(store, settings.data_dir)


def announced(data_dir: Path) -> str | None:
    """The address that the service of this data directory wrote down, if it did."""
    try:
        return msgspec.json.decode((data_dir / SERVICE_FILE).read_bytes(), type=ServiceAnswer).address
    except (OSError, msgspec.DecodeError):
        return None


async def kill(settings: Settings, api: str | None, vm_id: str) -> bool:
    """Ask the service to end a VM; False when no service answers."""
    address = api or announced(settings.data_dir)
    if address is None:
        return False
    try:
        answer = await send(settings, api, "POST", f"/vms/{quoted(vm_id)}/kill", address=address)
    except NobodyThereError:
        return False
    if answer.status_code == 404:
        raise NotThereError(f"there is no VM {vm_id}: see microvm ps")
    content_of(answer)
    return True


async def send(
    settings: Settings,
    api: str | None,
    method: str,
    path: str,
    *,
    address: str,
    timeout: float = 30.0,
    **how: Any,
) -> httpx.Response:
    """What the service at ``address`` (``api`` if that was named) answers, errors too; ``timeout`` in seconds.

    Raises NotThereError when it does not answer, SettingsError for a token that cannot be read.
    """
    async with http_client(settings, api, address, httpx.Timeout(timeout)) as http:
        try:
            return await http.request(method, path, **how)
        except httpx.HTTPError as error:
            kind = NobodyThereError if isinstance(error, httpx.ConnectError) else NotThereError
            raise kind(f"the service at {address} does not answer: {error}") from error


def content_of(answer: httpx.Response) -> bytes:
    """The body of an answer. Raises NotThereError with the service's own sentence when it is an error."""
    if answer.is_error:
        raise NotThereError(detail_of(answer))
    return answer.content


def http_client(
    settings: Settings, api: str | None, address: str, timeout: httpx.Timeout
) -> httpx.AsyncClient:
    """A client of the service at ``address`` that sends its token, if there is one. Raises SettingsError."""
    # No proxy of the environment: the service is this host's own, or one that was named.
    file = _token_file(settings, named=api is not None)
    return httpx.AsyncClient(
        base_url=address, timeout=timeout, trust_env=False, auth=None if file is None else _Bearer(file)
    )


class _Bearer(httpx.Auth):
    """The token of a file, read for each request: a service that starts anew may have written another."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        token = read_secret(file=str(self._file), variable="", what="the API token") or ""
        if not token.isascii() or not token.isprintable():
            raise SettingsError(f"the API token: {self._file} holds no token")
        request.headers["authorization"] = f"Bearer {token}"
        yield request


def _token_file(settings: Settings, *, named: bool) -> Path | None:
    """The file of the token to send. This host's own goes to the service that announced itself here, and never to an
    address that was ``named``: whoever answers there could keep it."""
    if settings.token_file is not None:
        return settings.token_file
    if given := os.environ.get("MICROVM_API_TOKEN_FILE"):
        return Path(given)
    own = settings.data_dir / TOKEN_FILE
    return own if not named and own.exists() else None


class _Api:
    def __init__(self, http: httpx.AsyncClient, data_dir: Path) -> None:
        self._http = http
        self._data_dir = data_dir

    async def jobs(self, limit: int) -> list[views.JobView]:
        return await self._get("/jobs", list[views.JobView], limit=limit)

    async def story(self, job: str) -> views.Story:
        return await self._get("/why", views.Story, job=job)

    async def vms(self) -> list[views.VmView] | None:
        return await self._get("/vms", list[views.VmView])

    async def bakes(self, limit: int) -> list[Bake]:
        return await self._get("/bakes", list[Bake], limit=limit)

    def bake_log(self, bake: int, *, follow: bool) -> AsyncIterator[bytes]:
        return self._followed(f"/bakes/{bake}", follow, lambda: self._bakes_on(bake))

    def log(self, job: str, *, follow: bool) -> AsyncIterator[bytes]:
        return self._followed(f"/jobs/{quoted(job)}", follow, lambda: self._goes_on(job))

    async def _followed(
        self, path: str, follow: bool, goes_on: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[bytes]:
        """Followed, a log outlives a restart of the service: it goes on where it was cut."""
        offset = 0
        cut_at: float | None = None
        while True:
            try:
                async for piece in self._stream(path, offset, follow=follow):
                    offset += len(piece)
                    cut_at = None
                    yield piece
                # A service that stops ends the stream properly, though what is followed goes on.
                if not follow or not await goes_on():
                    return
            except httpx.TransportError as error:
                cut_at = cut_at or time.monotonic()
                if not follow or time.monotonic() - cut_at > _RESTART_SECONDS:
                    raise NotThereError(f"the service at {self._http.base_url} went away: {error}") from error
            await asyncio.sleep(0.5)
            self._http.base_url = announced(self._data_dir) or self._http.base_url

    async def _goes_on(self, job: str) -> bool:
        answer = await self._http.get(f"/jobs/{quoted(job)}")
        if answer.status_code != 200:
            return False
        return msgspec.json.decode(answer.content, type=views.Story).job.runner_state in WRITES_LOG

    async def _bakes_on(self, bake: int) -> bool:
        answer = await self._http.get(f"/bakes/{bake}")
        if answer.status_code != 200:
            return False
        return msgspec.json.decode(answer.content, type=Bake).state in ("queued", "baking")

    async def _stream(self, path: str, offset: int, *, follow: bool) -> AsyncIterator[bytes]:
        params = {"follow": "true" if follow else "false", "offset": str(offset)}
        # What is quiet is silent for hours; the service ends the stream, or the connection breaks.
        asked = self._http.stream("GET", f"{path}/log", params=params, timeout=None if follow else 60.0)
        async with asked as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise NotThereError(detail_of(answer))
            yield b""  # it answers: what is cut from now on is cut anew
            async for piece in answer.aiter_raw():
                yield piece

    async def _get(self, path: str, kind: type[T], **params: Any) -> T:
        try:
            answer = await self._http.get(path, params=params)
        except httpx.TransportError as error:
            raise NotThereError(f"the service at {self._http.base_url} does not answer: {error}") from error
        if answer.status_code != 200:
            raise NotThereError(detail_of(answer))
        return msgspec.json.decode(answer.content, type=kind)


class _Database:
    def __init__(self, store: "Store", data_dir: Path) -> None:
        self._store = store
        self._logs = JobLogs(data_dir / "logs", limit=0)
        self._bake_logs = JobLogs(data_dir / "logs" / "bakes", limit=0)

    async def jobs(self, limit: int) -> list[views.JobView]:
        return await self._store.read(lambda db: views.list_jobs(db, limit=limit))

    async def story(self, job: str) -> views.Story:
        found = await self._store.read(lambda db: views.story(db, job))
        if found is None:
            close = await self._store.read(lambda db: job_search.near(db, job))
            raise NotThereError(job_search.unknown(job, close, "microvm jobs"))
        return found

    async def vms(self) -> list[views.VmView] | None:
        return None

    async def bakes(self, limit: int) -> list[Bake]:
        return await self._store.read(lambda db: views.list_bakes(db, limit=limit))

    async def bake_log(self, bake: int, *, follow: bool) -> AsyncIterator[bytes]:
        del follow  # nothing is appended while no service runs
        if await self._store.read(lambda db: bq.bake(db, bake)) is None:
            raise NotThereError(f"there is no bake {bake}: see microvm bakes")
        async for piece in self._bake_logs.read(str(bake)):
            yield piece

    async def log(self, job: str, *, follow: bool) -> AsyncIterator[bytes]:
        del follow  # nothing is appended while no service runs
        story = await self.story(job)
        if story.job.runner is not None:
            async for piece in self._logs.read(story.job.runner):
                yield piece


def detail_of(answer: Any) -> str:
    """The sentence of a problem document."""
    try:
        return str(msgspec.json.decode(answer.content)["detail"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"the service answered {answer.status_code}"


def quoted(segment: str) -> str:
    """``segment`` as one part of a path."""
    from urllib.parse import quote  # noqa: PLC0415

    return quote(segment, safe="")
