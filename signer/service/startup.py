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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

from signer import __version__
from signer.authority.core import Core
from signer.ca.agent import CaAgent
from signer.ca.backends import AgentBackend, Backend, FileBackend, VaultBackend
from signer.ca.service_key import ServiceKey
from signer.errors import BadSettings, ForeignCertificate, Unavailable
from signer.files import claim, identity_of
from signer.hardening import become, forbid_dumps, look_up_user, release_memory, take_descriptors
from signer.ledger.audit import check_recent
from signer.ledger.origin import LEDGER_KEY
from signer.model import Event, PublicKey
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.protocol.log_limit import LogLimit
from signer.service.checkpoints import Checkpoints
from signer.service.keeper import BACKLOG, Keeper, Publishing
from signer.service.key_source import AgentSource, FileSource, KeySource
from signer.service.metrics import TimedLedger
from signer.service.notifier import SenderPlace
from signer.service.reload import Reloader
from signer.service.scheduling import own_shares, stay_on
from signer.service.supervisor import Supervisor, adopt_channel
from signer.settings import Settings
from signer.ssh.signing import SigningKey

LOCK_NAME: Final = "keeper.lock"
PUBLISHING_KEY: Final = "publishing.key"  # the file in SIGNER_DATA_DIR; the kind of its event is the same
log = logging.getLogger("signer.keeper")


def _vault_backend(settings: Settings, compared_with: PublicKey | None) -> Backend:
    """Vault as the backend; starts the thread that renews its token. Raises `BadSettings`."""
    from signer.vault.signing import VaultClient  # hvac and requests take 15 MB, which mode local does not need

    assert settings.vault_addr is not None, "checked by load_settings"  # noqa: S101
    assert settings.vault_token_file is not None, "checked by load_settings"  # noqa: S101
    client = VaultClient(settings.vault_addr, settings.vault_token_file, settings.vault_mount, settings.vault_ca_file)
    threading.Thread(target=client.look_after, name="vault", daemon=True).start()
    return VaultBackend(client, compared_with)


def _make_backend(settings: Settings, agent: CaAgent, key: SigningKey | None) -> Backend:
    """The backend that the settings name, with the local key if there is one."""
    if settings.asks_vault:
        return _vault_backend(settings, None if key is None else key.public)
    assert key is not None, "mode local has a key"  # noqa: S101
    if settings.reads_key_file:
        return FileBackend(key)
    backend = AgentBackend(agent, key)
    threading.Thread(target=backend.look_after, name="agent", daemon=True).start()
    return backend


def claim_run_dir(run_dir: Path) -> int:
    """Locks the directory while the descriptor is open; raises `Unavailable` if another keeper has the lock.

    Another keeper may have another ledger: its api must stay connected to it. The api's group may open the directory,
    so the lock is on a file in it that only the keeper's user may open.
    """
    text, hint = "another keeper listens in SIGNER_RUN_DIR", "stop it, or set another SIGNER_RUN_DIR"
    try:
        return claim(run_dir / LOCK_NAME, Unavailable("run_dir_in_use", text, hint))
    except OSError as error:
        raise BadSettings(
            "run_dir_unusable",
            f"the lock file {LOCK_NAME} in SIGNER_RUN_DIR cannot be used: {error.strerror}",
            "remove it if no keeper runs, and check the owner of SIGNER_RUN_DIR",
        ) from None


def bind_socket(path: str, mode: int) -> socket.socket:
    """A listening socket at `path`; replaces a stale one, which the lock of `claim_run_dir` makes safe."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    if os.path.lexists(path):
        os.unlink(path)  # noqa: PTH108 - a socket path is text
    listener.bind(path)
    os.chmod(path, mode)  # noqa: PTH101
    listener.listen(BACKLOG)
    return listener


class KeeperSocket:
    """The keeper's listening socket, and its claim on the run directory."""

    def __init__(self, settings: Settings) -> None:
        check_run_dir(settings.run_dir)
        self._run_dir = settings.run_dir
        self._path = settings.socket
        self._claim = claim_run_dir(settings.run_dir)
        self._identity: tuple[int, int] | None = None  # device and inode of the socket's name

    def listen(self) -> socket.socket:
        """A new listener under the socket's name."""
        shared = self._run_dir.stat().st_mode & 0o070  # the api runs as another user, in this group
        listener = bind_socket(str(self._path), 0o660 if shared else 0o600)
        self._identity = identity_of(self._path)
        return listener

    def listen_again(self) -> socket.socket | None:
        """A new listener if the socket's name was removed or replaced, else None.

        Raises `BadSettings` or `Unavailable` if the run directory cannot be used: then the next start makes it again.
        """
        if identity_of(self._path) == self._identity:
            return None
        check_run_dir(self._run_dir)
        self.close()  # of a directory that was removed, too
        self._claim = claim_run_dir(self._run_dir)
        log.warning("the keeper's socket was removed or replaced; listening again")
        return self.listen()

    def close(self) -> None:
        """Gives up the claim."""
        if self._claim >= 0:
            os.close(self._claim)
            self._claim = -1


