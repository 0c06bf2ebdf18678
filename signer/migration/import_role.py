"""One role of Vault's as a table of policy.toml: never wider, and each of its 27 fields accounted for. Pure.

Nothing that Vault says is written but through `toml_text` or `comment`, so no name of Vault's can end a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from signer.model import BACKDATE
from signer.policy.file import CEILING, DEFAULT_CEILING, DEFAULT_TTL, MAX_ROLE_NAME, MIN_RSA_BITS, PRINCIPAL, ROLE_NAME
from signer.policy.rules import CLOSED_BY_FORCE_COMMAND, OPTION_NAMES, check_cidr_list
from signer.ssh.certificate import MAX_PRINCIPALS
from signer.units import plain, render_duration
from signer.vault.role import DEFAULTS, MountTtls, VaultRole, read_vault_role

Outcome = Literal["carried", "stricter", "left out", "default"]
EXTENSIONS: Final = CLOSED_BY_FORCE_COMMAND | {"permit-pty"}
_SHOWN: Final = 300  # characters of a comment
_HOSTS: Final = (
    "allow_bare_domains",
    "allow_subdomains",
    "allowed_domains",
    "allowed_domains_template",
)
_NO_TEMPLATES: Final = "ours fills in {identity} and nothing else; write that where the names are the same"


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one field of Vault's: `outcome`, and why if it is not simply carried."""

    field: str
    value: object
    outcome: Outcome
    text: str = ""


@dataclass(slots=True)
class ImportedRole:
    """A role's lines for policy.toml; `blockers` says why there are none."""

    name: str
    lines: list[str] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    blockers: list[str] = field(default_factory=list)
    strange: tuple[str, ...] = ()

    @property
    def is_carried(self) -> bool:
        return not self.blockers

    def not_carried(self) -> list[str]:
        """A sentence for each thing of Vault's that this role will not have."""
        told = [f"the whole role: {text}" for text in self.blockers]
        told += [f"{one.field}: {one.text}" for one in self.accounts.values() if one.outcome == "left out"]
        return told + [f"{name}: a field that signer does not know" for name in self.strange]

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "carried": self.is_carried,
            "fields": [
                {"field": one.field, "value": one.value, "outcome": one.outcome, "text": one.text}
                for one in self.accounts.values()
            ],
            "not_carried": self.not_carried(),
        }


def toml_text(text: str) -> str:
    """A TOML basic string; whatever is not printable ASCII is an escape."""
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return f"\\{char}"
    if " " <= char <= "~":
        return char
    return f"\\U{ord(char):08X}" if not "\ud800" <= char <= "\udfff" else "?"  # TOML has no lone surrogates


def comment(text: str) -> str:
    """One line of comment."""
    shown = plain(text)
    return f"# {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + '…'}"


