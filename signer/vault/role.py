"""A role of Vault's SSH engine: its 27 fields, typed, with their meaning. Pure.

`runbooks/develop/vault-contract.md`, section 4, has the meaning: an empty list of critical options allows any, one of
extensions allows none, key sizes are exact, lists are not trimmed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from signer.errors import Unavailable
from signer.ssh.publickey import USER_KEY_KINDS

SYSTEM_TTL: Final = 768 * 3600  # seconds; Vault's own default and maximum, unless the mount is tuned
DEFAULTS: Final[Mapping[str, object]] = {
    "algorithm_signer": "default",
    "allow_bare_domains": False,
    "allow_commas_in_identity_templates": False,
    "allow_empty_principals": False,
    "allow_host_certificates": False,
    "allow_subdomains": False,
    "allow_user_certificates": False,
    "allow_user_key_ids": False,
    "allow_wildcards_in_identity_templates": False,
    "allowed_critical_options": "",
    "allowed_domains": "",
    "allowed_domains_template": False,
    "allowed_extensions": "",
    "allowed_user_key_lengths": {},
    "allowed_users": "",
    "allowed_users_template": False,
    "default_critical_options": {},
    "default_extensions": {},
    "default_extensions_template": False,
    "default_user": "",
    "default_user_template": False,
    "issuer_ref": "default",
    "key_id_format": "",
    "key_type": "ca",
    "max_ttl": 0,
    "not_before_duration": 30,
    "ttl": 0,
}
_ECDSA_SIZES: Final = {256: "ecdsa-sha2-nistp256", 384: "ecdsa-sha2-nistp384", 521: "ecdsa-sha2-nistp521"}
# Vault treats a FIDO key as its plain kind and has no name for it.
_FIDO: Final = {
    "ssh-ed25519": "sk-ssh-ed25519@openssh.com",
    "ecdsa-sha2-nistp256": "sk-ecdsa-sha2-nistp256@openssh.com",
}
_SAME: Final = {"ed25519": "ssh-ed25519", "rsa": "ssh-rsa", "ec": "ecdsa"}


@dataclass(frozen=True, slots=True)
class MountTtls:
    """Lifetimes in seconds for roles that have 0: the mount's, or else the system's."""

    default: int = SYSTEM_TTL
    most: int = SYSTEM_TTL


@dataclass(frozen=True, slots=True)
class KeyRules:
    """The keys that a role accepts. `rsa_sizes` are exact; None means any size. `unknown` are unsupported kinds."""

    kinds: frozenset[str]
    rsa_sizes: frozenset[int] | None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VaultRole:
    """The fields by Vault's names, with its defaults for missing ones; `strange` are unknown fields."""

    raw: Mapping[str, Any]
    strange: tuple[str, ...]

    def text(self, field: str) -> str:
        return str(self.raw[field])

    def flag(self, field: str) -> bool:
        return bool(self.raw[field])

    def number(self, field: str) -> int:
        return int(self.raw[field])

    def pairs(self, field: str) -> tuple[tuple[str, str], ...]:
        """A map's entries, sorted by name."""
        return tuple(sorted((str(name), str(value)) for name, value in self.raw[field].items()))

    @property
    def issues_user_certificates(self) -> bool:
        return self.text("key_type") == "ca" and self.flag("allow_user_certificates")

    @property
    def any_user(self) -> bool:
        return self.text("allowed_users") == "*"

    @property
    def users(self) -> tuple[str, ...]:
        """The allowed principals as written; empty with `any_user`."""
        return () if self.any_user else _trimmed(self.text("allowed_users"))

    @property
    def default_users(self) -> tuple[str, ...]:
        """The default principals, sorted; empty if Vault itself would refuse them."""
        named = _trimmed(self.text("default_user"))
        is_allowed = self.any_user or self.flag("allowed_users_template") or set(named) <= set(self.users)
        return tuple(sorted(named)) if is_allowed else ()

    @property
    def any_extension(self) -> bool:
        return self.text("allowed_extensions") == "*"

    @property
    def extensions(self) -> frozenset[str]:
        """The allowed extensions; Vault does not trim, so ` permit-pty` never matches."""
        return frozenset(filter(None, self.text("allowed_extensions").split(",")))

    @property
    def any_critical_option(self) -> bool:
        return not self.text("allowed_critical_options")

    @property
    def critical_options(self) -> frozenset[str]:
        """The options that a caller may set, unless any is allowed."""
        return frozenset(filter(None, self.text("allowed_critical_options").split(",")))

    def ttls(self, mount: MountTtls) -> tuple[int, int]:
        """The default and the maximum lifetime in seconds."""
        most = self.number("max_ttl") or mount.most
        return min(self.number("ttl") or mount.default, most), most

    def keys(self) -> KeyRules:
        lengths = self.raw["allowed_user_key_lengths"]
        if not lengths:
            return KeyRules(frozenset(USER_KEY_KINDS), None)
        kinds: set[str] = set()
        sizes: set[int] = set()
        unknown = []
        for name, value in sorted(lengths.items()):
            listed = _sizes(value)
            plain = _SAME.get(name, name)
            if plain == "ssh-rsa":
                sizes |= set(listed)
            elif plain == "ecdsa":
                kinds |= {_ECDSA_SIZES[size] for size in listed if size in _ECDSA_SIZES}
            elif plain in _ECDSA_SIZES.values() or plain == "ssh-ed25519":
                kinds |= {plain} if listed else set()
            else:
                unknown.append(name)
        kinds |= {_FIDO[kind] for kind in kinds if kind in _FIDO} | ({"ssh-rsa"} if sizes else set())
        return KeyRules(frozenset(kinds), frozenset(sizes), tuple(unknown))


def read_vault_role(fields: Mapping[str, object]) -> VaultRole:
    """Parses a role from Vault's API; raises `Unavailable` if a field has the wrong type."""
    raw: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        value = fields.get(name)
        if value is None or (value == "" and not isinstance(default, str)):
            value = default  # older servers lack some fields or return "" for empty ones
        if type(value) is not type(default):  # JSON has no subclasses, and a bool is not a number of seconds
            raise Unavailable(
                "vault_answer_malformed", f"Vault returned a role with an invalid {name}", "check Vault's address"
            )
        raw[name] = value
    for value in raw["allowed_user_key_lengths"].values():
        _sizes(value)
    return VaultRole(raw, tuple(sorted(str(name) for name in set(fields) - set(DEFAULTS))))


def _sizes(value: object) -> list[int]:
    """One size (HashiCorp Vault) or a list of them; raises `Unavailable`."""
    listed = value if isinstance(value, list) else [value]
    sizes = [size for size in listed if isinstance(size, int) and not isinstance(size, bool)]
    if len(sizes) != len(listed):
        raise Unavailable(
            "vault_answer_malformed",
            "Vault returned a role with an invalid allowed_user_key_lengths",
            "check Vault's address",
        )
    return sizes


def _trimmed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))
