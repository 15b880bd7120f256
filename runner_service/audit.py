"""The audit log: one row for every action of an operator. Rows are added; nothing changes or forgets them.

    await audit.record(db, who=…, action="vm.kill", target=vm_id)

``action`` is ``noun.verb``: vm.kill, host.drain, token.create, token.revoke, frozen.shell, frozen.remove,
template.promote, template.prune, settings.reload … What a service does by itself belongs to the timeline.
"""

import os
import pwd
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from runner_service.store.rows import as_struct, columns
from runner_service.store.schema import audit

DONE = "done"
_MOST = 500


class AuditRow(msgspec.Struct, frozen=True, kw_only=True):
    """What ``who`` (a token's name, or ``local uid N``) did to ``target``, when (Unix seconds), and what came of it.

    ``outcome`` is ``done``, or the sentence that says why it was not.
    """

    seq: int
    at: float
    who: str
    action: str
    target: str
    outcome: str
    details: dict[str, Any]


_ROW = columns(audit, AuditRow)


async def record(
    db: AsyncConnection,
    *,
    who: str,
    action: str,
    target: str = "",
    details: Mapping[str, Any] | None = None,
    outcome: str = DONE,
    at: float | None = None,
) -> None:
    """Write one action down, in the transaction of the action where it has one. Never pass a secret."""
    values = {
        "at": time.time() if at is None else at, "who": who[:_MOST], "action": action, "target": target[:_MOST],
        "outcome": outcome[:_MOST], "details": dict(details or {}),
    }  # fmt: skip
    await db.execute(sa.insert(audit).values(**values))


async def entries(db: AsyncConnection, *, limit: int) -> list[AuditRow]:
    """The newest actions, newest first."""
    query = sa.select(*_ROW).order_by(audit.c.seq.desc()).limit(limit)
    return [as_struct(row, AuditRow) for row in await db.execute(query)]


def local(uid: int | None = None) -> str:
    """How a user of this host is named: for a command that works on the host itself, whoever runs it."""
    number = os.getuid() if uid is None else uid
    try:
        return f"local uid {number} ({pwd.getpwuid(number).pw_name})"
    except KeyError:
        return f"local uid {number}"
