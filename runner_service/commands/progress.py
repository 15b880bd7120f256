"""How a bake shows on a terminal and in a log."""

import sys
from collections.abc import Callable

from rich import progress
from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from images.events import BakeEvent


class Progress:
    """Live bars on a terminal, else a line per message; either way on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars: progress.Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = ""

    def __enter__(self) -> Callable[[BakeEvent], None]:
        if not self._console.is_terminal:
            return self._line
        self._bars = progress.Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.fields[step]:<14}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
        )
        self._bars.start()
        return self._bar

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bars is not None:
            if kind is None:
                for task in self._tasks.values():
                    self._bars.update(task, total=1.0, completed=1.0)
            self._bars.stop()

    def _bar(self, event: BakeEvent) -> None:
        bars = self._bars
        if bars is None:
            return
        task = self._tasks.get(event.step)
        if task is None:
            for earlier in self._tasks.values():
                bars.update(earlier, total=1.0, completed=1.0)
            task = self._tasks[event.step] = bars.add_task("", total=None, step=event.step[:14])
        text = (event.log or event.message).strip()[-100:]
        if event.fraction is not None:
            bars.update(task, description=text, total=1.0, completed=event.fraction)
        else:
            bars.update(task, description=text)

    def _line(self, event: BakeEvent) -> None:
        text = f"{event.step}: {event.log if event.log is not None else event.message}"
        if text != self._last:
            self._last = text
            sys.stderr.write(text + "\n")
