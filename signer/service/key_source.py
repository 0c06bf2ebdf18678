"""Where the local CA key comes from, at the start and at each reload: the file of SIGNER_CA_KEY_FILE, or an ssh-agent.

A source gives out no key that policy.toml does not allow: of the file the pinned one or the next one, of an agent,
which may hold any number of keys, the pinned one only.
"""

from __future__ import annotations

import logging
import socket
from typing import Protocol

from signer.ca.agent import CaAgent
from signer.ca.key import cannot_open, check_pin, load_ca_key, read_ca_key
from signer.errors import BadKeyFile
from signer.files import open_unread
from signer.hardening import look_up_user
from signer.model import CaKeys, PublicKey
from signer.service.key_channel import take_over
from signer.settings import Settings
from signer.ssh.signing import SigningKey

log = logging.getLogger("signer.keeper")


class KeySource(Protocol):
    """Both raise a `SignerError` if there is no key that may be used."""

    @property
    def is_slow(self) -> bool:
        """True if `look_again` may wait for another process, so that the loop must not call it."""

    def load(self, ca: CaKeys) -> SigningKey:
        """The key at the start."""

    def look_again(self, ca: CaKeys, in_use: PublicKey) -> SigningKey | None:
        """Another key than the one in use; None if there is none to be taken."""


class FileSource:
    """The key file. `channel` delivers it, opened, from a launcher; None without a launcher."""

    is_slow = False

    def __init__(self, settings: Settings, channel: socket.socket | None) -> None:
        self._path = settings.ca_key_file
        self._owner = settings.ca_key_owner
        self._channel = channel

    def load(self, ca: CaKeys) -> SigningKey:
        """The key in the file; raises `BadKeyFile`."""
        try:
            return load_ca_key(self._path, self._owner, *ca.may_sign)
        except BadKeyFile as error:
            log.error("the CA key is refused: %s", error.code)  # noqa: TRY400 - only the code; the caller prints the rest
            raise

    def look_again(self, ca: CaKeys, in_use: PublicKey) -> SigningKey | None:
        """The key that is in the file now; raises `BadKeyFile`."""
        descriptor = self._open()
        if descriptor is None:
            return None
        key = read_ca_key(descriptor, self._owner)
        if key.fingerprint == in_use.fingerprint:
            return None
        check_pin(key, *ca.may_sign)
        return key

    def _open(self) -> int | None:
        """The opened key file; None if this keeper may not open it. Raises `BadKeyFile`."""
        try:
            descriptor = None if self._channel is None else take_over(self._channel)
        except OSError as error:
            raise cannot_open(error) from None
        if descriptor is not None:
            return descriptor
        try:
            return open_unread(self._path)
        except PermissionError:  # the keeper dropped root after the start
            log.warning(
                "the CA key file was not read again: %s",
                "restart the keeper to take a new key" if self._channel is None else "send SIGHUP to `signer serve`",
            )
            return None
        except OSError as error:
            raise cannot_open(error) from None


def agent_for_check(settings: Settings) -> CaAgent:
    """The ssh-agent as the keeper sees it, for a command that root runs before the keeper has become its user.

    Raises `BadSettings` if that user does not exist.
    """
    user = settings.keeper_user
    return CaAgent(settings.ca_agent_socket, look_up_user(user).pw_uid if user is not None else None)


class AgentSource:
    """An ssh-agent. The pin of policy.toml alone chooses the key: `ca.next` is taken once it is the pinned one."""

    is_slow = True

    def __init__(self, agent: CaAgent) -> None:
        self._agent = agent

    def load(self, ca: CaKeys) -> SigningKey:
        """The pinned key; raises `Unavailable`, or `BadKeyFile` if it may not be a CA key."""
        return self._agent.find_key(ca.fingerprint)

    def look_again(self, ca: CaKeys, in_use: PublicKey) -> SigningKey | None:
        """The pinned key, if it is not in use yet; raises as `load` does."""
        return None if ca.fingerprint == in_use.fingerprint else self.load(ca)
