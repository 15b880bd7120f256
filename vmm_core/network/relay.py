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


class Direction:
    """One way of the connection: what was read and not yet written, at most BUFFER bytes."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.held = b""
        self.ended = self.done = False

    def move(self) -> None:
        """Read and write what can be without waiting."""
        if not self.held and not self.ended:
            try:
                self.held = self.source.recv(BUFFER)
                self.ended = not self.held
            except BlockingIOError:
                return
        if self.held:
            try:
                self.held = self.held[self.target.send(self.held) :]
            except BlockingIOError:
                return
        if self.ended and not self.done:
            self.done = True
            self.target.shutdown(socket.SHUT_WR)


def pump(guest: socket.socket, remote: socket.socket) -> None:
    """Copy both ways until both have ended; neither waits for the other, so two writers cannot block each other."""
    directions = (Direction(guest, remote), Direction(remote, guest))
    for sock in (guest, remote):
        sock.setblocking(False)
    while not all(direction.done for direction in directions):
        wanted = {guest.fileno(): 0, remote.fileno(): 0}
        for direction in directions:
            if direction.held:
                wanted[direction.target.fileno()] |= select.POLLOUT
            elif not direction.ended:
                wanted[direction.source.fileno()] |= select.POLLIN
        poller = select.poll()
        for fd, events in wanted.items():
            if events:
                poller.register(fd, events)
        poller.register(guest.fileno(), wanted[guest.fileno()])  # also to hear that its VM is gone
        if any(fd == guest.fileno() and event & select.POLLHUP for fd, event in poller.poll()):
            return
        for direction in directions:
            direction.move()


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
