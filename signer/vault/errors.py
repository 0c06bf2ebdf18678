"""Translates errors of Vault, and of the connection to it, to error codes; reads the token file.

Every call of Vault (`signing.py`, `admin.py`) runs in `translated_errors`. No text from Vault is passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import requests
from hvac import exceptions as said

from signer.errors import SignerError, Unavailable
from signer.files import read_secret_word

_SEALED: Final = "sealed"
_NO_CA: Final = ("no default issuer", "keys haven't been configured")


@dataclass(frozen=True, slots=True)
class VaultContext:
    """Names of the Vault settings, as hints show them, and the right that the token needs."""

    address: str = "SIGNER_VAULT_ADDR"
    token_file: str = "SIGNER_VAULT_TOKEN_FILE"  # noqa: S105 - the name of a setting
    ca_file: str = "SIGNER_VAULT_CA_FILE"
    mount: str = "SIGNER_VAULT_MOUNT"
    act: str = "sign"
    right: str = "update on the sign path"
    reader: str = "the keeper's user"


BY_SETTINGS: Final = VaultContext()


@contextmanager
def translated_errors(context: VaultContext = BY_SETTINGS) -> Iterator[None]:
    """Raises each error of Vault or of the connection as a `SignerError`."""
    try:
        yield
    except requests.exceptions.Timeout:
        raise Unavailable("vault_slow", "Vault did not answer in time", "look at Vault, then try again") from None
    except (requests.exceptions.ContentDecodingError, requests.exceptions.InvalidJSONError):
        raise malformed(context) from None
    except requests.exceptions.SSLError:
        raise Unavailable(
            "vault_not_trusted",
            "Vault's TLS certificate is not trusted",
            f"check {context.ca_file}, and the name in {context.address}",
        ) from None
    except requests.exceptions.RequestException:
        raise Unavailable("vault_down", "Vault cannot be reached", f"start Vault, or check {context.address}") from None
    except (said.VaultDown, said.VaultNotInitialized) as error:
        if not says(error, _SEALED):  # a proxy that cannot reach Vault also answers 503
            raise _failed() from None
        raise sealed() from None
    except (said.Forbidden, said.Unauthorized):
        raise Unavailable(
            "vault_forbidden",
            f"Vault does not allow the token to {context.act}",
            f"put a token with {context.right} into {context.token_file}",
        ) from None
    except said.InvalidPath:
        raise Unavailable("vault_mount_missing", "Vault has no such mount", f"check {context.mount}") from None
    except said.InvalidRequest as error:
        raise _refusal(error, context) from None
    except said.RateLimitExceeded:
        raise Unavailable("vault_rate_limited", "Vault reports that its rate limit is exceeded", "try again") from None
    except said.VaultError:
        raise _failed() from None
    except (ValueError, TypeError, AttributeError, RecursionError):  # hvac fails on JSON of another form
        raise malformed(context) from None


def _refusal(error: said.InvalidRequest, context: VaultContext) -> SignerError:
    if says(error, "unknown role"):
        return role_missing()
    if any(says(error, words) for words in _NO_CA):
        return ca_unknown()
    if context is not BY_SETTINGS:
        return SignerError("vault_refused", f"Vault refuses to {context.act}", "see Vault's audit log for its reason")
    return SignerError(
        "vault_refused", "Vault refuses what policy.toml grants", "bring Vault's role and policy.toml together"
    )


def says(error: said.VaultError, words: str) -> bool:
    """True if one of Vault's error lines contains `words`; the lines are only compared."""
    return isinstance(error.errors, list) and any(words in str(line).lower() for line in error.errors)


def sealed() -> Unavailable:
    return Unavailable("vault_sealed", "Vault is sealed", "unseal Vault")


def role_missing() -> Unavailable:
    return Unavailable(
        "vault_role_missing", "Vault has no role of that name", "create it, or remove it from policy.toml"
    )


def ca_unknown() -> Unavailable:
    return Unavailable("vault_ca_unknown", "Vault returned no CA key", "configure a CA key on the mount")


def malformed(context: VaultContext = BY_SETTINGS) -> Unavailable:
    return Unavailable(
        "vault_answer_malformed",
        "Vault's answer is not a sign response" if context is BY_SETTINGS else "Vault's answer is not understood",
        f"check {context.address}",
    )


def _failed() -> Unavailable:
    return Unavailable("vault_failed", "Vault returned an internal error", "look at Vault's log")


def read_token(path: Path, context: VaultContext = BY_SETTINGS) -> str:
    """The token in a regular file that only its owner may read; raises `BadSettings`."""
    return read_secret_word(path, context.token_file, is_vaults=True, reader=context.reader)
