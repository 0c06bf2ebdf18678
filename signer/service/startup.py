"""The start of a keeper: policy, key, user, ledger and socket, in this order; then it serves.

Each failure has an error code, and a failed start changes nothing.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from signer import __version__
from signer.authority.core import Core
from signer.authority.shadow import Shadow
from signer.ca.key import CaKey, load_ca_key
from signer.errors import BadKeyFile, BadSettings, Unavailable
from signer.files import lock, open_directory
from signer.hardening import become, forbid_dumps, take_descriptors
from signer.ledger.audit import check_recent
from signer.model import CaKeys, PublicKey
from signer.policy.file import load_policy
from signer.protocol.log_limit import LogLimit
from signer.service.keeper import BACKLOG, Authority, Keeper
from signer.service.key_channel import adopt_channel
from signer.service.metrics import TimedLedger
from signer.service.reload import Reloader
from signer.settings import Settings

if TYPE_CHECKING:
    from signer.vault.signing import VaultClient

log = logging.getLogger("signer.keeper")


class LocalAuthority:
    """The local CA key, with which the core signs."""

    mode = "local"
    sign = None

    def __init__(self, key: CaKey) -> None:
        self.use_key(key)

    def use_key(self, key: CaKey) -> None:
        """Shows another key from now on."""
        self._key = key.public

    def public_key(self) -> PublicKey:
        """The key's public half."""
        return self._key

    def check_ready(self) -> None:
        """Does nothing: a loaded key stays ready."""


class VaultAuthority:
    """Vault, which makes each signature; in mode shadow the core compares its certificates."""

    def __init__(self, client: VaultClient, mode: str) -> None:
        self.mode = mode
        self.sign = client.sign
        self.public_key = client.known_ca
        self.check_ready = client.check_ready


def _vault_authority(settings: Settings) -> Authority:
    """Vault as the authority; starts the thread that renews its token. Raises `BadSettings`."""
    from signer.vault.signing import VaultClient  # hvac and requests take 15 MB, which mode local does not need

    assert settings.vault_addr is not None, "checked by load_settings"  # noqa: S101
    assert settings.vault_token_file is not None, "checked by load_settings"  # noqa: S101
    client = VaultClient(settings.vault_addr, settings.vault_token_file, settings.vault_mount, settings.vault_ca_file)
    threading.Thread(target=client.look_after, name="vault", daemon=True).start()
    return VaultAuthority(client, settings.mode)


def _load_key(settings: Settings, ca: CaKeys) -> CaKey:
    try:
        return load_ca_key(settings.ca_key_file, settings.ca_key_owner, *ca.may_sign)
    except BadKeyFile as error:
        log.error("the CA key is refused: %s", error.code)  # noqa: TRY400 - only the code; the caller prints the rest
        raise


def claim_run_dir(run_dir: Path) -> int:
    """Locks the directory while the descriptor is open; raises `Unavailable` if another keeper has the lock.

    Another keeper may have another ledger: its api must stay connected to it.
    """
    descriptor = open_directory(run_dir)
    if not lock(descriptor):
        os.close(descriptor)
        raise Unavailable(
            "run_dir_in_use", "another keeper listens in SIGNER_RUN_DIR", "stop it, or set another SIGNER_RUN_DIR"
        )
    return descriptor


def bind_socket(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`; replaces a stale one, which the lock of `claim_run_dir` makes safe."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    if os.path.lexists(path):
        os.unlink(path)  # noqa: PTH108 - a socket path is text
    listener.bind(path)
    os.chmod(path, mode)  # noqa: PTH101
    listener.listen(BACKLOG)
    return listener


def run_keeper(settings: Settings, key_channel: int | None = None) -> None:
    """Starts the keeper and serves in this process; raises `SignerError` if it cannot start.

    As root, it reads the key first and drops root before it opens anything else. `key_channel` is the descriptor
    through which a launcher passes the opened key file on SIGHUP.
    """
    channel = None if key_channel is None else adopt_channel(key_channel)
    forbid_dumps()
    take_descriptors()
    os.umask(0o077)
    policy = load_policy(settings.policy_file)
    key = _load_key(settings, policy.ca) if settings.has_ca_key else None
    lines = LogLimit(log)
    report = partial(lines.fault, "internal error")
    shadow = None
    if key is not None and settings.asks_vault:
        shadow, key = Shadow(key.public, report), None  # only the public half is kept
    if settings.keeper_user is not None and os.geteuid() == 0:
        become(settings.keeper_user)
    check_run_dir(settings.run_dir)
    ledger = TimedLedger(settings.data_dir)
    claim = claim_run_dir(settings.run_dir)
    check_recent(ledger)
    local = LocalAuthority(key) if key is not None else None
    authority: Authority = local or _vault_authority(settings)
    core = Core(
        policy=policy,
        key=key,
        ledger=ledger,
        clock=time.time,
        random=os.urandom,
        report=report,
        shadow=shadow,
    )
    compared: dict[str, object] = {"compared_with": shadow.key.fingerprint} if shadow is not None else {}
    ca = key.fingerprint if key is not None else "vault"
    failure = core.begin({"version": __version__, "ca": ca, "mode": settings.mode, **compared})
    if failure is not None:
        raise failure
    shared = settings.run_dir.stat().st_mode & 0o070  # the api runs as another user, in this group
    listener = bind_socket(str(settings.socket), 0o660 if shared else 0o600)
    reloader = Reloader(core, settings, channel, local.use_key if local is not None else lambda _key: None)
    Keeper(core, authority, ledger, listener, reloader.reload, settings.threads * 3 // 4 or 1, lines=lines).serve()
    ledger.close()
    os.close(claim)


def check_run_dir(run_dir: Path) -> None:
    """Raises `BadSettings` unless only the keeper and the api's group can reach the socket."""
    try:
        facts = run_dir.stat()
    except OSError as error:
        raise BadSettings(
            "run_dir_missing", f"SIGNER_RUN_DIR cannot be used: {error.strerror}", "create it, or start `signer serve`"
        ) from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o027:
        raise BadSettings(
            "run_dir_not_private",
            f"SIGNER_RUN_DIR has mode {stat.S_IMODE(facts.st_mode):04o} and owner {facts.st_uid}",
            "set its owner to the keeper's user and its mode to 0700, or to 02750 with the api's group",
        )
