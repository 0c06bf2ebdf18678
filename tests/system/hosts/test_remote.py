"""`signer hosts install` over a real ssh: both halves of an installation, and the way back without the second."""

from __future__ import annotations

import json

from tests.parts.kit_hosts import DROP_IN, OUTSIDE, PROGRAMS, STATE, KitHost, KitHosts, hosts_install
from tests.parts.ports import LOOPBACK


def test_one_command_installs_and_confirms(hosts: KitHosts, host: KitHost) -> None:
    """A user's ControlMaster makes no difference: the second half is a connection of its own."""
    before = host.snapshot()
    checked = hosts_install(host, "--check")
    assert checked.returncode == 0, checked.stderr
    assert f"would write   {DROP_IN}" in checked.stdout
    assert host.snapshot() == before
    done = hosts_install(host, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["result"] == "confirmed"
    assert told["report"][-1].startswith(f"confirmed by a login from {OUTSIDE}")
    listed = {"name": f"[{LOOPBACK}]:{host.port}", "fingerprints": [hosts.keys.host.fingerprint], "listed": False}
    assert told["host_keys"] == listed
    assert host.exists(f"{STATE}/confirmed")
    assert host.login(certificate=hosts.keys.certificate(host.folder)).ok
    again = hosts_install(host, "--json")
    assert json.loads(again.stdout)["result"] == "unchanged"
    assert host.run(f"{PROGRAMS}/uninstall").ok
    assert host.snapshot() == before


def test_a_host_that_it_cannot_confirm_goes_back_by_itself(host: KitHost) -> None:
    """From the host's own address, which proves nothing."""
    before = host.snapshot()
    done = hosts_install(host, source=LOOPBACK)
    assert done.returncode == 1
    assert "this login comes from this host itself" in done.stderr
    assert "it goes back to its earlier state by itself" in done.stderr
    assert host.exists(f"{STATE}/pending")  # tests/system/hosts/test_install.py waits for what comes then
    assert host.run(f"{PROGRAMS}/rollback", "--now").ok
    assert host.snapshot() == before


def test_a_host_that_the_kit_refuses_is_left_as_it_was(host: KitHost) -> None:
    before = host.snapshot()
    done = hosts_install(host, "--principals", "nobody-here=x")
    assert done.returncode == 1
    assert "account_missing" in done.stdout
    assert done.stderr.startswith(f"signer: error: root@{LOOPBACK} was left as it was\n")
    assert host.snapshot() == before
