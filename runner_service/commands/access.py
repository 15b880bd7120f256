"""``microvm tokens | audit``: on the database of this host, whether a service runs or not; or on one elsewhere."""

import contextlib
import sys
import time
from collections.abc import AsyncGenerator, Coroutine
from datetime import datetime
from typing import Any, TypeVar, cast

import msgspec

from runner_service import audit, client, tokens
from runner_service.commands import show
from runner_service.daemon import database_url
from runner_service.settings import Settings
from runner_service.store.store import Store, StoreError
from runner_service.tokens import NewToken, Scope, Token

T = TypeVar("T")


async def create(
    settings: Settings, api: str | None, name: str, scope: str, days: float | None, *, as_json: bool
) -> int:
    """Print the token alone to stdout, so that it can go into a file."""
    wanted = cast("Scope", scope)
    if api is not None:
        order = {"name": name, "scope": scope, "days": days or 0}
        made = await _ask(settings, api, "POST", "/tokens", NewToken, json=order)
    else:
        async with _database(settings) as store:
            made = await store.write(
                lambda db: tokens.create(db, name=name, scope=wanted, days=days, who=audit.local())
            )
    if as_json:
        show.print_json(made)
        return 0
    sys.stdout.write(made.token + "\n")
    until = "for ever" if made.expires_at is None else f"until {_day(made.expires_at)}"
    sys.stderr.write(f"'{name}' may {scope}, {until}. It is not shown again.\n")
    return 0


async def listing(settings: Settings, api: str | None, *, as_json: bool) -> int:
    if api is not None:
        found = await _ask(settings, api, "GET", "/tokens", list[Token])
    else:
        async with _database(settings, read_only=True) as store:
            found = await store.read(tokens.all_of_them)
    if as_json:
        show.print_json(found)
        return 0
    now = time.time()
    rows = [
        (token.name, token.scope, show.ago(token.created_at),
         "never" if token.expires_at is None else "expired" if token.expires_at <= now else _day(token.expires_at),
         "never" if token.used_at is None else show.ago(token.used_at))
        for token in found
    ]  # fmt: skip
    show.table(("NAME", "SCOPE", "AGE", "EXPIRES", "USED"), rows, empty="there is no token", right=("AGE",))
    return 0


async def revoke(settings: Settings, api: str | None, name: str) -> int:
    if api is not None:
        await _ask(settings, api, "DELETE", f"/tokens/{client.quoted(name)}", None)
    else:
        async with _database(settings) as store:
            await store.write(lambda db: tokens.revoke(db, name, who=audit.local()))
    sys.stdout.write(f"'{name}' is revoked\n")
    return 0


async def audit_log(settings: Settings, api: str | None, limit: int, *, as_json: bool) -> int:
    if api is not None:
        rows = await _ask(settings, api, "GET", "/audit", list[audit.AuditRow], params={"limit": limit})
    else:
        async with _database(settings, read_only=True) as store:
            rows = await store.read(lambda db: audit.entries(db, limit=limit))
    if as_json:
        show.print_json(rows)
        return 0
    table = [
        (datetime.fromtimestamp(row.at).strftime("%Y-%m-%d %H:%M:%S"), row.who, row.action, row.target, row.outcome,
         " ".join(f"{key}={value}" for key, value in row.details.items()))
        for row in rows
    ]  # fmt: skip
    show.table(
        ("AT", "WHO", "ACTION", "TARGET", "OUTCOME", "DETAILS"), table, empty="no operator did anything"
    )
    return 0


async def noted(
    settings: Settings, work: Coroutine[Any, Any, int], action: str, target: str, **details: Any
) -> int:
    """Do what a command does on this host by itself, and write it down with what came of it."""
    outcome = audit.DONE
    try:
        return await work
    except Exception as error:
        outcome = str(error)
        raise
    finally:
        if settings.data_dir.is_dir():  # else nothing can have been done
            try:
                await note(settings, action, target, outcome=outcome, **details)
            except StoreError as error:
                sys.stderr.write(f"microvm: the audit log does not tell of this: {error}\n")


async def note(
    settings: Settings, action: str, target: str = "", *, outcome: str = audit.DONE, **details: Any
) -> None:
    """Write down what a command is about to do, or did. Raises StoreError when that cannot be."""
    async with _database(settings) as store:
        await store.write(
            lambda db: audit.record(
                db, who=audit.local(), action=action, target=target, details=details, outcome=outcome
            )
        )


@contextlib.asynccontextmanager
async def _database(settings: Settings, *, read_only: bool = False) -> AsyncGenerator[Store]:
    async with Store.open(database_url(settings), read_only=read_only) as store:
        yield store


async def _ask(settings: Settings, api: str, method: str, path: str, kind: type[T] | None, **how: Any) -> T:
    content = client.content_of(await client.send(settings, api, method, path, address=api, **how))
    return cast("T", None) if kind is None else msgspec.json.decode(content, type=kind)


def _day(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
