"""Each deliberate difference from Vault, shown with both servers; the list is tests/parts/parity_differences.py."""

from __future__ import annotations

import ast
import base64
import os
import signal
import time
from pathlib import Path

import pytest

from tests.parts import parity
from tests.parts.keys import KeyRing, sign_with_ssh_keygen
from tests.parts.openbao import OpenBao
from tests.parts.parity import IDENTITY, Case, Pair, bare_line, read_certificate, seen, sign
from tests.parts.parity_differences import DIFFERENCES
from tests.parts.service import StartService


def _statuses(pair: Pair, case: Case) -> tuple[int, int]:
    theirs, ours = pair.both(case)
    return theirs.status, ours.status


def _sentence(pair: Pair, case: Case) -> str:
    """Of our refusal of a request that OpenBao grants."""
    theirs, ours = pair.both(case)
    assert theirs.status == 200, theirs.body
    assert ours.status == 400, ours.body
    errors = ours.json()["errors"]
    assert len(errors) == 1
    return str(errors[0])


def test_every_listed_difference_has_a_test_named_after_it() -> None:
    tree = ast.parse(Path(__file__).read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    shown = {name.removeprefix("test_difference_") for name in names if name.startswith("test_difference_")}
    listed = {name for difference in DIFFERENCES for name in difference.tests}
    assert listed <= shown
    assert not [name for name in shown if not name.startswith(tuple(listed))]


@pytest.mark.parametrize("field", ["ttl", "valid_principals", "key_id"])
def test_difference_empty_text_is_unset(pair: Pair, field: str) -> None:
    role = "many" if field == "valid_principals" else "keyid"
    ours = pair.service.sign(pair.key.public_line, role=role)
    plain = read_certificate(ours.json()["certificate"])
    theirs, answer = pair.both(sign("empty", {field: ""}, role))
    assert theirs.status == (200 if field == "key_id" else 400)
    certificate = read_certificate(answer.json()["data"]["signed_key"])
    for name in ("principals", "key_id"):
        assert getattr(certificate, name) == getattr(plain, name)
    assert certificate.valid_before - certificate.valid_after == plain.valid_before - plain.valid_after == 930


def test_difference_empty_text_is_unset_for_null_principals(pair: Pair) -> None:
    assert _statuses(pair, sign("null", valid_principals=None)) == (400, 200)


@pytest.mark.parametrize("options", [{"x": "y"}, {"verify-required": ""}, {"": ""}], ids=str)
def test_difference_critical_options_need_an_allow_list(pair: Pair, options: dict[str, str]) -> None:
    said = _sentence(pair, sign("any option", role="wide", critical_options=options))
    assert said == f"critical options not on allowed list: [{' '.join(options)}]"


def test_difference_defaults_stay_when_options_are_asked_for(pair: Pair) -> None:
    theirs, ours = pair.certificates(sign("one more", role="wide", extensions={"permit-user-rc": ""}))
    assert [name for name, _ in theirs.extensions] == ["permit-user-rc"]
    assert [name for name, _ in ours.extensions] == ["permit-port-forwarding", "permit-pty", "permit-user-rc"]


def test_difference_defaults_stay_when_options_are_asked_for_and_are_pinned(pair: Pair) -> None:
    pinned = sign("drop the command", role="forced", critical_options={"source-address": "10.0.0.0/8"})
    pair.bao.must("POST", f"{parity.SPARE}/roles/forced-open", dict(parity.ROLES["forced"].theirs) | OPEN)
    theirs = pair.bao.sign(pair.key.public_line, "forced-open", parity.SPARE, critical_options={"x": "y"})
    assert read_certificate(theirs.body["data"]["signed_key"]).critical_options == (("x", "y"),)
    assert _statuses(pair, pinned) == (400, 400)
    ours = pair.service.sign(pair.key.public_line, role="forced")
    assert read_certificate(ours.json()["certificate"]).critical_options == (("force-command", parity.FORCED),)


OPEN: dict[str, object] = {"allowed_critical_options": ""}


@pytest.mark.parametrize(
    "value", ["not-a-cidr", "", "10.0.0.1/8", "10.0.0.0/8,", "10.0.0.0/8, 10.1.0.0/16", "300.0.0.0/8", "::/129", "\x00"]
)
def test_difference_option_values_are_parsed(pair: Pair, value: str) -> None:
    said = _sentence(pair, sign("source", role="options", critical_options={"source-address": value}))
    assert said.startswith("source-address: ")


@pytest.mark.parametrize("value", ["", "two\nlines", "\x1b[2J", "nul\x00"])
def test_difference_option_values_are_parsed_commands_too(pair: Pair, value: str) -> None:
    said = _sentence(pair, sign("command", role="options", critical_options={"force-command": value}))
    assert said.startswith("force-command must be one line of printable text")


@pytest.mark.parametrize("value", ["true", True, None, 1.50, {"a": 1}, [1, 2]], ids=str)
def test_difference_extensions_are_flags(pair: Pair, value: object) -> None:
    said = _sentence(pair, sign("a value", extensions={"permit-pty": value}))
    assert said == 'an extension is a flag and takes no value; send "" as its value'


@pytest.mark.parametrize("asked", ["", ",", " , "])
def test_difference_no_certificate_without_principals(pair: Pair, asked: str) -> None:
    role = dict(parity.ROLES["wide"].theirs) | {"default_user": ""}
    pair.bao.must("POST", f"{parity.SPARE}/roles/nobody-wide", role)
    theirs = pair.bao.sign(pair.key.public_line, "nobody-wide", parity.SPARE, valid_principals=asked)
    assert read_certificate(theirs.body["data"]["signed_key"]).principals == ()
    ours = pair.ours(sign("nobody", role="nobody", valid_principals=asked))
    assert (ours.status, ours.json()["errors"][0][:61]) == (
        400,
        "refusing to issue unsafe, globally-valid certificate with no ",
    )


@pytest.mark.parametrize(
    "name", ["a b", "a\nb", "a\x00b", "*", "{{identity.entity.name}}", ",".join(f"p{n}" for n in range(300))]
)
def test_difference_dangerous_principals_are_refused(pair: Pair, name: str) -> None:
    said = _sentence(pair, sign("a dangerous name", role="wide", valid_principals=name))
    assert "is not a valid value for valid_principals" in said or "a certificate may have 256" in said


@pytest.mark.parametrize("key_id", ["a\nb", "a\x00", "\x1b[31m", "k" * 257])
def test_difference_key_ids_are_plain_and_short(pair: Pair, key_id: str) -> None:
    said = _sentence(pair, sign("a key id", role="wide", key_id=key_id))
    assert said.startswith("key_id must have at most 256 characters, only letters, digits and ._@=:+/-")


@pytest.mark.parametrize("key_id", ["John Doe", "é", "a,b", "$(id)", "a;b"])
def test_difference_key_ids_have_no_blanks(pair: Pair, key_id: str) -> None:
    assert _sentence(pair, sign("a key id", role="wide", key_id=key_id)).startswith("key_id must have at most")


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _encoded(*strings: bytes) -> str:
    return base64.b64encode(b"".join(map(_string, strings))).decode()


RSA_1024 = _encoded(b"ssh-rsa", b"\1\0\1", b"\0" + b"\xff" * 128)
RSA_EVEN = _encoded(b"ssh-rsa", b"\1\0\1", b"\0" + b"\xff" * 255 + b"\xfe")
DSA = _encoded(b"ssh-dss", b"\0" + b"\xff" * 128, b"\0" + b"\xff" * 20, b"\2", b"\3")
FIDO_WITHOUT_APPLICATION = _encoded(b"sk-ssh-ed25519@openssh.com", b"x" * 32, b"")


@pytest.mark.parametrize(
    "key, said",
    [
        (RSA_1024, "public_key failed to meet the key requirements: key is of an invalid size: 1024"),
        (DSA, "failed to parse public_key as SSH key: ssh: unknown key algorithm: ssh-dss"),
        ("ssh-rsa @KEY@", "the key is labelled 'ssh-rsa' but its content is ssh-ed25519; send the unchanged line"),
    ],
    ids=["RSA of 1024 bits", "DSA", "another label"],
)
def test_difference_weak_and_odd_keys_are_refused(pair: Pair, key: str, said: str) -> None:
    text = key.replace("@KEY@", pair.key.public_line.split()[1])
    assert _sentence(pair, sign("a key", public_key=text)).startswith(said)


def test_difference_weak_and_odd_keys_are_refused_and_certificates(pair: Pair, keyring: KeyRing) -> None:
    line = sign_with_ssh_keygen(keyring("ed25519", "ca"), pair.key, name="as-a-key").read_text()
    theirs, ours = pair.both(sign("a certificate", public_key=line))
    assert (theirs.status, ours.status) == (500, 400)
    assert ours.json()["errors"][0].startswith("the public key is a certificate")


@pytest.mark.parametrize("kind", ["rsa4096", "sk-ed25519", "sk-ecdsa256"])
def test_difference_key_types_are_exact(pair: Pair, keyring: KeyRing, kind: str) -> None:
    case = sign(kind, role="keys", public_key=keyring(kind).public_line)
    assert _statuses(pair, case) == ((400, 200) if kind == "rsa4096" else (200, 400))


@pytest.mark.parametrize(
    "kind, role, said",
    [
        ("ecdsa521", "keys", "it is ecdsa-sha2-nistp521 (521 bits), the role takes ecdsa-sha2-nistp256"),
        ("ecdsa384", "keys", "it is ecdsa-sha2-nistp384 (384 bits), the role takes ecdsa-sha2-nistp256"),
        ("ecdsa256", "curves", "it is ecdsa-sha2-nistp256 (256 bits), the role takes ecdsa-sha2-nistp384"),
    ],
)
def test_difference_sizes_of_ecdsa_keys_are_named(
    pair: Pair, keyring: KeyRing, kind: str, role: str, said: str
) -> None:
    """audit, section 7: "key of type ecdsa is not allowed" is wrong where one of another size is."""
    theirs, ours = pair.both(sign(kind, role=role, public_key=keyring(kind).public_line))
    assert (theirs.status, ours.status) == (400, 400)
    assert ours.json()["errors"] == [f"{theirs.json()['errors'][0]}: {said}"]


@pytest.mark.parametrize("key", [RSA_EVEN, FIDO_WITHOUT_APPLICATION], ids=["even modulus", "no application"])
def test_difference_keys_that_openssh_could_not_use(pair: Pair, key: str) -> None:
    assert _sentence(pair, sign("a key", public_key=key)).startswith("failed to parse public_key as SSH key: ")


def test_difference_serials_count_up(pair: Pair) -> None:
    first, second = (pair.ours(sign("a serial")).json()["data"]["serial_number"] for _ in range(2))
    assert int(second, 16) == int(first, 16) + 1
    assert pair.service.ask("GET", f"/api/certificates/{int(second, 16)}", identity=IDENTITY).status == 200


def test_difference_no_private_keys_are_made(pair: Pair) -> None:
    theirs, ours = pair.both(Case("issue", "@/issue/llmops", body={"key_type": "ed25519"}))
    assert "private_key" in theirs.json()["data"]
    assert ours.status == 405
    assert "a server must not make private keys" in ours.json()["errors"][0]


def test_difference_key_ids_name_identity_and_role(pair: Pair) -> None:
    theirs, ours = pair.certificates(sign("no key id", role="wide"))
    assert theirs.key_id.startswith(f"vault-token-{IDENTITY}-")
    assert ours.key_id == f"{IDENTITY}:wide"


def test_difference_host_certificates_are_not_issued(pair: Pair) -> None:
    case = sign("host", role="wide", cert_type="host", valid_principals="web.example.com")
    assert _sentence(pair, case) == "cert_type 'host' is not allowed by role"


def test_difference_a_forced_command_closes_forwarding(pair: Pair) -> None:
    theirs, ours = pair.certificates(sign("a command", role="wide", critical_options={"force-command": "ls"}))
    assert [name for name, _ in theirs.extensions] == ["permit-port-forwarding", "permit-pty"]
    assert [name for name, _ in ours.extensions] == ["permit-pty"]
    both = sign("both", role="wide", critical_options={"force-command": "ls"}, extensions={"permit-user-rc": ""})
    assert _sentence(pair, both).startswith("permit-user-rc would bypass the forced command")


def test_difference_a_reason_is_recorded(pair: Pair) -> None:
    theirs, ours = pair.both(sign("why", reason="ticket 812"))
    assert theirs.json()["warnings"] == ["Endpoint ignored these unrecognized parameters: [reason]"]
    assert ours.json()["warnings"] is None
    serial = int(ours.json()["data"]["serial_number"], 16)
    recorded = pair.service.ask("GET", f"/api/certificates/{serial}", identity=IDENTITY).json()
    assert recorded["reason"] == "ticket 812"


def test_difference_rsa_cas_sign_with_sha512(bao: OpenBao, keyring: KeyRing, start_service: StartService) -> None:
    service = start_service(ca_kind="rsa3072")
    bao.enable_ssh("rsa", private_key=service.ca.private.read_text(), public_key=bare_line(service.ca))
    bao.write_role("llmops", "rsa")
    line = keyring("ed25519").public_line
    theirs = read_certificate(bao.sign(line, mount="rsa").body["data"]["signed_key"])
    ours = read_certificate(service.sign(line).json()["certificate"])
    assert (theirs.signature_kind, ours.signature_kind) == ("rsa-sha2-256", "rsa-sha2-512")
    role = service.ask("GET", "/v1/ssh/roles/llmops", identity=IDENTITY).json()["data"]
    assert role["algorithm_signer"] == "rsa-sha2-512"


def test_difference_the_ca_line_has_no_comment(bao: OpenBao, pair: Pair) -> None:
    ca = pair.service.ca
    line = bao.enable_ssh("commented", private_key=ca.private.read_text(), public_key=ca.public_line)
    assert line == ca.public_line != bare_line(ca)
    assert pair.ours(Case("ca", "@/public_key", "GET", token="none")).body.decode() == bare_line(ca)


def test_difference_issuer_ids_follow_the_key(pair: Pair, start_service: StartService) -> None:
    theirs, ours = (answer.json()["data"]["issuer_id"] for answer in pair.both(Case("ca", "@/config/ca", "GET")))
    other = start_service().ask("GET", "/v1/ssh/config/ca", identity=IDENTITY).json()["data"]["issuer_id"]
    assert ours == other != theirs
    for path in (f"@/issuer/{ours}", f"@/issuer/{ours}/public_key"):
        assert pair.ours(Case("by id", path, "GET")).status == 200


@pytest.mark.parametrize(
    "case",
    [
        sign("sign"),
        Case("read", "@/config/ca", "GET"),
        Case("list", "@/roles", "LIST"),
        Case("public", "@/public_key", "GET", token="none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("ttl", ["60", "5m", "1h30m"])
def test_difference_wrapping_is_refused(pair: Pair, case: Case, ttl: str) -> None:
    wrapped = Case(case.name, case.path, case.method, case.body, {"X-Vault-Wrap-TTL": ttl}, case.token)
    if case.token == "good":
        assert pair.both(wrapped)[0].json()["wrap_info"]["ttl"] > 0
    ours = pair.ours(wrapped)
    assert (ours.status, ours.json()) == (
        400,
        {"errors": ["response wrapping is not offered; leave X-Vault-Wrap-TTL out"]},
    )


ADMINISTRATION = [
    (verb, path)
    for path in ("roles/new", "config/ca", "config/issuers", "issuer/default", "issuers/import", "issuers/import/x")
    for verb in ("POST", "PUT", "DELETE")
    if verb != "DELETE" or path in ("roles/new", "config/ca", "issuer/default")
]


@pytest.mark.parametrize("verb, path", ADMINISTRATION)
def test_difference_administration_is_refused(pair: Pair, verb: str, path: str) -> None:
    # Not sent to OpenBao: the other tests need its roles and its CA.
    answer = pair.service.ask(verb, f"/v1/{parity.MOUNT}/{path}", {"key_type": "ca"}, identity=IDENTITY)
    assert answer.status == 405
    assert "policy.toml" in answer.json()["errors"][0]
    assert pair.service.ask(verb, f"/v1/{parity.MOUNT}/{path}").json() == {"errors": ["permission denied"]}


@pytest.mark.parametrize("verb", ["POST", "DELETE"])
def test_difference_administration_is_refused_of_mounts_too(pair: Pair, verb: str) -> None:
    answer = pair.service.ask(verb, "/v1/sys/mounts/new", {"type": "ssh"}, identity=IDENTITY)
    assert answer.status == 405
    assert "SIGNER_MOUNTS" in answer.json()["errors"][0]


def test_difference_lists_show_the_callers_roles(pair: Pair) -> None:
    theirs, ours = (answer.json()["data"]["keys"] for answer in pair.both(Case("list", "@/roles", "LIST")))
    assert "others" in theirs
    assert "others" not in ours
    assert set(ours) <= set(theirs)


@pytest.mark.parametrize(
    "verb, path",
    [
        ("POST", "@/creds/llmops"),
        ("POST", "@/lookup"),
        ("POST", "@/verify"),
        ("GET", "@/config/zeroaddress"),
        ("DELETE", "@/tidy/dynamic-keys"),
        ("GET", "sys/internal/ui/mounts/ssh"),
        ("POST", "sys/capabilities-self"),
        ("POST", "auth/token/renew-self"),
    ],
)
def test_difference_one_time_passwords_are_not_there(pair: Pair, verb: str, path: str) -> None:
    ours = pair.ours(Case("otp", path, verb, {}))
    assert (ours.status, ours.json()) == (404, {"errors": ["1 error occurred:\n\t* unsupported path\n\n"]})


def test_difference_help_is_one_sentence(pair: Pair) -> None:
    theirs, ours = pair.both(Case("help", "@/sign/llmops?help=1", "GET"))
    assert theirs.json()["help"].startswith("Request:")
    assert "policy.toml" in ours.json()["help"]
    assert seen(ours)["headers"] == seen(theirs)["headers"]


def test_difference_the_seal_says_whether_the_keeper_signs(start_service: StartService) -> None:
    service = start_service()
    assert service.ask("GET", "/v1/sys/health").json()["sealed"] is False
    assert service.ask("GET", "/v1/sys/seal-status").json()["type"] == "signer"
    keeper = service.keeper_pid()
    assert keeper is not None
    service.key_file.unlink()  # so that the keeper cannot come back
    os.kill(keeper, signal.SIGKILL)
    while (health := service.ask("GET", "/v1/sys/health")).status == 200:
        time.sleep(0.05)
    assert (health.status, health.json()["sealed"]) == (503, True)
    assert service.ask("GET", "/v1/sys/seal-status").json()["sealed"] is True
    refused = service.ask("POST", "/v1/ssh/sign/llmops", {}, identity=IDENTITY)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert refused.json() == {"errors": ["the keeper does not answer; retry in a second"]}


def test_difference_head_is_405_for_everybody(pair: Pair) -> None:
    assert _statuses(pair, Case("head", "@/roles/llmops", "HEAD")) == (403, 405)


def test_difference_large_bodies_are_refused(pair: Pair) -> None:
    theirs, ours = pair.both(sign("a large field", junk="x" * 65_536))
    assert (theirs.status, ours.status) == (200, 413)
    assert ours.json() == {"errors": ["http: request body too large"]}
    theirs, ours = pair.both(sign("a large comment", public_key=f"{pair.key.public_line} {'x' * 16_384}"))
    assert (theirs.status, ours.status) == (200, 400)


def _nested(levels: int) -> object:
    return "x" if levels == 0 else [_nested(levels - 1)]


@pytest.mark.parametrize(
    "body, said",
    [
        (b'{"public_key":"@KEY@","junk":' + b"[" * 5000 + b"]" * 5000 + b"}", "exceeded max depth"),
        (b'{"public_key":"@KEY@"}' + b" 1" * 9, "the body is not valid JSON"),
        (b'{"public_key":"@KEY@","extensions":' + b"[" * 40 + b"]" * 40 + b"}", "exceeded max depth"),
    ],
    ids=["5000 lists", "10 values", "40 lists in a map"],
)
def test_difference_deep_json_is_refused(pair: Pair, body: bytes, said: str) -> None:
    case = parity.raw("deep", body)
    assert _sentence(pair, case) == f"failed to decode JSON input: {said}"


@pytest.mark.parametrize(
    "case, theirs_says, ours_says",
    [
        (
            parity.raw("hidden", "[" + "1," * 600 + "x]"),
            "failed to decode JSON input: invalid character 'x'",
            "failed to decode JSON input: the body is not valid JSON",
        ),
        (
            parity.raw("a list", "[]"),
            "failed to decode JSON input: json: cannot unmarshal array",
            "failed to decode JSON input: the body is not a JSON object",
        ),
        (
            sign("no duration", ttl="1w"),
            'Field validation failed: error converting input for field "ttl": time: unknown unit "w"',
            'Field validation failed: error converting input for field "ttl": not a duration such as 90, 15m or 1h30m',
        ),
    ],
    ids=str,
)
def test_difference_faults_of_json_and_durations_have_one_sentence(
    pair: Pair, case: Case, theirs_says: str, ours_says: str
) -> None:
    theirs, ours = pair.both(case)
    assert theirs.json()["errors"][0].startswith(theirs_says)
    assert ours.json() == {"errors": [ours_says]}
    assert theirs.status == ours.status == 400


@pytest.mark.parametrize("token", ["none", "bad"])
@pytest.mark.parametrize("path", ["@/sign/llmops", "@/nope", "nomount/x"])
def test_difference_the_body_of_a_stranger_is_not_decoded(pair: Pair, path: str, token: str) -> None:
    assert _statuses(pair, Case("malformed", path, body=b"{bad", token=token)) == (400, 403)
