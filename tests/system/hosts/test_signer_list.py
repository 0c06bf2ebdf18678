"""Hosts and the signer itself: a real service, the host kit's `update` and a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from signer.units import timestamp
from tests.parts import ports
from tests.parts.eventually import eventually
from tests.parts.keys import Key, make_key
from tests.parts.kit_hosts import FOLDER, PROGRAMS, STATE, KitHost, KitHosts, Said, hosts_install
from tests.parts.service import STANDARD_POLICY, Service

NAME = "edge1"
STEADY = ("krl", "krl.sig", "krl.publisher")  # the rest is signed again each minute
FILES = ("krl", "krl.sig", "krl.statement", "krl.statement.sig", "krl.publisher")


POLICY = STANDARD_POLICY.replace('may = ["approve", ', 'may = ["approve", "revoke", ')


@pytest.fixture(scope="module")
def service(hosts: KitHosts) -> Iterator[Service]:
    with Service(hosts.folder / "service", hosts.keys.ca, POLICY) as made:
        eventually(lambda: made.ask("GET", "/api/krl").status == 200, "a list is published")
        yield made


@pytest.fixture(scope="module")
def host(hosts: KitHosts, service: Service) -> KitHost:
    """A host that trusts the service's CA and fetches from it."""
    made = hosts.new()
    made.start_sshd()
    line = service.command("hosts", "key", "--address", service.address)
    assert line.returncode == 0, line.stderr
    made.write(f"{made.folder}/pinned.pub", line.stdout)
    made.installed("--url", f"{service.address}/api", "--publisher", f"{made.folder}/pinned.pub", "--name", NAME)
    return made


def update(host: KitHost) -> Said:
    return host.run(f"{PROGRAMS}/update")


def in_force(host: KitHost) -> bytes:
    return host.path(f"{FOLDER}/revoked.krl").read_bytes()


def certificate(
    service: Service, host: KitHost, identity: str = "deploy-agent", key: Key | None = None
) -> tuple[Path, int]:
    """A certificate of the service for a key, by default the hosts' user key, and its serial."""
    answer = service.sign((key or host.keys.user).public_line, identity=identity)
    assert answer.status == 201, answer.body
    path = host.folder / f"issued-{answer.json()['serial']}-cert.pub"
    path.write_text(answer.json()["certificate"] + "\n")
    return path, int(answer.json()["serial"])


def hosts_seen(service: Service) -> dict[str, Any]:
    answer = service.ask("GET", "/api/hosts", identity="operator")
    assert answer.status == 200
    return {row["name"]: row for row in answer.json()["hosts"]}


def revoke(service: Service, by: str, value: str) -> None:
    """Returns when a list that has the revocation is published."""
    before = service.ask("GET", "/api/krl").headers["signer-list-version"]
    answer = service.ask("POST", "/api/revocations", {"by": by, "value": value, "reason": "drill"}, identity="operator")
    assert answer.status == 201, answer.body
    eventually(lambda: service.ask("GET", "/api/krl").headers["signer-list-version"] != before, "a list is published")


def files(service: Service) -> dict[str, bytes]:
    return {name: service.ask("GET", f"/api/{name}").body for name in FILES}


def test_a_host_takes_the_signers_list_and_the_signer_sees_it(host: KitHost, service: Service) -> None:
    said = update(host)
    assert said.ok, said.err
    assert in_force(host) == files(service)["krl"]
    assert host.login(certificate=certificate(service, host)[0]).ok
    assert not host.exists(f"{STATE}/alarm")
    eventually(lambda: NAME in hosts_seen(service), "the keeper knows of the host")
    assert hosts_seen(service)[NAME]["current"] is True
    assert "seen, 1 have the newest list" in service.command("status").stdout


def test_who_may_not_see_hosts_is_refused(service: Service) -> None:
    assert service.ask("GET", "/api/hosts", identity="deploy-agent").status == 403
    assert service.ask("GET", "/api/hosts").status == 401


