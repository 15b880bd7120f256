"""API tokens: made, looked up, revoked. Only their digests are kept; a token is shown once, to whoever made it.

A token is 256 random bits. So its plain SHA-256 is enough to keep: salts and slow hashes protect secrets that can be
guessed, and of these there are more than anybody can try. It also is a key to look up: one indexed read a request.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service import audit
from runner_service.client import TOKEN_FILE
from runner_service.store.rows import as_struct, columns
from runner_service.store.schema import tokens
from runner_service.store.store import Store

Scope = Literal["read", "operate", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "operate", "admin")
"""Each allows what those before it allow. read: look; operate: give orders; admin: tokens and the audit log."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
DAYS = 90.0
"""How long a token lasts when nothing else was asked for."""

MOST_DAYS = 3650
_PREFIX = "microvm_"
_TOKEN = re.compile(rf"{_PREFIX}[A-Za-z0-9_-]{{43}}")
# No token that somebody makes can have such a name: it holds a colon.
_LOCAL = "host:"
# ``used_at`` is for finding tokens that nobody uses: to the hour is enough, and most requests write nothing.
_USED_EVERY = 3600.0


class TokenError(Exception):
    """A token cannot be made or revoked as asked; the message is a sentence."""

    code = "bad_token_order"


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a token, which is not the token. Unix seconds; ``used_at`` to the hour."""

    name: str
    scope: Scope
    created_at: float
    expires_at: float | None = None
    used_at: float | None = None


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """The only answer that ever holds the token itself."""

    name: str
    scope: Scope
    token: str
    expires_at: float | None

    def __repr__(self) -> str:
        return f"NewToken(name={self.name!r}, scope={self.scope!r}, token=<secret>)"


_ROW = columns(tokens, Token)


def make() -> str:
    """A new token: 256 bits, after a prefix by which scanners of leaked secrets know it."""
    return _PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def well_formed(token: str) -> bool:
    return _TOKEN.fullmatch(token) is not None


def allows(scope: Scope, wanted: Scope) -> bool:
    return SCOPES.index(scope) >= SCOPES.index(wanted)


async def create(db: AsyncConnection, *, name: str, scope: Scope, days: float | None, who: str) -> NewToken:
    """Make a token that ends after ``days`` (None: never). Raises TokenError when there is one of that name."""
    if not re.match(NAME, name) or name.endswith("\n"):
        raise TokenError(f"'{name}' is no name for a token: letters, digits and ._@-, at most 64")
    if days is not None and not 0 < days <= MOST_DAYS:
        raise TokenError(f"a token lasts at most {MOST_DAYS} days, and longer than none")
    made = await _insert(db, name, scope, None if days is None else time.time() + days * 86400)
    await audit.record(
        db, who=who, action="token.create", target=name, details={"scope": scope, "days": days}
    )
    return made


async def revoke(db: AsyncConnection, name: str, *, who: str) -> None:
    """End a token at once. Raises TokenError when there is none of that name."""
    if (await db.execute(sa.delete(tokens).where(tokens.c.name == name))).rowcount == 0:
        raise TokenError(f"there is no token '{name}': see microvm tokens list")
    await audit.record(db, who=who, action="token.revoke", target=name)


async def all_of_them(db: AsyncConnection) -> list[Token]:
    """Every token by its name."""
    return [as_struct(row, Token) for row in await db.execute(sa.select(*_ROW).order_by(tokens.c.name))]


async def find(store: Store, token: str, now: float) -> Token | None:
    """The row of this token, also of one that has expired; None when there is none. Notes that it was used."""
    digest = digest_of(token)
    query = sa.select(*_ROW, tokens.c.digest).where(tokens.c.digest == digest)

    async def look(db: AsyncConnection) -> Any:
        return (await db.execute(query)).one_or_none()

    row = await store.read(look)
    # The index compares digests in its own time, which tells nothing of a token; this compares them in constant time.
    if row is None or not hmac.compare_digest(row.digest, digest):
        return None
    found = as_struct(row, Token)
    if found.used_at is None or now - found.used_at > _USED_EVERY:
        used = sa.update(tokens).where(tokens.c.digest == digest).values(used_at=now)
        await store.write(lambda db: db.execute(used))
    return found


async def keep_local(store: Store, data_dir: Path, host: str) -> None:
    """Let the command line of this host in: its token is in the file ``TOKEN_FILE``, for the service's user alone."""
    file = data_dir / TOKEN_FILE
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if await find(store, file.read_text().strip(), time.time()) is not None:
            return
    made = await store.write(lambda db: _replace(db, f"{_LOCAL}{host}"))
    draft = data_dir / f".{TOKEN_FILE}"
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w") as out:
        out.write(made.token + "\n")
    draft.replace(file)


async def drop_local(store: Store, data_dir: Path, host: str) -> None:
    """Where no token is demanded of this host's command line, none lies about."""
    (data_dir / TOKEN_FILE).unlink(missing_ok=True)
    await store.write(lambda db: db.execute(sa.delete(tokens).where(tokens.c.name == f"{_LOCAL}{host}")))


async def _insert(db: AsyncConnection, name: str, scope: Scope, expires_at: float | None) -> NewToken:
    token = make()
    values = {
        "name": name, "scope": scope, "digest": digest_of(token), "created_at": time.time(), "expires_at": expires_at,
    }  # fmt: skip
    try:
        async with db.begin_nested():
            await db.execute(sa.insert(tokens).values(**values))
    except IntegrityError:
        raise TokenError(
            f"there is a token '{name}' already: revoke it first, or take another name"
        ) from None
    return NewToken(name=name, scope=scope, token=token, expires_at=expires_at)


async def _replace(db: AsyncConnection, name: str) -> NewToken:
    await db.execute(sa.delete(tokens).where(tokens.c.name == name))
    return await _insert(db, name, "admin", None)
