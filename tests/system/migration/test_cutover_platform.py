"""The platform that cutover tests use is what it says: Vault signs, hosts let in, and each fault shows."""

from __future__ import annotations

import pytest

from signer.migration.config import load_cutover_file
from tests.parts import missing
from tests.parts.platform import Platform

pytestmark = [missing.needs_podman, missing.needs_podman_compose, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def platform(new_platform: Platform) -> Platform:
    return new_platform


def test_vault_signs_and_all_hosts_let_in(platform: Platform) -> None:
    platform.wait_for_mode("vault")
    assert platform.can_log_in()
    assert "ssh/sign/llmops" in platform.bao.audit_file.read_text()


def test_its_cutover_file_is_one(platform: Platform) -> None:
    found = load_cutover_file(platform.write_config(decommission__soak="5s", smoke_edge1__trusted_ca_file=None))
    assert found.decommission is not None
    assert found.decommission.soak == 5
    assert [target.trusted_ca_file is None for target in found.smoke] == [False, True]
