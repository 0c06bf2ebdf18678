"""Requests to both sides and what is made of their answers; Vault and the service are played by our own rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from signer.errors import BadFormat, CertificateMismatch, NotAuthenticated, NotFound, Refused, SignerError, Unavailable
from signer.migration.parity import ParityReport, check_parity, make_samples, throwaway_key
from signer.model import CaKeys, Limits, Role
from signer.policy.decide import Policy
from signer.ssh.publickey import USER_KEY_KINDS, parse_public_key
from signer.vault.role import DEFAULTS, MountTtls
from tests.parts.parity_sides import issue, native_body
from tests.parts.roles import OURS, VAULTS

WIDE = replace(
    OURS,
    principals=("deploy", "llmops", "{identity}"),
    default_principals=("llmops",),
    key_types=USER_KEY_KINDS,
    allowed_extensions=frozenset({"permit-pty", "permit-user-rc"}),
    allowed_critical_options=frozenset({"source-address"}),
    allow_key_id=True,
    reason_required=True,
)


class FakeVault:
    """Signs by a role of ours, and tells a role of Vault's."""

    def __init__(self, role: Role, told: dict[str, Any], error: SignerError | None = None) -> None:
        self.signs_by, self.told, self.error = role, told, error
        self.asked: list[dict[str, object]] = []

    def role(self, mount: str, name: str) -> dict[str, Any]:
        assert (mount, name) == ("ssh", "llmops")
        return self.told

    def mount_ttls(self, mount: str) -> MountTtls | None:
        assert mount == "ssh"
        return None

    def sign(self, mount: str, role: str, fields: Any) -> str:
        assert (mount, role) == ("ssh", "llmops")
        self.asked.append(dict(fields))
        if self.error:
            raise self.error
        return issue(replace(self.signs_by, reason_required=False), native_body(fields))


def check(
    ours: Role,
    vault: FakeVault | None = None,
    sign: Callable[[str, dict[str, Any]], str] | None = None,
    samples: int = 20,
) -> ParityReport:
    policy = Policy("", CaKeys(""), {"llmops": ours}, {}, {})
    local = sign or (lambda _, body: issue(ours, body))
    return check_parity(policy, vault or FakeVault(ours, VAULTS), "ssh", local, ["llmops"], samples)


def test_twenty_certificates_are_compared_and_llmops_stays_llmops() -> None:
    report = check(OURS)
    assert (report.is_parity, report.sample_count) == (True, 20)
    assert report.summary == "llmops -> llmops, none added; 20 samples, 0 errors"


def test_samples_show_each_type_of_key_and_each_thing_that_may_be_asked() -> None:
    samples = list(make_samples(WIDE, 20))
    assert samples[0].is_plain
    assert {sample.key_type for sample in samples} == USER_KEY_KINDS
    assert {name for sample in samples for name in sample.asked} == {
        "principals", "ttl", "extensions", "critical_options", "key_id", "reason",
    }  # fmt: skip
    for sample in samples:
        assert issue(WIDE, sample.native(throwaway_key(sample.key_type)))


@pytest.mark.parametrize("kind", sorted(USER_KEY_KINDS))
@pytest.mark.parametrize("again", range(3))
def test_keys_that_nobody_has_are_keys_to_every_reader(kind: str, again: int) -> None:
    key = parse_public_key(throwaway_key(kind, 2048))
    assert (key.kind, again) == (kind, again)
    assert key.bits == 2048 or kind != "ssh-rsa"


def test_rsa_keys_have_a_size_that_vault_takes() -> None:
    vault = FakeVault(OURS, {**VAULTS, "allowed_user_key_lengths": {"rsa": [4096, 2048]}})
    check(replace(OURS, key_types=frozenset({"ssh-rsa"})), vault, samples=1)
    assert parse_public_key(str(vault.asked[0]["public_key"])).bits == 4096


def test_vault_is_asked_the_same_in_its_own_words_and_never_why() -> None:
    vault = FakeVault(WIDE, VAULTS)
    check(WIDE, vault)
    allowed = {
        "public_key",
        "cert_type",
        "ttl",
        "valid_principals",
        "extensions",
        "critical_options",
        "key_id",
    }
    assert {name for body in vault.asked for name in body} == allowed
    assert {"valid_principals": "deploy,llmops"}.items() <= vault.asked[5].items()


def test_a_certificate_that_gives_more_is_an_error_of_its_sample() -> None:
    narrow = FakeVault(replace(OURS, default_extensions=()), VAULTS)
    report = check(OURS, narrow)
    assert not report.is_parity
    (first,) = report.errors[:1]
    assert (first.field, first.severity) == ("extensions", "error")


def test_a_principal_that_is_added_is_an_error_and_told_in_the_summary() -> None:
    report = check(replace(OURS, principals=("llmops", "root"), default_principals=("llmops", "root")))
    assert not report.is_parity
    assert report.summary.startswith("llmops -> llmops, root, root added; ")


