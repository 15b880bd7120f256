"""Every call of our client to the stand-in GitHub, held against GitHub's OpenAPI documents: the call, and the answer.

Ours are the calls that name a version of the REST API; a test that asks by hand may ask for what does not exist. The
stand-in collects what is wrong and fails at its end, whichever test it stands in for. Without the documents (nobody
fetched them to this host) nothing is checked; ``enforce`` is for test runs, benches measure something else.
"""

from functools import cache

import httpx

from tests.standins.github_http import Request, Response
from tests.standins.github_official import openapi_if_kept
from tests.standins.openapi import OpenApi

_OURS = "x-github-api-version"
_MOST = 20
# Where a repository of another name is: a redirect, which the documents tell of for some operations only.
_MOVED = (301, 307)
_enforced = False


def enforce() -> None:
    """Check from now on: called by the suite's conftest."""
    global _enforced  # noqa: PLW0603
    _enforced = True


class WrongCallsError(AssertionError):
    """Our client and GitHub's documents differ."""


class Checks:
    """What was checked, and what was wrong in it."""

    def __init__(self) -> None:
        self.calls = 0
        self.problems: list[str] = []

    def request(self, request: Request, path: str) -> None:
        """A call whose answer says nothing: a fault was injected, or it is a redirect."""
        self._add([found.check_request(_plain(request, path)) for found in self._documents(request)])

    def exchange(self, request: Request, path: str, response: Response) -> None:
        if response.status in _MOVED or not isinstance(response.body, bytes):
            self.request(request, path)
            return
        headers, body = httpx.Headers(response.headers), response.body
        self._add(
            [
                found.check_exchange(_plain(request, path), response.status, headers, body)
                for found in self._documents(request)
            ]
        )

    def fail_if_wrong(self) -> None:
        """Raises WrongCallsError that lists the problems."""
        if self.problems:
            raise WrongCallsError("calls that GitHub's documents do not allow:\n" + "\n".join(self.problems))

    def _documents(self, request: Request) -> tuple[OpenApi, ...]:
        return _kept() if _enforced and _OURS in request.headers else ()

    def _add(self, problems: list[list[str]]) -> None:
        if not problems:
            return
        self.calls += 1
        # Right for one document is right: each holds another part of GitHub.
        self.problems += min(problems, key=lambda wrong: (bool(wrong), "not an operation" in str(wrong)))
        del self.problems[_MOST:]


@cache
def _kept() -> tuple[OpenApi, ...]:
    return tuple(
        OpenApi(document)
        for name in ("api.github.com", "ghec")
        if (document := openapi_if_kept(name)) is not None
    )


def _plain(request: Request, path: str) -> httpx.Request:
    url = httpx.URL("http://github.invalid", path=path, params=request.query)
    return httpx.Request(request.method, url, content=request.body)
