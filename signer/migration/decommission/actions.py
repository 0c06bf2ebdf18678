"""The actions of a decommission: calls of Vault, commands on the host, logins."""

from __future__ import annotations

import errno
import os
import shlex
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from signer.api_client import ApiClient
from signer.errors import BadSettings, SignerError, Unavailable
from signer.files import read_secret_word
from signer.migration.compose import ENGINES_OWN, Compose
from signer.migration.config import CutoverFile, DecommissionFacts, decommission_of
from signer.migration.decommission.snapshot import (
    DOWNLOAD_WITHIN,
    FOLDER,
    MAX_DOWNLOAD,
    Snapshot,
    check_origin,
    check_snapshot,
    copy_snapshot,
    store_snapshot,
)
from signer.migration.decommission.survey import blocked, origin_of, read_readiness
from signer.migration.evidence.after import planned_in
from signer.migration.observe import Observed, observe_service
from signer.migration.parity import throwaway_key
from signer.migration.plan import Observation, StepFailed
from signer.migration.run import Run
from signer.migration.smoke import smoke
from signer.model import RunOutcome
from signer.policy.file import load_policy
from signer.subprocesses import run
from signer.units import listed
from signer.vault.admin import VaultAdmin, data_of, not_understood
from signer.vault.inventory import SNAPSHOT, Inventory, read_inventory

COMMAND_WITHIN: Final = 120.0  # seconds for stop_command and remove_data_command
GONE_WITHIN: Final = 30.0  # seconds for the addresses to refuse connections after the service was stopped
WATCHED: Final = 30  # seconds without an accepted connection, to detect a supervisor that starts Vault again
LOOK_EVERY: Final = 0.5  # seconds
ELECTED_WITHIN: Final = 90.0  # seconds for another node to become active after one was sealed
CONNECT_WITHIN: Final = 2.0
MAX_ROUNDS: Final = 5  # of revoking: tokens may be created meanwhile
_BUILTIN: Final = {"sys/": ("system", "ns_system"), "identity/": ("identity", "ns_identity")}
_STARTED_AGAIN: Final = "end what starts it again (a supervisor, a unit, a restart policy), then apply again"
_LATE: Final = "new-before-the-seal.json"
_LAST_LOOK: Final = "last-look.json"
_NOT_HERE: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH)


