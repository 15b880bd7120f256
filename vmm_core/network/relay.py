"""Joins one connection of a guest to the one destination it may reach: ``relay.py HOST PORT DIR``.

QEMU starts it for each connection, with the guest's side as its standard input and output. A guest can
open connections as fast as it likes, so at most 64 relays run for one VM: each holds a lock in DIR.
Standard library only: it runs with ``-I -S`` so that it starts in milliseconds.
"""

import fcntl
import os
import select
import socket
import sys

LIMIT = 64
CONNECT_SECONDS = 10.0
BUFFER = 65536


def take_place(directory: str) -> bool:
    """Hold one of LIMIT lock files until this process ends; False when all are held."""
    for place in range(LIMIT):
        fd = os.open(f"{directory}/relay.{place}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
        else:
            return True
    return False


def pump(guest: socket.socket, remote: socket.socket) -> None:
    """Copy both ways until both directions have ended."""
    peers = {guest.fileno(): (guest, remote), remote.fileno(): (remote, guest)}
    poller = select.poll()
    for fd in peers:
        poller.register(fd, select.POLLIN)
    while peers:
        for fd, _event in poller.poll():
            source, target = peers[fd]
            data = source.recv(BUFFER)
            if data:
                target.sendall(data)
                continue
            poller.unregister(fd)
            del peers[fd]
            target.shutdown(socket.SHUT_WR)


def main() -> int:
    host, port, directory = sys.argv[1:4]
    if not take_place(directory):
        return 1
    guest = socket.socket(fileno=os.dup(0))
    try:
        remote = socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS)
        remote.settimeout(None)
        remote.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for inherited in (0, 1, 2):
            os.close(inherited)
        pump(guest, remote)
    except OSError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
