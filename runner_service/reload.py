"""Settings that change while the service runs: what differs, what takes effect at once, what needs a restart.

A new file is read and checked as a whole first: when anything in it is wrong, all stays as it was. Then each change is
told; those that can take effect do so for every decision from then on, the others are named as needing a restart, and
keep being named until it comes. Secrets are never shown: of them only that they changed.
"""

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import msgspec
import structlog

from runner_service.settings import Settings, SettingsError, read_secret, webhook_secrets

log = structlog.get_logger("reload")

# What is asked for anew with every decision. All that is not listed here needs a restart.
LIVE = (
    "service.log_level", "service.log_format", "service.keep_days", "service.stop_grace_s", "service.stop_vms",
    "github.repositories", "github.register_at", "limits.*", "frozen.*",
    "runners.default_template", "runners.max_vms", "runners.memory_mib", "runners.extra_labels", "runners.egress",
    "runners.name_prefix", "runners.fork_limit_s", "runners.online_limit_s", "runners.idle_limit_s",
    "runners.rerun_on_infra_failure", "runners.job_limit_s", "runners.exit_grace_s",
    "runners.retire_limit_s",
    "bakes.repositories", "bakes.at_once", "bakes.limit_s", "bakes.attempts", "bakes.retry_s", "bakes.every_h",
    "bakes.poll_s", "bakes.look_limit_s", "bakes.keep", "bakes.budget_mib", "bakes.nice",
)  # fmt: skip
_SHOWN = 300
_HOOKS = "github.webhook_secrets"


class Change(msgspec.Struct, frozen=True):
    """One setting that differs. ``was`` and ``now`` are shortened; of a secret they only say that it changed."""

    key: str
    was: str
    now: str
    takes_effect: Literal["now", "restart"]


class Reloaded(msgspec.Struct, frozen=True):
    """What a reload found, setting by setting; ``restart`` names the changes that wait for one."""

    source: str
    changes: tuple[Change, ...]
    restart: tuple[str, ...]


def changes(old: Settings, new: Settings) -> list[Change]:
    """What differs, by key. Pure."""
    was, now = _flat(old), _flat(new)
    return [
        Change(key, _shown(was.get(key)), _shown(now.get(key)), _effect(key, old, new))
        for key in sorted(was | now)
        if was.get(key) != now.get(key)
    ]


def effective(old: Settings, new: Settings) -> Settings:
    """``old`` with those values of ``new`` that take effect without a restart. Pure."""
    sections: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if not isinstance(before, msgspec.Struct) or not isinstance(after, msgspec.Struct):
            continue
        live = {key: getattr(after, key) for key in after.__struct_fields__ if is_live(f"{name}.{key}")}
        sections[name] = msgspec.structs.replace(before, **live)
    return msgspec.structs.replace(old, **sections)


def is_live(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in LIVE)


def fingerprints(settings: Settings) -> dict[str, bytes]:
    """A digest of each secret, to see whether it changed. Raises SettingsError when one cannot be read."""
    github = settings.github
    found: dict[str, str | None] = {
        "service.database_url_env": read_secret(
            file="", variable=settings.service.database_url_env, what="service.database_url_env"
        )
    }
    for app in github.credentials if github is not None else ():
        found[f"{app.name}.token"] = read_secret(
            file=app.token_file, variable=app.token_env, what=f"{app.name}.token_file"
        )
        found[f"{app.name}.private_key"] = read_secret(
            file=app.private_key_file, variable=app.private_key_env, what=f"{app.name}.private_key_file"
        )
    found[_HOOKS] = "\n".join(webhook_secrets(github)) if github is not None else None
    return {key: hashlib.sha256((secret or "").encode()).digest() for key, secret in found.items()}


class Reload:
    """Reads the settings again and hands what changed to ``targets``, which must not fail."""

    def __init__(
        self, settings: Settings, load: Callable[[], Settings], targets: Iterable[Callable[[Settings], None]]
    ) -> None:
        self.settings = settings
        self._load = load
        self._targets = list(targets)
        self._secrets = fingerprints(settings)

    def __call__(self) -> Reloaded:
        """Raises SettingsError, and changes nothing, when the new settings cannot be used."""
        try:
            new = self._load()
            secrets = fingerprints(new)
        except SettingsError as error:
            log.error("reload_refused", error=str(error), hint="the settings before it stay in force")
            raise
        found = [*changes(self.settings, new), *self._changed_secrets(secrets)]
        self.settings = effective(self.settings, new)
        for target in self._targets:
            target(self.settings)
        # The receiver reads its secrets again by itself; the others are held since the start.
        self._secrets[_HOOKS] = secrets[_HOOKS]
        restart = tuple(change.key for change in found if change.takes_effect == "restart")
        for change in found:
            log.info("setting_changed", **msgspec.structs.asdict(change))
        log.info("reloaded", source=str(new.source or ""), changes=len(found), restart=list(restart))
        return Reloaded(str(new.source or ""), tuple(found), restart)

    def _changed_secrets(self, secrets: Mapping[str, bytes]) -> list[Change]:
        return [
            Change(key, "(secret)", "(changed)", "now" if key == _HOOKS else "restart")
            for key, digest in sorted(secrets.items())
            if self._secrets.get(key, digest) != digest
        ]


def _flat(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        section = getattr(settings, name)
        if isinstance(section, msgspec.Struct):
            found |= {f"{name}.{key}": getattr(section, key) for key in section.__struct_fields__}
    return found


def _effect(key: str, old: Settings, new: Settings) -> Literal["now", "restart"]:
    """A section that appears or goes is more than the sum of its keys: it needs a restart."""
    section = key.partition(".")[0]
    there = getattr(old, section) is not None and getattr(new, section) is not None
    return "now" if there and is_live(key) else "restart"


def _shown(value: Any) -> str:
    return "-" if value is None else msgspec.json.encode(value).decode()[:_SHOWN]