class RemovalActions:
    """The actions of a decommission's steps on the platform of `file`, whose service answers to `api`.

    A plan only needs the object; a run calls `begin` before its first action. Each action raises `SignerError` if it
    fails or its check fails. `removed_by` is the operator who confirms that the data was removed by hand; then no
    command is run for it.
    """

    _run: Run
    _is_raft = True
    _since = 0  # of the cutover, in seconds since the epoch

    def __init__(self, file: CutoverFile, api: ApiClient, removed_by: str = "") -> None:
        self._file = file
        self._wanted: DecommissionFacts = decommission_of(file)
        self._api = api
        self._removed_by = removed_by

    def begin(self, run: Run) -> None:
        """Keeps observations as evidence of `run`, without the tokens in use."""
        self._run = run
        run.look = self._look_after
        self._found: Inventory | None = None
        self._begun = frozenset(run.journal.state.begun)  # steps that an interrupted process of this run has begun
        guard = run.evidence.guard
        guard.never(read_secret_word(self._file.signer.token_file, "signer.token_file"))
        for path in (self._wanted.admin_token_file, self._file.vault.token_file):
            try:
                guard.never(read_secret_word(path, "vault.token_file", is_vaults=True))
            except BadSettings:
                continue  # after Vault is sealed the token is not needed, and its file may be gone
        self._keep_version(run.evidence.read_json("inventory.json") or {})

    def _keep_version(self, inventory: Mapping[str, Any]) -> None:
        """Keeps Vault's version, as Vault is gone when the evidence is sealed."""
        if version := inventory.get("version"):
            self._run.versions = {"vault": str(version)}

    # --- before ------------------------------------------------------------------------------------------------------

    def inventory(self) -> Observation:
        """Repeats the inventory; raises `Blocked`."""
        found = read_readiness(self._file, self._api)
        self._found, self._since = found.inventory, found.ledger.cutover.at if found.ledger.cutover else 0
        inventory = found.inventory.as_json()
        self._run.evidence.write_json("inventory.json", inventory)
        self._keep_version(inventory)
        if found.blockers:
            raise blocked(found.blockers)
        summary = f"{len(found.inventory.mounts)} mounts, no secret, no blockers"
        return Observation(summary, {"inventory": inventory, "service": self._observed().as_json()})

    def _observed(self) -> Observed:
        """The service as it is now, which a decommission does not change."""
        return observe_service(self._file, self._api, Compose(self._file.compose))

    def _look_after(self) -> tuple[dict[str, Any], Observed]:
        """What the plan wants in force, and what is; the data is out of sight, whatever was done with it."""
        plan = self._run.evidence.read_json("plan.json")
        seen = self._observed()
        seen.facts["vault"] = vault_state(self._file)
        seen.unread["data"] = (
            "its command, or the operator's word, is in the step that removes it"
            if plan["then"]["data"] == "removed"
            else "no run looks at Vault's disk"
        )
        return planned_in(plan), seen

    def _snapshot_path(self, number: int = 1) -> Path:
        name = f"{self._run.evidence.run}.snap" if number == 1 else f"{self._run.evidence.run}.{number}.snap"
        return self._file.evidence_dir / FOLDER / name

    def snapshot(self) -> Observation:
        """Vault's own snapshot, or a copy of the operator's; stored beside the evidence, which holds its checksum.

        It must be of the inventoried Vault, and not older than the inventory.
        """
        given, target, before = self._wanted.snapshot_file, self._snapshot_path(), self._inventoried()
        if given is None:
            found = self._download(target, before)
        else:
            found = copy_snapshot(
                given,
                target,
                self._wanted.snapshot_sha256,
                origin_of(before, self._file.vault.mount),
                self._since,
                must_be_raft=before.storage == "raft",
            )
        return self._keep_snapshot_facts(found, target)

    def _download(self, target: Path, before: Inventory, mount: str = "") -> Snapshot:
        """Vault's own snapshot. `mount` is a mount that has entries in it, by default the SSH one."""
        origin = origin_of(before, mount or self._file.vault.mount)
        with self._vault() as vault:
            content = vault.download(SNAPSHOT, most=MAX_DOWNLOAD, within=DOWNLOAD_WITHIN)
        return store_snapshot(content, target, origin)

    def _inventoried(self) -> Inventory:
        if self._found is None:
            raise StepFailed("inventory_missing", "this run has not read an inventory", "apply the same plan again")
        return self._found

    def has_snapshot(self) -> bool:
        """True if a complete snapshot of this Vault in its present state exists; removes any other one."""
        path, before = self._snapshot_path(), self._inventoried()
        if not os.path.lexists(path):
            return False
        try:
            found = check_snapshot(path, self._wanted.snapshot_sha256, must_be_raft=before.storage == "raft")
            check_origin(found, origin_of(before, self._file.vault.mount))
        except SignerError:
            path.unlink(missing_ok=True)
            return False
        self._keep_snapshot_facts(found, path)
        return True

    def _keep_snapshot_facts(self, found: Snapshot, path: Path, name: str = "snapshot.json") -> Observation:
        facts = {**found.as_json(), "path": str(path)}
        self._run.evidence.write_json(name, facts)
        return Observation(f"{found.size:,} bytes, {facts['inner_checksums']}", facts)

    def smoke(self, when: str) -> Observation:
        """A real login to every target with a certificate of the local CA."""
        pin = load_policy(self._file.signer.policy_file, "signer.policy_file").ca.fingerprint
        return self._run.keep_logs(
            when, lambda: smoke(self._file, self._api.certificate, backend="local", ca_fingerprint=pin)
        )

    def still_clear(self) -> Observation:
        """Looks for blockers since the inventory; raises `Blocked`."""
        if blocking := read_readiness(self._file, self._api).blockers:
            raise blocked(blocking)
        return Observation("still no blockers")

    # --- the point of no return --------------------------------------------------------------------------------------

    def disable(self) -> Observation:
        """Disables the SSH engine, which deletes its CA key and roles; raises `Blocked`.

        A run that was interrupted here may be resumed days later, so it looks for blockers again.
        """
        if "disable" in self._begun:
            self.still_clear()
        mount = self._file.vault.mount
        with self._vault() as vault:
            vault.call("DELETE", f"sys/mounts/{mount}", within=COMMAND_WITHIN)
        if not self.is_disabled():
            raise StepFailed("vault_mount_stays", f"Vault still has the mount {mount}", "see Vault's log")
        return Observation(f"{mount} is gone, and Vault's CA key with it")

    def is_disabled(self) -> bool:
        """True if Vault lists its built-in mounts and not this one; raises if Vault does not answer in full."""
        with self._vault() as vault:
            return f"{self._file.vault.mount}/" not in _mounts(vault)

    def signs_no_more(self) -> Observation:
        """Requests a signature for a throwaway key from every role with both tokens.

        Vault must answer the admin token that no mount serves the request. "forbidden" proves nothing; it is accepted
        only from the other token, which may have expired.
        """
        asked = proofs = 0
        for token_file in (self._wanted.admin_token_file, self._file.vault.token_file):
            is_admin = token_file == self._wanted.admin_token_file
            try:
                vault = VaultAdmin(self._file.vault.address, token_file, self._file.vault.ca_file)
            except BadSettings:
                if is_admin:
                    raise
                continue  # without its token file no request is possible
            with vault:
                for role in self._file.vault.roles:
                    asked += 1
                    proofs += self._is_unrouted(vault, role, must_prove=is_admin)
        if not self.is_disabled():
            raise StepFailed("vault_mount_stays", "Vault still has the SSH mount", "see Vault's log")
        return Observation(f"asked {asked} times, signed nothing", {"asked": asked, "no_such_mount": proofs})

    def _is_unrouted(self, vault: VaultAdmin, role: str, *, must_prove: bool) -> bool:
        """True if Vault has no mount for the role, False if it does not allow the token to know."""
        path = f"{self._file.vault.mount}/sign/{role}"
        try:
            if vault.is_unrouted("POST", path, {"public_key": throwaway_key("ssh-ed25519"), "cert_type": "user"}):
                return True
        except SignerError as error:
            if error.code == "vault_forbidden":
                if not must_prove:
                    return False
                raise StepFailed(
                    "vault_proof_missing",
                    f"Vault does not allow the admin token to use {path}, which proves nothing",
                    f"allow it update on {path}, then apply again",
                ) from None
            raise
        raise StepFailed("vault_still_signs", f"Vault has signed for role {role}", "find the mount that signed")

    def revoke(self) -> Observation:
        """Revokes every token by its accessor, except the admin token."""
        count = 0
        with self._vault() as vault:
            own = _own_accessor(vault)
            for _ in range(MAX_ROUNDS):
                others = _others(vault, own)
                if not others:
                    return Observation(f"{count} tokens revoked, one left: the admin token", {"revoked": count})
                for accessor in others:
                    vault.call("POST", "auth/token/revoke-accessor", {"accessor": accessor})
                    count += 1
        raise StepFailed(
            "vault_tokens_stay", "new tokens keep appearing in Vault", "find their creator, then apply again"
        )

    def is_revoked(self) -> bool:
        """True if only the admin token is left."""
        with self._vault() as vault:
            return not _others(vault, _own_accessor(vault))

    def seal_vault(self) -> Observation:
        """Looks once more for what has come since the snapshot, then seals every node of Vault that can sign.

        From here on its data cannot be read without the unseal keys. A standby node cannot be sealed; without a
        majority of nodes it cannot become active either, and the next step stops it.
        """
        look = self._last_look()
        self._run.evidence.write_json(_LAST_LOOK, {"at": int(time.time()), "found": look})
        states = self._seal_nodes()
        if not self.is_sealed():
            raise StepFailed("vault_not_sealed", "Vault is still unsealed", "see Vault's log")
        standby = [address for address, state in states.items() if state == "standby"]
        also = f"; standby without a majority: {', '.join(standby)}" if standby else ""
        return Observation(f"{look}; sealed{also}", {"nodes": states})

    def _last_look(self) -> str:
        """Stops the run if Vault has something that is in no snapshot; continued, the run takes another one.

        Raises `StepFailed`. Each new entry is reported once, by name; then it must be in the next snapshot.
        """
        evidence = self._run.evidence
        told = evidence.read_json(_LATE) or {"new": [], "snapshots": 1}
        found = self._look()
        self._is_raft = found.storage == "raft"
        baseline = evidence.read_json(_inventory_name(told["snapshots"])) or {}
        new = self._new_since(found, baseline)
        if unreported := [name for name in new if name not in told["new"]]:
            evidence.write_json(_LATE, {**told, "new": [*told["new"], *unreported]})
            raise self._changed(unreported)
        if not told["new"]:
            return "nothing new since the snapshot"
        if self._wanted.snapshot_file is not None or found.storage != "raft":
            if new:
                raise self._changed(new)
            return "nothing new is left"
        return self._snapshot_again(found, told)

    def _snapshot_again(self, found: Inventory, told: Mapping[str, Any]) -> str:
        number = int(told["snapshots"]) + 1
        path = self._snapshot_path(number)
        path.unlink(missing_ok=True)  # of a run that was interrupted before it was recorded
        taken = self._download(path, found, "identity")
        evidence = self._run.evidence
        self._keep_snapshot_facts(taken, path, f"snapshot-{number}.json")
        evidence.write_json(_inventory_name(number), found.as_json())
        evidence.write_json(_LATE, {**told, "snapshots": number})
        if since := self._new_since(self._look(), evidence.read_json(_inventory_name(number)) or {}):
            evidence.write_json(_LATE, {"new": [*told["new"], *since], "snapshots": number})
            raise self._changed(since)
        return f"snapshot {number} has what was new"

    def _look(self) -> Inventory:
        """A complete inventory; raises `StepFailed` if a part cannot be read."""
        with self._vault() as vault:
            found = read_inventory(vault, self._file.vault.mount)
        if found.unread:
            unread = ", ".join(f"{one.what} ({one.code})" for one in found.unread[:9])
            raise StepFailed(
                "vault_look_incomplete",
                f"what has come into Vault since the snapshot cannot be read: {unread}",
                "allow the admin token to read it, then apply again",
            )
        return found

    def _new_since(self, found: Inventory, before: Mapping[str, Any]) -> list[str]:
        """Names of what is in Vault now and was not before, sorted."""
        now = self._run.evidence.guard.clean_value(found.as_json())
        return sorted(_names_in(now) - _names_in(before))

    def _changed(self, new: list[str]) -> StepFailed:
        then = "move it and delete it, then apply again"
        if self._wanted.snapshot_file is None:
            then += "; what you leave there is in a second snapshot only"
        return StepFailed("vault_changed", f"new in Vault since the snapshot: {listed(new, 9)}", then)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of all nodes of Vault, the configured one first."""
        return (self._file.vault.address, *self._wanted.other_nodes)

    def _seal_nodes(self) -> dict[str, str]:
        """Seals the active node, and each that becomes active after that; the state of each node by its address.

        Ends when no node is active and so few are standby that none can become active: raft needs a majority, another
        storage one node. Raises `StepFailed` if none of enough nodes becomes active in time.
        """
        enough = len(self.addresses) // 2 + 1 if self._is_raft else 1
        deadline = time.monotonic() + ELECTED_WITHIN
        while True:
            states = {address: self._node_state(address) for address in self.addresses}
            active = [address for address, state in states.items() if state == "active"]
            for address in active:
                with self._vault(address) as vault:
                    vault.call("PUT", "sys/seal")
                deadline = time.monotonic() + ELECTED_WITHIN
            standby = [address for address, state in states.items() if state == "standby"]
            if not active and len(standby) < enough:
                return states
            if time.monotonic() > deadline:
                raise StepFailed(
                    "vault_not_sealed",
                    f"{', '.join(standby or active)} can become active and sign",
                    "stop it by hand, then apply again",
                )
            time.sleep(LOOK_EVERY)

    def _node_state(self, address: str) -> str:
        """`active`, `standby`, `sealed` or `gone`; raises `SignerError` for an answer that is none of these."""
        if _is_refused(_places(address)):
            return "gone"
        with self._vault(address) as vault:
            if _sealed(vault.call("GET", "sys/seal-status")):
                return "sealed"
            leader = vault.call("GET", "sys/leader")
        is_active = leader.get("is_self") is True or leader.get("ha_enabled") is False
        return "active" if is_active else "standby"

    def is_sealed(self) -> bool:
        """True if no node of Vault is active and the configured one is sealed or gone, after a last look.

        Standby nodes count as sealed if they are too few for one to become active. Raises `StepFailed` without a
        last look.
        """
        states = [self._node_state(address) for address in self.addresses]
        enough = len(states) // 2 + 1 if self._is_raft else 1
        if "active" in states or states.count("standby") >= enough:
            return False
        if self._run.evidence.read_json(_LAST_LOOK) is None:
            raise StepFailed(
                "vault_sealed_early",
                "Vault is sealed or stopped, and nobody has looked for what came since the snapshot",
                "start and unseal Vault, then apply again",
            )
        return True

    # --- stop and removal --------------------------------------------------------------------------------------------

    def stop(self) -> Observation:
        return self._command(self._wanted.stop_command, "stop_command")

    def has_stopped(self) -> bool:
        """True if an interrupted run began this step and Vault is gone; otherwise Vault may just be restarting."""
        return "stop" in self._begun and self.is_gone()

    def is_gone(self) -> bool:
        """True if every address of every node of Vault refuses connections."""
        return not self._present()

    def _present(self) -> list[str]:
        return [address for address in self.addresses if not _is_refused(_places(address))]

    def gone(self) -> Observation:
        """Waits until every node refuses connections, then watches long enough to detect an automatic restart."""
        deadline = time.monotonic() + GONE_WITHIN
        while present := self._present():
            if time.monotonic() > deadline:
                raise _still_there(present, "does not refuse connections", "stop it by hand, then apply again")
            time.sleep(LOOK_EVERY)
        began = time.monotonic()
        while time.monotonic() - began < WATCHED:
            time.sleep(LOOK_EVERY)
            if present := self._present():
                after = f"accepts connections again after {time.monotonic() - began:.0f} s"
                raise _still_there(present, after, _STARTED_AGAIN)
        summary = f"{', '.join(self.addresses)} refused connections for {WATCHED} s"
        return Observation(summary, {"seconds": WATCHED, "addresses": list(self.addresses)})

    def remove_data(self) -> Observation:
        """Runs the operator's command, which also succeeds if no data is left, or records the confirmation."""
        words = self._wanted.remove_data_command
        if not self._removed_by:
            return self._command(words, "remove_data_command", "signer decommission apply PLAN --data-is-removed")
        facts = {"by_hand": True, "by_the_word_of": self._removed_by, "not_run": shlex.join(words)}
        return Observation("removed by hand, confirmed by the operator", facts)

    def _command(self, words: tuple[str, ...], name: str, then: str = "apply again") -> Observation:
        environment = {own: os.environ[own] for own in ENGINES_OWN if own in os.environ}
        ended = run(words, environment=environment, within=COMMAND_WITHIN)
        if ended.status != 0:
            how = "did not end in time" if ended.status is None else f"ended with status {ended.status}"
            raise StepFailed("command_failed", f"{name} {how}", f"run it by hand ({shlex.join(words)}), then: {then}")
        return Observation(f"{shlex.join(words)} ended with status 0", {"seconds": round(ended.seconds, 1)})

    def seal(self) -> Observation:
        """Looks once more whether Vault is gone, seals the evidence and records its digest in the ledger."""
        if present := self._present():
            raise _still_there(present, "accepts connections again", _STARTED_AGAIN)
        return self._run.conclude(RunOutcome.APPLIED)

    def _vault(self, address: str = "") -> VaultAdmin:
        return VaultAdmin(address or self._file.vault.address, self._wanted.admin_token_file, self._file.vault.ca_file)


