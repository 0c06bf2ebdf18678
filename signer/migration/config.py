"""cutover.toml → `CutoverFile`: the platform that moves from Vault to the local CA, and how to reach its parts.

Every problem is reported, and one problem rejects the whole file. The file contains paths of secrets, never a secret.
Pure except for `load_cutover_file`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import urlsplit

from pydantic import Field

from signer.address import check_url
from signer.errors import BadFile, BadSettings
from signer.files import read_owned
from signer.migration.evidence.redact import Guard
from signer.toml import Duration, Faults, Names, Place, Table, parse_toml

MAX_BYTES: Final = 256 * 1024
KEY_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE"
KEY_FOLDER_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"
DEFAULT_SOAK: Final = 72 * 3600  # seconds
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?", re.ASCII)
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,62}", re.ASCII)
_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T", bound=Table)


@dataclass(frozen=True, slots=True)
class ComposeFacts:
    """How the service is started: compose command, engine, project, the two files and their variables.

    `other_services` are the only ones that the files may define besides it.
    """

    command: tuple[str, ...]
    engine: str
    project: str
    base: Path
    overlay: Path
    service: str
    environment: Mapping[str, str]
    other_services: tuple[str, ...] = ()

    @property
    def key_file(self) -> Path:
        return Path(self.environment[KEY_VARIABLE])


@dataclass(frozen=True, slots=True)
class PreflightFacts:
    """The host's preflight script, its extra arguments, and the list of what compose files may hold."""

    script: Path
    arguments: tuple[str, ...]
    allow_list: Path


@dataclass(frozen=True, slots=True)
class SignerFacts:
    """The service as its operator reaches it."""

    address: str
    token_file: Path
    policy_file: Path
    role: str


@dataclass(frozen=True, slots=True)
class VaultFacts:
    """Vault as the cutover uses it."""

    address: str
    token_file: Path
    mount: str
    roles: tuple[str, ...]
    ca_file: Path | None


@dataclass(frozen=True, slots=True)
class Target:
    """A host on which logins must work. `trusted_ca_file` is the CA file of its sshd, None if not configured."""

    name: str
    host: str
    port: int
    user: str
    known_hosts: Path
    trusted_ca_file: str | None


@dataclass(frozen=True, slots=True)
class DecommissionFacts:
    """How Vault is removed. `soak` is seconds; empty commands are not run.

    `audit_gaps` are times, as (begin, end) in seconds since the epoch, for which the operator answers that no entry of
    the audit log is missing. `other_nodes` are addresses of Vault's other nodes, which `stop_command` stops as well.
    """

    soak: int
    admin_token_file: Path
    snapshot_file: Path | None
    snapshot_sha256: str
    audit_log: Path | None
    stop_command: tuple[str, ...]
    remove_data_command: tuple[str, ...]
    audit_log_prefix: str = ""
    audit_gaps: tuple[tuple[int, int], ...] = ()
    other_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CutoverFile:
    """One platform. `digest` is `sha256:` and the hash of the file's bytes."""

    digest: str
    evidence_dir: Path
    compose: ComposeFacts
    preflight: PreflightFacts
    signer: SignerFacts
    vault: VaultFacts
    smoke: tuple[Target, ...]
    decommission: DecommissionFacts | None


class _RawCompose(Table):
    command: Names | None = None
    engine: str | None = None
    project: str | None = None
    base: str | None = None
    overlay: str | None = None
    service: str = "safe-session-api"
    other_services: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)


class _RawPreflight(Table):
    script: str | None = None
    arguments: list[str] = Field(default_factory=list)
    allow_list: str = ""


class _RawSigner(Table):
    address: str | None = None
    token_file: str | None = None
    policy_file: str | None = None
    role: str | None = None


class _RawVault(Table):
    address: str | None = None
    token_file: str | None = None
    mount: str = "ssh"
    roles: Names | None = None
    ca_file: str = ""


class _RawTarget(Table):
    name: str | None = None
    host: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    user: str | None = None
    known_hosts: str | None = None
    trusted_ca_file: str = ""


class _RawDecommission(Table):
    soak: Duration = DEFAULT_SOAK
    admin_token_file: str | None = None
    snapshot_file: str = ""
    snapshot_sha256: str = ""
    audit_log: str = ""
    audit_log_prefix: str = ""
    audit_gaps: list[str] = Field(default_factory=list)
    other_nodes: list[str] = Field(default_factory=list)
    stop_command: Names | None = None
    remove_data_command: list[str] = Field(default_factory=list)


class _Raw(Table):
    evidence_dir: str | None = None
    compose: dict[str, Any] | None = None
    preflight: dict[str, Any] | None = None
    signer: dict[str, Any] | None = None
    vault: dict[str, Any] | None = None
    smoke: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    decommission: dict[str, Any] | None = None


