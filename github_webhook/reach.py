"""Which accounts and repositories these credentials reach: asked now and then, where settings name no repositories.

An App: the accounts it is installed on, and each installation's repositories. A token: the repositories its user has
been given rights to. Sources: GitHub's documentation, "List installations for the authenticated app", "List
repositories accessible to the app installation", "List repositories for the authenticated user".
"""

from collections.abc import AsyncIterator
from typing import Any, TypeVar

import httpx
import msgspec

from github_webhook.app_auth import AppAuth, Scope, TokenAuth
from github_webhook.rest import Rest

PER_PAGE = 100
MAX_PAGES = 100

T = TypeVar("T")


class Reached(msgspec.Struct, frozen=True):
    """A repository by its name at GitHub."""

    owner: str
    repo: str


class _Account(msgspec.Struct):
    login: str | None = None


class _Installation(msgspec.Struct):
    id: int
    account: _Account | None = None
    suspended_at: str | None = None


class _Repository(msgspec.Struct):
    name: str
    owner: _Account
    archived: bool = False
    disabled: bool = False


class _Repositories(msgspec.Struct):
    repositories: list[_Repository]


_installations = msgspec.json.Decoder(list[_Installation])
_repositories = msgspec.json.Decoder(_Repositories)
_own = msgspec.json.Decoder(list[_Repository])


class Reach:
    """The caller owns ``http``; ``timeout`` is in seconds, for one page. Every call may raise a ForgeError."""

    def __init__(
        self,
        *,
        auth: AppAuth | TokenAuth,
        http: httpx.AsyncClient,
        base_url: str = "https://api.github.com",
        timeout: float = 10.0,
    ) -> None:
        self._auth = auth
        self._rest = Rest(base_url, http, timeout=timeout)
        self._of_token: list[Reached] = []

    async def owners(self) -> list[str]:
        """The accounts with repositories in reach."""
        if isinstance(self._auth, TokenAuth):
            headers = await self._auth.headers(Scope.organization(""))
            self._of_token = [
                found
                async for page in self._pages("/user/repos", headers, "token", _own)
                for found in _living(page)
            ]
            return list(dict.fromkeys(found.owner for found in self._of_token))
        owners: list[str] = []
        async for page in self._pages("/app/installations", self._auth.app_headers(), "app", _installations):
            for one in page:
                if one.suspended_at is None and one.account is not None and one.account.login:
                    owners.append(one.account.login)
                    self._auth.learn(Scope.organization(one.account.login), one.id)
        return owners

    async def repositories(self, owner: str) -> list[Reached]:
        """The repositories of ``owner`` in reach, but archived ones; a token's are those of the last ``owners``."""
        if isinstance(self._auth, TokenAuth):
            return [found for found in self._of_token if found.owner.lower() == owner.lower()]
        scope = Scope.organization(owner)
        headers = await self._auth.headers(scope)
        pages = self._pages("/installation/repositories", headers, self._auth.bucket(scope), _repositories)
        return [found async for page in pages for found in _living(page.repositories)]

    async def _pages(
        self, target: str, headers: Any, bucket: str, decoder: "msgspec.json.Decoder[T]"
    ) -> AsyncIterator[T]:
        for number in range(1, MAX_PAGES + 1):
            asked = {"per_page": str(PER_PAGE), "page": str(number)}
            answer = await self._rest.call("GET", target, headers=headers, bucket=bucket, params=asked)
            page = answer.read(decoder)
            yield page
            if len(page.repositories if isinstance(page, _Repositories) else page) < PER_PAGE:  # pyright: ignore
                break


def _living(page: list[_Repository]) -> list[Reached]:
    """Those whose jobs can run at all."""
    return [
        Reached(one.owner.login, one.name)
        for one in page
        if one.owner.login and not one.archived and not one.disabled
    ]
