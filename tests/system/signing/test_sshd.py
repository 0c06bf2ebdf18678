"""What we issue, before a real sshd: it opens what it says, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from signer.authority.core import Core
from signer.ca.backends import FileBackend
from signer.ca.key import load_ca_key
from signer.ledger.store import Ledger
from signer.model import Caller
from signer.policy.file import load_policy
from signer.protocol.commands import Sign
from signer.protocol.replies import Certificate
from signer.protocol.sign_request import read_native_sign
from tests.parts import missing, ports
from tests.parts.keys import KINDS, Key, KeyRing
from tests.parts.service import Service
from tests.parts.sshd import Sshd, StartSshd, run

pytestmark = missing.needs_sshd

ALL_KEYS = '["ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"]'
ROLE = f"""
principals = ["llmops", "other"]
default_principals = ["llmops"]
default_ttl = "5m"
key_types = {ALL_KEYS}
rsa_min_bits = 2048
"""
OPEN = '["permit-pty", "permit-port-forwarding", "permit-agent-forwarding"]'
POLICY = f"""
[ca]
fingerprint = "{{ca}}"

[roles.llmops]
{ROLE}
[roles.open]
{ROLE}
extensions = {{ allowed = {OPEN}, default = {OPEN} }}
[roles.forced]
{ROLE}
force_command = 'echo "forced, asked for <$SSH_ORIGINAL_COMMAND>, agent <$SSH_AUTH_SOCK>"; tty || true'
[roles.forced-pty]
{ROLE}
force_command = "tty"
extensions = {{ allowed = ["permit-pty"], default = ["permit-pty"] }}
[roles.elsewhere]
{ROLE}
source_address = ["192.0.2.0/24", "2001:db8::/32"]
[roles.here]
{ROLE}
source_address = "caller"
[roles.asked-options]
{ROLE}
critical_options = {{ allowed = ["force-command", "source-address"] }}

[identities.deploy-agent]
kind = "agent"
roles = ["llmops", "open", "forced", "forced-pty", "elsewhere", "here", "asked-options"]
tokens = [{{ sha256 = "{{token:deploy-agent}}", expires = 2099-01-01T00:00:00Z }}]
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, keyring: KeyRing) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("sshd"), keyring("ed25519", "ca"), POLICY) as started:
        yield started


@pytest.fixture
def user(keyring: KeyRing) -> Key:
    return keyring("ed25519", "user")


@pytest.fixture
def sshd(start_sshd: StartSshd, service: Service) -> Sshd:
    return start_sshd(service.ca.public_line, extra=["AllowTcpForwarding yes", "AllowAgentForwarding yes"])


def certificate(service: Service, user: Key, role: str = "llmops", **fields: Any) -> Path:
    """A file with a certificate for that key, from the service."""
    answer = service.sign(user.public_line, role=role, **fields)
    assert answer.status == 201, answer.body
    path = service.folder / f"{answer.json()['serial']}-cert.pub"
    path.write_text(answer.json()["certificate"] + "\n")
    return path


def test_sshd_lets_it_in_and_logs_key_id_and_serial(service: Service, sshd: Sshd, user: Key) -> None:
    cert = certificate(service, user)
    login = sshd.login("echo in", identity=user.private, certificate=cert)
    assert (login.status, login.out) == (0, "in\n"), login.err
    serial = cert.name.removesuffix("-cert.pub")
    assert f"ID deploy-agent:llmops (serial {serial}) CA ED25519 {service.ca.fingerprint}" in sshd.log()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_user_key_logs_in(kind: str, service: Service, sshd: Sshd, keyring: KeyRing) -> None:
    key = keyring(kind, "user")
    assert sshd.login(identity=key.private, certificate=certificate(service, key)).ok, sshd.log()


@pytest.mark.parametrize("kind", ["ecdsa256", "ecdsa384", "ecdsa521", "rsa3072"])
def test_every_kind_of_ca_key_is_believed(
    kind: str, tmp_path: Path, start_sshd: StartSshd, keyring: KeyRing, user: Key
) -> None:
    with Service(tmp_path / "service", keyring(kind, "ca"), POLICY) as service:
        sshd = start_sshd(service.ca.public_line)
        assert sshd.login(identity=user.private, certificate=certificate(service, user)).ok, sshd.log()


