"""What the launcher does as root before it starts a process of another user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

from signer.service.launcher import _prepare_directories, look_up_ids
from signer.settings import load_settings
from tests.parts import missing


@missing.needs_root
def test_audit_only_the_ledgers_own_files_change_their_owner(tmp_path: Path) -> None:
    keeper = pwd.getpwnam("daemon")
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    ledger, other, outside = data / "ledger.sqlite3", data / "notes", tmp_path / "shadow"
    for path in (ledger, other, outside):
        path.write_text("x")
    os.link(outside, data / "ledger.hard-link")
    (data / "ledger.link").symlink_to(outside)
    (data / "ledger.folder").mkdir()
    environ = {"SIGNER_DATA_DIR": str(data), "SIGNER_RUN_DIR": str(tmp_path / "run")}
    environ |= {"SIGNER_KEEPER_USER": "daemon", "SIGNER_API_USER": "nobody"}
    groups = os.getgroups()
    try:
        settings = load_settings(environ)
        _prepare_directories(settings, look_up_ids(settings))
    finally:
        os.setgroups(groups)
    owners = {path.name: path.lstat().st_uid for path in (data, *data.iterdir(), outside)}
    assert owners == {
        "data": keeper.pw_uid,
        "ledger.sqlite3": keeper.pw_uid,
        "notes": 0,
        "shadow": 0,
        "ledger.hard-link": 0,
        "ledger.link": 0,
        "ledger.folder": 0,
    }
