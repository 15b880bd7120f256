"""Fair turns as properties: no limit exceeded, no room wasted, nobody starves, weights and priorities hold."""

from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from runner_service import placement
from runner_service.domain import Host
from runner_service.fairness import (
    Line,
    Plan,
    Shares,
    Used,
    names,
    overflow,
    priority,
    quotas,
    share,
    weight,
)
from runner_service.limits import Limits

REPOSITORIES = ("Acme/big", "acme/small", "octo-org/hello", "octo-org/world")
LABELS = ("microvm", "microvm-8gb", "self-hosted")


def line(repository: str, missing: int, **more: object) -> Line:
    values: dict[str, object] = {
        "group": f"github|repository:{repository}|t|microvm", "repository": repository, "labels": ("microvm",),
        "missing": missing, "oldest": 1000.0, "need_mib": 512,
    }  # fmt: skip
    return Line(**(values | more))  # pyright: ignore


lines = st.lists(
    st.builds(
        line, st.sampled_from(REPOSITORIES), st.integers(0, 6),
        group=st.sampled_from(("a", "b")), labels=st.lists(st.sampled_from(LABELS), unique=True).map(tuple),
        oldest=st.floats(900, 1000), need_mib=st.sampled_from((256, 512, 2048)), vcpus=st.integers(1, 4),
    ),
    max_size=8, unique_by=lambda one: one.key,
)  # fmt: skip
hosts = st.lists(
    st.builds(
        Host, st.sampled_from(("h1", "h2", "h3")), st.integers(0, 8), st.integers(0, 4096),
        cpus=st.integers(0, 8), draining=st.booleans(),
    ),
    max_size=3, unique_by=lambda host: host.name,
)  # fmt: skip
few = st.integers(0, 4)
limits = st.builds(
    Limits, per_owner=few, per_repository=few, per_label=few,
    owners=st.dictionaries(st.sampled_from(("acme", "octo-*")), few),
    repositories=st.dictionaries(st.sampled_from(("acme/*", "octo-org/hello")), few),
    labels=st.dictionaries(st.sampled_from(("microvm-8gb", "microvm*")), few),
    weights=st.dictionaries(st.sampled_from(("acme/*", "acme/small")), st.floats(0.5, 4)),
    priorities=st.dictionaries(st.sampled_from(("microvm-8gb", "microvm*")), st.integers(-2, 2)),
)  # fmt: skip
debts = st.dictionaries(st.sampled_from([name.lower() for name in REPOSITORIES]), st.floats(0, 1000))


def plan(
    lines: list[Line],
    hosts: list[Host],
    limits: Limits,
    shares: Shares | None = None,
    used: Used | None = None,
) -> Plan:
    return share(
        lines, used=used or Counter(), hosts=hosts, limits=limits, shares=shares or Shares(1000.0), now=1000.0
    )


def afterwards(lines: list[Line], hosts: list[Host], done: Plan) -> tuple[Used, list[Host]]:
    """The VMs and hosts after ``done``, counted anew."""
    used: Used = Counter()
    rooms = {host.name: host for host in hosts}
    for one in lines:
        for host in done.places.get(one.key, ()):
            used.update(names(one.repository, one.labels))
            rooms[host] = placement.after(rooms[host], one.need_mib, one.vcpus)
    return used, list(rooms.values())


@settings(max_examples=300)
@given(lines, hosts, limits, debts)
def test_no_limit_is_exceeded_and_nothing_waits_that_could_run(
    lines: list[Line], hosts: list[Host], limits: Limits, debts: dict[str, float]
) -> None:
    done = plan(lines, hosts, limits, Shares(1000.0, debts))
    used, rooms = afterwards(lines, hosts, done)
    for one in lines:
        for quota in quotas(one.repository, one.labels, limits):
            assert used[quota.kind, quota.name] <= quota.most
    for host in rooms:
        assert host.vms <= host.max_vms and host.used_mib <= host.memory_mib
        assert not host.cpus or host.vcpus <= host.cpus or host.vms == 1
        assert not (host.draining and host.vms)
    for one in lines:
        given_out = len(done.places.get(one.key, ()))
        assert given_out <= one.missing
        full = [q for q in quotas(one.repository, one.labels, limits) if used[q.kind, q.name] >= q.most]
        room = placement.place(one.need_mib, one.vcpus, rooms)
        if given_out < one.missing:
            assert full or isinstance(room, placement.NoRoom)
            assert done.held[one.key].reason.startswith(("limit: ", "capacity: ", "draining: "))
        else:
            assert one.key not in done.held


