"""A certificate of ours beside Vault's: what gives more is an error, what gives less a note, the rest is silent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from signer.ssh.certificate import USER_CERTIFICATE, CertificateFields
from signer.vault.parity import Difference, compare_certificates, errors_in

NOW = 1_800_000_000
VAULTS = CertificateFields(
    key_kind="ssh-ed25519",
    key=b"key",
    nonce=b"n" * 32,
    serial=2**63,
    cert_type=USER_CERTIFICATE,
    key_id="vault-token-0123",
    principals=("llmops",),
    valid_after=NOW - 30,
    valid_before=NOW + 900,
    critical_options=(("source-address", "10.0.0.0/8,fd00::/8"),),
    extensions=(("permit-pty", ""), ("permit-user-rc", "")),
    ca_key=b"ca",
)


def differ(**ours: Any) -> list[Difference]:
    """What is told of a certificate that is Vault's but for these fields."""
    return compare_certificates(replace(VAULTS, **ours), VAULTS)


def test_what_must_differ_is_no_difference() -> None:
    assert differ(nonce=b"m" * 32, serial=1, ca_key=b"another") == []


def test_a_key_id_is_told_and_decides_nothing() -> None:
    (found,) = differ(key_id="deploy-agent:llmops")
    assert (found.field, found.severity) == ("key_id", "note")
    assert found.why


WIDER: list[tuple[str, dict[str, Any], str]] = [
    ("key of another type", {"key_kind": "ssh-rsa"}, "key_kind"),
    ("another key", {"key": b"other"}, "public_key"),
    ("a host certificate", {"cert_type": 2}, "cert_type"),
    ("one more principal", {"principals": ("llmops", "root")}, "principals"),
    ("another principal", {"principals": ("root",)}, "principals"),
    ("a longer life", {"valid_before": NOW + 931}, "lifetime"),
    ("a life that is moved on", {"valid_after": NOW + 31, "valid_before": NOW + 961}, "valid_before"),
    ("a life that begins long before", {"valid_after": NOW - 91, "valid_before": NOW + 839}, "valid_after"),
    ("no source address", {"critical_options": ()}, "critical_options.source-address"),
    (
        "more source addresses",
        {"critical_options": (("source-address", "10.0.0.0/8,192.0.2.1/32"),)},
        "critical_options.source-address",
    ),
    (
        "a source address that cannot be read",
        {"critical_options": (("source-address", "10.0.0.0/8,?"),)},
        "critical_options.source-address",
    ),
    (
        "one more extension",
        {"extensions": (("permit-port-forwarding", ""), ("permit-pty", ""), ("permit-user-rc", ""))},
        "extensions",
    ),
    ("an extension with another value", {"extensions": (("permit-pty", "x"), ("permit-user-rc", ""))}, "extensions"),
]


@pytest.mark.parametrize("ours, field", [case[1:] for case in WIDER], ids=[case[0] for case in WIDER])
def test_what_gives_more_is_an_error(ours: dict[str, Any], field: str) -> None:
    assert field in [found.field for found in errors_in(differ(**ours))]


def test_a_principal_that_is_missing_is_an_error_because_a_login_would_be_lost() -> None:
    vaults = replace(VAULTS, principals=("deploy", "llmops"))
    (found,) = compare_certificates(VAULTS, vaults)
    assert (found.field, found.severity, found.ours, found.vaults) == (
        "principals",
        "error",
        "llmops",
        "deploy, llmops",
    )


STRICTER: list[tuple[str, dict[str, Any], str]] = [
    ("a shorter life", {"valid_before": NOW + 600}, "lifetime"),
    ("back-dated where Vault is not", {"valid_after": NOW - 60}, "lifetime"),
    ("fewer extensions", {"extensions": (("permit-pty", ""),)}, "extensions"),
    (
        "one more critical option",
        {"critical_options": (("force-command", "date"), *VAULTS.critical_options)},
        "critical_options.force-command",
    ),
    (
        "a source address inside Vault's",
        {"critical_options": (("source-address", "10.1.2.3/32"),)},
        "critical_options.source-address",
    ),
]


@pytest.mark.parametrize("ours, field", [case[1:] for case in STRICTER], ids=[case[0] for case in STRICTER])
def test_what_gives_less_is_a_note(ours: dict[str, Any], field: str) -> None:
    assert [(found.field, found.severity) for found in differ(**ours)] == [(field, "note")]


@given(st.integers(-60, 60), st.integers(0, 2**40))
def test_clocks_may_be_a_minute_apart(apart: int, life: int) -> None:
    vaults = replace(VAULTS, valid_before=VAULTS.valid_after + life)
    ours = replace(vaults, valid_after=vaults.valid_after + apart, valid_before=vaults.valid_before + apart)
    assert compare_certificates(ours, vaults) == []


@given(st.sets(st.sampled_from(["a", "b", "c"])), st.sets(st.sampled_from(["a", "b", "c"])))
def test_principals_are_the_same_or_an_error(ours: set[str], vaults: set[str]) -> None:
    found = compare_certificates(
        replace(VAULTS, principals=tuple(sorted(ours))), replace(VAULTS, principals=tuple(sorted(vaults)))
    )
    assert [difference.severity for difference in found] == ([] if ours == vaults else ["error"])
