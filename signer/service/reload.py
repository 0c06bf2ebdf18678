"""Reload on SIGHUP: reads policy.toml and the CA key file again.

An invalid file is rejected as a whole and the current one stays in force; both outcomes are logged and recorded. A new
key is used only if the policy pins it or names it as next.
"""

from __future__ import annotations

import logging
import socket

from signer.authority.core import Core
from signer.ca.backends import Backend
from signer.ca.key import cannot_open, check_pin, read_ca_key
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
    """Reloads the files of `core`. `channel` delivers the opened key file from a launcher; None without a launcher.

    Mode vault reads no key file; mode shadow only compares with the key.
    """

    def __init__(self, core: Core, backend: Backend, settings: Settings, channel: socket.socket | None) -> None:
        self._core = core
        self._backend = backend
        self._settings = settings
        self._channel = channel

    def reload(self) -> Reloaded:
        """Reads both files; returns which of them changed."""
        read = self._read_policy()
        # The key first: a policy that pins a new key is refused if that key is not in use.
        key = self._reload_key(read.ca if isinstance(read, Policy) else self._core.policy.ca)
        return Reloaded(policy=self._use_policy(read), key=key)

    def _read_policy(self) -> Policy | BadFile:
        try:
            return load_policy(self._settings.policy_file)
        except BadFile as error:
            return error

    def _use_policy(self, read: Policy | BadFile) -> bool:
        try:
            if isinstance(read, BadFile):
                raise read
            failure = self._core.use_policy(read)
        except BadFile as error:
            log.exception(
                "%s (%s); the current policy stays in force\n%s", error.text, error.code, "\n".join(error.problems)
            )
            kept = self._core.policy.digest
            body: dict[str, object] = {"code": error.code, "problems": list(error.problems), "kept": kept}
            _log_unrecorded(self._core.record([Event("policy.refused", "keeper", body)]))
            return False
        _log_unrecorded(failure)
        return True

    def _reload_key(self, ca: CaKeys) -> bool:
        in_use = self._backend.order.local_key
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
            _log_unrecorded(self._core.record([Event("ca.refused", "keeper", body)]))
            return False
        failure = self._core.use_key(key)
        if failure is not None:
            log.error("the new CA key is not used because its rotation cannot be recorded: %s", failure.text)
            return False
        log.warning("CA key rotated from %s to %s", in_use.fingerprint, key.fingerprint)
        return True

    def _open(self) -> int | None:
        """The opened key file; None if this keeper may not open it. Raises `BadKeyFile`."""
        try:
            descriptor = None if self._channel is None else take_over(self._channel)
        except OSError as error:
            raise cannot_open(error) from None
        if descriptor is not None:
            return descriptor
        try:
            return open_unread(self._settings.ca_key_file)
        except PermissionError:  # the keeper dropped root after the start
            log.warning(
                "the CA key file was not read again: %s",
                "restart the keeper to take a new key" if self._channel is None else "send SIGHUP to `signer serve`",
            )
            return None
        except OSError as error:
            raise cannot_open(error) from None


def _log_unrecorded(failure: SignerError | None) -> None:
    if failure is not None:
        log.error("the reload could not be recorded: %s", failure.text)
