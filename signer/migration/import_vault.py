"""Import of a live Vault's SSH roles into a policy.toml; comments list what cannot be carried over.

Vault's roles contain neither the identities nor the CA key: the operator fills both in, and until then
`signer policy check` reports them as missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from signer.errors import BadFile, CertificateMismatch, write_hint
from signer.files import write_new
from signer.migration.import_role import ImportedRole, comment, import_role, toml_text
from signer.model import PublicKey
from signer.policy.file import parse_policy
from signer.vault.parity import compare_roles, errors_in
from signer.vault.role import MountTtls

FILL_IN: Final = "SHA256:fill-in"
_BARE: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_TRIAL_PIN: Final = "SHA256:" + "T" * 43
_TRIAL_IDENTITY: Final = '\n[identities.trial]\nkind = "human"\n'


class VaultSide(Protocol):
    """The part of `VaultAdmin` that an import uses."""

    def roles(self, mount: str) -> tuple[str, ...]: ...
    def role(self, mount: str, name: str) -> dict[str, Any]: ...
    def mount_ttls(self, mount: str) -> MountTtls | None: ...
    def ca_public_key(self, mount: str) -> PublicKey: ...


@dataclass(frozen=True, slots=True)
class Imported:
    """The imported roles of a mount; `policy` is the text of policy.toml."""

    mount: str
    vault_ca: str
    roles: tuple[ImportedRole, ...]
    policy: str

    def as_json(self) -> dict[str, object]:
        return {
            "mount": self.mount,
            "vault_ca": self.vault_ca,
            "roles": [role.as_json() for role in self.roles],
            "not_carried": [{"role": role.name, "text": text} for role in self.roles for text in role.not_carried()],
            "policy": self.policy,
        }


def import_vault(vault: VaultSide, mount: str, names: Sequence[str] = (), fingerprint: str | None = None) -> Imported:
    """The mount's roles, or those of `names`, as a policy; `fingerprint` pins the local CA key.

    Raises `BadFile` if none of them can be carried, `Unavailable` if Vault cannot be read.
    """
    vault_ca = vault.ca_public_key(mount).fingerprint
    ttls = vault.mount_ttls(mount)
    fetched = {name: vault.role(mount, name) for name in (names or vault.roles(mount))}
    roles = tuple(import_role(name, fields, ttls) for name, fields in fetched.items())
    if not any(role.is_carried for role in roles):
        raise BadFile(
            "nothing_to_import",
            "none of the roles can be carried over" if roles else "the mount has no roles",
            "write policy.toml by hand: see runbooks/reference/policy-file.md",
            tuple(f"{role.name}: {text}" for role in roles for text in role.not_carried()),
        )
    policy = "\n".join([*_head(mount, roles), "", *_ca(vault_ca, fingerprint), *_tables(roles), *_foot(roles)])
    _check(policy, fetched, roles, ttls)
    return Imported(mount, vault_ca, roles, policy + "\n")


def _head(mount: str, roles: Sequence[ImportedRole]) -> list[str]:
    lines = [
        comment(f"policy.toml from the SSH roles of Vault's mount {mount} (signer policy import-vault)."),
        "#",
        "# No role grants more than Vault's. Comments with the names of Vault's fields mark where one grants less.",
        "# FILL IN [ca] fingerprint, if it is missing, and the identities at the end. Then run: signer policy check",
        "# and, while Vault still runs: signer cutover parity --config FILE.",
        "#",
    ]
    left_out = [f"{role.name}: {text}" for role in roles for text in role.not_carried()]
    lines.append("# Not carried over:" if left_out else "# Not carried over: nothing.")
    return [*lines, *(f"#   {comment(text)[2:]}" for text in left_out)]


def _ca(vault_ca: str, fingerprint: str | None) -> list[str]:
    lines = ["[ca]"]
    if fingerprint is None:
        lines.append("# FILL IN the fingerprint that `signer ca inspect` prints for the local CA key.")
    lines.append(comment(f"Vault signs with {vault_ca}; pin that only if the local key is the same key."))
    return [*lines, f"fingerprint = {toml_text(fingerprint or FILL_IN)}"]


def _tables(roles: Sequence[ImportedRole]) -> list[str]:
    lines: list[str] = []
    for role in roles:
        if role.is_carried:
            lines += ["", f"[roles.{_key(role.name)}]", *role.lines]
        else:
            lines += ["", comment(f"Role {role.name} is not carried over. Its usable lines:")]
            lines += [f"# {line.removeprefix('# ')}" for line in role.lines]
    return lines


def _foot(roles: Sequence[ImportedRole]) -> list[str]:
    carried = ", ".join(toml_text(role.name) for role in roles if role.is_carried)
    return [
        "",
        "# FILL IN the identities, one table each; in Vault they are in the policies on the path MOUNT/sign/ROLE.",
        "# `signer token new deploy-agent --expires 90d` prints the line with the token's digest.",
        "#",
        "# [identities.deploy-agent]",
        '# kind = "agent"',
        f"# roles = [{carried}]",
        '# tokens = [{ sha256 = "…", expires = 2027-01-01T00:00:00Z }]',
    ]


def _key(name: str) -> str:
    return name if set(name) <= _BARE else toml_text(name)


def _check(
    policy: str, fetched: Mapping[str, Mapping[str, Any]], roles: Sequence[ImportedRole], ttls: MountTtls | None
) -> None:
    """Raises `CertificateMismatch` unless signer can read the text and no role in it is wider than Vault's."""
    try:
        # The leading line end keeps a comment, which may hold any text, from matching.
        filled = policy.replace(f"\nfingerprint = {toml_text(FILL_IN)}", f"\nfingerprint = {toml_text(_TRIAL_PIN)}", 1)
        read = parse_policy((filled + _TRIAL_IDENTITY).encode())
    except BadFile as error:
        text = "internal error: the policy made from Vault's roles is not valid"
        raise CertificateMismatch("import_not_readable", text, "report this with Vault's roles", error.facts) from None
    for name in (role.name for role in roles if role.is_carried):
        wider = errors_in(compare_roles(fetched[name], read.roles[name], ttls))
        for difference in wider:
            if difference.field != "default_user":  # fewer default principals only cause refusals
                text = f"role {name} would grant more than Vault's: {difference.field}"
                raise CertificateMismatch("import_wider", text, "report this with Vault's role")


def write_policy(path: Path, text: str) -> None:
    """Writes a file that must not exist, whole or not at all; raises `BadFile`."""
    try:
        write_new(path, text.encode(), 0o644)
    except FileExistsError:
        raise BadFile("target_exists", "the file exists already", "name one that does not") from None
    except OSError as error:
        text = f"the result cannot be written: {error.strerror}"
        raise BadFile("output_failed", text, write_hint(error, str(path.parent))) from None