def run_keeper(settings: Settings, channel_number: int | None = None) -> None:
    """Starts the keeper and serves in this process; raises `SignerError` if it cannot start.

    As root, it reads the key file first and drops root before it opens anything else. `channel_number` is the
    descriptor of a launcher's channel, through which the opened key file comes at a reload.
    """
    channel = adopt_channel(channel_number)
    supervisor = Supervisor(channel, os.environ)
    forbid_dumps()
    take_descriptors()
    os.umask(0o077)
    policy = load_policy(settings.policy_file)
    lines = LogLimit(log)
    source: KeySource | None = None
    key: SigningKey | None = None
    if settings.reads_key_file:
        source = FileSource(settings, channel)
        key = source.load(policy.ca)  # as root, who alone may read it
    if settings.keeper_user is not None and os.geteuid() == 0:
        become(settings.keeper_user)
    agent = CaAgent(settings.ca_agent_socket)
    if settings.has_ca_key and source is None:
        source = AgentSource(agent)
        key = source.load(policy.ca)
    check_run_dir(settings.run_dir)
    ledger = TimedLedger(settings.data_dir, supervisor.alive)
    keys = {name: ServiceKey.open(settings.data_dir / name) for name in (PUBLISHING_KEY, LEDGER_KEY)}
    place = KeeperSocket(settings)
    check_recent(ledger)
    backend = _make_backend(settings, agent, key)
    del key  # mode shadow keeps the public half only
    core = _make_core(policy, backend, ledger, lines)
    _begin(core, backend)
    _record_keys(core, ledger, keys)
    shares = own_shares(settings.workers)
    keeper = Keeper(
        core,
        backend,
        ledger,
        place.listen(),
        Reloader(core, backend, settings, source),
        settings.threads * 3 // 4 or 1,
        publishing=Publishing(settings.published, keys[PUBLISHING_KEY]),
        checkpoints=Checkpoints(ledger, keys[LEDGER_KEY], settings.ledger_origin),
        sender=_find_sender(settings),
        supervisor=supervisor,
        listen_again=place.listen_again,
        lines=lines,
        helpers_on=shares.others,
    )
    stay_on(shares.keeper)
    release_memory()
    try:
        keeper.serve()
    finally:
        ledger.close()
        place.close()


def _make_core(policy: Policy, backend: Backend, ledger: TimedLedger, lines: LogLimit) -> Core:
    """The core, with the clock and the randomness of this machine."""
    return Core(
        policy=policy,
        backend=backend,
        ledger=ledger,
        clock=time.time,
        random=os.urandom,
        report=partial(_report, lines),
    )


def _find_sender(settings: Settings) -> SenderPlace | None:
    """The process that sends notices; None if no channels are configured. Raises `BadSettings`."""
    if settings.notices_file is None:
        return None
    user = settings.notices_user
    return SenderPlace(settings.notices_socket, os.geteuid() if user is None else look_up_user(user).pw_uid)


def _begin(core: Core, backend: Backend) -> None:
    """Records the start, and warns if the ledger has another CA key; raises `Unavailable` or `LedgerBroken`."""
    failure = core.begin({"version": __version__, **backend.facts()})
    own, former = backend.order.local_key, core.former_ca
    if own is not None and former not in (None, own.fingerprint):
        log.warning("the CA key is %s; the ledger was written with %s", own.fingerprint, former)
        if not core.policy.ca.names(str(former)):
            hint = "if the ledger is another platform's, stop and restore the right one"
            log.warning("policy.toml does not name %s: %s", former, hint)
    if failure is not None:
        raise failure


def _record_keys(core: Core, ledger: TimedLedger, keys: Mapping[str, ServiceKey]) -> None:
    """Records each key that the ledger does not have yet, by its file; raises `Unavailable` or `LedgerBroken`."""
    publishing, checkpoints = keys[PUBLISHING_KEY].line, keys[LEDGER_KEY].line
    for event, hint in (
        (Event("publishing.key", "keeper", {"public_key": publishing}), "hosts must pin it (`signer hosts key`)"),
        (Event("ledger.key", "keeper", {"public_key": checkpoints}), "witnesses must know it (`signer ledger key`)"),
    ):
        if ledger.last_service_key(event.kind) != event.body["public_key"]:
            failure = core.record([event])
            if failure is not None:
                raise failure
            log.warning("the key %s is %s: %s", event.kind, keys[event.kind].fingerprint, hint)


def _report(lines: LogLimit, error: Exception) -> None:
    """Logs an error that the core met: ours with its stack, one of Vault's as a sentence."""
    if isinstance(error, ForeignCertificate):
        lines.warn(error.code, error.text)
    else:
        lines.fault("internal error", error)


def check_run_dir(run_dir: Path) -> None:
    """Raises `BadSettings` unless only the keeper and the api's group can reach the socket."""
    try:
        facts = run_dir.stat()
    except OSError as error:
        raise BadSettings(
            "run_dir_missing",
            f"SIGNER_RUN_DIR cannot be used: {error.strerror}",
            "create it for the keeper's user, and let that user through its parent directories",
        ) from None
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o027:
        raise BadSettings(
            "run_dir_not_private",
            f"SIGNER_RUN_DIR has mode {stat.S_IMODE(facts.st_mode):04o} and owner {facts.st_uid}",
            "set its owner to the keeper's user and its mode to 0700, or to 02750 with the api's group",
        )
