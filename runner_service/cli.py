"""The ``microvm`` command. Everything heavy is imported by the command that needs it, so ``--help`` is quick."""

import asyncio
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
from rich_click import RichGroup

from runner_service.access_cli import audit, tokens
from runner_service.frozen_cli import frozen, shell
from runner_service.operations_cli import drain, reload_settings
from runner_service.options import (
    api_option,
    config_option,
    data_dir_option,
    json_option,
    run_async,
    settings_of,
)
from runner_service.templates_cli import templates

_OURS = ("vmm_core.", "images.", "github_webhook.", "runner_service.")
_USAGE = ("SettingsError", "RecipeError", "ServiceBusyError", "BadRequest")


class _Group(RichGroup):
    """Commands in the order of first use, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="microvm-runner", prog_name="microvm")
def cli() -> None:
    """One ephemeral microVM per CI job, forked in milliseconds from a warm parent.

    Start with `microvm doctor`, then `microvm bake python-ci` and `microvm run python-ci -- python3 --version`.
    """


def main() -> NoReturn:
    """Entry point: expected errors become one sentence and an exit code (2 wrong use, 1 failure)."""
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing to say, nobody to say it to.
        sys.stderr.close()
        sys.exit(141)
    except Exception as error:
        if not _expected(error):
            raise
        click.echo(f"microvm: {error}", err=True)
        sys.exit(2 if type(error).__name__ in _USAGE else 1)


def _expected(error: Exception) -> bool:
    """Errors that our packages raise on purpose say what to do; any other is a fault of ours and shows itself."""
    return f"{type(error).__module__}.".startswith(_OURS)


# ── this host ────────────────────────────────────────────────────────────────────────────────────


@cli.command()
@config_option
@data_dir_option
@json_option
def doctor(*, config: Path | None, data_dir: Path | None, as_json: bool) -> int:
    """Tell what this host offers, what is missing, and what to do about it."""
    from runner_service.commands import host  # noqa: PLC0415

    return run_async(host.doctor(settings_of(config, data_dir).data_dir, as_json=as_json))


@cli.command()
@click.argument("recipe", required=False)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace a value of the recipe; repeatable.",
)
@click.option("--force", is_flag=True, help="Bake again even if a template of the same inputs exists.")
@click.option(
    "--repo", "url", metavar="URL", help="Bake the parent of this repository (URL or path) instead."
)
@click.option("--ref", help="With --repo: branch, tag or commit. Default: the default branch.")
@click.option("--branch", help="With --repo: the branch it is the parent of, where --ref is no branch.")
@click.option(
    "--name", metavar="OWNER/REPO", help="With --repo: its name. Default: the last two parts of URL."
)
@click.option("--server", metavar="URL", help="With --repo: the forge as jobs see it. Default: as in URL.")
@click.option("--template", help="With --repo: the base template. Default: the settings' default_template.")
@click.option(
    "--credential-stdin", is_flag=True, help='With --repo: read {"username": …, "password": …} from stdin.'
)
@config_option
@data_dir_option
@json_option
def bake(
    *,
    recipe: str | None,
    overrides: tuple[str, ...],
    force: bool,
    url: str | None,
    ref: str | None,
    branch: str | None,
    name: str | None,
    server: str | None,
    template: str | None,
    credential_stdin: bool,
    config: Path | None,
    data_dir: Path | None,
    as_json: bool,
) -> int:
    """Make a template from RECIPE: a shipped recipe's name (minimal, python-ci, node-ci, github-runner) or a YAML file.

    With --repo: make the parent of a repository, in which its dependencies are installed, as a fork of a template.
    """
    settings = settings_of(config, data_dir)
    if url is not None:
        from runner_service.commands import repository  # noqa: PLC0415

        if recipe is not None or overrides:
            raise click.UsageError(
                "RECIPE and --set do not go with --repo: its base is named with --template"
            )
        wish = repository.Wish(
            url=url,
            ref=ref,
            branch=branch,
            name=name,
            server=server,
            template=template,
            force=force,
            credential_stdin=credential_stdin,
        )
        return run_async(repository.bake(settings, wish, as_json=as_json))
    if recipe is None:
        raise click.UsageError("name a RECIPE, or a repository with --repo: microvm bake python-ci")
    if any((ref, branch, name, server, template, credential_stdin)):
        raise click.UsageError(
            "--ref, --branch, --name, --server, --template and --credential-stdin go with --repo"
        )
    from runner_service.commands import host  # noqa: PLC0415

    pairs: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise click.BadParameter(f"'{override}' is not KEY=VALUE", param_hint="--set")
        pairs[key] = value
    return run_async(host.bake(settings.data_dir, recipe, pairs, force=force, as_json=as_json))


cli.add_command(templates)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("template")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--user", default="runner", show_default=True, help="User of the guest to run as.")
@click.option("--cwd", help="Directory of the guest to run in. Default: the user's home.")
@click.option("--env", "environment", multiple=True, metavar="NAME=VALUE", help="Set a variable; repeatable.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), help="End the command after so many seconds (exit code 124)."
)
@click.option("--timings", is_flag=True, help="Tell on stderr how long the fork took.")
@config_option
@data_dir_option
def run(
    *,
    template: str,
    command: tuple[str, ...],
    user: str,
    cwd: str | None,
    environment: tuple[str, ...],
    timeout: float | None,
    timings: bool,
    config: Path | None,
    data_dir: Path | None,
) -> int:
    """Fork TEMPLATE, run COMMAND in it with this terminal's input and output, destroy it.

    The exit code is that of the command. Example: microvm run python-ci -- pytest -q
    """
    from runner_service.commands import attached  # noqa: PLC0415

    env: dict[str, str] = {}
    for pair in environment:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"'{pair}' is not NAME=VALUE", param_hint="--env")
        env[name] = value
    if command[0].startswith("-") and command[0] != "--":
        raise click.UsageError(
            f"'{command[0]}' stands after the template: options go before it, a command of that name after --"
        )
    argv = command[1:] if command[0] == "--" else command
    if not argv:
        raise click.UsageError("a command is missing: microvm run TEMPLATE -- COMMAND")
    wish = attached.Wish(template, tuple(argv), user=user, cwd=cwd, env=env, timeout=timeout, timings=timings)
    return run_async(attached.run(settings_of(config, data_dir).data_dir, wish))


# ── the service ──────────────────────────────────────────────────────────────────────────────────


@cli.command()
@config_option
@data_dir_option
def serve(*, config: Path | None, data_dir: Path | None) -> int:
    """Run the service: take webhooks, fork a VM per job, until SIGTERM. VMs outlive it and are adopted again.

    SIGTERM lets jobs finish for [service] stop_grace_s, a second one ends it at once. SIGHUP reads the settings again.
    """
    from runner_service import daemon  # noqa: PLC0415

    load = partial(settings_of, config, data_dir)
    asyncio.run(daemon.serve(load(), load))
    return 0


@cli.command()
@config_option
@data_dir_option
@api_option
@json_option
def ps(*, config: Path | None, data_dir: Path | None, api: str | None, as_json: bool) -> int:
    """List the VMs of this host and what they cost."""
    from runner_service.commands import service  # noqa: PLC0415

    return run_async(service.ps(settings_of(config, data_dir), api, as_json=as_json))


@cli.command()
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most."
)
@config_option
@data_dir_option
@api_option
@json_option
def jobs(*, limit: int, config: Path | None, data_dir: Path | None, api: str | None, as_json: bool) -> int:
    """List the newest jobs."""
    from runner_service.commands import service  # noqa: PLC0415

    return run_async(service.jobs(settings_of(config, data_dir), api, limit, as_json=as_json))


@cli.command()
@click.argument("job")
@config_option
@data_dir_option
@api_option
@json_option
def why(*, job: str, config: Path | None, data_dir: Path | None, api: str | None, as_json: bool) -> int:
    """Tell where the time of JOB went, what it waits for and what ends that, and every step.

    JOB is an id of `microvm jobs`, the forge's id, the address of its page, a runner, or owner/repo#name (the newest).
    """
    from runner_service.commands import service  # noqa: PLC0415

    return run_async(service.why(settings_of(config, data_dir), api, job, as_json=as_json))


@cli.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job's runner has ended.")
@config_option
@data_dir_option
@api_option
def logs(*, job: str, follow: bool, config: Path | None, data_dir: Path | None, api: str | None) -> int:
    """Print the log of JOB's runner."""
    from runner_service.commands import service  # noqa: PLC0415

    return run_async(service.logs(settings_of(config, data_dir), api, job, follow=follow))


