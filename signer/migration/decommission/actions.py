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
from signer.migration.config import CutoverFile, DecommissionFacts
from signer.migration.decommission.snapshot import (
    DOWNLOAD_WITHIN,
    FOLDER,
    MAX_DOWNLOAD,
    Snapshot,
    check_snapshot,
    copy_snapshot,
    store_snapshot,
)
from signer.migration.decommission.survey import blocked, decommission_of, read_readiness
from signer.migration.plan import Observation
from signer.migration.run import Run
from signer.migration.samples import throwaway_key
from signer.migration.smoke import smoke
from signer.model import RunOutcome
from signer.policy.file import load_policy
from signer.subprocesses import run
from signer.vault.admin import VaultAdmin
from signer.vault.inventory import SNAPSHOT

COMMAND_WITHIN: Final = 120.0  # seconds for stop_command and remove_data_command
GONE_WITHIN: Final = 30.0  # seconds for the address to refuse connections after the service was stopped
LOOKS: Final = 4  # refused connections in a row, to detect an automatic restart
LOOK_EVERY: Final = 0.5  # seconds
CONNECT_WITHIN: Final = 2.0
MAX_ROUNDS: Final = 5  # of revoking: tokens may be created meanwhile
_NO_SIGNATURE: Final = frozenset({"vault_mount_missing", "vault_forbidden"})
_NOT_HERE: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENETUNREACH)
_PASSED_ON: Final = (
    "PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "CONTAINERS_CONF",
    "CONTAINERS_STORAGE_CONF", "CONTAINER_HOST", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG",
)  # fmt: skip


class RemovalFailed(SignerError):
    """A step did not have its expected result; `facts` are kept as evidence."""


