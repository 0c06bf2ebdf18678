"""A ledger of two years, one event a day: certificates, and in between all that decides for as long as it lasts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Final

from signer.ledger.fold import fold_all
from signer.ledger.store import Ledger
from signer.model import Event
from tests.parts.events import freeze, issued, refused, thaw, withheld

EVENTS: Final = 700
DAY: Final = 86_400_000  # milliseconds
BEGAN: Final = 1_700_000_000_000
_KEY: Final = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
_RARE: Final = {
    1: Event("keeper.started", "keeper", {"version": "0.1.0", "ca": "SHA256:" + "B" * 43, "public_key": _KEY}),
    2: Event("publishing.key", "keeper", {"public_key": _KEY}),
    3: Event("ledger.key", "keeper", {"public_key": _KEY}),
    20: freeze("role:llmops", "first"),
    21: thaw("role:llmops"),
    30: freeze("identity:ci", "stolen laptop"),
    40: Event("host.added", "operator", {"name": "web1", "addresses": ["192.0.2.1"], "keys": [_KEY]}),
    50: Event("operation.recorded", "operator", {"operation": "cutover", "outcome": "done", "plan": "1" * 64,
                                                  "evidence": "2" * 64, "reason": ""}),
    60: Event("certificates.revoked", "operator", {"by": "key", "key": "SHA256:" + "C" * 43, "reason": "lost"}),
    61: Event("list.published", "keeper", {"reason": "expired"}),
    62: Event("list.published", "keeper", {"reason": "expired"}),
    70: Event("incident.opened", "operator", {"incident": "i-abc", "request": "r-abc", "identity": "operator",
                                              "role": "llmops", "serial": "69", "reason": "the queue is down"}),
    80: Event("ca.rotated", "keeper", {"from": "SHA256:" + "B" * 43, "to": "SHA256:" + "D" * 43, "public_key": _KEY}),
    90: Event("ledger.restored", "local:root", {"lost_head": None, "first_serial": 100, "last_serial": 2000,
                                                "ca": None}),
    100: Event("approval.expired", "keeper", {"request": "r-abc", "reason": "not claimed"}),
    101: withheld(3),
    102: refused(),
    650: Event("certificates.revoked", "operator", {"by": "identity", "identity": "ci", "reason": "old"}),
    EVENTS - 1: Event("certificates.revoked", "operator", {"by": "since", "since": 1, "reason": "all of them"}),
}  # fmt: skip


def time_of(seq: int) -> int:
    """When an event was recorded, in milliseconds."""
    return BEGAN + seq * DAY


def event(seq: int) -> Event:
    """Event `seq` of the ledger; certificates of both backends, and of the last 300 days of Vault alone."""
    if seq in _RARE:
        return _RARE[seq]
    serial = seq if seq < 90 else 2_000 + seq
    backend = "vault" if seq % 7 == 0 or seq > 400 else "local"
    ends = time_of(seq) // 1000 + 3_600
    return issued(serial, backend=backend, valid_after=ends - 3_630, valid_before=ends)


def fill_long(folder: Path, events: int = EVENTS) -> None:
    """Makes the ledger in `folder`, with its views."""
    with closing(Ledger(folder)) as ledger:
        for seq in range(1, events + 1):
            ledger.commit([event(seq)], time_of(seq))
        fold_all(ledger)
