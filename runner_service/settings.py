"""Settings: one TOML file and MICROVM_* variables, typed; every error names the source, the key and what is allowed.

    MICROVM_CONFIG=FILE           the file (else --config, ./microvm.toml, /etc/microvm/microvm.toml)
    MICROVM_<SECTION>_<KEY>=…     overrides one key; lists are separated by commas
    MICROVM_DATA_DIR=DIR          the same as MICROVM_SERVICE_DATA_DIR

Secrets are never values here: a setting names the file or the environment variable that holds one.
"""

import difflib
import ipaddress
import itertools
import math
import os
import re
import socket
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from github_webhook.patterns import overlap
from runner_service.limits import Limits, complaint
from vmm_core.errors import BadRequest
from vmm_core.machine import EgressRule, Network
from vmm_core.network.egress import check_network

DEFAULT_FILES = (Path("microvm.toml"), Path("/etc/microvm/microvm.toml"))
_PREFIX = "MICROVM_"
# Variables of that prefix that are no settings of the service.
_OTHERS = ("MICROVM_CONFIG", "MICROVM_DATA_DIR", "MICROVM_API", "MICROVM_API_TOKEN_FILE")
_TESTS = "MICROVM_TEST_"
# How alike a variable's section must be to one of ours to be taken for a slip of the pen.
_NEAR_MISS = 0.65
# The least that makes sense of a number, where it is not 1.
_LEAST = {
    "stop_grace_s": 0,
    "memory_mib": 0, "keep_days": 0.01, "timeout_s": 0.1, "every_h": 0, "poll_s": 0, "budget_mib": 0,
    "choice_limit_s": 0.05, "nice": 0, "retry_s": 0.1, "ttl_h": 0.001, "per_owner": 0, "per_repository": 0,
    "per_label": 0, "memory_overcommit": 0.1, "cpu_overcommit": 0,
}  # fmt: skip


_POLL_S = {"webhook": 60.0, "poll": 15.0}


class SettingsError(Exception):
    """A setting is unknown, ill-typed or impossible; the message names where it stands and what is allowed."""

    code = "bad_settings"


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The process. ``name`` identifies this host in leases; it must differ between hosts on one database.

    ``access``: "local" lets requests from this host itself do everything without a token, as long as ``listen`` is a
    loopback address; "token" demands one of them too. Requests from elsewhere always need one. ``webhook_listen``:
    an address for webhooks alone, which are then not served on the other. ``open_metrics``: /metrics needs no token.

    At SIGTERM jobs that run have ``stop_grace_s`` to finish; what runs then goes on without the service and is taken up
    by the next start (``stop_vms = "keep"``), or is ended (``"stop"``: before the machine itself is switched off).
    """

    name: str = ""
    listen: str = "127.0.0.1:8470"
    webhook_listen: str = ""
    access: Literal["local", "token"] = "local"
    open_metrics: bool = False
    data_dir: str = "/var/lib/microvm"
    database_url: str = ""
    database_url_env: str = ""
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    keep_days: float = 14.0
    stop_grace_s: float = 0.0
    stop_vms: Literal["keep", "stop"] = "keep"


class GitHubApp(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One App, or one token, of several: whose repositories it serves, and its webhook's secrets.

    What is not given (``register_at``, ``runner_group_id``) is as in ``[github]``.
    """

    name: str = ""
    app_id: str = ""
    private_key_file: str = ""
    private_key_env: str = ""
    token_file: str = ""
    token_env: str = ""
    webhook_secret_files: tuple[str, ...] = ()
    webhook_secret_env: str = ""
    repositories: tuple[str, ...] = ()
    register_at: Literal["repository", "organization"] | None = None
    runner_group_id: int | None = None


class GitHubSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GitHub: an App (``app_id`` + ``private_key_file``) or a personal token, and whose jobs are served.

    ``repositories`` are patterns such as ``owner/*``; empty means every repository that sends signed events.
    ``server_url`` is the address at which jobs see it (their GITHUB_SERVER_URL), when ``base_url`` does not tell.
    ``ingress`` is how jobs are heard of: by webhooks, or, where nothing comes in from outside, by polls alone. Every
    ``poll_s`` seconds repositories in use are looked at in any case (by default 60, with ``ingress = "poll"`` 15; 0:
    never), because events get lost.
    ``apps`` are further Apps or tokens of the same GitHub, each for repositories of its own.
    """

    base_url: str = "https://api.github.com"
    server_url: str = ""
    app_id: str = ""
    private_key_file: str = ""
    private_key_env: str = ""
    token_file: str = ""
    token_env: str = ""
    webhook_secret_files: tuple[str, ...] = ()
    webhook_secret_env: str = ""
    repositories: tuple[str, ...] = ()
    register_at: Literal["repository", "organization"] = "repository"
    runner_group_id: int = 1
    timeout_s: float = 10.0
    ingress: Literal["webhook", "poll"] = "webhook"
    poll_s: float | None = None
    apps: tuple[GitHubApp, ...] = ()

    @property
    def poll_every(self) -> float:
        """Seconds between two looks at a repository in use; 0: there are none."""
        return _POLL_S[self.ingress] if self.poll_s is None else self.poll_s

    @property
    def credentials(self) -> tuple[GitHubApp, ...]:
        """Everyone's credentials, complete: those of the section itself first, if it has any."""
        own = GitHubApp(
            "github", self.app_id, self.private_key_file, self.private_key_env, self.token_file, self.token_env,
            self.webhook_secret_files, self.webhook_secret_env, self.repositories,
        )  # fmt: skip
        has_own = bool(_secret_of(own) or _token_of(own) or own.app_id)
        every = (*((own,) if has_own or not self.apps else ()), *self.apps)
        return tuple(
            msgspec.structs.replace(
                app,
                register_at=app.register_at or self.register_at,
                runner_group_id=app.runner_group_id or self.runner_group_id,
            )
            for app in every
        )


class Egress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An endpoint every runner may open besides its template's list and the forge's API.

    ``via`` is where it really is, when that differs.
    """

    host: str
    port: int
    via: str = ""


class Runners(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Capacity and deadlines. Seconds and MiB. ``memory_mib`` 0 means 80 % of what the host has available at start.

    ``resolvers`` are IPv4 name servers that jobs open to the internet may ask (none: those of the host). What nothing
    owns on the host is looked for every ``reap_every_s``, and removed when it is seen twice.
    ``rerun_on_infra_failure`` are patterns of repositories whose jobs are run once more when infrastructure failed
    under them.
    """

    default_template: str = "github-runner"
    max_vms: int = 8
    memory_mib: int = 0
    extra_labels: tuple[str, ...] = ()
    egress: tuple[Egress, ...] = ()
    resolvers: tuple[str, ...] = ()
    name_prefix: str = "microvm"
    log_limit_mib: int = 64
    fork_limit_s: float = 60.0
    online_limit_s: float = 180.0
    idle_limit_s: float = 300.0
    job_limit_s: float = 21600.0
    exit_grace_s: float = 20.0
    retire_limit_s: float = 300.0
    reap_every_s: float = 30.0
    rerun_on_infra_failure: tuple[str, ...] = ()


class Bakes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Warm parents of repositories, baked by the service itself. Seconds, hours and MiB; 0 turns a schedule off.

    A repository is watched from its first job on; those of ``repositories`` (patterns as ``owner/*``; it may be empty)
    from their first push on. Bakes run ``at_once``, each for ``limit_s`` at most and ``attempts`` times before it has
    failed. Watched branches are looked at every ``poll_s``, and baked anew every ``every_h``. Of each parent ``keep``
    versions are kept, of all as many as fit into ``budget_mib`` (0: any number); of ``mirrors`` of repositories each
    may have ``mirror_mib``. A job waits ``choice_limit_s`` at most for the choice of its parent. The last four are
    what a repository's own ``.microvm.yml`` may ask for.
    """

    enabled: bool = True
    repositories: tuple[str, ...] = ("*/*",)
    at_once: int = 1
    limit_s: float = 3600.0
    attempts: int = 3
    retry_s: float = 60.0
    every_h: float = 0.0
    poll_s: float = 300.0
    look_limit_s: float = 300.0
    choice_limit_s: float = 2.0
    keep: int = 3
    budget_mib: int = 0
    mirrors: int = 256
    mirror_mib: int = 20480
    log_limit_mib: int = 8
    nice: int = 10
    repository_egress: tuple[str, ...] = ("package-registries",)
    most_vcpus: int = 4
    most_memory_mib: int = 8192
    most_disk_mib: int = 32768


class Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """VMs of failed jobs that are kept frozen, to be looked into. They hold the secrets of their jobs.

    ``repositories`` are patterns as ``owner/*``; none: nothing is kept. Each is kept for ``ttl_h`` hours; of a host's
    there are ``most`` at most, which take ``most_mib`` MiB of its pool at most: the oldest goes first.
    """

    repositories: tuple[str, ...] = ()
    ttl_h: float = 24.0
    most: int = 8
    most_mib: int = 16384


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All sections. ``github`` is absent until configured: the service then serves its API only.

    ``source`` is the file they were read from, if there was one; ``token_file`` what a command was told to send.
    """

    service: Service = Service()
    github: GitHubSettings | None = None
    runners: Runners = Runners()
    bakes: Bakes = Bakes()
    frozen: Frozen = Frozen()
    limits: Limits = Limits()
    source: Path | None = None
    token_file: Path | None = None

    @property
    def data_dir(self) -> Path:
        return Path(self.service.data_dir)

    @property
    def listen(self) -> tuple[str, int]:
        return _address(self.service.listen)

    @property
    def webhook_listen(self) -> tuple[str, int] | None:
        """The address of webhooks, where they have one of their own."""
        own = self.service.webhook_listen
        return _address(own) if own and _address(own) != self.listen else None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


# Arrays of tables within a section: in the environment they are JSON.
_TABLES: dict[tuple[str, str], type[msgspec.Struct]] = {
    ("runners", "egress"): Egress,
    ("github", "apps"): GitHubApp,
}


def load(file: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from ``file`` (or the first default that exists) and the environment.

    Raises SettingsError.
    """
    env = os.environ if environ is None else environ
    source = _source(file, env)
    tree = _read(source) if source is not None else {}
    origin = str(source) if source is not None else "the defaults"
    _check_keys(tree, origin)
    _apply_environment(tree, env)
    try:
        settings = msgspec.convert(tree, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(error, tree, origin)) from error
    _check_values(settings, origin)
    name = settings.service.name or socket.gethostname()
    service = msgspec.structs.replace(settings.service, name=name)
    return msgspec.structs.replace(settings, service=service, source=source)


def read_secret(
    *, file: str, variable: str, what: str, environ: Mapping[str, str] | None = None
) -> str | None:
    """The secret in ``file`` or in the environment variable ``variable``; None when neither is named.

    Raises SettingsError when the file is missing, empty, or readable by other users.
    """
    if file:
        return _secret_file(Path(file), what)
    if variable:
        value = (os.environ if environ is None else environ).get(variable, "").strip()
        if not value:
            raise SettingsError(f"{what}: the environment variable {variable} is not set or empty")
        return value
    return None


