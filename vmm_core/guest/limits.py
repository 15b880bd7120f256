"""How much of the host's work one guest may cause: useless input on a budget, the event loop's time by share."""

import time

from vmm_core.errors import GuestProtocolError
from vmm_core.guest import wire

USELESS_FRAMES = 2048  # at most so many at once; what an earlier connection left over is less
USELESS_FRAMES_PER_S = 16
USELESS_BYTES = 2 << 20
USELESS_BYTES_PER_S = 64 << 10

TURN = 100e-6  # seconds of work for one guest before the event loop turns to others
RATE = 1 / 8  # of the loop's time, while a guest has more to say than it leaves to others
BURST = 10e-3  # seconds of work that pass without a pause

STEP_FRAMES = 16  # looked at between two looks at the clock
STEP_BYTES = 16 << 10


class Budget:
    """How much useless input is tolerated: a bucket of frames and one of bytes, which fill up slowly."""

    def __init__(self, now: float) -> None:
        self._then = now
        self._frames = float(USELESS_FRAMES)
        self._bytes = float(USELESS_BYTES)
        self.frames = 0
        self.bytes = 0

    def spend(self, now: float, frames: int, size: int) -> None:
        """Raises GuestProtocolError when there is too much of it."""
        passed, self._then = now - self._then, now
        self._frames = min(USELESS_FRAMES, self._frames + passed * USELESS_FRAMES_PER_S) - frames
        self._bytes = min(USELESS_BYTES, self._bytes + passed * USELESS_BYTES_PER_S) - size
        self.frames += frames
        self.bytes += size
        if self._frames < 0 or self._bytes < 0:
            raise GuestProtocolError(
                f"the guest floods its channel: {self.frames} useless frames, {self.bytes} useless bytes; "
                "its channel is closed, destroy it or connect again"
            )


class Share:
    """A guest's share of the event loop: turns of ``turn`` seconds, and pauses once ``burst`` is used up.

    Counts this thread's processor time, so a guest does not pay for a busy host.
    """

    def __init__(self, now: float, *, turn: float = TURN, rate: float = RATE, burst: float = BURST) -> None:
        self._then = now
        self._rate, self._burst = rate, burst
        self._left = burst
        self._turn = turn
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.thread_time()

    @property
    def over(self) -> bool:
        """Whether the turn is."""
        return time.thread_time() - self._began >= self._turn

    def end(self, now: float) -> float:
        """After a turn: how many seconds nothing shall be read from this guest."""
        spent = time.thread_time() - self._began
        passed, self._then = now - self._then, now
        self._left = min(self._burst, self._left + passed * self._rate) - spent
        return max(0.0, -self._left / self._rate)


def next_stop(data: bytes, start: int) -> int:
    """How far to read at once: a piece of ``data`` with a bounded number of bytes and frames."""
    last = min(start + STEP_BYTES, len(data))
    stop = start
    for _ in range(2 * STEP_FRAMES):  # a delimiter on each side
        stop = data.find(wire.END, stop, last) + 1
        if stop == 0:
            return last
    return stop
