"""A role of Vault's SSH engine as Vault means it: its 27 fields, typed, with what their values stand for. Pure.

The meaning is `runbooks/develop/vault-contract.md`, section 4: an empty list of critical options is any, one of
extensions is none, sizes of keys are exact, lists are not trimmed. Used to compare (`parity.py`) and to import (`ops`).
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
# FIDO keys count as their plain kind there, and have no name of their own.
_FIDO: Final = {
    "ssh-ed25519": "sk-ssh-ed25519@openssh.com",
    "ecdsa-sha2-nistp256": "sk-ecdsa-sha2-nistp256@openssh.com",
}
_SAME: Final = {"ed25519": "ssh-ed25519", "rsa": "ssh-rsa", "ec": "ecdsa"}


@dataclass(frozen=True, slots=True)
class MountTtls:
    """Seconds that hold where a role has 0: what the mount is tuned to, or the system's."""

    default: int = SYSTEM_TTL
    most: int = SYSTEM_TTL


@dataclass(frozen=True, slots=True)
class KeyRules:
    """Which keys a role takes. `rsa_sizes` are exact; None is any size. `unknown` names match no key of ours."""

    kinds: frozenset[str]
    rsa_sizes: frozenset[int] | None
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VaultRole:
    """The fields by Vault's names, with its defaults where it did not say; `strange` are fields that we do not know."""

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
        """True if every principal may be asked for."""
        return self.text("allowed_users") == "*"

    @property
    def users(self) -> tuple[str, ...]:
        """The principals that may be asked for, as written; empty with `any_user`."""
        return () if self.any_user else _trimmed(self.text("allowed_users"))

    @property
    def default_users(self) -> tuple[str, ...]:
        """The principals of a request that names none, sorted; none where Vault would refuse them itself."""
        named = _trimmed(self.text("default_user"))
        is_allowed = self.any_user or self.flag("allowed_users_template") or set(named) <= set(self.users)
        return tuple(sorted(named)) if is_allowed else ()

    @property
    def any_extension(self) -> bool:
        return self.text("allowed_extensions") == "*"

    @property
    def extensions(self) -> frozenset[str]:
        """What may be asked for by name; Vault does not trim, so ` permit-pty` never matches."""
        return frozenset(filter(None, self.text("allowed_extensions").split(",")))

    @property
    def any_critical_option(self) -> bool:
        return not self.text("allowed_critical_options")

    @property
    def critical_options(self) -> frozenset[str]:
        """What a caller may set, if not any."""
        return frozenset(filter(None, self.text("allowed_critical_options").split(",")))

    def ttls(self, mount: MountTtls) -> tuple[int, int]:
        """Seconds that a certificate lives if nothing is said, and at most."""
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
    """A role as Vault's API tells it; raises `Unavailable` if a field is not of its type."""
    raw: dict[str, Any] = {}
    for name, default in DEFAULTS.items():
        value = fields.get(name)
        if value is None or (value == "" and not isinstance(default, str)):
            value = default  # older servers do not know each field; some tell an empty one so
        if type(value) is not type(default):  # JSON has no subclasses, and a bool is no number of seconds
            raise Unavailable(
                "vault_answer_malformed", f"Vault tells a role whose {name} is not understood", "check Vault's address"
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
            "Vault tells a role whose allowed_user_key_lengths is not understood",
            "check Vault's address",
        )
    return sizes


def _trimmed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in (part.strip() for part in text.split(",")) if name))
