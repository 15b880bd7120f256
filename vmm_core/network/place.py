"""What a process knows of the slots it has, and what it tells about them."""

import asyncio
import os

import msgspec

from vmm_core.machine import Network
from vmm_core.network.addresses import Slot
from vmm_core.network.firewall import Element


class NetworkUsage(msgspec.Struct, frozen=True):
    """What a machine sent and received since it got its slot."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int


class Orphan(msgspec.Struct, frozen=True):
    """A slot that no living process holds and in which none lives. ``owner`` is whom its claim names, or ""."""

    number: int
    owner: str


class Place:
    """What this process knows of a slot it prepared or adopted. ``lock`` orders changes of its elements."""

    def __init__(self, place: Slot, tap: int = -1) -> None:
        self.slot = place
        self.tap = tap
        self.lock = asyncio.Lock()
        self.network = Network()
        self.mbit: int | None = 0
        self.announced = float("-inf")
        self.elements: frozenset[Element] | None = frozenset()
        """None: not known (adopted, or a change was interrupted); the kernel is asked."""

    def close(self) -> None:
        if self.tap >= 0:
            os.close(self.tap)
        self.tap = -1
