"""Rules that an audit asked for: reasons, key ids, values of extensions, unlisted extensions, back-dating, keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from signer.authority.certificates import issued_event, prepare_certificate
from signer.cli.main import main
from signer.errors import BadFile, Refused
from signer.model import Grant, Role, SignRequest
from signer.policy.decide import decide, explain
from signer.policy.file import parse_policy
from signer.policy.rules import CLOSED_BY_FORCE_COMMAND
from tests.parts import builders
from tests.parts.builders import NO_USAGE, NOW, ask, identity, policy, policy_text, public_key, role, role_lines

ALL_FIVE = tuple((name, "") for name in sorted(CLOSED_BY_FORCE_COMMAND | {"permit-pty"}))  # as `bao ssh` requests them
GITHUB = {
    "allowed_extensions": frozenset({"permit-pty", "login@github.com"}),
    "extension_values": (("login@github.com", "{identity}"),),
}


def grant(asked: SignRequest, allowed: Role, **more: Any) -> Grant:
    return decide(more.get("who", identity()), allowed, asked, more.get("key", public_key()), "192.0.2.7", NO_USAGE)


def refusal(asked: SignRequest, allowed: Role, **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        grant(asked, allowed, **more)
    return caught.value


def problems(*lines: str) -> list[str]:
    old, new = role_lines(*lines)
    with pytest.raises(BadFile) as caught:
        parse_policy(policy_text(builders.POLICY.replace(old, new)).encode())
    return list(caught.value.problems)


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason",
    ["   ", ".", "ab", "-- --", "\u2800\u2800\u2800", "\u3164\u3164\u3164", "\u115f\u1160\uffa0", "a b", "\u00a0" * 3],
)
def test_audit_reason_of_blanks_or_signs_does_not_satisfy(reason: str) -> None:
    assert refusal(ask(reason=reason), role(reason_required=True)).code in ("reason_too_short", "reason_malformed")


@pytest.mark.parametrize("reason", ["812", "fix", "a-b-c", "\u4fee\u6b63\u4e2d", "\u00bd\u00bc\u2160"])
def test_audit_reason_of_three_letters_or_digits_satisfies(reason: str) -> None:
    assert grant(ask(reason=reason), role(reason_required=True)).reason == reason


def test_audit_reason_that_is_not_required_may_be_short() -> None:
    assert grant(ask(reason="-"), role()).reason == "-"


# --- key ids ---------------------------------------------------------------------------------------------------------

KNOWN = identity(known=frozenset({"deploy-agent", "operator", "ci"}))


@pytest.mark.parametrize("key_id", ["operator:llmops", "operator:", "operator", "OPERATOR:x", "ci:a:b"])
def test_audit_key_id_of_another_identity_is_refused(key_id: str) -> None:
    assert refusal(ask(key_id=key_id), role(allow_key_id=True), who=KNOWN).code == "key_id_of_another_identity"


@pytest.mark.parametrize(
    "key_id", ["deploy-agent:x", "deploy-agent", "ticket:812", "operators:x", "x:operator:y", "ci-1"]
)
def test_audit_key_id_of_ones_own_or_of_nobody_is_taken(key_id: str) -> None:
    assert grant(ask(key_id=key_id), role(allow_key_id=True), who=KNOWN).key_id == key_id


def test_audit_key_id_every_identity_of_the_file_knows_the_names() -> None:
    read = policy()
    assert {one.known for one in read.identities.values()} == {frozenset(read.identities)}


# --- extensions ------------------------------------------------------------------------------------------------------


def test_audit_extension_value_is_the_roles_and_in_the_certificate() -> None:
    allowed = role(**GITHUB, default_extensions=("login@github.com", "permit-pty"))
    for asked in (
        ask(),
        ask(extensions=(("login@github.com", ""),)),
        ask(extensions=(("login@github.com", "deploy-agent"),)),
    ):
        made = grant(asked, allowed)
        assert made.extension_fields == (("login@github.com", "deploy-agent"), ("permit-pty", ""))
        certificate = prepare_certificate(made, 7, bytes(32), NOW, public_key().blob)
        assert certificate.fields.extensions == made.extension_fields
        body = issued_event(certificate, builders.caller(), "p", "local", "SHA256:x").body
        assert body["extensions"] == ["login@github.com=deploy-agent", "permit-pty"]


@pytest.mark.parametrize("name,value", [("login@github.com", "operator"), ("permit-pty", "x")])
def test_audit_extension_value_of_the_callers_is_refused(name: str, value: str) -> None:
    assert refusal(ask(extensions=((name, value),)), role(**GITHUB)).code == "extension_has_value"


def test_audit_extension_value_is_read_from_the_file() -> None:
    old, new = role_lines()
    text = (
        builders.POLICY.replace(old, new)
        .replace(
            "extensions = {", 'extensions = { values = { "login@github.com" = "{identity}", cert_type = "user" },', 1
        )
        .replace('allowed = ["permit-pty"', 'allowed = ["login@github.com", "cert_type", "permit-pty"', 1)
    )
    read = parse_policy(policy_text(text).encode()).roles["llmops"]
    assert dict(read.extension_values) == {"login@github.com": "{identity}", "cert_type": "user"}


@pytest.mark.parametrize(
    "table,fault",
    [
        ('allowed = ["login@github.com"]', "is not an extension"),
        ('allowed = ["permit-pty"], values = { permit-pty = "x" }', "is a flag of OpenSSH's and takes no value"),
        ('allowed = ["permit-pty"], values = { "a@b" = "x" }', "is not among allowed"),
        ('allowed = ["a@b"], values = { "a@b" = "" }', "is not 1 to 256 printable characters"),
        ('allowed = ["a@b"], values = { "a@b" = "\\n" }', "is not 1 to 256 printable characters"),
        ('allowed = ["a b"], values = { "a b" = "x" }', "is not the name of an extension"),
        ('allowed = ["permit-pty"], unlisted = "ignore"', "must be 'refuse' or 'drop'"),
    ],
)
def test_audit_extension_tables_with_faults_are_refused(table: str, fault: str) -> None:
    lines = [line for line in builders.POLICY.splitlines() if line.startswith("extensions")]
    text = builders.POLICY.replace(lines[0], f"extensions = {{ {table} }}", 1)
    with pytest.raises(BadFile) as caught:
        parse_policy(policy_text(text).encode())
    assert any(fault in problem for problem in caught.value.problems), caught.value.problems


def test_audit_f15_a_role_with_a_forced_command_refuses_or_drops_what_bao_ssh_requests() -> None:
    forced = {
        "force_command": "/usr/bin/deploy",
        "allowed_extensions": frozenset({"permit-pty"}),
        "default_extensions": (),
    }
    assert refusal(ask(extensions=ALL_FIVE), role(**forced)).code == "extension_not_allowed"
    dropping = role(**forced, unlisted_extensions="drop")
    made = grant(ask(extensions=ALL_FIVE), dropping)
    assert made.extensions == ("permit-pty",)
    assert dict(made.critical_options) == {"force-command": "/usr/bin/deploy"}
    explained = explain(
        identity(), role(**forced, unlisted_extensions="drop"), ask(extensions=ALL_FIVE), public_key(), None, NO_USAGE
    )
    (told,) = [finding.detail for finding, _ in explained if finding.rule == "extensions"]
    assert told.startswith("permit-pty; dropped: permit-X11-forwarding, permit-agent-forwarding")


# --- back-dating and keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,seconds", [("0s", 0), ("30s", 30), ("5m", 300)])
def test_audit_backdate_is_the_roles(text: str, seconds: int) -> None:
    old, new = role_lines(f'backdate = "{text}"')
    read = parse_policy(policy_text(builders.POLICY.replace(old, new)).encode()).roles["llmops"]
    assert read.backdate == seconds
    made = grant(ask(), role(backdate=seconds))
    certificate = prepare_certificate(made, 7, bytes(32), NOW, public_key().blob)
    assert certificate.fields.valid_after == NOW - seconds
    body = issued_event(certificate, builders.caller(), "p", "local", "SHA256:x").body
    assert body.get("backdate", 30) == seconds


def test_audit_backdate_above_five_minutes_is_refused() -> None:
    assert "5m1s is above 5m" in problems('backdate = "5m1s"')[0]


OTHER = public_key(name="other")


def test_audit_f3_only_enrolled_keys_are_certified() -> None:
    mine = frozenset({public_key().fingerprint})
    for who, allowed in (
        (identity(keys=mine), role()),
        (identity(), role(keys=mine)),
        (identity(keys=mine), role(keys=mine)),
    ):
        assert grant(ask(), allowed, who=who).public_key == public_key()
        refused = refusal(ask(), allowed, who=who, key=OTHER)
        assert refused.code == "key_not_enrolled"
        assert OTHER.fingerprint in refused.text
        assert public_key().fingerprint not in refused.text + refused.hint
    both = (identity(keys=mine), role(keys=frozenset({OTHER.fingerprint})))
    assert refusal(ask(), both[1], who=both[0]).code == "key_not_enrolled"


def test_audit_f3_keys_are_read_from_the_file() -> None:
    line = f'keys = ["{OTHER.fingerprint}"]'
    old, new = role_lines(line)
    text = builders.POLICY.replace(old, new).replace("[identities.deploy-agent]", f"[identities.deploy-agent]\n{line}")
    read = parse_policy(policy_text(text).encode())
    assert read.roles["llmops"].keys == read.identities["deploy-agent"].keys == frozenset({OTHER.fingerprint})
    assert read.identities["operator"].keys is None


@pytest.mark.parametrize("line", ["keys = []", 'keys = ["SHA256:x"]', 'keys = ["ssh-ed25519 AAAA"]'])
def test_audit_f3_a_list_without_fingerprints_is_refused(line: str) -> None:
    assert problems(line)
    text = builders.POLICY.replace("[identities.deploy-agent]", f"[identities.deploy-agent]\n{line}")
    with pytest.raises(BadFile):
        parse_policy(policy_text(text).encode())


def test_audit_f3_enrol_prints_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "id.pub"
    path.write_text(builders.public_line("sk-ssh-ed25519@openssh.com") + " me@host\n")
    assert main(["key", "enrol", str(path)]) == 0
    shown = capsys.readouterr()
    fingerprint = public_key("sk-ssh-ed25519@openssh.com").fingerprint
    assert shown.out == f'keys = ["{fingerprint}"]\n'
    assert "nothing attests that this key is in hardware" in shown.err
