"""Opens the database, brings it to the newest migration, and hands out transactions.

SQLite: one writer connection, so that writers queue in order instead of polling for a lock; readers beside it
(WAL). PostgreSQL: an ordinary pool.
"""

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from runner_service.store import sqlite
from runner_service.store.group import Answer, Group, Item
from runner_service.store.queries import warm_up
from runner_service.store.schema import HEAD

T = TypeVar("T")
# What people write → the driver that is used.
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
_MIGRATION_LOCK = 0x6D766D31  # "mvm1": the key of the advisory lock on PostgreSQL


class StoreError(Exception):
    """The database cannot be used; the message says which, why, and what to do."""

    code = "store_unusable"


class _RollbackError(Exception):
    """Ends a transaction without keeping it."""


class Store:
    """Transactions on one database. Made by ``Store.open``."""

    def __init__(self, url: sa.URL, writer: AsyncEngine, reader: AsyncEngine) -> None:
        self.url = url
        self._writer = writer
        self._reader = reader
        self._transactions: set[asyncio.Task[Any]] = set()
        self._groups: list[Group[Any, Any]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, url: str, *, read_only: bool = False) -> AsyncGenerator["Store"]:
        """Open ``url`` (``sqlite:///FILE`` or ``postgresql://…``), migrating it unless read-only.

        Raises StoreError when it cannot be opened, or was written by a newer version.
        """
        parsed = _parsed(url)
        try:
            writer, reader = _engines(parsed, read_only=read_only)
        except OSError as error:
            raise StoreError(f"cannot use the database {_shown(parsed)}: {error.strerror}") from error
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            # Not the error's text: it may hold the URL with its password.
            raise StoreError(
                f"cannot use the database {_shown(parsed)}: the driver {parsed.drivername} does not load "
                f"(is it installed? {type(error).__name__})"
            ) from None
        store = cls(parsed, writer, reader)
        try:
            try:
                await (store._check() if read_only else store.migrate())
            except (DBAPIError, OSError) as error:
                raise StoreError(f"cannot use the database {_shown(parsed)}: {_cause(error)}") from error
            yield store
        finally:
            await store.settle()
            await writer.dispose()
            await reader.dispose()

    async def write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Do ``work`` in one transaction: committed when it returns, rolled back when it raises.

        It is finished even if the caller is cancelled: a statement that is broken off would cost the connection,
        and on SQLite leave the database locked for as long as that takes.
        """
        return await self._to_its_end(self._write(work))

    async def read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Do ``work`` on what is committed at one moment; nothing may be written. Finished like ``write``."""
        return await self._to_its_end(self._read(work))

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncGenerator[AsyncConnection]:
        """``write`` as a block, for callers that nobody cancels."""
        async with self._writer.begin() as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncGenerator[AsyncConnection]:
        """``read`` as a block, for callers that nobody cancels."""
        async with self._reader.connect() as connection:
            yield connection

    def grouped(
        self, work: Callable[[AsyncConnection, Sequence[Item]], Awaitable[Sequence[Answer]]]
    ) -> Group[Item, Answer]:
        """Writes that share transactions: for small ones of which many come at once."""
        return self._group(Group(self.writing, work))

    def grouped_reads(
        self, work: Callable[[AsyncConnection, Sequence[Item]], Awaitable[Sequence[Answer]]]
    ) -> Group[Item, Answer]:
        """Reads that share transactions, each begun after it was asked for."""
        return self._group(Group(self.reading, work))

    def _group(self, group: Group[Item, Answer]) -> Group[Item, Answer]:
        self._groups.append(group)
        return group

    async def _write(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        async with self.writing() as connection:
            return await work(connection)

    async def _read(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        async with self.reading() as connection:
            return await work(connection)

    async def _to_its_end(self, transaction: Coroutine[None, None, T]) -> T:
        task = asyncio.create_task(transaction, name="transaction")
        self._transactions.add(task)
        task.add_done_callback(self._transactions.discard)
        # When nobody waits for it any more, its error is nobody's either.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for transactions whose callers were cancelled."""
        for group in self._groups:
            await group.settle()
        await asyncio.gather(*self._transactions, return_exceptions=True)

    async def migrate(self) -> None:
        """Bring the database to ``HEAD``; one process at a time, everybody else waits for it."""
        with _file_lock(self.url):
            async with self._writer.begin() as connection:
                if await connection.run_sync(_version) == HEAD:
                    return
            async with self._writer.connect() as connection:
                if connection.dialect.name == "postgresql":
                    await connection.execute(
                        sa.text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK}
                    )
                await connection.run_sync(_upgrade)
                await connection.commit()
                if connection.dialect.name == "postgresql":
                    await connection.execute(
                        sa.text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK}
                    )
                    await connection.commit()

    async def warm_up(self) -> None:
        """Open the connections and let every hot statement be compiled, on rows that are rolled back."""
        with contextlib.suppress(_RollbackError):
            async with self.writing() as db:
                await warm_up(db)
                raise _RollbackError
        async with self.reading() as db:
            await db.execute(sa.text("SELECT 1"))

    async def _check(self) -> None:
        async with self.reading() as connection:
            version = await connection.run_sync(_version)
        if version != HEAD:
            raise StoreError(
                f"the database {_shown(self.url)} is at version {version or 'none'}, this program needs {HEAD}: "
                "start the service once with this version"
            )


