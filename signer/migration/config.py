"""cutover.toml → `CutoverFile`: the platform that moves from Vault to the local CA, and how to reach its parts.

Every problem is reported, and one problem rejects the whole file. The file contains paths of secrets, never a secret.
Its tables are the types below, of which pydantic reads them. Pure except for `load_cutover_file`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Final, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo

from signer.errors import BadFile, SignerError
from signer.files import read_owned
from signer.migration.evidence.redact import Guard
from signer.settings import url_for_tokens
from signer.toml import Duration, Faults, parse_toml

MAX_BYTES: Final = 256 * 1024
KEY_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE"
KEY_FOLDER_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_DIR"
DEFAULT_SOAK: Final = 72 * 3600  # seconds
_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T")


# --- values ----------------------------------------------------------------------------------------------------------


def _path(text: object) -> Path:
    if not (isinstance(text, str) and text.startswith("/") and text.isprintable()):
        raise ValueError("is not an absolute path")
    return Path(text)


def _optional_path(text: object) -> Path | None:
    return None if text == "" else _path(text)


def _form(form: str, what: str) -> AfterValidator:
    """Text that matches the expression `form` as a whole."""

    def check(text: str) -> str:
        if re.fullmatch(form, text, re.ASCII) is None:
            raise ValueError(f"is not a valid {what}")
        return text

    return AfterValidator(check)


def _not_empty(values: tuple[_T, ...]) -> tuple[_T, ...]:
    if not values:
        raise ValueError("is empty: name at least one")
    return values


def _words(words: tuple[str, ...]) -> tuple[str, ...]:
    if any(not word or not word.isprintable() for word in words):
        raise ValueError("has an empty or unprintable word")
    return words


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        is_server = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    return is_server and text.isprintable() and url.username is None and not url.query and not url.fragment


def _address(text: str) -> str:
    if not _is_address(text):
        raise ValueError("is not an address such as http://127.0.0.1:8222 or https://vault.example:8200")
    return url_for_tokens(text)


def _socket_or_address(text: str) -> str:
    return text if text.startswith("unix:/") and text.isprintable() else _address(text)


def _environment(values: Mapping[str, str]) -> dict[str, str]:
    """The variables, with the folder of the key: the overlay mounts it, so that a key which is replaced in it reaches
    the running container."""
    faults = []
    clean = Guard().clean  # plans and evidence show these
    for name, value in values.items():
        if _VARIABLE.fullmatch(name) is None or not value.isprintable():
            faults.append(f"{name} is not a valid variable name, or its value is unprintable")
        if clean(value) != value or clean(f"{name}={value}") != f"{name}={value}":
            faults.append(f"{name} looks like a secret: put it into a file and set the path of the file")
    key = Path(values.get(KEY_VARIABLE, ""))
    if not key.is_absolute():
        faults.append(f"{KEY_VARIABLE} is missing, or not an absolute path")
    if values.get(KEY_FOLDER_VARIABLE, str(key.parent)) != str(key.parent):
        faults.append(f"{KEY_FOLDER_VARIABLE} is not the directory of {KEY_VARIABLE}; leave it out")
    if faults:
        raise ValueError("; ".join(faults))
    return {**values, KEY_FOLDER_VARIABLE: str(key.parent)}


def _allow_list(text: object, info: ValidationInfo) -> Path:
    """The path, by default where the preflight's script itself looks for it."""
    if text not in ("", Path()):
        return _path(text)
    script: Path = info.data.get("script", Path())
    return script.parent.parent.parent / "overlays" / "allow-list.txt"


def _snapshot_sha256(text: str, info: ValidationInfo) -> str:
    if info.data.get("snapshot_file") and _SHA256.fullmatch(text) is None:
        raise ValueError("must be the hex SHA-256 of snapshot_file")
    return text


def _gap(text: object) -> tuple[int, int]:
    """Two RFC 3339 times with a slash between them, as seconds since the epoch."""
    with suppress(ValueError, OverflowError, TypeError, AttributeError):  # the sentence below covers them
        begin, end = (datetime.fromisoformat(part) for part in text.split("/"))  # type: ignore[attr-defined]
        if begin.tzinfo is not None and end.tzinfo is not None and begin < end:
            return int(begin.timestamp()), math.ceil(end.timestamp())
    raise ValueError("is not a time span such as 2026-11-22T03:00:00Z/2026-11-22T06:25:00Z")


