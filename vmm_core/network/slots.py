"""Numbered network slots: prepared ahead, handed out by a deque operation, torn out and laid anew after use.

    free ──claim──► preparing ──► ready ──take──► taken ──give_back──► returned ──► free
                                                    │ ▲
                           service ends, VM lives ──┘ └── adopt
    free → preparing     the refill task claims the lowest free number of the host (claims.py) and lays it
    preparing → ready    namespace, veth, tap, addresses are there (builder_process.py); nothing may pass yet
    ready → taken        the claim names its owner; ``open_to`` puts its elements into the firewall
    taken → returned     its elements are gone, so nothing passes any more
    returned → free      namespace, interfaces, connections and counters are gone, then the claim

A slot is never used twice as it is: tearing it out leaves nothing of the last guest to scrub.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path

from vmm_core.errors import BadRequest, HostUnfit, SlotsExhausted, SlotsUnavailable
from vmm_core.machine import Network
from vmm_core.network import egress, host
from vmm_core.network.addresses import SLOTS, Slot, slot
from vmm_core.network.builder import Builder
from vmm_core.network.claims import RUN_DIR, Claims
from vmm_core.network.firewall import Element, Firewall
from vmm_core.network.names import Lookup, Names
from vmm_core.network.place import NetworkUsage, Orphan, Place
from vmm_core.network.table import HostTable

__all__ = ["SLOTS", "NetworkUsage", "Orphan", "Slot", "SlotPool", "slot"]

_log = logging.getLogger(__name__)

_CHUNK = 4
"""Slots laid in one request: what a bandwidth limit or a tap has to wait for at most (25 ms)."""
_TAKE_SECONDS = 30.0
_LOOK_SECONDS = 20.0
_RETRY_SECONDS = 2.0
_ANNOUNCE_SECONDS = 3600.0
"""A guest keeps an announced IPv6 router for 18 hours."""


class SlotPool:
    """The slots of one process. Open with ``SlotPool.open``; slots still taken at the end stay as they are."""

    def __init__(self, size: int, resolvers: Sequence[str], run_dir: Path, lookup: Lookup | None) -> None:
        self.size = size
        self._resolvers = tuple(resolvers)
        self._claims = Claims(run_dir)
        self._firewall = Firewall()
        self._table = HostTable(self._firewall, run_dir)
        self._builder = Builder()
        self._names = Names(lookup)
        self._ready: deque[Place] = deque()
        self._taken: dict[int, Place] = {}
        self._returned: list[Place] = []
        self._failed: list[Place] = []
        self._own = host.own_addresses()
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._waiting = 0
        self._failure: HostUnfit | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        size: int,
        *,
        resolvers: Sequence[str] | None = None,
        run_dir: Path = RUN_DIR,
        lookup: Lookup | None = None,
    ) -> AsyncGenerator["SlotPool"]:
        """A pool that keeps ``size`` slots ready. ``resolvers`` are IPv4 name servers for machines open to the
        internet (None: the host's). Raises SlotsUnavailable when this host can not have slots."""
        reason = await host.usable()
        if reason is not None:
            raise SlotsUnavailable(f"network slots can not be used: {reason}")
        pool = cls(size, host.resolvers() if resolvers is None else resolvers, run_dir, lookup)
        tasks: list[asyncio.Task[None]] = []
        try:
            await pool._table.join()
            tasks = [asyncio.create_task(pool._keep_filled()), asyncio.create_task(pool._look_after())]
            yield pool
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await pool._leave()

    @property
    def ready(self) -> int:
        """How many slots could be handed out at once."""
        return len(self._ready)

    async def take(self, owner: str = "") -> Slot:
        """A prepared slot, for ``owner`` (the VM's directory). Waits only when none is ready.

        Raises SlotsExhausted when the host has no number left, SlotsUnavailable when none can be prepared.
        """
        if not self._ready:
            await self._await_ready()
        place = self._ready.popleft()
        self._wake.set()
        self._taken[place.slot.number] = place
        self._claims.assign(place.slot.number, owner)
        return place.slot

    def assign(self, place: Slot, owner: str) -> None:
        """Write down whose a taken slot is now (the VM's directory): what ``adopt`` will ask for."""
        self._claims.assign(place.number, owner)

    def check(self, network: Network) -> None:
        """Raise BadRequest unless a slot can serve ``network`` without opening the host."""
        egress.check_network(network, self._own)

    async def give_back(self, given: Slot) -> None:
        """Close the slot's network at once; the rest of it goes in the background. No process may live in it."""
        place = self._taken.pop(given.number, None)
        if place is None:
            return
        place.close()
        try:
            async with place.lock:
                await self._replace(place, frozenset())
        except SlotsUnavailable as error:
            # Nothing passes without its interface, which goes in a moment; its elements are looked for then.
            _log.warning("slot %d not closed yet: %s", given.number, error)
        finally:
            self._returned.append(place)
            self._wake.set()

    async def adopt(self, number: int, owner: str, network: Network | None = None) -> Slot:
        """Hold the slot of a VM that outlived its service. Raises BadRequest unless it is ``owner``'s and free.

        What the firewall holds for it stays in force, and follows ``network`` (None: nothing) from now on: names
        that move, a table that was flushed. ``open_to`` may change it.
        """
        place = Place(slot(number))
        found = self._claims.owner(number)
        if found != owner:
            raise BadRequest(
                f"slot {number} is {found or 'nobody'}'s and not {owner}'s: its VM can not be adopted"
            )
        if not self._claims.take_over(number):
            raise BadRequest(f"slot {number} is held by another process; one service at a time adopts a VM")
        place.elements = place.mbit = None
        place.network = network or Network()
        self._taken[number] = place
        return place.slot

    async def open_to(self, given: Slot, network: Network) -> None:
        """Open a taken slot to ``network`` and nothing else, in one transaction.

        Raises BadRequest for a policy that would open the host, before anything changes.
        """
        place = self._taken[given.number]
        egress.check_network(network, self._own)
        targets = await self._names.targets(egress.names(network))
        async with place.lock:
            if place.mbit != network.mbit:
                await self._builder.limit(given.number, network.mbit)
                place.mbit = network.mbit
            if network.ipv6:
                await self._announce_ipv6(place)
            await self._apply(place, network, targets)

    async def tap_fd(self, given: Slot) -> int:
        """A descriptor of the slot's tap; the caller closes it. Only one can be open at a time."""
        place = self._taken[given.number]
        fd, place.tap = place.tap, -1
        return fd if fd >= 0 else await self._builder.tap(given.number)

    def usage(self, given: Slot) -> NetworkUsage:
        """What the machine in the slot sent and received. Raises OSError when the slot is gone."""
        return NetworkUsage(*host.counted(given))

    def owner(self, number: int) -> str | None:
        """Whom a claimed slot is for; None for a free one."""
        return self._claims.owner(number)

    def held(self, number: int) -> bool:
        """Whether a living process, this one included, has the slot."""
        return self._claims.locked(number)

    def claimed_for(self, owner: str) -> list[int]:
        """The slots that no living process has and that are ``owner``'s. Reads every claim of the host."""
        numbers = [number for number in self._claims.numbers() if self._claims.owner(number) == owner]
        return [number for number in numbers if not self._claims.locked(number)]

    async def orphans(self) -> list[Orphan]:
        """Slots (claims, namespaces, interfaces, elements) that no living process holds and none lives in.

        One may be an instant's: a slot that another process is claiming just now. Reap what is seen twice.
        """
        known = set(self._claims.numbers()) | host.laid() | set(await self._firewall.elements())
        loose = {number for number in known if not self._claims.locked(number)}
        living = await host.inhabited(loose)
        # One that was just being torn out when it was listed has nothing left by now.
        still = set(self._claims.numbers()) | host.laid() | set(await self._firewall.elements())
        empty = sorted(number for number in (loose - living) & still if not self._claims.locked(number))
        return [Orphan(number, self._claims.owner(number) or "") for number in empty]

    async def reap(self, number: int) -> bool:
        """Remove all there is of an orphan; False when it has an owner or a process by now."""
        return number in await self.reap_all([number])

    async def reap_all(self, numbers: Sequence[int]) -> set[int]:
        """Remove all there is of these orphans, but for those that have an owner or a process by now."""
        living = await host.inhabited(numbers)
        held = await self._firewall.elements()
        empty = [number for number in numbers if number not in living and not self._claims.locked(number)]
        taken = [number for number in empty if self._claims.take_over(number)]
        if taken:
            await self._firewall.change(remove=[each for number in taken for each in held.get(number, ())])
            await self._scrub([Place(slot(number)) for number in taken])
        return set(taken)

    # -------------------------------------------------------------- the inside

    async def _apply(self, place: Place, network: Network, targets: Mapping[str, str]) -> None:
        wanted = egress.elements(
            place.slot, network, targets=targets, resolvers=self._resolvers, own=self._own
        )
        if egress.on_loopback(wanted):
            host.serve_loopback(place.slot)
        await self._replace(place, wanted)
        place.network = network

    async def _announce_ipv6(self, place: Place) -> None:
        await self._table.serve_ipv6()
        await self._builder.ipv6(place.slot.number)
        place.announced = time.monotonic()

    async def _replace(self, place: Place, wanted: frozenset[Element]) -> None:
        held = place.elements
        if held is None:
            held = frozenset((await self._firewall.elements()).get(place.slot.number, ()))
        if held != wanted:
            place.elements = None  # until it is known that the change was made
            await self._firewall.change(wanted - held, held - wanted)
        place.elements = wanted

    async def _await_ready(self) -> None:
        self._failure = None
        self._waiting += 1
        self._wake.set()
        try:
            async with asyncio.timeout(_TAKE_SECONDS), self._changed:
                await self._changed.wait_for(lambda: self._ready or self._failure)
        except TimeoutError:
            raise SlotsUnavailable(f"no network slot became ready within {_TAKE_SECONDS:.0f} s") from None
        finally:
            self._waiting -= 1
        if not self._ready and self._failure is not None:
            raise self._failure

    async def _keep_filled(self) -> None:
        while True:
            if not self._returned and len(self._ready) >= self.size + self._waiting:
                self._wake.clear()
                await self._wake.wait()
            try:
                if self._returned and not self._waiting:
                    await self._scrub_returned()
                else:
                    await self._prepare()
            except (HostUnfit, OSError) as error:
                _log.warning("no slot prepared: %s", error)
                unfit = (
                    error if isinstance(error, HostUnfit) else SlotsUnavailable(f"no slot prepared: {error}")
                )
                async with self._changed:
                    self._failure = unfit
                    self._changed.notify_all()
                await asyncio.sleep(_RETRY_SECONDS)

    async def _prepare(self) -> None:
        missing = self.size + self._waiting - len(self._ready)
        try:
            numbers = self._claims.new(min(missing, _CHUNK))
        except SlotsExhausted:
            if not self._returned:
                raise
            await self._scrub_returned()
            return
        laid: dict[int, int] = {}
        try:
            laid, failed = await self._builder.build(numbers)
        finally:
            # Kept claimed until the next look-round: the lowest free number must be another one now.
            self._failed += [Place(slot(number)) for number in numbers if number not in laid]
        async with self._changed:
            self._ready += [Place(slot(number), tap) for number, tap in laid.items()]
            self._changed.notify_all()
        if failed:
            number, why = next(iter(failed.items()))
            raise SlotsUnavailable(f"slot {number} could not be laid: {why}")

    async def _scrub_returned(self) -> None:
        returned, self._returned = self._returned, []
        await self._scrub(returned)

    async def _scrub(self, places: list[Place]) -> None:
        numbers = [place.slot.number for place in places]
        try:
            await self._builder.remove(numbers)
            for place in places:
                await self._replace(place, frozenset())
            await self._firewall.forget_rates([place.slot for place in places])
        except BaseException:
            self._returned += places
            raise
        for number in numbers:
            self._claims.release(number)

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self.look_round()
            except (HostUnfit, OSError) as error:
                _log.warning("slots not looked after: %s", error)

    async def look_round(self) -> None:
        """Follow names that moved, routes that came, and a firewall that somebody flushed. Done by itself every
        20 s."""
        self._returned += self._failed
        self._failed = []
        self._wake.set()
        self._own = host.own_addresses()
        flushed = await self._table.restore()
        if flushed:
            _log.warning("the firewall table was gone and is restored; %d slots in use", len(self._taken))
        wanted = {number: egress.names(place.network) for number, place in self._taken.items()}
        targets = await self._names.refresh(set[str]().union(*wanted.values()))
        for number, names in wanted.items():
            place = self._taken.get(number)
            if place is not None and (flushed or names or place.network.ipv6):
                async with place.lock:
                    await self._follow(place, targets, flushed=flushed)

    async def _follow(self, place: Place, targets: Mapping[str, str], *, flushed: bool) -> None:
        if self._taken.get(place.slot.number) is not place or place.network.mode == "none":
            return
        if place.network.ipv6 and time.monotonic() - place.announced > _ANNOUNCE_SECONDS:
            await self._announce_ipv6(place)
        if flushed:
            place.elements = frozenset()
        await self._apply(place, place.network, targets)

    async def _leave(self) -> None:
        self._names.close()
        try:
            unused = [*self._ready, *self._returned, *self._failed]
            for place in (*unused, *self._taken.values()):
                place.close()
            if unused:
                await self._scrub(unused)
            await self._table.leave(self._claims)
        except (HostUnfit, OSError) as error:
            # What stays is nobody's: the next service finds it among the orphans.
            _log.warning("slots left behind: %s", error)
        finally:
            await self._builder.close()
            self._claims.leave()
            self._table.close()
