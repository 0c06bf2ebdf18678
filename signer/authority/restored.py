"""What restoring a ledger from a backup means: which certificates may be lost, and the events that make up for them.

Whatever was recorded after the backup is lost: certificates, freezes, uses of approvals. So the serials that may have
been given are never given again and count as revoked, everything is frozen until a human lifts it, which also ends all
waivers, and no request of the backup can be claimed (once more). Pure but for reading ledgers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from signer.authority.approvals import REMEMBERED, Approvals
from signer.errors import LedgerBroken, NotFound, Refused
from signer.ledger.reader import LedgerReader
from signer.model import CaKeys, Event, Head

SKIPPED: Final = 1_000_000  # serials
REASON: Final = "the ledger was restored from a backup"


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore does: the backup ends at `head`, `lost_head` is the newest event that is known to be lost.

    The serials from `first_serial` to `last_serial` are skipped and revoked; `ca` is the fingerprint of the only key
    that can have signed them, None if there may be several. `requests` are ended. `is_newer` if the ledger in the place
    ends before the backup does.
    """

    head: Head
    lost_head: Head | None
    first_serial: int
    last_serial: int
    ca: str | None
    requests: tuple[str, ...]
    is_newer: bool = False

    def events(self, user: str) -> list[Event]:
        """The events to record in one transaction; `user` is the account on this host that restores."""
        actor, lost = f"local:{user}", self.lost_head
        body: dict[str, object] = {
            "lost_head": None if lost is None else {"seq": lost.seq, "hash": lost.hash},
            "first_serial": self.first_serial,
            "last_serial": self.last_serial,
            "ca": self.ca,
        }
        ends = [Event("approval.expired", actor, {"request": name, "reason": REASON}) for name in self.requests]
        restored = Event("ledger.restored", actor, body)
        return [restored, Event("freeze.set", actor, {"scope": "all", "reason": REASON}), *ends]


def plan_restore(
    backup: LedgerReader,
    replaced: LedgerReader | None,
    saved: Head | None,
    keys: CaKeys | None,
    *,
    allow_other: bool = False,
) -> RestorePlan:
    """The plan for `backup` in the place of `replaced`; `saved` is a head that the operator kept, `keys` the policy's.

    Raises `Refused` if the ledgers have different events, or the backup a CA that the policy does not name, unless
    `allow_other`; and if the saved head belongs to neither.
    """
    head, present = backup.head(), Head(0, "", 0) if replaced is None else replaced.head()
    if not allow_other:
        _check_same(backup, replaced)
        _check_ca(backup, keys)
    candidates = [one for one in (present, saved) if one is not None and one.seq > head.seq]
    lost = max(candidates, key=lambda one: one.seq, default=None)
    if saved is not None:
        _check_saved(saved, backup, replaced)
    last = max(backup.last_serial(), 0 if replaced is None else replaced.last_serial())
    unseen = 0 if lost is None else lost.seq - max(head.seq, present.seq)  # each may be a certificate
    asked = Approvals.from_entries(backup.asked(max(head.time_ms // 1000 - REMEMBERED, 0)))
    return RestorePlan(
        head=head,
        lost_head=lost,
        first_serial=backup.last_serial() + 1,
        last_serial=last + max(SKIPPED, unseen),
        ca=_only_ca(backup, replaced, keys),
        requests=tuple(asked.open),
        is_newer=replaced is not None and present.seq < head.seq,
    )


def is_restored(backup: LedgerReader, replaced: LedgerReader) -> bool:
    """Whether the ledger in the place is the backup with the events of its restore, and nothing after them."""
    head, present = backup.head(), replaced.head()
    if not _has(replaced, head) or present.seq == head.seq:
        return False
    try:
        first, last = replaced.entry(head.seq + 1), replaced.entry(present.seq)
    except NotFound:  # archived since
        return False
    if first.kind != "ledger.restored":
        return False
    # All of one transaction have one time.
    return last.time_ms == first.time_ms and last.kind in ("freeze.set", "approval.expired")


def _has(ledger: LedgerReader, head: Head) -> bool:
    """Whether a ledger has, or had before it was archived, this event."""
    try:
        return ledger.hash_at(head.seq) == head.hash
    except LedgerBroken:
        return False


def _check_same(backup: LedgerReader, replaced: LedgerReader | None) -> None:
    if replaced is None or _has(replaced, backup.head()) or _has(backup, replaced.head()):
        return
    raise Refused(
        "restore_other_ledger",
        f"the backup is not of the ledger in SIGNER_DATA_DIR: event {min(backup.head().seq, replaced.head().seq)}"
        " is another one",
        "check both with `signer ledger verify`; add --other if the backup is the right one",
    )


def _check_ca(backup: LedgerReader, keys: CaKeys | None) -> None:
    found = backup.last_ca()
    if keys is None or found is None or keys.names(found):
        return
    raise Refused(
        "restore_other_ca",
        f"the backup was written with the CA key {found[:60]}, which policy.toml does not name",
        "restore the backup of this platform; add --other if it is the right one",
    )


def _check_saved(saved: Head, backup: LedgerReader, replaced: LedgerReader | None) -> None:
    """Raises `Refused` if a ledger that is long enough to have the saved head has another event there."""
    for name, ledger in (("backup", backup), ("ledger in SIGNER_DATA_DIR", replaced)):
        if ledger is not None and 0 < saved.seq <= ledger.head().seq and not _has(ledger, saved):
            raise Refused(
                "restore_head_differs",
                f"event {saved.seq} of the {name} is not that of --lost-head",
                "check where the head is from; leave --lost-head out if it is not of this ledger",
            )


def _only_ca(backup: LedgerReader, replaced: LedgerReader | None, keys: CaKeys | None) -> str | None:
    """The fingerprint of the key that signed everything that may be lost; None if it may have been rotated."""
    found = {backup.last_ca(), *(() if replaced is None else (replaced.last_ca(),))}
    found |= {None} if keys is None else set(keys.may_sign)
    return found.pop() if len(found) == 1 else None
