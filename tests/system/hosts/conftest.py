"""Hosts for the host kit: skipped where this machine makes none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parts import kit_hosts, missing
from tests.parts.kit_hosts import KitHost, KitHosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[KitHosts]:
    if reason := missing.sshd() or missing.ssh_keygen() or kit_hosts.why_not_here():
        pytest.skip(reason)
    with kit_hosts.kit_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def quiet_host(hosts: KitHosts) -> KitHost:
    """A host whose sshd does not run and that no test changes for long."""
    return hosts.new()


@pytest.fixture
def host(hosts: KitHosts) -> KitHost:
    """A host of the test's own, with an sshd that runs."""
    made = hosts.new()
    made.start_sshd()
    return made
