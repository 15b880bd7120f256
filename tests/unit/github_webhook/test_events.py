"""Events: the official examples, what counts as queued, and what is refused."""

import json
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook.errors import DeliveryRefused, PayloadInvalid, PayloadNotJson, UnknownEvent
from github_webhook.events import (
    Ignored,
    InstallationEvent,
    PingEvent,
    PushEvent,
    WorkflowJobEvent,
    parse,
)
from tests.standins.github_official import webhook_examples


def payload(**changes: Any) -> dict[str, Any]:
    job = {
        "id": 7,
        "run_id": 3,
        "run_attempt": 2,
        "name": "test",
        "workflow_name": "CI",
        "head_sha": "a" * 40,
        "head_branch": "main",
        "status": "queued",
        "conclusion": None,
        "labels": ["microvm"],
        "runner_id": None,
        "runner_name": None,
        "created_at": "2026-11-21T03:00:00Z",
        "started_at": "2026-11-21T03:00:00Z",
        "completed_at": None,
    }
    event: dict[str, Any] = {
        "action": "queued",
        "workflow_job": job,
        "repository": {"id": 1, "full_name": "octo-org/demo"},
    }
    for path, value in changes.items():
        target = event
        *parents, last = path.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return event


def read(event: dict[str, Any], name: str = "workflow_job") -> Any:
    return parse(name, json.dumps(event).encode())


def test_all_official_workflow_job_examples_are_understood() -> None:
    examples = webhook_examples("workflow_job")
    assert len(examples) == 8
    for example in examples:
        event = read(example)
        job = example["workflow_job"]
        assert isinstance(event, WorkflowJobEvent)
        assert (event.action, event.status) == (example["action"], job["status"])
        assert (event.job_id, event.run_id) == (job["id"], job["run_id"])
        assert event.labels == tuple(job["labels"])
        assert event.runner_id == job["runner_id"]
        assert f"{event.owner}/{event.repo}" == example["repository"]["full_name"]
        assert event.installation_id == example.get("installation", {}).get("id")
        assert (event.organization is None) == ("organization" not in example)


def test_official_examples_that_wait_for_an_approval_are_no_demand() -> None:
    """One of them says ``action: queued``; only its status tells."""
    states = [(e["action"], read(e).state) for e in webhook_examples("workflow_job")]
    assert states.count(("queued", "queued")) == 1
    assert states.count(("queued", "waiting")) == 1
    assert states.count(("waiting", "waiting")) == 1
    deployed = [read(e) for e in webhook_examples("workflow_job") if e.get("deployment")]
    assert [event.environment for event in deployed] == [
        e["deployment"]["environment"] for e in webhook_examples("workflow_job") if e.get("deployment")
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("ping", PingEvent), ("push", PushEvent), ("installation", InstallationEvent)]
)
def test_the_other_official_examples_are_understood(name: str, kind: type) -> None:
    examples = webhook_examples(name)
    assert examples
    for example in examples:
        assert isinstance(read(example, name), kind)


@pytest.mark.parametrize(
    ("action", "status", "state"),
    [
        ("queued", "queued", "queued"),
        ("queued", "waiting", "waiting"),
        ("queued", "pending", "waiting"),
        ("waiting", "waiting", "waiting"),
        ("waiting", "queued", "waiting"),
        ("in_progress", "in_progress", "in_progress"),
        ("in_progress", "queued", "in_progress"),
        ("completed", "completed", "completed"),
        ("completed", "in_progress", "completed"),
    ],
)
def test_action_and_status_together_say_where_a_job_stands(action: str, status: str, state: str) -> None:
    assert read(payload(action=action, workflow_job__status=status)).state == state


def test_no_runner_is_none_however_it_is_written() -> None:
    nothing: list[tuple[Any, Any]] = [(0, ""), (None, None)]
    for number, name in nothing:
        event = read(payload(workflow_job__runner_id=number, workflow_job__runner_name=name))
        assert event.runner_id is None and event.runner_name is None


def test_times_are_unix_seconds() -> None:
    event = read(payload(workflow_job__created_at="1970-01-01T01:00:00.500+01:00"))
    assert event.created_at == 0.5 and event.completed_at is None


def test_unknown_fields_and_old_payloads_without_new_ones_are_fine() -> None:
    event = payload(workflow_job__novelty={"a": [1]}, novelty=3)
    for name in ("run_attempt", "workflow_name", "head_branch", "created_at", "conclusion"):
        del event["workflow_job"][name]
    parsed = read(event)
    assert parsed.run_attempt == 1 and parsed.created_at is None


def test_an_action_of_the_future_is_ignored_not_refused() -> None:
    assert read(payload(action="teleported")) == Ignored("unknown_action")


def test_what_every_app_is_sent_unasked_is_ignored() -> None:
    assert parse("installation_repositories", b"whatever") == Ignored("unwanted_event")


def test_an_unknown_event_names_what_would_be_known() -> None:
    with pytest.raises(UnknownEvent, match=r"'star'.*workflow_job"):
        parse("star", b"{}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("workflow_job__id", "7"),
        ("workflow_job__id", None),
        ("workflow_job__labels", "microvm"),
        ("workflow_job__labels", [1]),
        ("workflow_job__head_sha", "../../etc/passwd"),
        ("workflow_job__created_at", "yesterday"),
        ("repository__full_name", "octo-org"),
        ("repository__full_name", "octo-org/../admin"),
        ("repository__full_name", "octo-org/.."),
        ("repository__full_name", "octo org/demo"),
        ("repository__full_name", "octo-org/demo?x=1"),
        ("repository", None),
        ("workflow_job", []),
    ],
)
def test_what_we_use_must_have_its_documented_shape(path: str, value: Any) -> None:
    with pytest.raises(PayloadInvalid) as caught:
        read(payload(**{path: value}))
    assert "$" in str(caught.value), "the message says where"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"not json", b"\xff\xfe", b'{"a": 1} trailing', b"[" * 200_000],
    ids=["empty", "open", "words", "bytes", "trailing", "deep"],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises((PayloadNotJson, PayloadInvalid)):
        parse("workflow_job", body)


def test_every_truncation_of_a_payload_is_refused() -> None:
    whole = json.dumps(payload()).encode()
    for end in range(len(whole)):
        with pytest.raises((PayloadNotJson, PayloadInvalid)):
            parse("workflow_job", whole[:end])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    ),
    st.sampled_from(["action", "workflow_job", "repository", "installation", "deployment", "organization"]),
)
def test_no_payload_raises_anything_but_a_refusal(value: Any, key: str) -> None:
    event = deepcopy(payload())
    event[key] = value
    with suppress(DeliveryRefused):
        read(event)


def test_a_push_knows_its_default_branch() -> None:
    push = {
        "ref": "refs/heads/main",
        "before": "0" * 40,
        "after": "b" * 40,
        "repository": {"full_name": "octo-org/demo", "default_branch": "main"},
    }
    assert read(push, "push").on_default_branch
    assert not read({**push, "ref": "refs/heads/topic"}, "push").on_default_branch
    assert not read({**push, "deleted": True}, "push").on_default_branch
    with pytest.raises(PayloadInvalid):
        read({**push, "after": "HEAD"}, "push")
