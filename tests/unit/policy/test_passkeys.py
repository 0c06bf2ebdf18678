"""policy.toml and enrolments on passkeys: what is read, what is refused with its place, and what a role takes."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import BadFile
from signer.model import Passkey, SshApprovalKey
from signer.policy.concerns import find_concerns
from signer.policy.decide import Policy
from signer.policy.edit import add_approval_key
from signer.policy.file import parse_policy
from signer.policy.passkeys import MAX_ENROLMENT, MAX_ID, decode_base64url, encode_base64url, read_enrolment
from tests.parts.builders import POLICY, policy_text, role_lines
from tests.parts.passkeys import ALGORITHMS, ORIGIN, RP, SoftPasskey, b64url

OPERATOR_KEYS = 'approval_keys = [{ kind = "ssh", key = "{fido:operator}" }]'
FIDO = '{ kind = "ssh", key = "{fido:operator}" }'
APPROVAL = 'approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }'
KEY = SoftPasskey("operator")
ANNA = """
[identities.anna]
kind = "human"
groups = ["operators"]
roles = ["llmops"]
may = ["approve"]
approval_keys = [KEYS]
"""


def read(text: str, *lines: str) -> Policy:
    """The policy with `lines` in role llmops."""
    return parse_policy(policy_text(text.replace(*role_lines(*lines))).encode())


def with_keys(*entries: str) -> str:
    return POLICY.replace(OPERATOR_KEYS, f"approval_keys = [{', '.join(entries)}]")


def problems(text: str, *lines: str) -> list[str]:
    with pytest.raises(BadFile) as caught:
        read(text, *lines)
    assert caught.value.code == "policy_refused"
    assert not any(problem.startswith("line 0") for problem in caught.value.problems)
    return [" ".join(problem.split()[2:]) for problem in caught.value.problems]


def der_of(key: Any) -> bytes:
    raw: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return raw


# --- lines of policy.toml --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_passkey_is_read_beside_a_key_of_openssh(algorithm: str) -> None:
    key = SoftPasskey("operator", algorithm)
    first, second = read(with_keys(FIDO, key.entry)).identities["operator"].approval_keys
    assert isinstance(first, SshApprovalKey)
    assert second == key.line
    assert (first.kind, second.kind) == ("ssh", "webauthn")


@pytest.mark.parametrize(
    "rp,origin",
    [
        (RP, ORIGIN),
        ("example.org", ORIGIN),
        (RP, "https://a.b.signer.example.org:8443"),
        ("xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("localhost", "http://localhost"),
        ("localhost", "http://localhost:8222"),
        ("localhost", "https://localhost:1"),
    ],
)
def test_pages_of_the_relying_party_are_taken(rp: str, origin: str) -> None:
    (found,) = read(with_keys(SoftPasskey("operator", rp=rp, origin=origin).entry)).identities["operator"].approval_keys
    assert isinstance(found, Passkey)
    assert (found.rp, found.origins) == (rp, (origin,))


@pytest.mark.parametrize(
    "origin,sentence",
    [
        ("http://signer.example.org", "is not https; only http://localhost may be without TLS"),
        ("http://localhost.signer.example.org", "is not https"),
        ("https://localhost", "is not a page of 'signer.example.org'"),
        ("https://example.org", "is not a page of"),
        ("https://evilsigner.example.org", "is not a page of"),
        ("https://signer.example.org.evil.example", "is not a page of"),
        ("https://signer.example.org/", "is not an origin as browsers write it"),
        ("https://signer.example.org/console", "is not an origin"),
        ("https://Signer.example.org", "is not an origin"),
        ("https://anna@signer.example.org", "is not an origin"),
        ("https://signer.example.org:443", "has a port that browsers do not write"),
        ("https://signer.example.org:0443", "is not an origin"),
        ("https://signer.example.org:70000", "has a port that browsers do not write"),
        ("https://*.signer.example.org", "is not an origin"),
        ("https://bücher.example", "is not an origin"),
        ("https://192.0.2.1", "is not a domain: browsers offer no passkeys on pages of IP addresses"),
        ("https://[::1]", "is not an origin"),
        ("https://signer.example.org.", "is not a domain"),
        ("https://-.signer.example.org", "is not a domain"),
        ("android:apk-key-hash:abc", "is not an origin"),
        ("null", "is not an origin"),
        ("", "is not an origin"),
        ("https://s.averyveryverylongnameofahost.signer.example.org", "has the form of a token: use another host"),
    ],
)
def test_each_page_that_is_none_of_the_relying_partys_is_refused(origin: str, sentence: str) -> None:
    (problem,) = problems(with_keys(SoftPasskey(origin=origin).entry))
    assert problem.startswith("identities.operator.approval_keys.0.origins.0 ")
    assert sentence in problem


@pytest.mark.parametrize(
    "rp",
    ["", "org", "Signer.example.org", "https://signer.example.org", "192.0.2.1", "a..b", ".org", "a.org.", "a_b.org"],
)
def test_a_relying_party_is_a_domain(rp: str) -> None:
    found = problems(with_keys(SoftPasskey(rp=rp).entry))
    assert any(
        problem.startswith("identities.operator.approval_keys.0.rp ") and "is not a domain in lower case" in problem
        for problem in found
    ), found


def test_a_relying_party_that_the_ledger_would_hide_is_refused() -> None:
    rp = "s.averyveryverylongnameofahost.example.org"
    found = problems(with_keys(SoftPasskey(rp=rp, origin=f"https://{rp}").entry))
    assert [problem.split()[0].partition(".0.")[2] for problem in found] == ["origins.0", "rp"]
    assert all("has the form of a token" in problem for problem in found)


@pytest.mark.parametrize(
    "old,new,place,sentence",
    [
        (KEY.line.id, "", "id", "is not 1 to 1023 bytes in base64url"),
        (KEY.line.id, KEY.line.id + "==", "id", "is not base64url without padding"),
        (KEY.line.id, "a+b/", "id", "is not base64url without padding"),
        (KEY.line.id, "A", "id", "is not base64url without padding"),
        (KEY.line.id, "AB", "id", "its last character has bits that belong to no byte"),
        (KEY.line.id, "A" * 1_368, "id", "is not 1 to 1023 bytes"),
        (KEY.line.public_key, "AAAA", "public_key", "is not the DER of a public key"),
        (KEY.line.public_key, b64url(KEY.der + b"\0"), "public_key", "is not the DER of a public key"),
        (KEY.line.public_key, b64url(KEY.cose_bytes), "public_key", "is not the DER of a public key"),
        (KEY.line.public_key, base64.b64encode(KEY.der).decode(), "public_key", "is not base64url"),
        (f'"{ORIGIN}"', f'"{ORIGIN}", "{ORIGIN}"', "origins.1", "is listed twice"),
        (f'"{ORIGIN}"', "", "origins", "is empty"),
        (f'["{ORIGIN}"]', f'"{ORIGIN}"', "origins", "list"),
        (f'"{ORIGIN}"', ", ".join(f'"https://h{n}.{RP}"' for n in range(9)), "origins", "has 9 origins; 8 are allowed"),
        (f', rp = "{RP}"', "", "rp", "is missing"),
        (f', origins = ["{ORIGIN}"]', "", "origins", "is missing"),
        (f'id = "{KEY.line.id}", ', "", "id", "is missing"),
        (" }", ", verify = true }", "verify", "does not go with kind webauthn: remove it"),
        (" }", ", software = false }", "software", "does not go with kind webauthn: remove it"),
        (" }", ", counter = 1 }", "counter", "unknown key"),
    ],
)
def test_each_fault_of_a_line_is_told(old: str, new: str, place: str, sentence: str) -> None:
    assert old in KEY.entry
    found = problems(with_keys(KEY.entry.replace(old, new)))
    assert any(
        problem.startswith(f"identities.operator.approval_keys.0.{place} ") and sentence in problem for problem in found
    ), found


@pytest.mark.parametrize("kind", ["rsa", "p384", "ed448", "compressed"])
def test_keys_of_other_algorithms_are_refused(kind: str) -> None:
    if kind == "compressed":
        whole = KEY.der
        point = bytes([2 + whole[-1] % 2]) + whole[-64:-32]
        head = bytes.fromhex("3039301306072a8648ce3d020106082a8648ce3d030107032200")
        der, sentence = head + point, "is not in the form that getPublicKey() returns"
    else:
        made: Any = {
            "rsa": lambda: rsa.generate_private_key(65537, 2048),
            "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
            "ed448": ed448.Ed448PrivateKey.generate,
        }[kind]()
        der, sentence = der_of(made), "is not a P-256 or Ed25519 key"
    text = b64url(der)
    found = problems(with_keys(KEY.entry.replace(KEY.line.public_key, text)))
    assert len(found) == 1
    assert sentence in found[0]


def test_a_passkey_is_one_persons_and_listed_once() -> None:
    anna = ANNA.replace("KEYS", KEY.entry)
    assert problems(with_keys(KEY.entry) + anna) == [
        f"identities.anna.approval_keys.0.{field} is also an approval key of operator: each person has their own"
        for field in ("id", "public_key")
    ]
    again = problems(with_keys(KEY.entry, KEY.entry))
    assert [problem.split()[0] for problem in again] == [
        f"identities.operator.approval_keys.1.{field}" for field in ("id", "public_key")
    ]
    assert all(problem.endswith("is listed twice") for problem in again)
    same_id = SoftPasskey("other").entry.replace(b64url(SoftPasskey("other").id), KEY.line.id)
    (problem,) = problems(with_keys(KEY.entry) + ANNA.replace("KEYS", same_id))
    assert problem.startswith("identities.anna.approval_keys.0.id is also")


@pytest.mark.parametrize("kind,who", [("agent", "an agent"), ("workload", "a workload")])
def test_an_agent_or_workload_has_no_passkey(kind: str, who: str) -> None:
    text = POLICY + ANNA.replace("KEYS", KEY.entry).replace('"human"', f'"{kind}"').replace('may = ["approve"]\n', "")
    assert problems(text) == [f"identities.anna.approval_keys {who} can never approve"]


# --- roles -----------------------------------------------------------------------------------------------------------


def test_a_role_takes_both_kinds_unless_it_says() -> None:
    assert read(POLICY, APPROVAL).roles["llmops"].key_kinds == {"ssh", "webauthn"}
    assert read(POLICY).roles["llmops"].key_kinds == {"ssh", "webauthn"}
    only = APPROVAL.replace(" }", ', with = ["ssh"] }')
    assert read(POLICY, only).roles["llmops"].key_kinds == {"ssh"}


def test_break_glass_takes_keys_of_openssh() -> None:
    text = POLICY.replace('max_ttl = "30m"', 'max_ttl = "15m"').replace('kind = "agent"', 'kind = "human"')
    assert read(text, "break_glass = true").roles["llmops"].key_kinds == {"ssh"}


@pytest.mark.parametrize(
    "value,place,sentence",
    [
        ("[]", "with", "is empty"),
        ('["ssh", "ssh"]', "with.1", "is listed twice"),
        ('["gpg"]', "with.0", "must be 'ssh' or 'webauthn'"),
        ('"ssh"', "with", "list"),
    ],
)
def test_each_fault_of_with_is_told(value: str, place: str, sentence: str) -> None:
    found = problems(POLICY, APPROVAL.replace(" }", f", with = {value} }}"))
    assert any(f"roles.llmops.approval.{place} " in problem and sentence in problem for problem in found), found


def test_a_role_whose_approvers_have_no_key_of_its_kinds_is_refused() -> None:
    only = APPROVAL.replace(" }", ', with = ["ssh"] }')
    assert problems(with_keys(KEY.entry), only) == [
        "roles.llmops.approval.with nobody who may approve has an approval key of kind ssh"
    ]
    two = only.replace(" }", ", count = 2 }")
    (problem,) = problems(POLICY + ANNA.replace("KEYS", KEY.entry), two)
    assert problem.endswith("2 is above 1, the members of operators who may approve")


def test_warnings_count_keys_that_the_role_takes() -> None:
    everybody = APPROVAL.replace('["agent"]', '["agent", "human"]')
    anna = ANNA.replace("KEYS", KEY.entry)
    assert list(find_concerns(read(POLICY + anna, everybody))) == []
    (found,) = find_concerns(read(POLICY + anna, everybody.replace(" }", ', with = ["ssh"] }')))
    assert (found.code, "operator cannot get it" in found.text) == ("approvers_too_few", True)
    own = 'approval = { for = ["agent"], by = ["operators"], valid_for = "10m", with = ["ssh"] }\npresence = true'
    (found,) = find_concerns(read(POLICY + anna, own))
    assert (found.code, "anna" in found.text) == ("approval_key_missing", True)


# --- enrolment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_enrolment_becomes_a_line_that_the_policy_takes(algorithm: str) -> None:
    key = SoftPasskey("operator", algorithm)
    passkey, entry = read_enrolment(json.dumps(key.enrolment).encode())
    assert passkey == key.line
    text = add_approval_key(policy_text(POLICY), "operator", entry)
    assert parse_policy(text.encode()).identities["operator"].approval_keys[1] == key.line


@pytest.mark.parametrize(
    "before", ["", "approval_keys = []\n", '\n[[identities.anna.approval_keys]]\nkind = "ssh"\nkey = "x"\n']
)
def test_an_entry_is_added_to_each_form_of_a_list(before: str) -> None:
    text = f'[identities.anna]\nkind = "human"   # a person\n{before}'
    _, entry = read_enrolment(json.dumps(KEY.enrolment).encode())
    after = add_approval_key(text, "anna", entry)
    assert "# a person" in after
    assert KEY.line.public_key in after


@pytest.mark.parametrize(
    "changes",
    [
        {"id": None},
        {"id": "!"},
        {"id": 7},
        {"public_key": "AAAA"},
        {"rp": "evil.example"},
        {"origin": "http://signer.example.org"},
        {"origin": [ORIGIN]},
        {"kind": "webauthn"},
        {"private_key": "x"},
    ],
)
def test_an_enrolment_that_is_not_one_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadFile) as caught:
        read_enrolment(json.dumps({**KEY.enrolment, **changes}).encode())
    assert caught.value.code == "enrolment_malformed"
    assert caught.value.hint


def test_an_enrolment_is_read_strictly() -> None:
    good = json.dumps(KEY.enrolment).encode()
    twice = good[:-1] + b', "rp": "' + RP.encode() + b'"}'
    for raw in (
        b"",
        b"[]",
        b"\xef\xbb\xbf" + good,
        good[:-1],
        good + b"x",
        twice,
        b"[" * 5_000,
        b" " * MAX_ENROLMENT + good,
    ):
        with pytest.raises(BadFile) as caught:
            read_enrolment(raw)
        assert caught.value.code == "enrolment_malformed"


@given(st.binary(max_size=400))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(BadFile):
        read_enrolment(raw)


# --- base64url -------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=MAX_ID))
def test_bytes_have_one_text(raw: bytes) -> None:
    assert decode_base64url(encode_base64url(raw), MAX_ID) == raw


@given(st.text(alphabet=st.sampled_from("ABab09-_=+/ \n"), max_size=12))
def test_texts_that_are_read_are_written_the_same(text: str) -> None:
    try:
        raw = decode_base64url(text, 9)
    except ValueError:
        return
    assert encode_base64url(raw) == text
    assert 0 < len(raw) <= 9


def test_the_limit_is_in_bytes() -> None:
    assert decode_base64url(b64url(b"x" * 37), 37) == b"x" * 37
    with pytest.raises(ValueError, match="is not 1 to 37 bytes"):
        decode_base64url(b64url(b"x" * 38), 37)
