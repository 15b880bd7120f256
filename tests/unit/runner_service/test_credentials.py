"""From the settings to credentials: each owner's App, its runner group, and secrets that stay ours."""

from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from github_webhook.app_auth import AppAuth, TokenAuth
from github_webhook.app_auth import Scope as GitHubScope
from runner_service.credentials import routes, runner_groups, secret_variables
from runner_service.domain import JobEvent, Scope
from runner_service.github_forge import scope_chooser
from runner_service.settings import GitHubApp, GitHubSettings, SettingsError

SETTINGS = GitHubSettings(
    token_env="OWN",
    repositories=("me/*",),
    runner_group_id=3,
    webhook_secret_env="HOOK",
    apps=(
        GitHubApp(
            "acme", app_id="Iv1", private_key_env="KEY", repositories=("acme/*",), register_at="organization",
            runner_group_id=7, webhook_secret_env="ACME_HOOK",
        ),
    ),
)  # fmt: skip


def pem() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("OWN", "ghp_x")
    monkeypatch.setenv("KEY", pem())
    return monkeypatch


def event(owner: str) -> JobEvent:
    return JobEvent(
        forge="github", forge_job_id="1", owner=owner, repo="r", state="queued", labels=("microvm",), seen_at=0.0
    )  # fmt: skip


@pytest.mark.usefixtures("environment")
def test_each_owner_has_its_credentials_its_scope_and_its_runner_group() -> None:
    known = routes(SETTINGS, httpx.AsyncClient())
    mine, theirs = (
        known.route(GitHubScope.repository("Me", "r")),
        known.route(GitHubScope.organization("acme")),
    )
    assert mine is not None and isinstance(mine.auth, TokenAuth)
    assert theirs is not None and isinstance(theirs.auth, AppAuth)
    assert known.route(GitHubScope.repository("stranger", "r")) is None
    group = runner_groups(SETTINGS, known)
    assert group(Scope("repository", "me/r")) == 3 and group(Scope("organization", "acme")) == 7
    choose = scope_chooser(SETTINGS)
    assert choose(event("me")) == Scope("repository", "me/r")
    assert choose(event("acme")) == Scope("organization", "acme")
    assert choose(event("stranger")) is None


def test_children_get_none_of_the_secrets() -> None:
    assert set(secret_variables(SETTINGS)) == {"OWN", "KEY", "HOOK", "ACME_HOOK"}


def test_bad_credentials_are_named_by_their_app_and_not_quoted(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("KEY", "hunter2")
    with pytest.raises(SettingsError, match=r"github\.apps acme.*PEM") as told:
        routes(SETTINGS, httpx.AsyncClient())
    assert "hunter2" not in str(told.value)
    environment.delenv("KEY")
    with pytest.raises(SettingsError, match=r"github\.apps acme.*KEY"):
        routes(SETTINGS, httpx.AsyncClient())


def test_the_file_names_the_app_too(tmp_path: Path) -> None:
    app = GitHubApp("acme", token_file=str(tmp_path / "none"), repositories=("a/*",))
    with pytest.raises(SettingsError, match=r"github\.apps acme\.token_file"):
        routes(GitHubSettings(apps=(app,)), httpx.AsyncClient())
