"""Vault-compatible responses: envelope, error sentences and statuses. Pure.

The only place that converts a `SignerError` for a Vault client; `runbooks/develop/vault-contract.md` specifies it.
Where Vault has no sentence, signer's own is used.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec

from signer.api.problems import retry_after, status_of
from signer.errors import TOKEN_CODES, SignerError
from signer.protocol.replies import Certificate, CertificateWithWarnings, Reply, RoleDetails, expect

_ALWAYS: Final = (
    ("Cache-Control", "no-store"),
    ("Strict-Transport-Security", "max-age=31536000; includeSubDomains"),
)
HEADERS: Final = (("Content-Type", "application/json"), *_ALWAYS)
_ISSUERS: Final = uuid.UUID("6f1c0ce7-6a0a-4f4e-9d5e-5d2f5f0c4a11")  # name space of issuer ids
# Vault's name for a key type: the algorithm, regardless of curve and hardware.
_GO_KEY_TYPES: Final = {
    "ssh-ed25519": "ed25519",
    "sk-ssh-ed25519@openssh.com": "ed25519",
    "ssh-rsa": "rsa",
    "ecdsa-sha2-nistp256": "ecdsa",
    "ecdsa-sha2-nistp384": "ecdsa",
    "ecdsa-sha2-nistp521": "ecdsa",
    "sk-ecdsa-sha2-nistp256@openssh.com": "ecdsa",
}


_GO_JSON: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def go_json(value: object) -> str:
    """Compact JSON as Go's encoder writes it: UTF-8, but `<`, `>`, `&` and two line separators escaped."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:  # lone surrogates, which become question marks
        text = _GO_JSON.encode(value)
    for char in "<>&\u2028\u2029":
        if char in text:
            text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def envelope(data: Mapping[str, Any] | None, request_id: str, warnings: list[str] | None = None) -> bytes:
    """Vault's success body: these eight keys in this order, and a newline."""
    return (
        f'{{"request_id":"{request_id}","lease_id":"","renewable":false,"lease_duration":0,"data":{go_json(data)},'
        f'"wrap_info":null,"warnings":{go_json(warnings) if warnings else "null"},"auth":null}}\n'
    ).encode("utf-8", "replace")


def signed(reply: Reply, request_id: str) -> bytes:
    """The body of sign/<role>."""
    warnings = None
    if isinstance(reply, CertificateWithWarnings):
        warnings = reply.warnings
        reply = reply.certificate
    issued = expect(Certificate, reply)
    data = {
        "issuer_id": issuer_id(issued.ca_fingerprint),
        "serial_number": f"{int(issued.serial):x}",
        "signed_key": issued.certificate + "\n",
    }
    return envelope(data, request_id, warnings)


@lru_cache(maxsize=8)
def issuer_id(fingerprint: str) -> str:
    """The issuer id of a CA key, derived from its fingerprint."""
    return str(uuid.uuid5(_ISSUERS, fingerprint))


def errors(*sentences: str) -> bytes:
    """Vault's error body; `errors` is always a list, because clients join it."""
    return (go_json({"errors": list(sentences)}) + "\n").encode("utf-8", "replace")


def wrapped(sentence: str) -> str:
    """A single error as Go's multierror prints it."""
    return f"1 error occurred:\n\t* {sentence}\n\n"


def _key_type(facts: Mapping[str, Any]) -> str:
    kind = str(facts.get("key_type"))
    name = _GO_KEY_TYPES.get(kind, kind)
    sentence = f"public_key failed to meet the key requirements: key of type {name} is not allowed"
    others = [other for other in facts.get("allowed", ()) if _GO_KEY_TYPES.get(other) == name]
    if name == "ecdsa" and others:  # Vault's sentence alone would be wrong: one of another size is allowed
        return f"{sentence}: it is {kind} ({facts.get('bits')} bits), the role takes {', '.join(others)}"
    return sentence


_NOT_A_KEY: Final = "failed to parse public_key as SSH key: "
# Fault in publickey.py → sentence of Go's x/crypto/ssh. Go accepts keys with any other fault.
_KEY_FAULTS: Final = {
    "empty": "ssh: parse error in message type 0",
    "trailing": "ssh: trailing junk in public key",
    "ed25519_size": "invalid size {} for Ed25519 public key",
    "exponent": "ssh: incorrect exponent",
    "exponent_large": "ssh: exponent too large",
    "point": "ssh: invalid curve point",
    "curve": 'ssh: algorithm type mismatch: expected "{0[kind]}", found curve "{0[curve]}"'
    ' (type "ecdsa-sha2-{0[curve]}")',
}


