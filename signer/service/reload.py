"""Reload on SIGHUP: reads policy.toml and looks for the CA key again.

An invalid file is rejected as a whole and the current one stays in force; both outcomes are logged and recorded. A new
key is used only if the policy pins it or names it as next.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from signer.authority.core import Core
from signer.ca.backends import Backend
from signer.errors import BadFile, SignerError
from signer.model import Event, PublicKey
from signer.policy.changes import compare_policies
from signer.policy.decide import Policy
from signer.policy.file import load_policy
from signer.service.key_source import KeySource
from signer.settings import Settings
from signer.ssh.signing import SigningKey

log = logging.getLogger("signer.keeper")


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Which of policy and key a reload put in force, and its report for `signer reload`.

    `began` is in seconds of CLOCK_MONOTONIC: what was changed in the files before is in the report.
    """

    policy: bool
    key: bool
    began: float
    report: dict[str, object]


@dataclass(frozen=True, slots=True)
class _Found:
    """What a reload read, before any of it is used."""

    began: float
    policy: Policy | BadFile
    key: SigningKey | SignerError | None


class Reloader:
    """Reloads policy and key of `core`. Without a source no key is looked for; mode shadow only compares with the key.

    A source that may be slow is asked in a thread; the keeper calls `collect` until it is done.
    """

    def __init__(self, core: Core, backend: Backend, settings: Settings, source: KeySource | None) -> None:
        self._core = core
        self._backend = backend
        self._settings = settings
        self._source = source
        self._thread: threading.Thread | None = None
        self._found: _Found | None = None

    @property
    def is_busy(self) -> bool:
        """True from `start` to the `collect` that returns its result."""
        return self._thread is not None or self._found is not None

    def start(self) -> None:
        """Reads both; the result is for `collect`. The caller waits until the reloader is not busy."""
        began = time.monotonic()
        read = self._read_policy()
        # The key first: a policy that pins a new key is refused if that key is not in use.
        ca = read.ca if isinstance(read, Policy) else self._core.policy.ca
        in_use = self._backend.order.local_key
        if in_use is None or self._source is None:
            self._found = _Found(began, read, None)
            return
        source = self._source

        def look() -> None:
            try:
                key = source.look_again(ca, in_use)
            except SignerError as error:
                self._found = _Found(began, read, error)
            except Exception:
                log.exception("the look for the CA key failed")
                fault = SignerError("internal_error", "internal error", "see the service's log")
                self._found = _Found(began, read, fault)
            else:
                self._found = _Found(began, read, key)

        if source.is_slow:
            self._thread = threading.Thread(target=look, name="reload", daemon=True)
            self._thread.start()
        else:
            look()

    def collect(self) -> Reloaded | None:
        """Uses what was read; None while it is being read, and without a reload."""
        found = self._found
        if found is None:
            return None
        self._thread = self._found = None
        key = self._use_key(found.key)
        policy = self._use_policy(found.policy)
        is_new_key = key is not None and "error" not in key
        return Reloaded("error" not in policy, is_new_key, found.began, {"policy": policy, "key": key})

    def _read_policy(self) -> Policy | BadFile:
        try:
            return load_policy(self._settings.policy_file)
        except BadFile as error:
            return error

    def _use_policy(self, read: Policy | BadFile) -> dict[str, object]:
        """What is in force now, and what that changed; or why it is refused."""
        before = self._core.policy
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
            return {"error": {**error.as_json(), "problems": list(error.problems)}, "digest": kept}
        _log_unrecorded(failure)
        return {
            "digest": read.digest,
            "changed": read.digest != before.digest,
            "unrecorded": None if failure is None else failure.text,
            **compare_policies(before, read),
        }

    def _use_key(self, key: SigningKey | SignerError | None) -> dict[str, object] | None:
        """The change of the key, or why the new one is refused; None if it is the same."""
        in_use: PublicKey | None = self._backend.order.local_key
        if key is None or in_use is None:
            return None
        if isinstance(key, SignerError):
            log.error("%s (%s); the key %s stays in use", key.text, key.code, in_use.fingerprint)
            body: dict[str, object] = {"code": key.code, "text": key.text, "kept": in_use.fingerprint}
            _log_unrecorded(self._core.record([Event("ca.refused", "keeper", body)]))
            return {"error": key.as_json(), "kept": in_use.fingerprint}
        failure = self._core.use_key(key)
        if failure is not None:
            log.error("the new CA key is not used because its rotation cannot be recorded: %s", failure.text)
            return {"error": failure.as_json(), "kept": in_use.fingerprint}
        log.warning("CA key rotated from %s to %s", in_use.fingerprint, key.fingerprint)
        return {"from": in_use.fingerprint, "to": key.fingerprint}


def _log_unrecorded(failure: SignerError | None) -> None:
    if failure is not None:
        log.error("the reload could not be recorded: %s", failure.text)