def vault_state(file: CutoverFile) -> str:
    """`active`, `sealed`, `gone`, or the code of the error that prevents an answer. Reads only."""
    wanted = decommission_of(file)
    try:
        if all(_is_refused(_places(address)) for address in (file.vault.address, *wanted.other_nodes)):
            return "gone"
        with VaultAdmin(file.vault.address, wanted.admin_token_file, file.vault.ca_file) as vault:
            return "sealed" if _sealed(vault.call("GET", "sys/seal-status")) else "active"
    except SignerError as error:
        return error.code


def _sealed(status: Mapping[str, Any]) -> bool:
    """The seal state; raises `Unavailable` for an answer without it."""
    sealed = status.get("sealed")
    if not isinstance(sealed, bool):
        raise not_understood()
    return sealed


def _mounts(vault: VaultAdmin) -> Mapping[str, Any]:
    """All mounts; raises `Unavailable` if the answer lacks the built-in ones, as it is then incomplete."""
    found = data_of(vault.call("GET", "sys/mounts"))
    for name, kinds in _BUILTIN.items():
        mount = found.get(name)
        if not isinstance(mount, dict) or mount.get("type") not in kinds:
            raise not_understood()
    return found


def _inventory_name(number: int) -> str:
    """The evidence file of the inventory before a snapshot, from 1."""
    return "inventory.json" if number == 1 else f"inventory-{number}.json"


