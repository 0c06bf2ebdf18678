"""policy.toml on approvals: who may approve with which key, for what, and what an operator is warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from signer.errors import BadFile
from signer.model import Approval, SshApprovalKey
from signer.policy.concerns import find_concerns
from signer.policy.decide import Policy
from signer.policy.file import MAX_APPROVAL_KEYS, parse_policy
from tests.parts.builders import POLICY, policy_text, public_line, role_lines
from tests.parts.command import run
from tests.parts.fido import SK_ECDSA, FidoKey
from tests.parts.keys import KeyRing

OPERATOR_KEYS = 'approval_keys = [{ kind = "ssh", key = "{fido:operator}" }]'
ANNA = """
[identities.anna]
kind = "human"
groups = ["operators"]
roles = ["llmops"]
may = ["approve"]
approval_keys = [{ kind = "ssh", key = "{fido:anna}" }]
"""
APPROVAL = 'approval = { for = ["agent"], by = ["operators"], valid_for = "10m" }'


def read(text: str, *lines: str) -> Policy:
    """The policy with `lines` in role llmops."""
    return parse_policy(policy_text(text.replace(*role_lines(*lines))).encode())


def problems(text: str, *lines: str) -> list[str]:
    with pytest.raises(BadFile) as caught:
        read(text, *lines)
    assert caught.value.code == "policy_refused"
    assert not any(problem.startswith("line 0") for problem in caught.value.problems)
    return [" ".join(problem.split()[2:]) for problem in caught.value.problems]


def with_keys(*entries: str) -> str:
    return POLICY.replace(OPERATOR_KEYS, f"approval_keys = [{', '.join(entries)}]")


def entry(line: str, more: str = "") -> str:
    return f'{{ kind = "ssh", key = "{line}"{more} }}'


# --- approval_keys ---------------------------------------------------------------------------------------------------


def test_a_fido_key_is_read_with_its_fingerprint() -> None:
    held, other = FidoKey(name="operator"), FidoKey(SK_ECDSA)
    text = with_keys(entry("{fido:operator} anna's blue key"), entry(other.line, ", verify = true"))
    first, second = read(text).identities["operator"].approval_keys
    assert isinstance(first, SshApprovalKey)
    assert isinstance(second, SshApprovalKey)
    assert (first.key.fingerprint, first.software, first.verify) == (held.fingerprint, False, False)
    assert (second.key.fingerprint, second.software, second.verify) == (other.fingerprint, False, True)
    assert read(POLICY).identities["stranger"].approval_keys == ()


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa256", "ecdsa521", "rsa3072"])
def test_a_plain_key_needs_the_word_software(keyring: KeyRing, kind: str) -> None:
    line = " ".join(keyring(kind).public_line.split()[:2])
    (problem,) = problems(with_keys(entry(line)))
    assert problem.startswith(
        f"identities.operator.approval_keys.0.key is {line.split()[0]}, with which a program signs"
    )
    (found,) = read(with_keys(entry(line, ", software = true"))).identities["operator"].approval_keys
    assert isinstance(found, SshApprovalKey)
    assert found.software
    assert found.fingerprint == keyring(kind).fingerprint


@pytest.mark.parametrize(
    "keys,place,sentence",
    [
        ([entry("{fido:x}", ", software = true")], "0.software", "contradicts the key, which is sk-ssh-ed25519@"),
        ([entry(public_line(), ", software = true, verify = true")], "0.verify", "applies only to FIDO keys"),
        ([entry("ssh-ed25519 AAAA", ", software = true")], "0.key", "cannot be read"),
        ([entry("")], "0.key", "cannot be read"),
        ([entry("\\u001b[31m")], "0.key", "cannot be read"),
        ([entry("{fido:x}"), entry("{fido:x}")], "1.key", "is listed twice"),
        ([entry("{fido:x}"), entry("{fido:x} again", ", verify = true")], "1.key", "is listed twice"),
        ([entry("{fido:x}", ", sofware = true")], "0.sofware", "unknown key"),
        ([entry("{fido:x}", ", software = 1")], "0.software", "boolean"),
        (['{ kind = "gpg", key = "{fido:x}" }'], "0.kind", "must be 'ssh' or 'webauthn'"),
        (['{ kind = "webauthn", key = "{fido:x}" }'], "0.key", "does not go with kind webauthn: remove it"),
        ([entry("{fido:x}", ', rp = "example.org"')], "0.rp", "does not go with kind ssh: remove it"),
        (['{ key = "{fido:x}" }'], "0.kind", "is missing"),
        (['{ kind = "ssh" }'], "0.key", "is missing"),
        ([entry(f"{{fido:{n}}}") for n in range(MAX_APPROVAL_KEYS + 1)], "approval_keys", "has 9 keys; 8 are allowed"),
        ([], "approval_keys", "is empty"),
    ],
)
def test_each_fault_of_a_key_is_told(keys: list[str], place: str, sentence: str) -> None:
    found = problems(with_keys(*keys))
    assert any(f"approval_keys.{place} " in problem or problem.startswith(f"identities.operator.{place} ")
               for problem in found), found  # fmt: skip
    assert any(sentence in problem for problem in found), found


def test_a_short_rsa_key_does_not_approve(keyring: KeyRing) -> None:
    line = " ".join(keyring("rsa2048").public_line.split()[:2])
    (problem,) = problems(with_keys(entry(line, ", software = true")))
    assert problem.endswith("has 2048 bits; an RSA key that approves requires 3072")


def test_two_identities_with_one_key_are_refused() -> None:
    (problem,) = problems(POLICY + ANNA.replace("{fido:anna}", "{fido:operator} another comment"))
    assert problem.startswith("identities.anna.approval_keys.0.key is also an approval key of operator")


def test_the_right_to_approve_requires_a_key() -> None:
    (problem,) = problems(POLICY.replace(OPERATOR_KEYS + "\n", ""))
    assert problem.startswith("identities.operator.may.0 requires approval_keys")
    unfit = problems(with_keys(entry("nonsense")))
    assert not any("requires approval_keys" in problem for problem in unfit)


@pytest.mark.parametrize("kind,who", [("agent", "an agent"), ("workload", "a workload")])
def test_an_agent_or_workload_never_approves(kind: str, who: str) -> None:
    lines = ANNA.replace('"human"', f'"{kind}"')
    assert problems(POLICY + lines) == [
        f"identities.anna.may.0 {who} can never approve",
        f"identities.anna.approval_keys {who} can never approve",
    ]
    assert problems(POLICY + lines.replace('may = ["approve"]\n', "")) == [
        f"identities.anna.approval_keys {who} can never approve"
    ]


def test_a_human_may_hold_a_key_without_the_right_to_approve() -> None:
    """For roles that take the asker's own signature."""
    policy = read(POLICY + ANNA.replace('may = ["approve"]\n', ""))
    assert policy.identities["anna"].may == frozenset()
    assert len(policy.identities["anna"].approval_keys) == 1


