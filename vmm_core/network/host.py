"""What the host gives to its slots: rights, a free address range, forwarding; and what lives in a slot.

Forwarding is switched on for the slots' own interfaces and for those that lead somewhere, never for the host
as a whole. What was changed is written down, can route only to slots (the firewall's set ``routed``), and is
set back when the last slot goes.
"""

import asyncio
import contextlib
import ipaddress
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

import msgspec

from vmm_core.errors import SlotsUnavailable
from vmm_core.network.addresses import NETWORK, PREFIX, Slot, number_of_name
from vmm_core.network.claims import RUN_DIR
from vmm_core.network.firewall import Firewall

NETNS_DIR = Path("/run/netns")
_IPV4 = Path("/proc/sys/net/ipv4")
_IPV6 = Path("/proc/sys/net/ipv6")
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_MAX_RESOLVERS = 3
# What a guest's card has, and the least that IPv6 allows a link to have.
_GUEST_MTU, _LEAST_MTU = 1500, 1280


async def usable() -> str | None:
    """Why this host can not have network slots; None when it can. Changes nothing."""
    missing = _missing()
    if missing is not None:
        return missing
    try:
        await Firewall().exists()
    except SlotsUnavailable as error:
        return f"the firewall can not be used: {error}"
    return collision(Path("/proc/net/route").read_text())


def _missing() -> str | None:
    if os.geteuid() != 0 or not _capable(_CAP_NET_ADMIN) or not _capable(_CAP_SYS_ADMIN):
        return "network slots need root (CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    if shutil.which("nft", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        return "the program nft is missing; install the package nftables"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/net/tun can not be opened ({error.strerror}); load the kernel module tun"
    if not Path("/proc/self/ns/net").exists():
        return "the kernel has no network namespaces"
    if not os.access(_IPV4 / "ip_forward", os.W_OK) or _read_only(_IPV4 / "ip_forward"):
        return "/proc/sys/net is read-only here"
    return None


def least_mtu(proc: Path = Path("/proc/net/route"), devices: Path = Path("/sys/class/net")) -> int:
    """The least MTU of the interfaces that this host's routes lead over, its slots' own aside; 1500 at most."""
    found = [_GUEST_MTU]
    for line in proc.read_text().splitlines()[1:]:
        name = line.split("\t")[0].strip()
        if not name.startswith("mv-"):
            with contextlib.suppress(OSError, ValueError):
                found.append(int((devices / name / "mtu").read_text()))
    return max(_LEAST_MTU, min(found))


def collision(routes: str) -> str | None:
    """A sentence when a route (``/proc/net/route``) of the host lies in the slots' range; None when it is free."""
    for line in routes.splitlines()[1:]:
        device, destination, _, _, _, _, _, mask = line.split()[:8]
        network = ipaddress.IPv4Network((_hex(destination), _length(mask)))
        if network.prefixlen and network.overlaps(NETWORK) and number_of_name(device) is None:
            return (
                f"the host's own route {network} on {device} collides with {NETWORK}, the range of the slots"
            )
    return None


