"""Logs an outage of the whole service once when it begins, and once when it ends, with its duration."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from signer.errors import SignerError
from signer.protocol.log_limit import LogLimit

# While one of these lasts, nobody gets a certificate. The probe of /readyz notices the end of the first group; of the
# second, only a signature proves it.
_PROBED: Final = frozenset(
    {
        "clock_behind", "ledger_broken", "ledger_missing", "ledger_not_ours", "ledger_replaced",
        "ledger_structure_differs", "ledger_unavailable", "ledger_version_newer",
    }
)  # fmt: skip
_SIGNED: Final = frozenset(
    {
        "ca_agent_down", "ca_agent_key_missing", "ca_agent_malformed", "ca_agent_not_trusted", "ca_agent_refused",
        "ca_agent_wrong_signature", "signing_failed", "vault_ca_unknown", "vault_down", "vault_forbidden",
        "vault_mount_missing", "vault_not_trusted", "vault_sealed",
    }
)  # fmt: skip
OUTAGES: Final = _PROBED | _SIGNED


@dataclass(slots=True)
class Outage:
    """Whether certificates are issued at all, as the keeper's replies show it."""

    lines: LogLimit
    clock: Callable[[], float] = time.monotonic
    lasting: SignerError | None = None  # the failure that began it
    _since: float = 0.0  # seconds, of `clock`

    def note_failure(self, failure: SignerError) -> None:
        """Logs the begin of an outage, if the failure is one and none lasts."""
        if failure.code in OUTAGES and self.lasting is None:
            self._since, self.lasting = self.clock(), failure
            self.lines.warn("an outage began", f"no certificate is issued: {failure.text}; {failure.hint}")

    def note_ready(self) -> None:
        """Ends an outage that the probe of /readyz would still show."""
        if self.lasting is not None and self.lasting.code in _PROBED:
            self.note_signature()

    def note_signature(self) -> None:
        """Logs the end of an outage, if one lasts."""
        if self.lasting is not None:
            how = f"after {self.clock() - self._since:.0f} s ({self.lasting.code})"
            self.lines.warn("an outage ended", f"certificates are issued again, {how}")
            self.lasting = None
