"""What the keeper logs of errors that its core meets, and the lock on its run directory."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from pathlib import Path

import pytest

from signer.authority.vault_certificates import outside_grant
from signer.errors import SignerError, Unavailable
from signer.protocol.log_limit import LogLimit
from signer.service.startup import LOCK_NAME, _report, claim_run_dir


def test_audit_a_fault_of_vaults_is_one_line_and_one_of_ours_has_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLimit(logging.getLogger("signer.keeper"))
    for _ in range(3):
        _report(lines, outside_grant("principals"))
    try:
        raise RuntimeError("the token is gone")
    except RuntimeError as error:
        _report(lines, error)
    assert caplog.messages == ["Vault's certificate is outside the grant: principals", "internal error"]
    assert [record.exc_info is not None for record in caplog.records] == [False, True]


def test_audit_3d3_a_lock_on_the_run_directory_which_the_api_may_open_keeps_no_keeper_down(tmp_path: Path) -> None:
    tmp_path.chmod(0o2750)
    other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        os.close(claim_run_dir(tmp_path))
    finally:
        os.close(other)
    assert stat.S_IMODE((tmp_path / LOCK_NAME).stat().st_mode) == 0o600


def test_audit_3d3_a_second_keeper_is_refused_and_an_open_lock_file_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).touch(0o666)
    first = claim_run_dir(tmp_path)
    try:
        assert stat.S_IMODE((tmp_path / LOCK_NAME).stat().st_mode) == 0o600
        with pytest.raises(Unavailable) as refused:
            claim_run_dir(tmp_path)
        assert refused.value.code == "run_dir_in_use"
    finally:
        os.close(first)


def test_audit_3d3_a_lock_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / LOCK_NAME).symlink_to("elsewhere")
    with pytest.raises(SignerError) as refused:
        claim_run_dir(tmp_path)
    assert refused.value.code == "run_dir_unusable"
