"""Options that commands share, and what follows from them."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from runner_service.settings import Settings

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
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def settings_of(config: Path | None, data_dir: Path | None) -> "Settings":
    """The settings, with the data directory of the command line if one was given."""
    import msgspec  # noqa: PLC0415

    from runner_service import settings  # noqa: PLC0415

    found = settings.load(config)
    if data_dir is None:
        return found
    service = msgspec.structs.replace(found.service, data_dir=str(data_dir))
    return msgspec.structs.replace(found, service=service)


def run_async(coroutine: Coroutine[Any, Any, int | None]) -> int:
    """Run a command's coroutine; its answer is the exit code."""
    return asyncio.run(coroutine) or 0