def load_cutover_file(path: Path) -> CutoverFile:
    """Reads and validates cutover.toml; raises `BadFile` with every problem found."""
    try:
        raw = read_owned(path, MAX_BYTES, path.name)
    except OSError as error:
        raise BadFile(
            "cutover_file_unreadable", f"the cutover file cannot be read: {error.strerror}", "name it with --config"
        ) from None
    return parse_cutover_file(raw, path.name)


def parse_cutover_file(raw: bytes, name: str = "cutover.toml") -> CutoverFile:
    """The file's bytes as its type; raises `BadFile` with every problem found."""
    hint = "fix them; runbooks/safe-session-local-ca-cutover.md shows a whole file"
    faults = Faults("cutover_file_refused", name, hint)
    data = parse_toml(raw, MAX_BYTES, faults)
    reader = _Reader(faults)
    top = faults.table(_Raw, (), data)
    faults.require((), data, "evidence_dir", "compose", "preflight", "signer", "vault", "smoke")
    found = CutoverFile(
        digest="sha256:" + sha256(raw).hexdigest(),
        evidence_dir=reader.path(("evidence_dir",), top.evidence_dir),
        compose=reader.compose(top.compose),
        preflight=reader.preflight(top.preflight),
        signer=reader.signer(top.signer),
        vault=reader.vault(top.vault),
        smoke=reader.targets(top.smoke),
        decommission=None if top.decommission is None else reader.decommission(top.decommission),
    )
    faults.check()
    return found


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        is_server = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    return is_server and text.isprintable() and url.username is None and not url.query and not url.fragment


