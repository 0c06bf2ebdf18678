"""Reads the facts for `blockers.py` from Vault, ledger, evidence and hosts. Changes nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from signer.api_client import ApiClient
from signer.errors import BadFormat, SignerError
from signer.migration.config import CutoverFile, DecommissionFacts, decommission_of
from signer.migration.cutover.preconditions import check_operator, plan_value
from signer.migration.decommission.blockers import Blocker, Checks, LedgerFacts, RecordedCutover, blockers
from signer.migration.decommission.snapshot import Origin, check_origin, check_snapshot
from signer.migration.evidence.redact import Guard
from signer.migration.evidence.store import Evidence
from signer.migration.evidence.verify import check_evidence
from signer.migration.plan import PlanPart
from signer.migration.smoke import smoke
from signer.model import RunOutcome
from signer.policy.file import load_policy
from signer.units import parse_timestamp
from signer.vault.admin import VaultAdmin
from signer.vault.audit_log import AuditFacts, read_audit_log
from signer.vault.inventory import Inventory, read_inventory

_TAKES_BACK: Final = {
    *(("rollback", outcome) for outcome in (RunOutcome.APPLIED, RunOutcome.STOPPED, RunOutcome.ROLLBACK_FAILED)),
    *(("cutover", outcome) for outcome in (RunOutcome.ROLLED_BACK, RunOutcome.ROLLBACK_FAILED, RunOutcome.STOPPED)),
}


class Blocked(SignerError):
    """Vault cannot be removed now; `facts["blockers"]` has each reason with its remedy."""


def blocked(found: list[Blocker]) -> Blocked:
    count = f"{len(found)} blocker{'s' if len(found) > 1 else ''}"
    return Blocked(
        "decommission_blocked",
        f"{count} for the removal of Vault: {', '.join(blocker.code for blocker in found)}",
        "resolve each, then: signer decommission plan --config FILE",
        {"blockers": [asdict(one) for one in found]},
    )


@dataclass(frozen=True, slots=True)
class RemovalReadiness:
    inventory: Inventory
    ledger: LedgerFacts
    checks: Checks
    blockers: list[Blocker]


def read_readiness(file: CutoverFile, api: ApiClient) -> RemovalReadiness:
    """Reads Vault, ledger, evidence, audit log and snapshot file, and logs in to every target.

    Raises `SignerError` if Vault or the service does not answer; any other problem is a blocker.
    """
    wanted = decommission_of(file)
    with VaultAdmin(file.vault.address, wanted.admin_token_file, file.vault.ca_file) as vault:
        inventory = read_inventory(vault, file.vault.mount, file.vault.roles)
        clocks = {"Vault": _skew(vault.clock)}
    clocks["the service"] = _skew(api.clock)
    ledger = read_ledger(api)
    if ledger.cutover is not None:
        since = _local_since(file, ledger.cutover)
        ledger = replace(ledger, cutover=replace(ledger.cutover, local_since=since))
    checks = replace(_check(file, wanted, api, inventory, ledger.cutover), clocks=clocks)
    return RemovalReadiness(inventory, ledger, checks, blockers(inventory, ledger, checks, file, int(time.time())))


def _skew(clock: Callable[[], int]) -> int:
    """Another clock minus ours, in seconds; the time that the answer takes is not counted as a difference."""
    before = int(time.time())
    theirs = clock()
    after = int(time.time())
    return theirs - min(max(theirs, before), after)


def read_ledger(api: ApiClient) -> LedgerFacts:
    """The ledger's records of cutovers and of Vault's certificates, and the service's mode."""
    ready = api.ready()
    cutover, taken_back = None, 0
    for row in api.operations():  # newest first
        what = _word(row, "operation"), _word(row, "outcome")
        if what == ("cutover", RunOutcome.APPLIED):
            cutover = RecordedCutover(_number(row, "seq"), _seconds(row, "time"), _word(row, "evidence"))
            break
        if what in _TAKES_BACK:
            taken_back = taken_back or _number(row, "seq")
    newest = next(api.certificates(backend="vault", limit=1), None)
    signed = None
    if newest is not None:
        recorded = api.certificate(_word(newest, "serial")).get("recorded")
        if not isinstance(recorded, dict):
            raise _not_understood()
        signed = _number(recorded, "seq"), _seconds(recorded, "time")
    valid = [_seconds(row, "valid_before") for row in api.certificates(backend="vault", active=True)]
    return LedgerFacts(cutover, taken_back, signed, max(valid, default=0), ready.mode if ready.ready else "")


def _check(
    file: CutoverFile,
    wanted: DecommissionFacts,
    api: ApiClient,
    inventory: Inventory,
    cutover: RecordedCutover | None,
) -> Checks:
    audit, audit_fault = None, None
    commands = (wanted.stop_command, wanted.remove_data_command)
    if wanted.audit_log is not None:
        try:
            audit = _audit(wanted.audit_log, wanted.audit_log_prefix, inventory, cutover)
        except SignerError as error:
            audit_fault = error
    return Checks(
        evidence=() if cutover is None else _evidence_faults(file, api, cutover),
        audit=audit,
        audit_fault=audit_fault,
        snapshot=_snapshot_fault(wanted, inventory, file.vault.mount, cutover.at if cutover else 0),
        smoke=_smoke_fault(file, api),
        missing=tuple(words[0] for words in commands if words and shutil.which(words[0]) is None),
    )


