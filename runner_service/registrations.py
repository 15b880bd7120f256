"""Registrations and runners agree: what the forge still lists of a runner that is gone is deregistered, and a runner
whose registration vanished is retired. Jobs of a repository that exists no more are closed.

Every minute some of the scopes this host's runners used are listed, those first that were not looked at for longest:
each about every five minutes while it is used, every hour for a day after. What is to be changed must be seen twice,
and a registration is let go only when its name is in our books as gone: another service may use the same prefix.
A registration that is busy is left alone; so is everything in a scope whose account is held back.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from github_webhook.errors import ForgeError, NotFound
from runner_service.domain import Job, JobEvent, RemoteRunner, Runner, Scope, concluded
from runner_service.ports import Forge
from runner_service.store import queries as q
from runner_service.store import registration_queries as rq
from runner_service.store.store import Store

log = structlog.get_logger("registrations")

TICK = 60.0
IN_USE = 300.0
UNUSED = 3600.0
AGAIN = 60.0
"""What was seen once is looked at again after this."""

AT_ONCE = 10
OF_ONE_ACCOUNT = 3
LOOK_SECONDS = 60.0
SINCE = 86400.0
SETTLED = 30.0
"""The forge's listing may lag: a younger registration that it does not show is no vanished one."""

MISSING = 600.0
"""A scope the forge does not know for this long, on three looks at least, is gone."""

GONE = "registration_gone"


class Place(msgspec.Struct, frozen=True):
    """A scope of a forge."""

    forge: str
    scope: Scope

    @property
    def account(self) -> str:
        return f"{self.forge} {self.scope.path.partition('/')[0].lower()}"


class _Known(msgspec.Struct):
    """What earlier looks at a place saw: suspects by what they are suspected of, and since when it is missing."""

    due: float = 0.0
    phantoms: frozenset[str] = frozenset()
    vanished: frozenset[str] = frozenset()
    missing: int = 0
    missing_since: float = 0.0


class Registrations:
    """``lose`` retires a runner of this process (id, reason, code); ``observe`` hears what is known of a job."""

    def __init__(
        self,
        *,
        store: Store,
        forges: Mapping[str, Forge],
        host: str,
        lose: Callable[[str, str, str], None],
        observe: Callable[[JobEvent], None],
        tick: float = TICK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._forges = forges
        self._host = host
        self._lose = lose
        self._observe = observe
        self._tick = tick
        self._clock = clock
        self._known: dict[Place, _Known] = {}

    async def run(self) -> None:
        """Until cancelled. A look that fails is told and done again."""
        while True:
            try:
                await self.sweep()
            except Exception as error:
                log.exception("sweep_failed", error=str(error))
            await asyncio.sleep(self._tick)

    async def sweep(self) -> None:
        """One round: some of the places that are due, all at once, each within its deadline."""
        now = self._clock()
        used = {
            Place(forge, scope): at
            for forge, scope, at in await self._store.read(
                lambda db: rq.used_scopes(db, self._host, now - SINCE)
            )
        }
        self._known = {place: self._known.get(place, _Known()) for place in used}
        chosen = _chosen({place: known.due for place, known in self._known.items()}, now)
        await asyncio.gather(*(self._look(place, in_use=used[place] > now - UNUSED) for place in chosen))

    async def _look(self, place: Place, *, in_use: bool) -> None:
        known = self._known[place]
        known.due = self._clock() + (IN_USE if in_use else UNUSED)
        forge = self._forges.get(place.forge)
        if forge is None:
            return
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._compare(place, known, forge)
        except ForgeError as error:
            log.info("look_failed", scope=place.scope.key, code=error.code, error=str(error))
            if type(error) is NotFound:
                await self._not_there(place, known)
        except TimeoutError:
            log.warning("look_too_slow", scope=place.scope.key)
        if known.phantoms or known.vanished or known.missing:
            known.due = min(known.due, self._clock() + min(AGAIN, self._tick))

    async def _compare(self, place: Place, known: _Known, forge: Forge) -> None:
        began = self._clock()
        listed = await forge.registrations(place.scope)
        known.missing = 0
        names = [remote.name for remote in listed.runners]
        rows = await self._store.read(lambda db: q.runners_by_id(db, names))
        mine = await self._store.read(
            lambda db: rq.registered_runners(db, self._host, place.forge, place.scope)
        )
        suspects = phantoms(listed.runners, rows)
        for remote in suspects:
            if remote.remote_id in known.phantoms:
                await self._let_go(place, forge, remote)
        known.phantoms = frozenset(remote.remote_id for remote in suspects)
        missing = vanished(mine, listed.runners, before=began - SETTLED) if listed.complete else []
        for runner in missing:
            if runner.id in known.vanished and await forge.look(place.scope, runner.remote_id or "") is None:
                self._lose(runner.id, "the forge knows its registration no more", GONE)
        known.vanished = frozenset(runner.id for runner in missing)

    async def _let_go(self, place: Place, forge: Forge, remote: RemoteRunner) -> None:
        answer = await forge.deregister(place.scope, remote.remote_id)
        log.warning(
            "phantom_registration",
            runner=remote.name,
            remote=remote.remote_id,
            scope=place.scope.key,
            answer=answer,
        )

    async def _not_there(self, place: Place, known: _Known) -> None:
        """The forge answers that there is no such scope: when it says so long enough, its jobs are over."""
        now = self._clock()
        known.missing_since = known.missing_since if known.missing else now
        known.missing += 1
        if known.missing < 3 or now - known.missing_since < MISSING:
            return
        jobs = await self._store.read(lambda db: rq.open_jobs_of(db, place.forge, place.scope))
        log.warning("scope_gone", scope=place.scope.key, jobs=len(jobs))
        for job in jobs:
            self._observe(_closed(job, place, now))


def phantoms(listed: Sequence[RemoteRunner], rows: Mapping[str, Runner]) -> list[RemoteRunner]:
    """Registrations of runners that are gone in our books. Busy ones, and names we do not know, are left alone."""
    return [
        remote
        for remote in listed
        if not remote.busy and remote.name in rows and rows[remote.name].state == "gone"
    ]


def vanished(mine: Sequence[Runner], listed: Sequence[RemoteRunner], *, before: float) -> list[Runner]:
    """Runners that wait for a job, registered before that moment, of whom the forge does not know any more."""
    there = {remote.remote_id for remote in listed}
    return [
        runner
        for runner in mine
        if runner.state in ("registering", "idle")
        and runner.serving_job_id is None
        and runner.remote_id is not None
        and runner.remote_id not in there
        and runner.state_at < before
    ]


def _chosen(due: Mapping[Place, float], now: float) -> list[Place]:
    """Who is looked at now: those due for longest, a few of each account."""
    chosen: list[Place] = []
    accounts: dict[str, int] = {}
    for place in sorted((place for place, at in due.items() if at <= now), key=lambda place: due[place]):
        if len(chosen) == AT_ONCE:
            break
        if accounts.get(place.account, 0) < OF_ONE_ACCOUNT:
            accounts[place.account] = accounts.get(place.account, 0) + 1
            chosen.append(place)
    return chosen


def _closed(job: Job, place: Place, now: float) -> JobEvent:
    note = f"the forge knows no {place.scope.path} any more, or does not show it to these credentials"
    return concluded(job, "repository_gone", note, now)
