"""uvicorn as this service runs it: bounded against peers that send much, slowly, or nothing, and without signals.

a connection  at most ``CONNECTIONS`` of one listener; the next is closed at once
its head      ``HEAD_BYTES`` within ``HEAD_SECONDS``, from the connection or from the first byte on
its body      within ``BODY_SECONDS``; how long it may be is the route's business
idle between two requests  five seconds (uvicorn's own)
"""

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any

import uvicorn
from litestar import Litestar
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONNECTIONS = 1024
HEAD_BYTES = 64 << 10
HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0


def config(app: Litestar) -> uvicorn.Config:
    """How an application is served."""
    return uvicorn.Config(
        app,
        loop="none",
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Who sends a request is who sends it: a header that names somebody else changes nothing but our trust.
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )


class Server(uvicorn.Server):
    """uvicorn without its own signal handling: the daemon decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class BoundedProtocol(HttpToolsProtocol):
    """One connection of uvicorn's, with bounds that it lacks: a head could be endless, and last for ever."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        # Bytes since the parser last made something of them: a head, or part of a body.
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        self._expect(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES and not self.transport.is_closing():
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._unread = 0
        self._expect(BODY_SECONDS)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        self._expect(None)
        super().on_message_complete()

    def _expect(self, seconds: float | None) -> None:
        """What has begun is over within ``seconds``; None: nothing is awaited from the peer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self.flow.read_paused:
            # It is us who do not read: the application has enough to do with what there is.
            self._expect(BODY_SECONDS)
        elif not self.transport.is_closing():
            self.transport.abort()
