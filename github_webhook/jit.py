"""Takes a just-in-time configuration apart: the three files a runner reads, checked before a guest gets them.

``encoded_jit_config`` is base64 of a JSON object that maps each file name to base64 of its content
(actions/runner, ``src/Runner.Listener/Runner.cs``, the ``--jitconfig`` branch). The content is secret.
"""

import base64
import binascii

import msgspec

from github_webhook.errors import JitConfigInvalid

RUNNER_FILES = (".runner", ".credentials", ".credentials_rsaparams")
MAX_CONFIG = 256 << 10
MAX_FILE = 64 << 10

_files = msgspec.json.Decoder(dict[str, str])


def decode(encoded_jit_config: str) -> dict[str, bytes]:
    """File name → content for exactly ``RUNNER_FILES``. Raises JitConfigInvalid, whose text holds no content.

    The names are an allow-list, because they become paths in the guest.
    """
    if len(encoded_jit_config) > MAX_CONFIG:
        raise JitConfigInvalid(f"the configuration is larger than {MAX_CONFIG} bytes")
    try:
        outer = _files.decode(_unbase64(encoded_jit_config, "the configuration"))
    except msgspec.DecodeError:
        raise JitConfigInvalid("the configuration is not a JSON object of strings") from None
    unknown = sorted(set(outer) - set(RUNNER_FILES))
    if unknown:
        raise JitConfigInvalid(f"unknown files in the configuration: {', '.join(map(repr, unknown))[:200]}")
    missing = [name for name in RUNNER_FILES if name not in outer]
    if missing:
        raise JitConfigInvalid(f"files missing from the configuration: {', '.join(missing)}")
    return {name: _content(name, outer[name]) for name in RUNNER_FILES}


def _content(name: str, encoded: str) -> bytes:
    data = _unbase64(encoded, name)
    if not 0 < len(data) <= MAX_FILE:
        raise JitConfigInvalid(f"{name} must have 1 to {MAX_FILE} bytes, has {len(data)}")
    return data


def _unbase64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise JitConfigInvalid(f"{what} is not base64") from None
