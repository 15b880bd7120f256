"""Placement: never more than a host holds, always a reason when none does."""

from hypothesis import given
from hypothesis import strategies as st

from runner_service.domain import Host
from runner_service.placement import NoRoom, after, place

hosts = st.lists(
    st.builds(
        Host, st.text("abc", min_size=1, max_size=3), st.integers(0, 4), st.integers(0, 4096),
        st.integers(0, 4), st.integers(0, 4096), st.booleans(), st.integers(0, 4), st.integers(0, 4),
    ),
    max_size=4,
)  # fmt: skip


@given(hosts, st.integers(1, 2048), st.integers(1, 4))
def test_a_place_is_real_and_no_place_has_a_reason(have: list[Host], need: int, vcpus: int) -> None:
    def takes(h: Host) -> bool:
        cpus = not h.cpus or not h.vms or h.vcpus + vcpus <= h.cpus
        return not h.draining and h.vms < h.max_vms and h.used_mib + need <= h.memory_mib and cpus

    answer = place(need, vcpus, have)
    if isinstance(answer, NoRoom):
        assert answer.reason.startswith(("capacity: ", "draining: "))
        assert not any(takes(h) for h in have)
    else:
        full = after(answer, need, vcpus)
        assert takes(answer)
        assert full.vms <= full.max_vms and full.used_mib <= full.memory_mib


def test_the_reason_names_the_numbers_and_the_setting() -> None:
    def reason(need: int, *hosts: Host, vcpus: int = 1) -> str:
        answer = place(need, vcpus, hosts)
        assert isinstance(answer, NoRoom)
        return answer.reason

    assert reason(1, Host("a", 8, 4096, vms=8)) == "capacity: 8 of 8 VMs in use ([runners] max_vms)"
    assert "512 MiB of memory and 424 MiB are free" in reason(512, Host("a", 8, 1024, used_mib=600))
    assert "memory_overcommit" in reason(512, Host("a", 8, 1024, used_mib=600))
    assert "largest host" in reason(2048, Host("a", 8, 1024))
    assert "draining" in reason(1, Host("a", 8, 1024, draining=True))
    assert "2 vCPUs and 1 are free" in reason(1, Host("a", 8, 1024, vms=3, cpus=4, vcpus=3), vcpus=2)
    assert "cpu_overcommit" in reason(1, Host("a", 8, 1024, vms=3, cpus=4, vcpus=3), vcpus=2)


def test_a_vm_with_more_cpus_than_the_host_promises_runs_there_alone() -> None:
    assert isinstance(place(1, 8, [Host("a", 8, 1024, cpus=4)]), Host)
    assert isinstance(place(1, 8, [Host("a", 8, 1024, vms=1, cpus=4, vcpus=1)]), NoRoom)