def test_a_keeper_that_is_killed_or_restarted_publishes_the_same_bytes(host: KitHost, service: Service) -> None:
    before = files(service)
    keeper = service.keeper_pid()
    assert keeper is not None
    os.kill(keeper, signal.SIGKILL)
    assert files(service)["krl"] == before["krl"]  # also while there is no keeper
    assert update(host).ok
    eventually(lambda: service.keeper_pid() not in (None, keeper) and service.is_ready(), "the keeper is back")
    eventually(lambda: files(service)["krl.statement"] != before["krl.statement"], "it signs a new statement")
    after = files(service)
    assert {name: after[name] for name in STEADY} == {name: before[name] for name in STEADY}
    assert update(host).ok


def test_a_host_goes_on_without_the_service(host: KitHost, service: Service) -> None:
    path, _ = certificate(service, host)
    good = in_force(host)
    service.stop()
    try:
        said = update(host)
        assert said.status == 1
        assert "cannot be fetched" in said.err
        assert in_force(host) == good
        assert host.login(certificate=path).ok
    finally:
        service.start()
    eventually(lambda: update(host).ok, "the host is up to date again")


def test_hosts_install_pins_the_publishing_key_of_the_service(hosts: KitHosts, service: Service) -> None:
    host = hosts.new()
    host.start_sshd()
    address = ("--address", service.address)
    done = hosts_install(host, "--url", f"{service.address}/api", "--name", "edge2", *address)
    assert done.returncode == 0, done.stdout + done.stderr
    key = " ".join(files(service)["krl.publisher"].decode().split()[:2])
    assert key in host.read(f"{FOLDER}/publishers")
    assert update(host).ok
    eventually(lambda: "edge2" in hosts_seen(service), "the keeper knows of it")


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Any web server, which shows files; its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """A test's output is for the test."""

    with ThreadingHTTPServer((ports.LOOPBACK, 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield f"http://{ports.LOOPBACK}:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_any_web_server_can_show_what_publish_writes(host: KitHost, service: Service, tmp_path: Path) -> None:
    def publish() -> subprocess.CompletedProcess[str]:
        return service.command("publish", str(tmp_path), "--address", service.address)

    first = publish()
    assert first.returncode == 0, first.stderr
    shown = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(shown) == {"ca", "known_hosts", "known_hosts.sig", *FILES}
    assert {shown[name] for name in STEADY} == {files(service)[name] for name in STEADY}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in STEADY}
    # What is signed each minute may have been signed in between.
    eventually(lambda: publish().stdout.endswith("files written: none\n"), "nothing is left to write")
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in STEADY} == times
    pinned = ("--publisher", f"{host.folder}/pinned.pub", "--name", NAME)
    try:
        with web_server(tmp_path) as url:
            assert host.install("--url", url, *pinned).ok
            said = update(host)
            assert said.ok, said.err
    finally:
        assert host.install("--url", f"{service.address}/api", *pinned).ok


def test_publish_refuses_what_the_pinned_key_did_not_sign(hosts: KitHosts, service: Service, tmp_path: Path) -> None:
    (tmp_path / "krl.publisher").write_text(f"{hosts.keys.publisher.public_line}\n")
    done = service.command("publish", str(tmp_path), "--address", service.address)
    assert done.returncode == 1
    assert "publishes with the key" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["krl.publisher"]


def test_without_a_list_that_ssh_keygen_reads_as_it_was_meant_there_is_none(hosts: KitHosts) -> None:
    """ssh-keygen that lies, then one that is missing, then the real one: only the last one gets a list published."""
    folder = hosts.folder / "lying"
    folder.mkdir()
    liar = folder / "ssh-keygen"
    liar.write_text("#!/bin/sh\nexit 0\n")
    liar.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}"
    with Service(hosts.folder / "without", hosts.keys.ca, environ={"PATH": path}) as service:
        eventually(lambda: "(list_differs)" in service.log(), "the keeper says why")
        answer = service.ask("GET", "/api/krl")
        assert (answer.status, answer.json()["code"]) == (503, "list_not_published")
        assert "the revocation list is not up to date" in service.ask("GET", "/readyz").json()["warnings"][0]
        assert service.sign(hosts.keys.user.public_line).status == 201  # certificates are issued meanwhile
        liar.unlink()
        eventually(
            lambda: "without ssh-keygen" in str(service.ask("GET", "/readyz").json().get("warnings")),
            "the keeper misses ssh-keygen",
            seconds=30,
        )
        liar.symlink_to("/usr/bin/ssh-keygen")
        eventually(lambda: service.ask("GET", "/api/krl").status == 200, "a list is published", seconds=60)
        assert "warnings" not in service.ask("GET", "/readyz").json()


