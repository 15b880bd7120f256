"""Checks ``X-Hub-Signature-256``, the hex HMAC-SHA256 of the raw body, in constant time.

Source: GitHub's documentation, "Validating webhook deliveries" (its test vector is a unit test of ours).
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256

PREFIX = "sha256="


class Verifier:
    """An HMAC per secret, fed while the body arrives, so that a large body is not hashed in one go.

    Empty secrets are left out: an unset secret must never make every delivery valid.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        self._macs = [hmac.new(secret.encode(), digestmod=sha256) for secret in secrets if secret]

    def update(self, chunk: bytes) -> None:
        for mac in self._macs:
            mac.update(chunk)

    def matches(self, header: str) -> bool:
        """Whether ``header`` was made with one of the secrets. Every secret is compared, whichever fits."""
        given = header.strip().encode("utf-8", "surrogateescape")
        valid = False
        for mac in self._macs:
            expected = (PREFIX + mac.hexdigest()).encode()
            valid |= hmac.compare_digest(expected, given)
        return valid


def verify(body: bytes, header: str | None, secrets: Sequence[str]) -> bool:
    """Whether ``header`` (``sha256=<64 hex digits>``) signs ``body`` with one of ``secrets``."""
    verifier = Verifier(secrets)
    verifier.update(body)
    return verifier.matches(header or "")


def sign(body: bytes, secret: str) -> str:
    """The header value GitHub would send for ``body``; what tests and the stand-in sign with."""
    return PREFIX + hmac.new(secret.encode(), body, sha256).hexdigest()
