"""A token in a file of its owner's, for Vault or for our own service: one careful way to read it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from signer.errors import BadSettings

MAX_TOKEN: Final = 4096  # bytes


def open_unread(path: Path) -> int:
    """The file, opened but not read: through no link, and without waiting at a pipe. Raises `OSError`."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)


def read_secret_word(path: Path, setting: str, *, is_vaults: bool = False, reader: str = "you") -> str:
    """The one word in a regular file that only its owner may use, named by `setting`; raises `BadSettings`.

    What is checked is what is read: the open file. Codes begin with `vault_token` or `signer_token`, as `is_vaults`
    says whose token it is; nothing of the content is told. `reader` is who has to be able to read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise BadSettings(
            "vault_token_unreadable" if is_vaults else "signer_token_unreadable",
            f"the file of {setting} cannot be opened: {getattr(error, 'strerror', None) or 'its path is malformed'}",
            f"name a regular file that {reader} may read",
        ) from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077:
            raise BadSettings(
                "vault_token_not_private" if is_vaults else "signer_token_not_private",
                f"the file of {setting} has mode {stat.S_IMODE(facts.st_mode):04o}",
                "chmod 0400 it",
            )
        token = os.read(descriptor, MAX_TOKEN + 1).decode("utf-8", "replace").strip()
    finally:
        os.close(descriptor)
    if not token or len(token) > MAX_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise BadSettings(
            "vault_token_malformed" if is_vaults else "signer_token_malformed",
            f"the file of {setting} is not one token",
            "put the token into it",
        )
    return token
