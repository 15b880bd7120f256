"""``microvm templates``: the list of what can be forked, and the commands on one of them."""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich_click import RichGroup

from runner_service.options import config_option, data_dir_option, json_option, run_async, settings_of

if TYPE_CHECKING:
    from runner_service.settings import Settings


def _here(command: Callable[..., int]) -> Callable[..., int]:
    """The options every one of these commands has."""
    return config_option(data_dir_option(json_option(command)))


@click.group(cls=RichGroup, invoke_without_command=True)
@click.option("--repository", metavar="OWNER/REPO", help="Only its parents; * and ? stand for anything.")
@_here
@click.pass_context
def templates(
    ctx: click.Context, *, repository: str | None, config: Path | None, data_dir: Path | None, as_json: bool
) -> int:
    """List the templates of this host and the parents of repositories; or look at one, and change what names mean.

    A name (python-ci, or octo-org/hello@main for the parent of a branch) means one snapshot at a time. Its earlier
    ones stay until they are pruned, so it can be rolled back.
    """
    if ctx.invoked_subcommand is not None:
        if repository or config or data_dir or as_json:
            command = f"microvm templates {ctx.invoked_subcommand}"
            raise click.UsageError(f"options go after the command: {command} … --data-dir DIR")
        return 0
    from runner_service.commands import templates as run  # noqa: PLC0415

    return run_async(run.listing(settings_of(config, data_dir).data_dir, repository, as_json=as_json))


@templates.command()
@click.argument("template")
@_here
def show(*, template: str, config: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """Tell what is in TEMPLATE (a name or digest): what it was made from and when, what it takes, and who uses it."""
    from runner_service.commands import templates as run  # noqa: PLC0415

    return run_async(run.show_one(settings_of(config, data_dir).data_dir, template, as_json=as_json))


@templates.command()
@click.argument("name")
@_here
def history(*, name: str, config: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """List what NAME has meant, newest first, and which of it is still there."""
    from runner_service.commands import templates as run  # noqa: PLC0415

    return run_async(run.history(settings_of(config, data_dir).data_dir, name, as_json=as_json))


@templates.command()
@click.argument("name")
@click.argument("snapshot")
@click.option(
    "--why", default="by an operator", show_default=True, metavar="TEXT", help="One line for its history."
)
@_here
def promote(
    *, name: str, snapshot: str, why: str, config: Path | None, data_dir: Path | None, as_json: bool
) -> int:
    """Let NAME mean SNAPSHOT (a name or digest) from now on. What runs keeps the parent it has."""
    from runner_service.commands import templates as run  # noqa: PLC0415

    settings = settings_of(config, data_dir)
    work = run.promote(settings.data_dir, name, snapshot, why, as_json=as_json)
    return _noted(settings, work, "template.promote", name, snapshot=snapshot, why=why)


@templates.command()
@click.argument("name")
@_here
def rollback(*, name: str, config: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """Let NAME mean the version before this one, of those that are still there. Again: the one before that."""
    from runner_service.commands import templates as run  # noqa: PLC0415

    settings = settings_of(config, data_dir)
    return _noted(settings, run.rollback(settings.data_dir, name, as_json=as_json), "template.rollback", name)


@templates.command()
@click.option("--budget", metavar="SIZE", help="Remove the least recently used until all take at most this.")
@click.option(
    "--keep", type=click.IntRange(min=1), default=3, show_default=True, help="Versions of each name to keep."
)
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@_here
def prune(
    *, budget: str | None, keep: int, dry_run: bool, config: Path | None, data_dir: Path | None, as_json: bool
) -> int:
    """Remove old versions, then the least recently used until a budget (such as 20 GiB) is met.

    Stays in any case: what VMs or other snapshots stand on, what is pinned, what the name of a template means now
    (parents of repositories can go: their next push bakes them again), and what was used in the last two minutes.
    """
    from runner_service.commands import templates as run  # noqa: PLC0415

    settings = settings_of(config, data_dir)
    try:
        wish = run.Wish(run.parse_budget(budget), keep, dry_run)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--budget") from error
    work = run.prune(settings.data_dir, wish, as_json=as_json)
    if dry_run:
        return run_async(work)
    return _noted(settings, work, "template.prune", "", budget=budget, keep=keep)


@templates.command()
@click.argument("template")
@_here
def pin(*, template: str, config: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """Never prune the snapshot that TEMPLATE (a name or digest) means now."""
    return _pin(template, config, data_dir, pinned=True, as_json=as_json)


@templates.command()
@click.argument("template")
@_here
def unpin(*, template: str, config: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """Let the snapshot that TEMPLATE (a name or digest) means now be pruned again."""
    return _pin(template, config, data_dir, pinned=False, as_json=as_json)


def _pin(template: str, config: Path | None, data_dir: Path | None, *, pinned: bool, as_json: bool) -> int:
    from runner_service.commands import templates as run  # noqa: PLC0415

    settings = settings_of(config, data_dir)
    work = run.pin(settings.data_dir, template, pinned=pinned, as_json=as_json)
    return _noted(settings, work, "template.pin" if pinned else "template.unpin", template)


def _noted(
    settings: "Settings", work: Coroutine[Any, Any, int], action: str, target: str, **details: Any
) -> int:
    """Run what changes something, with a row in the audit log."""
    from runner_service.commands import access  # noqa: PLC0415

    return run_async(access.noted(settings, work, action, target, **details))