def test_a_key_without_its_certificate_does_not_open_the_door(service: Service, sshd: Sshd, user: Key) -> None:
    assert sshd.login(identity=user.private).status == 255


def test_the_wrong_principal_is_refused(service: Service, sshd: Sshd, user: Key) -> None:
    cert = certificate(service, user, principals=["other"])
    assert sshd.login(identity=user.private, certificate=cert).status == 255
    assert "does not contain an authorized principal" in sshd.log()
    sshd.allow(["other"])
    assert sshd.login(identity=user.private, certificate=cert).ok, "for this test to mean something"


def test_an_expired_one_is_refused(service: Service, sshd: Sshd, user: Key) -> None:
    cert = certificate(service, user, ttl=1)
    time.sleep(2.1)
    assert sshd.login(identity=user.private, certificate=cert).status == 255
    assert "Certificate invalid: expired" in sshd.log()


def test_one_that_is_not_yet_valid_is_refused(service: Service, sshd: Sshd, user: Key, tmp_path: Path) -> None:
    """From the real core, with a clock an hour ahead of sshd's."""
    key = load_ca_key(service.key_file, f"{os.geteuid()}:{os.getegid()}", service.ca.fingerprint)
    ledger = Ledger(tmp_path)
    core = Core(
        policy=load_policy(service.policy_file),
        backend=FileBackend(key),
        ledger=ledger,
        clock=lambda: time.time() + 3600,
        random=os.urandom,
        report=lambda error: None,
    )
    caller = Caller(service.tokens["deploy-agent"], "127.0.0.1", "test")
    ask = read_native_sign("llmops", {"public_key": user.public_line})
    ((_, reply),) = core.run([Sign(caller, "llmops", ask)])
    ledger.close()
    assert isinstance(reply, Certificate)
    cert = tmp_path / "early-cert.pub"
    cert.write_text(f"{reply.certificate}\n")
    assert sshd.login(identity=user.private, certificate=cert).status == 255
    assert "Certificate invalid: not yet valid" in sshd.log()


def test_one_of_another_ca_is_refused(service: Service, start_sshd: StartSshd, user: Key, keyring: KeyRing) -> None:
    sshd = start_sshd(keyring("ed25519", "another-ca").public_line)
    cert = certificate(service, user)
    assert sshd.login(identity=user.private, certificate=cert).status == 255
    sshd.trust(service.ca.public_line)
    assert sshd.login(identity=user.private, certificate=cert).ok, "for this test to mean something"


def test_somebody_elses_certificate_is_of_no_use(service: Service, sshd: Sshd, user: Key, keyring: KeyRing) -> None:
    cert = certificate(service, user)
    assert sshd.login(identity=keyring("ed25519", "thief").private, certificate=cert).status == 255


def test_a_source_address_that_is_not_ours_is_refused(service: Service, sshd: Sshd, user: Key) -> None:
    cert = certificate(service, user, "elsewhere")
    assert sshd.login(identity=user.private, certificate=cert).status == 255
    assert "not from a permitted source address (127.0.0.1)" in sshd.log()


def test_one_bound_to_the_callers_address_works_from_there(service: Service, sshd: Sshd, user: Key) -> None:
    cert = certificate(service, user, "here")
    assert "source-address 127.0.0.1/32" in subprocess.check_output(["ssh-keygen", "-L", "-f", cert], text=True)
    assert sshd.login(identity=user.private, certificate=cert).ok, sshd.log()


def test_options_that_the_role_lets_the_caller_set_hold(service: Service, sshd: Sshd, user: Key) -> None:
    options = {"force-command": "echo mine", "source-address": "127.0.0.0/8"}
    cert = certificate(service, user, "asked-options", critical_options=options)
    assert sshd.login("echo else", identity=user.private, certificate=cert).out == "mine\n"
    cert = certificate(service, user, "asked-options", critical_options={"source-address": "192.0.2.1/32"})
    assert sshd.login("echo else", identity=user.private, certificate=cert).status == 255


# --- a forced command is the only thing that happens ------------------------------------------------------------------


