"""Blockers that prevent the removal of Vault, computed from facts that `survey.py` reads. Pure.

Each blocker has a stable code, the finding and the remedy; any blocker prevents a plan. Facts that could not be read
also block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from signer.errors import SignerError
from signer.migration.config import CutoverFile, DecommissionFacts, decommission_of
from signer.units import listed, render_duration, timestamp
from signer.vault.audit_log import AuditFacts
from signer.vault.inventory import BUILTIN, SNAPSHOT, Inventory

MAX_SKEW: Final = 60  # seconds between the clocks
AUDIT_MAY_BE_OLD: Final = 3600  # seconds since the newest entry of the log, which may be a copy
TOKEN_MUST_LAST: Final = 600  # seconds
SHOWN: Final = 20  # names


@dataclass(frozen=True, slots=True)
class Blocker:
    """One reason against the removal of Vault now."""

    code: str
    what: str
    do: str


@dataclass(frozen=True, slots=True)
class RecordedCutover:
    """The newest successful cutover of the ledger. `at` is seconds since the epoch, `seq` its event.

    `local_since` is the second in which the service was ready in mode local, before `at`; 0 if unknown.
    """

    seq: int
    at: int
    evidence: str
    local_since: int = 0


@dataclass(frozen=True, slots=True)
class LedgerFacts:
    """Facts from the ledger and the service.

    `rolled_back` is the event that reverted the cutover, 0 if none; `vault_signed` the newest certificate of Vault, as
    (event, seconds), None if none; `vault_valid_until` the latest end of those that are valid now, 0 if none is. `mode`
    is the service's, "" if it is not ready.
    """

    cutover: RecordedCutover | None
    rolled_back: int
    vault_signed: tuple[int, int] | None
    vault_valid_until: int
    mode: str


@dataclass(frozen=True, slots=True)
class Checks:
    """Results of checks; each is None or empty if it found no problem.

    `evidence` lists problems of the cutover's evidence, `missing` commands that do not exist. `audit` is None if no
    audit log is configured, or if it cannot be read (`audit_fault`). `clocks` are the clocks of Vault and of the
    service, each minus ours, in seconds, by name.
    """

    evidence: tuple[str, ...]
    audit: AuditFacts | None
    audit_fault: SignerError | None
    snapshot: SignerError | None
    smoke: SignerError | None
    missing: tuple[str, ...] = ()
    clocks: Mapping[str, int] = field(default_factory=dict)


def blockers(inventory: Inventory, ledger: LedgerFacts, checks: Checks, file: CutoverFile, now: int) -> list[Blocker]:
    """All blockers at `now` (seconds since the epoch)."""
    wanted = decommission_of(file)
    return [
        *_of_the_cutover(ledger, checks, wanted.soak, now),
        *_of_signatures(inventory, ledger, checks, now),
        *_of_what_is_left(inventory, file.vault.mount),
        *_of_what_is_unknown(inventory, ledger, checks, wanted, now),
        *_of_the_cluster(inventory, {file.vault.address, *wanted.other_nodes}),
        *_of_the_way(inventory, checks, has_snapshot_file=wanted.snapshot_file is not None),
    ]


def _of_the_cutover(ledger: LedgerFacts, checks: Checks, soak: int, now: int) -> Iterator[Blocker]:
    cutover = ledger.cutover
    if cutover is None:
        yield Blocker(
            "no_cutover", "the ledger holds no successful cutover", "signer cutover plan --config FILE, then apply"
        )
        return
    if checks.evidence:
        what = f"the evidence of the cutover is not intact: {listed(checks.evidence, SHOWN)}"
        yield Blocker("evidence_broken", what, "run signer evidence verify; cut over again if it is lost")
    if ledger.rolled_back > cutover.seq:
        what = f"the cutover was rolled back, event {ledger.rolled_back} of the ledger"
        yield Blocker("rolled_back_since", what, "fix the cause, then signer cutover plan --config FILE, and apply")
    left = cutover.at + soak - now
    if left > 0:
        what = f"the cutover was at {timestamp(cutover.at)}; {render_duration(left)} of {render_duration(soak)} left"
        yield Blocker("soak_not_over", what, f"wait until {timestamp(cutover.at + soak)}")
    wrong = [f"{name} by {skew:+,} s" for name, skew in checks.clocks.items() if abs(skew) > MAX_SKEW]
    if wrong:
        what = f"this host's clock, which judges the soak, differs from that of {listed(wrong, SHOWN)}"
        yield Blocker("clocks_differ", what, "set the clocks (NTP), then plan again")
    if ledger.mode != "local":
        what = f"the service is in mode {ledger.mode}" if ledger.mode else "the service is not ready"
        yield Blocker("not_local", what, "see signer cutover status --config FILE")


def _of_signatures(inventory: Inventory, ledger: LedgerFacts, checks: Checks, now: int) -> Iterator[Blocker]:
    cutover, audit = ledger.cutover, checks.audit
    engines = {engine.mount: engine for engine in inventory.ssh}
    logged = [signature for signature in (audit.signatures if audit else ()) if signature.mount in engines]
    if cutover is not None:
        since = cutover.local_since or cutover.at  # in that second the signature may still have been for the service
        seen = [f"role {s.role} of {s.mount} at {timestamp(s.at)}, by the audit log" for s in logged if s.at > since]
        if ledger.vault_signed is not None and ledger.vault_signed[0] > cutover.seq:
            seen.append(f"{timestamp(ledger.vault_signed[1])}, event {ledger.vault_signed[0]} of the ledger")
        if seen:
            what = f"Vault has signed since the cutover: {listed(seen, SHOWN)}"
            yield Blocker(
                "vault_signed_since", what, "find the client that signs there, then roll back and cut over again"
            )
    until = ledger.vault_valid_until
    for signature in logged:
        engine = engines[signature.mount]
        longest = next((role.max_ttl for role in engine.roles if role.name == signature.role), 0) or engine.max_lease
        until = max(until, signature.at + longest)
    if until > now:
        what = f"a certificate that Vault signed may be valid until {timestamp(until)}"
        yield Blocker("vault_certificate_valid", what, "wait until then")
    if audit is not None and audit.clients:
        who = [f"{c.name}: {c.what}, {c.times} times, last {timestamp(c.at)}" for c in audit.clients]
        what = f"others have used Vault since the cutover: {listed(who, SHOWN)}"
        yield Blocker("other_clients", what, "move them off Vault, then roll back and cut over again")


def _of_what_is_left(inventory: Inventory, ssh_mount: str) -> Iterator[Blocker]:
    full = [entries for entries in inventory.kv if entries.names]
    if full:
        what = "; ".join(f"{len(one.names)} in {one.mount} ({listed(one.names, SHOWN)})" for one in full)
        yield Blocker("secrets_left", f"secrets are left: {what}", "move them, then delete the mounts")
    ssh = f"{ssh_mount}/"
    others = (mount for mount in inventory.mounts if mount.type not in BUILTIN)
    left = [f"{mount.path} ({mount.type})" for mount in others if (mount.path, mount.type) != (ssh, "ssh")]
    left += [f"{name} (namespace)" for name in inventory.namespaces]
    if inventory.mounts and all(mount.path != ssh for mount in inventory.mounts):
        what = f"Vault does not list an SSH mount {ssh}, so its removal cannot be checked"
        yield Blocker("ssh_mount_missing", what, "check vault.mount in cutover.toml, and the admin token")
    if left:
        do = "move their content, then run bao secrets disable (bao namespace delete) each of them"
        yield Blocker("mounts_left", f"more than {ssh} is mounted: {listed(left, SHOWN)}", do)


def _of_what_is_unknown(
    inventory: Inventory, ledger: LedgerFacts, checks: Checks, wanted: DecommissionFacts, now: int
) -> Iterator[Blocker]:
    unknown = [f"{unread.what} ({unread.code})" for unread in inventory.unread]
    if wanted.audit_log is not None:
        unknown += _of_the_devices(inventory, str(wanted.audit_log))
    if checks.audit_fault is not None:
        unknown.append(f"the audit log ({checks.audit_fault.code}): {checks.audit_fault.text}")
    audit = checks.audit
    if audit is not None:
        if audit.entries == 0:
            unknown.append("the audit log, which is empty")
        elif ledger.cutover is not None and audit.first_at > ledger.cutover.at:
            unknown.append(f"the audit log before {timestamp(audit.first_at)}, which begins after the cutover")
        elif audit.last_at < now - AUDIT_MAY_BE_OLD:
            unknown.append(f"the audit log after {timestamp(audit.last_at)}, where it ends")
        unknown += [f"{one.file} line {one.number}, not an entry: {one.excerpt}" for one in audit.broken_lines]
        if audit.broken > len(audit.broken_lines):
            unknown.append(f"{audit.broken - len(audit.broken_lines):,} more lines of the audit log")
        unknown += [
            f"the audit log from {timestamp(gap.begin)} to {timestamp(gap.end)}: {gap.why}"
            for gap in audit.gaps
            if not any(begin <= gap.begin and gap.end <= end for begin, end in wanted.audit_gaps)
        ]
    if unknown:
        what = f"not everything could be read: {listed(unknown, SHOWN)}"
        yield Blocker(
            "inventory_incomplete",
            what,
            "allow the admin token to list and read it; configure a complete audit log, its audit_log_prefix, and the "
            "audit_gaps in which Vault was silent",
        )


def _of_the_devices(inventory: Inventory, audit_log: str) -> Iterator[str]:
    """Why the configured log may not have every request."""
    if not inventory.audit_devices:
        yield "the audit log: Vault has no audit device that writes it"
        return
    named = [device for device in inventory.audit_devices if device.file_path == audit_log]
    partial = [device.path for device in named or inventory.audit_devices if device.is_partial]
    if partial:
        yield f"the audit log: the options of {listed(partial, SHOWN)} leave entries out"


def _of_the_cluster(inventory: Inventory, addresses: Set[str]) -> Iterator[Blocker]:
    """Each node has all of Vault's data and can sign as soon as it is active."""
    if len(inventory.servers) < 2:
        return
    unnamed = [server for server in inventory.servers if server.api.rstrip("/") not in addresses]
    if unnamed:
        names = [f"{one.node or 'a node'} at {one.api or f'{one.cluster} (not running)'}" for one in unnamed]
        what = f"Vault has {len(inventory.servers)} nodes, and cutover.toml does not name {listed(names, SHOWN)}"
        do = "set other_nodes, with a stop_command that stops each; or bao operator raft remove-peer, and stop it"
        yield Blocker("other_nodes", what, do)