def _malformed_key(facts: Mapping[str, Any], text: str) -> str:
    known = _KEY_FAULTS.get(str(facts.get("fault")))
    return _NOT_A_KEY + (text if known is None else known.format(facts.get("detail")))


_VAULT_SAYS_400: Final = (
    "caller_address_unknown", "cert_type_not_allowed", "cert_type_unknown", "critical_option_malformed",
    "critical_option_not_allowed", "extension_against_force_command", "extension_has_value", "extension_not_allowed",
    "key_id_malformed", "key_id_not_allowed", "key_type_not_allowed", "no_principals", "principal_not_allowed",
    "reason_malformed", "reason_missing", "rsa_key_too_short", "too_many_principals", "ttl_above_max", "ttl_too_short",
    "unknown_role",
)  # fmt: skip
# Where Vault's status differs from that of the native API.
STATUSES: Final = {**dict.fromkeys(TOKEN_CODES, 403), **dict.fromkeys(_VAULT_SAYS_400, 400)}
_Sentence = Callable[[Mapping[str, Any]], str]
# Vault's sentences by code. Other codes keep the error's own sentence and hint.
_SENTENCES: Final[dict[str, _Sentence]] = {
    **dict.fromkeys(TOKEN_CODES, lambda _: "permission denied"),
    **dict.fromkeys(("not_permitted", "role_not_granted"), lambda _: wrapped("permission denied")),
    # To Vault a ttl of 0 is the mount's 768 hours, which is above every role's maximum.
    **dict.fromkeys(
        ("ttl_above_max", "ttl_too_short"),
        lambda facts: f"ttl is larger than maximum allowed {facts.get('max_ttl')}",
    ),
    "unknown_role": lambda facts: f"Unknown role: {facts.get('role')}",
    "public_key_missing": lambda _: "missing public_key",
    "public_key_not_base64": lambda facts: f"{_NOT_A_KEY}illegal base64 data at input byte {facts.get('at')}",
    "public_key_truncated": lambda _: _NOT_A_KEY + "ssh: short read",
    "public_key_kind_unknown": lambda facts: f"{_NOT_A_KEY}ssh: unknown key algorithm: {facts.get('kind')}",
    "key_type_not_allowed": _key_type,
    "rsa_key_too_short": lambda facts: (
        f"public_key failed to meet the key requirements: key is of an invalid size: {facts.get('bits')}"
    ),
    "key_id_not_allowed": lambda _: "setting key_id is not allowed by role",
    "cert_type_not_allowed": lambda _: "cert_type 'host' is not allowed by role",
    "cert_type_unknown": lambda _: "cert_type must be either 'user' or 'host'",
    "principal_not_allowed": lambda facts: f"{facts.get('principal')} is not a valid value for valid_principals",
    "no_principals": lambda _: (
        "refusing to issue unsafe, globally-valid certificate with no principals specified;"
        " set valid_principals or default_user"
    ),
    "critical_option_not_allowed": lambda facts: (
        f"critical options not on allowed list: [{' '.join(facts.get('options', ()))}]"
    ),
    "extension_not_allowed": lambda facts: (
        f"extensions [{' '.join(facts.get('extensions', ()))}] are not on allowed list"
    ),
}


