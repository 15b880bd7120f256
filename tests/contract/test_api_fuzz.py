"""The service's API, fuzzed by schemathesis from its own OpenAPI document: over real HTTP, on a real store with jobs.

Whatever is sent, no answer is a 500, and each is one that the document tells of: status, media type, schema. Hypothesis
prints how to replay a failure.
"""

import asyncio
import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

from runner_service import audit, serving, tokens
from runner_service.access import Failures, Gate
from runner_service.api import Api, Check, Readiness
from runner_service.bakes import bake_logs
from runner_service.domain import TimelineRow
from runner_service.joblog import JobLogs
from runner_service.settings import Bakes
from runner_service.store import queries as q
from runner_service.store.store import Store, sqlite_url
from runner_service.telemetry import Metrics
from runner_service.tokens import SCOPES, Scope
from tests.contract.test_store import job, runner
from vmm_core.errors import UnknownVm

EXAMPLES = 8
# Not "negative_data_rejection": parameters that nobody documented are no business of ours, and pass.
CHECKED = (
    "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "positive_data_acceptance",
    "unsupported_method", "allow_header_conformance",
)  # fmt: skip
# Logs of what is over end by themselves; to follow one of what is not would take as long as it.
JOB, BAKE, VM = "github-2", "1", "vm-1"


class Served:
    """The service's application on a port of this host, in a thread with a loop of its own."""

    def __init__(self, directory: Path) -> None:
        self.tokens: dict[Scope, str] = {}
        self._directory = directory
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._ready = threading.Event()
        self._server: serving.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="api")

    def __enter__(self) -> "Served":
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        async with Store.open(sqlite_url(self._directory / "store.db")) as store:
            await self._fill(store)
            self._server = serving.Server(serving.config(self._api(store).app()))
            self._ready.set()
            await self._server.serve(sockets=[self._socket])

    async def _fill(self, store: Store) -> None:
        async with store.writing() as db:
            await q.save_jobs(
                db, [job(1), job(2, state="completed", conclusion="success"), job(3, state="waiting")]
            )
            await q.add_runners(
                db, [runner(1, job_id="github-1", vm_id=VM), runner(2, job_id=JOB, state="gone")]
            )
            await q.add_timeline(
                db, [TimelineRow(at=1.0, job_id=JOB, runner_id="r2", step="queued", reason="by an event")]
            )
            await audit.record(db, who="test", action="vm.kill", target=VM, details={"more": [1, None]})
            for scope in SCOPES:
                made = await tokens.create(db, name=scope, scope=scope, days=1, who="test")
                self.tokens[scope] = made.token

    def _api(self, store: Store) -> Api:
        metrics = Metrics()
        gate = Gate(
            store, local_is_trusted=False, open_metrics=False, refused=metrics.refused,
            # Guesses are not slowed here: an hour passes between any two of them.
            failures=Failures(itertools.count(step=3600).__next__),
        )  # fmt: skip

        async def readiness() -> Readiness:
            return Readiness(False, (Check("template", False, "not baked"),))

        async def vms() -> list[Any]:
            return []

        async def kill(vm: str) -> None:
            if vm != VM:
                raise UnknownVm(f"there is no VM {vm}")

        return Api(
            store=store, logs=JobLogs(self._directory / "logs", limit=1 << 20),
            bake_logs=bake_logs(self._directory, Bakes()), metrics=metrics, readiness=readiness, vms=vms, kill=kill,
            gate=gate,
        )  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("fuzz")) as running:
        yield running


def document_of(served: Served) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {served.tokens['read']}"}
    answer = httpx.get(f"{served.url}/schema/openapi.json", headers=headers)
    assert answer.status_code == 200
    return answer.json()


def test_every_route_is_documented_with_what_it_answers(served: Served) -> None:
    document = document_of(served)
    operations = {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    assert {"GET /jobs", "GET /jobs/{job}", "POST /vms/{vm}/kill", "POST /tokens", "GET /audit"} <= set(
        operations
    )
    for name, operation in operations.items():
        assert {"400", "500"} <= set(operation["responses"]), name
        if name != "GET /healthz":
            assert {"401", "403", "429"} <= set(operation["responses"]), name
            assert operation.get("security", document["security"]) == [{"token": []}], name


@pytest.mark.parametrize("scope", ["admin", "read", None, "guess"])
def test_no_request_breaks_the_service_or_its_document(served: Served, scope: str | None) -> None:
    load_all_checks()
    document = document_of(served)
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.url)
    known: dict[str | None, str] = {"guess": tokens.make(), **served.tokens}
    headers = {} if scope is None else {"authorization": f"Bearer {known[scope]}"}
    calls: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        fuzz(operation, headers, calls, known=scope in served.tokens)
    assert len(calls) == sum(len(item) for item in document["paths"].values())
    assert min(calls.values()) >= 1


def fuzz(operation: Any, headers: dict[str, str], calls: dict[str, int], *, known: bool = True) -> None:
    """Send what the document allows and what it does not; half of the paths name what there is."""

    checks = [CHECKS.get_one(name) for name in CHECKED]

    @settings(
        max_examples=EXAMPLES if known else 3,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def send(data: st.DataObject) -> None:
        mode = data.draw(st.sampled_from(schemathesis.GenerationMode))
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if data.draw(st.booleans()):
            case.path_parameters = {
                name: {"job": JOB, "bake": BAKE, "vm": VM, "name": "ci"}.get(name, value)
                for name, value in (case.path_parameters or {}).items()
            }
        calls[operation.label] = calls.get(operation.label, 0) + 1
        answer = case.call_and_validate(headers=headers, timeout=10, checks=checks)
        # Nobody gets past the guard, however the rest of the request is made.
        assert known or operation.label == "GET /healthz" or answer.status_code >= 400
        # One that is documented and not a fault: what is not ready.
        assert answer.status_code < 500 or (operation.label, answer.status_code) == ("GET /readyz", 503)

    send()