def _audit(log: Path, prefix: str, inventory: Inventory, cutover: RecordedCutover | None) -> AuditFacts:
    own = inventory.own_token
    hashes = frozenset(digest for digest in (own.hashes if own else ()) if digest)
    prefixes = (prefix, *(device.prefix for device in inventory.audit_devices))
    since = cutover.at if cutover else 0
    return read_audit_log(log, since, hashes, prefixes=prefixes, clean=Guard().clean)


def _evidence_faults(file: CutoverFile, api: ApiClient, cutover: RecordedCutover) -> tuple[str, ...]:
    """Problems of the evidence whose digest the ledger holds for that cutover."""
    try:
        folder = _evidence_of(file, cutover)
    except OSError as error:
        return (f"the evidence directory cannot be read: {error.strerror}",)
    if folder is None:
        return ("no directory in it has the digest that the ledger holds",)
    verdict = check_evidence(folder, lambda digest: next(iter(api.operations(evidence=digest)), None))
    return tuple(f"{one.code}: {one.text}" for one in verdict.problems if not one.is_warning)


def _evidence_of(file: CutoverFile, cutover: RecordedCutover) -> Path | None:
    """The directory of that cutover's evidence, None if missing; raises `OSError`."""
    folders = sorted(path for path in file.evidence_dir.iterdir() if path.name.endswith("-cutover"))
    return next((folder for folder in folders if Evidence(folder).digest == cutover.evidence), None)


def _local_since(file: CutoverFile, cutover: RecordedCutover) -> int:
    """When the service was first ready in mode local, from the journal in the cutover's evidence; 0 if unknown."""
    try:
        folder = _evidence_of(file, cutover)
        lines = [] if folder is None else (folder / "journal.jsonl").read_text().splitlines()
        ready = [line for line in map(json.loads, lines) if (line["event"], line.get("step")) == ("step.done", "ready")]
        return int(ready[-1]["at"]) // 1000
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def origin_of(inventory: Inventory, mount: str) -> Origin:
    """What a snapshot of the Vault of this inventory has."""
    is_raft = inventory.storage == "raft"
    servers = frozenset((one.node, one.cluster) for one in inventory.servers if is_raft and one.node)
    return Origin(servers, inventory.index, inventory.uuid_of(mount))


def _snapshot_fault(wanted: DecommissionFacts, inventory: Inventory, mount: str, since: int) -> SignerError | None:
    if wanted.snapshot_file is None:
        return None
    is_raft = inventory.storage == "raft"
    try:
        found = check_snapshot(wanted.snapshot_file, wanted.snapshot_sha256, must_be_raft=is_raft)
        check_origin(found, origin_of(inventory, mount), since)
    except SignerError as error:
        return error
    return None


def _smoke_fault(file: CutoverFile, api: ApiClient) -> SignerError | None:
    try:
        pin = load_policy(file.signer.policy_file, "signer.policy_file").ca.fingerprint
        smoke(file, api.certificate, backend="local", ca_fingerprint=pin)
    except SignerError as error:
        return error
    return None


# --- parts of the plan -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RemovalInputs(PlanPart):
    """Everything that must not change until the end; nothing from Vault, which is gone by then."""

    config: Mapping[str, str]
    cutover: Mapping[str, int | str]
    operator: str
    policy: Mapping[str, str]
    snapshot: Mapping[str, str]
    soak: int
    targets: Mapping[str, str]
    vault: Mapping[str, str]
    commands: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class RemovalState(PlanPart):
    """The service's mode, and Vault's inventory without tokens and leases, which change by themselves and by use."""

    mode: str
    vault: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RemovalGoal(PlanPart):
    """Vault and its data after a removal, in words."""

    vault: str
    data: str


def read_inputs(file: CutoverFile, path: Path, api: ApiClient) -> RemovalInputs:
    """The inputs of a plan; raises `SignerError`."""
    wanted = decommission_of(file)
    policy = load_policy(file.signer.policy_file, "signer.policy_file")
    operator = check_operator(file, policy)
    cutover = read_ledger(api).cutover
    taken: dict[str, str] = {"from": "raft API"}
    if wanted.snapshot_file is not None:
        taken = {"from": str(wanted.snapshot_file), "sha256": wanted.snapshot_sha256}
    return RemovalInputs(
        config={"path": str(path), "digest": file.digest},
        cutover={} if cutover is None else {"event": cutover.seq, "evidence": cutover.evidence},
        operator=operator.name,
        policy={"digest": policy.digest, "ca": policy.ca.fingerprint},
        snapshot=taken,
        soak=wanted.soak,
        targets={target.name: f"{target.user}@{target.host}:{target.port}" for target in file.smoke},
        vault={
            "address": file.vault.address,
            "mount": file.vault.mount,
            "audit_log": str(wanted.audit_log or ""),
            "other_nodes": ", ".join(wanted.other_nodes),
        },
        commands={"stop": wanted.stop_command, "remove_data": wanted.remove_data_command},
    )


def state_of(found: RemovalReadiness) -> RemovalState:
    inventory = found.inventory.as_json()
    for name in ("at", "leases", "tokens", "own_token", "unread", "index"):
        del inventory[name]
    return RemovalState(found.ledger.mode, plan_value(inventory))


# --- the service's answers -------------------------------------------------------------------------------------------


def _word(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _not_understood()
    return value


def _number(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    if type(value) is int:
        return value
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        return int(value)
    raise _not_understood()


def _seconds(row: Mapping[str, Any], name: str) -> int:
    try:
        return parse_timestamp(_word(row, name))
    except (ValueError, OverflowError):
        raise _not_understood() from None


def _not_understood() -> BadFormat:
    return BadFormat("not_our_service", "the answer is not a signing service's ledger", "check signer.address")