def _names_in(inventory: object) -> set[str]:
    """What an inventory names, apart from tokens and leases."""
    found: set[str] = set()
    if not isinstance(inventory, dict):
        return found
    for mount in inventory["mounts"]:
        found.add(f"mount {mount['path']} ({mount['type']}, {mount['uuid']})")
    for method in inventory["auth_methods"]:
        found.add(f"auth method {method['path']} ({method['type']})")
    for entries in inventory["kv"]:
        found.update(f"{entries['mount']}{name}" for name in entries["names"])
    for server in inventory["servers"]:
        found.add(f"node {server['node']} at {server['api'] or server['cluster']}")
    found.update(f"namespace {name}" for name in inventory["namespaces"])
    found.update(f"policy {name}" for name in inventory["policies"])
    found.update(f"entity {number}" for number in range(1, inventory["entities"] + 1))
    return found


def _still_there(present: list[str], what: str, then: str) -> StepFailed:
    return StepFailed("vault_still_there", f"{', '.join(present)} {what}", then)


def _own_accessor(vault: VaultAdmin) -> str:
    accessor = data_of(vault.call("GET", "auth/token/lookup-self")).get("accessor")
    if not isinstance(accessor, str) or not accessor:
        raise not_understood()
    return accessor


def _others(vault: VaultAdmin, own: str) -> list[str]:
    """Accessors of all other tokens; raises `Unavailable` if the list lacks `own`, as it is then incomplete."""
    keys = data_of(vault.call("LIST", "auth/token/accessors")).get("keys")
    if not isinstance(keys, list) or own not in keys or not all(isinstance(key, str) for key in keys):
        raise not_understood()
    return [key for key in keys if key != own]


def _places(address: str) -> list[tuple[socket.AddressFamily, Any]]:
    """The resolved addresses of Vault; raises `Unavailable` if its name is unknown."""
    url = urlsplit(address)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(url.hostname, port, 0, socket.SOCK_STREAM)
    except OSError:
        raise Unavailable("vault_down", "the name in Vault's address is unknown", "check Vault's address") from None
    return [(family, place) for family, _, _, _, place in found]


def _is_refused(places: list[tuple[socket.AddressFamily, Any]]) -> bool:
    """True if a connection is refused and none is accepted. A timeout proves nothing; an address family that this host
    lacks is ignored."""
    errors = [_errno_of(place) for place in places]
    return errno.ECONNREFUSED in errors and all(number in (errno.ECONNREFUSED, *_NOT_HERE) for number in errors)


def _errno_of(place: tuple[socket.AddressFamily, Any]) -> int:
    """0 if the connection is accepted, otherwise the errno."""
    family, where = place
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(CONNECT_WITHIN)
            connection.connect(where)
    except OSError as error:
        return error.errno or errno.ETIMEDOUT
    return 0
