"""A small HTTP/1.1 server for the stand-in GitHub: h11 on asyncio streams.

It does two things a framework hides: a handler can drop the connection without an answer (``Drop``), and a
handler is cancelled the moment its client goes away, so a job is never handed to a long poll nobody reads.
"""

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

import h11

MAX_BODY = 64 << 20
IDLE_SECONDS = 120.0


class Drop(Exception):
    """Close the connection without an answer."""


@dataclass(slots=True)
class Request:
    method: str
    path: str
    raw_path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    peer: str

    def json(self) -> object:
        return json.loads(self.body) if self.body else {}


@dataclass(slots=True)
class Response:
    status: int = 200
    body: bytes | AsyncIterator[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)


def answer(status: int, document: object = None, **headers: str) -> Response:
    """A JSON answer; no body for ``None``."""
    if document is None:
        return Response(status, b"", headers)
    return Response(
        status,
        json.dumps(document, separators=(",", ":")).encode(),
        {"content-type": "application/json; charset=utf-8", **headers},
    )


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Listens on one loopback port; ``pause`` and ``resume`` take it away and bring it back."""

    def __init__(self, handler: Handler, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._handler = handler
        self.host = host
        self.port = port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]

    resume = start

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    pause = stop

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await _Connection(self._handler, reader, writer).run()
            writer.close()
            await writer.wait_closed()
        except (ConnectionError, TimeoutError, h11.ProtocolError, Drop, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(task)
            # Abort: after a Drop not even what is buffered may still go out.
            writer.transport.abort()


class _Connection:
    def __init__(self, handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._handler = handler
        self._reader = reader
        self._writer = writer
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=64 << 10)
        self._peer = str(writer.get_extra_info("peername", ("?",))[0])

    async def run(self) -> None:
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                request = await self._read()
            if request is None:
                return
            await self._respond(request.method, await self._handle(request))
            if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
                return
            self._h11.start_next_cycle()

    async def _handle(self, request: Request) -> Response:
        """Run the handler; stop it if the client hangs up meanwhile."""
        work = asyncio.ensure_future(self._handler(request))
        try:
            while not work.done():
                watch = asyncio.ensure_future(self._reader.read(65536))
                try:
                    await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not watch.done():
                        watch.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await watch
                if watch.done() and not watch.cancelled():
                    data = watch.result()
                    self._h11.receive_data(data)
                    if not data and not work.done():
                        raise ConnectionResetError
            return self._result(work)
        finally:
            if not work.done():
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await work

    def _result(self, work: asyncio.Future[Response]) -> Response:
        error = work.exception()
        if error is None:
            return work.result()
        if isinstance(error, Drop):
            raise error
        # A mistake of the stand-in must not look like a network failure.
        traceback.print_exception(error)
        return answer(500, {"message": f"{type(error).__name__}: {error}"})

    async def _event(self) -> object:
        while True:
            event = self._h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._h11.they_are_waiting_for_100_continue:
                self._send(h11.InformationalResponse(status_code=100, headers=[]))
            self._h11.receive_data(await self._reader.read(65536))

    async def _read(self) -> Request | None:
        head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        body = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                raise ConnectionResetError
        target = head.target.decode("latin-1")
        parts = urlsplit(target)
        return Request(
            method=head.method.decode(),
            path=unquote(parts.path),
            raw_path=parts.path,
            query=dict(parse_qsl(parts.query, keep_blank_values=True)),
            headers={k.decode("latin-1").lower(): v.decode("latin-1") for k, v in head.headers},
            body=bytes(body),
            peer=self._peer,
        )

    async def _respond(self, method: str, response: Response) -> None:
        headers = list(response.headers.items())
        whole = response.body if isinstance(response.body, bytes) else None
        if whole is None:
            headers.append(("transfer-encoding", "chunked"))
        elif response.status != 204:
            headers.append(("content-length", str(len(whole))))
        self._send(h11.Response(status_code=response.status, headers=headers))
        if whole is not None:
            if whole and method != "HEAD":
                self._send(h11.Data(data=whole))
        else:
            async for chunk in response.body:  # type: ignore[union-attr]
                self._send(h11.Data(data=chunk))
                await self._writer.drain()
        self._send(h11.EndOfMessage())
        await self._writer.drain()

    def _send(self, event: object) -> None:
        data = self._h11.send(event)  # type: ignore[arg-type]
        if data:
            self._writer.write(data)
