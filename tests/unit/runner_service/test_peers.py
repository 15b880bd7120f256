"""Whose a connection from this host is: rows as the kernel writes them, and a real socket."""

import asyncio
import os

import pytest

from runner_service import peers

pytestmark = pytest.mark.anyio

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
FOUR = "   7: 0100007F:A1B2 0100007F:2116 {st} 00000000:00000000 00:00000000 00000000  1000        0 1 1\n"
SIX = (
    "   7: 0000000000000000FFFF00000100007F:A1B2 0000000000000000FFFF00000100007F:2116 01 "
    "00000000:00000000 00:00000000 00000000  1001        0 1 1\n"
)
LONG = (
    "   7: 00000000000000000000000001000000:A1B2 00000000000000000000000001000000:2116 01 "
    "00000000:00000000 00:00000000 00000000  1002        0 1 1\n"
)
PEER, HERE = ("127.0.0.1", 0xA1B2), ("127.0.0.1", 0x2116)


def test_rows_of_both_tables_are_read() -> None:
    assert peers.owner([HEAD, FOUR.format(st="01")], PEER, HERE) == 1000
    assert peers.owner([HEAD, SIX], PEER, HERE) == 1001
    assert peers.owner([HEAD, SIX], ("::ffff:127.0.0.1", 0xA1B2), ("::ffff:127.0.0.1", 0x2116)) == 1001
    assert peers.owner([HEAD, LONG], ("::1", 0xA1B2), ("::1", 0x2116)) == 1002


def test_other_and_closed_connections_tell_nothing() -> None:
    assert peers.owner([HEAD, FOUR.format(st="06")], PEER, HERE) is None
    assert peers.owner([HEAD, FOUR.format(st="01")], HERE, PEER) is None
    assert peers.owner([HEAD, FOUR.format(st="01")], ("127.0.0.1", 1), HERE) is None


async def test_the_user_of_a_real_connection() -> None:
    server = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    here = server.sockets[0].getsockname()
    _, writer = await asyncio.open_connection(*here)
    peer = writer.get_extra_info("sockname")
    assert await peers.uid_of(peer, here) == os.getuid()
    assert await peers.uid_of(None, here) is None and await peers.uid_of(("x", None), here) is None
    writer.close()
    server.close()