def _targets(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    names = [target.name for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is also the name of another target")
    return targets


_AbsolutePath = Annotated[Path, BeforeValidator(_path)]
_OptionalPath = Annotated[Path | None, BeforeValidator(_optional_path)]
_Word = Annotated[str, _form(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}", "name")]
_Program = Annotated[str, _form(r"[\w./-]+", "command")]
_Host = Annotated[str, _form(r"[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,252}[A-Za-z0-9])?", "host name or address")]
_User = Annotated[str, _form(r"[A-Za-z0-9_][A-Za-z0-9._@-]{0,62}", "user name")]
_Address = Annotated[str, AfterValidator(_address)]
_Words = Annotated[tuple[str, ...], AfterValidator(_words)]
_Command = Annotated[_Words, AfterValidator(_not_empty)]


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ComposeFacts:
    """How the service is started: compose command, engine, project, the two files and their variables.

    `other_services` are the only ones that the files may define besides it.
    """

    command: _Command
    engine: _Program
    project: _Word
    base: _AbsolutePath
    overlay: _AbsolutePath
    service: _Word = "safe-session-api"
    environment: Annotated[Mapping[str, str], AfterValidator(_environment), Field(validate_default=True)] = field(
        default_factory=dict
    )
    other_services: tuple[_Word, ...] = ()

    @property
    def key_file(self) -> Path:
        return Path(self.environment[KEY_VARIABLE])


@dataclass(frozen=True, slots=True)
class PreflightFacts:
    """The host's preflight script, its extra arguments, and the list of what compose files may hold."""

    script: _AbsolutePath
    arguments: _Words = ()
    allow_list: Annotated[Path, BeforeValidator(_allow_list), Field(validate_default=True)] = Path()


@dataclass(frozen=True, slots=True)
class SignerFacts:
    address: Annotated[str, AfterValidator(_socket_or_address)]
    token_file: _AbsolutePath
    policy_file: _AbsolutePath
    role: _Word


@dataclass(frozen=True, slots=True)
class VaultFacts:
    address: _Address
    token_file: _AbsolutePath
    roles: Annotated[tuple[_Word, ...], AfterValidator(_not_empty)]
    mount: Annotated[str, AfterValidator(lambda text: text.strip("/")), _form(r"[\w./-]+", "mount")] = "ssh"
    ca_file: _OptionalPath = None


@dataclass(frozen=True, slots=True)
class Target:
    """A host on which logins must work. `trusted_ca_file` is the CA file of its sshd, None if not configured."""

    name: _Word
    host: _Host
    user: _User
    known_hosts: _AbsolutePath
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 22
    trusted_ca_file: _OptionalPath = None


@dataclass(frozen=True, slots=True)
class DecommissionFacts:
    """How Vault is removed. `soak` is seconds; empty commands are not run.

    `audit_gaps` are times, as (begin, end) in seconds since the epoch, for which the operator answers that no entry of
    the audit log is missing. `other_nodes` are addresses of Vault's other nodes, which `stop_command` stops as well.
    """

    admin_token_file: _AbsolutePath
    stop_command: _Command
    remove_data_command: _Words = ()
    soak: Duration = DEFAULT_SOAK
    snapshot_file: _OptionalPath = None
    snapshot_sha256: Annotated[str, AfterValidator(_snapshot_sha256), Field(validate_default=True)] = ""
    audit_log: _OptionalPath = None
    audit_log_prefix: str = ""
    audit_gaps: tuple[Annotated[tuple[int, int], BeforeValidator(_gap)], ...] = ()
    other_nodes: tuple[_Address, ...] = ()


@dataclass(frozen=True, slots=True)
class CutoverFile:
    """One platform. `digest` is `sha256:` and the hash of the file's bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # also for the tables in it

    digest: str
    evidence_dir: _AbsolutePath
    compose: ComposeFacts
    preflight: PreflightFacts
    signer: SignerFacts
    vault: VaultFacts
    smoke: Annotated[tuple[Target, ...], AfterValidator(_not_empty), AfterValidator(_targets)]
    decommission: DecommissionFacts | None = None


def decommission_of(file: CutoverFile) -> DecommissionFacts:
    """The table [decommission] of cutover.toml; raises `SignerError` if it is missing."""
    if file.decommission is None:
        raise SignerError(
            "decommission_not_configured",
            "cutover.toml has no table [decommission]",
            "add it: see runbooks/vault-decommission.md",
        )
    return file.decommission


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
    if "digest" in data:
        faults.add(("digest",), "unknown key")
    return faults.whole(CutoverFile, {**data, "digest": "sha256:" + sha256(raw).hexdigest()})
