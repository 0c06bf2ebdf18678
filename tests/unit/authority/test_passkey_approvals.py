"""Approvals by passkeys: what counts, what a role takes, and that nothing is taken twice; over HTTP in one test."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from signer.api.app import make_flask
from signer.authority.approval_audit import ApprovalAuditor
from signer.errors import SignerError
from signer.model import Assertion, SshApprovalKey
from signer.policy.decide import Policy
from signer.protocol.client import KeeperClient
from signer.protocol.commands import read_command
from signer.protocol.replies import Reply
from signer.settings import load_settings
from signer.ssh.statement import approval_statement, request_digest
from signer.units import timestamp
from tests.parts.asking import SK, Asking, approval_key, asking_policy, change_identity, change_role
from tests.parts.builders import token
from tests.parts.passkeys import ALGORITHMS, PRESENT, VERIFIED, SoftPasskey, b64url, body_of, resigned, unb64url


@pytest.fixture(params=ALGORITHMS)
def key(request: pytest.FixtureRequest) -> SoftPasskey:
    """Anna's."""
    return SoftPasskey(algorithm=request.param)


@pytest.fixture
def bench(key: SoftPasskey) -> Asking:
    """Anna has a passkey beside her FIDO key, ben and carl have FIDO keys."""
    return Asking(change_identity(asking_policy(), "anna", approval_keys=(approval_key("anna"), key.line)))


def code(reply: Any) -> str:
    assert isinstance(reply, SignerError), reply
    assert reply.text
    assert reply.hint
    return reply.code


def statement(shown: Any, who: str = "anna", waiver: Any = None) -> bytes:
    return approval_statement(shown["request"], request_digest(shown["frozen"]), who, waiver)


def approve(bench: Asking, shown: Any, key: SoftPasskey, who: str = "anna", waiver: Any = None, **changes: Any) -> Any:
    return send(bench, shown, key.approve(statement(shown, who, waiver), **changes), who, waiver)


def send(bench: Asking, shown: Any, made: Assertion, who: str = "anna", waiver: Any = None) -> Any:
    terms = None if waiver is None else (waiver["until"], waiver["uses"])
    command = msgspec.structs.replace(bench.approval(shown, who, terms, ""), signature=made)
    return bench.one(command)


# --- what counts -----------------------------------------------------------------------------------------------------


