"""Placement: never more than a host holds, always a reason when none does."""

from hypothesis import given
from hypothesis import strategies as st

from runner_service.domain import Host
from runner_service.placement import NoRoom, after, place

hosts = st.lists(
    st.builds(
        Host, st.text("abc", min_size=1, max_size=3), st.integers(0, 4), st.integers(0, 4096),
        st.integers(0, 4), st.integers(0, 4096), st.booleans(),
    ),
    max_size=4,
)  # fmt: skip


@given(hosts, st.integers(1, 2048))
def test_a_place_is_real_and_no_place_has_a_reason(have: list[Host], need: int) -> None:
    answer = place(need, have)
    if isinstance(answer, NoRoom):
        assert answer.reason.startswith("capacity: ")
        assert not any(
            not h.draining and h.vms < h.max_vms and h.used_mib + need <= h.memory_mib for h in have
        )
    else:
        full = after(answer, need)
        assert not answer.draining and full.vms <= full.max_vms and full.used_mib <= full.memory_mib


def test_the_reason_names_the_numbers() -> None:
    assert "8 of 8 VMs" in place(1, [Host("a", 8, 4096, vms=8)]).reason  # pyright: ignore
    assert "512 MiB" in place(512, [Host("a", 8, 1024, used_mib=600)]).reason  # pyright: ignore
    assert "largest host" in place(2048, [Host("a", 8, 1024)]).reason  # pyright: ignore
    assert "draining" in place(1, [Host("a", 8, 1024, draining=True)]).reason  # pyright: ignore
