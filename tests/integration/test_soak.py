"""A thousand jobs through the whole service, with everything going wrong that does, and twenty real SIGKILLs.

The seed is told when it fails; ``MICROVM_TEST_SEED=7`` plays that one, ``MICROVM_TEST_JOBS`` fewer or more jobs.
"""

import asyncio
import os
import secrets
from pathlib import Path

import pytest

from tests.integration.soak import Scale, Soak

pytestmark = pytest.mark.anyio
SEED = int(os.environ.get("MICROVM_TEST_SEED", "0")) or secrets.randbelow(1_000_000) + 1
JOBS = int(os.environ.get("MICROVM_TEST_JOBS", "1000"))
# A thousand jobs take most of a minute on two cores of their own; beside others they may take longer.
PLAY_SECONDS = 400.0
OVER_SECONDS = 90.0


async def test_every_job_runs_once_or_has_a_true_reason_and_nothing_is_left(tmp_path: Path) -> None:
    async with Soak.open(tmp_path, SEED, Scale.of(JOBS)) as soak:
        try:
            async with asyncio.timeout(PLAY_SECONDS):
                await soak.play()
            soak.calm()
            left = await soak.until_over(OVER_SECONDS)
        except TimeoutError:
            left = [f"only {soak.ended} of {JOBS} jobs ended in {PLAY_SECONDS:.0f} s"]
        wrong = await soak.wrong()
        print(soak.summary())
    assert not left, f"seed {SEED}: left behind: {left[:20]}"
    assert not wrong, f"seed {SEED}: {len(wrong)} things are wrong: {wrong[:20]}"
