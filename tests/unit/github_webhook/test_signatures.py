"""Signatures: GitHub's own test vector, rotation, and everything that must not pass."""

import hmac
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from github_webhook.signatures import Verifier, sign, verify

SECRET = "It's a Secret to Everybody"
BODY = b"Hello, World!"
SIGNATURE = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"


def test_githubs_test_vector() -> None:
    assert sign(BODY, SECRET) == SIGNATURE
    assert verify(BODY, SIGNATURE, [SECRET])


@pytest.mark.parametrize("secrets", [[SECRET, "old"], ["new", SECRET], ["a", SECRET, "b"]])
def test_any_of_several_secrets_fits(secrets: list[str]) -> None:
    assert verify(BODY, SIGNATURE, secrets)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "sha256=",
        SIGNATURE[:-1],
        SIGNATURE + "0",
        SIGNATURE.removeprefix("sha256="),
        SIGNATURE.replace("sha256", "sha1"),
        SIGNATURE.upper(),
        "sha256=" + "ü" * 64,
        "\udcff",
    ],
)
def test_what_is_not_the_signature_does_not_pass(header: str | None) -> None:
    assert not verify(BODY, header, [SECRET])


def test_nothing_passes_without_a_secret() -> None:
    """An unset secret is no secret: even a delivery signed with the empty string is refused."""
    assert not verify(BODY, sign(BODY, ""), [""])
    assert not verify(BODY, sign(BODY, ""), [])


def test_every_secret_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    real: Callable[[Any, Any], bool] = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    assert verify(BODY, SIGNATURE, [SECRET, "b", "c"])
    assert not verify(BODY, SIGNATURE, ["a", "b", "c"])
    assert len(compared) == 6


@given(chunks=st.lists(st.binary(max_size=50), max_size=10), secret=st.text(min_size=1, max_size=20))
def test_a_body_in_pieces_is_the_body(chunks: list[bytes], secret: str) -> None:
    verifier = Verifier(["other-secret", secret])
    for chunk in chunks:
        verifier.update(chunk)
    assert verifier.matches(sign(b"".join(chunks), secret))


@given(body=st.binary(max_size=200), bit=st.integers(0, 200 * 8 - 1))
def test_one_changed_bit_is_noticed(body: bytes, bit: int) -> None:
    if bit // 8 >= len(body):
        return
    changed = bytearray(body)
    changed[bit // 8] ^= 1 << bit % 8
    assert not verify(bytes(changed), sign(body, SECRET), [SECRET])
