"""Circuit breakers: after failures in a row that are not about one request, calls fail at once until one succeeds.

    closed ──failures in a row──► open ──its pause is over──► probing: one call goes through, others fail at once
      ▲                            ▲                              │
      └────────any answer──────────┴──────it fails: twice the pause, five minutes at most

Three kinds, each with its own failures: one a *place* (a repository the App is not installed on), one an *account*
(who shares credentials and limits), and one for the address, which opens only when the calls of several accounts
fail and nobody's get through: the trouble of one account never delays another.
"""

import time
from collections.abc import Callable

import msgspec
import structlog

from github_webhook.errors import ForgeError, NotInstalled, Suspended, Unauthorized, Unavailable

log = structlog.get_logger("circuit")

ADDRESS = ""
IN_A_ROW = 5
AT_LEAST_SECONDS = 2.0
"""Five failures in one instant are one failure."""

FIRST_PAUSE = 2.0
LONGEST_PAUSE = 300.0
PROBE_SECONDS = 60.0
"""A probe nobody tells the end of is over after this."""

MAX_CIRCUITS = 4096


class Held(msgspec.Struct, frozen=True):
    """Calls that are not made now. ``who`` is "" when it is the whole address; times are Unix seconds.

    ``until`` is when the next one may be tried; ``hint`` is what the failed call was about.
    """

    who: str
    code: str
    reason: str
    since: float
    until: float
    hint: object = None


class _Circuit(msgspec.Struct):
    error: ForgeError
    failures: int = 0
    first: float = 0.0
    accounts: set[str] = set()
    opened: float | None = None
    until: float = 0.0
    tries: int = 0
    probing: float | None = None
    hint: object = None
    reason: str = ""


