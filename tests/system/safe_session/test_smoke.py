"""Smoke logins on a real sshd through the real service: what they prove, and how each failure is told."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from signer.api_client import ApiClient
from signer.errors import SignerError
from signer.migration.config import SignerFacts, Target
from signer.migration.plan import Observation
from signer.migration.smoke import SmokeFailed, on_each, read_trusted_cas, smoke_login, smoke_refusal
from tests.parts import missing
from tests.parts.keys import KeyRing
from tests.parts.service import Service, StartService
from tests.parts.sshd import Sshd, StartSshd

pytestmark = missing.needs_sshd


@dataclass
class Place:
    """A service, a host that trusts its CA, and who logs in."""

    service: Service
    sshd: Sshd
    target: Target
    signer: SignerFacts
    api: ApiClient

    @property
    def ca(self) -> str:
        return self.service.ca.fingerprint

    def login(self, target: Target | None = None, backend: str = "local", ca: str = "") -> Observation:
        record: Callable[[int], Mapping[str, object]] = self.api.certificate
        return smoke_login(target or self.target, self.signer, record, backend=backend, ca_fingerprint=ca or self.ca)


@pytest.fixture
def place(start_service: StartService, start_sshd: StartSshd, keyring: KeyRing, tmp_path: Path) -> Iterator[Place]:
    service = start_service()
    sshd = start_sshd(service.ca.public_line)
    token_file = service.token_file("operator")
    with ApiClient(service.address, token_file) as api:
        yield Place(
            service,
            sshd,
            target_of(sshd, keyring, tmp_path),
            SignerFacts(service.address, token_file, tmp_path / "unused", "llmops"),
            api,
        )


def target_of(sshd: Sshd, keyring: KeyRing, folder: Path, name: str = "one") -> Target:
    known_hosts = folder / f"known-{name}"
    known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {keyring('ed25519', 'host').public_line}\n")
    return Target(name, "127.0.0.1", sshd.user, known_hosts, sshd.port, sshd.folder / "trusted_ca")


def failed(act: Callable[[], object]) -> SmokeFailed:
    with pytest.raises(SmokeFailed) as caught:
        act()
    return caught.value


def test_a_login_is_tied_to_its_certificate_its_record_and_its_ca(place: Place) -> None:
    seen = place.login()
    serial = str(seen.facts["serial"])
    record = place.api.certificate(serial)
    assert record["reason"] == "smoke login to one"
    assert seen.facts["recorded"] == record["recorded"]
    assert (seen.facts["ca"], seen.facts["backend"]) == (place.ca, "local")
    assert f"(serial {serial})" in place.sshd.log()
    assert seen.summary == f"one: logged in as {place.sshd.user}, serial {serial}, signed by local {place.ca}"


def test_no_token_and_no_key_is_in_what_is_kept(place: Place) -> None:
    kept = json.dumps(dict(place.login().facts))
    assert "key only in a private agent" in kept
    assert place.service.tokens["operator"] not in kept
    assert "ssh-ed25519" not in kept


def test_a_host_that_does_not_trust_the_ca(place: Place, keyring: KeyRing) -> None:
    place.sshd.trust(keyring("ed25519", "other").public_line)
    error = failed(place.login)
    assert error.code == "smoke_login_failed"
    assert error.text.endswith(f"Permission denied (publickey); it does not accept certificates of {place.ca}")
    assert "Permission denied (publickey)" in str(error.facts["log"])
    assert error.facts["serial"] == "1"


@pytest.mark.parametrize("known", ["", "[127.0.0.1]:{port} {other}\n"], ids=["unknown", "another key"])
def test_a_host_key_that_is_not_the_known_one(place: Place, keyring: KeyRing, known: str) -> None:
    other = keyring("ed25519", "other").public_line
    place.target.known_hosts.write_text(known.format(port=place.target.port, other=other))
    before = place.target.known_hosts.read_text()
    assert "Host key verification failed" in failed(place.login).text
    assert place.target.known_hosts.read_text() == before


def test_a_host_that_is_not_there(place: Place) -> None:
    place.sshd.stop()
    error = failed(place.login)
    assert (error.code, "Connection refused" in error.text) == ("smoke_login_failed", True)


def test_a_host_that_never_answers_is_given_up(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = replace(place.target, port=silent.getsockname()[1])
        error = failed(
            lambda: smoke_login(
                target, place.signer, place.api.certificate, backend="local", ca_fingerprint=place.ca, within=2
            )
        )
    assert error.text == "one: no login within 2 s"


def test_a_service_that_refuses_is_told_in_its_words(place: Place) -> None:
    caller = replace(place.signer, role="nothing")
    error = failed(lambda: smoke_login(place.target, caller, place.api.certificate, backend="local", ca_fingerprint=""))
    assert error.code == "smoke_login_failed"
    assert "nothing" in error.text


def test_another_ca_another_backend_and_a_record_that_is_missing(place: Place, keyring: KeyRing) -> None:
    assert failed(lambda: place.login(ca=keyring("ed25519", "other").fingerprint)).code == "smoke_wrong_ca"
    assert failed(lambda: place.login(backend="vault")).code == "smoke_wrong_backend"
    first = place.api.certificate(1)

    def nothing(serial: int) -> Mapping[str, object]:
        raise SignerError("unknown_certificate", f"there is no {serial}")

    for record in (nothing, lambda _serial: first, lambda _serial: {}):
        error = failed(
            lambda record=record: smoke_login(  # type: ignore[misc]
                place.target, place.signer, record, backend="local", ca_fingerprint=place.ca
            )
        )
        assert error.code == "smoke_not_recorded"


def test_what_a_host_prints_is_not_taken_for_the_certificate(
    place: Place, start_sshd: StartSshd, keyring: KeyRing, tmp_path: Path
) -> None:
    """A host that is no friend may say anything; the certificate is read from what this side said before it."""
    another = place.service.sign(keyring("ed25519", "user").public_line).json()
    hostile = start_sshd(place.service.ca.public_line, extra=[f"ForceCommand echo {another['certificate']}"])
    seen = place.login(target_of(hostile, keyring, tmp_path))
    assert int(str(seen.facts["serial"])) > int(another["serial"])


# --- the CA file of a host -------------------------------------------------------------------------------------------


def test_the_hosts_ca_file_is_read_over_a_login(place: Place, keyring: KeyRing) -> None:
    next_ca = keyring("ed25519", "other")
    error = failed(lambda: read_trusted_cas(place.target, place.signer, next_ca.fingerprint))
    assert error.code == "ca_not_trusted"
    assert error.text == f"one: {place.target.trusted_ca_file} lacks {next_ca.fingerprint}"
    place.sshd.trust(["# two of them", "", place.service.ca.public_line, "no key", next_ca.public_line])
    seen = read_trusted_cas(place.target, place.signer, next_ca.fingerprint)
    assert seen.facts["found"] == [place.ca, next_ca.fingerprint]
    assert seen.facts["trusted"] is True


@pytest.mark.parametrize("file", [None, Path("/no/such file; echo x"), Path("/root")])
def test_where_it_cannot_be_read_that_is_an_observation(place: Place, file: Path | None) -> None:
    seen = read_trusted_cas(replace(place.target, trusted_ca_file=file), place.signer, place.ca)
    assert seen.facts["trusted"] is None
    assert seen.summary.startswith("one: cannot be read beforehand")


# --- refusals, and many hosts ----------------------------------------------------------------------------------------


def test_a_principal_outside_the_policy_is_refused_by_the_policy(place: Place) -> None:
    seen = smoke_refusal(place.api.sign, "llmops", ["llmops"])
    assert seen.facts["code"] == "principal_not_allowed"
    assert "root and outside-" in seen.summary


def test_a_refusal_for_another_reason_or_none_at_all_is_no_proof(place: Place) -> None:
    assert failed(lambda: smoke_refusal(place.api.sign, "nothing", [])).code == "smoke_refusal_unclear"
    assert failed(lambda: smoke_refusal(lambda _role, _body: {}, "llmops", [])).code == "smoke_not_refused"


def test_all_hosts_are_tried_and_every_outcome_is_kept(
    place: Place, start_sshd: StartSshd, keyring: KeyRing, tmp_path: Path
) -> None:
    bad = target_of(start_sshd(keyring("ed25519", "other").public_line), keyring, tmp_path, "bad")
    gone = replace(place.target, name="gone", port=1)
    error = failed(lambda: on_each([place.target, bad, gone], place.login))
    assert error.code == "smoke_login_failed"
    assert error.text.startswith("bad: ")
    assert error.text.endswith("; 1 more host")
    told = error.facts["targets"]
    assert isinstance(told, dict)
    assert [told[name].get("code") for name in ("one", "bad", "gone")] == [None, error.code, error.code]
    assert told["one"]["ca"] == place.ca
    assert on_each([place.target], place.login).facts["targets"]
