"""Import of a live Vault's SSH roles into a policy.toml; comments list what cannot be carried over.

A role becomes a table that is never wider, with an outcome for each of its 27 fields. Every text from Vault is written
through `toml_text` or `comment`, so it cannot end a line. Vault's roles contain neither the identities nor the CA key:
the operator fills both in, and until then `signer policy check` reports them as missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from signer.errors import BadFile, CertificateMismatch, write_hint
from signer.files import write_new
from signer.model import BACKDATE, OPTION_NAMES, PRINCIPAL, PublicKey
from signer.policy.file import (
    CEILING,
    DEFAULT_CEILING,
    DEFAULT_TTL,
    MAX_ROLE_NAME,
    MIN_RSA_BITS,
    ROLE_NAME,
    parse_policy,
)
from signer.policy.rules import CLOSED_BY_FORCE_COMMAND, check_cidr_list
from signer.ssh.certificate import MAX_PRINCIPALS
from signer.units import cut, plain, render_duration
from signer.vault.parity import compare_roles, errors_in
from signer.vault.role import DEFAULTS, MountTtls, VaultRole, read_vault_role

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
            lines += ["", f"[roles.{role.name if set(role.name) <= _BARE else toml_text(role.name)}]", *role.lines]
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


# --- one role -------------------------------------------------------------------------------------------------------


Outcome = Literal["carried", "stricter", "left out", "default"]
EXTENSIONS: Final = CLOSED_BY_FORCE_COMMAND | {"permit-pty"}
_SHOWN: Final = 300  # characters of a comment
_HOSTS: Final = (
    "allow_bare_domains",
    "allow_subdomains",
    "allowed_domains",
    "allowed_domains_template",
)
_NO_TEMPLATES: Final = "here only {identity} is filled in; write that where the names are the same"


@dataclass(frozen=True, slots=True)
class Account:
    """The outcome of one Vault field, with the reason if it is not simply carried."""

    field: str
    value: object
    outcome: Outcome
    text: str = ""


@dataclass(slots=True)
class ImportedRole:
    """A role's lines for policy.toml; `blockers` lists why it cannot be carried over."""

    name: str
    lines: list[str] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    blockers: list[str] = field(default_factory=list)
    strange: tuple[str, ...] = ()

    @property
    def is_carried(self) -> bool:
        return not self.blockers

    def not_carried(self) -> list[str]:
        """One sentence for each part of the Vault role that is not carried over."""
        texts = [f"the whole role: {text}" for text in self.blockers]
        texts += [f"{one.field}: {one.text}" for one in self.accounts.values() if one.outcome == "left out"]
        return texts + [f"{name}: unknown field" for name in self.strange]

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "carried": self.is_carried,
            "fields": [asdict(one) for one in self.accounts.values()],
            "not_carried": self.not_carried(),
        }


