"""What operators did to the platform is in the ledger before they are told so, and the operator's client asks for it.

The service is real; `ApiClient` talks to it as the commands do.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from signer.api_client import ApiClient
from signer.errors import BadRequest, BadSettings, NotAuthenticated, NotFound, Refused, Unavailable
from signer.ledger.audit import verify
from signer.ledger.fold import delete_views
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import FILE_NAME, VIEWS_NAME
from signer.policy.tokens import render_token
from signer.protocol import replies
from tests.parts.events import freeze, issued
from tests.parts.eventually import eventually
from tests.parts.keys import Key, KeyRing
from tests.parts.old_ledgers import write_version_1
from tests.parts.selfsigned import write_certificate
from tests.parts.service import Service, StartService

PLAN = "sha256:" + "a1" * 32
EVIDENCE = "sha256:" + "b2" * 32


@pytest.fixture
def service(start_service: StartService) -> Service:
    return start_service()


@pytest.fixture
def client(service: Service) -> Iterator[ApiClient]:
    with ApiClient(service.address, service.token_file("operator")) as client:
        yield client


def test_what_was_recorded_outlives_a_kill_right_after_the_reply(service: Service, client: ApiClient) -> None:
    keeper = service.keeper_pid()
    assert keeper is not None
    entry = client.record("cutover", "applied", PLAN, EVIDENCE, "ticket 812")
    os.kill(keeper, signal.SIGKILL)
    os.kill(service.pid, signal.SIGKILL)
    reader = LedgerReader(service.data_dir)
    try:
        stored = reader.entry(entry["seq"])
        assert (stored.hash, stored.kind, stored.actor) == (entry["hash"], "operation.recorded", "operator")
        assert verify(reader).seq >= entry["seq"]
    finally:
        reader.close()


def test_the_reply_is_what_the_models_say_and_what_a_list_tells(service: Service, client: ApiClient) -> None:
    first = service.ask("POST", "/api/operations", {"operation": "cutover", "outcome": "applied"}, identity="operator")
    assert first.status == 201
    told = replies.OperationDetails.model_validate_json(first.body)
    assert (told.plan, told.evidence, told.reason, told.address) == ("", "", "", "127.0.0.1")
    second = client.record("rollback", "rolled_back", PLAN, EVIDENCE, "logins failed")
    rows = client.operations()
    assert [row["seq"] for row in rows] == [second["seq"], told.seq]
    assert rows[0].items() <= second.items()
    assert client.operations(EVIDENCE) == rows[:1]
    assert client.operations(PLAN) == []
    page = service.ask("GET", "/api/operations?limit=1", identity="operator")
    replies.OperationPage.model_validate_json(page.body)
    follow = page.headers["link"].partition("<")[2].partition(">")[0]
    assert service.ask("GET", follow, identity="operator").json() == {"operations": rows[1:], "before": None}


def test_recording_and_reading_need_their_rights(service: Service) -> None:
    with ApiClient(service.address, service.token_file("ci")) as other:
        for act in (lambda: other.record("cutover", "applied"), other.operations):
            with pytest.raises(Refused) as caught:
                act()
            assert caught.value.code == "not_permitted"
            assert "identities.ci.may" in caught.value.hint
    unknown = service.folder / "unknown"
    unknown.touch(0o600)
    unknown.write_text(render_token(bytes(32)))
    with ApiClient(service.address, unknown) as other, pytest.raises(NotAuthenticated) as refused:
        other.head()
    assert refused.value.code == "token_unknown"


def test_a_freeze_does_not_stop_recording(service: Service, client: ApiClient) -> None:
    freeze = {"scope": "all", "reason": "drill"}
    assert service.ask("POST", "/api/freezes", freeze, identity="operator").status == 201
    assert client.record("decommission", "stopped", reason="as it was frozen")["outcome"] == "stopped"


def test_a_malformed_record_is_refused_with_the_services_own_code(client: ApiClient) -> None:
    for words in (("cutover", "perfect"), ("party", "applied"), ("cutover", "applied", "sha256:00")):
        with pytest.raises(BadRequest) as caught:
            client.record(*words)
        assert (caught.value.code, caught.value.hint) == ("field_malformed", "see /api/openapi.json")
    assert client.operations() == []


def test_a_rebuild_and_verify_keep_the_records(service: Service, client: ApiClient) -> None:
    client.record("cutover", "applied", PLAN, EVIDENCE, "first")
    before = client.operations()
    assert service.stop() == 0
    assert service.command("ledger", "rebuild").returncode == 0
    assert service.command("ledger", "verify").returncode == 0
    service.start()
    assert client.operations() == before


def test_a_ledger_of_version_1_goes_on_where_it_ended(
    start_service: StartService, tmp_path: Path, keyring: KeyRing
) -> None:
    service = start_service()
    assert service.stop() == 0
    for path in service.data_dir.iterdir():
        path.unlink()
    now = int(time.time())
    times = {"valid_after": now - 30, "valid_before": now + 900}
    events = [issued(41, **times), issued(7, backend="vault", **times), freeze("identity:ci"), issued(42, **times)]
    write_version_1(service.data_dir, events, now * 1000 - 5_000)
    assert service.command("ledger", "verify").returncode == 0, "before it is migrated"
    assert service.command("certs", "list", "--backend", "vault", "--json").returncode == 0
    service.start()
    line = keyring("ed25519", "user").public_line
    assert service.sign(line).json()["serial"] == "43"
    assert service.sign(line, identity="ci").json()["code"] == "frozen"
    with ApiClient(service.address, service.token_file("operator")) as client:
        assert [row["serial"] for row in client.certificates()] == ["43", "42", "7", "41"]
        client.record("cutover", "applied", PLAN)
        assert len(client.operations()) == 1
    assert service.command("ledger", "verify").returncode == 0
    assert service.stop() == 0
    with closing(sqlite3.connect(service.data_dir / FILE_NAME)) as ledger:
        assert ledger.execute("PRAGMA user_version").fetchone() == (2,)
        assert ledger.execute("SELECT count(*) FROM certificates").fetchone() == (3,), (
            "the old tables stay as they were"
        )


def test_views_that_are_deleted_under_the_service_change_nothing_that_is_seen(
    service: Service, client: ApiClient, keyring: KeyRing
) -> None:
    line = keyring("ed25519", "user").public_line
    serials = [client.sign("llmops", {"public_key": line})["serial"] for _ in range(4)]
    for spoil in (delete_views, lambda path: path.write_bytes(b"nonsense" * 1_000)):
        spoil(service.data_dir / VIEWS_NAME)
        serials.append(client.sign("llmops", {"public_key": line})["serial"])
        eventually(lambda: sees(client) == serials[::-1], "the views are there again")
    assert service.command("ledger", "verify").returncode == 0
    assert service.is_ready()


def sees(client: ApiClient) -> list[str]:
    try:
        return [row["serial"] for row in client.certificates()]
    except Unavailable:
        return []


def test_certificates_are_listed_by_who_signed_them(service: Service, client: ApiClient, keyring: KeyRing) -> None:
    line = keyring("ed25519", "user").public_line
    issued = [client.sign("llmops", {"public_key": line, "ttl": "5m"})["serial"] for _ in range(3)]
    assert [row["serial"] for row in client.certificates(backend="local", limit=1)] == issued[::-1]
    assert list(client.certificates(backend="vault", active=True)) == []
    assert client.certificate(issued[0])["backend"] == "local"
    with pytest.raises(NotFound) as caught:
        client.certificate(999)
    assert caught.value.code == "unknown_serial"
    listed = service.command("certs", "list", "--backend", "local", "--json")
    assert listed.stdout.count('"serial"') == 3


def test_readiness_is_told_and_waited_for(service: Service, client: ApiClient) -> None:
    seen = client.ready()
    assert (seen.ready, seen.mode, seen.ca_fingerprint) == (True, "local", service.ca.fingerprint)
    assert client.wait_ready("local", service.ca.fingerprint, 30) == seen
    for mode, ca, code in (("vault", None, "service_other_mode"), ("local", "SHA256:x", "service_other_ca")):
        with pytest.raises(Unavailable) as caught:
            client.wait_ready(mode, ca, 0.3)
        assert caught.value.code == code
    keeper = service.keeper_pid()
    assert keeper is not None
    ledger, away = service.data_dir / FILE_NAME, service.data_dir / "away"
    ledger.rename(away)
    deadline = time.monotonic() + 30
    while (seen := client.ready()).ready:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert seen.code.startswith("ledger_")
    away.rename(ledger)
    assert client.wait_ready("local", None, 30).ready


def test_a_service_that_is_down_is_waited_for_and_then_told(
    service: Service, client: ApiClient, tmp_path: Path
) -> None:
    assert service.stop() == 0
    with pytest.raises(Unavailable) as caught:
        client.wait_ready("local", None, 0.3)
    assert (caught.value.code, caught.value.facts["code"]) == ("service_never_ready", "service_down")
    with pytest.raises(Unavailable) as down:
        client.head()
    assert down.value.code == "service_down"
    service.start()
    assert client.wait_ready("local", None, 30).ready


class Elsewhere(Service):
    """The service behind another kind of address, which only `ApiClient` needs to understand."""

    def __init__(self, folder: Path, ca: Key, address: str, environ: Mapping[str, str]) -> None:
        super().__init__(folder, ca, environ=environ)
        self.place = address.format(port=self.port)

    def is_ready(self) -> bool:
        try:
            with ApiClient(self.place, self.token_file("operator")) as client:
                return client.ready().ready
        except Unavailable:
            return False


def test_a_unix_socket_is_an_address(tmp_path: Path, keyring: KeyRing) -> None:
    place = f"unix:{tmp_path}/api.sock"
    service = Elsewhere(tmp_path / "service", keyring("ed25519", "ca"), place, {"SIGNER_LISTEN": place})
    with service, ApiClient(service.place, service.token_file("operator")) as client:
        assert client.record("cutover", "applied")["address"] == ""


def test_tls_is_trusted_by_who_trusts_its_authority_only(
    tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, private = write_certificate(tmp_path)
    environ = {"SIGNER_TLS_CERT_FILE": str(certificate), "SIGNER_TLS_KEY_FILE": str(private)}
    service = Elsewhere(tmp_path / "service", keyring("ed25519", "ca"), "https://localhost:{port}", environ)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with service, ApiClient(service.place, service.token_file("operator")) as client:
        assert client.head()["seq"] > 0
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(Unavailable) as caught:
            client.head()
        assert caught.value.code == "service_tls"


def test_another_machine_gets_no_token_in_the_clear(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(render_token(bytes(32)))
    with pytest.raises(BadSettings) as caught:
        ApiClient("http://192.0.2.1:8222", token)
    assert caught.value.code == "token_in_clear"
