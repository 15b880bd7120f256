"""Settings: every mistake names the source, the key, and what is allowed."""

from pathlib import Path

import pytest

from runner_service import settings
from runner_service.credentials import WebhookSecrets
from runner_service.settings import Service, Settings, SettingsError

APP = "[[github.apps]]\nname = 'a'\n"
OTHER = "[[github.apps]]\nname = 'b'\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "microvm.toml"
    path.write_text(text)
    return path


def test_a_complete_file_and_the_environment_over_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [service]
        listen = "0.0.0.0:9000"
        [github]
        base_url = "https://ghe.example"
        token_env = "GH_TOKEN"
        repositories = ["o/*", "p/q"]
        [runners]
        max_vms = 4
        egress = [{host = "forge", port = 8080, via = "127.0.0.1:1234"}]
        [limits]
        per_repository = 20
        repositories = {"o/*" = 4}
        [limits.weights]
        "o/main" = 2.5
        """,
    )
    env = {
        "MICROVM_RUNNERS_MAX_VMS": "6",
        "MICROVM_DATA_DIR": "/data",
        "MICROVM_RUNNERS_EXTRA_LABELS": "a, b",
        "MICROVM_BAKES_ENABLED": "false",
        "MICROVM_BAKES_POLL_S": "0",
        "MICROVM_LIMITS_LABELS": '{"microvm-8gb": 1}',
    }
    found = settings.load(path, env)
    assert found.listen == ("0.0.0.0", 9000) and found.data_dir == Path("/data")
    assert found.runners.max_vms == 6 and found.runners.extra_labels == ("a", "b")
    assert found.runners.egress[0].via == "127.0.0.1:1234"
    assert found.github is not None and found.github.repositories == ("o/*", "p/q")
    assert found.service.name and found.source == path
    assert not found.bakes.enabled and found.bakes.poll_s == 0
    assert found.limits.repositories == {"o/*": 4} and found.limits.weights == {"o/main": 2.5}
    assert found.limits.labels == {"microvm-8gb": 1} and found.limits.per_repository == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[servce]\n", ["unknown section [servce]", "'service'"]),
        ("[service]\nlisen = '1'\n", ["[service]", "'lisen'", "'listen'"]),
        ("[service]\nqqq = 1\n", ["'qqq'", "allowed", "data_dir"]),
        ("[service]\nlisten = 8470\n", ["[service] listen", "str"]),
        ("[service]\nlisten = 'here'\n", ["listen", "ADDRESS:PORT"]),
        ("[service]\nwebhook_listen = 'here'\n", ["webhook_listen", "ADDRESS:PORT"]),
        ("[service]\naccess = 'open'\n", ["[service] access", "allowed: local, token"]),
        ("[service]\nlog_format = 'xml'\n", ["log_format", "json", "console"]),
        ("[runners]\nmax_vms = 'many'\n", ["[runners] max_vms", "int", "many"]),
        ("[runners]\nmax_vms = 0\n", ["max_vms", "at least 1"]),
        ("[runners]\njob_limit_s = nan\n", ["[runners] job_limit_s", "nan"]),
        ("[runners]\nidle_limit_s = inf\n", ["idle_limit_s", "inf"]),
        ("[service]\nkeep_days = -1\n", ["[service] keep_days", "-1"]),
        ("[service]\nkeep_days = nan\n", ["keep_days", "nan"]),
        ("[github]\ntoken_env = 'A'\ntimeout_s = 0\n", ["[github] timeout_s", "0"]),
        ("[github]\ntoken_env = 'A'\nrunner_group_id = 0\n", ["runner_group_id", "at least 1"]),
        ("[runners]\negress = [{host = 'x'}]\n", ["egress", "port"]),
        ("[[runners.egress]]\nhost = 'x'\nport = 0\n", ["[[runners.egress]]", "x:0", "1 to 65535"]),
        ("[[runners.egress]]\nhost = '127.0.0.1'\nport = 1\n", ["127.0.0.1:1", "never open"]),
        ("[[runners.egress]]\nhost = '10.1.2.3/24'\nport = 1\n", ["10.1.2.3/24", "host bits set"]),
        ("[[runners.egress]]\nhost = 'x'\nport = 1\nvia = 'y'\n", ["'y'", "host:port"]),
        ("[[runners.egress]]\nhost = 'x'\nprot = 1\n", ["[[runners.egress]]", "'prot'", "'port'"]),
        ("[[runners.egress]]\nqqq = 1\n", ["'qqq'", "host, port, via"]),
        ("[runners]\nresolvers = ['dns.example']\n", ["[runners] resolvers", "'dns.example'", "IPv4"]),
        ("[service]\ndatabase_url = 'postgresql://h/d?password=p'\n", ["database_url_env"]),
        ("[github]\n", ["[github]", "token_file"]),
        ("[github]\ntoken_env = 'A'\ningress = 'pull'\n", ["[github] ingress", "webhook, poll", "'pull'"]),
        ("[github]\ntoken_env = 'A'\ningress = 'poll'\npoll_s = 0\n", ["poll_s", "nothing else finds jobs"]),
        ("[github]\ntoken_env = 'A'\npoll_s = -1\n", ["[github] poll_s", "at least 0"]),
        ("[github]\napp_id = '1'\n", ["app_id", "private_key_file"]),
        ("[github]\ntoken_env = 'A'\nrepositories = ['o']\n", ["repositories", "'o'"]),
        ("[github]\ntoken_env = 'A'\nbase_url = 'ftp://x'\n", ["base_url", "https://"]),
        ("[service]\ndatabase_url = 'postgresql://u:p@h/d'\n", ["database_url", "database_url_env"]),
        ("[bakes]\nat_once = 0\n", ["[bakes] at_once", "at least 1"]),
        ("[bakes]\nevery_h = -1\n", ["[bakes] every_h", "-1"]),
        ("[bakes]\nnice = 20\n", ["[bakes] nice", "19"]),
        ("[bakes]\nenabled = 'yes'\n", ["[bakes] enabled", "bool", "yes"]),
        ("[bakes]\nrepositories = ['o']\n", ["[bakes] repositories", "'o'", "owner/*"]),
        ("[bakes]\nlimit = 1\n", ["[bakes]", "'limit'", "'limit_s'"]),
        ("[limits]\nper_repositry = 1\n", ["[limits]", "'per_repositry'", "'per_repository'"]),
        ("[limits]\nper_owner = -1\n", ["[limits] per_owner", "at least 0"]),
        ("[limits]\nmost_queued = 0\n", ["[limits] most_queued", "at least 1"]),
        ("[limits]\nmemory_overcommit = 0\n", ["[limits] memory_overcommit", "0.1"]),
        ("[limits.repositories]\n'octo' = 1\n", ["[limits.repositories]", "'octo'", "owner/*"]),
        ("[limits.repositories]\n'o/*' = 'x'\n", ["[limits] repositories", "int", "str"]),
        ("[limits.owners]\n'o/r' = 1\n", ["[limits.owners]", "'o/r'"]),
        ("[limits.labels]\n'a b' = 1\n", ["[limits.labels]", "'a b'"]),
        ("[limits.labels]\nx = -1\n", ["[limits.labels]", '"x"', "at least 0", "-1"]),
        ("[limits.weights]\n'o/r' = 0\n", ["[limits.weights]", '"o/r"', "0.01"]),
        ("[limits.weights]\n'o/r' = nan\n", ["[limits.weights]", "nan"]),
        ("[limits.priorities]\nx = 1.5\n", ["[limits] priorities", "int"]),
        ("[github]\ntoken_env = 'A'\nserver_url = 'forge'\n", ["[github] server_url", "'forge'"]),
        ("[[github.apps]]\napp_id = 'I'\n", ["[[github.apps]] number 1", "name"]),
        (f"{APP}token_fil = 'x'\n", ["[[github.apps]]", "'token_fil'", "'token_file'"]),
        (f"{APP}app_id = 'I'\n", ["[[github.apps]] a", "private_key_file"]),
        (f"{APP}", ["[[github.apps]] a", "token_file"]),
        (f"{APP}token_env = 'A'\n{APP}token_env = 'A'\n", ["two have the name 'a'"]),
        (
            f"{APP}token_env = 'A'\n{OTHER}token_env = 'B'\nrepositories = ['o/*']\n",
            ["a: repositories is missing"],
        ),
        (
            f"[github]\ntoken_env = 'A'\n{OTHER}token_env = 'B'\nrepositories = ['o/*']\n",
            ["[github]: repositories is missing"],
        ),
        (
            f"{APP}token_env = 'A'\nrepositories = ['o/*']\n{OTHER}token_env = 'B'\nrepositories = ['x/y', 'O/r']\n",
            ["'a' and 'b' overlap", "'o/*'", "'O/r'"],
        ),
        (
            "[github]\nregister_at = 'organization'\n"
            f"{APP}token_env = 'A'\nrepositories = ['o/a']\n{OTHER}token_env = 'B'\nrepositories = ['o/b']\n",
            ["'a' and 'b' overlap", "owners of"],
        ),
        (f"{APP}token_env = 'A'\nregister_at = 'team'\n", ["[github] apps", "'team'"]),
        (f"{APP}token_env = 'A'\nrunner_group_id = 0\n", ["[[github.apps]] a", "runner_group_id"]),
        (
            "[runners]\nrerun_on_infra_failure = ['acme']\n",
            ["[runners] rerun_on_infra_failure", "'acme'", "owner/*"],
        ),
        ("[frozen]\nrepositories = ['acme']\n", ["[frozen] repositories", "'acme'", "owner/*"]),
        ("[frozen]\nttl = 1\n", ["[frozen]", "'ttl'", "'ttl_h'"]),
        ("[frozen]\nttl_h = 0\n", ["[frozen] ttl_h", "0.001"]),
        ("[frozen]\nmost = 0\n", ["[frozen] most", "at least 1"]),
        ("service = 1\n", ["[service]", "table"]),
        ("[service\n", ["not valid TOML"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as raised:
        settings.load(path, {})
    assert str(path) in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MICROVM_RUNNERS_MAX_VMS", "x", ["MICROVM_RUNNERS_MAX_VMS", "int"]),
        ("MICROVM_RUNNERS_MAX_VM", "1", ["MICROVM_RUNNERS_MAX_VM", "max_vms"]),
        ("MICROVM_RUNNER_MAX_VMS", "1", ["MICROVM_RUNNER_MAX_VMS", "MICROVM_RUNNERS_"]),
        ("MICROVM_GIT_HUB_TOKEN_ENV", "1", ["MICROVM_GIT_HUB_TOKEN_ENV", "MICROVM_GITHUB_"]),
        ("MICROVM_RUNNERS_EGRESS", "[", ["MICROVM_RUNNERS_EGRESS"]),
        ("MICROVM_RUNNERS_EGRESS", '[{"qqq": 1}]', ["MICROVM_RUNNERS_EGRESS", "host, port, via"]),
        ("MICROVM_RUNNERS_EGRESS", '{"host": 1}', ["MICROVM_RUNNERS_EGRESS", "array"]),
        ("MICROVM_GITHUB_APPS", '[{"nam": "x"}]', ["MICROVM_GITHUB_APPS", "'name'"]),
        ("MICROVM_LIMITS_LABELS", "x=1", ["MICROVM_LIMITS_LABELS", "JSON"]),
        ("MICROVM_LIMITS_OWNERS", '{"o": "x"}', ["MICROVM_LIMITS_OWNERS", "int"]),
        ("MICROVM_SERVICE_LOG_LEVEL", "loud", ["MICROVM_SERVICE_LOG_LEVEL", "debug"]),
    ],
)
def test_a_mistake_in_the_environment_is_named(name: str, value: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        settings.load(Path("/dev/null"), {name: value})
    for word in words:
        assert word in str(raised.value)


def test_other_variables_of_the_prefix_are_left_alone() -> None:
    settings.load(Path("/dev/null"), {"MICROVM_TEST_IMAGE": "x", "MICROVM_API": "y", "MICROVM_CONFIG": "z"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nope\.toml"):
        settings.load(tmp_path / "nope.toml", {})


def test_secrets_come_from_files_only_their_owner_reads(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    secret.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        settings.read_secret(file=str(secret), variable="", what="github.token_file")
    secret.chmod(0o600)
    assert settings.read_secret(file=str(secret), variable="", what="x") == "hush"
    secret.write_text(" \n")
    with pytest.raises(SettingsError, match="is empty"):
        settings.read_secret(file=str(secret), variable="", what="x")
    with pytest.raises(SettingsError, match="NO_SUCH"):
        settings.read_secret(file="", variable="NO_SUCH", what="x", environ={})
    assert settings.read_secret(file="", variable="", what="x") is None


def test_several_webhook_secrets_while_one_is_rotated(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o600)
    github = settings.GitHubSettings(
        webhook_secret_files=(str(tmp_path / "new"), str(tmp_path / "old")), webhook_secret_env="THIRD"
    )
    assert settings.webhook_secrets(github, {"THIRD": "third"}) == ("new", "old", "third")


def test_several_apps_beside_the_section_s_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [github]
        token_env = "A"
        repositories = ["o/*"]
        runner_group_id = 3
        [[github.apps]]
        name = "acme"
        app_id = "Iv1"
        private_key_env = "K"
        repositories = ["acme/*"]
        register_at = "organization"
        """,
    )
    found = settings.load(path, {}).github
    assert found is not None
    own, acme = found.credentials
    assert (own.name, own.token_env, own.register_at, own.runner_group_id) == ("github", "A", "repository", 3)
    assert (acme.name, acme.app_id, acme.register_at, acme.runner_group_id) == (
        "acme",
        "Iv1",
        "organization",
        3,
    )
    env = {"MICROVM_GITHUB_APPS": '[{"name": "x", "token_env": "B"}]'}
    alone = settings.load(Path("/dev/null"), env).github
    assert alone is not None and [app.name for app in alone.credentials] == ["x"]


