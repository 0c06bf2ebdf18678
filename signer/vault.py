"""Asks Vault or OpenBao to sign (hvac): the backend of `SIGNER_MODE=vault`, until the local CA key takes over.

Every call has a time limit and maps Vault's faults to codes of ours; no text of Vault's and no token is passed on. The
token comes from a file, read again when Vault refuses it, and is renewed while it can be. Threads may share a client.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import hvac
import requests
from hvac import exceptions as said

from signer.errors import BadFormat, BadSettings, SignerError, Unavailable
from signer.model import Grant, PublicKey, Returned
from signer.ssh.publickey import parse_public_key, render_public_key

log = logging.getLogger("signer.vault")

CONNECT_WITHIN: Final = 1.0  # seconds
ANSWER_WITHIN: Final = 4.0  # seconds between two bytes of an answer; the keeper's own deadline is the whole of it
CA_GOOD_FOR: Final = 30.0  # seconds; a CA key that Vault changed is seen after that, and refused until then
MAX_TOKEN: Final = 4096  # bytes
RENEW_EVERY_AT_MOST: Final = 300.0  # seconds
RENEW_EVERY_AT_LEAST: Final = 1.0
_T = TypeVar("_T")


class VaultClient:
    """Vault's SSH engine at `mount`, as the bearer of the token in `token_file`."""

    def __init__(self, address: str, token_file: Path, mount: str) -> None:
        self._address = address
        self._token_file = token_file
        self._mount = mount
        self._local = threading.local()
        self._token = read_token(token_file)
        self._ca: tuple[PublicKey, float] | None = None
        self._stopping = threading.Event()

    def __repr__(self) -> str:
        return f"VaultClient({self._address}, {self._mount})"

    def sign(self, grant: Grant) -> Returned:
        """The certificate that Vault makes of a grant; raises `Unavailable` or another `SignerError`."""
        fields = {
            "public_key": render_public_key(grant.public_key.kind, grant.public_key.blob),
            "cert_type": "user",
            "valid_principals": ",".join(grant.principals),
            "ttl": f"{grant.ttl}s",
            "extensions": dict.fromkeys(grant.extensions, ""),
            "critical_options": dict(grant.critical_options),
        }
        answer = self._call(lambda client: client.write_data(f"{self._mount}/sign/{grant.role}", data=fields))
        try:
            line = str(answer["data"]["signed_key"]).strip()
        except (KeyError, TypeError):
            raise _malformed() from None
        return Returned(line, self._ca_in_force().blob)

    def known_ca(self) -> PublicKey:
        """Vault's CA key as it was told last; raises `Unavailable` if it never was. Asks nobody, so it never waits."""
        known = self._ca
        if known is None:
            raise Unavailable("vault_ca_unknown", "Vault has not told its CA key yet", "is Vault up and unsealed?")
        return known[0]

    def _ca_in_force(self) -> PublicKey:
        """Vault's CA key, asked for again when what we know is old."""
        known = self._ca
        if known is not None and time.monotonic() - known[1] < CA_GOOD_FOR:
            return known[0]
        answer = self._call(lambda client: client.read(f"{self._mount}/config/ca"))
        try:
            key = parse_public_key(str(answer["data"]["public_key"]))
        except (KeyError, TypeError, BadFormat):
            raise _malformed() from None
        self._ca = (key, time.monotonic())
        return key

    def keep_token_alive(self) -> None:
        """Renews the token at a third of its life, until `close`; run in a thread of its own."""
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                self._ca_in_force()
                data = self._call(lambda client: client.auth.token.lookup_self())["data"]
                if data.get("renewable"):
                    self._call(lambda client: client.auth.token.renew_self())
                pause = min(max(float(data.get("ttl") or 0) / 3, RENEW_EVERY_AT_LEAST), RENEW_EVERY_AT_MOST)
            except SignerError as error:
                log.warning("the Vault token was not renewed: %s (%s)", error.text, error.code)
                pause = RENEW_EVERY_AT_LEAST * 5

    def close(self) -> None:
        """Ends `keep_token_alive`."""
        self._stopping.set()

    def _call(self, act: Callable[[Any], _T]) -> _T:
        """One call, and once more with the file's token if Vault does not take the one in use."""
        try:
            return _mapped(act, self._client())
        except SignerError as error:
            fresh = read_token(self._token_file) if error.code == "vault_forbidden" else self._token
            if fresh == self._token:
                raise
            self._token = fresh
        return _mapped(act, self._client())

    def _client(self) -> Any:
        """This thread's hvac client; a requests session is not for several."""
        client = getattr(self._local, "client", None)
        if client is None:
            client = hvac.Client(url=self._address, timeout=(CONNECT_WITHIN, ANSWER_WITHIN), allow_redirects=False)
            self._local.client = client
        client.token = self._token
        return client


