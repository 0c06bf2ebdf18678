"""The signatures of approvers, as the core reads them: sshsig in the namespace of approvals. Pure."""

from __future__ import annotations

from typing import Final

from signer.model import PublicKey
from signer.ssh import sshsig
from signer.ssh.statement import APPROVAL_NAMESPACE


class SshSignatures:
    """Signatures as `ssh-keygen -Y sign` makes them."""

    def key(self, armored: str) -> PublicKey:
        """The key that a signature names; raises `BadSignature`."""
        return sshsig.signature_key(armored)

    def verify(self, armored: str, statement: bytes, key: PublicKey) -> sshsig.SshSignature:
        """Checks a signature over a statement by a key; raises `BadSignature`."""
        return sshsig.verify(armored, statement, APPROVAL_NAMESPACE, key)


SSH_SIGNATURES: Final = SshSignatures()
