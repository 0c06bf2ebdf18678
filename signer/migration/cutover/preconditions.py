"""Reads the preconditions of a cutover; changes nothing. The digest of a plan covers their names and values."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from signer.api_client import ApiClient, Readiness
from signer.errors import BadFile, Drift, NotAuthenticated, SignerError, Unavailable
from signer.files import read_bounded, read_secret_word
from signer.migration.compose import Compose
from signer.migration.compose_files import digest_of, digests_read, services_of
from signer.migration.config import KEY_VARIABLE, CutoverFile
from signer.migration.plan import PlanPart, differences
from signer.model import Identity
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.vault.admin import VaultAdmin
from signer.vault.parity import compare_roles, errors_in

_MOST: Final = 4 * 1024 * 1024  # bytes of a file that a plan depends on


class NotPossible(SignerError):
    """A cutover cannot be planned; `code` is the reason."""


@dataclass(frozen=True, slots=True)
class ComposeInputs:
    """The compose command, and what it makes of its files.

    `merged` are the digests of the merged configuration (without and with the overlay), `reads` those of every other
    file that compose reads (`absent` for one that does not exist), `other_services` those of each other service.
    """

    command: tuple[str, ...]
    engine: str
    project: str
    service: str
    environment: Mapping[str, str]
    merged: Mapping[str, str]
    reads: Mapping[str, str]
    other_services: Mapping[str, str]
    image: str


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """policy.toml: its digest, the CA that it pins, and the principals of each role."""

    digest: str
    ca: str
    roles: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class VaultInputs:
    """Vault's SSH mount: its CA, and each role as Vault returns it (None if it does not exist)."""

    address: str
    mount: str
    ca: str
    roles: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CutoverInputs(PlanPart):
    """Everything that must not change until the end of a cutover; of a file its path and hex SHA-256."""

    config: Mapping[str, str]
    files: Mapping[str, Mapping[str, str]]
    compose: ComposeInputs
    policy: PolicyInputs
    operator: str
    vault: VaultInputs
    targets: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class ServiceState(PlanPart):
    """The service as its /readyz describes it, before a cutover."""

    mode: str
    ca: str
    policy: str
    ready: bool


@dataclass(frozen=True, slots=True)
class CutoverGoal(PlanPart):
    """The service after a cutover: its mode and the fingerprint of its CA."""

    mode: str
    ca: str


@dataclass(frozen=True, slots=True)
class Preconditions:
    """`inputs` must not change until the end, the steps change `now`."""

    inputs: CutoverInputs
    now: ServiceState
    policy: Policy


def read_preconditions(file: CutoverFile, path: Path, *, may_be_down: bool = False) -> Preconditions:
    """Reads all of them; raises `SignerError` if one cannot be read or makes a cutover impossible.

    `may_be_down`: an interrupted run may have left a service that does not answer.
    """
    policy = load_policy(file.signer.policy_file, "signer.policy_file")
    operator = check_operator(file, policy)
    compose = Compose(file.compose)
    with VaultAdmin(file.vault.address, file.vault.token_file, file.vault.ca_file) as vault:
        roles = {name: _role(vault, file.vault.mount, name) for name in file.vault.roles}
        vault_ca = vault.ca_public_key(file.vault.mount).fingerprint
    try:
        with ApiClient(file.signer.address, file.signer.token_file) as api:
            ready = api.ready()
    except Unavailable:
        if not may_be_down:
            raise
        ready = Readiness(False)
    inputs = CutoverInputs(
        config={"path": str(path), "digest": file.digest},
        files={name: _file(found) for name, found in _files(file).items()},
        compose=ComposeInputs(
            command=file.compose.command,
            engine=file.compose.engine,
            project=file.compose.project,
            service=file.compose.service,
            environment=dict(file.compose.environment),
            merged={
                "base": compose.config_digest(with_overlay=False),
                "with overlay": compose.config_digest(with_overlay=True),
            },
            **_read_by_compose(file, compose),
            image=compose.image_id(with_overlay=True),
        ),
        policy=PolicyInputs(
            digest=policy.digest,
            ca=policy.ca.fingerprint,
            roles={name: role.principals for name, role in sorted(policy.roles.items())},
        ),
        operator=operator.name,
        vault=VaultInputs(file.vault.address, file.vault.mount, vault_ca, roles),
        targets={
            target.name: {
                "login": f"{target.user}@{target.host}:{target.port}",
                "known_hosts": _file(target.known_hosts),
                "trusted_ca_file": str(target.trusted_ca_file or ""),
            }
            for target in file.smoke
        },
    )
    return Preconditions(inputs, ServiceState(ready.mode, ready.ca_fingerprint, ready.policy, ready.ready), policy)


