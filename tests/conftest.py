"""What every suite shares: one event loop kind, and the directory that keeps bakes between runs."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.standins import github_checked

# A test may take what it takes on a busy machine: time is measured where it is the subject.
settings.register_profile("microvm", deadline=None)
settings.load_profile("microvm")
github_checked.enforce()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Kept between runs: root file systems and templates are baked once for all their inputs."""
    return Path(os.environ.get("MICROVM_TEST_DATA", "/var/tmp/microvm-tests"))
