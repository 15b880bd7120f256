"""Checks HTTP exchanges against an OpenAPI 3.0 document: the request we sent and the answer we got.

A schema of OpenAPI 3.0 is JSON schema draft 4 with ``nullable``, so it is rewritten and given to jsonschema.
Stricter than the document where that finds mistakes: body fields and query parameters nobody documented are
errors too.
"""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import unquote

import httpx
from jsonschema import Draft4Validator, FormatChecker

UNDOCUMENTED = frozenset({401, 403, 404, 429, 500, 502, 503})
"""What any operation may answer, whether its document says so or not; checked against ``basic-error``."""

_formats = FormatChecker(formats=())


@_formats.checks("date-time", raises=ValueError)
def _date_time(value: object) -> bool:
    return not isinstance(value, str) or ("T" in value and bool(datetime.fromisoformat(value)))


class OpenApi:
    """One document. Each ``check_`` method returns sentences that say what is wrong; none means right."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._root = _rewritten(document)
        # Its schemas refer to each other by paths from the root, so validators are made out of this one.
        self._validator = Draft4Validator(self._root, format_checker=_formats)
        self._operations = [
            (method, re.compile(re.sub(r"\{[^}]+\}", "([^/]+)", path)), path)
            for path, item in self._root["paths"].items()
            for method in item
        ]

    def check_exchange(
        self, request: httpx.Request, status: int, headers: httpx.Headers, body: bytes
    ) -> list[str]:
        """Everything wrong with a request and its answer."""
        wrong = self.check_request(request)
        found = self._operation(request.method, request.url.path)
        if found is not None:
            operation, path, _ = found
            answered = self._response(operation, status, headers, body)
            wrong += [f"{request.method} {path}: {problem}" for problem in answered]
        return wrong

    def check_request(self, request: httpx.Request) -> list[str]:
        """Everything wrong with a request."""
        found = self._operation(request.method, request.url.path)
        if found is None:
            return [f"{request.method} {request.url.path} is not an operation of the document"]
        operation, path, values = found
        wrong = [
            *self._parameters(operation, path, values, request),
            *self._request_body(operation, request),
        ]
        return [f"{request.method} {path}: {problem}" for problem in wrong]

    def _operation(self, method: str, path: str) -> tuple[dict[str, Any], str, list[str]] | None:
        for known, pattern, template in self._operations:
            if known == method.lower() and (match := pattern.fullmatch(path)):
                return self._root["paths"][template][known], template, [unquote(v) for v in match.groups()]
        return None

    def _parameters(
        self, operation: dict[str, Any], path: str, values: list[str], request: httpx.Request
    ) -> Iterator[str]:
        names = re.findall(r"\{([^}]+)\}", path)
        given = {("path", name): value for name, value in zip(names, values, strict=True)}
        given |= {("query", name): value for name, value in request.url.params.multi_items()}
        documented = {}
        for parameter in map(self._followed, operation.get("parameters", [])):
            documented[parameter["in"], parameter["name"]] = parameter
        for key, parameter in documented.items():
            if parameter.get("required") and key not in given:
                yield f"the {key[0]} parameter {key[1]} is missing"
        for key, value in given.items():
            if key not in documented:
                yield f"the {key[0]} parameter {key[1]} is not documented"
                continue
            schema = documented[key]["schema"]
            yield from self._errors(
                schema, _typed(value, self._followed(schema)), f"{key[0]} parameter {key[1]}"
            )

    def _request_body(self, operation: dict[str, Any], request: httpx.Request) -> Iterator[str]:
        documented = self._followed(operation.get("requestBody", {}))
        if not request.content:
            if documented.get("required"):
                yield "the request has no body"
            return
        if not documented:
            yield "the request has a body, and none is documented"
            return
        schema = documented["content"]["application/json"]["schema"]
        body = json.loads(request.content)
        yield from self._errors(schema, body, "request")
        known = self._followed(schema).get("properties")
        if known is not None and isinstance(body, dict):
            yield from (f"the request's field {key} is not documented" for key in body if key not in known)

    def _response(
        self, operation: dict[str, Any], status: int, headers: httpx.Headers, body: bytes
    ) -> Iterator[str]:
        if status == 304:
            # Any GET with an ETag may be answered so, whether its document says so or not: without a body.
            if body:
                yield "304 must have no body"
            return
        responses = operation["responses"]
        documented = responses.get(str(status))
        if documented is None:
            if status not in UNDOCUMENTED:
                yield f"the status {status} is not documented ({', '.join(responses)})"
                return
            schema: dict[str, Any] = {"$ref": "#/components/schemas/basic-error"}
        else:
            content = self._followed(documented).get("content")
            if content is None:
                if body:
                    yield f"{status} must have no body"
                return
            schema = next(iter(content.values()))["schema"]
        if "json" not in headers.get("content-type", ""):
            yield f"{status}: the content type is {headers.get('content-type')}"
            return
        try:
            document = json.loads(body)
        except ValueError:
            yield f"{status}: the body is not JSON"
            return
        yield from self._errors(schema, document, str(status))

    def _errors(self, schema: dict[str, Any], value: object, where: str) -> Iterator[str]:
        for error in self._validator.evolve(schema=schema).iter_errors(value):
            yield f"{where}: {error.json_path}: {error.message[:300]}"

    def _followed(self, item: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in item:
            _, _, kind, name = item["$ref"].split("/")
            item = self._root["components"][kind][name]
        return item


def _rewritten(item: Any) -> Any:
    """``nullable`` in the words of draft 4."""
    if isinstance(item, list):
        return [_rewritten(entry) for entry in item]
    if not isinstance(item, dict):
        return item
    schema = {key: _rewritten(value) for key, value in item.items()}
    if schema.pop("nullable", False) is not True:
        return schema
    return {"anyOf": [schema, {"type": "null"}]}


def _typed(value: str, schema: dict[str, Any]) -> object:
    """A parameter's text as the type its schema asks for."""
    if schema.get("type") == "integer" and value.lstrip("-").isdecimal():
        return int(value)
    if schema.get("type") == "boolean" and value in ("true", "false"):
        return value == "true"
    return value


class CheckedTransport(httpx.AsyncBaseTransport):
    """Passes calls on and checks each exchange; ``problems`` is what was found in those ``checked``."""

    def __init__(self, inner: httpx.AsyncBaseTransport, *documents: OpenApi, prefix: str = "") -> None:
        self._inner = inner
        self._documents = documents
        self._prefix = prefix
        self.problems: list[str] = []
        self.checked: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        response = await self._inner.handle_async_request(request)
        body = await response.aread()
        await response.aclose()
        path = request.url.path.removeprefix(self._prefix)
        plain = httpx.Request(request.method, request.url.copy_with(path=path), content=request.content)
        # Right for one document is right: each holds another part of GitHub.
        problems = [
            found.check_exchange(plain, response.status_code, response.headers, body)
            for found in self._documents
        ]
        self.problems += min(problems, key=lambda wrong: (bool(wrong), "not an operation" in str(wrong)))
        self.checked.append(f"{request.method} {path} {response.status_code}")
        headers = [(k, v) for k, v in response.headers.multi_items() if k.lower() != "transfer-encoding"]
        return httpx.Response(response.status_code, headers=headers, content=body, request=request)

    async def aclose(self) -> None:
        await self._inner.aclose()
