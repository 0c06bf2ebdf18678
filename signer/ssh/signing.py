"""Who signs a certificate, and in which order it is signed, recorded and released.

Shared by the backends (`ca/backends.py`), the core, which follows the order, and the keeper, which runs slow signers in
`service/signing_pool.py`. The order is the one place that says who signs; nothing else encodes the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from signer.errors import Unavailable
from signer.model import Grant, PublicKey, Returned


class SigningKey(Protocol):
    """A CA key that can sign. `kind` and `blob` are its public key, `fingerprint` its `SHA256:…`."""

    kind: str
    blob: bytes
    fingerprint: str

    @property
    def public(self) -> PublicKey: ...
    def sign(self, data: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SlowSigner:
    """A signer outside this process: for how many seconds callers wait for it from their submission to a reply, and the
    errors that they get instead of an answer: of `codes` for too many waiting requests and for an unexpected exception,
    and `late` after the deadline."""

    codes: tuple[str, str]
    name: str
    deadline: float
    late: Callable[[], Unavailable]

    def busy(self, waiting: int) -> Unavailable:
        text = f"{waiting} requests are already waiting for {self.name}"
        return Unavailable(self.codes[0], text, "retry in a few seconds")

    def failed(self, error: Exception) -> Unavailable:
        text = f"the request to {self.name} failed: {type(error).__name__}"
        return Unavailable(self.codes[1], text, "see the service's log")

    def stopping(self) -> Unavailable:
        return Unavailable("keeper_stopping", f"the service is stopping before {self.name} signed", "retry")


@dataclass(frozen=True, slots=True)
class SignAtOnce:
    """A local certificate: recorded, signed in the loop, released."""

    key: SigningKey

    @property
    def local_key(self) -> PublicKey:
        return self.key.public


@dataclass(frozen=True, slots=True)
class SignInPool:
    """A local certificate: recorded, signed in the pool, released or withheld."""

    key: SigningKey
    slow: SlowSigner

    @property
    def local_key(self) -> PublicKey:
        return self.key.public


@dataclass(frozen=True, slots=True)
class CertifyInPool:
    """Another CA's certificate: made in the pool, checked, recorded, released.

    It is compared with what the key `local_key` would have signed; None: with nothing.
    """

    certify: Callable[[Grant], Returned]
    slow: SlowSigner
    local_key: PublicKey | None = None


SigningOrder = SignAtOnce | SignInPool | CertifyInPool
Obtained = bytes | Returned  # a signature blob over a local certificate, or another CA's certificate
