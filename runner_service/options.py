"""Options that commands share, and what follows from them."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from runner_service.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

config_option = click.option(
    "--config",
    "config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Settings file (TOML). Default: $MICROVM_CONFIG, ./microvm.toml, /etc/microvm/microvm.toml.",
)
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data directory. Default: $MICROVM_DATA_DIR, the settings, /var/lib/microvm.",
)
_META = "runner_service.token_file"


def _keep_token_file(context: click.Context, _: click.Parameter, file: Path | None) -> None:
    context.meta[_META] = file


_api_option = click.option(
    "--api", envvar="MICROVM_API", help="Address of the service, such as http://127.0.0.1:8470."
)
_token_option = click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_keep_token_file,
    expose_value=False,
    help="File of the API token to send. Default: $MICROVM_API_TOKEN_FILE, that of the service of this host.",
)


def api_option(command: Command) -> Command:
    """Where the service is (a command's parameter ``api``), and the token for it (part of ``settings_of``)."""
    return _api_option(_token_option(command))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def settings_of(config: Path | None, data_dir: Path | None) -> "Settings":
    """The settings, with the data directory of the command line if one was given."""
    import msgspec  # noqa: PLC0415

    from runner_service import settings  # noqa: PLC0415

    found = settings.load(config)
    context = click.get_current_context(silent=True)
    if context is not None:
        found = msgspec.structs.replace(found, token_file=context.meta.get(_META))
    if data_dir is None:
        return found
    service = msgspec.structs.replace(found.service, data_dir=str(data_dir))
    return msgspec.structs.replace(found, service=service)


def run_async(coroutine: Coroutine[Any, Any, int | None]) -> int:
    """Run a command's coroutine; its answer is the exit code."""
    return asyncio.run(coroutine) or 0
