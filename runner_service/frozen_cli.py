"""``microvm frozen`` and ``microvm shell``: look into the VM of a job that failed."""

from pathlib import Path

import click
from rich_click import RichCommand, RichGroup

from runner_service.options import (
    api_option,
    config_option,
    data_dir_option,
    json_option,
    run_async,
    settings_of,
)


@click.group(cls=RichGroup, invoke_without_command=True)
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="How many at most."
)
@config_option
@data_dir_option
@api_option
@json_option
@click.pass_context
def frozen(
    context: click.Context,
    *,
    limit: int,
    config: Path | None,
    data_dir: Path | None,
    api: str | None,
    as_json: bool,
) -> int:
    """List the VMs of failed jobs that are kept frozen (which repositories': [frozen] in the settings).

    A frozen VM holds all its job had, secrets included. `microvm shell JOB` opens a copy of it.
    """
    if context.invoked_subcommand is not None:
        if config or data_dir or api or as_json:
            raise click.UsageError("options go after the command: microvm frozen rm … --data-dir DIR")
        return 0
    from runner_service.commands import frozen as commands  # noqa: PLC0415

    return run_async(commands.listing(settings_of(config, data_dir), api, limit, as_json=as_json))


@frozen.command("rm")
@click.argument("vms", metavar="ID...", nargs=-1, required=True)
@config_option
@data_dir_option
@api_option
def rm(*, vms: tuple[str, ...], config: Path | None, data_dir: Path | None, api: str | None) -> int:
    """Remove frozen VMs now: their files are gone when this ends, copies that are open too."""
    from runner_service.commands import frozen as commands  # noqa: PLC0415

    return run_async(commands.remove(settings_of(config, data_dir), api, vms))


@click.command(cls=RichCommand)
@click.argument("job")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--user", default="runner", show_default=True, help="Who it runs as in the guest.")
@click.option("--network", is_flag=True, help="Let it reach what the job could reach. Default: nothing.")
@config_option
@data_dir_option
def shell(
    *,
    job: str,
    command: tuple[str, ...],
    user: str,
    network: bool,
    config: Path | None,
    data_dir: Path | None,
) -> int:
    """Open a shell in a copy of the VM in which JOB failed, in the job's work folder; or run COMMAND there (after --).

    JOB is named as for `microvm why`, or by its VM's id. The copy has the job's disk, memory and processes, a name of
    its own and no network. It is destroyed at the end; the frozen VM stays as it is until its time has passed.

    Example: microvm shell my-org/app#test -- cat test.log
    """
    from runner_service.commands import shell as commands  # noqa: PLC0415

    wish = commands.Wish(job=job, argv=command, user=user, network=network)
    return run_async(commands.shell(settings_of(config, data_dir), wish))
