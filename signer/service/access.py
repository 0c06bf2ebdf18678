"""Who reads the keeper's files: root without CAP_DAC_OVERRIDE, as in a container, becomes the keeper's user first."""

from __future__ import annotations

import os

from signer.errors import Unavailable
from signer.files import belongs_to
from signer.hardening import become
from signer.settings import Settings


def become_reader(settings: Settings) -> None:
    """Root becomes the keeper's user, for the rest of the process, if it may not read SIGNER_DATA_DIR.

    Raises `Unavailable`, which names the owner, if this user may not read it, whoever it is.
    """
    data_dir = settings.data_dir
    if os.geteuid() == 0 and not _may_read(settings):
        try:
            if settings.keeper_user is not None:
                become(settings.keeper_user)
            else:
                owner = data_dir.stat()
                os.setgroups([])
                os.setgid(owner.st_gid)
                os.setuid(owner.st_uid)
        except PermissionError:
            raise Unavailable(
                "files_denied",
                f"root may not become the keeper's user here; {belongs_to(data_dir / '.')} (SIGNER_DATA_DIR)",
                "run it as that user, or give root CAP_SETUID and CAP_SETGID",
            ) from None
    if not _may_read(settings):
        raise Unavailable(
            "files_denied",
            f"this user may not read SIGNER_DATA_DIR: {belongs_to(data_dir / '.')}",
            "run it as root or as that user",
        )


def _may_read(settings: Settings) -> bool:
    """True also where there is no such directory: then there is nothing that may not be read."""
    return os.access(settings.data_dir, os.R_OK | os.X_OK) or not _exists(settings)


def _exists(settings: Settings) -> bool:
    try:
        settings.data_dir.stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True