def import_role(name: str, fields: Mapping[str, Any], mount: MountTtls | None) -> ImportedRole:
    """The role that equals Vault's, or is stricter; raises `Unavailable` for one that cannot be understood.

    `mount` is what holds where the role has no ttl of its own; None if it could not be read.
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
        for key, value, about in self._options:  # after the keys and extensions that they bear on
            self._line(key, value, *about)
        self._made.accounts = {name: self._made.accounts[name] for name in DEFAULTS}
        return self._made

    def _account(self, name: str, outcome: Outcome, text: str = "") -> None:
        """What became of a field; the sentence stands where the key would."""
        self._made.accounts[name] = Account(name, self._vaults.raw[name], outcome, text)

    def _tell(self, name: str, outcome: Outcome, text: str) -> None:
        self._account(name, outcome, text)
        self._made.lines.append(comment(f"{name}: {text}"))

    def _line(self, key: str, value: str, *about: str) -> None:
        """A key, below the sentences on the fields that it is made of."""
        for name in about:
            known = self._made.accounts.get(name)
            if known is not None and known.text:
                self._made.lines.append(comment(f"{name}: {known.text}"))
        self._made.lines.append(f"{key} = {value}")

    def _block(self, text: str) -> None:
        self._made.blockers.append(text)

    def check_kind(self) -> None:
        if ROLE_NAME.fullmatch(self._made.name) is None or len(self._made.name) > MAX_ROLE_NAME:
            self._block("its name is none that a role can have here")
        if self._vaults.text("key_type") != "ca":
            self._account("key_type", "left out", "one-time passwords are not made here")
            self._block("its key_type is not ca")
        elif not self._vaults.flag("allow_user_certificates"):
            self._block("allow_user_certificates is false, and signer issues no others")
        if self._vaults.flag("allow_host_certificates"):
            self._tell("allow_host_certificates", "left out", "host certificates are not issued here")
        for name in _HOSTS:
            if self._vaults.raw[name] != DEFAULTS[name]:
                self._account(name, "left out", "only of use to host certificates, which are not issued here")

    def critical_options(self) -> None:
        name = "default_critical_options"
        forced = self._vaults.pairs(name)
        if forced:
            self._account(name, "stricter", "pinned: Vault drops them when a caller names another option, ours never")
        for option, value in forced:
            if option == "force-command" and value.strip() and value.isprintable():
                self._force_command = value
                self._options.append(("force_command", toml_text(value), (name,)))
            elif option == "source-address" and _is_cidr_list(value):
                self._options.append(("source_address", _listed(value.split(",")), (name,)))
            elif option == "verify-required":
                self._verify = True
                self._options.append(("verify_required", "true", (name,)))
            else:
                self._block(f"{name} has {option}={value}, which cannot be pinned here, and must not be lost")
        self._allowed_options({option for option, _ in forced})

    def _allowed_options(self, pinned: set[str]) -> None:
        name, named = "allowed_critical_options", self._vaults.critical_options
        if self._vaults.any_critical_option:
            more = f"critical_options = {{ allowed = {_listed(sorted(OPTION_NAMES - pinned))} }}"
            text = f"Vault lets callers set any option; here none, unless you write {more}"
            self._tell(name, "stricter", text)
            return
        kept = sorted(named & OPTION_NAMES - pinned)
        lost = sorted(named - set(kept))
        if lost:
            self._account(name, "stricter", f"not {', '.join(lost)}: pinned, or none that callers can set here")
        if kept:
            self._options.append(("critical_options", f"{{ allowed = {_listed(kept)} }}", (name,)))
        elif lost:
            self._tell(name, "stricter", self._made.accounts[name].text)

    def principals(self) -> None:
        vaults, name = self._vaults, "allowed_users"
        defaults = vaults.default_users
        listed = defaults if vaults.any_user else vaults.users
        kept = [user for user in listed if PRINCIPAL.fullmatch(user)]
        lost = [user for user in listed if user not in kept]
        kept = sorted(kept, key=lambda user: user not in defaults)[:MAX_PRINCIPALS]
        if vaults.any_user:
            text = "Vault lets callers name anybody (*); here only those of default_user: add who else may be named"
            self._account(name, "stricter", text)
        elif lost or len(kept) < len(listed):
            shown = ", ".join(lost[:8]) or f"more than {MAX_PRINCIPALS} names"
            self._account(name, "stricter", f"not {shown}: no principal that can be named here")
        for template in ("allowed_users_template", "default_user_template"):
            if vaults.flag(template):
                self._tell(template, "left out", _NO_TEMPLATES)
        if not kept:
            self._block("no principal is left that could be named here")
        self._line("principals", _listed(kept), name)
        self._default_principals(defaults, kept)

    def _default_principals(self, defaults: tuple[str, ...], kept: list[str]) -> None:
        if defaults and set(defaults) <= set(kept):
            self._line("default_principals", _listed(defaults))
            return
        if self._vaults.text("default_user").strip(" ,"):
            text = "not all of it can be named here, so a request that names nobody is refused"
            self._tell("default_user", "stricter", text)

    def ttls(self, mount: MountTtls | None) -> None:
        vaults = self._vaults
        default, most = vaults.ttls(mount or MountTtls(DEFAULT_TTL, max(vaults.number("ttl"), DEFAULT_CEILING)))
        unset = "" if mount else "; how the mount is tuned could not be read, so it is ours that holds"
        for name, key, seconds in (("ttl", "default_ttl", default), ("max_ttl", "max_ttl", most)):
            told = []
            if vaults.number(name) == 0:
                told.append(f"not set in Vault, where then {'the mount holds' if mount else 'something holds'}{unset}")
            if seconds > CEILING:
                told.append(
                    f"{render_duration(seconds)} in Vault, {render_duration(CEILING)} is the most there is here"
                )
            if told:
                self._account(name, "stricter" if seconds > CEILING or mount is None else "carried", "; ".join(told))
            if seconds < 1:
                self._block(f"{name} is below one second")
                continue
            self._line(key, f'"{render_duration(min(seconds, CEILING))}"', name)

    def keys(self) -> None:
        rules, name = self._vaults.keys(), "allowed_user_key_lengths"
        kinds, told = set(rules.kinds), []
        sizes = [size for size in rules.rsa_sizes or () if size >= MIN_RSA_BITS]
        bits = min(sizes, default=MIN_RSA_BITS)
        if rules.rsa_sizes is None:
            told.append(f"Vault takes any key, weak ones, too; here RSA from {bits} bits, better 3072")
        elif sizes:
            told.append(f"Vault takes RSA of {_numbers(rules.rsa_sizes)} bits exactly; here each from {bits} bits")
        elif "ssh-rsa" in kinds:
            kinds.discard("ssh-rsa")
            told.append(f"no RSA: Vault takes {_numbers(rules.rsa_sizes)} bits, {MIN_RSA_BITS} is the least here")
        if rules.unknown:
            told.append(f"not {', '.join(rules.unknown)}: no kind of key that is certified here")
        if self._verify:
            kinds = {kind for kind in kinds if kind.startswith("sk-")}
            told.append("FIDO keys only, as no other can be held to verify-required")
        if told:
            self._account(name, "stricter", "; ".join(told))
        if not kinds:
            self._block("no kind of key is left that could be certified here")
        self._line("key_types", _listed(sorted(kinds)), name)
        if "ssh-rsa" in kinds:
            self._made.lines.append(f"rsa_min_bits = {bits}")

    def extensions(self) -> None:
        vaults = self._vaults
        usable = EXTENSIONS - CLOSED_BY_FORCE_COMMAND if self._force_command is not None else EXTENSIONS
        always = vaults.pairs("default_extensions")
        default = sorted(name for name, value in always if name in usable and not value)
        asked = set(usable) if vaults.any_extension else vaults.extensions & usable
        allowed = sorted(asked | set(default))
        beyond = ", or would lead past force_command" if self._force_command is not None else ""
        if vaults.any_extension:
            text = f"any in Vault (*), here those that are named; there are no others that sshd knows{beyond}"
            self._account("allowed_extensions", "stricter", text)
        elif lost := sorted(vaults.extensions - usable):
            self._account("allowed_extensions", "stricter", f"not {', '.join(lost)}: not given on request here{beyond}")
        elif set(allowed) - vaults.extensions:
            text = "those of default_extensions are named, too: each certificate has them anyway"
            self._account("allowed_extensions", "carried", text)
        if gone := [name for name, value in always if name not in default or value]:
            self._account("default_extensions", "stricter", f"not {', '.join(gone)}: cannot be given here{beyond}")
        elif always:
            self._account("default_extensions", "carried", "kept when a request names others, where Vault drops them")
        if vaults.flag("default_extensions_template"):
            self._tell("default_extensions_template", "left out", "values of extensions are not filled in here")
        about = ("allowed_extensions", "default_extensions")
        if allowed:
            more = f", default = {_listed(default)}" if default else ""
            self._line("extensions", f"{{ allowed = {_listed(allowed)}{more} }}", *about)
            return
        for name in about:
            if name in self._made.accounts and self._made.accounts[name].text:
                self._made.lines.append(comment(f"{name}: {self._made.accounts[name].text}"))

    def key_ids(self) -> None:
        if self._vaults.flag("allow_user_key_ids"):
            text = "letters, digits and ._@=:+/- only, as sshd hands it to commands"
            self._account("allow_user_key_ids", "stricter", text)
            self._line("allow_key_id", "true", "allow_user_key_ids")
        if self._vaults.text("key_id_format"):
            text = f"{self._vaults.text('key_id_format')} in Vault; here IDENTITY:ROLE, always"
            self._tell("key_id_format", "left out", text)

    def rest(self) -> None:
        vaults = self._vaults
        if vaults.number("not_before_duration") != BACKDATE:
            text = f"{vaults.number('not_before_duration')} s in Vault, {BACKDATE} s here, always"
            self._tell("not_before_duration", "left out", text)
        if vaults.text("algorithm_signer") != "default":
            text = f"{vaults.text('algorithm_signer')} in Vault; an RSA CA key signs with rsa-sha2-512 here"
            self._tell("algorithm_signer", "left out", text)
        if vaults.text("issuer_ref") != "default":
            text = f"Vault signs with its issuer {vaults.text('issuer_ref')}; here one CA key signs for all roles"
            self._tell("issuer_ref", "left out", text)
        if vaults.flag("allow_empty_principals"):
            text = "a certificate that names nobody is never issued here"
            self._tell("allow_empty_principals", "stricter", text)
        for name in ("allow_commas_in_identity_templates", "allow_wildcards_in_identity_templates"):
            if vaults.flag(name):
                self._tell(name, "left out", "neither is ever in a principal here")


def _is_cidr_list(text: str) -> bool:
    try:
        check_cidr_list(text)
    except ValueError:
        return False
    return True


def _listed(names: Iterable[str]) -> str:
    return "[" + ", ".join(map(toml_text, names)) + "]"


def _numbers(sizes: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))
