"""Labels to templates: every way to ask, every reason to refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner_service.domain import Template
from runner_service.labels import Foreign, Serve, Unservable, choose, group_key, registered_labels

SMALL = Template("github-runner", "a" * 64, ("microvm-1cpu-512mb",), 512, "/opt/actions-runner")
LARGE = Template("large", "b" * 64, ("microvm-4cpu-8gb", "gpu"), 8192, "/opt/actions-runner")
BARE = Template("minimal", "c" * 64, (), 512, None)
ALL = [BARE, LARGE, SMALL]


@pytest.mark.parametrize(
    ("labels", "template"),
    [
        (["microvm"], "github-runner"),
        (["MicroVM"], "github-runner"),
        (["self-hosted", "Linux", "X64", "microvm"], "github-runner"),
        (["microvm-large"], "large"),
        (["microvm", "microvm-large"], "large"),
        (["microvm-4cpu-8gb"], "large"),
        (["microvm-1cpu-512mb"], "github-runner"),
        (["microvm", "gpu"], "large"),
        (["microvm", "team-a"], "github-runner"),
    ],
)
def test_a_template_is_found(labels: list[str], template: str) -> None:
    chosen = choose(labels, ALL, default="github-runner", extra=("team-a",))
    assert isinstance(chosen, Serve) and chosen.template.name == template
    assert {label.lower() for label in chosen.labels} >= {
        "self-hosted",
        "linux",
        "x64",
        *(x.lower() for x in labels),
    }


@pytest.mark.parametrize(
    ("labels", "code", "words"),
    [
        (["microvm-nope"], "no_template", ["microvm-nope", "github-runner", "large"]),
        (["microvm-minimal"], "no_template", ["minimal", "holds no runner"]),
        (["microvm", "windows"], "unknown_label", ["windows", "extra_labels"]),
        (["microvm-1cpu-512mb", "gpu"], "unknown_label", ["gpu"]),
    ],
)
def test_a_refusal_says_why(labels: list[str], code: str, words: list[str]) -> None:
    refused = choose(labels, ALL, default="github-runner")
    assert isinstance(refused, Unservable) and refused.code == code
    for word in words:
        assert word in refused.reason


def test_a_default_that_is_not_baked_is_a_reason() -> None:
    refused = choose(["microvm"], [BARE, LARGE], default="github-runner")
    assert isinstance(refused, Unservable) and "not baked" in refused.reason


@pytest.mark.parametrize("labels", [[], ["ubuntu-latest"], ["self-hosted", "linux", "x64"], ["microvmx"]])
def test_other_peoples_jobs_are_left_alone(labels: list[str]) -> None:
    assert isinstance(choose(labels, ALL, default="github-runner"), Foreign)


words = st.sampled_from(
    ["microvm", "microvm-large", "microvm-4cpu-8gb", "gpu", "linux", "x64", "self-hosted", "odd"]
)


@given(st.lists(words, max_size=6), st.randoms())
def test_neither_order_nor_case_nor_repetition_matters(labels: list[str], random: object) -> None:
    shuffled = [label.upper() if i % 2 else label for i, label in enumerate(labels * 2)]
    random.shuffle(shuffled)  # pyright: ignore
    one, other = (choose(each, ALL, default="github-runner") for each in (labels, shuffled))
    assert type(one) is type(other)
    if isinstance(one, Serve) and isinstance(other, Serve):
        assert one.template == other.template
        keys = [group_key("github", "repository:o/r", "t", each.labels) for each in (one, other)]
        assert keys[0] == keys[1]


@given(st.lists(words, max_size=6))
def test_what_is_registered_is_what_the_job_asks_and_the_companions_once(labels: list[str]) -> None:
    registered = [label.lower() for label in registered_labels(labels)]
    assert len(registered) == len(set(registered))
    assert set(registered) == {*labels, "self-hosted", "linux", "x64"}


def test_a_repository_may_say_which_template_its_labels_mean() -> None:
    python = Template("python-ci", "p", (), 512, "/opt/runner")
    asked = {"microvm": "python-ci", "microvm-db": "python-ci", "gpu": "python-ci"}

    def served(*labels: str, asked: dict[str, str] | None = asked) -> str | None:
        found = choose(labels, [SMALL, python], default="github-runner", asked=asked)
        return found.template.name if isinstance(found, Serve) else None

    assert served("microvm") == served("microvm-db") == served("microvm", "gpu") == "python-ci"
    assert served("microvm", asked=None) == served("microvm", asked={"microvm": "gone"}) == "github-runner"
    # A template that is named is meant, and what no template serves is served by none.
    assert served("microvm-github-runner") == "github-runner"
    assert served("microvm-db", asked=None) is served("microvm", "gpu", asked={}) is None
