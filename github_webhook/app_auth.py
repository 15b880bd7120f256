"""Credentials for the REST API: a GitHub App (JWT → installation → token) or a personal access token.

An App's key signs a JWT of at most ten minutes; with it an installation's token is fetched, valid for one
hour and used for fifty-five minutes. One fetch at a time per account; everyone else waits for it and shares its
outcome. Each account's fetches have a rate-limit bucket of their own: one's trouble does not delay another's.
Source: GitHub's documentation, "Generating a JSON Web Token (JWT) for a GitHub App" and
"Generating an installation access token for a GitHub App".
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Literal, Protocol

import httpx
import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from github_webhook.errors import Forbidden, ForgeError, NotFound, NotInstalled, Suspended, Unauthorized
from github_webhook.rest import Rest, path

JWT_BACKDATE = 60
JWT_SECONDS = 540
REFRESH_EARLY = 300.0
MAX_REMEMBERED = 4096
CLONE_USER = "x-access-token"


class Scope(msgspec.Struct, frozen=True):
    """Where runners register. ``owner`` is the account, the organization or the enterprise's slug."""

    kind: Literal["repository", "organization", "enterprise"]
    owner: str
    repo: str | None = None

    @classmethod
    def repository(cls, owner: str, repo: str) -> "Scope":
        return cls("repository", owner, repo)

    @classmethod
    def organization(cls, owner: str) -> "Scope":
        return cls("organization", owner)

    @property
    def path(self) -> str:
        """The start of this scope's REST paths. Raises ValueError for a repository without a name."""
        if self.kind == "repository":
            return path("repos", self.owner, self.repo or "")
        return path("orgs" if self.kind == "organization" else "enterprises", self.owner)

    @property
    def account(self) -> str:
        """Who an App is installed on and rate limited for; GitHub compares names without case."""
        return f"{'enterprise' if self.kind == 'enterprise' else 'account'}:{self.owner.lower()}"


