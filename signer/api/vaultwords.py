"""Vault's words: its envelope, its error sentences, its statuses. Pure; `../shared/contract/vault-ssh.md` is the law.

The one place that turns our errors into what a Vault client expects. Sentences of ours stand where Vault has none.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

from signer.api.problems import RETRY_AFTER, status_of
from signer.errors import SignerError

HEADERS: Final = (
    ("Cache-Control", "no-store"),
    ("Content-Type", "application/json"),
    ("Strict-Transport-Security", "max-age=31536000; includeSubDomains"),
)
_ISSUERS: Final = uuid.UUID("6f1c0ce7-6a0a-4f4e-9d5e-5d2f5f0c4a11")  # our name space for issuer ids
# Go names key types as x/crypto/ssh and the role's allowed_user_key_lengths do.
_GO_KEY_TYPES: Final = {
    "ssh-ed25519": "ed25519",
    "sk-ssh-ed25519@openssh.com": "ed25519",
    "ssh-rsa": "rsa",
}


def go_json(value: object) -> str:
    """Compact JSON as Go's encoder writes it: UTF-8, but `<`, `>`, `&` and two line separators escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        if char in text:
            text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def envelope(data: Mapping[str, Any] | None, request_id: str, warnings: list[str] | None = None) -> bytes:
    """Vault's success body: these eight keys in this order, and a newline."""
    return (
        f'{{"request_id":"{request_id}","lease_id":"","renewable":false,"lease_duration":0,"data":{go_json(data)},'
        f'"wrap_info":null,"warnings":{go_json(warnings or None)},"auth":null}}\n'
    ).encode("utf-8", "replace")


def signed(reply: Mapping[str, Any], request_id: str) -> bytes:
    """The answer of sign/<role>."""
    data = {
        "issuer_id": issuer_id(reply["ca_fingerprint"]),
        "serial_number": f"{int(reply['serial']):x}",
        "signed_key": reply["certificate"] + "\n",
    }
    return envelope(data, request_id, reply.get("warnings"))


@lru_cache(maxsize=8)
def issuer_id(fingerprint: str) -> str:
    """A CA key's issuer id: the same for the same key, everywhere."""
    return str(uuid.uuid5(_ISSUERS, fingerprint))


def errors(*sentences: str) -> bytes:
    """Vault's error body; always a list, because clients join it."""
    return (go_json({"errors": list(sentences)}) + "\n").encode("utf-8", "replace")


def wrapped(sentence: str) -> str:
    """How Go's multierror prints a single error."""
    return f"1 error occurred:\n\t* {sentence}\n\n"


def _key_type(facts: Mapping[str, Any]) -> str:
    kind = str(facts.get("key_type"))
    return f"public_key failed to meet the key requirements: key of type {_GO_KEY_TYPES.get(kind, kind)} is not allowed"


# code → (status, Vault's sentence). What is not here keeps our own sentence and hint.
_SENTENCES: Final[dict[str, tuple[int, Callable[[Mapping[str, Any]], str]]]] = {
    "token_missing": (403, lambda _: "permission denied"),
    "token_mistyped": (403, lambda _: "permission denied"),
    "token_unknown": (403, lambda _: "permission denied"),
    "token_expired": (403, lambda _: "permission denied"),
    "role_not_granted": (403, lambda _: wrapped("permission denied")),
    "unknown_role": (400, lambda facts: f"Unknown role: {facts.get('role')}"),
    "public_key_missing": (400, lambda _: "missing public_key"),
    "public_key_not_base64": (
        400,
        lambda facts: f"failed to parse public_key as SSH key: illegal base64 data at input byte {facts.get('at')}",
    ),
    "public_key_truncated": (400, lambda _: "failed to parse public_key as SSH key: ssh: short read"),
    "key_type_not_allowed": (400, _key_type),
    "rsa_key_too_short": (
        400,
        lambda facts: (
            "public_key failed to meet the key requirements: key is of an invalid size: " + str(facts.get("bits"))
        ),
    ),
    "key_id_not_allowed": (400, lambda _: "setting key_id is not allowed by role"),
    "cert_type_not_allowed": (400, lambda _: "cert_type 'host' is not allowed by role"),
    "cert_type_unknown": (400, lambda _: "cert_type must be either 'user' or 'host'"),
    "principal_not_allowed": (400, lambda facts: f"{facts.get('principal')} is not a valid value for valid_principals"),
    "no_principals": (
        400,
        lambda _: (
            "refusing to issue unsafe, globally-valid certificate with no principals specified;"
            " set valid_principals or default_user"
        ),
    ),
    "ttl_above_max": (400, lambda facts: f"ttl is larger than maximum allowed {facts.get('max_ttl')}"),
    # To Vault a ttl of 0 is the mount's 768 hours, which is above every role's maximum.
    "ttl_too_short": (400, lambda facts: f"ttl is larger than maximum allowed {facts.get('max_ttl')}"),
    "critical_option_not_allowed": (
        400,
        lambda facts: f"critical options not on allowed list: [{' '.join(facts.get('options', ()))}]",
    ),
    "extension_not_allowed": (
        400,
        lambda facts: f"extensions [{' '.join(facts.get('extensions', ()))}] are not on allowed list",
    ),
    "not_permitted": (403, lambda _: wrapped("permission denied")),
}
_OURS_ARE_400: Final = frozenset(
    {
        "key_id_malformed",
        "too_many_principals",
        "critical_option_malformed",
        "extension_has_value",
        "extension_against_force_command",
        "reason_missing",
        "reason_malformed",
        "caller_address_unknown",
    }
)


def render_error(error: SignerError) -> tuple[int, list[tuple[str, str]], bytes]:
    """Status, headers and body for a Vault client."""
    headers = list(HEADERS)
    known = _SENTENCES.get(error.code)
    if known is not None:
        status, sentence = known
        return status, headers, errors(sentence(error.facts))
    if "vault" in error.facts:
        return status_of(error).value, headers, errors(str(error.facts["vault"]))
    status = HTTPStatus.BAD_REQUEST.value if error.code in _OURS_ARE_400 else status_of(error).value
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append(("Retry-After", RETRY_AFTER))
    return status, headers, errors(f"{error.text}; {error.hint}" if error.hint else error.text)