def test_a_passkey_approves_and_the_certificate_names_its_owner(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    after = approve(bench, shown, key)
    assert after["state"] == "approved"
    assert [(row["by"], row["key"], row["software"]) for row in after["approvals"]] == [
        ("anna", key.fingerprint, False)
    ]
    assert bench.request()["principals"] == ["llmops"]
    assert bench.issued()[0]["approved_by"] == ["anna"]


def test_what_is_recorded_is_bytes_in_base64_and_the_line_of_the_policy(bench: Asking, key: SoftPasskey) -> None:
    key.counter = 7
    shown = bench.request()
    made = key.approve(statement(shown))
    send(bench, shown, made)
    (body,) = bench.store.bodies("approval.given")
    recorded = {name: base64.b64decode(text, validate=True) for name, text in body["assertion"].items()}
    assert recorded == {name: unb64url(getattr(made, name)) for name in recorded}
    assert base64.b64decode(body["passkey"]["id"]) == key.id
    assert base64.b64decode(body["passkey"]["public_key"]) == key.der
    assert (body["passkey"]["rp"], body["passkey"]["origins"]) == (key.rp, [key.origin])
    assert (body["key"], body["counter"], body["software"]) == (key.fingerprint, 7, False)
    assert (body["user_present"], body["user_verified"]) == (True, True)


def test_an_approval_outlives_a_restart(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    approve(bench, shown, key)
    bench.restart()
    assert bench.show(shown["request"])["state"] == "approved"
    assert "certificate" in bench.request()


def test_a_waiver_is_part_of_what_a_passkey_signs(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    terms = {"until": timestamp(int(bench.now) + 3_600), "uses": 2}
    made = key.approve(statement(shown, waiver={**terms, "uses": 1}))
    assert code(send(bench, shown, made, waiver=terms)) == "assertion_for_another_statement"
    assert code(send(bench, shown, made)) == "assertion_for_another_statement"
    assert approve(bench, shown, key, waiver=terms)["state"] == "approved"
    assert [row["by"] for row in bench.waivers()] == [["anna"]]


def test_two_kinds_of_key_are_two_approvals_of_a_pair(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request(role="pair")
    assert approve(bench, shown, key)["state"] == "pending"
    assert bench.approve(shown, "ben")["state"] == "approved"
    again = bench.request(role="pair", reason="another")
    approve(bench, again, key)
    assert code(bench.approve(again, "anna")) == "already_approved"  # one human, whichever key


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,expected",
    [
        (PRESENT, "signature_without_verification"),
        (VERIFIED, "signature_without_presence"),
        (0, "signature_without_presence"),
    ],
)
def test_a_passkey_always_verifies_its_user(bench: Asking, key: SoftPasskey, flags: int, expected: str) -> None:
    shown = bench.request()
    key.flags = flags
    assert code(approve(bench, shown, key)) == expected
    assert bench.show(shown["request"])["state"] == "pending"
    assert bench.store.bodies("approval.given") == []


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"origin": "https://evil.example"}, "assertion_from_another_page"),
        ({"challenge": b64url(b"x" * 32)}, "assertion_for_another_statement"),
        ({"crossOrigin": True}, "assertion_from_another_page"),
        ({"type": "webauthn.create"}, "assertion_malformed"),
    ],
)
def test_a_spoiled_assertion_approves_nothing(
    bench: Asking, key: SoftPasskey, changes: dict[str, Any], expected: str
) -> None:
    shown = bench.request()
    assert code(approve(bench, shown, key, **changes)) == expected
    assert bench.show(shown["request"])["state"] == "pending"


def test_an_assertion_is_for_one_request_and_one_approver(bench: Asking, key: SoftPasskey) -> None:
    shown, other = bench.request(), bench.request("agent-8")
    made = key.approve(statement(shown))
    assert code(send(bench, other, made)) == "assertion_for_another_statement"
    assert code(send(bench, shown, made, "ben")) == "approval_key_unknown"
    ben = SoftPasskey("ben", key.algorithm)
    bench.use(change_identity(bench.policy, "ben", approval_keys=(ben.line,)))
    stolen = ben.approve(statement(shown, "anna"))
    assert code(send(bench, shown, stolen, "ben")) == "assertion_for_another_statement"
    assert code(send(bench, shown, stolen, "anna")) == "approval_key_unknown"
    assert send(bench, shown, made)["state"] == "approved"


