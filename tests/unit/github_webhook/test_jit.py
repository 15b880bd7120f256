"""Just-in-time configurations: three files, strictly."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook.errors import JitConfigInvalid
from github_webhook.jit import MAX_CONFIG, MAX_FILE, RUNNER_FILES, decode


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def encoded(files: dict[str, Any]) -> str:
    return b64(json.dumps(files).encode())


GOOD = {name: b64(f"secret of {name}".encode()) for name in RUNNER_FILES}


def test_the_three_files_come_out() -> None:
    assert decode(encoded(GOOD)) == {name: f"secret of {name}".encode() for name in RUNNER_FILES}


@pytest.mark.parametrize(
    "config",
    [
        "",
        "%%%",
        b64(b"not json"),
        b64(b"[]"),
        b64(b"\xff\xfe"),
        encoded({}),
        encoded({**GOOD, "../../home/runner/.bashrc": b64(b"x")}),
        encoded({**GOOD, ".env": b64(b"x")}),
        encoded({name: GOOD[name] for name in RUNNER_FILES[:2]}),
        encoded({**GOOD, ".runner": "not base64!"}),
        encoded({**GOOD, ".runner": ""}),
        encoded({**GOOD, ".runner": 5}),
        encoded({**GOOD, ".runner": b64(b"x" * (MAX_FILE + 1))}),
        "A" * (MAX_CONFIG + 4),
    ],
)
def test_anything_else_is_refused(config: str) -> None:
    with pytest.raises(JitConfigInvalid):
        decode(config)


def test_a_refusal_does_not_tell_the_secret() -> None:
    for broken in ({**GOOD, ".runner": "hunter2!"}, {**GOOD, ".credentials": b64(b"hunter2" * 20_000)}):
        with pytest.raises(JitConfigInvalid) as caught:
            decode(encoded(broken))
        assert "hunter2" not in str(caught.value) and b64(b"hunter2") not in str(caught.value)


@given(st.text(max_size=200) | st.binary(max_size=200).map(b64))
def test_no_text_raises_anything_else(config: str) -> None:
    with pytest.raises(JitConfigInvalid):
        decode(config)