class Circuits:
    """All circuits of one address. ``changed`` is called when one opens or closes."""

    def __init__(self, *, changed: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.time):
        self.changed = changed
        self._clock = clock
        self._circuits: dict[str, _Circuit] = {}

    def admit(self, account: str, place: str = "") -> None:
        """Let a call go out, perhaps as the probe; or raise the error of the last one, with ``retry_at``."""
        now = self._clock()
        found = [self._circuits[key] for key in _keys(account, place) if key in self._circuits]
        for circuit in found:
            if circuit.opened is not None and not _ready(circuit, now):
                raise _refusal(circuit, now)
        for circuit in found:
            if circuit.opened is not None:
                circuit.probing = now

    def answered(self, account: str, place: str = "") -> None:
        """The forge answered, be it with a refusal of this one request: it lives and knows us."""
        for key in _keys(account, place):
            self._close(key)

    def failed(self, account: str, error: ForgeError, *, place: str = "", hint: object = None) -> None:
        """A call failed. Errors about one request are answers; the others count here."""
        if isinstance(error, NotInstalled):
            self._close(ADDRESS)
            self._count(place or account, account, error, hint)
            probed = self._circuits.get(account)
            if probed is not None and probed.probing is not None:
                self._open(account, probed)
        elif isinstance(error, Suspended | Unauthorized):
            self._close(ADDRESS)
            self._count(account, account, error, hint)
        elif isinstance(error, Unavailable):
            self._count(account, account, error, hint)
            self._count(ADDRESS, account, error, hint)
        else:
            self.answered(account, place)

    def abandoned(self, account: str, place: str = "") -> None:
        """A call was given up by its caller: that says nothing; another one may probe."""
        for key in _keys(account, place):
            if key in self._circuits:
                self._circuits[key].probing = None

    def hold(self, account: str, error: ForgeError, hint: object = None) -> None:
        """Open the account's circuit now: an event said so."""
        self._make_room()
        circuit = self._circuits.setdefault(account, _Circuit(error))
        circuit.error, circuit.hint = error, hint or circuit.hint
        self._open(account, circuit)

    def lift(self, account: str) -> None:
        """Close whatever holds the account and its places back: an event said so."""
        for key in [key for key in self._circuits if key == account or key.startswith(f"{account} ")]:
            self._close(key)

    def held(self, account: str, place: str = "") -> Held | None:
        """Why calls of this account (and place) are not made now; also while the next try is due or under way.

        What nobody can probe (there is no hint what to ask for) is held until its pause is over.
        """
        now = self._clock()
        for key in _keys(account, place):
            circuit = self._circuits.get(key)
            if circuit is None or circuit.opened is None:
                continue
            if circuit.hint is not None or not _ready(circuit, now):
                return _held(key, circuit)
        return None

    def all(self) -> list[Held]:
        """Everything that is held back now, the address first."""
        held = (_held(key, one) for key, one in self._circuits.items() if one.opened is not None)
        return sorted(held, key=lambda one: one.who)

    def _count(self, key: str, account: str, error: ForgeError, hint: object) -> None:
        now = self._clock()
        self._make_room()
        circuit = self._circuits.setdefault(key, _Circuit(error, first=now))
        circuit.failures += 1
        circuit.accounts.add(account)
        circuit.error, circuit.hint = error, hint
        if circuit.opened is not None:
            # Calls that were under way when it opened say nothing new: only the probe counts.
            if circuit.probing is not None:
                self._open(key, circuit)
        elif _enough(key, circuit, now):
            self._open(key, circuit)

    def _open(self, key: str, circuit: _Circuit) -> None:
        now = self._clock()
        news = circuit.opened is None
        circuit.opened = now if circuit.opened is None else circuit.opened
        circuit.tries += 1
        circuit.probing = None
        circuit.until = now + min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(circuit.tries - 1, 10))
        if news:
            circuit.reason = _reason(circuit)
            log.warning(
                "circuit_open", who=key or "the address", code=circuit.error.code, error=str(circuit.error)
            )
            self.changed()

    def _close(self, key: str) -> None:
        circuit = self._circuits.pop(key, None)
        if circuit is not None and circuit.opened is not None:
            log.info(
                "circuit_closed", who=key or "the address", seconds=round(self._clock() - circuit.opened, 1)
            )
            self.changed()

    def _make_room(self) -> None:
        if len(self._circuits) >= MAX_CIRCUITS:
            closed = next((key for key, one in self._circuits.items() if one.opened is None), None)
            self._circuits.pop(closed or next(iter(self._circuits)))


def _keys(account: str, place: str) -> list[str]:
    return [ADDRESS, account, *([place] if place else [])]


def _ready(circuit: _Circuit, now: float) -> bool:
    """Whether a probe may go out."""
    under_way = circuit.probing is not None and now < circuit.probing + PROBE_SECONDS
    return now >= circuit.until and not under_way


def _enough(key: str, circuit: _Circuit, now: float) -> bool:
    """Whether it is more than one request's bad luck. What GitHub says of an installation is true at once."""
    error = circuit.error
    if isinstance(error, NotInstalled | Suspended):
        return True
    if isinstance(error, Unauthorized):
        return circuit.failures >= 2
    in_a_row = circuit.failures >= IN_A_ROW and now - circuit.first >= AT_LEAST_SECONDS
    return in_a_row and (key != ADDRESS or len(circuit.accounts) > 1)


def _reason(circuit: _Circuit) -> str:
    if isinstance(circuit.error, Unavailable):
        return f"{circuit.failures} calls in a row failed, the last one: {circuit.error}"
    return str(circuit.error)


def _held(key: str, circuit: _Circuit) -> Held:
    since = circuit.opened or circuit.first
    return Held(key, circuit.error.code, circuit.reason, since, circuit.until, circuit.hint)


def _refusal(circuit: _Circuit, now: float) -> ForgeError:
    error = circuit.error
    until = max(circuit.until, now + 1.0)
    # Without the seconds: who tells of it once more must not tell something new each time.
    text = f"held back for now, not called: {circuit.reason}"
    return type(error)(text[:800], status=error.status, retryable=True, retry_at=until)