@given(lines, hosts, limits, debts, st.randoms(use_true_random=False))
def test_the_order_in_which_lines_are_read_decides_nothing(
    lines: list[Line], hosts: list[Host], limits: Limits, debts: dict[str, float], chance
) -> None:
    shuffled = list(lines)
    chance.shuffle(shuffled)
    one, other = (plan(some, hosts, limits, Shares(1000.0, debts)) for some in (lines, shuffled))
    assert one == other


@given(lines, st.integers(0, 12), limits, debts)
def test_a_higher_priority_comes_first(
    lines: list[Line], room: int, limits: Limits, debts: dict[str, float]
) -> None:
    alike = [msgspec.structs.replace(one, need_mib=1, vcpus=1) for one in lines]
    done = plan(alike, [Host("h", room, 10_000)], limits, Shares(1000.0, debts))
    short = [
        priority(one.labels, limits)
        for one in alike
        if one.key in done.held and done.held[one.key].code == "max_vms"
    ]
    for one in alike:
        if done.places.get(one.key) and short:
            assert priority(one.labels, limits) >= max(short)


@given(debts, st.sets(st.sampled_from(REPOSITORIES), min_size=1), st.integers(0, 3))
def test_debts_are_bounded_by_who_waits(debts: dict[str, float], waiting: set[str], room: int) -> None:
    some = [line(name, 5) for name in sorted(waiting)]
    after = plan(some, [Host("h", room, 10_000)], Limits(), Shares(1000.0, debts)).shares
    assert min(after.debts.get(name.lower(), 0.0) for name in waiting) == 0.0
    assert all(debt > 0 for debt in after.debts.values())
    assert plan(some, [Host("h", 99, 99_999)], Limits(), Shares(1000.0, debts)).shares.debts == {}


class Machine:
    """Jobs of fixed lengths through one host with ``slots`` VMs; ``ran`` has the repository of each start, in order."""

    def __init__(self, slots: int, limits: Limits | None = None) -> None:
        self.slots = slots
        self.limits = limits or Limits()
        self.now = 1000.0
        self.shares = Shares(self.now)
        self.queued: dict[str, int] = {}
        self.since: dict[str, float] = {}
        self.lengths: dict[str, float] = {}
        self.running: list[tuple[float, str]] = []
        self.ran: list[str] = []
        self.seconds: Counter[str] = Counter()

    def queue(self, repository: str, jobs: int, seconds: float) -> None:
        self.queued[repository] = self.queued.get(repository, 0) + jobs
        self.since.setdefault(repository, self.now)
        self.lengths[repository] = seconds

    def step(self) -> None:
        """A pass, and on to the end of the next job."""
        used: Used = Counter()
        for _, name in self.running:
            used.update(names(name, ("microvm",)))
        some = [line(name, count, oldest=self.since[name]) for name, count in self.queued.items()]
        host = Host("h", self.slots, 10**9, vms=len(self.running))
        done = share(some, used=used, hosts=[host], limits=self.limits, shares=self.shares, now=self.now)
        self.shares = done.shares
        for (_, name), places in done.places.items():
            self.queued[name] -= len(places)
            self.ran += [name] * len(places)
            self.seconds[name] += self.lengths[name] * len(places)
            self.running += [(self.now + self.lengths[name], name)] * len(places)
        self.running.sort()
        if self.running:
            self.now, _ = self.running.pop(0)


@given(st.integers(1, 20), st.integers(0, 30), st.floats(1, 600), st.floats(1, 600))
def test_a_matrix_of_200_jobs_can_not_starve_a_repository_with_one(
    slots: int, head_start: int, long: float, short: float
) -> None:
    machine = Machine(slots)
    machine.queue("acme/matrix", 200, long)
    for _ in range(head_start):
        machine.step()
    machine.queue("octo-org/hello", 1, short)
    for _ in range(2):
        machine.step()
    # At most a VM that became free before is the matrix's: the next one is not.
    assert "octo-org/hello" in machine.ran


