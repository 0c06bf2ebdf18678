"""A public key file on disk → `PublicKey`."""

from __future__ import annotations

from pathlib import Path

from signer.errors import BadFile
from signer.model import MAX_PUBLIC_KEY, PublicKey
from signer.ssh.publickey import parse_public_key


def load_public_key(path: Path) -> PublicKey:
    """The key in the first line of a `.pub` file.

    Raises `BadPublicKey` if it is not a valid key, and `BadFile` if it cannot be read or is a private key.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PUBLIC_KEY + 1)
    except OSError as error:
        raise BadFile(
            "file_unreadable", f"{path} cannot be read: {error.strerror}", "name a file that is there"
        ) from None
    if b"PRIVATE KEY-----" in raw:
        raise BadFile("file_is_a_private_key", f"{path} holds a private key", "name its .pub file")
    return parse_public_key(raw.decode("utf-8-sig", "replace").strip().split("\n", 1)[0].strip())
