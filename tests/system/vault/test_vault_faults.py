"""Our Vault client against a Vault that is slow, broken or hostile: every call ends, with a code and nothing else."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from signer import http as boundedhttp
from signer.errors import BadSettings, SignerError, Unavailable
from signer.http import Watch, new_session
from signer.vault import signing
from signer.vault.errors import read_token
from signer.vault.signing import VaultClient
from tests.parts import builders
from tests.parts.eventually import eventually
from tests.parts.fake_vault import TOKEN, FakeVault, ForeignCa
from tests.parts.selfsigned import write_certificate

ANOTHER_TOKEN = "hvs.the-next-token-0b7e"
SOON = 0.6  # seconds; what the limit of a call is lowered to where a test waits for it


@pytest.fixture
def fake() -> Iterator[FakeVault]:
    with FakeVault() as server:
        yield server


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    write_token(path, TOKEN)
    return path


@pytest.fixture
def client(fake: FakeVault, token_file: Path) -> Iterator[VaultClient]:
    made = VaultClient(fake.address, token_file, "ssh")
    yield made
    made.close()
    assert not fake.violations


def write_token(path: Path, token: str) -> None:
    fresh = path.with_suffix(".fresh")
    fresh.touch(0o600)
    fresh.write_text(token + "\n")
    fresh.rename(path)


def refusal(client: VaultClient) -> SignerError:
    """What a signature fails with; it holds no token and no word of Vault's."""
    with pytest.raises(SignerError) as caught:
        client.sign(builders.grant())
    error = caught.value
    shown = f"{error!r} {error.text} {error.hint} {error.facts} {error.__cause__!r}"
    assert TOKEN not in shown
    assert "went wrong" not in shown
    assert error.__suppress_context__ or error.__context__ is None, "a traceback would show where the token was"
    return error


def test_it_brings_the_certificate_and_the_ca_key_that_vault_publishes(client: VaultClient, fake: FakeVault) -> None:
    returned = client.sign(builders.grant())
    assert returned.line.startswith("ssh-ed25519-cert-v01@openssh.com ")
    assert returned.ca_key == fake.ca.blob
    assert client.known_ca().blob == fake.ca.blob


def test_the_ca_key_is_asked_for_once_and_again_when_another_one_signs(client: VaultClient, fake: FakeVault) -> None:
    for _ in range(3):
        client.sign(builders.grant())
    assert fake.asked.count("ca") == 1
    fake.ca = ForeignCa(name="next")
    fake.published = fake.ca.line
    assert client.sign(builders.grant()).ca_key == fake.ca.blob
    assert fake.asked.count("ca") == 2


