"""The backends: who signs what the core grants. Each knows its mode, its public key and the order of its certificates.

`FileBackend` signs with the key of a file, `AgentBackend` with a key in an ssh-agent. `VaultBackend` has Vault make the
certificate, in mode shadow to be compared with the local key. The service makes one at its start; the core sees only
its order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from signer.ca.agent import ANSWERS_WITHIN, SELF_TEST, CaAgent, key_missing, too_slow
from signer.errors import SignerError, Unavailable
from signer.model import Grant, PublicKey, Returned
from signer.ssh.signing import CertifyInPool, SignAtOnce, SigningKey, SigningOrder, SignInPool, SlowSigner

log = logging.getLogger("signer.keeper")

LOOK_EVERY: Final = 2.0  # seconds between two looks at the ssh-agent, which determine readiness

VAULT_DEADLINE: Final = 5.0  # seconds from submission to the caller's reply


class Backend(Protocol):
    """Who signs. `mode` is that of SIGNER_MODE; `order` changes when a key is replaced."""

    @property
    def mode(self) -> str: ...
    @property
    def order(self) -> SigningOrder: ...
    def public_key(self) -> PublicKey:
        """The CA key of the certificates that are made now; raises `Unavailable` while it is not known."""

    def check_ready(self) -> None:
        """Raises a `SignerError` if nothing can be signed now. Sends no request, so it never waits."""

    def use_key(self, key: SigningKey) -> None:
        """Uses another local key from now on: to sign, or to compare with."""

    def facts(self) -> dict[str, object]:
        """Who signs, for the event of a start."""


class FileBackend:
    """The key of a file, which signs at once."""

    mode: Final = "local"

    def __init__(self, key: SigningKey) -> None:
        self.use_key(key)

    def use_key(self, key: SigningKey) -> None:
        self.order = SignAtOnce(key)

    def public_key(self) -> PublicKey:
        return self.order.local_key

    def check_ready(self) -> None:
        """Does nothing: a loaded key stays ready."""

    def facts(self) -> dict[str, object]:
        return {"ca": self.order.key.fingerprint, "mode": self.mode}


class WatchedKey:
    """A key that remembers whether it can sign: `fault` is the error of its last signature, None if that succeeded."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key
        self.kind, self.blob, self.fingerprint, self.public = key.kind, key.blob, key.fingerprint, key.public
        self.fault: SignerError | None = None

    def sign(self, data: bytes) -> bytes:
        try:
            signature = self._key.sign(data)
        except SignerError as fault:
            self.fault = fault
            raise
        self.fault = None
        return signature


class AgentBackend:
    """A key in an ssh-agent, which may be slow: its signatures are made in the pool.

    `look_after` keeps readiness up to date, in its own thread.
    """

    mode: Final = "local"

    def __init__(self, agent: CaAgent, key: SigningKey) -> None:
        self._agent = agent
        self._fault: SignerError | None = None
        self.use_key(key)

    def use_key(self, key: SigningKey) -> None:
        self._key = WatchedKey(key)
        self.order = SignInPool(self._key, SLOW_AGENT)

    def public_key(self) -> PublicKey:
        return self.order.local_key

    def check_ready(self) -> None:
        """Raises the error of the last look at the agent, or of the last signature, if any."""
        fault = self._fault or self._key.fault
        if fault is not None:
            raise fault

    def facts(self) -> dict[str, object]:
        return {"ca": self._key.fingerprint, "mode": self.mode, "key_source": "agent"}

    def look_once(self) -> None:
        """Looks whether the agent still holds the key, and after a failed signature whether it signs again."""
        key = self._key
        try:
            if key.blob not in self._agent.identities():
                raise key_missing(key.fingerprint)
            if key.fault is not None:
                key.sign(SELF_TEST)
            fault = None
        except SignerError as error:
            fault = error
        was, self._fault = self._fault, fault
        if fault is not None and (was is None or was.code != fault.code):
            log.warning("the ssh-agent cannot sign: %s (%s)", fault.text, fault.code)
        elif fault is None and was is not None:
            log.warning("the ssh-agent can sign")

    def look_after(self) -> None:
        while True:
            time.sleep(LOOK_EVERY)
            try:
                self.look_once()
            except Exception:  # any error: without this thread readiness stays what it was
                log.exception("the check of the ssh-agent failed")


SLOW_AGENT: Final = SlowSigner(("ca_agent_busy", "ca_agent_failed"), "the ssh-agent", ANSWERS_WITHIN, too_slow)


class CertifyingClient(Protocol):
    """The client of another CA (`vault/signing.py`)."""

    def sign(self, grant: Grant) -> Returned: ...
    def known_ca(self) -> PublicKey: ...
    def check_ready(self) -> None: ...


class VaultBackend:
    """Vault, which makes each certificate. With a key its certificates are compared: mode shadow, otherwise vault.

    Only the public half of the key is kept.
    """

    def __init__(self, client: CertifyingClient, compared_with: PublicKey | None = None) -> None:
        self.public_key: Callable[[], PublicKey] = client.known_ca
        self.check_ready: Callable[[], None] = client.check_ready
        self._client = client
        self.mode = "vault" if compared_with is None else "shadow"
        self.order = CertifyInPool(client.sign, SLOW_VAULT, compared_with)

    def use_key(self, key: SigningKey) -> None:
        self.order = CertifyInPool(self._client.sign, self.order.slow, key.public)

    def facts(self) -> dict[str, object]:
        key = self.order.local_key
        compared: dict[str, object] = {} if key is None else {"compared_with": key.fingerprint}
        return {"ca": "vault", "mode": self.mode, **compared}


def _vault_slow() -> Unavailable:
    return Unavailable("vault_slow", f"Vault did not sign within {VAULT_DEADLINE:.0f} s", "check Vault, then retry")


SLOW_VAULT: Final = SlowSigner(("vault_busy", "vault_failed"), "Vault", VAULT_DEADLINE, _vault_slow)