# --- revocations; a revoked CA key ends everything, so it comes last --------------------------------------------------


def test_a_revoked_serial_is_refused_after_one_update_and_no_other_is(host: KitHost, service: Service) -> None:
    lost, serial = certificate(service, host)
    kept, _ = certificate(service, host)
    assert host.login(certificate=lost).ok
    revoke(service, "serial", str(serial))
    assert update(host).ok
    assert not host.login(certificate=lost).ok
    assert host.login(certificate=kept).ok
    assert host.login(certificate=certificate(service, host)[0]).ok
    assert host.login().ok


def test_a_revoked_identity_is_out_and_gets_nothing_from_any_door(host: KitHost, service: Service) -> None:
    lost, _ = certificate(service, host, "ci")
    kept, _ = certificate(service, host)
    revoke(service, "identity", "ci")
    assert update(host).ok
    assert not host.login(certificate=lost).ok
    assert host.login(certificate=kept).ok
    line = host.keys.user.public_line
    assert service.sign(line, identity="ci").status == 403
    as_vault = {"X-Vault-Token": service.tokens["ci"]}
    assert service.ask("POST", "/v1/ssh/sign/llmops", {"public_key": line}, headers=as_vault).status == 403
    assert host.login(certificate=certificate(service, host)[0]).ok


def test_what_was_issued_since_a_time_is_out_and_what_comes_later_is_not(host: KitHost, service: Service) -> None:
    lost = [certificate(service, host, identity)[0] for identity in ("deploy-agent", "operator")]
    revoke(service, "since", timestamp(int(time.time()) - 600))
    assert update(host).ok
    assert [host.login(certificate=path).ok for path in lost] == [False, False]
    assert host.login(certificate=certificate(service, host)[0]).ok


def test_all_certificates_of_a_revoked_key_are_out_and_it_gets_no_more(
    hosts: KitHosts, host: KitHost, service: Service
) -> None:
    key = make_key(hosts.folder, "ed25519", "stolen")
    lost, _ = certificate(service, host, key=key)
    kept, _ = certificate(service, host)
    assert host.login(certificate=lost, key=key).ok
    revoke(service, "key", key.fingerprint)
    assert update(host).ok
    assert not host.login(certificate=lost, key=key).ok
    assert host.login(certificate=kept).ok
    assert service.sign(key.public_line).status == 403


def test_a_restart_gives_the_list_of_revocations_the_same_bytes(host: KitHost, service: Service) -> None:
    before = files(service)
    assert service.ask("GET", "/api/krl").headers["signer-list-version"] != "0"
    service.stop()
    for path in (service.run_dir / "published").iterdir():
        path.unlink()  # as a reboot does with what is in /run
    service.start()
    eventually(lambda: service.ask("GET", "/api/krl").status == 200, "a list is published")
    after = files(service)
    assert {name: after[name] for name in STEADY} == {name: before[name] for name in STEADY}
    assert update(host).ok


def test_a_keeper_that_is_killed_while_it_publishes_publishes_when_it_is_back(host: KitHost, service: Service) -> None:
    lost, serial = certificate(service, host)
    before = service.ask("GET", "/api/krl").headers["signer-list-version"]
    body = {"by": "serial", "value": str(serial), "reason": "drill"}
    assert service.ask("POST", "/api/revocations", body, identity="operator").status == 201
    keeper = service.keeper_pid()
    assert keeper is not None
    os.kill(keeper, signal.SIGKILL)
    eventually(lambda: service.ask("GET", "/api/krl").headers["signer-list-version"] != before, "a list is published")
    assert update(host).ok
    assert not host.login(certificate=lost).ok


def test_a_revoked_ca_key_ends_all_its_certificates_and_signs_no_more(host: KitHost, service: Service) -> None:
    lost, _ = certificate(service, host)
    assert host.login(certificate=lost).ok
    revoke(service, "ca", host.keys.ca.fingerprint)
    assert update(host).ok
    assert not host.login(certificate=lost).ok
    assert host.login().ok
    assert service.sign(host.keys.user.public_line).status == 503
