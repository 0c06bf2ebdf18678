"""Where we answer otherwise than Vault and OpenBao, on purpose: the one list of it.

The table "Differences from Vault" in runbooks/reference/vault-compatibility.md is this one; each row has a test named
after it in tests/system/vault/test_parity_differences.py. Sentences are Markdown, as they stand there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One row; `tests` are the names of its tests after `test_difference_`."""

    tests: tuple[str, ...]
    input: str
    vault: str
    ours: str

    def row(self) -> str:
        """As a line of that table."""
        return f"| {self.input} | {self.vault} | {self.ours} |"


def _row(tests: str, what: str, vault: str, ours: str) -> Difference:
    return Difference(tuple(tests.split()), what, vault, ours)


DIFFERENCES = (
    _row(
        "empty_text_is_unset",
        '`ttl`, `valid_principals` or `key_id` sent as `""` (hvac always does)',
        "taken as set: the role's ttl and default user are skipped",
        "unset",
    ),
    _row(
        "critical_options_need_an_allow_list",
        "no allow-list of critical options",
        "anything may be asked for",
        "nothing may",
    ),
    _row(
        "defaults_stay_when_options_are_asked_for",
        "any option requested",
        "all the role's default options are dropped",
        "pinned options stay, defaults merge",
    ),
    _row(
        "option_values_are_parsed extensions_are_flags",
        "option values",
        "unchecked, can yield a corrupt certificate",
        "parsed: CIDR lists, flags must be empty",
    ),
    _row("no_certificate_without_principals", "no principals", "issued when the role allows `*`", "never issued"),
    _row(
        "dangerous_principals_are_refused",
        "principal with comma, whitespace, control character, `*`, over 256 of them, or template text",
        "issued",
        "refused",
    ),
    _row("key_ids_are_plain_and_short", "key_id with control characters or over 256 bytes", "issued", "refused"),
    _row(
        "weak_and_odd_keys_are_refused key_types_are_exact",
        "RSA under 2048 (3072 by default), DSA, a certificate as key, label and blob of different types",
        "signed or 500",
        "refused, 400",
    ),
    _row("serials_count_up", "serial", "random, stored nowhere", "monotonic from 1, recorded"),
    _row("no_private_keys_are_made", "`issue/<role>`", "server makes the private key", "405, says why"),
    _row(
        "key_ids_name_identity_and_role",
        "no key_id",
        "`vault-<display name>-<hash of the key>`, or the role's format",
        "`<identity>:<role>`",
    ),
    _row(
        "key_ids_have_no_blanks",
        "key_id with anything but letters, digits and `._@=:+/-`",
        "issued",
        "refused; sshd hands it to commands as it is",
    ),
    _row(
        "key_types_are_exact",
        "allowed kinds of keys, in a role read back",
        "exact sizes; `sk-…` keys count as their plain kind",
        "a minimum for RSA; `sk-…` keys are kinds of their own",
    ),
    _row(
        "sizes_of_ecdsa_keys_are_named",
        "an ECDSA key of a size that the role does not take",
        "`key of type ecdsa is not allowed`",
        "the same, followed by the sizes",
    ),
    _row(
        "keys_that_openssh_could_not_use",
        "RSA with an even modulus, a FIDO key without an application",
        "signed",
        "refused, 400",
    ),
    _row(
        "host_certificates_are_not_issued",
        "`cert_type` `host`",
        "issued when the role allows it",
        "refused with Vault's sentence",
    ),
    _row(
        "a_forced_command_closes_forwarding",
        "`force-command` beside extensions that lead past it",
        "both in the certificate",
        "those extensions are left out, and refused when asked for",
    ),
    _row(
        "a_reason_is_recorded",
        "`reason` in a sign request",
        "ignored with a warning",
        "recorded; a role may demand it",
    ),
    _row(
        "rsa_cas_sign_with_sha512",
        "RSA CA",
        "signs with rsa-sha2-256 by default",
        "signs with rsa-sha2-512",
    ),
    _row(
        "the_ca_line_has_no_comment issuer_ids_follow_the_key",
        "the CA's public line and issuer id",
        "the comment that was imported; a random id",
        "no comment; an id that follows from the key",
    ),
    _row(
        "wrapping_is_refused",
        "`X-Vault-Wrap-TTL`",
        "answers with a wrapping token",
        "400, says so",
    ),
    _row(
        "administration_is_refused",
        "writing or deleting roles, CA, issuers, mounts",
        "done",
        "405, names policy.toml",
    ),
    _row(
        "lists_show_the_callers_roles",
        "`LIST roles`",
        "every role",
        "those the caller may ask for",
    ),
    _row(
        "one_time_passwords_are_not_there",
        "`creds`, `lookup`, `verify`, `config/zeroaddress`, `tidy`; other paths below `sys/` and `auth/`",
        "served",
        "404 `unsupported path`",
    ),
    _row("help_is_one_sentence", "`?help=1`", "the engine's help", "one sentence"),
    _row(
        "the_seal_says_whether_the_keeper_signs",
        "`sys/health`, `sys/seal-status`",
        "OpenBao's version and shares",
        "ours; sealed means that the keeper cannot sign now, 503",
    ),
    _row(
        "head_is_405_for_everybody",
        "`HEAD` with an ordinary token",
        "403 for all but root",
        "405",
    ),
    _row(
        "large_bodies_are_refused",
        "body over 64 KiB, public_key over 16 KiB",
        "read, up to 32 MiB",
        "413, 400",
    ),
    _row(
        "deep_json_is_refused",
        "JSON nested over 32 levels in a map or 900 elsewhere, more than 8 values in a body",
        "read",
        "400",
    ),
    _row(
        "faults_of_json_and_durations_have_one_sentence",
        "malformed JSON, a duration that cannot be read",
        "400 with the sentence of Go's decoder, which quotes the fault",
        "400 with one sentence for each kind of fault",
    ),
    _row(
        "the_body_of_a_stranger_is_not_decoded",
        "a malformed body without a good token",
        "400",
        "403; nothing is decoded before the token is known",
    ),
)