@pytest.mark.parametrize(
    "fault, code",
    [
        (400, "vault_refused"),
        ((400, "Unknown role: llmops"), "vault_role_missing"),
        ((400, "no default issuer currently configured"), "vault_ca_unknown"),
        ((400, "keys haven't been configured yet"), "vault_ca_unknown"),
        (401, "vault_forbidden"),
        (403, "vault_forbidden"),
        (404, "vault_mount_missing"),
        (405, "vault_failed"),
        (413, "vault_failed"),
        (429, "vault_rate_limited"),
        (500, "vault_failed"),
        (501, "vault_failed"),
        (502, "vault_failed"),
        (503, "vault_failed"),
        ((503, "Vault is sealed"), "vault_sealed"),
        (504, "vault_failed"),
        ("close", "vault_down"),
        ("not http", "vault_down"),
        ("redirect", "vault_answer_malformed"),
        ("huge", "vault_answer_malformed"),
        (b"", "vault_answer_malformed"),
        (b"<html>hello</html>", "vault_answer_malformed"),
        (b"[]", "vault_answer_malformed"),
        (b"null", "vault_answer_malformed"),
        (b'"data"', "vault_answer_malformed"),
        (b"{}", "vault_answer_malformed"),
        (b'{"data": null}', "vault_answer_malformed"),
        (b'{"data": []}', "vault_answer_malformed"),
        (b'{"data": {"signed_key": null}}', "vault_answer_malformed"),
        (b'{"data": {"signed_key": ["x"]}}', "vault_answer_malformed"),
        (b"[" * 500_000, "vault_answer_malformed"),
        (b"\xff\xfe\x00", "vault_answer_malformed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("call", ["sign", "ca"])
def test_each_fault_has_its_code(client: VaultClient, fake: FakeVault, call: str, fault: object, code: str) -> None:
    fake.fault = {call: fault}
    assert refusal(client).code == code
    fake.fault = {}
    assert client.sign(builders.grant()).line


@pytest.mark.parametrize(
    "body, code",
    [
        (b"", "vault_refused"),
        (b"{", "vault_refused"),
        (b"{}", "vault_refused"),
        (b"[" * 100_000, "vault_refused"),
        (b"[]", "vault_answer_malformed"),
        (b'"x"', "vault_answer_malformed"),
        (b'{"errors": [1, null]}', "vault_answer_malformed"),
        (b'{"errors": 5}', "vault_answer_malformed"),
        (b'{"errors": "unknown role"}', "vault_refused"),
        (b'{"errors": []}', "vault_refused"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_error_bodies_of_any_form_have_a_code(client: VaultClient, fake: FakeVault, body: bytes, code: str) -> None:
    fake.fault = {"sign": (400, body)}
    assert refusal(client).code == code


def test_nobody_there_is_vault_down(token_file: Path) -> None:
    with FakeVault() as gone:
        address = gone.address
    client = VaultClient(address, token_file, "ssh")
    assert refusal(client).code == "vault_down"
    client.close()


@pytest.mark.parametrize("fault", ["hang", "drip headers", "drip a body", "drip without end", "continue for ever"])
def test_a_call_ends_however_little_arrives(
    client: VaultClient, fake: FakeVault, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kept in (False, True):  # a connection that is new, and one that was kept
        with monkeypatch.context() as soon:
            soon.setattr(signing, "ANSWERS_WITHIN", SOON)
            fake.fault = {"sign": fault}
            fake.asked.clear()
            assert refusal(client).code == "vault_slow", kept
            assert fake.asked == ["sign"], "a signature is asked for once"
        fake.fault = {}
        assert client.sign(builders.grant()).line


def test_no_proxy_and_no_password_comes_from_the_environment(
    client: VaultClient, fake: FakeVault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("VAULT_TOKEN", ANOTHER_TOKEN)
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    assert client.sign(builders.grant()).line
    assert fake.asked == ["sign", "ca"]


def test_a_body_at_the_limit_is_read_and_one_above_is_not(fake: FakeVault) -> None:
    watch = Watch()
    with watch.within(20), new_session() as session:
        fake.fault = {"all": b"x" * boundedhttp.MAX_BODY}
        assert len(session.get(f"{fake.address}/v1/ssh/config/ca").content) == boundedhttp.MAX_BODY
        fake.fault = {"all": b"x" * (boundedhttp.MAX_BODY + 1)}
        with pytest.raises(requests.exceptions.ContentDecodingError):
            session.get(f"{fake.address}/v1/ssh/config/ca")
    watch.close()


def test_a_connection_is_kept(client: VaultClient, fake: FakeVault) -> None:
    for _ in range(5):
        client.sign(builders.grant())
    assert fake.connections == 1


def test_closing_ends_the_calls_that_wait(client: VaultClient, fake: FakeVault) -> None:
    fake.fault = {"sign": "hang"}
    codes: list[str] = []
    thread = threading.Thread(target=lambda: codes.append(refusal(client).code), daemon=True)
    thread.start()
    eventually(lambda: "sign" in fake.asked, "the request arrives")
    client.close()
    thread.join(3)
    assert codes == ["vault_slow"]


@pytest.fixture
def tls(tmp_path: Path) -> tuple[Path, Path]:
    return write_certificate(tmp_path)


@pytest.mark.parametrize("fault", ["hang", "drip headers", "drip a body"])
def test_a_call_over_tls_ends_as_well(
    tls: tuple[Path, Path], token_file: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeVault(tls) as fake:
        client = VaultClient(fake.address, token_file, "ssh", tls[0])
        assert client.sign(builders.grant()).ca_key == fake.ca.blob
        monkeypatch.setattr(signing, "ANSWERS_WITHIN", SOON)
        fake.fault = {"sign": fault}
        assert refusal(client).code == "vault_slow"
        monkeypatch.setattr(signing, "ANSWERS_WITHIN", 4.5)
        fake.fault = {}
        assert client.sign(builders.grant()).line
        client.close()


def test_a_vault_that_nobody_vouches_for_gets_no_token(
    tls: tuple[Path, Path], token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tls[0]))
    with FakeVault(tls) as fake:
        client = VaultClient(fake.address, token_file, "ssh")
        assert refusal(client).code == "vault_not_trusted"
        client.close()
        other = VaultClient(fake.address.replace("localhost", "127.0.0.1"), token_file, "ssh", tls[0])
        assert refusal(other).code == "vault_not_trusted"
        other.close()
        assert not fake.asked


def test_a_file_of_vouching_certificates_that_is_not_there_stops_the_start(token_file: Path) -> None:
    with pytest.raises(BadSettings) as caught:
        VaultClient("https://localhost:1", token_file, "ssh", token_file.with_name("none"))
    assert caught.value.code == "vault_ca_file_unreadable"


# --- readiness, and the token ----------------------------------------------------------------------------------------


def test_it_is_ready_only_while_vault_would_sign(client: VaultClient, fake: FakeVault) -> None:
    with pytest.raises(Unavailable) as before:
        client.check_ready()
    assert before.value.code == "vault_ca_unknown"
    for fault, code in (
        ((503, "Vault is sealed"), "vault_sealed"),
        (404, "vault_mount_missing"),
        (500, "vault_failed"),
        ("close", "vault_down"),
        (403, "vault_forbidden"),
    ):
        fake.fault = {"ca": fault}
        client.look_once()
        with pytest.raises(SignerError) as told:
            client.check_ready()
        assert told.value.code == code
        fake.fault = {}
        client.look_once()
        client.check_ready()
    assert client.known_ca().blob == fake.ca.blob


def test_changes_of_readiness_are_logged_once(
    client: VaultClient, fake: FakeVault, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    fake.fault = {"ca": 500}
    for _ in range(3):
        client.look_once()
    fake.fault = {}
    for _ in range(3):
        client.look_once()
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Vault ")]
    assert len([line for line in said if "vault_failed" in line]) == 1
    assert said.count("Vault can sign") == 1
    assert TOKEN not in caplog.text
    assert "went wrong" not in caplog.text


def test_a_new_token_in_the_file_is_taken_when_the_old_one_is_refused(
    client: VaultClient, fake: FakeVault, token_file: Path
) -> None:
    client.sign(builders.grant())
    fake.tokens = {ANOTHER_TOKEN}
    assert refusal(client).code == "vault_forbidden"
    write_token(token_file, ANOTHER_TOKEN)
    assert client.sign(builders.grant()).line


def test_a_new_token_in_the_file_is_taken_while_the_old_one_is_good(
    client: VaultClient, fake: FakeVault, token_file: Path
) -> None:
    fake.tokens = {TOKEN, ANOTHER_TOKEN}
    client.look_once()
    write_token(token_file, ANOTHER_TOKEN)
    client.look_once()
    fake.tokens = {ANOTHER_TOKEN}
    token_file.unlink()
    assert client.sign(builders.grant()).line


def test_the_token_in_use_stays_while_its_file_is_missing_or_wrong(
    client: VaultClient, fake: FakeVault, token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil: tuple[Callable[[], None], ...] = (
        token_file.unlink,
        lambda: write_token(token_file, "two words"),
        lambda: token_file.chmod(0o644),
    )
    for act in spoil:
        act()
        client.look_once()
        client.check_ready()
        assert client.sign(builders.grant()).line
    assert "vault_token_unreadable" in caplog.text
    fake.tokens = set()
    assert refusal(client).code == "vault_forbidden"


def test_a_token_is_renewed_only_while_it_can_be(client: VaultClient, fake: FakeVault) -> None:
    client.look_once()
    assert "renew" not in fake.asked
    fake.renewable = True
    client._renew_at = 0.0
    client.look_once()
    assert fake.asked.count("renew") == 1


def test_a_token_that_may_not_be_looked_up_still_signs(
    client: VaultClient, fake: FakeVault, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fault = {"lookup": 403}
    for _ in range(2):
        client._renew_at = 0.0
        client.look_once()
    client.check_ready()
    assert client.sign(builders.grant()).line
    assert caplog.text.count("cannot be renewed") == 1


@pytest.mark.parametrize(
    "answer", [b'{"data": {"ttl": "soon", "renewable": true}}', b'{"data": {"ttl": -4}}', b'{"data": 5}', b"[]", b"<p>"]
)
def test_nonsense_about_the_token_does_not_stop_the_looking(
    client: VaultClient, fake: FakeVault, answer: bytes
) -> None:
    fake.fault = {"lookup": answer}
    client.look_once()
    client.check_ready()


def test_the_looking_goes_on_after_a_fault_of_ours(
    client: VaultClient, fake: FakeVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "RENEW_EVERY_AT_LEAST", 0.02)
    monkeypatch.setattr(signing, "LOOK_EVERY", 0.02)
    looks = 0

    def fails() -> None:
        nonlocal looks
        looks += 1
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(client, "look_once", fails)
    thread = threading.Thread(target=client.look_after, name="looks", daemon=True)
    thread.start()
    eventually(lambda: looks > 3, "it looks again")
    client.close()
    thread.join(5)
    assert not thread.is_alive()


def test_neither_shows_the_token(client: VaultClient, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("urllib3").setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    client.sign(builders.grant())
    assert TOKEN not in f"{client!r}{client}{caplog.text}"


# --- the token's file ------------------------------------------------------------------------------------------------


def test_a_token_file_is_read_whatever_ends_its_line(token_file: Path) -> None:
    for end in ("", "\n", "\r\n", " \n\n"):
        token_file.write_text(TOKEN + end)
        assert read_token(token_file) == TOKEN


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"a\nb", b"\xff\xfe", b"t\x00n", "töken".encode(), b"x" * 5000]
)
def test_what_is_no_token_is_refused(token_file: Path, content: bytes) -> None:
    token_file.write_bytes(content)
    with pytest.raises(BadSettings) as caught:
        read_token(token_file)
    assert caught.value.code == "vault_token_malformed"


def test_a_token_file_that_others_may_read_is_refused(token_file: Path) -> None:
    for mode in (0o440, 0o604, 0o644, 0o620, 0o601):
        token_file.chmod(mode)
        with pytest.raises(BadSettings) as caught:
            read_token(token_file)
        assert caught.value.code == "vault_token_not_private"


def test_a_token_file_that_is_no_plain_file_is_refused(tmp_path: Path, token_file: Path) -> None:
    (tmp_path / "link").symlink_to(token_file)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, code in (
        ("link", "vault_token_unreadable"),
        ("none", "vault_token_unreadable"),
        ("pipe", "vault_token_not_private"),
        (".", "vault_token_not_private"),
    ):
        with pytest.raises(BadSettings) as caught:
            read_token(tmp_path / name)
        assert caught.value.code == code
