"""Keys in files that a command names: a `.pub` file, and the enrolment of a passkey."""

from __future__ import annotations

from pathlib import Path

from signer.errors import BadFile
from signer.model import MAX_PUBLIC_KEY, Passkey, PublicKey
from signer.ssh.publickey import parse_public_key


def load_public_key(path: Path) -> PublicKey:
    """The key in the first line of a `.pub` file.

    Raises `BadPublicKey` if it is not a valid key, and `BadFile` if it cannot be read or is a private key.
    """
    raw = _read(path, MAX_PUBLIC_KEY)
    if b"PRIVATE KEY-----" in raw:
        raise BadFile("file_is_a_private_key", f"{path} holds a private key", "name its .pub file")
    return parse_public_key(raw.decode("utf-8-sig", "replace").strip().split("\n", 1)[0].strip())


def load_enrolment(path: Path) -> tuple[Passkey, dict[str, object]]:
    """The passkey of an enrolment, and its entry for `approval_keys`; raises `BadFile`."""
    from signer.policy.passkeys import MAX_ENROLMENT, read_enrolment

    return read_enrolment(_read(path, MAX_ENROLMENT))


def _read(path: Path, limit: int) -> bytes:
    """The file, and one byte more than `limit` at most; raises `BadFile`."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise BadFile(
            "file_unreadable", f"{path} cannot be read: {error.strerror}", "name a file that is there"
        ) from None
