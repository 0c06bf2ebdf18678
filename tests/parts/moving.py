"""A cutover with all its parts played: Vault, host, service and ledger, and actions without effect, for transcripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from signer.api_client import Readiness
from signer.errors import SignerError, Unavailable
from signer.migration.config import CutoverFile
from signer.migration.cutover.actions import Backend
from signer.migration.cutover.preconditions import (
    ComposeInputs,
    CutoverInputs,
    PolicyInputs,
    Preconditions,
    ServiceState,
    VaultInputs,
)
from signer.migration.journal import platform_lock
from signer.migration.plan import Observation, read_plan
from signer.migration.run import Run, open_run
from signer.migration.smoke import SmokeFailed
from signer.model import RunOutcome
from signer.policy.file import parse_policy
from signer.vault.role import DEFAULTS
from tests.parts.removal import CONFIG

VAULTS_CA: Final = f"SHA256:{'V' * 43}"
START: Final = 1_800_000_000  # seconds since the epoch
OUR_CA: Final = f"SHA256:{'L' * 43}"
_POLICY: Final = f"""\
[ca]
fingerprint = "{OUR_CA}"
[roles.llmops]
principals = ["llmops"]
default_principals = ["llmops"]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519"]
[identities.operator]
kind = "human"
roles = ["llmops"]
may = ["operate", "ledger.read"]
tokens = [{{ sha256 = "{"ab" * 32}", expires = 2099-01-01T00:00:00Z }}]
"""


@dataclass
class PlayedPlatform:
    """What is there; `case` is what is wrong with it, or the mode that it is in."""

    case: str
    mode: str
    recorded: list[dict[str, Any]] = field(default_factory=list)

    def preconditions(self, file: CutoverFile, path: Path, *, may_be_down: bool = False) -> Preconditions:
        """What `read_preconditions` finds."""
        policy = parse_policy(_POLICY.encode())
        ready = self.ready(may_be_down)
        role = {
            **DEFAULTS,
            "allow_user_certificates": True,
            "allowed_users": "llmops,deploy" if self.case == "widened" else "llmops",
            "default_user": "llmops" if self.case != "narrow" else "",
            "ttl": 900,
            "max_ttl": 60 if self.case == "narrow" else 1800,
        }
        compose, digest = file.compose, {"path": "/played", "sha256": "0" * 64}
        inputs = CutoverInputs(
            config={"path": str(path), "digest": file.digest},
            files={"base": digest, "overlay": digest},
            compose=ComposeInputs(
                compose.command, compose.engine, compose.project, compose.service, {}, {}, {}, {}, "a" * 64
            ),
            policy=PolicyInputs(policy.digest, OUR_CA, {"llmops": ("llmops",)}),
            operator="operator",
            vault=VaultInputs(file.vault.address, file.vault.mount, VAULTS_CA, {"llmops": role}),
            targets={"edge1": {"login": "llmops@edge1.example:22", "known_hosts": digest, "trusted_ca_file": ""}},
        )
        now = ServiceState(ready.mode, ready.ca_fingerprint, policy.digest, ready.ready)
        return Preconditions(inputs, now, policy)

    def ready(self, may_be_down: bool = False) -> Readiness:
        """What /readyz says."""
        if self.mode:
            return Readiness(True, self.mode, VAULTS_CA if self.mode == "vault" else OUR_CA)
        if may_be_down:
            return Readiness(False)
        raise Unavailable(
            "service_down",
            "cannot reach the signing service at http://127.0.0.1:8222: connection refused",
            "check signer.address, and that the service runs",
        )


class PlayedApi:
    """A service whose ledger holds what it is told."""

    def __init__(self, platform: PlayedPlatform) -> None:
        self._platform = platform

    def __enter__(self) -> PlayedApi:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing is open."""

    def ready(self) -> Readiness:
        return self._platform.ready()

    def record(
        self, operation: str, outcome: str, plan: str = "", evidence: str = "", reason: str = ""
    ) -> dict[str, Any]:
        told = {"operation": operation, "outcome": outcome, "plan": plan, "evidence": evidence, "reason": reason}
        self._platform.recorded.append({**told, "seq": 61 + len(self._platform.recorded), "hash": "c" * 64})
        return self._platform.recorded[-1]

    def operations(self, evidence: str | None = None) -> list[dict[str, Any]]:
        return [one for one in self._platform.recorded if one["evidence"] == evidence]


