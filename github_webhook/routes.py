"""Several Apps or tokens of one GitHub side by side: each call goes out with the credentials of its owner.

Which credentials are whose is said by patterns of repositories; no two overlap (the settings see to that).
"""

from collections.abc import Mapping, Sequence

import msgspec

from github_webhook.app_auth import AppAuth, Auth, CloneCredential, Scope
from github_webhook.errors import NotInstalled
from github_webhook.events import InstallationEvent
from github_webhook.patterns import fits, owner_fits


class Route(msgspec.Struct, frozen=True):
    """Credentials and whose they are. No patterns: everybody's. ``organizations``: they register there."""

    name: str
    auth: Auth
    patterns: tuple[str, ...] = ()
    organizations: bool = False


class Routes:
    """The ``Auth`` of a client that serves several owners."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = tuple(routes)

    @property
    def all(self) -> tuple[Route, ...]:
        """Everyone's, in the order of the settings."""
        return self._routes

    def reassign(self, served: Mapping[str, tuple[tuple[str, ...], bool]]) -> None:
        """By name: whose repositories known credentials are for from now on, and whether they register there."""
        self._routes = tuple(
            msgspec.structs.replace(
                route, patterns=served[route.name][0], organizations=served[route.name][1]
            )
            if route.name in served
            else route
            for route in self._routes
        )

    def route(self, scope: Scope) -> Route | None:
        """Whose credentials a call in this scope needs; None when nobody's are set."""
        found = [route for route in self._routes if _serves(route, scope)]
        if scope.repo is None:
            # An owner as such: of the Apps that serve something of it, the one that registers there.
            found.sort(key=lambda route: not route.organizations)
        return found[0] if found else None

    async def headers(self, scope: Scope) -> Mapping[str, str]:
        return await self._auth(scope).headers(scope)

    async def refused(self, scope: Scope, headers: Mapping[str, str]) -> bool:
        return await self._auth(scope).refused(scope, headers)

    def bucket(self, scope: Scope) -> str:
        """The credentials' name and their own bucket: two Apps on one account have limits of their own."""
        route = self.route(scope)
        return f"{route.name}/{route.auth.bucket(scope)}" if route is not None else "nobody"

    async def clone_credential(self, owner: str, repo: str) -> CloneCredential:
        return await self._auth(Scope.repository(owner, repo)).clone_credential(owner, repo)

    def learn(self, scope: Scope, installation_id: int) -> None:
        """A verified event named the installation of this scope."""
        route = self.route(scope)
        if route is not None and isinstance(route.auth, AppAuth):
            route.auth.learn(scope, installation_id)

    def forget(self, event: InstallationEvent) -> None:
        """The installation was removed or suspended: its tokens are worth nothing any more."""
        for route in self._routes:
            if isinstance(route.auth, AppAuth):
                route.auth.forget(event.installation_id)

    def buckets(self, event: InstallationEvent) -> list[str]:
        """What an event about an installation is about: of the App that it names, else of those on that account."""
        account = Scope.organization(event.account)
        apps = [(route, route.auth) for route in self._routes if isinstance(route.auth, AppAuth)]
        named = {word for word in (event.client_id, str(event.app_id or "")) if word}
        chosen = [route for route, auth in apps if auth.client_id in named]
        chosen = chosen or [route for route, auth in apps if auth.knows(event.installation_id)]
        chosen = chosen or [
            route for route, _ in apps if not route.patterns or owner_fits(event.account, route.patterns)
        ]
        return [f"{route.name}/{route.auth.bucket(account)}" for route in chosen]

    def _auth(self, scope: Scope) -> Auth:
        route = self.route(scope)
        if route is None:
            where = f"{scope.owner}/{scope.repo}" if scope.repo else scope.owner
            raise NotInstalled(f"no credentials are set for {where}: add it to the repositories of an App")
        return route.auth


def _serves(route: Route, scope: Scope) -> bool:
    if not route.patterns:
        return True
    if scope.repo is not None:
        return fits(f"{scope.owner}/{scope.repo}", route.patterns)
    return owner_fits(scope.owner, route.patterns)
