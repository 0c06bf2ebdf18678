"""What the launcher does as root before it starts a process of another user."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from signer.errors import BadSettings
from signer.service.launcher import _prepare_directories, _prepare_notices, look_up_ids
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


@missing.needs_root
def test_the_directory_of_notices_is_its_users_and_others_may_only_pass_through(tmp_path: Path) -> None:
    sender = pwd.getpwnam("nobody")
    folder = tmp_path / "sender"
    environ = {"SIGNER_NOTICES_FILE": "/etc/signer/notices.toml", "SIGNER_NOTICES_DIR": str(folder)}
    users = {"SIGNER_KEEPER_USER": "daemon", "SIGNER_API_USER": "www-data", "SIGNER_NOTICES_USER": "nobody"}
    settings = load_settings({**environ, **users})
    owner = look_up_ids(settings)["SIGNER_NOTICES_USER"]
    for mode in (0o700, 0o755):  # of a former release, of somebody's hand
        _prepare_notices(settings, owner)
        facts = folder.stat()
        assert (facts.st_uid, facts.st_mode & 0o7777) == (sender.pw_uid, 0o711)
        folder.chmod(mode)


def test_a_directory_of_notices_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sender").write_text("")
    settings = load_settings({"SIGNER_NOTICES_DIR": str(tmp_path / "sender")})
    with pytest.raises(BadSettings) as refused:
        _prepare_notices(settings, None)
    assert refused.value.code == "directory_unusable"
