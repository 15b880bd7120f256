"""Faults to inject into the stand-in GitHub: a status, a delay, a dropped answer, for the next N calls."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from tests.standins.github_http import Drop, Request, Response, answer


@dataclass(slots=True)
class Fault:
    """``route`` is a pattern over ``METHOD /path``, as ``POST /repos/*/generate-jitconfig``.

    ``drop="before"``: the call never happens. ``drop="after"``: it happens, and its answer is lost.
    ``delay`` (seconds) comes first. ``times``: how many calls it is for; None for all.
    """

    route: str
    status: int | None = None
    delay: float = 0.0
    drop: Literal["before", "after"] | None = None
    times: int | None = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    hits: int = 0


class Faults:
    """The faults in force, first match first."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        self._faults.clear()

    def _take(self, request: Request) -> Fault | None:
        call = f"{request.method} {request.path}"
        for fault in self._faults:
            if fnmatchcase(call, fault.route) and (fault.times is None or fault.hits < fault.times):
                fault.hits += 1
                return fault
        return None

    async def around(self, request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        fault = self._take(request)
        if fault is None:
            return await handle(request)
        await asyncio.sleep(fault.delay)
        if fault.drop == "before":
            raise Drop
        if fault.drop == "after":
            await handle(request)
            raise Drop
        if fault.status is not None:
            if fault.body is not None:
                return Response(fault.status, fault.body.encode(), dict(fault.headers))
            return answer(fault.status, {"message": f"injected {fault.status}"}, **fault.headers)
        return await handle(request)
