"""The frames and messages both sides of the channel speak, as the host types them.

A frame is SLIP (RFC 1055) around ``[type u8][stream u32 BE][payload][crc32 u32 BE]``, END before and after:
a reader that starts anywhere, after anything, is in step again at the next END. The codec itself stands in
``agent.py``, which is copied into images as one file and cannot import this one.

    REQUEST  host → guest  stream = request number      JSON {"op": …}
    REPLY    guest → host  stream = request number      JSON {"ok": true, …} or {"ok": false, "error": …}
    DATA     both          stream chosen by the host    offset u64 BE, bytes
    EOF      both          the same                     offset u64 BE: how many bytes there were
    ACK      both          the same                     offset u64 BE: bytes before it are consumed
    EXIT     guest → host  a command's own number       JSON {"code", "signal", "timed_out"}

A command has four numbers in a row: +0 its input and EXIT, +1 stdout, +2 stderr. At most WINDOW bytes of a
stream may be unacknowledged. Request and stream numbers are chosen afresh by every connection, so what is
left over from an earlier one fits nothing and is dropped.
"""

from typing import Annotated

import msgspec

from vmm_core.guest.agent import (
    ACK,
    CHUNK,
    DATA,
    END,
    EOF,
    EXIT,
    MAX_BODY,
    MAX_ENCODED,
    MAX_PAYLOAD,
    OFFSET,
    REPLY,
    REQUEST,
    STDERR,
    STDIN,
    STDOUT,
    WINDOW,
    Decoder,
    encode,
)

__all__ = [
    "ACK",
    "CHUNK",
    "DATA",
    "END",
    "EOF",
    "EXIT",
    "MAX_BODY",
    "MAX_ENCODED",
    "MAX_PAYLOAD",
    "OFFSET",
    "REPLY",
    "REQUEST",
    "STDERR",
    "STDIN",
    "STDOUT",
    "WINDOW",
    "Decoder",
    "encode",
]


Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Nanoseconds = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Status = Annotated[int, msgspec.Meta(ge=0, le=255)]
Signal = Annotated[int, msgspec.Meta(ge=1, le=64)]


class Message(msgspec.Struct, frozen=True, tag_field="op"):
    """A request; its class decides ``op``. ``bytes`` travel as base64."""


class HelloRequest(Message, frozen=True, tag="hello"):
    token: str


class ReviveRequest(Message, frozen=True, tag="revive"):
    token: str
    entropy: bytes
    time_ns: int
    hostname: str
    machine_id: str
    boot_id: str
    hosts: dict[str, str]
    resolver: str = ""

    def __repr__(self) -> str:  # the entropy is nobody's business
        return f"ReviveRequest({self.hostname!r})"


class QuiesceRequest(Message, frozen=True, tag="quiesce"):
    blanks: tuple[str, ...] = ()


class PoweroffRequest(Message, frozen=True, tag="poweroff"):
    pass


class WireFile(msgspec.Struct, frozen=True):
    path: str
    data: bytes
    mode: int

    def __repr__(self) -> str:  # the content may be a registration secret
        return f"WireFile({self.path!r}, {len(self.data)} bytes)"


class StartRequest(Message, frozen=True, tag="exec.start"):
    exec: str
    stream: int
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str | None
    user: str
    stdin: bool
    timeout_s: float | None
    files: tuple[WireFile, ...]


class AttachRequest(Message, frozen=True, tag="exec.attach"):
    exec: str
    stream: int
    stdout_from: int | None
    stderr_from: int | None


class KillRequest(Message, frozen=True, tag="exec.kill"):
    exec: str
    signal: int


class ForgetRequest(Message, frozen=True, tag="exec.forget"):
    exec: str


class PutRequest(Message, frozen=True, tag="put"):
    path: str
    stream: int
    mode: int
    user: str


class GetRequest(Message, frozen=True, tag="get"):
    path: str
    stream: int
    max_bytes: int


class Verdict(msgspec.Struct, frozen=True):
    """What every reply begins with."""

    ok: bool
    error: str = ""
    message: str = ""


class Done(msgspec.Struct, frozen=True):
    """A reply that says no more than that."""


class Hello(msgspec.Struct, frozen=True):
    """``revived``: the agent knows this token, so commands are allowed. ``execs``: ids it still keeps."""

    agent_version: str
    revived: bool
    execs: tuple[str, ...]


class Revived(msgspec.Struct, frozen=True):
    """``clock_step_ns``: how far the wall clock was moved forward. ``boot_id``: made in the fork, its own.
    ``execs``: ids of the commands a copy of a running machine came with; none in a fork of a baked one."""

    clock_step_ns: Nanoseconds
    boot_id: str
    execs: tuple[str, ...] = ()


class Attached(msgspec.Struct, frozen=True):
    """Where the outputs go on, and how much input the command has had (None: it has no input)."""

    pid: Count
    stdout: Count
    stderr: Count
    stdin: Count | None
    stdin_written: Count | None


class Size(msgspec.Struct, frozen=True):
    """How many bytes a put or get moved."""

    size: Count


class Exit(msgspec.Struct, frozen=True):
    """How a command ended; payload of an EXIT frame."""

    code: Status
    signal: Signal | None
    timed_out: bool
