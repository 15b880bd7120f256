"""A guest attacks its host in every way of ``scripts.programs.attacks``; a neighbour hardly notices."""

import statistics

import pytest

from scripts.programs.attacks import ATTACKS, latencies_ms, under_attack
from vmm_core.engine import Engine
from vmm_core.machine import Snapshot

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]
COMMANDS = 12


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_neighbour_of_an_attacker_works_on(engine: Engine, networked: Snapshot, name: str) -> None:
    async with engine.fork(networked, ttl=300) as neighbour:
        await latencies_ms(neighbour, 4)
        before = await latencies_ms(neighbour, COMMANDS)
        async with under_attack(engine, networked, name) as attacker:
            begun = (await attacker.usage()).cpu_seconds
            during = await latencies_ms(neighbour, COMMANDS)
            spent = (await attacker.usage()).cpu_seconds - begun
            # It was at work all the time, or it was cut off: a quiet attack would prove nothing.
            assert attacker.channel.closed or spent > 0.2, f"the attack spent {spent} CPU seconds"
        after = await latencies_ms(neighbour, 4)
    # The bench measures the 99th percentile against the same limit; of so few samples only the middle is sure.
    assert statistics.median(during) <= 3 * statistics.median(before), (before, during)
    assert statistics.median(after) <= 3 * statistics.median(before), (before, after)
