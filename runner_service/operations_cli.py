"""``microvm drain | reload``: orders to the service itself. What they do is in ``commands/operations.py``."""

from pathlib import Path

import click

from runner_service.options import (
    api_option,
    config_option,
    data_dir_option,
    json_option,
    run_async,
    settings_of,
)


@click.command()
@click.option("--host", help="The host to drain. Default: that of the service that is asked.")
@click.option("--undo", is_flag=True, help="Let it take work again.")
@click.option("--wait", "wait", is_flag=True, help="Go on until nothing is left on it, and show what is.")
@config_option
@data_dir_option
@api_option
@json_option
def drain(
    *,
    host: str | None,
    undo: bool,
    wait: bool,
    config: Path | None,
    data_dir: Path | None,
    api: str | None,
    as_json: bool,
) -> int:
    """Let a host take no new work and finish what runs, until --undo. Restarts change nothing about it.

    Runners that have no job yet are let go; jobs that come meanwhile wait, or go to other hosts.
    """
    from runner_service.commands import operations  # noqa: PLC0415

    if undo and wait:
        raise click.UsageError("--undo and --wait do not go together: there is nothing to wait for")
    wish = operations.Drain(host, undo=undo, wait=wait)
    return run_async(operations.drain(settings_of(config, data_dir), api, wish, as_json=as_json))


@click.command("reload")
@config_option
@data_dir_option
@api_option
@json_option
def reload_settings(*, config: Path | None, data_dir: Path | None, api: str | None, as_json: bool) -> int:
    """Let the service read its settings again, as SIGHUP does; tell what changed and what waits for a restart.

    Settings that cannot be used change nothing, and the error says what is wrong with them.
    """
    from runner_service.commands import operations  # noqa: PLC0415

    return run_async(operations.reload(settings_of(config, data_dir), api, as_json=as_json))