def toml_text(text: str) -> str:
    """A TOML basic string; characters other than printable ASCII are escaped."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if " " <= char <= "~":
        return char
    return f"\\U{ord(char):08X}" if not "\ud800" <= char <= "\udfff" else "?"  # TOML has no lone surrogates


def comment(text: str) -> str:
    return f"# {cut(plain(text), _SHOWN)}"


def import_role(name: str, fields: Mapping[str, Any], mount: MountTtls | None) -> ImportedRole:
    """The role that equals Vault's, or is stricter; raises `Unavailable` if Vault's role is malformed.

    `mount` has the ttls for a role without its own; None if they could not be read.
    """
    vaults = read_vault_role(fields)
    made = _Import(name, vaults)
    made.check_kind()
    made.critical_options()
    made.principals()
    made.ttls(mount)
    made.keys()
    made.extensions()
    made.key_ids()
    made.rest()
    return made.finish()


class _Import:
    def __init__(self, name: str, vaults: VaultRole) -> None:
        self._vaults = vaults
        self._made = ImportedRole(name, strange=vaults.strange)
        self._force_command: str | None = None
        self._verify = False
        self._options: list[tuple[str, str, tuple[str, ...]]] = []

    def finish(self) -> ImportedRole:
        for name, default in DEFAULTS.items():
            if name not in self._made.accounts:
                outcome: Outcome = "default" if self._vaults.raw[name] == default else "carried"
                self._made.accounts[name] = Account(name, self._vaults.raw[name], outcome)
        for key, value, about in self._options:  # after the keys and extensions that they affect
            self._line(key, value, *about)
        self._made.accounts = {name: self._made.accounts[name] for name in DEFAULTS}
        return self._made

    def _account(self, name: str, outcome: Outcome, text: str = "") -> None:
        self._made.accounts[name] = Account(name, self._vaults.raw[name], outcome, text)

    def _note(self, name: str, outcome: Outcome, text: str) -> None:
        self._account(name, outcome, text)
        self._made.lines.append(comment(f"{name}: {text}"))

    def _line(self, key: str, value: str, *about: str) -> None:
        """Adds a key, below the comments on its source fields `about`."""
        self._comment(*about)
        self._made.lines.append(f"{key} = {value}")

    def _comment(self, *names: str) -> None:
        for name in names:
            known = self._made.accounts.get(name)
            if known is not None and known.text:
                self._made.lines.append(comment(f"{name}: {known.text}"))

    def _block(self, text: str) -> None:
        self._made.blockers.append(text)

    def check_kind(self) -> None:
        if ROLE_NAME.fullmatch(self._made.name) is None or len(self._made.name) > MAX_ROLE_NAME:
            self._block("its name is not a valid role name")
        if self._vaults.text("key_type") != "ca":
            self._account("key_type", "left out", "one-time passwords are not supported")
            self._block("its key_type is not ca")
        elif not self._vaults.flag("allow_user_certificates"):
            self._block("allow_user_certificates is false, and signer issues only user certificates")
        if self._vaults.flag("allow_host_certificates"):
            self._note("allow_host_certificates", "left out", "signer issues no host certificates")
        for name in _HOSTS:
            if self._vaults.raw[name] != DEFAULTS[name]:
                self._account(name, "left out", "used only by host certificates, which signer does not issue")

    def critical_options(self) -> None:
        name = "default_critical_options"
        forced = self._vaults.pairs(name)
        if forced:
            self._account(name, "stricter", "pinned: Vault drops them when a request names another option")
        for option, value in forced:
            if option == "force-command" and value.strip() and value.isprintable():
                self._force_command = value
                self._options.append(("force_command", toml_text(value), (name,)))
            elif option == "source-address" and _is_cidr_list(value):
                self._options.append(("source_address", _toml_list(value.split(",")), (name,)))
            elif option == "verify-required":
                self._verify = True
                self._options.append(("verify_required", "true", (name,)))
            else:
                self._block(f"{name} has {option}={value}, which cannot be pinned and must not be dropped")
        self._allowed_options({option for option, _ in forced})

    def _allowed_options(self, pinned: set[str]) -> None:
        name, named = "allowed_critical_options", self._vaults.critical_options
        if self._vaults.any_critical_option:
            more = f"critical_options = {{ allowed = {_toml_list(sorted(OPTION_NAMES - pinned))} }}"
            text = f"Vault lets callers set any option; here none, unless you add {more}"
            self._note(name, "stricter", text)
            return
        kept = sorted(named & OPTION_NAMES - pinned)
        lost = sorted(named - set(kept))
        if lost:
            self._account(name, "stricter", f"not {', '.join(lost)}: pinned, or not an option that callers can set")
        if kept:
            self._options.append(("critical_options", f"{{ allowed = {_toml_list(kept)} }}", (name,)))
        elif lost:
            self._note(name, "stricter", self._made.accounts[name].text)

    def principals(self) -> None:
        vaults, name = self._vaults, "allowed_users"
        defaults = vaults.default_users
        listed = defaults if vaults.any_user else vaults.users
        kept = [user for user in listed if PRINCIPAL.fullmatch(user)]
        lost = [user for user in listed if user not in kept]
        kept = sorted(kept, key=lambda user: user not in defaults)[:MAX_PRINCIPALS]
        if vaults.any_user:
            text = "Vault allows any principal (*); here only those of default_user: add others that may be requested"
            self._account(name, "stricter", text)
        elif lost or len(kept) < len(listed):
            shown = ", ".join(lost[:8]) or f"more than {MAX_PRINCIPALS} names"
            self._account(name, "stricter", f"not {shown}: not a valid principal")
        for template in ("allowed_users_template", "default_user_template"):
            if vaults.flag(template):
                self._note(template, "left out", _NO_TEMPLATES)
        if not kept:
            self._block("no valid principal is left")
        self._line("principals", _toml_list(kept), name)
        self._default_principals(defaults, kept)

    def _default_principals(self, defaults: tuple[str, ...], kept: list[str]) -> None:
        if defaults and set(defaults) <= set(kept):
            self._line("default_principals", _toml_list(defaults))
            return
        if self._vaults.text("default_user").strip(" ,"):
            text = "not all of it is valid, so a request without principals is refused"
            self._note("default_user", "stricter", text)

    def ttls(self, mount: MountTtls | None) -> None:
        vaults = self._vaults
        default, most = vaults.ttls(mount or MountTtls(DEFAULT_TTL, max(vaults.number("ttl"), DEFAULT_CEILING)))
        unset = "" if mount else "; the mount's ttls could not be read, so signer's default applies"
        for name, key, seconds in (("ttl", "default_ttl", default), ("max_ttl", "max_ttl", most)):
            texts = []
            if vaults.number(name) == 0:
                texts.append(f"not set in Vault, where {'the mount applies' if mount else 'a default applies'}{unset}")
            if seconds > CEILING:
                texts.append(f"{render_duration(seconds)} in Vault, at most {render_duration(CEILING)} here")
            if texts:
                self._account(name, "stricter" if seconds > CEILING or mount is None else "carried", "; ".join(texts))
            if seconds < 1:
                self._block(f"{name} is below one second")
                continue
            self._line(key, f'"{render_duration(min(seconds, CEILING))}"', name)

    def keys(self) -> None:
        rules, name = self._vaults.keys(), "allowed_user_key_lengths"
        kinds, texts = set(rules.kinds), []
        sizes = [size for size in rules.rsa_sizes or () if size >= MIN_RSA_BITS]
        bits = min(sizes, default=MIN_RSA_BITS)
        if rules.rsa_sizes is None:
            texts.append(f"Vault accepts any key, even a weak one; here RSA from {bits} bits, 3072 recommended")
        elif sizes:
            texts.append(f"Vault accepts RSA of exactly {_numbers(rules.rsa_sizes)} bits; here {bits} bits or more")
        elif "ssh-rsa" in kinds:
            kinds.discard("ssh-rsa")
            texts.append(f"no RSA: Vault accepts {_numbers(rules.rsa_sizes)} bits, the minimum here is {MIN_RSA_BITS}")
        if rules.unknown:
            texts.append(f"not {', '.join(rules.unknown)}: key types that signer does not certify")
        if self._verify:
            kinds = {kind for kind in kinds if kind.startswith("sk-")}
            texts.append("FIDO keys only, as verify-required applies to no other")
        if texts:
            self._account(name, "stricter", "; ".join(texts))
        if not kinds:
            self._block("no key type is left that signer certifies")
        self._line("key_types", _toml_list(sorted(kinds)), name)
        if "ssh-rsa" in kinds:
            self._made.lines.append(f"rsa_min_bits = {bits}")

    def extensions(self) -> None:
        vaults = self._vaults
        usable = EXTENSIONS - CLOSED_BY_FORCE_COMMAND if self._force_command is not None else EXTENSIONS
        always = vaults.pairs("default_extensions")
        default = sorted(name for name, value in always if name in usable and not value)
        asked = set(usable) if vaults.any_extension else vaults.extensions & usable
        allowed = sorted(asked | set(default))
        beyond = ", or would bypass force_command" if self._force_command is not None else ""
        if vaults.any_extension:
            text = f"any in Vault (*), here the named ones; others do not exist{beyond}"
            self._account("allowed_extensions", "stricter", text)
        elif lost := sorted(vaults.extensions - usable):
            self._account(
                "allowed_extensions", "stricter", f"not {', '.join(lost)}: not available on request here{beyond}"
            )
        elif set(allowed) - vaults.extensions:
            text = "includes those of default_extensions: each certificate has them anyway"
            self._account("allowed_extensions", "carried", text)
        if gone := [name for name, value in always if name not in default or value]:
            self._account("default_extensions", "stricter", f"not {', '.join(gone)}: not available here{beyond}")
        elif always:
            self._account("default_extensions", "carried", "kept when a request names others; Vault drops them")
        if vaults.flag("default_extensions_template"):
            self._note("default_extensions_template", "left out", "extension values are not filled in here")
        about = ("allowed_extensions", "default_extensions")
        if allowed:
            more = f", default = {_toml_list(default)}" if default else ""
            self._line("extensions", f"{{ allowed = {_toml_list(allowed)}{more} }}", *about)
        else:
            self._comment(*about)

    def key_ids(self) -> None:
        if self._vaults.flag("allow_user_key_ids"):
            text = "only letters, digits and ._@=:+/-, as sshd passes it to commands"
            self._account("allow_user_key_ids", "stricter", text)
            self._line("allow_key_id", "true", "allow_user_key_ids")
        if self._vaults.text("key_id_format"):
            text = f"{self._vaults.text('key_id_format')} in Vault; here always IDENTITY:ROLE"
            self._note("key_id_format", "left out", text)

    def rest(self) -> None:
        vaults = self._vaults
        if vaults.number("not_before_duration") != BACKDATE:
            text = f"{vaults.number('not_before_duration')} s in Vault, here always {BACKDATE} s"
            self._note("not_before_duration", "left out", text)
        if vaults.text("algorithm_signer") != "default":
            text = f"{vaults.text('algorithm_signer')} in Vault; an RSA CA key signs with rsa-sha2-512 here"
            self._note("algorithm_signer", "left out", text)
        if vaults.text("issuer_ref") != "default":
            text = f"Vault signs with its issuer {vaults.text('issuer_ref')}; here one CA key signs for all roles"
            self._note("issuer_ref", "left out", text)
        if vaults.flag("allow_empty_principals"):
            text = "a certificate without principals is never issued here"
            self._note("allow_empty_principals", "stricter", text)
        for name in ("allow_commas_in_identity_templates", "allow_wildcards_in_identity_templates"):
            if vaults.flag(name):
                self._note(name, "left out", "a principal here never contains either")


def _is_cidr_list(text: str) -> bool:
    try:
        check_cidr_list(text)
    except ValueError:
        return False
    return True


def _toml_list(names: Iterable[str]) -> str:
    return "[" + ", ".join(map(toml_text, names)) + "]"


def _numbers(sizes: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))
