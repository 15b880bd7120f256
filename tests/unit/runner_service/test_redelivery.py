"""Lost deliveries: asked for again once they are known to be lost, a few times, and never those that arrived."""

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from github_webhook.deliveries import LostDelivery
from github_webhook.errors import NotFound, Unavailable
from runner_service import redelivery
from runner_service.redelivery import AT_ONCE, TRIES, Redeliveries
from runner_service.store import queries as q
from runner_service.store.store import Store, sqlite_url
from runner_service.telemetry import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class App:
    """The deliveries of an App, none of which ended well."""

    def __init__(self, *lost: LostDelivery) -> None:
        self.deliveries = list(lost)
        self.asked: list[int] = []
        self.since: list[float] = []
        self.trouble: Exception | None = None

    async def lost(self, *, since: float) -> Sequence[LostDelivery]:
        self.since.append(since)
        if self.trouble is not None:
            raise self.trouble
        return [one for one in self.deliveries if one.delivered_at >= since]

    async def redeliver(self, delivery_id: int) -> None:
        self.asked.append(delivery_id)


def lost(number: int, *, event: str = "workflow_job", at: float | None = None) -> LostDelivery:
    delivered_at = time.time() - 60 if at is None else at
    return LostDelivery(number, f"guid-{number}", event, "queued", delivered_at, 502)


@contextlib.asynccontextmanager
async def sweeper(tmp_path: Path, **apps: App) -> AsyncIterator[Redeliveries]:
    async with Store.open(sqlite_url(tmp_path / "service.db")) as store:
        yield Redeliveries(store=store, forge="github", apps=apps, metrics=Metrics())


async def test_what_never_arrived_is_asked_for_and_what_did_is_not(tmp_path: Path) -> None:
    app = App(lost(1), lost(2), lost(3, event="ping"), lost(4, event="push"))
    async with sweeper(tmp_path, a=app) as sweeps:
        row = {"id": "guid-2", "forge": "github", "event": "workflow_job", "action": "queued", "hook_id": None,
               "received_at": 0.0, "payload": b"{}"}  # fmt: skip
        await sweeps._store.write(lambda db: q.put_deliveries(db, [row]))
        await sweeps.sweep("a", app)
    assert app.asked == [1, 4]


async def test_a_delivery_that_fails_again_and_again_is_given_up(tmp_path: Path) -> None:
    app = App(lost(1))
    async with sweeper(tmp_path, a=app) as sweeps:
        for _ in range(TRIES + 2):
            await sweeps.sweep("a", app)
    assert app.asked == [1] * TRIES


async def test_after_a_restart_it_goes_on_where_it_was(tmp_path: Path) -> None:
    app = App()
    async with sweeper(tmp_path, a=app) as sweeps:
        await sweeps.sweep("a", app)
        assert app.since[0] == pytest.approx(time.time() - 3600, abs=5)
        # The service was away for two hours: what failed then is lost all the same.
        await sweeps._store.write(lambda db: q.save_swept(db, "deliveries of github a", time.time() - 7200))
    app.deliveries = [lost(1, at=time.time() - 7000)]
    async with sweeper(tmp_path, a=app) as sweeps:
        await sweeps.sweep("a", app)
    assert app.asked == [1]


async def test_a_round_is_bounded_and_the_next_one_goes_on(tmp_path: Path) -> None:
    start = time.time() - 1800
    app = App(*(lost(i, at=start + i) for i in range(AT_ONCE + 20)))
    async with sweeper(tmp_path, a=app) as sweeps:
        await sweeps.sweep("a", app)
        assert app.asked == list(range(AT_ONCE))
        app.deliveries = app.deliveries[AT_ONCE:]  # the others arrived at last
        await sweeps.sweep("a", app)
    assert app.asked == list(range(AT_ONCE + 20))


async def test_a_sweep_that_failed_is_made_up_for(tmp_path: Path) -> None:
    app = App(lost(1))
    app.trouble = Unavailable("no answer", retryable=True)
    async with sweeper(tmp_path, a=app) as sweeps:
        await sweeps._try("a", app)
        assert await sweeps._store.read(lambda db: q.swept_until(db, "deliveries of github a")) is None
        app.trouble = None
        await sweeps._try("a", app)
    assert app.asked == [1]


async def test_one_apps_trouble_is_not_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, fine = App(lost(1)), App(lost(2))

    async def forgotten(delivery_id: int) -> None:
        raise NotFound("too old", status=404)

    monkeypatch.setattr(broken, "redeliver", forgotten)
    silent = App()
    silent.trouble = RuntimeError("a fault of ours")
    monkeypatch.setattr(redelivery, "_SWEEP_LIMIT", 5.0)
    async with sweeper(tmp_path, broken=broken, silent=silent, fine=fine) as sweeps:
        for name, app in sweeps._apps.items():
            await sweeps._try(name, app)
        counted = sweeps._metrics.registry.get_sample_value
        assert counted("microvm_redeliveries_total", {"outcome": "forge_not_found"}) == 1
        assert counted("microvm_redeliveries_total", {"outcome": "internal_error"}) == 1
    assert fine.asked == [2]