def webhook_secrets(settings: GitHubSettings, environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """All secrets that may sign a delivery, of every App; several of one while it is being rotated."""
    found: list[str] = []
    own = GitHubApp(
        "github", webhook_secret_files=settings.webhook_secret_files, webhook_secret_env=settings.webhook_secret_env
    )  # fmt: skip
    for app in (own, *settings.apps):
        where = "github" if app is own else f"github.apps {app.name}"
        found += [
            _secret_file(Path(file), f"{where}.webhook_secret_files") for file in app.webhook_secret_files
        ]
        what = f"{where}.webhook_secret_env"
        more = read_secret(file="", variable=app.webhook_secret_env, what=what, environ=environ)
        found += [more] if more is not None else []
    return tuple(dict.fromkeys(found))


def _source(file: Path | None, env: Mapping[str, str]) -> Path | None:
    if file is None and env.get("MICROVM_CONFIG"):
        file = Path(env["MICROVM_CONFIG"])
    if file is not None:
        return file
    return next((path for path in DEFAULT_FILES if path.is_file()), None)


def _read(source: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(source.read_text())
    except FileNotFoundError:
        raise SettingsError(
            f"there is no settings file {source}: give another with --config or MICROVM_CONFIG"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {source}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source}: not valid TOML: {error}") from error


def _sections() -> dict[str, type[msgspec.Struct]]:
    return {
        "service": Service,
        "github": GitHubSettings,
        "runners": Runners,
        "bakes": Bakes,
        "frozen": Frozen,
        "limits": Limits,
    }


def _check_keys(tree: Mapping[str, Any], origin: str) -> None:
    sections = _sections()
    for section, table in tree.items():
        if section not in sections:
            raise SettingsError(f"{origin}: unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(table, dict):
            raise SettingsError(f"{origin}: [{section}] must be a table of keys")
        for key in table:  # pyright: ignore[reportUnknownVariableType]
            _check_key(str(key), sections[section], f"{origin}: [{section}]")  # pyright: ignore[reportUnknownArgumentType]
    for (section, key), kind in _TABLES.items():
        _check_table_keys(tree.get(section, {}).get(key), kind, f"{origin}: [[{section}.{key}]]")


def _check_table_keys(tables: Any, kind: type[msgspec.Struct], where: str) -> None:
    for table in tables if isinstance(tables, list) else ():  # pyright: ignore[reportUnknownVariableType]
        for key in table if isinstance(table, dict) else ():  # pyright: ignore[reportUnknownVariableType]
            _check_key(str(key), kind, where)  # pyright: ignore[reportUnknownArgumentType]


def _check_key(key: str, kind: type[msgspec.Struct], where: str) -> None:
    if key not in kind.__struct_fields__:
        raise SettingsError(f"{where}: unknown key '{key}'{_nearest(key, kind.__struct_fields__)}")


def _nearest(word: str, allowed: Any) -> str:
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1)
    return f", did you mean '{close[0]}'?" if close else f"; allowed: {', '.join(names)}"


def _apply_environment(tree: dict[str, Any], env: Mapping[str, str]) -> None:
    if env.get("MICROVM_DATA_DIR"):
        tree.setdefault("service", {})["data_dir"] = env["MICROVM_DATA_DIR"]
    for name in sorted(env):
        if not name.startswith(_PREFIX) or name in _OTHERS or name.startswith(_TESTS):
            continue
        section, _, key = name.removeprefix(_PREFIX).lower().partition("_")
        kind = _sections().get(section)
        if kind is None:
            # Other programs may use the prefix too: only variables that (nearly) name a section of ours are settings.
            if key and (near := difflib.get_close_matches(section, _sections(), n=1, cutoff=_NEAR_MISS)):
                meant = f"{_PREFIX}{near[0].upper()}_…"
                raise SettingsError(
                    f"environment variable {name}: no section '{section}', did you mean {meant}?"
                )
            continue
        _check_key(key, kind, f"environment variable {name}")
        tree.setdefault(section, {})[key] = _parse(env[name], kind, key, name, _TABLES.get((section, key)))


def _parse(
    text: str, kind: type[msgspec.Struct], key: str, name: str, table: type[msgspec.Struct] | None
) -> Any:
    wanted = next(field.type for field in msgspec.structs.fields(kind) if field.name == key)
    if wanted == tuple[str, ...]:
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        if get_origin(wanted) is Literal or wanted is str:
            return msgspec.convert(text, wanted)
        if get_origin(wanted) is dict:
            return msgspec.to_builtins(msgspec.json.decode(text, type=wanted))
        if table is not None:
            rules = msgspec.json.decode(text)
            _check_table_keys(rules, table, f"environment variable {name}")
            return msgspec.to_builtins(msgspec.convert(rules, wanted))
        return msgspec.convert(text, wanted, strict=False)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise SettingsError(f"environment variable {name}: {error}{_choices(wanted)}") from error


def _explain(error: msgspec.ValidationError, tree: Mapping[str, Any], origin: str) -> str:
    text, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    section, _, key = path.partition(".")
    kind = _sections().get(section)
    if kind is None or not key:
        return f"{origin}: {path or 'the file'}: {text}"
    first = re.split(r"[.\[]", key)[0]
    wanted = next((field.type for field in msgspec.structs.fields(kind) if field.name == first), None)
    given = tree.get(section, {}).get(first)
    shown = "" if given is None else f" (given: {given!r})"
    return f"{origin}: [{section}] {key}: {text}{_choices(wanted)}{shown}"


def _choices(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return f"; allowed: {', '.join(map(str, get_args(wanted)))}"
    return ""


def _check_values(settings: Settings, origin: str) -> None:
    service, runners, github = settings.service, settings.runners, settings.github
    for key, text in (("listen", service.listen), ("webhook_listen", service.webhook_listen)):
        port = text.rpartition(":")[2]
        if (text or key == "listen") and (not port.isdecimal() or int(port) > 65535):
            raise SettingsError(
                f"{origin}: [service] {key}: '{text}' is not ADDRESS:PORT, such as 127.0.0.1:8470"
            )
    if re.search(r"://[^/@]*:[^/@]+@|[?&](ssl)?password=", service.database_url, re.IGNORECASE):
        raise SettingsError(
            f"{origin}: [service] database_url holds a password: put the whole URL into an environment variable "
            "and name that in database_url_env"
        )
    for section, table in (
        ("service", service), ("runners", runners), ("github", github), ("bakes", settings.bakes),
        ("frozen", settings.frozen),
        ("limits", settings.limits),
    ):  # fmt: skip
        if table is not None:
            _check_numbers(table, f"{origin}: [{section}]")
    try:
        allow = tuple(EgressRule(rule.host, rule.port, rule.via or None) for rule in runners.egress)
        check_network(Network("list", allow))
    except BadRequest as error:
        raise SettingsError(f"{origin}: [[runners.egress]]: {error}") from error
    for resolver in runners.resolvers:
        if not _is_ipv4(resolver):
            raise SettingsError(f"{origin}: [runners] resolvers: {resolver!r} is no IPv4 address")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", runners.name_prefix):
        raise SettingsError(
            f"{origin}: [runners] name_prefix: lower-case letters, digits and '-', at most 32"
        )
    _check_patterns(settings.bakes.repositories, f"{origin}: [bakes]")
    _check_patterns(settings.frozen.repositories, f"{origin}: [frozen]")
    _check_patterns(runners.rerun_on_infra_failure, f"{origin}: [runners]", "rerun_on_infra_failure")
    if (wrong := complaint(settings.limits)) is not None:
        raise SettingsError(f"{origin}: [limits{wrong}")
    if settings.bakes.nice > 19:
        raise SettingsError(f"{origin}: [bakes] nice: at most 19, not {settings.bakes.nice}")
    if github is not None:
        _check_github(github, origin)


def _check_patterns(patterns: tuple[str, ...], where: str, key: str = "repositories") -> None:
    for pattern in patterns:
        if not re.fullmatch(r"[^/\s]+/[^/\s]+", pattern):
            raise SettingsError(f"{where} {key}: '{pattern}' is not owner/repository or owner/*")


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _check_numbers(table: msgspec.Struct, where: str) -> None:
    for key in table.__struct_fields__:
        value = getattr(table, key)
        least = _LEAST.get(key, 1)
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and not (math.isfinite(value) and value >= least)
        ):
            raise SettingsError(f"{where} {key}: must be a number of at least {least}, not {value}")


def _check_github(github: GitHubSettings, origin: str) -> None:
    where = f"{origin}: [github]"
    for key, url in (("base_url", github.base_url), ("server_url", github.server_url or github.base_url)):
        if not url.startswith(("https://", "http://")):
            raise SettingsError(f"{where} {key}: must start with https://, not '{url}'")
    if github.ingress == "poll" and not github.poll_every:
        raise SettingsError(f'{where} poll_s: with ingress = "poll" nothing else finds jobs; it cannot be 0')
    for number, app in enumerate(github.apps, 1):
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", app.name) or app.name == "github":
            raise SettingsError(
                f"{origin}: [[github.apps]] number {number}: name must be 1 to 64 letters, digits, '.', '_' or '-', "
                f"and not 'github', which is the section itself: '{app.name}'"
            )
        _check_numbers(app, f"{origin}: [[github.apps]] {app.name}:")
    every = github.credentials
    names = [app.name for app in every]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise SettingsError(f"{origin}: [[github.apps]]: two have the name '{twice}'")
    for app in every:
        where = f"{origin}: [github]" if app.name == "github" else f"{origin}: [[github.apps]] {app.name}"
        _check_app(app, where, alone=len(every) == 1)
    for app, other in itertools.combinations(every, 2):
        _check_apart(app, other, f"{origin}: [github]")


def _check_app(app: GitHubApp, where: str, *, alone: bool) -> None:
    secret, token = _secret_of(app), _token_of(app)
    if bool(app.app_id) != bool(secret):
        raise SettingsError(f"{where}: app_id and private_key_file (or private_key_env) belong together")
    if bool(token) == bool(secret):
        raise SettingsError(
            f"{where}: give either an App (app_id, private_key_file) or a token (token_file, token_env)"
        )
    _check_patterns(app.repositories, where)
    if not app.repositories and not alone:
        raise SettingsError(f"{where}: repositories is missing: of several, each says whose it serves")


def _check_apart(app: GitHubApp, other: GitHubApp, where: str) -> None:
    """Nobody is served twice: neither a repository nor, where both register at organizations, an owner."""
    both = app.register_at == other.register_at == "organization"
    for one, two in itertools.product(app.repositories, other.repositories):
        if overlap(one, two) or (both and overlap(one.partition("/")[0], two.partition("/")[0])):
            what = "owners of" if both and not overlap(one, two) else "repositories fit"
            raise SettingsError(
                f"{where}: '{app.name}' and '{other.name}' overlap: {what} both '{one}' and '{two}'"
            )


def _secret_of(app: GitHubApp) -> str:
    return app.private_key_file or app.private_key_env


def _token_of(app: GitHubApp) -> str:
    return app.token_file or app.token_env


def _secret_file(path: Path, what: str) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"{what}: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingsError(f"{what}: {path} is not text") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(
            f"{what}: {path} may be read by other users (mode {stat.S_IMODE(mode):04o}): chmod 600 it"
        )
    if not text:
        raise SettingsError(f"{what}: {path} is empty")
    return text
