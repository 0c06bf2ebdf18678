"""What the keeper logs of errors that its core meets."""

from __future__ import annotations

import logging

import pytest

from signer.authority.vault_certificates import outside_grant
from signer.protocol.log_limit import LogLimit
from signer.service.startup import _report


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