class PlayedActions:
    """Actions that report what the real ones observed on a platform of podman's."""

    def __init__(self, platform: PlayedPlatform) -> None:
        self._platform = platform

    def begin(self, run: Run) -> None:
        self._run = run

    def preflight(self) -> Observation:
        return Observation("ready: 31 ok")

    def parity(self) -> Observation:
        return Observation("llmops -> llmops, none added; 20 samples, 0 errors")

    def trust(self) -> Observation:
        return Observation(f"edge1: sshd accepts certificates of {OUR_CA} for llmops")

    def vault_signs(self) -> Observation:
        if self._platform.case == "sealed":
            raise Unavailable("vault_sealed", "Vault is sealed", "unseal Vault")
        return Observation("Vault signs for role llmops")

    def record_state(self) -> Observation:
        now = f"mode {self._platform.mode}" if self._platform.mode else "not ready: service_down"
        return Observation(f"{now}, container 4ad29a7ce1ad")

    def up(self, *, with_overlay: bool) -> Observation:
        if self._platform.case == "stuck" and not with_overlay:
            raise SignerError(
                "compose_failed", "podman-compose ended with status 125", "what it said is in the evidence"
            )
        self._platform.mode = "local" if with_overlay else "vault"
        return Observation("compose took 1.8 s")

    def is_up(self, *, with_overlay: bool) -> bool:
        return self._platform.mode == ("local" if with_overlay else "vault")

    def ready(self, backend: Backend) -> Observation:
        return Observation(f"mode {backend}, CA {VAULTS_CA if backend == 'vault' else OUR_CA}")

    def smoke(self, backend: Backend) -> Observation:
        if backend == "local" and self._platform.case in ("untrusted", "stuck"):
            raise SmokeFailed(
                "smoke_login_failed",
                "edge1: llmops@edge1.example: Permission denied (publickey); "
                f"it does not accept certificates of {OUR_CA}",
                "check that TrustedUserCAKeys of its sshd_config has that CA and that the principal is allowed",
            )
        return Observation("logins work on 1 of 1")

    def refuse(self) -> Observation:
        return Observation("refused for root")

    def seal(self) -> Observation:
        return self._run.conclude(RunOutcome.APPLIED)


def play_move(environ: pytest.MonkeyPatch, folder: Path, case: str) -> None:
    """Writes cutover.toml, and has `signer cutover` find a platform in mode `vault` or `local`, or `down`, or one of
    these: Vault `sealed`, its role `widened` or `narrow`, edge1 `untrusted`, and then compose `stuck`; or a run of
    plan.json that was `killed` while compose replaced the container."""
    (folder / "cutover.toml").write_text(CONFIG.replace("<dir>", str(folder)))
    mode = {"sealed": "local", "local": "local", "down": "", "killed": ""}.get(case, "vault")
    platform = PlayedPlatform(case, mode)
    for name, value in {
        "open_run": partial(open_run, clock=_clock(folder)),
        "ApiClient": lambda _address, _token_file: PlayedApi(platform),
        "read_preconditions": platform.preconditions,
        "CutoverActions": lambda _file, _api: PlayedActions(platform),
    }.items():
        environ.setattr(f"signer.cli.moves.{name}", value)
    if case == "killed":
        _leave_open(folder, PlayedApi(platform))


def _clock(folder: Path) -> Callable[[], float]:
    """A minute for each run that there is, so that no two are of the same time."""
    return lambda: START + 60 * len(list((folder / "evidence").glob("*-*")))


def _leave_open(folder: Path, api: PlayedApi) -> None:
    plan = read_plan((folder / "plan.json").read_text(), "cutover")
    with (
        platform_lock(folder / "evidence", folder / "evidence"),
        open_run(folder / "evidence", "cutover", plan, None, api, clock=_clock(folder)) as run,
    ):
        for step in ("preflight", "parity", "trust", "remember"):
            run.journal.write("step.began", step=step)
            run.journal.write("step.done", step=step, seconds=0.1, summary="")
        run.journal.write("step.began", step="up")
