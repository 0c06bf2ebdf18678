"""Reads the bytes of a policy file that no other user can write. Imports no model of its content, so that a command
that only compares its digest starts fast."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from signer.errors import BadFile
from signer.files import belongs_to, check_regular, read_bounded

MAX_POLICY_BYTES: Final = 4 * 1024 * 1024
POLICY_SETTING: Final = "SIGNER_POLICY_FILE"


def read_policy(path: Path, named_by: str = POLICY_SETTING) -> bytes:
    """The bytes of a policy file that no other user can write; raises `BadFile`."""
    try:
        return read_bounded(path, MAX_POLICY_BYTES, check=_check_writers, follow_links=True)
    except OSError as error:
        denied = isinstance(error, PermissionError)
        if denied:
            hint = "run it as a user who may read it, or change its mode"
        elif named_by == POLICY_SETTING:
            hint = "set SIGNER_POLICY_FILE to the policy.toml of the service, or name the file as an argument"
        else:
            hint = f"check the path that {named_by} names"
        whose = f"; {belongs_to(path)}" if denied else ""
        raise BadFile(
            "policy_unreadable", f"the policy file {path} ({named_by}) cannot be read: {error.strerror}{whose}", hint
        ) from None


def _check_writers(facts: os.stat_result) -> None:
    """Raises `BadFile` if other users can write the policy, and so grant themselves any certificate."""
    check_regular(facts)
    mode = stat.S_IMODE(facts.st_mode)
    if facts.st_uid not in (0, os.geteuid()):
        problem = f"the policy file belongs to uid {facts.st_uid}, which can change it"
    elif mode & 0o022:
        problem = f"other users can write the policy file (mode {mode:04o})"
    else:
        return
    raise BadFile("policy_file_writable", problem, "check its content, then run `chown root` and `chmod go-w` on it")
