"""Settings that change while the service runs: told one by one, checked as a whole, secrets never shown."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_service import reload
from runner_service.reload import Reload, changes, effective, is_live
from runner_service.settings import (
    Bakes,
    Egress,
    GitHubSettings,
    Runners,
    Service,
    Settings,
    SettingsError,
    load,
)

SECRET = "s3cret-of-the-webhook"


def write(directory: Path, text: str) -> Path:
    path = directory / "microvm.toml"
    path.write_text(text)
    return path


some = st.builds(
    Settings,
    service=st.builds(
        Service, listen=st.sampled_from(("127.0.0.1:1", "127.0.0.1:2")), keep_days=st.sampled_from((1.0, 2.0))
    ),
    github=st.none() | st.builds(GitHubSettings, repositories=st.sampled_from(((), ("o/*",)))),
    runners=st.builds(Runners, max_vms=st.integers(1, 3), resolvers=st.sampled_from(((), ("192.0.2.1",)))),
    bakes=st.builds(Bakes, at_once=st.integers(1, 2), mirrors=st.integers(1, 2)),
)


@given(some, some)
def test_what_takes_effect_is_all_that_a_second_look_no_longer_finds(old: Settings, new: Settings) -> None:
    found = changes(old, new)
    after = effective(old, new)
    assert {c.key for c in changes(after, new)} == {c.key for c in found if c.takes_effect == "restart"}
    assert {c.key for c in changes(old, after)} == {c.key for c in found if c.takes_effect == "now"}
    assert effective(after, new) == after and changes(old, old) == [] and effective(old, old) == old


def test_every_live_setting_exists() -> None:
    keys = set(reload._flat(Settings(github=GitHubSettings())))  # pyright: ignore
    for pattern in reload.LIVE:
        assert pattern.endswith(".*") or pattern in keys, pattern
    for key in ("service.listen", "service.data_dir", "service.database_url", "service.name"):
        assert not is_live(key)


def test_a_change_is_told_applied_or_named_as_waiting_for_a_restart(tmp_path: Path) -> None:
    path = write(tmp_path, "[runners]\nmax_vms = 2\n")
    seen: list[Settings] = []
    again = Reload(load(path, {}), lambda: load(path, {}), [seen.append])
    write(tmp_path, "[service]\nlisten = '127.0.0.1:9'\n[runners]\nmax_vms = 5\n")
    told = again()
    assert [(c.key, c.was, c.now, c.takes_effect) for c in told.changes] == [
        ("runners.max_vms", "2", "5", "now"),
        ("service.listen", '"127.0.0.1:8470"', '"127.0.0.1:9"', "restart"),
    ]
    assert told.restart == ("service.listen",) and told.source == str(path)
    assert seen[-1].runners.max_vms == 5 and seen[-1].service.listen == "127.0.0.1:8470"
    # What was applied is news no more; what waits for a restart is said until it comes.
    assert [c.key for c in again().changes] == ["service.listen"]


@pytest.mark.parametrize(
    "text", ["[runners]\nmax_vms = 0\n", "[runners]\nmax_vm = 3\n", "x", "[service]\nlisten = 3\n"]
)
def test_a_wrong_file_changes_nothing(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "")
    seen: list[Settings] = []
    again = Reload(load(path, {}), lambda: load(path, {}), [seen.append])
    before = again.settings
    write(tmp_path, "[bakes]\nat_once = 7\n" + text)
    with pytest.raises(SettingsError, match=r"microvm\.toml"):
        again()
    assert again.settings == before and seen == []
    path.unlink()
    with pytest.raises(SettingsError):
        again()
    assert again.settings == before and seen == []


def secret_file(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def test_of_a_secret_only_that_it_changed_is_told(tmp_path: Path) -> None:
    hook, token = secret_file(tmp_path, "hook", SECRET), secret_file(tmp_path, "token", SECRET)
    path = write(tmp_path, f"[github]\ntoken_file = '{token}'\nwebhook_secret_files = ['{hook}']\n")
    again = Reload(load(path, {}), lambda: load(path, {}), [])
    assert again().changes == ()
    secret_file(tmp_path, "hook", SECRET + "2")
    secret_file(tmp_path, "token", SECRET + "2")
    told = again()
    assert [(c.key, c.now, c.takes_effect) for c in told.changes] == [
        ("github.token", "(changed)", "restart"), ("github.webhook_secrets", "(changed)", "now"),
    ]  # fmt: skip
    assert SECRET not in msgspec.json.encode(told).decode()
    assert [c.key for c in again().changes] == ["github.token"]
    os.chmod(token, 0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        again()


def test_lists_and_tables_are_told_whole() -> None:
    new = Settings(runners=Runners(egress=(Egress("git.example.com", 443),)))
    (change,) = changes(Settings(), new)
    assert change.was == "[]" and "git.example.com" in change.now and change.takes_effect == "now"


def test_a_section_that_appears_needs_a_restart() -> None:
    found = changes(Settings(), Settings(github=GitHubSettings(repositories=("o/*",))))
    assert found and all(c.takes_effect == "restart" for c in found)
