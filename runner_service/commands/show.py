"""Tables, JSON and times for people: how the commands print."""

import os
import re
import sys
import time
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A terminal obeys more than colours; the log comes from a guest, so only colours pass.
_ESCAPES = re.compile(rb"\x1b\[[0-9;]*m|(\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\)|[^\[])|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]|\xc2[\x80-\x9f])", re.S)  # fmt: skip  # noqa: E501


def console() -> Console:
    """Where tables go; wide enough not to fold when the output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def print_json(value: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str, right: Sequence[str] = ()
) -> None:
    """Print rows, or the sentence ``empty``. Cells are shown as they are: no markup from a job's name."""
    if not rows:
        sys.stdout.write(empty + "\n")
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text("-" if cell is None or cell == "" else str(cell)) for cell in row))
    console().print(shown)


def ago(at: float | None) -> str:
    """``12s``, ``3m``, ``2h`` since Unix time ``at``."""
    return "-" if at is None else span(max(0.0, time.time() - at))


def span(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def duration(seconds: float) -> str:
    """``12 ms``, ``1.2 s``, ``3 min 5 s``, ``2 h 3 min``: as exact as it is short."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def line(text: str) -> None:
    """A line of text as it is, but for what a terminal would obey."""
    sys.stdout.write("".join(one for one in text if one.isprintable()) + "\n")


def mib(count: int | None) -> str:
    return "-" if count is None else f"{count / (1 << 20):.1f}"


def both(first: int | None, second: int | None) -> str:
    """Two sizes in MiB as ``1.0/2.5``."""
    return "-" if first is None or second is None else f"{mib(first)}/{mib(second)}"


def seconds(count: float | None) -> str:
    return "-" if count is None else f"{count:.1f}"


def left(until: float) -> str:
    """``12s``, ``3m``, ``2h`` until Unix time ``until``."""
    return span(max(0.0, until - time.time()))


def write(data: bytes) -> None:
    """All of ``data`` to stdout, as it is. Blocks while the reader is slow."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def for_terminal(data: bytes) -> bytes:
    """``data`` without what could move the cursor, retitle the window or worse; colours stay."""
    return _ESCAPES.sub(lambda found: b"" if found.group(1) is not None else found.group(0), data)