def test_deliveries_signed_by_any_of_the_apps_are_taken() -> None:
    apps = (settings.GitHubApp("a", webhook_secret_env="A"), settings.GitHubApp("b", webhook_secret_env="B"))
    github = settings.GitHubSettings(webhook_secret_env="OWN", apps=apps)
    env = {"OWN": "one", "A": "two", "B": "one"}
    assert settings.webhook_secrets(github, env) == ("one", "two")
    with pytest.raises(SettingsError, match=r"github\.apps b"):
        settings.webhook_secrets(github, {"OWN": "one", "A": "two"})


def test_without_webhooks_it_polls_more_often_and_needs_no_webhook_secret(tmp_path: Path) -> None:
    def every(text: str) -> float:
        found = settings.load(write(tmp_path, f"[github]\ntoken_env = 'A'\n{text}"), {}).github
        assert found is not None
        return found.poll_every

    assert [every(""), every("ingress = 'poll'"), every("poll_s = 5"), every("poll_s = 0")] == [60, 15, 5, 0]
    assert settings.load(
        Path("/dev/null"), {"MICROVM_GITHUB_TOKEN_ENV": "A", "MICROVM_GITHUB_POLL_S": "7"}
    ).github


def test_webhooks_without_a_secret_are_refused_with_both_ways_out() -> None:
    with pytest.raises(SettingsError, match=r'webhook_secret_files .*ingress = "poll"'):
        WebhookSecrets(settings.GitHubSettings(token_env="A"))


def test_webhooks_have_an_address_of_their_own_only_when_it_is_another() -> None:
    assert Settings().webhook_listen is None
    same = Service(listen="127.0.0.1:1", webhook_listen="127.0.0.1:1")
    assert Settings(service=same).webhook_listen is None
    other = Service(listen="127.0.0.1:1", webhook_listen="[::]:2")
    assert Settings(service=other).webhook_listen == ("::", 2)
