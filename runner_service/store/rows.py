"""Rows and structs: what every module of named queries needs to put one into the other, on SQLite and PostgreSQL."""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T", bound=msgspec.Struct)
_CHUNK = 500


def columns(table: sa.Table, kind: type[msgspec.Struct]) -> tuple[sa.Column[Any], ...]:
    """The columns of ``table`` that ``kind`` holds, in the order of its fields: what ``as_struct`` expects."""
    return tuple(table.c[name] for name in kind.__struct_fields__ if name in table.c)


def insert_into(db: AsyncConnection | str, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """The INSERT with ON CONFLICT of a connection's dialect (or of that name), which both databases spell alike."""
    name = db if isinstance(db, str) else db.dialect.name
    return postgresql.insert(table) if name == "postgresql" else sqlite.insert(table)


def as_struct(row: Any, kind: type[T]) -> T:
    return msgspec.convert(dict(zip(kind.__struct_fields__, row, strict=False)), kind, strict=False)


def chunks(values: Sequence[str]) -> list[Sequence[str]]:
    return [values[i : i + _CHUNK] for i in range(0, len(values), _CHUNK)]
