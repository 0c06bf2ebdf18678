"""What `signer check` says of the users: by uid, as the service sees them, whatever their names are."""

from __future__ import annotations

import os
import pwd
from contextlib import nullcontext
from pathlib import Path

import pytest

from signer.service import checks
from signer.settings import load_settings

UIDS = {"root": 0, "toor": 0, "keeper": 901, "keeper2": 901, "api": 902, "notices": 903, "api2": 902}


@pytest.fixture(autouse=True)
def users(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is root, on a host where some users have two names."""

    def find(name: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", UIDS[name], UIDS[name], "", "/", "/bin/sh"))

    monkeypatch.setattr(pwd, "getpwnam", find)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(checks, "acting_as", lambda _uid, **_: nullcontext())


def found(folder: Path, keeper: str, api: str, notices: str) -> list[tuple[str, str]]:
    """The warnings about users, each with what it says."""
    (folder / "notices").mkdir(mode=0o700)
    settings = load_settings(
        {
            "SIGNER_KEEPER_USER": keeper,
            "SIGNER_API_USER": api,
            "SIGNER_NOTICES_USER": notices,
            "SIGNER_NOTICES_FILE": str(folder / "notices.toml"),
            "SIGNER_NOTICES_DIR": str(folder / "notices"),
        }
    )
    assert settings.notices_file is not None
    shown = [*checks._check_users(settings), *checks._check_notices(settings, settings.notices_file)]
    return [(one.code, one.detail) for one in shown if one.outcome == "warn"]


CLOSED = "notices_dir_closed"


def test_users_of_their_own_are_not_warned_of(tmp_path: Path) -> None:
    assert [code for code, _ in found(tmp_path, "keeper", "api", "notices")] == [CLOSED]


@pytest.mark.parametrize("name", ["root", "toor"])
def test_root_is_known_by_its_uid(tmp_path: Path, name: str) -> None:
    first, *rest = found(tmp_path, "keeper", "api", name)
    assert first == ("user_is_root", f"a compromised process of {name} compromises the host")
    assert [code for code, _ in rest] == [CLOSED]


@pytest.mark.parametrize("api", ["keeper", "keeper2"])
def test_keeper_and_api_are_one_user_by_its_uid(tmp_path: Path, api: str) -> None:
    first, *rest = found(tmp_path, "keeper", api, "notices")
    assert first == ("users_are_one", "the api can access the keeper's files")
    assert [code for code, _ in rest] == [CLOSED]


@pytest.mark.parametrize("notices, more", [("keeper", []), ("keeper2", []), ("api", [CLOSED]), ("api2", [CLOSED])])
def test_the_user_of_notices_is_known_by_its_uid(tmp_path: Path, notices: str, more: list[str]) -> None:
    first, *rest = found(tmp_path, "keeper", "api", notices)
    text = f"the process that sends notices to the Internet runs as {notices}, and can use that process's files"
    assert first == ("users_are_one", text)
    assert [code for code, _ in rest] == more, "the keeper's own user can reach the socket"