def sqlite_url(path: Path) -> str:
    """The URL of the SQLite database in the file ``path``."""
    return f"sqlite+aiosqlite:///{path.absolute()}"


def _parsed(url: str) -> sa.URL:
    """The URL with the driver that is used for it. Nothing but its scheme is ever shown of a bad one."""
    scheme = re.match(r"([A-Za-z0-9+.-]{1,40}):", url)
    shown = f"a URL of the scheme '{scheme[1]}'" if scheme is not None else "no URL"
    allowed = "sqlite:///FILE or postgresql://USER@HOST/DATABASE"
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise StoreError(
            f"the database is given as {shown} that cannot be read; allowed: {allowed}"
        ) from None
    driver = _DRIVERS.get(parsed.drivername, parsed.drivername)
    if driver not in _DRIVERS.values():
        raise StoreError(f"the database is given as {shown}, which is not served; allowed: {allowed}")
    return parsed.set(drivername=driver)


def _engines(url: sa.URL, *, read_only: bool) -> tuple[AsyncEngine, AsyncEngine]:
    """Writer and reader; one and the same but for SQLite."""
    if url.get_backend_name() == "sqlite":
        return _sqlite(url, read_only=read_only)
    engine = create_async_engine(url, pool_size=5, json_serializer=_dump, json_deserializer=_load)
    return engine, engine.execution_options(isolation_level="REPEATABLE READ")


def _sqlite(url: sa.URL, *, read_only: bool) -> tuple[AsyncEngine, AsyncEngine]:
    if not url.database:
        raise StoreError("an SQLite database needs a file: sqlite+aiosqlite:///FILE")
    if read_only:
        path = Path(url.database)
        if not path.exists():
            raise StoreError(
                f"there is no database {path}: is the data directory right, and did the service ever run?"
            )
        url = url.set(database=f"file:{path}", query={"mode": "ro", "uri": "true"})
    return sqlite.engines(url, read_only=read_only, json_serializer=_dump, json_deserializer=_load)


def _version(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: sa.Connection) -> None:
    # Imported here: alembic costs 11 MiB, and is needed once per new version.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415

    migrations = resources.files("runner_service.store") / "migrations"
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(
            f"the database cannot be brought to version {HEAD}: {error}. Is it from a newer one?"
        ) from error


@contextlib.contextmanager
def _file_lock(url: sa.URL) -> Generator[None]:
    """Serialise migrations of one SQLite file between processes; other databases have their own lock."""
    if url.get_backend_name() != "sqlite" or not url.database:
        yield
        return
    fd = os.open(f"{url.database}.migrate", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _shown(url: sa.URL) -> str:
    return (
        url.database or "" if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
    )


def _cause(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error)


def _dump(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _load(text: str | bytes) -> object:
    return msgspec.json.decode(text)