class _Reader:
    """Converts raw tables to frozen ones; records each problem and substitutes a value of the right type."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def _table(self, kind: type[_T], name: str, data: object, *required: str) -> _T:
        """A table of the file; an absent one is empty, as the top has recorded it."""
        if data is None:
            return kind()
        self._faults.require((name,), data, *required)
        return self._faults.table(kind, (name,), data)

    def path(self, place: Place, text: str | None) -> Path:
        if text is not None and not (text.startswith("/") and text.isprintable()):
            self._faults.add(place, "is not an absolute path")
        return Path(text or "/")

    def _optional_path(self, place: Place, text: str) -> Path | None:
        return self.path(place, text) if text else None

    def _word(self, place: Place, text: str | None, form: re.Pattern[str], what: str) -> str:
        if text is not None and form.fullmatch(text) is None:
            self._faults.add(place, f"is not a valid {what}")
        return text or ""

    def _command(self, place: Place, words: list[str] | None) -> tuple[str, ...]:
        if any(not word or not word.isprintable() for word in words or ()):
            self._faults.add(place, "has an empty or unprintable word")
        return tuple(words or ())

    def _address(self, place: Place, text: str | None, *, may_be_socket: bool = False) -> str:
        if text is None or (may_be_socket and text.startswith("unix:/") and text.isprintable()):
            return text or ""
        if not _is_address(text):
            self._faults.add(place, "is not an address such as http://127.0.0.1:8222 or https://vault.example:8200")
            return ""
        try:
            check_url(text, "it")
        except BadSettings as error:
            self._faults.add(place, f"{error.text.removeprefix('it ')}; {error.hint}")
        return text.rstrip("/")

    def _gap(self, place: Place, text: str) -> tuple[int, int]:
        """Two RFC 3339 times with a slash between them, as seconds since the epoch."""
        with suppress(ValueError, OverflowError, TypeError):  # the fault below covers them
            begin, end = (datetime.fromisoformat(part) for part in text.split("/"))
            if begin.tzinfo is not None and end.tzinfo is not None and begin < end:
                return int(begin.timestamp()), math.ceil(end.timestamp())
        self._faults.add(place, "is not a time span such as 2026-11-22T03:00:00Z/2026-11-22T06:25:00Z")
        return 0, 0

    def compose(self, data: object) -> ComposeFacts:
        required = ("command", "engine", "project", "base", "overlay", "environment")
        raw = self._table(_RawCompose, "compose", data, *required)
        if data is not None and KEY_VARIABLE not in raw.environment:
            self._faults.add(("compose", "environment"), f"{KEY_VARIABLE} is missing (path of the CA key file)")
        guard = Guard()  # plans and evidence show these
        for name, value in raw.environment.items():
            at = ("compose", "environment", name)
            if _VARIABLE.fullmatch(name) is None or not value.isprintable():
                self._faults.add(at, "is not a valid variable name, or its value is unprintable")
            if guard.clean(value) != value or guard.clean(f"{name}={value}") != f"{name}={value}":
                self._faults.add(at, "looks like a secret: put it into a file and set the path of the file")
        environment = dict(raw.environment)
        if KEY_VARIABLE in environment:
            key = self.path(("compose", "environment", KEY_VARIABLE), environment[KEY_VARIABLE])
            # The overlay mounts the folder, so that a key which is replaced in it reaches the running container.
            if environment.setdefault(KEY_FOLDER_VARIABLE, str(key.parent)) != str(key.parent):
                place = ("compose", "environment", KEY_FOLDER_VARIABLE)
                self._faults.add(place, f"is not the directory of {KEY_VARIABLE}; leave it out")
        return ComposeFacts(
            command=self._command(("compose", "command"), raw.command),
            engine=self._word(("compose", "engine"), raw.engine, re.compile(r"[\w./-]+"), "command"),
            project=self._word(("compose", "project"), raw.project, _WORD, "project name"),
            base=self.path(("compose", "base"), raw.base),
            overlay=self.path(("compose", "overlay"), raw.overlay),
            service=self._word(("compose", "service"), raw.service, _WORD, "service name"),
            environment=environment,
            other_services=tuple(
                self._word(("compose", "other_services", at), name, _WORD, "service name")
                for at, name in enumerate(raw.other_services)
            ),
        )

    def preflight(self, data: object) -> PreflightFacts:
        raw = self._table(_RawPreflight, "preflight", data, "script")
        arguments = self._command(("preflight", "arguments"), raw.arguments)
        script = self.path(("preflight", "script"), raw.script)
        beside = script.parent.parent.parent / "overlays" / "allow-list.txt"  # as the script itself looks for it
        return PreflightFacts(
            script, arguments, self._optional_path(("preflight", "allow_list"), raw.allow_list) or beside
        )

    def signer(self, data: object) -> SignerFacts:
        raw = self._table(_RawSigner, "signer", data, "address", "token_file", "policy_file", "role")
        return SignerFacts(
            address=self._address(("signer", "address"), raw.address, may_be_socket=True),
            token_file=self.path(("signer", "token_file"), raw.token_file),
            policy_file=self.path(("signer", "policy_file"), raw.policy_file),
            role=self._word(("signer", "role"), raw.role, _WORD, "role name"),
        )

    def vault(self, data: object) -> VaultFacts:
        raw = self._table(_RawVault, "vault", data, "address", "token_file", "roles")
        roles = tuple(
            self._word(("vault", "roles", at), role, _WORD, "role name") for at, role in enumerate(raw.roles or ())
        )
        return VaultFacts(
            address=self._address(("vault", "address"), raw.address),
            token_file=self.path(("vault", "token_file"), raw.token_file),
            mount=self._word(("vault", "mount"), raw.mount.strip("/"), re.compile(r"[\w./-]+"), "mount"),
            roles=roles,
            ca_file=self._optional_path(("vault", "ca_file"), raw.ca_file),
        )

    def targets(self, data: list[dict[str, Any]] | None) -> tuple[Target, ...]:
        found: list[Target] = []
        for at, table in enumerate(data or ()):
            place = ("smoke", at)
            raw = self._faults.table(_RawTarget, place, table)
            self._faults.require(place, table, "name", "host", "user", "known_hosts")
            if raw.name is not None and any(raw.name == other.name for other in found):
                self._faults.add((*place, "name"), "is also the name of another target")
            trusted = raw.trusted_ca_file
            found.append(
                Target(
                    name=self._word((*place, "name"), raw.name, _WORD, "name"),
                    host=self._word((*place, "host"), raw.host, _HOST, "host name or address"),
                    port=raw.port,
                    user=self._word((*place, "user"), raw.user, _USER, "user name"),
                    known_hosts=self.path((*place, "known_hosts"), raw.known_hosts),
                    trusted_ca_file=str(self.path((*place, "trusted_ca_file"), trusted)) if trusted else None,
                )
            )
        return tuple(found)

    def decommission(self, data: object) -> DecommissionFacts:
        place = ("decommission",)
        raw = self._table(_RawDecommission, "decommission", data, "admin_token_file", "stop_command")
        if raw.snapshot_file and _SHA256.fullmatch(raw.snapshot_sha256) is None:
            self._faults.add((*place, "snapshot_sha256"), "must be the hex SHA-256 of snapshot_file")
        return DecommissionFacts(
            soak=raw.soak,
            admin_token_file=self.path((*place, "admin_token_file"), raw.admin_token_file),
            snapshot_file=self._optional_path((*place, "snapshot_file"), raw.snapshot_file),
            snapshot_sha256=raw.snapshot_sha256,
            audit_log=self._optional_path((*place, "audit_log"), raw.audit_log),
            stop_command=self._command((*place, "stop_command"), raw.stop_command),
            remove_data_command=self._command((*place, "remove_data_command"), raw.remove_data_command),
            audit_log_prefix=raw.audit_log_prefix,
            audit_gaps=tuple(self._gap((*place, "audit_gaps", at), gap) for at, gap in enumerate(raw.audit_gaps)),
            other_nodes=tuple(
                self._address((*place, "other_nodes", at), node) for at, node in enumerate(raw.other_nodes)
            ),
        )