class HttpResponse(NamedTuple):
    """One HTTP response."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


# Sentences for operations that signer does not offer on purpose, with the next action.
REFUSALS: Final = {
    "roles": "roles are not written over HTTP; change them in policy.toml and reload the service",
    "ca": "the CA key is not changed over HTTP; it is a file, pinned by ca.fingerprint in policy.toml",
    "mounts": "mounts are not changed over HTTP; they are the setting SIGNER_MOUNTS, their roles are in policy.toml",
    "issue": "issue is not offered, because a server must not make private keys;"
    " make one with ssh-keygen and send its public half to sign",
    "wrapping": "response wrapping is not offered; leave X-Vault-Wrap-TTL out",
}


def success(data: Mapping[str, Any], request_id: str, unknown: Sequence[str] = ()) -> HttpResponse:
    """200 with the envelope; `unknown` are the ignored parameters."""
    warnings = [f"Endpoint ignored these unrecognized parameters: [{' '.join(sorted(unknown))}]"] if unknown else None
    return HttpResponse(200, HEADERS, envelope(data, request_id, warnings))


def failure(status: int, *sentences: str) -> HttpResponse:
    """An error response with these sentences."""
    return HttpResponse(status, HEADERS, errors(*sentences))


def unsupported_path() -> HttpResponse:
    return failure(404, wrapped("unsupported path"))


def unsupported_operation() -> HttpResponse:
    return failure(405, wrapped("unsupported operation"))


def text(body: str) -> HttpResponse:
    """200 as plain text, for hosts that fetch the CA's public key."""
    return HttpResponse(200, (("Content-Type", "text/plain"), *_ALWAYS), body.encode())


def redirect(location: str) -> HttpResponse:
    """307 to the normalised path; it keeps the method."""
    return HttpResponse(307, [*HEADERS, ("Location", location)], b"")


def help_text(path: str) -> HttpResponse:
    """The response to `?help=1`, which `bao path-help` shows."""
    sentence = (
        f"{path}: this is signer, not Vault; roles and the CA are set in policy.toml,"
        " see runbooks/reference/vault-compatibility.md"
    )
    return HttpResponse(200, HEADERS, (go_json({"help": sentence, "see_also": None, "openapi": None}) + "\n").encode())


def render_error(error: SignerError) -> HttpResponse:
    status = STATUSES.get(error.code) or status_of(error).value
    sentence = _SENTENCES.get(error.code)
    if sentence is not None:
        return failure(status, sentence(error.facts))
    if error.code == "public_key_malformed":
        return failure(status, _malformed_key(error.facts, error.text))
    if "vault" in error.facts:
        return failure(status, str(error.facts["vault"]))
    response = failure(status, f"{error.text}; {error.hint}" if error.hint else error.text)
    if seconds := retry_after(error):
        return response._replace(headers=[*HEADERS, ("Retry-After", seconds)])
    return response


# --- roles -----------------------------------------------------------------------------------------------------------


def role_fields(role: RoleDetails, ca_line: str) -> dict[str, Any]:
    """The 27 fields of a Vault role, from the keeper's reply and the CA's public key line (contract, section 4)."""
    options: dict[str, str] = {}
    if role.force_command is not None:
        options["force-command"] = role.force_command
    if (source := role.source_address) is not None:
        options["source-address"] = source if isinstance(source, str) else ",".join(source)
    if role.verify_required:
        options["verify-required"] = ""
    extensions = [*role.extensions.default, *(["no-touch-required"] if role.no_touch_required else [])]
    return {
        "algorithm_signer": "rsa-sha2-512" if ca_line.startswith("ssh-rsa ") else "default",
        "allow_bare_domains": False,
        "allow_commas_in_identity_templates": False,
        "allow_empty_principals": False,
        "allow_host_certificates": False,
        "allow_subdomains": False,
        "allow_user_certificates": True,
        "allow_user_key_ids": role.allow_key_id,
        "allow_wildcards_in_identity_templates": False,
        "allowed_critical_options": ",".join(role.critical_options),
        "allowed_domains": "",
        "allowed_domains_template": False,
        "allowed_extensions": ",".join(role.extensions.allowed),
        "allowed_user_key_lengths": dict(
            sorted(("rsa", [role.rsa_min_bits]) if kind == "ssh-rsa" else (kind, [0]) for kind in role.key_types)
        ),
        "allowed_users": ",".join(role.principals),
        "allowed_users_template": False,
        "default_critical_options": dict(sorted(options.items())),
        "default_extensions": {name: role.extensions.values.get(name, "") for name in sorted(extensions)},
        "default_extensions_template": False,
        "default_user": ",".join(role.default_principals),
        "default_user_template": False,
        "issuer_ref": "default",
        "key_id_format": "{{token_display_name}}:{{role_name}}",
        "key_type": "ca",
        "max_ttl": role.max_ttl,
        "not_before_duration": role.backdate,
        "ttl": role.default_ttl,
    }