def test_the_roles_own_extensions_beside_asked_ones_are_a_note() -> None:
    both = frozenset({"permit-pty", "permit-user-rc"})
    ours = replace(OURS, allowed_extensions=both)
    vault = FakeVault(replace(ours, default_extensions=()), VAULTS)  # as Vault does where any are asked for
    asked = [sample for sample in check(ours, vault).roles[0].samples if "extensions" in sample.sample.asked]
    assert asked
    severities = {found.severity for sample in asked for found in sample.differences if found.field == "extensions"}
    assert severities == {"note"}


@pytest.mark.parametrize("name, expected", [("plain", "error"), ("longest ttl", "note")])
def test_what_ours_refuses_and_vault_grants_is_an_error_for_the_plain_request_only(name: str, expected: str) -> None:
    def sign(_: str, body: dict[str, Any]) -> str:
        if (name == "plain") == (set(body) == {"public_key"}):
            raise Refused("ttl_above_max", "too long")
        return issue(OURS, body)

    found = [found for result in check(OURS, sign=sign).roles[0].samples for found in result.differences]
    (told,) = {(found.severity, found.ours, found.vaults) for found in found if found.field == "outcome"}
    assert told == (expected, "refused: ttl_above_max", "granted")


def test_what_vault_refuses_and_ours_grants_is_an_error() -> None:
    report = check(OURS, FakeVault(OURS, VAULTS, CertificateMismatch("vault_refused", "no")))
    told = [(found.ours, found.vaults, found.why) for found in report.errors]
    assert told == [("granted", "refused: vault_refused", "signer grants what Vault refuses")] * 20


def test_nothing_is_shown_by_a_plain_request_that_both_refuse() -> None:
    def refuse(_: str, __: dict[str, Any]) -> str:
        raise Refused("frozen", "no")

    report = check(OURS, FakeVault(OURS, VAULTS, CertificateMismatch("vault_refused", "no")), refuse)
    assert [found.severity for found in report.errors] == ["error"] * len(report.errors)
    assert not report.is_parity


@pytest.mark.parametrize(
    "error", [Unavailable("a", "x"), NotAuthenticated("b", "x"), NotFound("c", "x"), BadFormat("d", "x")]
)
def test_what_cannot_be_asked_is_no_difference(error: SignerError) -> None:
    def fail(_: str, __: dict[str, Any]) -> str:
        raise error

    with pytest.raises(type(error)):
        check(OURS, sign=fail)
    with pytest.raises(type(error)):
        check(OURS, FakeVault(OURS, VAULTS, error))


@pytest.mark.parametrize(
    "answer", ["", "x", "ssh-ed25519-cert-v01@openssh.com !", "ssh-ed25519-cert-v01@openssh.com AA"]
)
def test_an_answer_that_is_no_certificate_is_no_parity(answer: str) -> None:
    with pytest.raises(Unavailable, match="not a certificate"):
        check(OURS, sign=lambda _, __: answer)


@pytest.mark.parametrize("limits, bound", [(Limits(per_minute=5), 5), (Limits(live=3), 3), (Limits(30, 20), 20)])
def test_the_roles_limits_bound_the_samples_and_the_report_says_so(limits: Limits, bound: int) -> None:
    (role,) = check(replace(OURS, limits=limits)).roles
    assert len(role.samples) == bound
    assert role.left_out == (f"{20 - bound} of 20 left out: the role's limits allow {bound}" if bound < 20 else "")


def test_a_limit_that_is_used_up_on_the_way_ends_the_samples() -> None:
    granted: list[str] = []

    def sign(_: str, body: dict[str, Any]) -> str:
        if len(granted) == 4:
            raise Refused("too_many_live", "enough")
        granted.append(issue(OURS, body))
        return granted[-1]

    (role,) = check(OURS, sign=sign).roles
    assert len(role.samples) == 5
    assert role.left_out == "15 of 20 left out: too_many_live, its limit is used up"


def test_a_role_that_policy_lacks_is_an_error() -> None:
    report = check_parity(Policy("", CaKeys(""), {}, {}, {}), FakeVault(OURS, VAULTS), "ssh", lambda _, __: "", ["x"])
    assert not report.is_parity
    assert report.summary == "x -> no such role; 0 samples, 1 errors"


def test_no_roles_at_all_are_no_parity() -> None:
    report = check_parity(Policy("", CaKeys(""), {}, {}, {}), FakeVault(OURS, VAULTS), "ssh", lambda _, __: "", [])
    assert not report.is_parity


def test_a_role_of_placeholders_only_says_that_nothing_was_sampled() -> None:
    ours = replace(OURS, principals=("{identity}",), default_principals=())
    (role,) = check(ours).roles
    assert (role.samples, role.left_out) == ((), "all left out: the role has no principal but {identity}")
    assert not role.is_parity  # the placeholder may be anybody


def test_the_report_is_ready_for_json_and_holds_no_key() -> None:
    text = json.dumps(check(WIDE).as_json())
    assert "AAAA" not in text
    assert json.loads(text)["roles"][0]["role"] == "llmops"
    assert set(DEFAULTS) >= {"key_type"}
