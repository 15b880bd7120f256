"""A call that GitHub's documents do not allow fails the test it is made in, whatever the stand-in answered."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.standins.github import StandinGitHub
from tests.standins.github_checked import WrongCallsError
from tests.standins.github_official import openapi
from tests.standins.github_world import OWNER, REPO, make_repository

pytestmark = pytest.mark.anyio

RUNNERS = f"/repos/{OWNER}/{REPO}/actions/runners"
RIGHT: dict[str, Any] = {"name": "one", "runner_group_id": 1, "labels": ["microvm"]}


@pytest.fixture(scope="module", autouse=True)
def documents() -> None:
    openapi()


async def call(
    tmp_path: Path, method: str, path: str, *, ours: bool = True, fault: bool = False, **how: Any
) -> int:
    """One call to a stand-in of its own; the number of calls that were checked."""
    async with StandinGitHub() as forge:
        await forge.add_repository(make_repository(tmp_path / REPO), owner=OWNER)
        if fault:
            forge.fault("*", status=502)
        headers = {"authorization": f"Bearer {forge.token}", "x-github-api-version": "2022-11-28"}
        if not ours:
            del headers["x-github-api-version"]
        async with httpx.AsyncClient(base_url=forge.url, headers=headers, trust_env=False) as http:
            await http.request(method, path, **how)
    return forge.checks.calls


async def test_right_calls_pass_and_are_counted(tmp_path: Path) -> None:
    assert await call(tmp_path, "GET", RUNNERS, params={"per_page": 10}) == 1


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("GET", RUNNERS, {"params": {"page_size": 10}}, "query parameter page_size is not documented"),
    ("GET", RUNNERS, {"params": {"per_page": "ten"}}, "per_page"),
    ("GET", f"/repos/{OWNER}/{REPO}/actions/runnerz", {}, "is not an operation"),
    ("POST", f"{RUNNERS}/generate-jitconfig", {"json": {"name": "one"}}, "'runner_group_id' is a required property"),
    ("POST", f"{RUNNERS}/generate-jitconfig", {"json": {**RIGHT, "label": "x"}}, "field label is not documented"),
    ("POST", f"{RUNNERS}/generate-jitconfig", {}, "the request has no body"),
]  # fmt: skip


@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize(("method", "path", "how", "problem"), WRONG)
async def test_a_wrong_call_fails_loudly(
    tmp_path: Path, method: str, path: str, how: dict[str, Any], problem: str, fault: bool
) -> None:
    with pytest.raises(WrongCallsError, match=problem):
        await call(tmp_path, method, path, fault=fault, **how)


async def test_what_a_test_asks_by_hand_is_its_own_business(tmp_path: Path) -> None:
    assert await call(tmp_path, "GET", "/nowhere", ours=False) == 0
