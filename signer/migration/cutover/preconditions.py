"""What a cutover depends on, as it is now: read, never changed. A plan's digest covers its words and values."""

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
from signer.migration.config import KEY_VARIABLE, CutoverFile
from signer.migration.cutover.steps import SAMPLES
from signer.migration.plan import differences
from signer.migration.trial import trial_lines
from signer.model import Identity
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.vault.admin import VaultAdmin
from signer.vault.parity import compare_roles, errors_in

_MOST: Final = 4 * 1024 * 1024  # bytes of a file that a plan depends on


class NotPossible(SignerError):
    """There is nothing to plan: `code` says why."""


@dataclass(frozen=True, slots=True)
class World:
    """`inputs` must not change until the end, `now` is what the steps change."""

    inputs: Mapping[str, Any]
    now: Mapping[str, Any]
    policy: Policy


def read_world(file: CutoverFile, path: Path, *, may_be_down: bool = False) -> World:
    """Reads all of it; raises `SignerError` for what cannot be read or makes a cutover impossible.

    `may_be_down`: a run that was cut off in the middle may have left no service that answers.
    """
    policy = load_policy(file.signer.policy_file)
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
    inputs = {
        "config": {"path": str(path), "digest": file.digest},
        "files": {name: _file(found) for name, found in _files(file).items()},
        "compose": {
            "command": list(file.compose.command),
            "engine": file.compose.engine,
            "project": file.compose.project,
            "service": file.compose.service,
            "environment": dict(file.compose.environment),
            "merged": {
                "base": compose.config_digest(with_overlay=False),
                "with overlay": compose.config_digest(with_overlay=True),
            },
            "image": compose.image_id(with_overlay=True),
        },
        "policy": {
            "digest": policy.digest,
            "ca": policy.ca.fingerprint,
            "roles": {name: list(role.principals) for name, role in sorted(policy.roles.items())},
        },
        "operator": operator.name,
        "vault": {"address": file.vault.address, "mount": file.vault.mount, "ca": vault_ca, "roles": roles},
        "targets": {
            target.name: {
                "login": f"{target.user}@{target.host}:{target.port}",
                "known_hosts": _file(target.known_hosts),
                "trusted_ca_file": target.trusted_ca_file or "",
            }
            for target in file.smoke
        },
    }
    now = {"mode": ready.mode, "ca": ready.ca_fingerprint, "policy": ready.policy, "ready": ready.ready}
    return World(inputs, now, policy)


def _role(vault: VaultAdmin, mount: str, name: str) -> Any:
    """A role as Vault tells it, None if there is none: one that was removed meanwhile is a difference like others."""
    try:
        return plain(vault.role(mount, name))
    except SignerError as error:
        if error.code != "vault_role_missing":
            raise
        return None


def check_movable(world: World) -> None:
    """Raises `NotPossible` unless the service runs in a mode from which one can move to the local CA."""
    now = world.now
    if not now["ready"]:
        raise NotPossible("service_not_ready", "the service is not ready now", "mend that first: see its /readyz")
    if now["mode"] == "local":
        raise NotPossible("already_local", "the service is in mode local already", "see `signer cutover status`")
    if now["policy"] != world.inputs["policy"]["digest"]:
        raise NotPossible(
            "policy_not_in_force",
            "the service has another policy than signer.policy_file",
            "reload it (SIGHUP), or name the file that it reads",
        )


def check_roles(file: CutoverFile, world: World) -> str:
    """Raises `BadFile` where a role of ours gives more than Vault's; returns a line about the principals."""
    problems, lines = [], []
    for name in file.vault.roles:
        role, vaults = world.policy.roles.get(name), world.inputs["vault"]["roles"][name]
        if role is None:
            problems.append(f"role {name}: policy.toml has no such role, so nobody who has it today could log in")
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
            "policy.toml gives more than Vault's roles, or something else",
            "bring them together: signer cutover parity tells all of it",
            tuple(problems),
        )
    return f"{'; '.join(lines)}, none added"


def check_operator(file: CutoverFile, policy: Policy) -> Identity:
    """Whose token it is; raises `NotPossible` unless it may log in, record the outcome and look into the ledger."""
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
            f"{identity.name} may not ask for {file.signer.role}, so nothing could be proved by logins",
            f"add it to identities.{identity.name}.roles in policy.toml, and reload",
        )
    return identity


