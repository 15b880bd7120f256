"""SQLite on the event loop: statements run where they are called, what may wait runs in the connection's thread.

A statement takes microseconds, and a trip to a thread and back costs more than it does, most of all on a busy loop,
where each trip waits for Python's lock. Two things may wait, and do so in the thread: taking the write lock while
another process holds it, and the commit with its fsync. Readers wait for nobody (WAL).

A commit is durable when it returns: ``synchronous=FULL`` syncs the write-ahead log with every commit, so what was
committed survives a power cut as far as the disk keeps what it says it has written.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any, NoReturn, cast

import aiosqlite
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.aiosqlite import (
    AsyncAdapt_aiosqlite_connection,
    AsyncAdapt_aiosqlite_cursor,
    AsyncAdapt_aiosqlite_dbapi,
)
from sqlalchemy.event import listen
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only

LOCK_SECONDS = 10
"""How long a writer waits for another process's transaction."""

_BEGIN_WRITING = "BEGIN IMMEDIATE"
_CACHE_KIB = 4096


def engines(url: sa.URL, *, read_only: bool, **options: Any) -> tuple[AsyncEngine, AsyncEngine]:
    """One writer connection, so that writers queue in order, and readers beside it.

    Raises OSError when the file cannot be made.
    """
    if not read_only:
        path = Path(url.database or "")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    options |= {"connect_args": {"timeout": LOCK_SECONDS}, "module": _Driver(aiosqlite, sqlite3)}
    writer = create_async_engine(url, pool_size=1, max_overflow=0, **options)
    reader = create_async_engine(url, pool_size=2, max_overflow=2, **options)
    for engine in (writer, reader):
        _set_pragmas(engine, read_only=read_only)
    # Begun by hand: the driver would begin at the first write only, and each statement before see its own moment.
    _begin_with(reader, "BEGIN")
    _begin_with(writer, _BEGIN_WRITING)
    return writer, reader


def _begin_with(engine: AsyncEngine, statement: str) -> None:
    def on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(statement)

    listen(engine.sync_engine, "begin", on_begin)


def _set_pragmas(engine: AsyncEngine, *, read_only: bool) -> None:
    def on_connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        if not read_only:
            cursor.execute("PRAGMA journal_mode=WAL")
        # FULL: an event that was answered with 2xx survives a power cut; it costs one fsync a commit.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        cursor.close()

    listen(engine.sync_engine, "connect", on_connect)


class _Cursor(AsyncAdapt_aiosqlite_cursor):
    """The driver's own cursor, used at once. SQLAlchemy insists on one await a statement: it gets an empty one."""

    __slots__ = ()
    _awaitable_cursor_close = False

    def _make_new_cursor(self, connection: Any) -> Any:
        return connection._conn.cursor()

    def _aenter_cursor(self, cursor: Any) -> Any:
        return cursor

    def execute(self, operation: Any, parameters: Any = None) -> Any:
        cursor: Any = self._cursor
        try:
            if operation == _BEGIN_WRITING:
                return await_only(self._begin_writing())
            await_only(_nothing())
            cursor.execute(operation, parameters or ())
            if cursor.description:
                self._rows.extend(cursor.fetchall())
        except Exception as error:  # noqa: BLE001
            cast("_Connection", self._adapt_connection).failed(error)

    def executemany(self, operation: Any, seq_of_parameters: Any) -> Any:
        cursor: Any = self._cursor
        try:
            await_only(_nothing())
            cursor.executemany(operation, seq_of_parameters)
        except Exception as error:  # noqa: BLE001
            cast("_Connection", self._adapt_connection).failed(error)

    async def _begin_writing(self) -> None:
        connection: Any = self._connection
        with contextlib.suppress(sqlite3.OperationalError):
            connection._conn.execute("PRAGMA busy_timeout=0")
            try:
                connection._conn.execute(_BEGIN_WRITING)
                return
            finally:
                connection._conn.execute(f"PRAGMA busy_timeout={LOCK_SECONDS * 1000}")
        await connection.execute(_BEGIN_WRITING)


async def _nothing() -> None:
    """Over before it began."""


class _Connection(AsyncAdapt_aiosqlite_connection):
    """Commits in the thread, rolls back at once."""

    __slots__ = ()
    _cursor_cls = _Cursor

    def failed(self, error: Exception) -> NoReturn:
        self._handle_exception(error)

    def rollback(self) -> None:
        connection: Any = self._connection
        if connection._connection and connection._conn.in_transaction:
            try:
                connection._conn.rollback()
            except Exception as error:  # noqa: BLE001
                self._handle_exception(error)

    def commit(self) -> None:
        connection: Any = self._connection
        if connection._connection and connection._conn.in_transaction:
            super().commit()


class _Driver(AsyncAdapt_aiosqlite_dbapi):
    def connect(self, *arg: Any, **kw: Any) -> _Connection:
        opened: Any = super().connect(*arg, **kw)
        return _Connection(self, opened._connection)
