"""Keys in files that a command names: `.pub` files, and the enrolment of a passkey."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from signer.errors import BadFile
from signer.model import MAX_PUBLIC_KEY, Passkey, PublicKey

STDIN: Final = "-"
MAX_KEYS: Final = 64 * 1024  # bytes of a file with several keys


def load_public_key(path: Path) -> PublicKey:
    """The key in the first line of a `.pub` file.

    Raises `BadPublicKey` if it is not a valid key, and `BadFile` if it cannot be read or is a private key.
    """
    from signer.ssh.publickey import parse_public_key  # late: for help and completion it is too slow

    raw = _public(path, _read(path, MAX_PUBLIC_KEY))
    return parse_public_key(raw.decode("utf-8-sig", "replace").strip().split("\n", 1)[0].strip())


def read_public_keys(path: Path) -> bytes:
    """The content of a file with public keys, or of stdin if its name is `-`; raises `BadFile`."""
    raw = _public(path, _read(path, MAX_KEYS))
    if len(raw) > MAX_KEYS:
        raise BadFile("file_too_large", f"{path} has more than {MAX_KEYS} bytes", "name a file of keys")
    return raw


def load_enrolment(path: Path) -> tuple[Passkey, dict[str, object]]:
    """The passkey of an enrolment, and its entry for `approval_keys`; raises `BadFile`."""
    from signer.policy.passkeys import MAX_ENROLMENT, read_enrolment

    return read_enrolment(_read(path, MAX_ENROLMENT))


def _public(path: Path, raw: bytes) -> bytes:
    if b"PRIVATE KEY-----" in raw:
        raise BadFile("file_is_a_private_key", f"{path} holds a private key", "name its .pub file")
    return raw


def _read(path: Path, limit: int) -> bytes:
    """The file, and one byte more than `limit` at most; raises `BadFile`."""
    try:
        if str(path) == STDIN:
            return sys.stdin.buffer.read(limit + 1)
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        text = f"{path} cannot be read: {error.strerror}"
        raise BadFile("file_unreadable", text, "name a file that is there") from None
