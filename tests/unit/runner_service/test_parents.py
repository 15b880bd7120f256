"""Which parent a job gets: by the documented order, for whatever there is to choose from."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from runner_service import parents
from runner_service.domain import Bake, Job, Parent, Template
from runner_service.parents import Facts

BASES = ("github-runner", "python-ci")
KEYS = ("k1", "k2", "k3")
BRANCHES = ("main", "dev", "feature/x", "release/1")
REPOSITORIES = ("octo-org/hello", "octo-org/other", "evil/hello")


def job(**more: object) -> Job:
    values: dict[str, object] = {
        "id": "github-1", "forge": "github", "forge_job_id": "1", "owner": "Octo-Org", "repo": "Hello",
        "scope_kind": "repository", "scope_path": "Octo-Org/Hello", "labels": ("microvm",), "state": "queued",
        "event_at": 1.0, "updated_at": 1.0, "head_sha": "a" * 40, "head_branch": "dev",
    }  # fmt: skip
    return Job(**(values | more))  # pyright: ignore


def parent(
    repository: str, branch: str, key: str, base: str = BASES[0], at: float = 1.0, **more: object
) -> Parent:
    name = f"{repository}@{branch}"
    machine = Template(name, f"digest-{name}-{key}-{base}", (), 512, "/opt/runner")
    values: dict[str, object] = {
        "machine": machine, "repository": repository, "owner": repository.partition("/")[0], "branch": branch,
        "commit": "c" * 40, "key": key, "base": base, "base_digest": "b", "created_at": at,
    }  # fmt: skip
    return Parent(**(values | more))  # pyright: ignore


def bake(**more: object) -> Bake:
    values: dict[str, object] = {
        "id": 7, "host": "h", "forge": "github", "repository": "octo-org/hello", "branch": "dev", "commit": "a" * 40,
        "key": "k9", "base": BASES[0], "base_digest": "b", "state": "failed", "why": "", "created_at": 1.0,
        "due_at": 1.0,
    }  # fmt: skip
    return Bake(**(values | more))  # pyright: ignore


MAIN, DEV = parent("octo-org/hello", "main", "k1"), parent("octo-org/hello", "dev", "k2")


def test_the_exact_key_is_preferred_then_the_branch_then_the_default_branch() -> None:
    def chosen(head_branch: str = "dev", **facts: object) -> parents.Choice:
        known = Facts(default_branch="main", own=True, **facts)  # pyright: ignore
        return parents.choose(job(head_branch=head_branch), BASES[0], [MAIN, DEV], known)

    exact = chosen(keys=frozenset({"k1"}))
    assert exact.parent is MAIN and exact.code == "exact"
    assert exact.reason == f"octo-org/hello@main {MAIN.digest[:12]}: exact key of commit aaaaaaaaaaaa"
    assert chosen(keys=frozenset({"k3"})).parent is DEV
    assert chosen().code == "branch"
    other = chosen("topic", bake=bake(step="install", message="npm ci: exit 1\nmore"))
    assert other.parent is MAIN and other.code == "default_branch"
    assert (
        "fallback: default branch's parent; the bake of key k9 failed at step install: npm ci: exit 1 ("
        in other.reason
    )
    assert "microvm bakes log 7" in other.reason and "more" not in other.reason


def test_without_a_parent_the_reason_says_what_comes() -> None:
    def reason(**facts: object) -> str:
        choice = parents.choose(job(), BASES[0], [], Facts(default_branch="main", own=True, **facts))  # pyright: ignore
        assert choice.parent is None and choice.code == "none"
        return choice.reason

    start = "no parent yet: template github-runner"
    assert reason() == start
    assert reason(watched=True) == f"{start}; the repository is being looked at, then a bake is queued"
    assert reason(watched=True, bake=bake(state="queued")) == f"{start}; its bake is queued"
    assert reason(bake=bake(state="queued", attempts=2)) == f"{start}; its bake is queued again after 2 tries"
    assert reason(bake=bake(state="baking")) == f"{start}; the bake of key k9 is under way"
    assert "cannot be looked at: denied" in reason(trouble="denied")


def test_a_commit_of_a_fork_gets_the_default_branchs_parent_whatever_its_branch_is_called() -> None:
    for head_branch in ("dev", "main", "topic"):
        for own in (False, None):
            known = Facts(default_branch="main", own=own, keys=frozenset({"k2"}))
            choice = parents.choose(job(head_branch=head_branch), BASES[0], [MAIN, DEV], known)
            assert choice.parent is MAIN
    # Even when the default branch has none: never that of a branch it only shares a name with.
    choice = parents.choose(
        job(), BASES[0], [DEV], Facts(default_branch="main", own=False, keys=frozenset({"k2"}))
    )
    assert choice.parent is None and choice.code == "none"


def test_a_runner_that_any_repository_may_take_gets_no_repositorys_parent() -> None:
    shared = job(scope_kind="organization", scope_path="Octo-Org")
    choice = parents.choose(shared, BASES[0], [MAIN], Facts(default_branch="main", own=True))
    assert choice.parent is None and choice.code == "shared_scope"
    assert parents.candidates(shared, BASES[0], [MAIN]) == []


def test_what_only_one_answer_can_follow_from_is_not_asked() -> None:
    def asked(*found: Parent, head_branch: str = "dev") -> frozenset[str]:
        return parents.asks(job(head_branch=head_branch), found, "main")

    assert asked() == asked(MAIN) == asked(MAIN, head_branch="topic") == frozenset()
    assert asked(DEV) == {"own"}
    assert asked(DEV, head_branch="main") == {"own", "key"}
    assert asked(MAIN, DEV) == {"own", "key"}
    same = parent("octo-org/hello", "dev", "k1")
    assert asked(MAIN, same, head_branch="main") == frozenset()
    assert asked(MAIN, same) == {"own"}


def test_labels_that_a_repository_asks_for_mean_the_template_its_parents_stand_on() -> None:
    old = parent("octo-org/hello", "dev", "k", BASES[0], at=1.0)
    new = parent("octo-org/hello", "main", "k", BASES[1], at=2.0)
    new = msgspec.structs.replace(
        new, machine=msgspec.structs.replace(new.machine, labels=("microvm-DB", "big"))
    )
    asked = parents.labels_asked(
        "Octo-Org", "Hello", [new, old, parent("evil/hello", "main", "k", BASES[0], at=9.0)]
    )
    assert asked == {"microvm": BASES[1], "microvm-db": BASES[1], "big": BASES[1]}
    assert parents.labels_asked("octo-org", "other", [new, old]) == {}


# ── whatever there is ────────────────────────────────────────────────────────────────────────────

some_parents = st.lists(
    st.builds(
        parent,
        st.sampled_from(REPOSITORIES),
        st.sampled_from(BRANCHES),
        st.sampled_from(KEYS),
        st.sampled_from(BASES),
        st.floats(0, 100),
    ),
    unique_by=lambda p: p.name,
    max_size=12,
)
some_facts = st.builds(
    Facts,
    default_branch=st.sampled_from([*BRANCHES, None]),
    own=st.sampled_from([True, False, None]),
    keys=st.frozensets(st.sampled_from(KEYS), max_size=2),
    bake=st.one_of(st.none(), st.builds(bake, state=st.sampled_from(["queued", "baking", "done", "failed"]))),
    trouble=st.one_of(st.none(), st.just("denied")),
    watched=st.booleans(),
)
some_jobs = st.builds(
    job,
    owner=st.sampled_from(["octo-org", "Octo-Org", "evil"]),
    repo=st.sampled_from(["hello", "other"]),
    head_branch=st.sampled_from([*BRANCHES, "topic", ""]),
)


@given(some_jobs, st.sampled_from(BASES), some_parents, some_facts)
def test_no_job_ever_gets_a_parent_that_is_not_its_own(
    one: Job, base: str, found: list[Parent], facts: Facts
) -> None:
    choice = parents.choose(one, base, found, facts)
    assert choice.reason and "\n" not in choice.reason
    chosen = choice.parent
    if chosen is None:
        assert choice.code == "none"
        return
    assert chosen in found
    assert chosen.repository == f"{one.owner}/{one.repo}".lower() and chosen.owner == one.owner.lower()
    assert chosen.base == base
    if not facts.own:
        assert chosen.branch == facts.default_branch
    if choice.code == "exact":
        assert chosen.key in facts.keys


@given(some_jobs, st.sampled_from(BASES), some_parents, some_facts)
def test_the_best_there_is_is_taken(one: Job, base: str, found: list[Parent], facts: Facts) -> None:
    choice = parents.choose(one, base, found, facts)
    mine = parents.candidates(one, base, found)
    default = [p for p in mine if p.branch == facts.default_branch]
    if facts.own:
        assert (choice.code == "exact") == any(p.key in facts.keys for p in mine)
        if choice.code != "exact" and any(p.branch == one.head_branch for p in mine):
            assert choice.parent is not None and choice.parent.branch == one.head_branch
    assert choice.parent is not None or not default


@given(some_jobs, st.sampled_from(BASES), some_parents, some_facts)
def test_a_fact_that_is_not_asked_for_changes_nothing_but_the_reason(
    one: Job, base: str, found: list[Parent], facts: Facts
) -> None:
    mine = parents.candidates(one, base, found)
    asked = parents.asks(one, mine, facts.default_branch)
    known = facts
    if "own" not in asked:
        known = msgspec.structs.replace(known, own=None)
    if "key" not in asked:
        known = msgspec.structs.replace(known, keys=frozenset())
    assert parents.choose(one, base, found, known).parent == parents.choose(one, base, found, facts).parent


@given(some_jobs, st.sampled_from(BASES), some_parents, some_facts, st.randoms())
def test_the_order_of_the_parents_does_not_matter(
    one: Job, base: str, found: list[Parent], facts: Facts, chance: object
) -> None:
    shuffled = list(found)
    chance.shuffle(shuffled)  # pyright: ignore
    assert parents.choose(one, base, shuffled, facts) == parents.choose(one, base, found, facts)
