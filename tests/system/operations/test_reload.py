"""`signer reload` with the real service: what changed is shown, what is not valid is refused, and TLS is renewed."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from tests.parts import missing, ports, rotation
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing
from tests.parts.processes import children
from tests.parts.rotation import rotating_service, two_users_service
from tests.parts.selfsigned import write_certificate
from tests.parts.service import STANDARD_POLICY, Service


@pytest.fixture
def old(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")


@pytest.fixture
def new(keyring: KeyRing) -> Key:
    return keyring("ecdsa384", "new-ca")


def test_reload_shows_what_changed_and_refuses_what_is_not_valid(old: Key, new: Key, keyring: KeyRing) -> None:
    """One service for the whole story; as root, keeper and api are two users, and neither is root."""
    with rotating_service(old) as world:
        service, user = world.service, keyring("ed25519", "user")
        assert service.sign(user.public_line, ttl="20m").status == 201
        nothing = service.command("reload")
        assert nothing.returncode == 0, nothing.stderr
        assert [line.split()[:2] for line in nothing.stdout.splitlines()] == [
            ["policy", "unchanged,"],
            ["CA", "key"],
        ]

        # policy and key in one reload, and both are in force when the command returns
        lines = rotation.ca_lines(old, new)
        changed = STANDARD_POLICY.replace('fingerprint = "{ca}"', lines).replace('max_ttl = "30m"', 'max_ttl = "16m"')
        changed = changed.replace("[identities.stranger]", "[identities.newcomer]")
        service.write_policy(changed)
        world.place(new)
        done = service.command("reload")
        assert (done.returncode, done.stderr) == (0, "")
        shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
        assert shown[0].startswith("policy changed, digest ")
        assert shown[1:] == [
            "roles changed llmops",
            "identities added newcomer",
            "identities removed stranger",
            "tokens changed newcomer until 2099-01-01T00:00:00Z",
            f"CA key rotated from {old.fingerprint} to {new.fingerprint}",
        ]
        assert world.in_use() == new.fingerprint
        assert service.sign(user.public_line, ttl="20m").status == 403

        # a file that is not valid: nothing of it is taken
        service.write_policy(
            changed.replace('kind = "workload"', 'kind = "nonsense"').replace(lines, rotation.ca_lines(new))
        )
        refused = service.command("reload")
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
        assert "error: not everything was taken" in refused.stderr
        assert "policy: " in refused.stderr
        assert "identities.ci.kind" in refused.stderr
        as_json = service.command("reload", "--json")
        assert as_json.returncode == 1
        report = json.loads(as_json.stdout)
        assert report["reloaded"] is False
        assert report["keeper"]["policy"]["error"]["code"] == "policy_refused"
        assert service.sign(user.public_line).status == 201


@missing.needs_root
def test_only_root_and_the_keepers_user_may_reload(old: Key) -> None:
    with two_users_service(old) as service:
        path = service.run_dir / "launcher.sock"
        keeper = pwd.getpwnam(rotation.KEEPER_USER)
        facts = path.stat()
        assert (facts.st_uid, stat.S_IMODE(facts.st_mode)) == (keeper.pw_uid, 0o600)
        environment = {name: value for name, value in service.environment().items() if not name.endswith("_USER")}

        def ask_as(user: str) -> subprocess.CompletedProcess[str]:
            entry = pwd.getpwnam(user)
            return subprocess.run(
                [sys.executable, "-P", "-m", "signer", "reload"],
                user=entry.pw_uid,
                group=entry.pw_gid,
                extra_groups=[],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )

        assert ask_as(rotation.KEEPER_USER).returncode == 0
        refused = ask_as(rotation.API_USER)
        assert (refused.returncode, "may not use" in refused.stderr) == (1, True)

        # a mode that was widened helps nobody: the kernel says who asks
        path.chmod(0o666)
        service.run_dir.chmod(0o2755)
        refused = ask_as(rotation.API_USER)
        assert (refused.returncode, "this user may not control the service" in refused.stderr) == (1, True)


def test_a_command_without_a_service_says_what_to_do(tmp_path: Path, old: Key) -> None:
    done = Service(tmp_path / "s", old).command("reload")
    assert done.returncode == 1
    assert "no `signer serve` listens on" in done.stderr
    assert "systemctl reload signer-keeper signer-api" in done.stderr


# --- TLS -------------------------------------------------------------------------------------------------------------


class TlsService(Service):
    """A service whose only address serves TLS."""

    def is_ready(self) -> bool:
        try:
            return bool(served(self)) and b"keeper_gone" not in ask_ready(self)
        except OSError:
            return False


def served(service: Service) -> str:
    """The fingerprint of the certificate that the service shows to a new client."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((ports.LOOPBACK, service.port), timeout=30) as plain,
        context.wrap_socket(plain) as client,
    ):
        der = client.getpeercert(binary_form=True)
    assert der is not None
    return fingerprint(x509.load_der_x509_certificate(der))