class CloneCredential(msgspec.Struct, frozen=True):
    """What ``git`` presents to read one repository over HTTP."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"CloneCredential(username={self.username!r}, password=<secret>)"


class Auth(Protocol):
    """What signs the client's calls."""

    async def headers(self, scope: Scope) -> Mapping[str, str]:
        """The headers for a call in ``scope``; fetches a token if it must. Raises a ForgeError."""
        ...

    async def refused(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        """GitHub answered 401 to ``headers``. True: other ones can be had, ask again."""
        ...

    def bucket(self, scope: Scope) -> str:
        """Which calls share one rate limit."""
        ...

    async def clone_credential(self, owner: str, repo: str) -> CloneCredential:
        """What reads the contents of this repository for the next minutes, and as little else as can be had."""
        ...


class TokenAuth:
    """A personal access token (classic, or fine-grained with administration:write)."""

    def __init__(self, token: str) -> None:
        self._token = token.strip()
        if not self._token or not self._token.isascii() or not self._token.isprintable():
            raise ValueError("the token is empty or holds characters no GitHub token has")

    def __repr__(self) -> str:
        return "TokenAuth(<secret>)"

    async def headers(self, scope: Scope) -> Mapping[str, str]:  # noqa: ARG002 - one token for every scope
        return {"authorization": f"Bearer {self._token}"}

    async def refused(self, scope: Scope, headers: Mapping[str, str]) -> bool:  # noqa: ARG002
        return False

    def bucket(self, scope: Scope) -> str:  # noqa: ARG002
        return "token"

    async def clone_credential(self, owner: str, repo: str) -> CloneCredential:  # noqa: ARG002
        """The token itself: a personal token cannot be narrowed."""
        return CloneCredential(CLONE_USER, self._token)


class _Token(msgspec.Struct, frozen=True):
    value: str
    expires_at: float

    def __repr__(self) -> str:
        return f"_Token(<secret>, expires_at={self.expires_at})"


class _InstallationAnswer(msgspec.Struct):
    id: int
    suspended_at: str | None = None


class _TokenAnswer(msgspec.Struct):
    token: str
    expires_at: datetime


_installation = msgspec.json.Decoder(_InstallationAnswer)
_token = msgspec.json.Decoder(_TokenAnswer)


class AppAuth:
    """A GitHub App. ``client_id`` is the App's client id (``Iv…``) or, on older servers, its numeric id."""

    def __init__(
        self,
        *,
        client_id: str,
        private_key_pem: str | bytes,
        http: httpx.AsyncClient,
        base_url: str = "https://api.github.com",
        timeout: float = 10.0,
    ) -> None:
        self._client_id = client_id
        self._key = _private_key(private_key_pem)
        self._rest = Rest(base_url, http, timeout=timeout)
        self._installations: dict[str, int] = {}
        self._tokens: dict[int, _Token] = {}
        self._clone_tokens: dict[str, _Token] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._fetching: dict[str, asyncio.Task[_Token]] = {}

    def __repr__(self) -> str:
        return f"AppAuth(client_id={self._client_id!r}, <secret key>)"

    def app_headers(self) -> Mapping[str, str]:
        """Headers that speak for the App itself, good for nine minutes."""
        now = int(time.time())
        # Issued in the past, because GitHub refuses a token "from the future" when clocks differ a little.
        claims = {"iat": now - JWT_BACKDATE, "exp": now + JWT_SECONDS, "iss": self._client_id}
        return {"authorization": f"Bearer {jwt.encode(claims, self._key, algorithm='RS256')}"}

    @property
    def client_id(self) -> str:
        return self._client_id

    def knows(self, installation_id: int) -> bool:
        """Whether an account's installation has this number, as far as it was looked up or learnt."""
        return installation_id in self._installations.values()

    def learn(self, scope: Scope, installation_id: int) -> None:
        """A verified event named the installation of this scope: saves looking it up."""
        self._remember(scope.account, installation_id)

    def forget(self, installation_id: int) -> None:
        """The installation was removed or suspended."""
        self._tokens.pop(installation_id, None)
        self._clone_tokens.clear()
        for account in [a for a, known in self._installations.items() if known == installation_id]:
            del self._installations[account]

    async def headers(self, scope: Scope) -> Mapping[str, str]:
        token = self._usable(scope)
        if token is None:
            # Whoever waits gives up at his own time-out; the fetch ends at those of its calls.
            token = await asyncio.shield(self._fetching.get(scope.account) or self._start_fetch(scope))
        return {"authorization": f"Bearer {token.value}"}

    def _start_fetch(self, scope: Scope) -> asyncio.Task[_Token]:
        account = scope.account
        task = self._fetching[account] = asyncio.create_task(self._fetch(scope), name=f"token-{account}")

        def over(done: asyncio.Task[_Token]) -> None:
            self._fetching.pop(account, None)
            # When nobody waits for it any more, its error is nobody's either.
            _ = done.cancelled() or done.exception()

        task.add_done_callback(over)
        return task

    async def refused(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        """Forget the refused token, unless somebody else has replaced it already."""
        known = self._installations.get(scope.account)
        current = self._tokens.get(known) if known is not None else None
        if known is not None and current and headers.get("authorization") == f"Bearer {current.value}":
            del self._tokens[known]
        return True

    def bucket(self, scope: Scope) -> str:
        return scope.account

    async def clone_credential(self, owner: str, repo: str) -> CloneCredential:
        """A token of the installation that reads the contents of this one repository, for an hour at most.

        Raises a ForgeError; Unprocessable when the installation has no such repository, or no right to its contents.
        """
        scope = Scope.repository(owner, repo)
        name = f"{owner}/{repo}".lower()
        async with self._lock(name):
            token = self._clone_tokens.get(name)
            if token is None or token.expires_at - REFRESH_EARLY <= time.time():
                if len(self._clone_tokens) >= MAX_REMEMBERED:
                    self._clone_tokens.clear()
                narrow = {"repositories": [repo], "permissions": {"contents": "read"}}
                token = self._clone_tokens[name] = await self._with_installation(
                    scope, lambda number: self._new_token(scope, number, narrow)
                )
        return CloneCredential(CLONE_USER, token.value)

    def _usable(self, scope: Scope) -> _Token | None:
        known = self._installations.get(scope.account)
        token = self._tokens.get(known) if known is not None else None
        if token is None or token.expires_at - REFRESH_EARLY <= time.time():
            return None
        return token

    async def _fetch(self, scope: Scope) -> _Token:
        async def kept(installation_id: int) -> _Token:
            token = self._tokens[installation_id] = await self._new_token(scope, installation_id)
            return token

        return await self._with_installation(scope, kept)

    async def _with_installation(self, scope: Scope, ask: Callable[[int], Awaitable[_Token]]) -> _Token:
        """``ask`` with the installation of the scope's account; looked up when its number is not known, or stale."""
        remembered = self._installations.get(scope.account)
        if remembered is not None:
            try:
                return await ask(remembered)
            except NotFound:
                # Removed and installed again: the number is another one now.
                self.forget(remembered)
        installation_id = await self._look_up(scope)
        self._remember(scope.account, installation_id)
        return await ask(installation_id)

    async def _look_up(self, scope: Scope) -> int:
        try:
            answer = await self._rest.call(
                "GET",
                f"{scope.path}/installation",
                headers=self.app_headers(),
                bucket=f"app of {scope.account}",
            )
        except NotFound as error:
            where = f"{scope.owner}/{scope.repo}" if scope.repo else scope.owner
            raise NotInstalled(
                f"the App {self._client_id} is not installed on {where}: install it there",
                status=error.status,
                request_id=error.request_id,
            ) from None
        except Unauthorized as error:
            raise self._wrong_key(error) from None
        found = answer.read(_installation)
        if found.suspended_at is not None:
            raise self._suspended(scope.owner, None)
        return found.id

    async def _new_token(self, scope: Scope, installation_id: int, narrow: object = None) -> _Token:
        """A token of the installation; ``narrow`` is the body that takes repositories and permissions away from it."""
        try:
            answer = await self._rest.call(
                "POST",
                path("app", "installations", installation_id, "access_tokens"),
                headers=self.app_headers(),
                bucket=f"app of {scope.account}",
                body=narrow,
            )
        except Unauthorized as error:
            raise self._wrong_key(error) from None
        except Forbidden as error:
            # GitHub: 403 "This installation has been suspended".
            raise (
                self._suspended(scope.owner, error) if "suspend" in str(error).lower() else error
            ) from None
        fetched = answer.read(_token)
        return _Token(fetched.token, fetched.expires_at.timestamp())

    def _suspended(self, owner: str, error: ForgeError | None) -> Suspended:
        return Suspended(
            f"the installation of the App {self._client_id} on {owner} is suspended: an owner of {owner} can lift that",
            status=error.status if error is not None else None,
            request_id=error.request_id if error is not None else None,
        )

    def _wrong_key(self, error: ForgeError) -> Unauthorized:
        return Unauthorized(
            f"GitHub does not accept the App's key ({error}); "
            f"check client_id {self._client_id!r}, the private key and this host's clock",
            status=error.status,
            request_id=error.request_id,
        )

    def _remember(self, account: str, installation_id: int) -> None:
        if len(self._installations) >= MAX_REMEMBERED and account not in self._installations:
            self.forget(self._installations[next(iter(self._installations))])
        self._installations[account] = installation_id

    def _lock(self, account: str) -> asyncio.Lock:
        if len(self._locks) >= MAX_REMEMBERED:
            self._locks = {key: lock for key, lock in self._locks.items() if lock.locked()}
        return self._locks.setdefault(account, asyncio.Lock())


def _private_key(pem: str | bytes) -> RSAPrivateKey:
    try:
        key = load_pem_private_key(pem.encode() if isinstance(pem, str) else pem, password=None)
    except (ValueError, TypeError):
        # The library's message may quote what it read.
        raise ValueError("the App's private key is not an unencrypted PEM private key") from None
    if not isinstance(key, RSAPrivateKey):
        raise ValueError("the App's private key is not an RSA key")
    return key
