"""Which warm parent a job's machine is forked from, and why. Pure.

    exact key of the job's commit ─► newest parent of its branch ─► of the default branch ─► the template itself

Only parents of the job's own repository, on the template its labels ask for. A commit that is on no branch of the
repository itself (a pull request from a fork, or one of which that is not known in time) gets the default branch's
parent, whatever its branch is called.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from runner_service.domain import Bake, Job, Parent
from runner_service.labels import OURS

Reason = Literal["exact", "branch", "default_branch", "none", "shared_scope"]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a job's commit. None: not known (yet).

    ``own``: it is on that branch of the repository itself; ``keys`` are its dependency keys on the bases in question;
    ``bake`` the newest bake that would have made a better parent; ``trouble`` why the repository cannot be looked at.
    ``watched``: bakes of it are queued here by themselves.
    """

    default_branch: str | None = None
    own: bool | None = None
    keys: frozenset[str] = frozenset()
    bake: Bake | None = None
    trouble: str | None = None
    watched: bool = False


class Choice(msgspec.Struct, frozen=True):
    """``parent`` None: the template itself. ``reason`` is the line of the job's timeline."""

    parent: Parent | None
    code: Reason
    reason: str


def candidates(job: Job, base: str, parents: Iterable[Parent]) -> list[Parent]:
    """The parents this job may be forked from at all: of its repository and owner, baked on the template ``base``.

    None when its runner registers for more than the repository: whichever job of the scope comes first takes it.
    """
    if job.scope_kind != "repository":
        return []
    return [p for p in of_repository(job.owner, job.repo, parents) if p.base == base]


def of_repository(owner: str, repo: str, parents: Iterable[Parent]) -> list[Parent]:
    """The parents of one repository that belong to its owner."""
    name = f"{owner}/{repo}".lower()
    return [p for p in parents if p.repository == name and p.owner == owner.lower()]


def asks(job: Job, found: Sequence[Parent], default_branch: str | None) -> frozenset[Literal["own", "key"]]:
    """Which facts could change the choice among ``found``: none when it is the same whatever they are."""

    def parent(own: bool | None, key: str | None = None) -> Parent | None:
        keys = frozenset({key} if key is not None else ())
        facts = Facts(default_branch=default_branch, own=own, keys=keys)
        return _pick(job, found, facts)[0]

    fallback = parent(own=True)
    by_key = {p.key for p in found if parent(True, p.key) is not fallback}
    if by_key:
        return frozenset({"own", "key"})
    return frozenset({"own"}) if fallback is not parent(own=None) else frozenset()


def choose(job: Job, base: str, parents: Iterable[Parent], facts: Facts) -> Choice:
    """The parent for ``job``, whose labels ask for the template ``base``."""
    if job.scope_kind != "repository":
        return Choice(
            None, "shared_scope", f"template {base}: its runner may be taken by any job of {job.scope_path}"
        )
    parent, code = _pick(job, candidates(job, base, parents), facts)
    if parent is None:
        return Choice(None, "none", f"no parent yet: template {base}{_why(facts) or _next(facts)}")
    commit = f"commit {job.head_sha[:12]}"
    if code == "exact":
        why = f"exact key of {commit}"
    elif parent.branch == job.head_branch and facts.own is not False:
        why = f"newest parent of its branch{_why(facts)}"
    elif facts.own:
        why = f"fallback: default branch's parent{_why(facts)}"
    else:
        where = (
            "is not known to be on a branch"
            if facts.own is None
            else f"is not on the branch '{job.head_branch}'"
        )
        why = f"default branch's parent: {commit} {where} of the repository itself"
    return Choice(parent, code, f"{parent.name} {parent.digest[:12]}: {why}")


def _pick(job: Job, found: Sequence[Parent], facts: Facts) -> tuple[Parent | None, Reason]:
    default = next((p for p in found if p.branch == facts.default_branch), None)
    # A commit that is not known to be the repository's own may have the default branch's at most.
    allowed = found if facts.own else [p for p in found if p is default]
    exact = [p for p in allowed if p.key in facts.keys]
    if exact:
        return max(
            exact, key=lambda p: (p.branch == job.head_branch, p is default, p.created_at, p.name)
        ), "exact"
    branch = next((p for p in allowed if p.branch == job.head_branch and p is not default), None)
    if branch is not None:
        return branch, "branch"
    return (default, "default_branch") if default is not None else (None, "none")


def labels_asked(owner: str, repo: str, parents: Iterable[Parent]) -> dict[str, str]:
    """Label (lower case) → template, as a repository's parents ask for it; the newest one has the last word.

    ``microvm`` alone means the template that one is baked on.
    """
    asked: dict[str, str] = {}
    for parent in sorted(of_repository(owner, repo, parents), key=lambda p: (p.created_at, p.name)):
        asked.update((label.lower(), parent.base) for label in (*parent.machine.labels, OURS))
    return asked


def _why(facts: Facts) -> str:
    """Why there is no better one, as the end of a sentence."""
    bake = facts.bake
    if bake is not None and bake.state == "failed":
        where = f" at step {bake.step}" if bake.step else ""
        said = (bake.message or bake.code or "").partition("\n")[0][:200]
        return f"; the bake of key {bake.key[:12]} failed{where}: {said} (microvm bakes log {bake.id})"
    if bake is not None and bake.state == "baking":
        return f"; the bake of key {bake.key[:12]} is under way"
    if bake is not None and bake.state == "queued":
        return "; its bake is queued" + (f" again after {bake.attempts} tries" if bake.attempts else "")
    if facts.trouble is not None:
        return f"; the repository cannot be looked at: {facts.trouble[:200]}"
    return ""


def _next(facts: Facts) -> str:
    if facts.watched and facts.bake is None:
        return "; the repository is being looked at, then a bake is queued"
    return ""
