"""The HTTP API over stand-ins: what it shows, what it refuses, and that its errors are problem documents."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from runner_service import audit
from runner_service.api import Api, Check, Readiness
from runner_service.operation_routes import Orders
from runner_service.reload import Reloaded
from runner_service.settings import SettingsError
from runner_service.views import vm_view
from tests.unit.runner_service.world import BAKES, Service, World, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def client(service: Service, *, ready: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    async def readiness() -> Readiness:
        return Readiness(ready, (Check("database", ready, "answers"),))

    async def vms():
        return [vm_view(record) for record in service.engine.records()]

    def refused() -> Reloaded:
        raise SettingsError("microvm.toml: [runners] max_vms: no number")

    api = Api(store=service.store, logs=service.logs, bake_logs=service.bake_logs, metrics=service.metrics,
              readiness=readiness, vms=vms, kill=service.scheduler.kill,
              orders=Orders("host-1", service.scheduler.wake, refused))  # fmt: skip
    transport = httpx.ASGITransport(app=api.app())  # pyright: ignore
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield http


async def test_jobs_their_story_and_their_log(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        job = world.forge.queue()
        await world.until_quiet()
        (shown,) = (await http.get("/jobs")).json()
        assert shown["state"] == "completed" and shown["repository"] == "o/r"
        assert (await http.get("/jobs", params={"state": "queued"})).json() == []
        story = (await http.get(f"/jobs/{job.id}")).json()
        assert next(line["step"] for line in story["timeline"]) == "queued"
        log = await http.get(f"/jobs/{job.id}/log")
        assert log.headers["content-type"].startswith("text/plain")
        assert log.headers["x-content-type-options"] == "nosniff"
        assert log.text.endswith("hello from the job\ndone\n")
        assert (
            await http.get(f"/jobs/{job.id}/log", params={"offset": len(log.content) - 5})
        ).text == "done\n"


async def test_a_followed_log_begins_before_its_runner_and_ends_with_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.host.fork_seconds = 0.1
    async with world.running() as service, client(service) as http:
        job = world.forge.queue(seconds=0.2)
        await service.story(job.id)
        followed = asyncio.create_task(http.get(f"/jobs/{job.id}/log", params={"follow": "true"}))
        await world.until_quiet()
        assert (await asyncio.wait_for(followed, 5)).text.endswith("hello from the job\ndone\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/jobs/nope", 404), ("GET", "/jobs/nope/log", 404), ("GET", "/jobs?limit=0", 400),
        ("GET", "/jobs?limit=x", 400), ("GET", "/jobs?state=odd", 400), ("GET", "/nowhere", 404),
        ("DELETE", "/jobs", 405), ("POST", "/vms/nope/kill", 404),
    ],
)  # fmt: skip
async def test_errors_are_problem_documents(tmp_path: Path, method: str, path: str, status: int) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (
        problem["status"] == status
        and problem["type"].startswith("urn:microvm:problem:")
        and problem["detail"]
    )


async def test_a_fault_of_ours_tells_nothing_of_the_inside(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service):

        async def broken(_: str) -> None:
            raise RuntimeError("s3cret")

        service.scheduler.kill = broken  # pyright: ignore
        api = Api(
            store=service.store,
            logs=service.logs,
            bake_logs=service.bake_logs,
            metrics=service.metrics,
            readiness=None,
            vms=None,
            kill=broken,
        )  # pyright: ignore
        transport = httpx.ASGITransport(app=api.app(), raise_app_exceptions=False)  # pyright: ignore
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as other:
            answer = await other.post("/vms/x/kill")
    assert answer.status_code == 500 and "s3cret" not in answer.text
    assert answer.json()["type"] == "urn:microvm:problem:internal_error"


async def test_a_web_page_gives_no_orders(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        answer = await http.post("/vms/x/kill", headers={"origin": "https://evil.example"})
    assert answer.status_code == 403


async def test_a_kill_ends_the_vm_and_its_runner(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        job = world.forge.queue(seconds=30)
        await until(lambda: job.runs)
        await asyncio.sleep(0.05)
        (vm,) = (await http.get("/vms")).json()
        assert (await http.post(f"/vms/{vm['id']}/kill")).status_code == 202
        await world.until_quiet()
        assert (await http.get("/vms")).json() == []


async def test_health_readiness_and_metrics(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        world.forge.queue()
        await world.until_quiet()
        assert (await http.get("/healthz")).json()["status"] == "ok"
        assert (await http.get("/readyz")).status_code == 200
        metrics = (await http.get("/metrics")).text
        for name in (
            "microvm_step_seconds_bucket",
            'microvm_step_seconds_count{step="forked"} 1.0',
            'microvm_step_seconds_count{step="picked_up"} 1.0',
            'microvm_phase_seconds_count{phase="forking"} 1.0',
            'microvm_phase_seconds_count{phase="running"} 1.0',
            "microvm_queued_jobs 0.0",
            "microvm_oldest_queued_seconds 0.0",
            "microvm_reasons_total",
            'microvm_runners{state="busy"} 0.0',
            "microvm_vms",
        ):
            assert name in metrics
        async with client(service, ready=False) as other:
            assert (await other.get("/readyz")).status_code == 503


async def test_bakes_one_of_them_and_its_log(tmp_path: Path) -> None:
    world = World(tmp_path, bakes=BAKES)
    async with world.running() as service, client(service) as http:
        world.forge.queue(repo="octo-org/hello")
        await world.push("octo-org/hello", "main", "1" * 40, "locks")
        async with asyncio.timeout(20):
            while not (shown := (await http.get("/bakes", params={"repository": "Octo-Org/Hello"})).json()):
                await asyncio.sleep(0.05)
        number = shown[0]["id"]
        # Followed from the start, the log ends with the bake.
        log = (await http.get(f"/bakes/{number}/log", params={"follow": "true"}, timeout=30)).text
        baked = (await http.get(f"/bakes/{number}")).json()
        rest = (await http.get(f"/bakes/{number}/log", params={"offset": len(log.encode()) - 5})).text
        metrics = (await http.get("/metrics")).text
        await world.until_quiet()
        assert (
            (await http.get("/bakes/999")).status_code
            == (await http.get("/bakes/999/log")).status_code
            == 404
        )
        assert (await http.get("/bakes", params={"limit": 0})).status_code == 400
        assert (await http.get("/bakes", params={"repository": "octo-org/other"})).json() == []
    assert (baked["state"], baked["repository"], baked["branch"]) == ("done", "octo-org/hello", "main")
    assert "install: npm ci" in log and log.endswith(rest) and len(rest) == 5
    assert 'microvm_bakes_total{outcome="done"} 1.0' in metrics
    assert (
        'microvm_parents_total{reason="none"}' in metrics
        and 'microvm_bakes_under_way{state="queued"} 0.0' in metrics
    )


async def test_orders_to_drain_and_to_reload_are_taken_refused_and_written_down(tmp_path: Path) -> None:
    world = World(tmp_path)
    async with world.running() as service, client(service) as http:
        drained = await http.post("/drain")
        assert drained.status_code == 200
        assert drained.json()["name"] == "host-1" and drained.json()["drained"] is True
        (shown,) = (await http.get("/hosts")).json()
        assert shown["draining"] and shown["drain_ordered_at"] and not shown["stopping"]
        wrong = await http.post("/drain", params={"host": "nobody"})
        assert wrong.status_code == 404 and "host-1" in wrong.json()["detail"]
        assert (await http.post("/undrain", params={"host": "host-1"})).json()["draining"] is False
        refused = await http.post("/reload")
        assert refused.status_code == 422 and "max_vms" in refused.json()["detail"]
        rows = await service.store.read(lambda db: audit.entries(db, limit=10))
    assert [(row.action, row.target, row.outcome == audit.DONE) for row in rows] == [
        ("settings.reload", "host-1", False), ("host.undrain", "host-1", True), ("host.drain", "nobody", False),
        ("host.drain", "host-1", True),
    ]  # fmt: skip
