"""Who reads and writes the keeper's files: root without CAP_DAC_OVERRIDE, as in a container, becomes that user."""

from __future__ import annotations

import os
from pathlib import Path

from signer.errors import Unavailable, write_hint
from signer.files import belongs_to, open_directory
from signer.hardening import become
from signer.settings import Settings


def become_reader(settings: Settings) -> None:
    """Root becomes the keeper's user, for the rest of the process, if it may not read SIGNER_DATA_DIR.

    Raises `Unavailable`, which names the owner, if this user may not read it, whoever it is.
    """
    data_dir = settings.data_dir
    if _may_read(data_dir):
        return
    if os.geteuid() == 0:
        _become_keeper(settings)
        if _may_read(data_dir):
            return
    raise Unavailable(
        "files_denied",
        f"this user may not read SIGNER_DATA_DIR: {belongs_to(data_dir / '.')}",
        "run it as root or as that user",
    )


def become_writer(settings: Settings) -> None:
    """Root becomes the keeper's user, for the rest of the process, so that the keeper owns every file that is written.

    Raises `Unavailable` unless SIGNER_DATA_DIR belongs to this user then, and no other user may write there.
    """
    if os.geteuid() == 0:
        _become_keeper(settings)
    data_dir = settings.data_dir
    try:
        facts = data_dir.stat()
        os.close(open_directory(data_dir))
    except OSError as error:
        text = f"SIGNER_DATA_DIR cannot be used: {error.strerror}"
        hint = "make it, owned by the keeper's user, mode 0700"
        raise Unavailable("files_denied", text, hint if data_dir.parent.exists() else write_hint(error, "it")) from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise Unavailable(
            "files_denied",
            f"SIGNER_DATA_DIR is not this user's alone: {belongs_to(data_dir / '.')}",
            "run it as root or as the keeper's user; give the folder to that user, mode 0700",
        )


def _become_keeper(settings: Settings) -> None:
    try:
        if settings.keeper_user is not None:
            become(settings.keeper_user)
            return
        try:
            owner = settings.data_dir.stat()
        except FileNotFoundError:  # its reader or writer says so
            return
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    except PermissionError:
        raise Unavailable(
            "files_denied",
            f"root may not become the keeper's user here; {belongs_to(settings.data_dir / '.')} (SIGNER_DATA_DIR)",
            "run it as that user, or give root CAP_SETUID and CAP_SETGID",
        ) from None


def _may_read(data_dir: Path) -> bool:
    """False only if the directory is there and refuses; what else is wrong with it, its reader says."""
    try:
        os.close(open_directory(data_dir))
    except PermissionError:
        return False
    except OSError:
        return True
    return os.access(data_dir, os.X_OK)