@cli.group(cls=_Group, invoke_without_command=True)
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many at most."
)
@config_option
@data_dir_option
@api_option
@json_option
@click.pass_context
def bakes(
    context: click.Context,
    *,
    limit: int,
    config: Path | None,
    data_dir: Path | None,
    api: str | None,
    as_json: bool,
) -> int:
    """List the newest bakes of repositories' parents: what made them, what became of them, why they failed."""
    if context.invoked_subcommand is not None:
        if config or data_dir or api or as_json:
            raise click.UsageError("options go after the command: microvm bakes log … --data-dir DIR")
        return 0
    from runner_service.commands import bakes as commands  # noqa: PLC0415

    return run_async(commands.bakes(settings_of(config, data_dir), api, limit, as_json=as_json))


@bakes.command("log")
@click.argument("number", metavar="BAKE", type=click.IntRange(min=0))
@click.option("-f", "--follow", is_flag=True, help="Go on until the bake is over.")
@config_option
@data_dir_option
@api_option
def bakes_log(
    *, number: int, follow: bool, config: Path | None, data_dir: Path | None, api: str | None
) -> int:
    """Print the log of BAKE, all its attempts."""
    from runner_service.commands import bakes as commands  # noqa: PLC0415

    return run_async(commands.log(settings_of(config, data_dir), api, number, follow=follow))


@cli.command()
@click.argument("vm")
@config_option
@data_dir_option
@api_option
def kill(*, vm: str, config: Path | None, data_dir: Path | None, api: str | None) -> int:
    """End VM at once; a job on it fails."""
    from runner_service.commands import service  # noqa: PLC0415

    return run_async(service.kill(settings_of(config, data_dir), api, vm))


cli.add_command(frozen)
cli.add_command(shell)
cli.add_command(drain)
cli.add_command(reload_settings)
cli.add_command(tokens)
cli.add_command(audit)


if __name__ == "__main__":
    main()