def test_agents_and_askers_approve_with_no_passkey(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    bench.use(change_identity(bench.policy, "agent-7", approval_keys=(key.line,), may=frozenset({"approve"})))
    assert code(approve(bench, shown, key, "agent-7")) == "approver_not_human"
    own = bench.request("anna", "pair")
    assert code(approve(bench, own, key)) == "own_request"


def test_an_approval_by_a_removed_passkey_counts_no_more(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    approve(bench, shown, key)
    bench.use(change_identity(bench.policy, "anna", approval_keys=(approval_key("anna"),)))
    assert bench.show(shown["request"])["state"] == "pending"
    assert code(approve(bench, shown, key)) == "approval_key_unknown"
    assert bench.request()["state"] == "pending"


def test_an_assertion_of_a_page_that_the_policy_names_no_more_is_refused(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    moved = replace(key.line, origins=("https://new.signer.example.org",))
    bench.use(change_identity(bench.policy, "anna", approval_keys=(moved,)))
    assert code(approve(bench, shown, key)) == "assertion_from_another_page"


# --- replays and copies ----------------------------------------------------------------------------------------------


def test_an_approval_that_a_freeze_ended_is_not_replayed(bench: Asking, key: SoftPasskey) -> None:
    """Who has anna's token and her old assertion, such as a taken-over api, has no approval after she is thawed."""
    shown = bench.request()
    made = key.approve(statement(shown))
    assert send(bench, shown, made)["state"] == "approved"
    assert code(send(bench, shown, made)) == "already_approved"
    bench.use(change_identity(bench.policy, "ben", may=frozenset({"approve", "freeze"})))
    bench.freeze("identity:anna", "ben")
    bench.restart()
    bench.thaw("identity:anna", "ben")
    assert bench.show(shown["request"])["state"] == "pending"
    assert code(send(bench, shown, made)) == "signature_replayed"
    if key.algorithm == "ES256":
        other = resigned(made)
        assert other != made
        assert code(send(bench, shown, other)) == "signature_replayed"
    assert bench.approve(shown, "ben")["state"] == "approved"


def test_a_counter_never_goes_back(bench: Asking, key: SoftPasskey) -> None:
    key.counter = 7
    first = bench.request(reason="the first reason")
    assert approve(bench, first, key)["state"] == "approved"
    bench.restart()
    shown = bench.request("agent-8", reason="the second reason")
    for counter in (7, 6, 1, 0):
        key.counter = counter
        assert code(approve(bench, shown, key)) == "assertion_counter_behind"
    key.counter = 8
    assert approve(bench, shown, key)["state"] == "approved"


def test_a_passkey_that_counts_nothing_may_approve_often(bench: Asking, key: SoftPasskey) -> None:
    for number in range(3):
        shown = bench.request(reason=f"reason number {number}")
        assert approve(bench, shown, key)["state"] == "approved"


def test_counters_are_of_one_passkey(bench: Asking, key: SoftPasskey) -> None:
    other = SoftPasskey("anna's phone", key.algorithm)
    bench.use(change_identity(bench.policy, "anna", approval_keys=(key.line, other.line)))
    key.counter, other.counter = 9, 1
    assert approve(bench, bench.request(reason="by the first"), key)["state"] == "approved"
    assert approve(bench, bench.request(reason="by the other"), other)["state"] == "approved"


# --- roles -----------------------------------------------------------------------------------------------------------


def ssh_only(policy: Policy, role: str) -> Policy:
    approval = policy.roles[role].approval
    assert approval is not None
    return change_role(policy, role, approval=replace(approval, key_kinds=frozenset({"ssh"})))


def test_a_role_shuts_passkeys_out(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    assert "passkeys" in bench.show(shown["request"], "anna")
    approve(bench, shown, key)
    bench.use(ssh_only(bench.policy, "prod"))
    assert bench.show(shown["request"])["state"] == "pending"  # what was given before counts no more, too
    assert "passkeys" not in bench.show(shown["request"], "anna")
    assert code(approve(bench, bench.request("agent-8"), key)) == "approval_key_kind_refused"
    assert bench.approve(shown, "anna")["state"] == "approved"


def test_who_has_passkeys_only_is_no_approver_of_such_a_role(bench: Asking, key: SoftPasskey) -> None:
    bench.use(change_identity(ssh_only(bench.policy, "prod"), "anna", approval_keys=(key.line,)))
    shown = bench.request()
    assert shown["may_approve"] == ["ben", "carl"]
    for name in ("ben", "carl"):
        bench.use(change_identity(bench.policy, name, approval_keys=(SoftPasskey(name).line,)))
    assert code(bench.request("agent-8")) == "no_approver"


def test_a_role_takes_passkeys_only(bench: Asking, key: SoftPasskey) -> None:
    approval = bench.policy.roles["prod"].approval
    assert approval is not None
    bench.use(change_role(bench.policy, "prod", approval=replace(approval, key_kinds=frozenset({"webauthn"}))))
    shown = bench.request()
    assert shown["may_approve"] == ["anna"]
    assert code(bench.approve(shown, "ben")) == "approval_key_kind_refused"
    assert approve(bench, shown, key)["state"] == "approved"


def test_an_asker_signs_for_themself_with_a_passkey(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.bound("anna", "touch")
    assert shown["state"] == "pending"
    row = bench.show(shown["request"], "anna")
    assert row["passkeys"] == [{"id": b64url(key.id), "rp": key.rp}]
    assert len(row["presence_keys"]) == 1  # safe-session is offered keys of OpenSSH only
    assert approve(bench, shown, key)["state"] == "approved"
    assert bench.claim(shown, "anna")["principals"] == ["llmops"]


def test_break_glass_takes_keys_of_openssh_only(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.bound("anna", "glass")
    assert "passkeys" not in bench.show(shown["request"], "anna")
    assert code(approve(bench, shown, key)) == "approval_key_kind_refused"
    assert bench.approve(shown, "anna")["state"] == "approved"
    bench.use(change_identity(bench.policy, "ben", approval_keys=(SoftPasskey("ben").line,)))
    assert code(bench.bound("ben", "glass")) == "approval_key_missing"


def test_only_who_can_sign_now_is_shown_their_own_passkeys(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    for who in ("agent-7", "ben", "auditor"):
        assert "passkeys" not in bench.show(shown["request"], who)
    assert bench.show(shown["request"], "anna")["passkeys"] == [{"id": b64url(key.id), "rp": key.rp}]
    approve(bench, shown, key)
    assert "passkeys" not in bench.show(shown["request"], "anna")


# --- HTTP ------------------------------------------------------------------------------------------------------------


class CoreClient(KeeperClient):
    """Answers the API from a core in this process."""

    def __init__(self, bench: Asking) -> None:
        self._bench = bench

    def ask(self, header: dict[str, object], body: bytes = b"") -> Reply:
        command = read_command({"request_id": "r-1", **header}, body, lambda _caller: None, None)
        ((_, reply),) = self._bench.core.run([command])
        if isinstance(reply, SignerError):
            raise reply
        assert isinstance(reply, Reply)
        return reply


@pytest.fixture
def http(bench: Asking) -> Iterator[Any]:
    with make_flask(CoreClient(bench), load_settings({})).test_client() as client:
        yield client


def headers(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(who)}"}


def test_a_phone_approves_over_http_and_the_agent_claims(bench: Asking, key: SoftPasskey, http: Any) -> None:
    name = bench.request()["request"]
    path = f"/api/requests/{name}"
    shown = http.get(path, headers=headers("anna")).json
    assert shown["passkeys"] == [{"id": b64url(key.id), "rp": key.rp}]
    made = key.approve(statement(shown))
    answer = http.post(f"{path}/approve", json=body_of(made), headers=headers("anna"))
    assert (answer.status_code, answer.json["state"]) == (200, "approved")
    assert http.get(path, headers=headers("agent-7")).json["approvals"][0]["by"] == "anna"
    assert "certificate" in bench.request()
    again = http.post(f"{path}/approve", json=body_of(made), headers=headers("anna"))
    assert (again.status_code, again.json["code"]) == (409, "request_issued")


_MALFORMED = (400, "field_malformed")


@pytest.mark.parametrize(
    "inside,outside,expected",
    [
        ({"origin": "https://x.example"}, {}, _MALFORMED),
        ({"id": None}, {}, _MALFORMED),
        ({"id": 7}, {}, _MALFORMED),
        ({"id": ""}, {}, _MALFORMED),
        ({"signature": "A" * 129}, {}, _MALFORMED),
        ({"client_data": "A" * 2_732}, {}, _MALFORMED),
        ({"client_data": "AAA="}, {}, _MALFORMED),
        ({"signature": "AB"}, {}, (403, "assertion_malformed")),
        ({}, {"signature": "-----BEGIN SSH SIGNATURE-----"}, _MALFORMED),
        ({}, {"assertion": None}, _MALFORMED),
        ({}, {"assertion": []}, _MALFORMED),
        ({}, {"approver": "ben"}, _MALFORMED),
    ],
)
def test_a_body_that_is_not_the_documented_one_is_refused(
    bench: Asking, key: SoftPasskey, http: Any, inside: Any, outside: Any, expected: tuple[int, str]
) -> None:
    shown = bench.request()
    body = body_of(key.approve(statement(shown)))
    body["assertion"].update(inside)
    body.update(outside)
    answer = http.post(f"/api/requests/{shown['request']}/approve", json=body, headers=headers("anna"))
    assert (answer.status_code, answer.json["code"]) == expected
    assert answer.json["hint"]
    assert bench.show(shown["request"])["state"] == "pending"


@pytest.mark.parametrize("field", ["id", "authenticator_data", "client_data", "signature"])
def test_a_body_without_a_field_of_the_assertion_is_refused(
    bench: Asking, key: SoftPasskey, http: Any, field: str
) -> None:
    shown = bench.request()
    body = body_of(key.approve(statement(shown)))
    del body["assertion"][field]
    answer = http.post(f"/api/requests/{shown['request']}/approve", json=body, headers=headers("anna"))
    assert (answer.status_code, answer.json["code"]) == _MALFORMED


def test_a_wrong_token_or_another_humans_approves_nothing_with_a_good_assertion(
    bench: Asking, key: SoftPasskey, http: Any
) -> None:
    shown = bench.request()
    path, body = f"/api/requests/{shown['request']}/approve", body_of(key.approve(statement(shown)))
    assert http.post(path, json=body).status_code == 401
    for who, status, expected in (
        ("agent-7", 403, "approver_not_human"),
        ("ben", 403, "approval_key_unknown"),
        ("dora", 404, "unknown_request"),
    ):
        answer = http.post(path, json=body, headers=headers(who))
        assert (answer.status_code, answer.json["code"]) == (status, expected)
    assert bench.show(shown["request"])["state"] == "pending"
    assert http.get(path, headers=headers("anna")).status_code == 405


# --- years later -----------------------------------------------------------------------------------------------------


def audit(bench: Asking, policy: Policy | None = None, change: Any = None) -> Any:
    auditor = ApprovalAuditor({} if policy is None else {policy.digest: policy})
    for entry in bench.store.entries:
        body = json.loads(entry.body)
        if change is not None and entry.kind == "approval.given":
            change(body)
        auditor.take(msgspec.structs.replace(entry, body=json.dumps(body)))
    return auditor.audit


def test_the_ledger_alone_proves_an_approval_by_a_passkey(bench: Asking, key: SoftPasskey) -> None:
    approve(bench, bench.request(), key)
    bench.request()
    alone = audit(bench)
    assert (alone.problems, alone.signatures, alone.software, alone.certificates) == ([], 1, 0, 1)
    assert dict(alone.keys) == {("anna", key.fingerprint): 1}
    with_policy = audit(bench, bench.policy)
    assert (with_policy.problems, with_policy.owned) == ([], {("anna", key.fingerprint)})


@pytest.mark.parametrize("field", ["authenticator_data", "client_data", "signature"])
def test_each_changed_byte_of_a_recorded_assertion_is_found(bench: Asking, key: SoftPasskey, field: str) -> None:
    approve(bench, bench.request(), key)
    bench.request()

    def change(body: dict[str, Any]) -> None:
        raw = bytearray(base64.b64decode(body["assertion"][field]))
        raw[-1] ^= 1
        body["assertion"][field] = base64.b64encode(raw).decode()

    first, second = audit(bench, change=change).problems
    assert "does not verify" in first.text
    assert second.text.endswith("names anna, who has given no signature that counts")


@pytest.mark.parametrize(
    "line,outside,sentence",
    [
        ({"rp": "example.org"}, {}, "another relying party"),
        ({"origins": ["https://a.signer.example.org"]}, {}, "it was made on"),
        ({"origins": ["https://evil.example"]}, {}, "not one that policy.toml could have"),
        ({"origins": []}, {}, "not one that policy.toml could have"),
        ({"public_key": "AAAA"}, {}, "not one that policy.toml could have"),
        ({"rp": None}, {}, "its body is not one of approval.given"),
        ({"id": "!"}, {}, "its body is not one of approval.given"),
        ({}, {"passkey": None}, "its body is not one of approval.given"),
        ({}, {"assertion": {}}, "its body is not one of approval.given"),
        ({}, {"waiver": {"until": "2027-01-15T09:00:00Z", "uses": 1}}, "for another request, waiver"),
        ({}, {"counter": 1}, "another counter or content"),
        ({}, {"content": "00"}, "another counter or content"),
        ({}, {"user_verified": False}, "with another key or other flags"),
        ({}, {"software": True}, "with another key or other flags"),
        ({}, {"key": "SHA256:" + "A" * 43}, "with another key or other flags"),
    ],
)
def test_each_lie_about_a_passkey_is_found(
    bench: Asking, key: SoftPasskey, line: Any, outside: Any, sentence: str
) -> None:
    approve(bench, bench.request(), key)
    bench.request()

    def change(body: dict[str, Any]) -> None:
        body["passkey"].update(line)
        body.update(outside)

    found = audit(bench, change=change).problems
    assert any(sentence in problem.text for problem in found), found


def test_an_approval_without_verification_is_found_later(bench: Asking, key: SoftPasskey) -> None:
    shown = bench.request()
    approve(bench, shown, key)
    key.flags = PRESENT
    weak = key.approve(statement(shown))

    def change(body: dict[str, Any]) -> None:
        body["assertion"] = {
            name: base64.b64encode(unb64url(getattr(weak, name))).decode() for name in body["assertion"]
        }
        body["user_verified"] = False

    found = audit(bench, change=change).problems
    assert any("without a verification of the user" in problem.text for problem in found), found


def test_a_copy_of_a_passkey_shows_in_the_counters_of_the_whole_ledger(bench: Asking, key: SoftPasskey) -> None:
    """The keeper knows the counters since its start and of the days before; the ledger has all."""
    key.counter = 9
    approve(bench, bench.request(reason="the first reason"), key)
    bench.now += 10 * 24 * 3_600
    bench.restart()._random = lambda count: b"\7" * count  # a restarted bench would give the same ids again
    key.counter = 3
    assert approve(bench, bench.request(reason="the second reason"), key)["state"] == "approved"
    (problem,) = audit(bench).problems
    assert "has counter 3 after 9: the passkey may have been copied" in problem.text


def test_an_assertion_that_was_recorded_twice_is_found(bench: Asking, key: SoftPasskey) -> None:
    approve(bench, bench.request(), key)
    (entry,) = [entry for entry in bench.store.entries if entry.kind == "approval.given"]
    bench.store.entries.append(msgspec.structs.replace(entry, seq=entry.seq + 1))
    (problem,) = audit(bench).problems
    assert problem.text.endswith("is a signature that was recorded before")


@pytest.mark.parametrize("change", ["another page", "another rp", "removed", "ssh only"])
def test_the_policy_in_force_confirms_the_passkey(bench: Asking, key: SoftPasskey, change: str) -> None:
    approve(bench, bench.request(), key)
    bench.request()
    if change == "ssh only":
        lied = ssh_only(bench.policy, "prod")
    else:
        line = {
            "another page": replace(key.line, origins=("https://a.signer.example.org",)),
            "another rp": replace(key.line, rp="example.org"),
            "removed": approval_key("anna", SK),
        }[change]
        lied = change_identity(bench.policy, "anna", approval_keys=(line,))
    found = audit(bench, replace(lied, digest=bench.policy.digest))
    assert found.owned == set()
    expected = (
        "takes no approval by a key of kind webauthn" if change == "ssh only" else "whose key by its policy is not"
    )
    assert any(expected in problem.text for problem in found.problems), found.problems


def test_keys_of_openssh_are_verified_as_before(bench: Asking) -> None:
    """Their events have no passkey, as those of earlier versions."""
    bench.approve(bench.request(), "ben")
    (body,) = bench.store.bodies("approval.given")
    assert not {"assertion", "passkey", "content"} & set(body)
    assert {"signature", "public_key"} <= set(body)
    assert isinstance(bench.policy.identities["ben"].approval_keys[0], SshApprovalKey)