def resolvers() -> list[str]:
    """The host's IPv4 name servers (``/etc/resolv.conf``), at most three."""
    found: list[str] = []
    try:
        text = Path("/etc/resolv.conf").read_text(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                found.append(str(ipaddress.IPv4Address(words[1])))
            except ValueError:
                continue
    return found[:_MAX_RESOLVERS]


def own_addresses() -> frozenset[str]:
    """The host's own addresses, those of slots aside."""
    found = set[str]()
    last = ""
    for line in Path("/proc/net/fib_trie").read_text().splitlines():
        if "|-- " in line:
            last = line.rpartition(" ")[2]
        elif "/32 host LOCAL" in line and ipaddress.IPv4Address(last) not in NETWORK:
            found.add(last)
    for line in Path("/proc/net/if_inet6").read_text().splitlines() if _IPV6.is_dir() else ():
        digits, *_, device = line.split()
        if number_of_name(device) is None:
            found.add(str(ipaddress.IPv6Address(int(digits, 16))))
    return frozenset(found)


def serve_loopback(slot: Slot) -> None:
    """Let packets that were forwarded to the host's loopback arrive there. Only the firewall's elements forward."""
    (_IPV4 / "conf" / slot.veth / "route_localnet").write_text("1")


def counted(slot: Slot) -> tuple[int, int, int, int]:
    """Bytes and packets the guest sent, bytes and packets it received, since the slot was laid."""
    statistics = Path("/sys/class/net") / slot.veth / "statistics"
    values = [
        int((statistics / name).read_bytes())
        # The host's end: what it receives is what the guest sent.
        for name in ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")
    ]
    return values[0], values[1], values[2], values[3]


def laid() -> set[int]:
    """The numbers of which a namespace or an interface is there."""
    names = [entry.name for entry in NETNS_DIR.iterdir()] if NETNS_DIR.is_dir() else []
    names += [name for _, name in socket.if_nameindex()]
    return {number for name in names if (number := number_of_name(name)) is not None}


async def inhabited(numbers: Iterable[int]) -> set[int]:
    """Those of ``numbers`` in whose namespace a process lives. Reads all of /proc, on a thread."""
    return await asyncio.to_thread(_inhabited, list(numbers))


def _inhabited(numbers: list[int]) -> set[int]:
    by_inode: dict[int, int] = {}
    for number in numbers:
        try:
            by_inode[(NETNS_DIR / f"{PREFIX}{number}").stat().st_ino] = number
        except OSError:
            continue
    found = set[int]()
    if not by_inode:
        return found
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found.add(by_inode[(entry / "ns/net").stat().st_ino])
            except (OSError, KeyError):
                continue
    return found


class Forwarding:
    """Switches forwarding of one family on for interfaces that lead somewhere; remembers which were off."""

    def __init__(self, run_dir: Path = RUN_DIR, *, ipv6: bool = False) -> None:
        self._ipv6 = ipv6
        self._file = run_dir / f"forwarding{'6' if ipv6 else ''}.json"
        self._whole = _IPV6 / "conf/all/forwarding" if ipv6 else _IPV4 / "ip_forward"

    def changed(self) -> set[str]:
        """Interfaces that forward only because of us."""
        try:
            return set(msgspec.json.decode(self._file.read_bytes(), type=list[str]))
        except (OSError, msgspec.DecodeError):
            return set()

    def on(self) -> set[str]:
        """Switch on what is off, and answer what forwards only because of us.

        A host that forwards as a whole (it was made a router by its operator, or since then by another program)
        is left as it is, and nothing is ours any more. Raises SlotsUnavailable where IPv6 can only be forwarded
        by the host as a whole: that would change how the host gets its own addresses.
        """
        if self._whole.read_text().strip() == "1":
            self._file.unlink(missing_ok=True)
            return set()
        if self._ipv6 and not self._setting("all").exists():
            raise SlotsUnavailable(
                "a machine asks for IPv6, which this kernel (before 6.17) forwards for all interfaces or none; set "
                "net.ipv6.conf.all.forwarding=1, and accept_ra=2 where the host takes addresses from a router"
            )
        changed = self.changed()
        for device in _leading6() if self._ipv6 else _leading():
            setting = self._setting(device)
            # An interface of that name may have gone and come back since it was changed.
            if setting.read_text().strip() == "0":
                changed.add(device)
                # Written down first: a crash in between sets back what was never changed, which is no harm.
                self._file.write_bytes(msgspec.json.encode(sorted(changed)))
                setting.write_text("1")
        return changed

    def back(self) -> None:
        """Set back what ``on`` changed, unless the host forwards as a whole by now."""
        changed = self.changed()
        if changed and self._whole.read_text().strip() != "1":
            for device in changed:
                setting = self._setting(device)
                if setting.exists():
                    setting.write_text("0")
        self._file.unlink(missing_ok=True)

    def _setting(self, device: str) -> Path:
        return (
            (_IPV6 / "conf" / device / "force_forwarding")
            if self._ipv6
            else (_IPV4 / "conf" / device / "forwarding")
        )


def _leading() -> set[str]:
    devices = {line.split()[0] for line in Path("/proc/net/route").read_text().splitlines()[1:]}
    return {device for device in devices if device != "lo" and number_of_name(device) is None}


def _leading6() -> set[str]:
    routes = [line.split() for line in Path("/proc/net/ipv6_route").read_text().splitlines()]
    devices = {words[-1] for words in routes if not words[0].startswith(("fe8", "ff"))}
    return {device for device in devices if device != "lo" and number_of_name(device) is None}


def _hex(text: str) -> str:
    return str(ipaddress.IPv4Address(socket.ntohl(int(text, 16))))


def _length(mask: str) -> int:
    return int(mask, 16).bit_count()


def _capable(capability: int) -> bool:
    return bool(_effective() >> capability & 1)


def _effective() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
