"""``/tokens`` and ``/audit``: what the scope admin is for.

GET /tokens   POST /tokens   DELETE /tokens/{name}   GET /audit?limit=
"""

from typing import Annotated, Any

import msgspec
from litestar import Response, delete, get, post
from litestar.exceptions import HTTPException, NotFoundException
from litestar.params import FromPath, JSONBody, QueryParameter

from runner_service import audit, tokens
from runner_service.access import who
from runner_service.problems import WebRequest
from runner_service.store.store import Store
from runner_service.tokens import NewToken, Token, TokenError


class TokenOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The token to make; it lasts ``days``, with 0 for ever."""

    name: Annotated[str, msgspec.Meta(pattern=tokens.NAME, max_length=64)]
    scope: tokens.Scope
    days: Annotated[float, msgspec.Meta(ge=0, le=tokens.MOST_DAYS)] = tokens.DAYS


class ConflictException(HTTPException):
    status_code = 409


def access_routes(store: Store) -> list[Any]:
    """The routes on the tokens and the audit log of ``store``."""

    @get("/tokens", opt={"access": "admin"}, summary="Tokens, without the tokens themselves")
    async def list_tokens() -> list[Token]:
        return await store.read(tokens.all_of_them)

    @post("/tokens", opt={"access": "admin"}, raises=[ConflictException], summary="Make a token")
    async def create_token(data: JSONBody[TokenOrder], request: WebRequest) -> Response[NewToken]:
        by = await who(request)
        try:
            made = await store.write(
                lambda db: tokens.create(db, name=data.name, scope=data.scope, days=data.days or None, who=by)
            )
        except TokenError as error:
            raise ConflictException(str(error)) from None
        return Response(made, headers={"cache-control": "no-store"})

    @delete("/tokens/{name:str}", opt={"access": "admin"}, raises=[NotFoundException], summary="End a token")
    async def revoke_token(name: FromPath[str], request: WebRequest) -> None:
        by = await who(request)
        try:
            await store.write(lambda db: tokens.revoke(db, name, who=by))
        except TokenError as error:
            raise NotFoundException(str(error)) from None

    @get("/audit", opt={"access": "admin"}, summary="What operators did, newest first")
    async def audit_log(
        limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
    ) -> list[audit.AuditRow]:
        return await store.read(lambda db: audit.entries(db, limit=limit))

    return [list_tokens, create_token, revoke_token, audit_log]