def test_the_forced_command_runs_whatever_is_asked_for(service: Service, sshd: Sshd, user: Key) -> None:
    login = sshd.login("cat /etc/passwd", identity=user.private, certificate=certificate(service, user, "forced"))
    assert login.out == "forced, asked for <cat /etc/passwd>, agent <>\nnot a tty\n"


@pytest.mark.parametrize("role,terminal", [("forced", "PTY allocation request failed"), ("forced-pty", "/dev/pts/")])
def test_a_forced_command_has_a_terminal_only_if_the_role_says_so(
    role: str, terminal: str, service: Service, sshd: Sshd, user: Key
) -> None:
    cert = certificate(service, user, role)
    login = sshd.login(identity=user.private, certificate=cert, options=["-tt"])
    assert terminal in login.out + login.err, login


@contextmanager
def greeter() -> Iterator[int]:
    """A port that says `reached` to everybody who comes."""
    with socket.create_server((ports.LOOPBACK, 0)) as server:
        over = threading.Event()

        def greet() -> None:
            while not over.is_set():
                guest, _ = server.accept()
                with guest:
                    guest.sendall(b"reached")

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            over.set()
            socket.create_connection(server.getsockname()).close()
            thread.join()


def ssh(sshd: Sshd, user: Key, cert: Path, *options: str) -> list[str]:
    own = ["-i", str(user.private), "-oIdentitiesOnly=yes", f"-oCertificateFile={cert}", "-oIdentityAgent=none"]
    return ["ssh", *options, *sshd.ssh_options(), *own, ports.LOOPBACK]


@pytest.mark.parametrize("role,said", [("open", "reached"), ("forced", ""), ("forced-pty", ""), ("llmops", "")])
def test_standard_input_is_forwarded_only_where_the_role_says_so(
    role: str, said: str, service: Service, sshd: Sshd, user: Key
) -> None:
    """With a forced command alone sshd would let -W through."""
    cert = certificate(service, user, role)
    with greeter() as port:
        login = run(ssh(sshd, user, cert, "-W", f"{ports.LOOPBACK}:{port}"))
    assert login.out == said, login
    assert ("refused local port forward" in sshd.log()) != bool(said)


@pytest.mark.parametrize("role,said", [("open", b"reached"), ("forced", b""), ("llmops", b"")])
def test_a_local_port_leads_on_only_where_the_role_says_so(
    role: str, said: bytes, service: Service, sshd: Sshd, user: Key
) -> None:
    cert, mine = certificate(service, user, role), ports.free_port()
    with greeter() as port:
        tunnel = subprocess.Popen(ssh(sshd, user, cert, "-N", "-L", f"{mine}:{ports.LOOPBACK}:{port}"))
        try:
            ports.wait_until(lambda: ports.accepts(mine), tunnel, sshd.log)
            with socket.create_connection((ports.LOOPBACK, mine), timeout=10) as guest:
                assert guest.recv(100) == said
        finally:
            ports.stop(tunnel)


@pytest.mark.parametrize("role,allowed", [("open", True), ("forced", False), ("llmops", False)])
def test_a_remote_port_is_opened_only_where_the_role_says_so(
    role: str, allowed: bool, service: Service, sshd: Sshd, user: Key
) -> None:
    cert, theirs = certificate(service, user, role), ports.free_port()
    with greeter() as port:
        where = f"{theirs}:{ports.LOOPBACK}:{port}"
        login = sshd.login(identity=user.private, certificate=cert, options=["-oExitOnForwardFailure=yes", "-R", where])
    assert login.ok == allowed, login


@pytest.mark.parametrize("role,allowed", [("open", True), ("forced", False), ("llmops", False)])
def test_the_agent_is_forwarded_only_where_the_role_says_so(
    role: str, allowed: bool, service: Service, sshd: Sshd, user: Key, tmp_path: Path
) -> None:
    cert = certificate(service, user, role)
    where = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(where)], stdout=subprocess.DEVNULL)
    try:
        ports.wait_until(lambda: ports.takes(where), agent, sshd.log)
        login = sshd.login(
            'echo "agent <$SSH_AUTH_SOCK>"',
            identity=user.private,
            certificate=cert,
            agent=where,
            options=["-A"],
        )
    finally:
        ports.stop(agent)
    assert login.ok, login
    assert ("agent <>" not in login.out) == allowed, login
