"""The signatures of approvers, as the core reads them: sshsig in the namespace of approvals, and passkeys. Pure."""

from __future__ import annotations

from typing import Final

from signer.authority import webauthn
from signer.model import Assertion, Passkey, PublicKey
from signer.ssh import sshsig
from signer.ssh.statement import APPROVAL_NAMESPACE


class Signatures:
    """Signatures as `ssh-keygen -Y sign` makes them, and assertions of passkeys as browsers return them."""

    def key(self, armored: str) -> PublicKey:
        """The key that a signature names; raises `BadSignature`."""
        return sshsig.signature_key(armored)

    def verify(self, armored: str, statement: bytes, key: PublicKey) -> sshsig.SshSignature:
        """Checks a signature over a statement by a key; raises `BadSignature`."""
        return sshsig.verify(armored, statement, APPROVAL_NAMESPACE, key)

    def verify_assertion(self, assertion: Assertion, statement: bytes, passkey: Passkey) -> webauthn.VerifiedAssertion:
        """Checks an assertion for a statement by a passkey; raises `BadSignature`."""
        return webauthn.verify_assertion(assertion, statement, passkey)


SIGNATURES: Final = Signatures()