# --- roles -----------------------------------------------------------------------------------------------------------


def test_an_approval_is_read_with_its_defaults() -> None:
    assert read(POLICY, APPROVAL).roles["llmops"].approval == Approval(frozenset({"agent"}), ("operators",), 600)
    more = APPROVAL.replace(" }", ", count = 2, waivers = false }")
    assert read(POLICY + ANNA, more).roles["llmops"].approval == Approval(
        frozenset({"agent"}), ("operators",), 600, 2, False
    )


def test_presence_and_break_glass_are_off_unless_said() -> None:
    role = read(POLICY).roles["llmops"]
    assert (role.presence, role.break_glass) == (False, False)
    assert read(POLICY, "presence = true").roles["llmops"].presence


@pytest.mark.parametrize(
    "old,new,place,sentence",
    [
        ('"10m"', '"12h1s"', "valid_for", "12h1s is above 12h, the maximum"),
        ('"10m"', '"0s"', "valid_for", "below one second"),
        (" }", ", count = 0 }", "count", "greater than or equal to 1"),
        (" }", ", count = 2 }", "count", "2 is above 1, the members of operators who may approve"),
        (" }", ", count = 6 }", "count", "6 is above 5, the maximum"),
        (" }", ', count = "2" }', "count", "valid integer"),
        (" }", ", waivers = 0 }", "waivers", "boolean"),
        ('["agent"]', '["agent", "agent"]', "for.1", "is listed twice"),
        ('["operators"]', '["operators", "operators"]', "by.1", "is listed twice"),
    ],
)
def test_each_fault_of_an_approval_is_told(old: str, new: str, place: str, sentence: str) -> None:
    found = problems(POLICY, APPROVAL.replace(old, new))
    assert any(f"roles.llmops.approval.{place} " in problem and sentence in problem for problem in found), found


