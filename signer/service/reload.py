"""What a keeper does on SIGHUP: reads policy.toml and the CA key file again, and takes each whole or not at all.

A new key is taken only if the policy pins it or names it as next. What is refused is said in the log and recorded, and
the keeper goes on with what it had. The ledger says which key signed what: each certificate's event names it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

from signer.authority.core import Core
from signer.ca.key import CaKey, cannot_open, check_pin, read_ca_key
from signer.errors import BadFile, BadKeyFile, SignerError
from signer.files import open_unread
from signer.model import CaKeys, Event
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.service.keeper import Reloaded
from signer.service.key_channel import take_over
from signer.settings import Settings

log = logging.getLogger("signer.keeper")


class Reloader:
    """Reads anew for `core`. `channel` brings the key file, opened, from a launcher; None if there is no launcher.

    `on_key` is told of a new key that is in use from now on. In mode vault no key file is looked at; in mode shadow a
    new key is compared with, instead of signed with.
    """

    def __init__(
        self, core: Core, settings: Settings, channel: socket.socket | None, on_key: Callable[[CaKey], None]
    ) -> None:
        self._core = core
        self._settings = settings
        self._channel = channel
        self._on_key = on_key

    def reload(self) -> Reloaded:
        """What of the two was taken."""
        read = self._read_policy()
        # The key first: a policy may pin a key that comes with it, and is refused if that key does not come.
        key = self._reload_key(read.ca if isinstance(read, Policy) else self._core.policy.ca)
        return Reloaded(policy=self._use(read), key=key)

    def _read_policy(self) -> Policy | BadFile:
        try:
            return load_policy(self._settings.policy_file)
        except BadFile as error:
            return error

    def _use(self, read: Policy | BadFile) -> bool:
        try:
            if isinstance(read, BadFile):
                raise read
            failure = self._core.use_policy(read)
        except BadFile as error:
            log.exception("%s (%s); the old policy stays\n%s", error.text, error.code, "\n".join(error.problems))
            kept = self._core.policy.digest
            body: dict[str, object] = {"code": error.code, "problems": list(error.problems), "kept": kept}
            _say_unrecorded(self._core.record([Event("policy.refused", "keeper", body)]))
            return False
        _say_unrecorded(failure)
        return True

    def _reload_key(self, ca: CaKeys) -> bool:
        in_use = self._core.own_key
        if in_use is None:
            return False
        try:
            descriptor = self._open()
            if descriptor is None:
                return False
            key = read_ca_key(descriptor, self._settings.ca_key_owner)
            if key.fingerprint == in_use.fingerprint:
                return False
            check_pin(key, *ca.may_sign)
        except BadKeyFile as error:
            log.error("%s (%s); the key %s stays in use", error.text, error.code, in_use.fingerprint)  # noqa: TRY400
            body: dict[str, object] = {"code": error.code, "text": error.text, "kept": in_use.fingerprint}
            _say_unrecorded(self._core.record([Event("ca.refused", "keeper", body)]))
            return False
        failure = self._core.use_key(key)
        if failure is not None:
            log.error("the new CA key is not taken, as that cannot be recorded: %s", failure.text)
            return False
        self._on_key(key)
        log.warning("the CA key %s is in use, %s no more", key.fingerprint, in_use.fingerprint)
        return True

    def _open(self) -> int | None:
        """The key file, opened; None if it is not for this keeper to open. Raises `BadKeyFile`."""
        try:
            descriptor = None if self._channel is None else take_over(self._channel)
        except OSError as error:
            raise cannot_open(error) from None
        if descriptor is not None:
            return descriptor
        try:
            return open_unread(self._settings.ca_key_file)
        except PermissionError:  # root was given up after the start
            log.warning(
                "the CA key file was not looked at: %s",
                "restart the keeper to take a new key" if self._channel is None else "send SIGHUP to `signer serve`",
            )
            return None
        except OSError as error:
            raise cannot_open(error) from None


def _say_unrecorded(failure: SignerError | None) -> None:
    if failure is not None:
        log.error("the reload could not be recorded: %s", failure.text)
