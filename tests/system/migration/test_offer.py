"""A certificate is offered to a real sshd without its private key: the answer is true, and nobody has logged in."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from signer.errors import BadFormat
from signer.migration.config import SignerFacts, Target
from signer.migration.parity import throwaway_key
from signer.migration.smoke import SmokeFailed, offer_certificate, offer_line
from tests.parts import missing
from tests.parts.keys import Key, KeyRing, make_key, sign_with_ssh_keygen, ssh_keygen
from tests.parts.ports import free_port
from tests.parts.sshd import Sshd, StartSshd

pytestmark = missing.needs_sshd

NO_SIGNER: Final = SignerFacts("http://127.0.0.1:1", Path("/nonexistent"), Path("/nonexistent"), "llmops")


@pytest.fixture(scope="module")
def ca(keyring: KeyRing) -> Key:
    return keyring("ed25519", "ca")


@pytest.fixture
def certificate(ca: Key, tmp_path: Path) -> str:
    """A certificate of the CA for a key that has no private half."""
    public = tmp_path / "sample.pub"
    public.write_text(f"{throwaway_key('ssh-ed25519')}\n")
    signed = sign_with_ssh_keygen(ca, Key("ed25519", tmp_path / "sample", public))
    return signed.read_text().strip()


def target_of(sshd: Sshd, keyring: KeyRing, folder: Path) -> Target:
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {keyring('ed25519', 'host').public_line}\n")
    return Target("edge1", "127.0.0.1", sshd.user, known_hosts, sshd.port)


def refused(target: Target, certificate: str) -> SmokeFailed:
    with pytest.raises(SmokeFailed) as caught:
        offer_certificate(target, certificate, NO_SIGNER)
    return caught.value


def test_audit_4e3_sshd_accepts_the_certificate_and_nobody_logs_in(
    start_sshd: StartSshd, keyring: KeyRing, ca: Key, certificate: str, tmp_path: Path
) -> None:
    sshd = start_sshd(ca.public_line)
    seen = offer_certificate(target_of(sshd, keyring, tmp_path), certificate, NO_SIGNER)
    assert seen.summary == f"edge1: sshd accepts certificates of {ca.fingerprint} for {sshd.user}"
    assert (seen.facts["trusted"], seen.facts["ca"]) == (True, ca.fingerprint)
    log = str(seen.facts["log"])
    assert "Server accepts key" in log
    assert len(log) < 6000
    assert "Accepted publickey" not in sshd.log()
    assert "session" not in sshd.log().lower()


CASES: Final[dict[str, tuple[Sequence[str], str]]] = {
    "no public keys": (["PubkeyAuthentication no", "AuthenticationMethods any"], "password"),
    "user not allowed": (["AllowUsers nobody"], ""),
    "CA's algorithm": (["CASignatureAlgorithms ecdsa-sha2-nistp256"], ""),
    "kind of key": (["PubkeyAcceptedAlgorithms ssh-ed25519"], ""),
    "no list of revoked keys": (["RevokedKeys /nonexistent"], ""),
    "for another address only": (["Match Address 127.0.0.0/8", "  TrustedUserCAKeys none", "Match all"], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_audit_4e3_sshd_refuses_by_its_configuration(
    start_sshd: StartSshd, keyring: KeyRing, ca: Key, certificate: str, tmp_path: Path, case: str
) -> None:
    lines, said = CASES[case]
    sshd = start_sshd(ca.public_line, extra=lines)
    error = refused(target_of(sshd, keyring, tmp_path), certificate)
    assert error.code == "certificate_refused"
    assert error.text.startswith(f"edge1: sshd refuses certificates of {ca.fingerprint} for {sshd.user}")
    assert said in error.text
    assert error.facts["trusted"] is False
    assert "Server accepts key" not in str(error.facts["log"])


Change = Callable[[Sshd, Key], None]
CHANGES: Final[dict[str, Change]] = {
    "another CA": lambda sshd, ca: sshd.trust(f"ssh-ed25519 {ca.public_line.split()[1][:-8]}AAAAAAAA"),
    "cert-authority in front": lambda sshd, ca: sshd.trust(f"cert-authority {ca.public_line}"),
    "other principals": lambda sshd, ca: sshd.allow(["root", "llmops2"]),
    "principal from elsewhere": lambda sshd, ca: sshd.allow(['from="192.0.2.0/24" llmops']),
}


@pytest.mark.parametrize("change", CHANGES)
def test_audit_4e3_sshd_refuses_by_its_files(
    start_sshd: StartSshd, keyring: KeyRing, ca: Key, certificate: str, tmp_path: Path, change: str
) -> None:
    sshd = start_sshd(ca.public_line)
    CHANGES[change](sshd, ca)
    assert refused(target_of(sshd, keyring, tmp_path), certificate).code == "certificate_refused"


def test_a_revoked_ca_is_refused(
    start_sshd: StartSshd, keyring: KeyRing, ca: Key, certificate: str, tmp_path: Path
) -> None:
    ssh_keygen("-k", "-q", "-f", tmp_path / "revoked", ca.public)
    sshd = start_sshd(ca.public_line, extra=[f"RevokedKeys {tmp_path}/revoked"])
    assert refused(target_of(sshd, keyring, tmp_path), certificate).code == "certificate_refused"


def test_a_host_that_does_not_answer_or_is_another_is_no_answer(
    start_sshd: StartSshd, keyring: KeyRing, ca: Key, certificate: str, tmp_path: Path
) -> None:
    sshd = start_sshd(ca.public_line)
    target = target_of(sshd, keyring, tmp_path)
    gone = refused(replace(target, port=free_port()), certificate)
    assert gone.code == "smoke_login_failed"
    assert gone.facts["trusted"] is None
    target.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {make_key(tmp_path, 'ed25519').public_line}\n")
    other = refused(target, certificate)
    assert other.code == "smoke_login_failed"
    assert "Host key verification failed" in other.text


def test_what_is_no_certificate_is_not_offered(keyring: KeyRing, tmp_path: Path) -> None:
    target = Target("edge1", "127.0.0.1", "root", tmp_path / "known_hosts", 1)
    for line in ("", "ssh-ed25519", keyring("ed25519", "ca").public_line):
        with pytest.raises(BadFormat):
            offer_certificate(target, line, NO_SIGNER)


def test_no_key_or_agent_of_the_operator_takes_part(
    start_sshd: StartSshd, keyring: KeyRing, ca: Key, certificate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's own certificate of the same CA would log in; it stays where it is."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    own = make_key(home / ".ssh", "ed25519", "id_ed25519")
    sign_with_ssh_keygen(ca, own)
    assert stat.S_IMODE(own.private.stat().st_mode) == 0o600
    monkeypatch.setenv("HOME", str(home))
    sshd = start_sshd(ca.public_line)
    target = target_of(sshd, keyring, tmp_path)
    assert offer_certificate(target, certificate, NO_SIGNER).facts["trusted"] is True
    assert "Accepted publickey" not in sshd.log()
    assert own.fingerprint not in sshd.log()
    line = offer_line(target, "CERTIFICATE")
    assert {"IdentityAgent=none", "IdentityFile=none", "CertificateFile=CERTIFICATE"} <= set(line)