def _mapped(act: Callable[[Any], _T], client: Any) -> _T:
    """Runs one hvac call; every fault of Vault's or the way's becomes one of ours."""
    try:
        answer = act(client)
    except requests.exceptions.Timeout:
        raise Unavailable("vault_slow", "Vault did not answer in time", "look at Vault, then try again") from None
    except requests.exceptions.RequestException:
        raise Unavailable("vault_down", "Vault cannot be reached", "start Vault, or check SIGNER_VAULT_ADDR") from None
    except said.VaultDown:
        raise Unavailable("vault_sealed", "Vault is sealed", "unseal Vault") from None
    except (said.Forbidden, said.Unauthorized):
        raise Unavailable(
            "vault_forbidden",
            "Vault does not let our token sign",
            "put a token with update on the sign path into SIGNER_VAULT_TOKEN_FILE",
        ) from None
    except said.InvalidPath:
        raise Unavailable(
            "vault_mount_missing", "Vault has no such mount or role", "check SIGNER_VAULT_MOUNT"
        ) from None
    except said.InvalidRequest as error:
        raise _refusal(error) from None
    except said.RateLimitExceeded:
        raise Unavailable("vault_rate_limited", "Vault says that it is asked too often", "try again") from None
    except said.VaultError:
        raise Unavailable("vault_failed", "Vault answered with an error of its own", "look at Vault's log") from None
    except ValueError:
        raise _malformed() from None
    if answer is None:
        raise Unavailable("vault_mount_missing", "Vault has no such mount or role", "check SIGNER_VAULT_MOUNT")
    return answer


def _refusal(error: said.InvalidRequest) -> SignerError:
    if any(str(line).lower().startswith("unknown role") for line in error.errors or ()):
        return Unavailable(
            "vault_role_missing", "Vault has no role of that name", "make it, or take it out of policy.toml"
        )
    return SignerError(
        "vault_refused", "Vault refuses what policy.toml grants", "bring Vault's role and policy.toml together"
    )


def _malformed() -> Unavailable:
    return Unavailable(
        "vault_answer_malformed", "Vault's answer is not one of its sign path", "check SIGNER_VAULT_ADDR"
    )


def read_token(path: Path) -> str:
    """The token in a regular file that only its owner may read; raises `BadSettings`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadSettings(
            "vault_token_unreadable",
            f"the file of SIGNER_VAULT_TOKEN_FILE cannot be opened: {error.strerror}",
            "name a regular file that the keeper's user may read",
        ) from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o077:
            raise BadSettings(
                "vault_token_not_private",
                f"the file of SIGNER_VAULT_TOKEN_FILE has mode {stat.S_IMODE(facts.st_mode):04o}",
                "chmod 0400 it",
            )
        token = os.read(descriptor, MAX_TOKEN + 1).decode("utf-8", "replace").strip()
    finally:
        os.close(descriptor)
    if not token or len(token) > MAX_TOKEN or not token.isprintable() or " " in token:
        raise BadSettings(
            "vault_token_malformed", "the file of SIGNER_VAULT_TOKEN_FILE is not one token", "put the token into it"
        )
    return token