def _read_by_compose(file: CutoverFile, compose: Compose) -> dict[str, dict[str, str]]:
    """`reads` and `other_services` of `ComposeInputs`."""
    content = compose.content(with_overlay=True)
    others = {name: one for name, one in services_of(content).items() if name != file.compose.service}
    return {
        "reads": digests_read(file.compose.base, file.compose.overlay, content),
        "other_services": {name: digest_of(one) for name, one in sorted(others.items())},
    }


def _role(vault: VaultAdmin, mount: str, name: str) -> Any:
    """A role as Vault returns it, None if it does not exist: a removed role is a difference like others."""
    try:
        return plan_value(vault.role(mount, name))
    except SignerError as error:
        if error.code != "vault_role_missing":
            raise
        return None


def check_movable(found: Preconditions) -> None:
    """Raises `NotPossible` unless the service is in a mode from which it can move to the local CA."""
    now = found.now
    if not now.ready:
        raise NotPossible("service_not_ready", "the service is not ready now", "fix that first: see its /readyz")
    if now.mode == "local":
        raise NotPossible("already_local", "the service is in mode local already", "see `signer cutover status`")
    if now.policy != found.inputs.policy.digest:
        raise NotPossible(
            "policy_not_in_force",
            "the service has another policy than signer.policy_file",
            "reload it (SIGHUP), or name the file that it reads",
        )


def check_roles(file: CutoverFile, found: Preconditions) -> str:
    """Raises `BadFile` if a role grants more than Vault's; returns a line about the principals."""
    problems, lines = [], []
    for name in file.vault.roles:
        role, vaults = found.policy.roles.get(name), found.inputs.vault.roles[name]
        if role is None:
            problems.append(f"role {name}: policy.toml has no such role, so its current users could not log in")
            continue
        if vaults is None:
            problems.append(f"role {name}: Vault has no such role")
            continue
        wider = errors_in(compare_roles(vaults, role))
        problems += [f"role {name}: {one.field}: {one.why} (ours {one.ours}, Vault's {one.vaults})" for one in wider]
        before = ",".join(sorted(part.strip() for part in str(vaults.get("allowed_users", "")).split(",")))
        lines.append(f"{before} -> {','.join(sorted(role.principals))}")
    if problems:
        raise BadFile(
            "parity_differs",
            "policy.toml grants more than Vault's roles, or differs from them",
            "align them: see signer cutover parity",
            tuple(problems),
        )
    return f"{'; '.join(lines)}, none added"


def check_operator(file: CutoverFile, policy: Policy) -> Identity:
    """The identity of the operator's token; raises `NotPossible` if it lacks a role or right that a run needs."""
    token = read_secret_word(file.signer.token_file, "signer.token_file")
    try:
        identity = policy.authenticate(token, int(time.time()))[0]
    except NotAuthenticated:
        raise NotPossible(
            "operator_unknown",
            "policy.toml does not know the token in signer.token_file, or it has expired",
            "make one: signer token new",
        ) from None
    missing = [right for right in ("operate", "ledger.read") if right not in identity.may]
    if missing:
        raise NotPossible(
            "operator_lacks_right",
            f"{identity.name} lacks the right {' and '.join(missing)}",
            f"add it to identities.{identity.name}.may in policy.toml, and reload",
        )
    if file.signer.role not in identity.roles:
        raise NotPossible(
            "operator_lacks_role",
            f"{identity.name} may not request {file.signer.role}, so logins could not be tested",
            f"add it to identities.{identity.name}.roles in policy.toml, and reload",
        )
    return identity


