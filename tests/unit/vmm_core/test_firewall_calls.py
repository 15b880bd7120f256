"""Changes of the firewall: many share a call, one at fault fails alone, an nft that hangs is ended."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from vmm_core.errors import SlotsUnavailable
from vmm_core.network import firewall as module
from vmm_core.network.firewall import Element, Firewall
from vmm_core.network.host import least_mtu
from vmm_core.network.rules import ruleset, usual_connections

pytestmark = pytest.mark.anyio


def fake_nft(directory: Path, script: str) -> str:
    """A program in nft's place that writes each input down; what it cannot show is nft's own judgement."""
    program = directory / "nft"
    program.write_text(
        f"#!/bin/sh\ncat > {directory}/$$.tmp; mv {directory}/$$.tmp {directory}/$$.json\n{script}\n"
    )
    program.chmod(0o755)
    return str(program)


def calls(directory: Path) -> list[list[dict[str, dict[str, dict[str, object]]]]]:
    files = sorted(directory.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [msgspec.json.decode(file.read_bytes())["nftables"] for file in files]


async def test_concurrent_changes_share_calls(tmp_path: Path) -> None:
    firewall = Firewall(fake_nft(tmp_path, "sleep 0.1"))
    await asyncio.gather(
        *(firewall.change([Element("internet", (f"10.200.0.{number}",))]) for number in range(20))
    )
    made = calls(tmp_path)
    assert len(made) <= 2
    assert sum(len(call) for call in made) == 20


async def test_removals_come_before_additions_and_maps_lose_only_keys(tmp_path: Path) -> None:
    firewall = Firewall(fake_nft(tmp_path, ""))
    old = Element("forwards", ("10.200.0.2", "10.0.2.100", "tcp", 443), ("198.51.100.1", 443))
    new = Element("forwards", ("10.200.0.2", "10.0.2.100", "tcp", 443), ("198.51.100.2", 443))
    net = Element("allowed_whole", ("10.200.0.2", "10.1.0.0/16"))
    await firewall.change([new, net], [old])
    (call,) = calls(tmp_path)
    key = {"concat": ["10.200.0.2", "10.0.2.100", "tcp", 443]}
    at = {"family": "inet", "table": "microvm"}
    assert call == [
        {"delete": {"element": {**at, "name": "forwards", "elem": [key]}}},
        {"add": {"element": {**at, "name": "forwards", "elem": [[key, {"concat": ["198.51.100.2", 443]}]]}}},
        {
            "add": {
                "element": {
                    **at,
                    "name": "allowed_whole",
                    "elem": [{"concat": ["10.200.0.2", {"prefix": {"addr": "10.1.0.0", "len": 16}}]}],
                }
            }
        },
    ]


async def test_the_one_at_fault_fails_alone(tmp_path: Path) -> None:
    script = f'if grep -q 10.200.9.9 {tmp_path}/$$.json; then echo "Error: no" >&2; exit 1; fi'
    firewall = Firewall(fake_nft(tmp_path, script))
    results = await asyncio.gather(
        *(
            firewall.change([Element("internet", (address,))])
            for address in ("10.200.0.2", "10.200.9.9", "10.200.0.6")
        ),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), SlotsUnavailable, type(None)]
    assert "Error: no" in str(results[1])


async def test_an_nft_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.3)
    firewall = Firewall(fake_nft(tmp_path, "exec sleep 30"))
    started = time.monotonic()
    with pytest.raises(SlotsUnavailable, match="did not end"):
        await firewall.change([Element("internet", ("10.200.0.2",))])
    assert time.monotonic() - started < 2


async def test_a_missing_nft_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlotsUnavailable, match="cannot be started"):
        await Firewall(str(tmp_path / "nft")).exists()


async def test_a_caller_who_gives_up_does_not_undo_the_others(tmp_path: Path) -> None:
    firewall = Firewall(fake_nft(tmp_path, "sleep 0.2"))
    one = asyncio.create_task(firewall.change([Element("internet", ("10.200.0.2",))]))
    other = asyncio.create_task(firewall.change([Element("internet", ("10.200.0.6",))]))
    await asyncio.sleep(0.05)
    one.cancel()
    await other
    assert one.cancelled()
    assert sum(len(call) for call in calls(tmp_path)) == 2


def test_rules_do_not_name_slots() -> None:
    text = ruleset(1000, ["eth0"])
    assert 'add element inet microvm routed { "eth0" }' in text
    assert not any(f"mv-{number}" in text for number in range(10))
    assert "ct count over 1000" in text


def test_segments_fit_through_the_narrowest_way_out(tmp_path: Path) -> None:
    devices = tmp_path / "net"
    for name, mtu in (("eth0", 9000), ("wg0", 1400), ("mv-3", 1280), ("unused", 1300)):
        (devices / name).mkdir(parents=True)
        (devices / name / "mtu").write_text(f"{mtu}\n")
    routes = tmp_path / "route"
    lines = ["Iface\tDestination\tGateway", *(f"{name}\t0\t0" for name in ("eth0", "wg0", "mv-3", "gone"))]
    routes.write_text("\n".join(lines) + "\n")
    assert least_mtu(routes, devices) == 1400
    text = ruleset(1000, ["eth0"], mtu=1400)
    assert (
        'oifname "mv-*" meta nfproto ipv4 tcp flags & (syn | rst) == syn tcp option maxseg size set 1360'
        in text
    )
    assert "maxseg size set 1340" in text
    routes.write_text(lines[0] + "\n")
    assert least_mtu(routes, devices) == 1500


def test_the_limit_of_connections_is_a_share_of_the_hosts() -> None:
    assert 256 <= usual_connections() <= 2048