class RemovalActions:
    """The actions of a decommission's steps on the platform of `file`, whose service answers to `api`.

    A plan only needs the object; a run calls `begin` before its first action. Each action raises `SignerError` if it
    fails or its check fails. `removed_by` is the operator who confirms that the data was removed by hand; then no
    command is run for it.
    """

    _run: Run

    def __init__(self, file: CutoverFile, api: ApiClient, removed_by: str = "") -> None:
        self._file = file
        self._wanted: DecommissionFacts = decommission_of(file)
        self._api = api
        self._removed_by = removed_by

    def begin(self, run: Run) -> None:
        """Keeps observations as evidence of `run`, without the tokens in use."""
        self._run = run
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
        inventory = found.inventory.as_json()
        self._run.evidence.write_json("inventory.json", inventory)
        self._keep_version(inventory)
        if found.blockers:
            raise blocked(found.blockers)
        summary = f"{len(found.inventory.mounts)} mounts, no secret, no blockers"
        return Observation(summary, {"inventory": inventory})

    @property
    def _snapshot_path(self) -> Path:
        return self._file.evidence_dir / FOLDER / f"{self._run.evidence.run}.snap"

    def snapshot(self) -> Observation:
        """Vault's own snapshot, or a copy of the operator's; stored beside the evidence, which holds its checksum."""
        given, target = self._wanted.snapshot_file, self._snapshot_path
        with self._vault() as vault:
            if given is None:
                content = vault.download(SNAPSHOT, most=MAX_DOWNLOAD, within=DOWNLOAD_WITHIN)
                found = store_snapshot(content, target)
            else:
                is_raft = vault.call("GET", "sys/seal-status").get("storage_type") == "raft"
                found = copy_snapshot(given, target, self._wanted.snapshot_sha256, must_be_raft=is_raft)
        return self._keep_snapshot_facts(found, target)

    def has_snapshot(self) -> bool:
        """True if a complete snapshot exists; removes an incomplete one."""
        path = self._snapshot_path
        if not os.path.lexists(path):
            return False
        try:
            found = check_snapshot(path, self._wanted.snapshot_sha256, must_be_raft=not self._wanted.snapshot_sha256)
        except SignerError:
            path.unlink(missing_ok=True)
            return False
        self._keep_snapshot_facts(found, path)
        return True

    def _keep_snapshot_facts(self, found: Snapshot, path: Path) -> Observation:
        facts = {**found.as_json(), "path": str(path)}
        self._run.evidence.write_json("snapshot.json", facts)
        return Observation(f"{found.size:,} bytes, {facts['inner_checksums']}", facts)

    def smoke(self, when: str) -> Observation:
        """A real login to every target with a certificate of the local CA."""
        pin = load_policy(self._file.signer.policy_file).ca.fingerprint
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
            raise RemovalFailed("vault_mount_stays", f"Vault still has the mount {mount}", "see Vault's log")
        return Observation(f"{mount} is gone, and Vault's CA key with it")

    def is_disabled(self) -> bool:
        """True if Vault reports that the mount does not exist; raises if Vault does not answer."""
        with self._vault() as vault:
            return f"{self._file.vault.mount}/" not in _data(vault.call("GET", "sys/mounts"))

    def signs_no_more(self) -> Observation:
        """Requests a signature for a throwaway key from every role with both tokens; each request must fail."""
        asked, codes = 0, set()
        for token_file in (self._wanted.admin_token_file, self._file.vault.token_file):
            try:
                vault = VaultAdmin(self._file.vault.address, token_file, self._file.vault.ca_file)
            except BadSettings:
                continue  # without its token file no request is possible
            with vault:
                for role in self._file.vault.roles:
                    asked += 1
                    codes.add(self._refused(vault, role))
        if not self.is_disabled():
            raise RemovalFailed("vault_mount_stays", "Vault still has the SSH mount", "see Vault's log")
        refusals = ", ".join(sorted(codes))
        return Observation(f"asked {asked} times, signed nothing", {"asked": asked, "refused": refusals})

    def _refused(self, vault: VaultAdmin, role: str) -> str:
        try:
            vault.sign(self._file.vault.mount, role, {"public_key": throwaway_key("ssh-ed25519"), "cert_type": "user"})
        except SignerError as error:
            if error.code in _NO_SIGNATURE:
                return error.code
            raise
        raise RemovalFailed("vault_still_signs", f"Vault has signed for role {role}", "find the mount that signed")

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
        raise RemovalFailed(
            "vault_tokens_stay", "new tokens keep appearing in Vault", "find their creator, then apply again"
        )

    def is_revoked(self) -> bool:
        """True if only the admin token is left."""
        with self._vault() as vault:
            return not _others(vault, _own_accessor(vault))

    def seal_vault(self) -> Observation:
        """Seals Vault: from here on its data cannot be read without the unseal keys."""
        with self._vault() as vault:
            vault.call("PUT", "sys/seal")
        if not self.is_sealed():
            raise RemovalFailed("vault_not_sealed", "Vault is still unsealed", "see Vault's log")
        return Observation("sealed")

    def is_sealed(self) -> bool:
        """True if Vault reports that it is sealed, or is gone."""
        if self.is_gone():
            return True
        with self._vault() as vault:
            return vault.call("GET", "sys/seal-status").get("sealed") is True

    # --- stop and removal --------------------------------------------------------------------------------------------

    def stop(self) -> Observation:
        """Runs the operator's command, with a time limit."""
        return self._command(self._wanted.stop_command, "stop_command")

    def has_stopped(self) -> bool:
        """True if an interrupted run began this step and Vault is gone; otherwise Vault may just be restarting."""
        return "stop" in self._begun and self.is_gone()

    def is_gone(self) -> bool:
        """True if every address of Vault refuses connections."""
        return _is_refused(_places(self._file.vault.address))

    def gone(self) -> Observation:
        """Checks several times in a row, to detect an automatic restart."""
        deadline = time.monotonic() + GONE_WITHIN
        in_a_row = 0
        while in_a_row < LOOKS:
            in_a_row = in_a_row + 1 if self.is_gone() else 0
            if in_a_row == 0 and time.monotonic() > deadline:
                address = self._file.vault.address
                raise RemovalFailed(
                    "vault_still_there", f"{address} does not refuse connections", "stop it by hand, then apply again"
                )
            time.sleep(LOOK_EVERY)
        return Observation(f"{self._file.vault.address} refuses connections", {"looks": LOOKS})

    def remove_data(self) -> Observation:
        """Runs the operator's command, which also succeeds if no data is left, or records the confirmation."""
        words = self._wanted.remove_data_command
        if not self._removed_by:
            return self._command(words, "remove_data_command", "signer decommission apply PLAN --data-is-removed")
        facts = {"by_hand": True, "by_the_word_of": self._removed_by, "not_run": shlex.join(words)}
        return Observation("removed by hand, confirmed by the operator", facts)

    def _command(self, words: tuple[str, ...], name: str, then: str = "apply again") -> Observation:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        ended = run(words, environment=environment, within=COMMAND_WITHIN)
        if ended.status != 0:
            how = "did not end in time" if ended.status is None else f"ended with status {ended.status}"
            raise RemovalFailed(
                "command_failed", f"{name} {how}", f"run it by hand ({shlex.join(words)}), then: {then}"
            )
        return Observation(f"{shlex.join(words)} ended with status 0", {"seconds": round(ended.seconds, 1)})

    def seal(self) -> Observation:
        """Seals the evidence and records its digest in the ledger."""
        return self._run.conclude(RunOutcome.APPLIED)

    def _vault(self) -> VaultAdmin:
        return VaultAdmin(self._file.vault.address, self._wanted.admin_token_file, self._file.vault.ca_file)


def vault_state(file: CutoverFile) -> str:
    """`active`, `sealed`, `gone`, or the code of the error that prevents an answer. Reads only."""
    if _is_refused(_places(file.vault.address)):
        return "gone"
    try:
        with VaultAdmin(file.vault.address, decommission_of(file).admin_token_file, file.vault.ca_file) as vault:
            return "sealed" if vault.call("GET", "sys/seal-status").get("sealed") is not False else "active"
    except SignerError as error:
        return error.code


def _data(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    data = answer.get("data")
    if not isinstance(data, dict):
        raise _not_understood()
    return data


def _own_accessor(vault: VaultAdmin) -> str:
    accessor = _data(vault.call("GET", "auth/token/lookup-self")).get("accessor")
    if not isinstance(accessor, str) or not accessor:
        raise _not_understood()
    return accessor


def _others(vault: VaultAdmin, own: str) -> list[str]:
    """Accessors of all other tokens; raises `Unavailable` if the list lacks `own`, as it is then incomplete."""
    keys = _data(vault.call("LIST", "auth/token/accessors")).get("keys")
    if not isinstance(keys, list) or own not in keys:
        raise _not_understood()
    return [key for key in keys if isinstance(key, str) and key != own]


def _not_understood() -> Unavailable:
    return Unavailable("vault_answer_malformed", "Vault's answer is not understood", "check Vault's address")


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