def check_files(file: CutoverFile, planned: Mapping[str, Any]) -> None:
    """Raises `Drift` unless the files, and what compose makes of them, are those of a plan's inputs.

    Looked at again right before anything is changed: comparing roles and certificates takes its time.
    """
    found = {
        "files": {name: _file(path) for name, path in _files(file).items()},
        "compose": {"merged": {"with overlay": Compose(file.compose).config_digest(with_overlay=True)}},
    }
    merged = planned["compose"]["merged"]["with overlay"]
    wanted = {"files": planned["files"], "compose": {"merged": {"with overlay": merged}}}
    if problems := tuple(differences(wanted, found, "inputs")):
        raise Drift(
            "plan_drifted",
            f"a file was edited while the cutover was checked: {problems[0]}",
            "look at it, then make a new plan: signer cutover plan",
            problems,
        )


def _files(file: CutoverFile) -> dict[str, Path]:
    return {
        "base": file.compose.base,
        "overlay": file.compose.overlay,
        "preflight": file.preflight.script,
        "policy": file.signer.policy_file,
    }


def _file(path: Path) -> dict[str, str]:
    """A file's path and digest; raises `NotPossible` if it cannot be read."""
    try:
        content = read_bounded(path, _MOST, follow_links=True)
        if len(content) > _MOST:
            raise OSError(27, f"it is larger than {_MOST} bytes")
    except OSError as error:
        raise NotPossible(
            "file_unreadable", f"{path} cannot be read: {error.strerror}", "mend cutover.toml, or the file"
        ) from None
    return {"path": str(path), "sha256": sha256(content).hexdigest()}


def plain(value: object) -> Any:
    """A value of Vault's as a plan can hold it: RFC 8785 with ASCII keys and no fractions."""
    if isinstance(value, Mapping):
        return {ascii(str(key))[1:-1]: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) or (isinstance(value, int) and abs(value) >= 1 << 53):
        return str(value)
    return value


def would_run(file: CutoverFile) -> dict[str, tuple[str, ...]]:
    """The lines that each act of `Hands` would run, for the plan."""
    compose = Compose(file.compose)
    vault = f"{file.vault.address}/v1/{file.vault.mount}"
    signer = file.signer.address
    logins = tuple(f"safe-session ssh -p {t.port} {t.user}@{t.host}" for t in file.smoke)
    return {
        "preflight": (shlex.join(preflight_line(file)),),
        "parity": (
            *(f"GET {vault}/roles/{role}" for role in file.vault.roles),
            *(shlex.join(line) for line in trial_lines(file.compose)),
            f"up to {SAMPLES} x POST {vault}/sign/… and the same to the trial; nobody receives them",
        ),
        "trust": tuple(
            f"{line} cat {t.trusted_ca_file}" if t.trusted_ca_file else f"{t.name}: cannot be read beforehand"
            for line, t in zip(logins, file.smoke, strict=True)
        ),
        "vault_signs": (f"POST {vault}/sign/{file.signer.role} and the same to a trial; nobody receives them",),
        "remember": (f"{file.compose.engine} inspect the container of {file.compose.service}",),
        "up with overlay": (shlex.join(compose.up_line(with_overlay=True)),),
        "up": (shlex.join(compose.up_line(with_overlay=False)),),
        "ready local": (f"GET {signer}/readyz until it is ready in mode local",),
        "ready vault": (f"GET {signer}/readyz until it is ready in mode vault",),
        "smoke local": logins,
        "smoke vault": logins,
        "refuse": (f"POST {signer}/api/sign/{file.signer.role} with a principal outside the policy: must be refused",),
        "seal": (f"SHA256SUMS below {file.evidence_dir}", f"POST {signer}/api/operations with its digest"),
    }


def preflight_line(file: CutoverFile) -> list[str]:
    """The preflight's command line; the key's place and pin are in its environment."""
    files = ["--base", str(file.compose.base), "--overlay", str(file.compose.overlay)]
    return ["bash", str(file.preflight.script), "--json", *files, *file.preflight.arguments]


def preflight_environment(file: CutoverFile, pin: str) -> dict[str, str]:
    """What the preflight is told by its environment."""
    return {
        **file.compose.environment,
        KEY_VARIABLE: str(file.compose.key_file),
        "SAFE_SESSION_CA_FINGERPRINT": pin,
        "PLATFORM_RUNTIME_COMPOSE": shlex.join(file.compose.command),
        "PLATFORM_RUNTIME_ENGINE": file.compose.engine,
    }
