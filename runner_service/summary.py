"""Why a job is where it is: where its time went, what it waits for now, since when, and what would end that. Pure."""

from collections.abc import Sequence

import msgspec

from runner_service.domain import Job, Runner, TimelineRow
from runner_service.phases import Span, spans

# What ends a wait, by its code; phases without a wait of their own stand here by their name.
_ENDS = {
    "approval": "somebody approves it at the forge",
    "no_template": "a template serves its labels: see microvm templates, then bake one or correct runs-on",
    "capacity": "a VM ends, or [runners] max_vms or memory_mib allow more",
    "max_vms": "a VM of this host ends, or [runners] max_vms allows more",
    "memory": "a VM ends, or [runners] memory_mib allows more",
    "cpu": "a VM ends, or the settings let this host promise more of its CPUs",
    "too_large": "a host with more memory ([runners] memory_mib), or a smaller template",
    "draining": "microvm drain --undo, or another host",
    "limit": "a job under the same limit ends, or the limit is raised",
    "queue": "the queue gets shorter, or [limits] most_queued allows more",
    "brake": "the next try",
    "runner_taken": "its next runner comes online; the forge gave the first one to another job",
    "bake": "the bake ends: see microvm bakes",
    "deciding": "its turn comes: older jobs of its repository go first, and repositories take turns",
    "event": "the forge's next event about it",
    "forking": "the fork; it is given up after [runners] fork_limit_s",
    "registering": "the forge's answer to the registration; it is given up after [runners] fork_limit_s",
    "starting": "its runner comes online; it is replaced after [runners] online_limit_s",
    "forge": "the forge gives the job to its runner, which is online; it is replaced after [runners] idle_limit_s",
    "cleanup": "the VM and the registration are given back; nothing of the job waits for that",
}
_TRIED_AGAIN = "the next try, which comes by itself; its reason has to go"


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """What a job waits for now. ``code`` is stable, ``what`` for people; ``since`` in Unix seconds.

    ``place`` of ``among``: its place among the queued jobs of its repository that the same runners serve (1 is next);
    repositories take turns. None when that does not decide.
    """

    code: str
    what: str
    since: float
    seconds: float
    ends: str
    place: int | None = None
    among: int | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A job's life so far in a few spans, which follow each other without gaps and sum up to ``seconds``.

    ``ready_seconds``: until it was running, or until now. Times are Unix seconds.
    """

    began_at: float
    seconds: float
    ready_seconds: float
    over: bool
    spans: tuple[Span, ...]
    wait: Wait | None = None


def summarize(
    job: Job,
    runners: Sequence[Runner],
    rows: Sequence[TimelineRow],
    *,
    says: str | None,
    place: tuple[int, int] | None,
    now: float,
) -> Summary:
    """``says`` is the sentence shown as what the job waits for; ``place`` its place in the queue, of how many."""
    over = job.state == "completed" and all(runner.state == "gone" for runner in runners)
    began = job.created_at
    found = spans(rows, created_at=began, until=None if over else now)
    ready = sum(span.seconds for span in found if span.phase not in ("running", "cleanup"))
    return Summary(
        began_at=found[0].at if found else job.event_at,
        seconds=sum(span.seconds for span in found),
        ready_seconds=ready,
        over=over,
        spans=tuple(found),
        wait=_wait(found[-1], says, place, now) if found and job.state in ("waiting", "queued") else None,
    )


def _wait(last: Span, says: str | None, place: tuple[int, int] | None, now: float) -> Wait:
    code = last.reason or last.phase
    queued = last.phase in ("deciding", "waiting") and code not in ("approval", "no_template")
    return Wait(
        code=code,
        what=says or code.replace("_", " "),
        since=last.at,
        seconds=max(0.0, now - last.at),
        ends=_ENDS.get(code, _TRIED_AGAIN),
        place=place[0] if place is not None and queued else None,
        among=place[1] if place is not None and queued else None,
    )
