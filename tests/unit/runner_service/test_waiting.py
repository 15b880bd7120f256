"""The soak's own measure: it finds the time a job waited for nothing, and excuses only what is named."""

from tests.integration.waiting import Span, Waited, seconds, unexplained


def gaps(waited: Waited, *, alike=(), made=(), causes=()):
    return unexplained(waited, [waited, *alike], made, causes)


def test_a_wait_of_which_nothing_is_known_is_a_gap() -> None:
    assert gaps(Waited("a", "g", 10.0, 25.0)) == [(10.0, 25.0)]


def test_a_runner_under_way_and_a_named_cause_explain_the_wait() -> None:
    made = [Span(14.0, 25.0, "forking", "g")]
    causes = [Span(9.0, 14.0, "capacity", "g")]
    assert gaps(Waited("a", "g", 10.0, 25.0), made=made, causes=causes) == []


def test_a_planted_gap_between_two_causes_is_found() -> None:
    made = [Span(18.5, 25.0, "forking", "g")]
    causes = [Span(5.0, 12.0, "the service is down"), Span(15.0, 18.0, "rate limited", "g")]
    found = gaps(Waited("a", "g", 10.0, 25.0), made=made, causes=causes)
    assert found == [(12.0, 15.0), (18.0, 18.5)]
    assert seconds(found) == 3.5


def test_one_runner_explains_the_wait_of_one_job_only() -> None:
    first, second = Waited("a", "g", 10.0, 20.0), Waited("b", "g", 11.0, 30.0)
    made = [Span(11.0, 20.0, "forking", "g")]
    assert gaps(second, alike=[first], made=made) == [(11.0, 30.0)]
    assert gaps(second, alike=[first], made=[*made, Span(12.0, 30.0, "forking", "g")]) == [(11.0, 12.0)]
    # When the older one is gone, the next runner is for the younger.
    assert gaps(second, alike=[first], made=[*made, Span(20.0, 30.0, "forking", "g")]) == [(11.0, 20.0)]


def test_what_is_said_of_others_explains_nothing() -> None:
    made = [Span(10.0, 25.0, "forking", "another group")]
    causes = [Span(10.0, 25.0, "capacity", "another group"), Span(10.0, 25.0, "not heard of", "g", "b")]
    assert gaps(Waited("a", "g", 10.0, 25.0), made=made, causes=causes) == [(10.0, 25.0)]
