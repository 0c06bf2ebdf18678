"""The CA keys that hosts must trust, as lines for sshd's TrustedUserCAKeys. Pure.

The keeper (`GET /api/ca`) and `signer ca bundle` produce the same text from the same policy, so that both can be
compared with each other and with a host's file.
"""

from __future__ import annotations

from signer.model import CaKeys, PublicKey
from signer.ssh.publickey import render_public_key


def trusted_keys(ca: CaKeys, *in_use: PublicKey | None) -> list[tuple[str, PublicKey]]:
    """Each key once, with its state: `current`, `next`, `retired`, or `vault` for one that policy.toml does not name.

    `in_use` are the keys that sign now, in mode shadow also the local key; it may be None or empty if policy.toml has
    the public half of the pinned key.
    """
    named = [("current", ca.public), ("next", ca.next), *(("retired", key) for key in ca.retired)]
    found = [(what, key) for what, key in named if key is not None]
    for key in reversed(in_use):
        if key is not None and key.fingerprint not in [known.fingerprint for _, known in found]:
            found.insert(0, ("current" if key.fingerprint == ca.fingerprint else "vault", key))
    return found


def render_bundle(ca: CaKeys, *in_use: PublicKey | None) -> str:
    """`trusted_keys` as the file for TrustedUserCAKeys, with a comment after each key, which sshd ignores."""
    return "".join(
        f"{render_public_key(key.kind, key.blob)} signer-ca {what} {key.fingerprint}\n"
        for what, key in trusted_keys(ca, *in_use)
    )