def ask_ready(service: Service) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((ports.LOOPBACK, service.port), timeout=30) as plain,
        context.wrap_socket(plain) as client,
    ):
        client.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return client.recv(4096)


def fingerprint(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.hashes import SHA256

    return certificate.fingerprint(SHA256()).hex()


def issue(folder: Path, name: str) -> tuple[bytes, bytes, str]:
    """A new pair, and the fingerprint of its certificate."""
    place = folder / name
    place.mkdir()
    certificate, key = write_certificate(place)
    return (
        certificate.read_bytes(),
        key.read_bytes(),
        fingerprint(x509.load_pem_x509_certificate(certificate.read_bytes())),
    )


def test_audit_tls_is_renewed_without_a_stop_and_half_a_renewal_takes_nobody_down(tmp_path: Path, old: Key) -> None:
    first, second, third = (issue(tmp_path, name) for name in ("first", "second", "third"))
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def write(pair: tuple[bytes, bytes]) -> None:
        certificate.write_bytes(pair[0])
        key.write_bytes(pair[1])

    write(first[:2])
    environ = {"SIGNER_TLS_CERT_FILE": str(certificate), "SIGNER_TLS_KEY_FILE": str(key)}
    with TlsService(tmp_path / "service", old, environ=environ) as service:
        assert served(service) == first[2]
        keeper = service.keeper_pid()

        write(second[:2])
        done = service.command("reload")
        assert (done.returncode, done.stderr) == (0, "")
        assert "TLS     another certificate, CN=localhost, valid until " in done.stdout
        eventually(lambda: served(service) == second[2], "the renewed certificate is served")
        eventually(lambda: all(served(service) == second[2] for _ in range(8)), "the old worker has ended")

        # half of a renewal: the certificate is new, the key is not
        for half in ((third[0], second[1]), (third[0][:-200], third[1]), (third[0], b"nonsense")):
            write(half)
            refused = service.command("reload")
            assert refused.returncode == 1
            assert "Traceback" not in refused.stderr
            assert "(tls_pair_refused)" in refused.stderr
            assert served(service) == second[2]
        write((third[0], second[1]))
        assert "certificate and key do not belong together" in service.command("reload").stderr

        # a worker that dies now is replaced by one that reads none of it
        (arbiter,) = [pid for pid in children(service.pid) if pid != service.keeper_pid()]
        workers = children(arbiter)
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        eventually(lambda: children(arbiter) and not set(workers) & set(children(arbiter)), "another worker runs")
        eventually(lambda: served(service) == second[2], "the pair in force is served")

        write(third[:2])
        os.kill(service.pid, signal.SIGHUP)  # as before `signer reload`
        eventually(lambda: served(service) == third[2], "the other certificate is served")
        assert service.keeper_pid() == keeper
        assert children(service.pid).count(arbiter) == 1
        assert "BEGIN" not in service.log()


def test_audit_a_start_with_half_a_pair_is_refused_in_words(tmp_path: Path, old: Key) -> None:
    first, second = (issue(tmp_path, name) for name in ("first", "second"))
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate.write_bytes(first[0])
    key.write_bytes(second[1])
    environ = {"SIGNER_TLS_CERT_FILE": str(certificate), "SIGNER_TLS_KEY_FILE": str(key)}
    done = Service(tmp_path / "service", old, environ=environ).command("serve")
    assert done.returncode == 1
    assert "certificate and key do not belong together" in done.stderr
    assert "the api did not start" in done.stderr
    assert "Traceback" not in done.stderr
    assert "serving on" not in done.stderr
