"""Group commit: what is asked for while one transaction commits goes into the next one together, and shares its fsync.

    do(item) ─► queue ─► one transaction: work(db, items), in the order they came ─► commit ─► each caller its answer

Nobody waits for others to come: a single item begins at once. Each caller is answered once its item is committed. When
one of them fails, nothing of that transaction is kept and each is done again in one of its own, so that a bad one fails
alone; when the database itself cannot be used, all of them hear of it. Grouped reads share a transaction likewise.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Generic, TypeVar

import msgspec
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MOST_AT_ONCE = 256
"""Items in one transaction: it holds the write lock for as long as they take."""

MOST_WAITING = 10_000
"""Items that wait. Who is asked by strangers has a lower bound of its own."""

_UNUSABLE = (OperationalError, InterfaceError, OSError, TimeoutError)


class GroupFullError(Exception):
    """More is asked of the database than it can do; the same may succeed later."""

    code = "store_busy"


class _Asked(msgspec.Struct, Generic[Item, Answer]):
    item: Item
    answer: asyncio.Future[Answer]


class Group(Generic[Item, Answer]):
    """``begin`` opens a transaction that is kept when its block ends, and rolled back when that raises.

    ``work`` does many items in it and gives as many answers in their order. It touches nothing but the database, so
    that it can be done again.
    """

    def __init__(
        self,
        begin: Callable[[], AbstractAsyncContextManager[AsyncConnection]],
        work: Callable[[AsyncConnection, Sequence[Item]], Awaitable[Sequence[Answer]]],
    ) -> None:
        self._begin = begin
        self._work = work
        self._waiting: deque[_Asked[Item, Answer]] = deque()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    async def do(self, item: Item) -> Answer:
        """The answer for ``item``, committed. It is done even if the caller is cancelled.

        Raises what the work or the database raises, and GroupFullError.
        """
        if len(self._waiting) >= MOST_WAITING:
            raise GroupFullError(f"{len(self._waiting)} calls wait for the database")
        asked = _Asked[Item, Answer](item, asyncio.get_running_loop().create_future())
        # When nobody waits for it any more, its error is nobody's either.
        asked.answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting.append(asked)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work_off(), name="group commit")
            # What ends it is told to everybody who waits: nobody is left to be told.
            self._task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(asked.answer)

    async def settle(self) -> None:
        """Wait until all that was asked for is done."""
        while self._task is not None and not self._task.done():
            await asyncio.wait({self._task})

    async def _work_off(self) -> None:
        group: list[_Asked[Item, Answer]] = []
        try:
            while self._waiting:
                count = min(MOST_AT_ONCE, len(self._waiting))
                group = [self._waiting.popleft() for _ in range(count)]
                await self._together(group)
        except BaseException as error:
            # Whoever ends this task: nobody may wait for an answer that does not come.
            _fail([*group, *self._waiting], error)
            self._waiting.clear()
            raise

    async def _together(self, group: Sequence[_Asked[Item, Answer]]) -> None:
        """One transaction for ``group``; each in one of its own when that fails by the fault of one."""
        try:
            async with self._begin() as db:
                answers = await self._work(db, [asked.item for asked in group])
        except _UNUSABLE as error:
            _fail(group, error)
        except Exception as error:  # noqa: BLE001
            if len(group) == 1:
                _fail(group, error)
                return
            for asked in group:
                await self._together([asked])
        else:
            for asked, answer in zip(group, answers, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(answer)


def _fail(group: Sequence[_Asked[Item, Answer]], error: BaseException) -> None:
    for asked in group:
        if not asked.answer.done():
            asked.answer.set_exception(error)
