"""Signs through Vault or OpenBao (hvac): the backend of the modes `vault` and `shadow`.

Every call has a deadline and translates Vault's errors to signer's codes, without Vault's text or the token. The token
is read from a file, read again when the file changes, and renewed while Vault allows it. Thread-safe.
"""

from __future__ import annotations

import binascii
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import hvac

from signer.errors import BadFormat, BadSettings, SignerError
from signer.http import Watch, new_session
from signer.model import Grant, PublicKey, Returned
from signer.ssh.certificate import decode_certificate
from signer.ssh.publickey import parse_public_key, render_public_key
from signer.units import plain
from signer.vault.errors import ca_unknown, malformed, read_token, translated_errors

log = logging.getLogger("signer.vault")

ANSWERS_WITHIN: Final = 4.5  # seconds for one signature or one check; the keeper gives up after 5
LOOK_EVERY: Final = 2.0  # seconds between two checks of Vault, which determine readiness
RENEW_EVERY_AT_MOST: Final = 300.0  # seconds
RENEW_EVERY_AT_LEAST: Final = 1.0


class VaultClient:
    """Vault's SSH engine at `mount`, used with the token in `token_file`; raises `BadSettings` without one."""

    def __init__(self, address: str, token_file: Path, mount: str, tls_ca_file: Path | None = None) -> None:
        self._address = address
        self._token_file = token_file
        self._mount = mount
        if tls_ca_file is not None and not os.access(tls_ca_file, os.R_OK, effective_ids=True):
            raise BadSettings(
                "vault_ca_file_unreadable",
                f"{plain(tls_ca_file)} (SIGNER_VAULT_CA_FILE) cannot be read",
                "name a file that the keeper's user may read",
            )
        self._tls_ca_file = tls_ca_file
        self._local = threading.local()
        self._clients: list[Any] = []  # of all threads
        self._token = read_token(token_file)
        self._ca: PublicKey | None = None
        self._fault: SignerError | None = ca_unknown()
        self._renew_at = 0.0
        self._warned = ""  # code of the last token error in the log
        self._watch = Watch()
        self._stopping = threading.Event()

    def __repr__(self) -> str:
        return f"VaultClient({self._address}, {self._mount})"

    def sign(self, grant: Grant) -> Returned:
        """The certificate that Vault issues for a grant; raises `Unavailable` or another `SignerError`."""
        fields = {
            "public_key": render_public_key(grant.public_key.kind, grant.public_key.blob),
            "cert_type": "user",
            "valid_principals": ",".join(grant.principals),
            "ttl": f"{grant.ttl}s",
            "extensions": dict(grant.extension_fields),
            "critical_options": dict(grant.critical_options),
        }
        with self._watch.within(ANSWERS_WITHIN):
            data = self._call(lambda client: client.write_data(f"{self._mount}/sign/{grant.role}", data=fields))
            line = data.get("signed_key")
            if not isinstance(line, str):
                raise malformed()
            ca = self._ca
            if ca is None or _ca_key_in(line) != ca.blob:  # Vault may have changed its CA key since the last check
                ca = self._ask_ca()
        return Returned(line.strip(), ca.blob)

    def known_ca(self) -> PublicKey:
        """Vault's CA key at the last check; raises `Unavailable` before the first. Sends no request."""
        if self._ca is None:
            raise self._fault or ca_unknown()
        return self._ca

    def ask_ca(self) -> PublicKey:
        """Vault's current CA key; raises `Unavailable` or another `SignerError`."""
        with self._watch.within(ANSWERS_WITHIN):
            return self._ask_ca()

    def check_ready(self) -> None:
        """Raises the error of the last check of Vault, if any. Sends no request, so it never waits."""
        if self._fault is not None:
            raise self._fault

    def look_once(self) -> None:
        """Reads the token file and the CA key, and renews the token when due; `check_ready` reports the result."""
        with self._watch.within(ANSWERS_WITHIN):
            self._take_new_token()
            try:
                self._ask_ca()
                fault = None
            except SignerError as error:
                fault = error
            was, self._fault = self._fault, fault
            if fault is not None and (was is None or was.code != fault.code):
                log.warning("Vault cannot sign: %s (%s)", fault.text, fault.code)
            elif fault is None and was is not None:
                log.warning("Vault can sign")
            if fault is None and time.monotonic() >= self._renew_at:
                self._renew()

    def look_after(self) -> None:
        """Repeats `look_once` until `close`; runs in its own thread."""
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                self.look_once()
            except Exception:  # any error: without this thread no token is renewed
                log.exception("the check of Vault failed")
            pause = min(max(self._renew_at - time.monotonic(), RENEW_EVERY_AT_LEAST), LOOK_EVERY)

    def close(self) -> None:
        self._stopping.set()
        self._watch.close()
        for client in self._clients:
            client.adapter.close()

    def _ask_ca(self) -> PublicKey:
        data = self._call(lambda client: client.adapter.get(f"/v1/{self._mount}/config/ca"))
        try:
            key = parse_public_key(str(data["public_key"]))
        except (KeyError, BadFormat):
            raise malformed() from None
        if self._ca is not None and key.blob != self._ca.blob:
            log.warning("Vault's CA key changed to %s from %s", key.fingerprint, self._ca.fingerprint)
        self._ca = key
        return key

    def _renew(self) -> None:
        """Renews the token after a third of its lifetime. A token that cannot be renewed is used until it expires."""
        try:
            data = self._call(lambda client: client.auth.token.lookup_self())
            if data.get("renewable") is True:
                self._call(lambda client: client.auth.token.renew_self(), "auth")
            life = data.get("ttl")
            seconds = life / 3 if isinstance(life, int) and life > 0 else RENEW_EVERY_AT_MOST
            self._warned = ""
        except SignerError as error:
            if error.code != self._warned:
                log.warning("the Vault token cannot be renewed: %s (%s)", error.text, error.code)
            self._warned = error.code
            seconds = RENEW_EVERY_AT_LEAST * 5
        self._renew_at = time.monotonic() + min(max(seconds, RENEW_EVERY_AT_LEAST), RENEW_EVERY_AT_MOST)

    def _take_new_token(self) -> bool:
        """Switches to the token in the file; True if it is a new one."""
        try:
            fresh = read_token(self._token_file)
        except BadSettings as error:  # the file may be in the middle of a replacement
            if error.code != self._warned:
                log.warning("the token file is not usable: %s (%s)", error.text, error.code)
            self._warned = error.code
            return False
        if fresh == self._token:
            return False
        self._token, self._renew_at = fresh, 0.0
        return True

    def _call(self, act: Callable[[Any], Any], part: str = "data") -> dict[str, Any]:
        """One part of a call's response; retries once with the file's token if Vault refuses the current one."""
        used = self._token
        try:
            with translated_errors():
                answer = act(self._client())
        except SignerError as error:
            if error.code != "vault_forbidden" or not (self._take_new_token() or self._token != used):
                raise
            with translated_errors():
                answer = act(self._client())
        found = answer.get(part) if isinstance(answer, dict) else None
        if not isinstance(found, dict):
            raise malformed()
        return found

    def _client(self) -> Any:
        """This thread's hvac client; a requests session is not thread-safe."""
        client = getattr(self._local, "client", None)
        if client is None:
            session = new_session(self._tls_ca_file)
            client = hvac.Client(url=self._address, token="", session=session, allow_redirects=False)
            self._local.client = client
            self._clients.append(client)
        client.token = self._token
        return client


def _ca_key_in(line: str) -> bytes:
    """The CA key blob in a certificate line; empty if it is not a certificate."""
    try:
        return decode_certificate(binascii.a2b_base64(line.split()[1]))[0].ca_key
    except (BadFormat, ValueError, IndexError):
        return b""
