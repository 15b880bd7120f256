"""``microvm tokens`` and ``microvm audit``: who may ask the service's API, and what operators did."""

from pathlib import Path

import click
from rich_click import RichGroup

from runner_service.options import (
    api_option,
    config_option,
    data_dir_option,
    json_option,
    run_async,
    settings_of,
)

_SCOPES = ("read", "operate", "admin")


@click.group(cls=RichGroup)
def tokens() -> None:
    """Make, list and revoke tokens of the service's API.

    A token has a scope: read looks, operate also gives orders (kill, drain), admin also makes tokens and reads the
    audit log. These commands work on the database of this host, or with --api on a service elsewhere.
    """


@tokens.command()
@click.argument("name")
@click.option("--scope", type=click.Choice(_SCOPES), required=True, help="What it allows.")
@click.option(
    "--expires",
    "days",
    type=click.FloatRange(min=0, max=3650),
    default=90,
    show_default=True,
    metavar="DAYS",
    help="When it ends; 0: never.",
)
@config_option
@data_dir_option
@api_option
@json_option
def create(
    *,
    name: str,
    scope: str,
    days: float,
    config: Path | None,
    data_dir: Path | None,
    api: str | None,
    as_json: bool,
) -> int:
    """Make the token NAME and print it, this once: only its digest is kept.

    Example: (umask 077 && microvm tokens create prometheus --scope read > /etc/prometheus/microvm.token)
    """
    from runner_service.commands import access  # noqa: PLC0415

    settings = settings_of(config, data_dir)
    return run_async(access.create(settings, api, name, scope, days or None, as_json=as_json))


@tokens.command("list")
@config_option
@data_dir_option
@api_option
@json_option
def list_(*, config: Path | None, data_dir: Path | None, api: str | None, as_json: bool) -> int:
    """List the tokens: what they allow, when they end, when they were last used (to the hour)."""
    from runner_service.commands import access  # noqa: PLC0415

    return run_async(access.listing(settings_of(config, data_dir), api, as_json=as_json))


@tokens.command()
@click.argument("name")
@config_option
@data_dir_option
@api_option
def revoke(*, name: str, config: Path | None, data_dir: Path | None, api: str | None) -> int:
    """End the token NAME at once."""
    from runner_service.commands import access  # noqa: PLC0415

    return run_async(access.revoke(settings_of(config, data_dir), api, name))


@click.command()
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most."
)
@config_option
@data_dir_option
@api_option
@json_option
def audit(*, limit: int, config: Path | None, data_dir: Path | None, api: str | None, as_json: bool) -> int:
    """List what operators did, newest first: when, who, what, and what came of it."""
    from runner_service.commands import access  # noqa: PLC0415

    return run_async(access.audit_log(settings_of(config, data_dir), api, limit, as_json=as_json))
