"""The firewall's table and the host's forwarding, shared by every pool of the host: made by the first, removed by
the last.

Pools are counted without a counter, which a crash would leave wrong: each holds ``network.users`` shared, and
who gets it alone is the last. ``network.lock`` is held while the table is made or removed, so that no pool
opens while another cleans up.
"""

import asyncio
import contextlib
import fcntl
import os
from pathlib import Path

from vmm_core.errors import SlotsUnavailable
from vmm_core.network.claims import Claims
from vmm_core.network.firewall import Firewall
from vmm_core.network.host import Forwarding, least_mtu
from vmm_core.network.rules import usual_connections

_TURN_SECONDS = 30.0
_POLL_SECONDS = 0.02


class HostTable:
    """This process's share of the table."""

    def __init__(self, firewall: Firewall, run_dir: Path) -> None:
        run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._firewall = firewall
        self._forwarding = Forwarding(run_dir)
        self._forwarding6 = Forwarding(run_dir, ipv6=True)
        self._ipv6 = False
        self._routed: tuple[set[str], set[str]] = (set(), set())
        self._mtu = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._turn = os.open(run_dir / "network.lock", flags, 0o600)
        self._users = os.open(run_dir / "network.users", flags, 0o600)

    async def join(self) -> None:
        """Make the table, or bring its rules up to date; from here on it stays while this pool is open."""
        with await self._take_turn():
            fcntl.flock(self._users, fcntl.LOCK_SH)
            await self._load()

    async def serve_ipv6(self) -> None:
        """Let IPv6 through from now on, for the slots that have it. Raises SlotsUnavailable where that can not be."""
        if self._ipv6:
            return
        with await self._take_turn():
            self._forwarding6.on()
            self._ipv6 = True
            await self._load()

    async def restore(self) -> bool:
        """Load the rules again when somebody removed the table (all elements are gone then: True) or when the
        host has other interfaces that lead somewhere, or leads there in other pieces."""
        with await self._take_turn():
            gone = not await self._firewall.exists()
            if gone or self._forwarded() != self._routed or least_mtu() != self._mtu:
                await self._load()
        return gone

    async def _load(self) -> None:
        self._routed, self._mtu = self._forwarded(), least_mtu()
        await self._firewall.load(usual_connections(), *self._routed, mtu=self._mtu)

    def _forwarded(self) -> tuple[set[str], set[str]]:
        six = self._forwarding6.on() if self._ipv6 else self._forwarding6.changed()
        return self._forwarding.on(), six

    async def leave(self, claims: Claims) -> None:
        """Give up the claims' locks and this pool's share; the last one on a host without claims removes all."""
        with await self._take_turn():
            claims.leave()
            try:
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            try:
                if not claims.numbers():
                    await self._firewall.drop()
                    self._forwarding.back()
                    self._forwarding6.back()
            finally:
                fcntl.flock(self._users, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._turn)
        os.close(self._users)

    async def _take_turn(self) -> contextlib.ExitStack:
        until = asyncio.get_running_loop().time() + _TURN_SECONDS
        while True:
            try:
                fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if asyncio.get_running_loop().time() > until:
                    raise SlotsUnavailable(
                        f"another process has held {self._run_dir}/network.lock for {_TURN_SECONDS:.0f} s; "
                        "see which one (fuser), and end it"
                    ) from None
                await asyncio.sleep(_POLL_SECONDS)
            else:
                stack = contextlib.ExitStack()
                stack.callback(fcntl.flock, self._turn, fcntl.LOCK_UN)
                return stack
