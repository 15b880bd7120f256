"""What one service holds alone: its data directory and its address, which it announces to the command line."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Generator
from pathlib import Path

import msgspec

from runner_service.client import SERVICE_FILE, ServiceAnswer
from runner_service.settings import SettingsError


class ServiceBusyError(SettingsError):
    """Another service runs on this data directory, or holds the address."""

    code = "service_busy"


@contextlib.contextmanager
def only_one(data_dir: Path) -> Generator[None]:
    """Make and hold the data directory: two services on it would both think that its leases are theirs."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(data_dir / "service.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"cannot use the data directory {data_dir}: {error.strerror}; change service.data_dir, or its rights"
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceBusyError(
                f"another service runs on {data_dir}: stop it, or use another data_dir"
            ) from None
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def listen(address: tuple[str, int], setting: str = "service.listen") -> Generator[socket.socket]:
    """A bound socket. Raises ServiceBusyError that names the ``setting`` to change."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            shown = f"{address[0]}:{address[1]}"
            raise ServiceBusyError(f"cannot listen on {shown}: {error.strerror}; change {setting}") from error
        listening.setblocking(False)
        yield listening
    finally:
        listening.close()


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(data_dir: Path, listening: socket.socket, webhooks: socket.socket | None = None) -> None:
    """Tell the command line where this service answers, and where it takes webhooks if that is elsewhere."""
    draft = data_dir / f".{SERVICE_FILE}"
    own = "" if webhooks is None else address_of(webhooks)
    draft.write_bytes(msgspec.json.encode(ServiceAnswer(address_of(listening), os.getpid(), own)))
    draft.replace(data_dir / SERVICE_FILE)
