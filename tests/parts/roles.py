"""One role as Vault returns it, and the role of policy.toml that gives the same certificates."""

from __future__ import annotations

from typing import Any, Final

from signer.model import Limits, Role
from signer.vault.role import DEFAULTS

VAULTS: Final[dict[str, Any]] = {
    **DEFAULTS,
    "allow_user_certificates": True,
    "allowed_users": "llmops",
    "default_user": "llmops",
    "ttl": 900,
    "max_ttl": 1800,
    "allowed_extensions": "permit-pty",
    "default_extensions": {"permit-pty": ""},
    "allowed_critical_options": "none-at-all",
    "allowed_user_key_lengths": {"ed25519": [0], "rsa": [3072]},
}
OURS: Final = Role(
    name="llmops",
    principals=("llmops",),
    default_principals=("llmops",),
    default_ttl=900,
    max_ttl=1800,
    key_types=frozenset({"ssh-ed25519", "sk-ssh-ed25519@openssh.com", "ssh-rsa"}),
    rsa_min_bits=3072,
    allowed_extensions=frozenset({"permit-pty"}),
    default_extensions=("permit-pty",),
    allowed_critical_options=frozenset(),
    force_command=None,
    source_address=None,
    verify_required=False,
    no_touch_required=False,
    allow_key_id=False,
    reason_required=False,
    approval=None,
    limits=Limits(),
)
