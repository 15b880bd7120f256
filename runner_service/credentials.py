"""From the settings to credentials: who speaks to the forge for which owners, and who may sign its deliveries."""

import time
from collections.abc import Callable, Sequence

import httpx
import structlog

from github_webhook.app_auth import AppAuth, TokenAuth
from github_webhook.app_auth import Scope as GitHubScope
from github_webhook.deliveries import Deliveries
from github_webhook.reach import Reach
from github_webhook.rest import api_base_url
from github_webhook.routes import Route, Routes
from runner_service.domain import Scope
from runner_service.github_listings import Reached, needs_reach
from runner_service.settings import GitHubApp, GitHubSettings, SettingsError, read_secret, webhook_secrets

log = structlog.get_logger("credentials")
_SECONDS = 5.0


def routes(settings: GitHubSettings, http: httpx.AsyncClient) -> Routes:
    """The credentials of every App and token. Raises SettingsError; no message holds a secret."""
    return Routes(
        [
            Route(
                app.name,
                _auth(app, settings, http),
                app.repositories,
                organizations=app.register_at == "organization",
            )
            for app in settings.credentials
        ]
    )


def reached(settings: GitHubSettings, known: Routes, http: httpx.AsyncClient) -> list[Reached]:
    """Those credentials that have to be asked which repositories they reach."""
    found: list[Reached] = []
    for route in known.all:
        if isinstance(route.auth, AppAuth | TokenAuth) and needs_reach(route.patterns):
            base_url = api_base_url(settings.base_url)
            reach = Reach(auth=route.auth, http=http, base_url=base_url, timeout=settings.timeout_s)
            found.append(Reached(route.name, reach, route.patterns))
    return found


def deliveries(settings: GitHubSettings, known: Routes, http: httpx.AsyncClient) -> dict[str, Deliveries]:
    """The deliveries of each App; tokens have none."""
    base_url = api_base_url(settings.base_url)
    return {
        route.name: Deliveries(auth=route.auth, http=http, base_url=base_url, timeout=settings.timeout_s)
        for route in known.all
        if isinstance(route.auth, AppAuth)
    }


def runner_groups(settings: GitHubSettings, known: Routes) -> Callable[[Scope], int]:
    """The runner group of each scope: that of the App which serves it."""
    groups = {app.name: app.runner_group_id or 1 for app in settings.credentials}

    def group(scope: Scope) -> int:
        owner, _, repo = scope.path.partition("/")
        route = known.route(GitHubScope(scope.kind, owner, repo or None))
        return groups.get(route.name, 1) if route is not None else 1

    return group


def secret_variables(settings: GitHubSettings) -> tuple[str, ...]:
    """The names of environment variables that hold secrets: children do not get them."""
    named = [settings.webhook_secret_env]
    for app in settings.credentials:
        named += [app.token_env, app.private_key_env, app.webhook_secret_env]
    return tuple(dict.fromkeys(name for name in named if name))


class WebhookSecrets:
    """The webhook secrets of every App, read again at most every five seconds: rotating one needs no restart."""

    def __init__(self, settings: GitHubSettings) -> None:
        self._settings = settings
        self._read_at = time.monotonic()
        self._secrets = webhook_secrets(settings)
        if not self._secrets:
            raise SettingsError(
                "[github]: no webhook secret is set, so every delivery would be refused: set webhook_secret_files (or "
                'webhook_secret_env); where no deliveries come in, set ingress = "poll"'
            )

    def __call__(self) -> Sequence[str]:
        now = time.monotonic()
        if now - self._read_at > _SECONDS:
            self._read_at = now
            try:
                self._secrets = webhook_secrets(self._settings)
            except SettingsError as error:
                log.error("webhook_secrets_unreadable", error=str(error))
        return self._secrets


def _auth(app: GitHubApp, settings: GitHubSettings, http: httpx.AsyncClient) -> AppAuth | TokenAuth:
    where = "github" if app.name == "github" else f"github.apps {app.name}"
    token = read_secret(file=app.token_file, variable=app.token_env, what=f"{where}.token_file")
    try:
        if token is not None:
            return TokenAuth(token)
        key = read_secret(
            file=app.private_key_file, variable=app.private_key_env, what=f"{where}.private_key_file"
        )
        return AppAuth(
            client_id=app.app_id,
            private_key_pem=key or "",
            http=http,
            base_url=api_base_url(settings.base_url),
            timeout=settings.timeout_s,
        )
    except ValueError as error:
        # The text of the error is ours; the key or token itself is never part of it.
        raise SettingsError(f"[{where}] the credentials cannot be used: {error}") from None