def test_newcomers_do_not_starve_who_had_much_and_is_limited_by_nothing_but_room() -> None:
    machine = Machine(2)
    machine.queue("acme/matrix", 100, 60)
    for _ in range(40):
        machine.step()
    before = len(machine.ran)
    machine.queue("octo-org/hello", 100, 60)
    for _ in range(40):
        machine.step()
    mine = Counter(machine.ran[before:])
    assert abs(mine["acme/matrix"] - mine["octo-org/hello"]) <= 4


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.sampled_from((0.5, 1.0, 2.0, 3.0, 5.0)), st.floats(1, 1000))
def test_weights_hold_in_the_long_run(slots: int, heavy: float, seconds: float) -> None:
    machine = Machine(slots, Limits(weights={"acme/*": heavy}))
    machine.queue("acme/heavy", 10_000, seconds)
    machine.queue("octo-org/light", 10_000, seconds)
    for _ in range(600):
        machine.step()
    ran = Counter(machine.ran)
    assert abs(ran["acme/heavy"] / ran["octo-org/light"] / heavy - 1) < 0.1


def test_turns_are_shares_of_time_and_not_of_jobs() -> None:
    machine = Machine(8)
    machine.queue("acme/long", 10_000, 1200)
    machine.queue("octo-org/short", 10_000, 60)
    for _ in range(4000):
        machine.step()
    # Each start costs something too, so that short jobs get somewhat less than half.
    assert 0.4 < machine.seconds["octo-org/short"] / machine.seconds["acme/long"] < 1.1


def test_a_repository_that_its_own_limit_holds_back_saves_nothing_up() -> None:
    machine = Machine(4, Limits(repositories={"acme/limited": 1}))
    machine.queue("acme/limited", 1000, 60)
    machine.queue("octo-org/hello", 1000, 60)
    for _ in range(200):
        machine.step()
    before = len(machine.ran)
    machine.limits = Limits()
    for _ in range(40):
        machine.step()
    mine = Counter(machine.ran[before:])
    assert abs(mine["acme/limited"] - mine["octo-org/hello"]) <= 6


def test_a_large_job_waits_for_its_size_but_not_for_ever() -> None:
    large = line("acme/big", 1, need_mib=2048, oldest=1000.0)
    small = line("octo-org/hello", 5, oldest=900.0)
    host = Host("h", 8, 4096, vms=5, used_mib=2560)
    early = plan([large, small], [host], Limits())
    assert len(early.places[small.key]) == 3 and early.held[large.key].code == "memory"
    late = plan(
        [msgspec.structs.replace(large, oldest=600.0), small],
        [host],
        Limits(),
        Shares(1000.0, {"octo-org/hello": 1.0}),
    )
    assert not late.places and "kept for it" in late.held[large.key].reason


def test_every_reason_names_the_limit_its_value_and_its_setting() -> None:
    def reason(limits: Limits, used: Used, labels: tuple[str, ...] = ("microvm",)) -> str:
        one = line("Octo-Org/Hello", 1, labels=labels)
        return plan([one], [Host("h", 8, 4096)], limits, used=used).held[one.key].reason

    four: Used = Counter(dict.fromkeys(names("octo-org/hello", ("microvm-8gb",)), 4))
    assert reason(Limits(per_repository=4), four) == (
        "limit: 4 of 4 VMs of octo-org/hello are in use ([limits] per_repository)"
    )
    assert reason(Limits(per_owner=2), four) == (
        "limit: 4 of 2 VMs of octo-org are in use ([limits] per_owner)"
    )
    assert reason(Limits(labels={"microvm-8*": 1}), four, ("Microvm-8gb",)) == (
        'limit: 4 of 1 VMs with the label microvm-8gb are in use ([limits.labels] "microvm-8*")'
    )


def test_the_name_itself_comes_before_patterns_and_longer_ones_before_shorter() -> None:
    limits = Limits(
        per_repository=1, repositories={"*/*": 2, "octo-org/*": 3, "Octo-Org/hello": 4, "acme/*": 0}
    )
    most = {
        name: [q.most for q in quotas(name, (), limits)]
        for name in ("octo-org/HELLO", "octo-org/world", "x/y", "acme/big")
    }
    assert most == {"octo-org/HELLO": [4], "octo-org/world": [3], "x/y": [2], "acme/big": []}
    assert weight("X/Y", Limits(weights={"x/*": 2.0})) == 2.0


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(0, 50)), st.integers(1, 60))
def test_what_exceeds_the_queue_is_of_the_longest(queued: dict[str, int], most: int) -> None:
    out = overflow(queued, most)
    left = {name: count - out.get(name, 0) for name, count in queued.items()}
    assert sum(left.values()) == min(most, sum(queued.values()))
    for name in out:
        assert all(left[name] >= left[other] - 1 or left[other] == queued[other] for other in queued)
        assert out[name] > 0 and left[name] >= 0
        assert all(left[name] + 1 >= left[other] for other in queued)
