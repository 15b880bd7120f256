"""``microvm serve`` as a process, on a host without VMs: what signals and orders do to it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

PROGRAM = "tests.standins.service_program"


class Served:
    """A running service: its process, its log, its API."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, data_dir: Path) -> None:
        self.process = process
        self.log = log
        self.data_dir = data_dir

    def lines(self, event: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [row for row in rows if row["event"] == event]

    def until(self, holds: Callable[[], object], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    @property
    def api(self) -> str:
        return json.loads((self.data_dir / "service.json").read_text())["address"]


def config(directory: Path, text: str = "", *, port: int | None = None) -> Path:
    path = directory / "microvm.toml"
    listen = f'listen = "127.0.0.1:{port or 0}"\n'
    path.write_text(f'[service]\nlog_format = "json"\ndata_dir = "{directory}/data"\n{listen}{text}')
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", PROGRAM, *arguments]


@contextmanager
def served(directory: Path, *, ready: bool = True) -> Generator[Served]:
    log = directory / "log"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command("serve", "--config", str(directory / "microvm.toml")), stdout=out, stderr=out, env=env
        )
    service = Served(process, log, directory / "data")
    try:
        if ready:
            service.until(lambda: service.lines("serving"))
        yield service
    finally:
        process.kill()
        process.wait()


def test_sigterm_ends_an_idle_service_at_once_even_with_a_long_grace(tmp_path: Path) -> None:
    config(tmp_path, "stop_grace_s = 600\n")
    with served(tmp_path) as service:
        service.signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
        assert service.lines("handing_over") and not (tmp_path / "data" / "service.json").exists()


def test_sighup_tells_what_changed_and_a_wrong_file_changes_nothing(tmp_path: Path) -> None:
    config(tmp_path, "[runners]\nmax_vms = 2\n")
    with served(tmp_path) as service:
        config(tmp_path, 'log_level = "debug"\n[runners]\nmax_vms = 5\n', port=1)
        service.signal(signal.SIGHUP)
        service.until(lambda: service.lines("reloaded"))
        told = {
            line["key"]: (line["was"], line["now"], line["takes_effect"])
            for line in service.lines("setting_changed")
        }
        assert told["runners.max_vms"] == ("2", "5", "now") and told["service.listen"][2] == "restart"
        assert service.lines("reloaded")[0]["restart"] == ["service.listen"]
        service.until(lambda: httpx.get(f"{service.api}/healthz").status_code and service.lines("request"))
        (tmp_path / "microvm.toml").write_text("[runners]\nmax_vms = 'many'\n")
        service.signal(signal.SIGHUP)
        service.until(lambda: service.lines("reload_refused"))
        assert "max_vms" in service.lines("reload_refused")[0]["error"]
        assert httpx.get(f"{service.api}/healthz").status_code == 200
        service.signal(signal.SIGTERM)
        assert service.process.wait(20) == 0


def test_two_services_never_share_a_data_directory(tmp_path: Path) -> None:
    path = config(tmp_path)
    with served(tmp_path):
        second = subprocess.run(
            command("serve", "--config", str(path)), capture_output=True, text=True, timeout=60, check=False
        )
    assert second.returncode == 2 and "another service runs" in second.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_start_is_not_lost(tmp_path: Path, number: int) -> None:
    config(tmp_path)
    with served(tmp_path, ready=False) as service:
        service.until((tmp_path / "data" / "service.lock").exists)
        service.signal(number)
        if number == signal.SIGTERM:
            assert service.process.wait(30) == 0
        else:
            service.until(lambda: service.lines("reloaded"))


def microvm(service: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner_service.cli", *arguments, "--data-dir", str(service.data_dir)],
        capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]}, check=False,
    )  # fmt: skip


def test_an_order_to_drain_shows_holds_over_a_restart_and_is_undone(tmp_path: Path) -> None:
    config(tmp_path)
    with served(tmp_path) as service:
        assert httpx.get(f"{service.api}/readyz").json()["checks"]
        drained = microvm(service, "drain", "--wait", "--json")
        assert drained.returncode == 0 and json.loads(drained.stdout)["drained"], drained.stderr
        assert microvm(service, "drain", "--host", "nobody").returncode == 1
        service.signal(signal.SIGTERM)
        assert service.process.wait(20) == 0
    gone = microvm(service, "drain")
    assert gone.returncode == 2 and "no service runs" in gone.stderr
    with served(tmp_path) as service:
        service.until(lambda: draining(service))
        assert httpx.get(f"{service.api}/readyz").status_code == 503
        assert "takes work" in microvm(service, "drain", "--undo").stdout
        service.until(lambda: not draining(service))
        both = microvm(service, "drain", "--undo", "--wait")
        assert both.returncode == 2 and "--undo and --wait" in both.stderr


def draining(service: Served) -> bool:
    checks = httpx.get(f"{service.api}/readyz").json()["checks"]
    return not next(check["ok"] for check in checks if check["name"] == "draining")


def test_a_reload_is_told_to_whoever_ordered_it(tmp_path: Path) -> None:
    config(tmp_path)
    with served(tmp_path) as service:
        assert "nothing changed" in microvm(service, "reload").stdout
        config(tmp_path, "[runners]\nmax_vms = 3\nresolvers = ['192.0.2.53']\n")
        told = microvm(service, "reload")
        assert (
            "runners.max_vms" in told.stdout
            and "waiting for a restart of the service: runners.resolvers" in told.stdout
        )
        (tmp_path / "microvm.toml").write_text("[runners]\nmax_vms = 'many'\n")
        refused = microvm(service, "reload")
        assert refused.returncode == 2 and "max_vms" in refused.stderr