def _of_the_way(inventory: Inventory, checks: Checks, *, has_snapshot_file: bool) -> Iterator[Blocker]:
    """Problems that would stop the removal half way."""
    if checks.smoke is not None:
        yield Blocker("smoke_fails", f"logins fail now: {checks.smoke.text}", checks.smoke.hint or "fix them first")
    if checks.snapshot is not None:
        yield Blocker("no_snapshot", checks.snapshot.text, checks.snapshot.hint)
    elif inventory.storage != "raft" and not has_snapshot_file:
        what = f"the storage is {inventory.storage or 'unknown'}, which Vault cannot snapshot"
        yield Blocker("no_snapshot", what, "make one, and set snapshot_file and snapshot_sha256")
    if checks.missing:
        what = f"commands not found: {listed(checks.missing, SHOWN)}"
        yield Blocker("command_missing", what, "fix stop_command and remove_data_command, or install them")
    own = inventory.own_token
    if own is None:
        return  # reported as unreadable
    unfit = [f"it may not use {path}" for path in own.lacks if not (path == SNAPSHOT and has_snapshot_file)]
    if not own.is_orphan:
        unfit.append("it has a parent token, whose revocation ends it")
    if 0 < own.ttl < TOKEN_MUST_LAST:
        unfit.append(f"it expires in {render_duration(own.ttl)}")
    if own.uses:
        unfit.append("its number of uses is limited")
    if unfit:
        do = "bao token create -orphan -ttl=1h with a policy for all of it, into admin_token_file"
        yield Blocker("admin_token_unfit", f"the admin token is unfit: {listed(unfit, SHOWN)}", do)
