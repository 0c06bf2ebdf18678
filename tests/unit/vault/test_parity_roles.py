"""A role of ours beside Vault's: wider is an error, other default principals are an error, the rest is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.errors import Unavailable
from signer.model import Approval, Limits
from signer.vault.parity import Difference, compare_roles, errors_in
from signer.vault.role import DEFAULTS, MountTtls, read_vault_role
from tests.parts.roles import OURS, VAULTS

# Vault's fields that do not affect user certificates, or only how Vault creates them.
WITHOUT_EFFECT = (
    "allow_bare_domains",
    "allow_subdomains",
    "allowed_domains",
    "allowed_domains_template",
    "allow_commas_in_identity_templates",
    "allow_wildcards_in_identity_templates",
)


def told(found: list[Difference], severity: str) -> list[str]:
    return [difference.field for difference in found if difference.severity == severity]


def test_llmops_stays_llmops() -> None:
    found = compare_roles(VAULTS, OURS)
    assert errors_in(found) == []
    assert told(found, "note") == ["allowed_user_key_lengths.rsa", "allowed_critical_options"]


WIDER: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("a principal added", {"principals": ("llmops", "root")}, {}, "allowed_users"),
    ("a placeholder added", {"principals": ("llmops", "{identity}")}, {}, "allowed_users"),
    ("a principal taken out of Vault's", {"principals": ("llmops", "deploy")}, {}, "allowed_users"),
    ("a default added", {"default_principals": ("llmops", "root")}, {}, "default_user"),
    ("the default left out", {"default_principals": ()}, {}, "default_user"),
    ("a default where Vault has none", {}, {"default_user": ""}, "default_user"),
    ("a default that Vault itself refuses", {}, {"default_user": "llmops,root"}, "default_user"),
    ("a longer default", {"default_ttl": 901}, {}, "ttl"),
    ("a longer life", {"max_ttl": 1801}, {}, "max_ttl"),
    ("one more type of key", {"key_types": OURS.key_types | {"ecdsa-sha2-nistp256"}}, {}, "allowed_user_key_lengths"),
    ("shorter RSA keys", {"rsa_min_bits": 2048}, {}, "allowed_user_key_lengths.rsa"),
    (
        "RSA where Vault's list of sizes is empty",
        {},
        {"allowed_user_key_lengths": {"ed25519": [0], "rsa": []}},
        "allowed_user_key_lengths",
    ),
    (
        "one more extension",
        {"allowed_extensions": frozenset({"permit-pty", "permit-user-rc"})},
        {},
        "allowed_extensions",
    ),
    ("an extension that Vault has with a blank", {}, {"allowed_extensions": "x, permit-pty", "default_extensions": {}},
     "allowed_extensions"),
    ("one more default extension", {}, {"default_extensions": {}}, "default_extensions"),
    ("no touch", {"no_touch_required": True}, {}, "default_extensions"),
    ("no forced command", {}, {"default_critical_options": {"force-command": "date"}},
     "default_critical_options.force-command"),
    ("another forced command", {"force_command": "sh"}, {"default_critical_options": {"force-command": "date"}},
     "default_critical_options.force-command"),
    ("the caller's address for a list", {"source_address": "caller"},
     {"default_critical_options": {"source-address": "10.0.0.0/8"}}, "default_critical_options.source-address"),
    ("an option that callers set", {"allowed_critical_options": frozenset({"source-address"})}, {},
     "allowed_critical_options"),
    ("a star, which allows no option there", {"allowed_critical_options": frozenset({"source-address"})},
     {"allowed_critical_options": "*"}, "allowed_critical_options"),
    ("key ids of the caller's", {"allow_key_id": True}, {}, "allow_user_key_ids"),
    ("no user certificates in Vault", {}, {"allow_user_certificates": False}, "allow_user_certificates"),
    ("another kind of role in Vault", {}, {"key_type": "otp"}, "allow_user_certificates"),
]  # fmt: skip


@pytest.mark.parametrize("ours, vaults, field", [case[1:] for case in WIDER], ids=[case[0] for case in WIDER])
def test_what_is_wider_than_vaults_is_an_error(ours: dict[str, Any], vaults: dict[str, Any], field: str) -> None:
    found = compare_roles({**VAULTS, **vaults}, replace(OURS, **ours))
    assert field in told(found, "error")


STRICTER: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("anybody in Vault", {}, {"allowed_users": "*"}, "allowed_users"),
    ("more in Vault", {}, {"allowed_users": "llmops,root"}, "allowed_users"),
    ("templates", {}, {"allowed_users_template": True}, "allowed_users_template"),
    ("templates of defaults", {}, {"default_user_template": True}, "default_user_template"),
    ("no ttl in Vault", {}, {"ttl": 0, "max_ttl": 0}, "max_ttl"),
    ("shorter", {"max_ttl": 1000}, {}, "max_ttl"),
    ("no back-dating in Vault", {}, {"not_before_duration": 0}, "not_before_duration"),
    ("any key in Vault", {}, {"allowed_user_key_lengths": {}}, "allowed_user_key_lengths"),
    ("any extension in Vault", {}, {"allowed_extensions": "*"}, "allowed_extensions"),
    ("a default that Vault lets nobody ask for", {}, {"allowed_extensions": ""}, "allowed_extensions"),
    ("templates of extensions", {}, {"default_extensions_template": True}, "default_extensions_template"),
    ("any option in Vault", {}, {"allowed_critical_options": ""}, "allowed_critical_options"),
    ("a command of ours", {"force_command": "date"}, {}, "default_critical_options.force-command"),
    ("the caller's address", {"source_address": "caller"}, {}, "default_critical_options.source-address"),
    ("FIDO with a PIN", {"verify_required": True}, {}, "default_critical_options.verify-required"),
    ("key ids in Vault", {}, {"allow_user_key_ids": True}, "allow_user_key_ids"),
    ("a form of key ids in Vault", {}, {"key_id_format": "{{role_name}}"}, "key_id_format"),
    ("host certificates in Vault", {}, {"allow_host_certificates": True}, "allow_host_certificates"),
    ("no principals in Vault", {}, {"allow_empty_principals": True}, "allow_empty_principals"),
    ("an algorithm", {}, {"algorithm_signer": "rsa-sha2-256"}, "algorithm_signer"),
    ("an issuer", {}, {"issuer_ref": "old"}, "issuer_ref"),
    ("a reason", {"reason_required": True}, {}, "reason_required"),
    ("approval", {"approval": Approval(frozenset({"agent"}), ("ops",), 60)}, {}, "approval"),
    ("limits", {"limits": Limits(30, 20)}, {}, "limits"),
]


@pytest.mark.parametrize("ours, vaults, field", [case[1:] for case in STRICTER], ids=[case[0] for case in STRICTER])
def test_what_is_stricter_or_only_other_is_a_note(ours: dict[str, Any], vaults: dict[str, Any], field: str) -> None:
    found = compare_roles({**VAULTS, **vaults}, replace(OURS, **ours))
    assert (field in told(found, "note"), errors_in(found)) == (True, [])


def test_every_field_of_vaults_is_looked_at_or_without_effect_on_user_certificates() -> None:
    tried = {field for _, _, vaults, _ in WIDER + STRICTER for field in vaults}
    assert tried | set(WITHOUT_EFFECT) == set(DEFAULTS)


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_fields_without_effect_change_nothing(field: str) -> None:
    other = "*" if DEFAULTS[field] == "" else True
    assert compare_roles({**VAULTS, field: other}, OURS) == compare_roles(VAULTS, OURS)


def test_a_mount_that_is_tuned_bounds_a_role_without_a_life_of_its_own() -> None:
    unbounded = {**VAULTS, "ttl": 0, "max_ttl": 0}
    assert told(compare_roles(unbounded, OURS, MountTtls(900, 1800)), "error") == []
    assert told(compare_roles(unbounded, OURS, MountTtls(600, 600)), "error") == ["ttl", "max_ttl"]


def test_a_role_as_an_older_server_or_hvac_leaves_it_is_read_with_vaults_defaults() -> None:
    older = {
        name: value
        for name, value in VAULTS.items()
        if name not in ("issuer_ref", "allow_wildcards_in_identity_templates", "not_before_duration")
    }
    odd = {**older, "allowed_users_template": "", "default_extensions_template": None, "port": 22,
           "allowed_user_key_lengths": {"ed25519": 0, "rsa": 3072}}  # fmt: skip
    assert compare_roles(odd, OURS) == compare_roles(VAULTS, OURS)
    assert read_vault_role(odd).strange == ("port",)


@pytest.mark.parametrize("field", sorted(DEFAULTS))
@pytest.mark.parametrize("value", [["x"], 1.5])
def test_a_field_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(Unavailable) as caught:
        compare_roles({**VAULTS, field: value}, OURS)
    assert caught.value.code == "vault_answer_malformed"
    assert field in caught.value.text


_NAMES = st.lists(st.sampled_from(["llmops", "deploy", "root", "a.b"]), min_size=1, unique=True)


@given(_NAMES, _NAMES)
def test_principals_never_widen(ours: list[str], vaults: list[str]) -> None:
    role = replace(OURS, principals=tuple(ours), default_principals=())
    found = compare_roles({**VAULTS, "allowed_users": ", ".join(vaults), "default_user": ""}, role)
    assert bool(errors_in(found)) is not (set(ours) <= set(vaults))