def check_files(file: CutoverFile, planned: Mapping[str, Any]) -> None:
    """Raises `Drift` unless the files and their merged configuration match a plan's inputs.

    Called right before the first change, as the comparison of roles and certificates takes time.
    """
    compose, before = Compose(file.compose), planned["compose"]
    merged = {**before["merged"], "with overlay": compose.config_digest(with_overlay=True)}
    wanted = {"files": planned["files"], "compose": before}
    found = {
        "files": {name: _file(path) for name, path in _files(file).items()},
        "compose": {**before, "merged": merged, **_read_by_compose(file, compose)},
    }
    if problems := tuple(differences(wanted, found, "inputs")):
        raise Drift(
            "plan_drifted",
            f"a file was edited during the checks of the cutover: {problems[0]}",
            "review it, then make a new plan: signer cutover plan",
            problems,
        )


def _files(file: CutoverFile) -> dict[str, Path]:
    return {
        "base": file.compose.base,
        "overlay": file.compose.overlay,
        "preflight": file.preflight.script,
        "allow list": file.preflight.allow_list,
        "policy": file.signer.policy_file,
    }


def _file(path: Path) -> dict[str, str]:
    """A file and its digest; raises `NotPossible` if it cannot be read."""
    try:
        content = read_bounded(path, _MOST, follow_links=True)
        if len(content) > _MOST:
            raise OSError(27, f"it is larger than {_MOST} bytes")
    except OSError as error:
        raise NotPossible(
            "file_unreadable", f"{path} cannot be read: {error.strerror}", "fix cutover.toml, or the file"
        ) from None
    return {"path": str(path), "sha256": sha256(content).hexdigest()}


def plan_value(value: object) -> Any:
    """A Vault value as a plan can contain it: RFC 8785 with ASCII keys and no fractions."""
    if isinstance(value, Mapping):
        return {ascii(str(key))[1:-1]: plan_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plan_value(item) for item in value]
    if isinstance(value, float) or (isinstance(value, int) and abs(value) >= 1 << 53):
        return str(value)
    return value


def preflight_line(file: CutoverFile) -> list[str]:
    """The preflight's command line; the key's path and pin are in its environment."""
    files = ["--base", str(file.compose.base), "--overlay", str(file.compose.overlay)]
    files += ["--allow-list", str(file.preflight.allow_list)]
    others = [word for name in file.compose.other_services for word in ("--other-service", name)]
    return ["/bin/bash", "-p", str(file.preflight.script), "--json", *files, *others, *file.preflight.arguments]


def preflight_environment(file: CutoverFile, policy: Policy) -> dict[str, str]:
    """The environment variables of the preflight. The account and the principals are those of the smoke logins."""
    logins: dict[str, str] = {}
    if len(users := {target.user for target in file.smoke}) == 1:
        logins["SAFE_SESSION_LOGIN_USER"] = users.pop()
    role = policy.roles.get(file.signer.role)
    if role is not None and role.default_principals and not any("{" in name for name in role.default_principals):
        logins["SAFE_SESSION_PRINCIPALS"] = ",".join(role.default_principals)
    return {
        **logins,
        **file.compose.environment,
        KEY_VARIABLE: str(file.compose.key_file),
        "SAFE_SESSION_CA_FINGERPRINT": policy.ca.fingerprint,
        "PLATFORM_RUNTIME_COMPOSE": shlex.join(file.compose.command),
        "PLATFORM_RUNTIME_ENGINE": file.compose.engine,
    }
