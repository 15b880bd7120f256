"""Errors of the API: problem documents (RFC 9457), and how the OpenAPI document tells of them."""

from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.openapi.plugins import JsonRenderPlugin
from sqlalchemy.exc import DataError

from github_webhook.receiver import problem
from vmm_core.errors import UnknownVm, VmmError

log = structlog.get_logger("api")
WebRequest = Request[Any, Any, State]

_MEDIA = "application/problem+json"
# What any route may answer, and why. A route's own description of a status stands where it gives one.
_ANY = {
    "400": "A parameter or the body is wrong; the detail says which and how.",
    "401": "A token is needed, or the one sent is not (or no longer) known.",
    "403": "The token's scope does not allow this.",
    "429": "Too many bad tokens came from this address; Retry-After says when to try again.",
    "500": "A fault of the service: see its log.",
}
_OPEN = frozenset({"400", "500"})
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "A problem document (RFC 9457); the last part of its type is a stable code.",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "pattern": "^urn:microvm:problem:"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string"},
    },
}


def http_problem(_: WebRequest, error: HTTPException) -> Response[bytes]:
    detail = error.detail
    if isinstance(error.extra, list) and error.extra:
        # Which parameter, and what is wrong with it.
        detail = "; ".join(f"{one.get('key', '')}: {one.get('message', '')}" for one in error.extra)[:500]
    code = type(error).__name__.removesuffix("Exception")
    answer = problem(error.status_code, code.lower() or "http", code or "HTTP error", detail)
    answer.headers.update(error.headers or {})
    return answer


def data_problem(_: WebRequest, error: DataError) -> Response[bytes]:
    """PostgreSQL holds no NUL in a text, and no number beyond its kind: nothing of that name can be there."""
    del error  # its text holds the statement
    return problem(
        400, "unusable_value", "Unusable value", "a parameter holds what no name or number here can"
    )


def vmm_problem(_: WebRequest, error: VmmError) -> Response[bytes]:
    status = 404 if isinstance(error, UnknownVm) else 500
    return problem(status, error.code, type(error).__name__, str(error))


def unexpected(request: WebRequest, error: Exception) -> Response[bytes]:
    log.exception("request_failed", path=request.url.path[:200], error=type(error).__name__)
    return problem(500, "internal_error", "Internal error", "see the log of the service")


class Document(JsonRenderPlugin):
    """The OpenAPI document, with the problems that every route may answer, which Litestar knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self._rendered: bytes | None = None

    def render(self, request: WebRequest, openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        if self._rendered is None:
            self._rendered = msgspec.json.encode(with_problems(openapi_schema))
        return self._rendered


def with_problems(document: dict[str, Any]) -> dict[str, Any]:
    """``document`` where every error is a problem document, and every route says the errors that all share."""
    copy: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    copy.setdefault("components", {}).setdefault("schemas", {})["Problem"] = _SCHEMA
    for item in copy["paths"].values():
        for operation in item.values():
            _add_problems(operation)
            for media in operation.get("requestBody", {}).get("content", {}).values():
                # Every body here is a struct that takes no other fields, which Litestar does not tell.
                name = media["schema"].get("$ref", "").rpartition("/")[2]
                copy["components"]["schemas"].get(name, {})["additionalProperties"] = False
    return copy


def _add_problems(operation: dict[str, Any]) -> None:
    responses: dict[str, Any] = operation["responses"]
    open_to_all = {} in operation.get("security", ())
    if open_to_all:
        operation["security"] = []
    for status, why in _ANY.items():
        if not open_to_all or status in _OPEN:
            responses.setdefault(status, {"description": why})
    content = {_MEDIA: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for status, response in responses.items():
        if status >= "400" and not _says_more(response):
            response["content"] = content
            if status in _ANY:
                response["description"] = _ANY[status]


def _says_more(response: dict[str, Any]) -> bool:
    """An answer of the route's own, such as what is not ready: not the error document that Litestar assumes."""
    schemas = [media.get("schema", {}) for media in response.get("content", {}).values()]
    return any("$ref" in schema for schema in schemas)