def test_approvers_are_counted_over_all_groups_of_the_role_once() -> None:
    both = APPROVAL.replace('["operators"]', '["operators", "leads"]').replace(" }", ", count = 3 }")
    text = POLICY + ANNA.replace('["operators"]', '["operators", "leads"]')
    (problem,) = problems(text, both)
    assert problem.endswith("3 is above 2, the members of operators, leads who may approve")


@pytest.mark.parametrize(
    "lines,place,sentence",
    [
        (['max_ttl = "15m1s"'], "max_ttl", "15m1s is above 15m, the maximum of a break-glass role"),
        ([], "break_glass", "1h, the default of max_ttl, is above 15m"),
        (['max_ttl = "10m"', APPROVAL], "break_glass", "contradicts approval"),
    ],
)
def test_a_break_glass_role_is_short_and_waits_for_nobody(lines: list[str], place: str, sentence: str) -> None:
    text = POLICY.replace('max_ttl = "30m"\n', "").replace('default_ttl = "15m"\n', "")
    text = text.replace('kind = "agent"\nroles = ["llmops"]', 'kind = "human"\nroles = ["llmops"]')
    (problem,) = problems(text, "break_glass = true", *lines)
    assert problem.startswith(f"roles.llmops.{place} ")
    assert sentence in problem
    assert read(text, "break_glass = true", 'max_ttl = "15m"').roles["llmops"].break_glass


def test_a_break_glass_role_is_not_given_to_an_agent() -> None:
    text = POLICY.replace('max_ttl = "30m"', 'max_ttl = "15m"')
    (problem,) = problems(text, "break_glass = true")
    assert problem == "identities.deploy-agent.roles llmops is a break-glass role, for humans only"


# --- warnings --------------------------------------------------------------------------------------------------------


def concerns(text: str, *lines: str) -> dict[str, str]:
    return {found.code: found.text for found in find_concerns(read(text, *lines))}


def test_a_policy_without_approvals_raises_no_concern() -> None:
    assert concerns(POLICY) == {}


def test_a_software_key_is_a_concern() -> None:
    text = with_keys(entry(public_line(), ", software = true"))
    (found,) = find_concerns(read(text))
    assert found.code == "approval_key_in_software"
    assert "identities.operator" in found.text
    assert "a software key, with which any program of operator's approves unseen" in found.text


@pytest.mark.parametrize("more", [[], ["presence = true"]])
def test_a_role_that_agents_get_by_approval_and_humans_by_a_token_alone_is_a_concern(more: list[str]) -> None:
    found = concerns(POLICY, APPROVAL, *more)
    if more:
        assert found == {}
    else:
        assert found == {
            "role_by_token_alone": "roles.llmops: agents get it only by approval, operator by a token alone"
        }
    everybody = APPROVAL.replace('["agent"]', '["agent", "human"]')
    assert "role_by_token_alone" not in concerns(POLICY + ANNA, everybody, *more)
    nobody = POLICY.replace('groups = ["operators"]\nroles = ["llmops"]\n', 'groups = ["operators"]\n')
    assert concerns(nobody, APPROVAL) == {}


def test_a_human_whose_own_signature_is_taken_and_who_has_no_key_is_a_concern() -> None:
    keyless = ANNA.replace('may = ["approve"]\n', "").replace(
        'approval_keys = [{ kind = "ssh", key = "{fido:anna}" }]\n', ""
    )
    found = concerns(POLICY + keyless, "presence = true")
    assert found == {"approval_key_missing": "identities.anna: cannot get llmops, which takes anna's own signature"}


def test_an_approver_whose_own_request_nobody_else_can_approve_is_a_concern() -> None:
    everybody = APPROVAL.replace('["agent"]', '["agent", "human"]')
    (found,) = find_concerns(read(POLICY, everybody))
    assert found.code == "approvers_too_few"
    assert "operator cannot get it: nobody approves their own request, and only 0 of 1 can approve it" in found.text
    assert concerns(POLICY + ANNA, everybody) == {}
    two = everybody.replace(" }", ", count = 2 }")
    assert len(list(find_concerns(read(POLICY + ANNA, two)))) == 2


def test_policy_check_shows_each_concern_and_still_calls_the_file_good(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(POLICY.replace(*role_lines(APPROVAL))))
    path.chmod(0o644)
    done = run("policy", "check", str(path), "--json")
    assert done.status == 0
    assert [warning["code"] for warning in json.loads(done.out)["warnings"]] == ["role_by_token_alone"]
    shown = run("policy", "check", str(path))
    assert shown.status == 0
    assert "signer: warning: roles.llmops: agents get it only by approval, operator by a token alone" in shown.err
