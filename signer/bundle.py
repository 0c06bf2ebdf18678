"""The CA keys that hosts must trust, as lines for sshd's TrustedUserCAKeys. Pure.

The keeper (`GET /api/ca`) and `signer ca bundle` make the same text from the same policy, so that one can be compared
with the other and with what a host has.
"""

from __future__ import annotations

from signer.model import CaKeys, PublicKey
from signer.ssh.publickey import render_public_key


def trusted_keys(ca: CaKeys, in_use: PublicKey | None) -> list[tuple[str, PublicKey]]:
    """Each key once, with what it is: `current`, `next`, `retired`, or `vault` for one that policy.toml does not name.

    `in_use` is who signs now; it may be None if policy.toml has the public half of the pinned key.
    """
    named = [("current", ca.public), ("next", ca.next), *(("retired", key) for key in ca.retired)]
    found = [(what, key) for what, key in named if key is not None]
    if in_use is not None and in_use.fingerprint not in [key.fingerprint for _, key in found]:
        found.insert(0, ("current" if in_use.fingerprint == ca.fingerprint else "vault", in_use))
    return found


def render_bundle(ca: CaKeys, in_use: PublicKey | None) -> str:
    """The file for TrustedUserCAKeys; what stands after a key is its comment, which sshd does not read."""
    return "".join(
        f"{render_public_key(key.kind, key.blob)} signer-ca {what} {key.fingerprint}\n"
        for what, key in trusted_keys(ca, in_use)
    )
