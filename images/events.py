"""What a bake tells while it works: a stream of events for progress bars and logs."""

from collections.abc import Callable

import msgspec


class BakeEvent(msgspec.Struct, frozen=True):
    """``step`` is stable: ``packages``, ``rootfs``, ``boot``, ``warm: NAME``, ``snapshot`` …
    ``message`` is for people, ``fraction`` 0 to 1 of the step when known, ``log`` a line of its output."""

    step: str
    message: str
    fraction: float | None = None
    log: str | None = None


Progress = Callable[[BakeEvent], None]


class Step:
    """One step's voice. Calling it says a message; ``log`` passes a line of output on."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.name = name
        self.progress = progress
        self._message = ""

    def __call__(self, message: str, fraction: float | None = None) -> None:
        self._message = message
        self.progress(BakeEvent(step=self.name, message=message, fraction=fraction))

    def log(self, line: str, fraction: float | None = None) -> None:
        self.progress(BakeEvent(step=self.name, message=self._message, fraction=fraction, log=line))
