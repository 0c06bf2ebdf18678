"""What a ledger keeps of the events that were archived: the hashes of all, and those that still decide something.

The event `ledger.archived` commits to both: the chain has it, so what is kept needs no trust. The hash of each archived
event is kept (32 bytes of about 600), so each proof and each saved head goes on being checked without a segment.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, Final

from signer.ledger import schema
from signer.ledger.chain import entry_hash
from signer.ledger.reader import EVENTS_BETWEEN, ROWS, Archive, LedgerReader, broken_at
from signer.ledger.subtrees import TILE, leaves
from signer.ledger.tree import HASH_BYTES, CompactRange

_STEP: Final = 400 * TILE  # events whose hashes are in memory at once
# What is carried over, by the number of the rule, which the event `ledger.archived` names: all that this release reads
# from a ledger however old it is (`LedgerReader`). The first event names the ledger among logs; of published lists and
# of local certificates the last one counts, for the list's version and the next serial; requests and waivers are over
# by then. A rule never changes (a test says so), so its kinds are written out here: `verify_segments` compares each
# archive by its own. A release that reads more of old events adds a rule, and finds no more of them in what an older
# rule left.
CARRIED: Final = {
    1: "seq = 1 OR kind IN ('freeze.set', 'freeze.lifted') OR kind IN ('host.added', 'host.removed')"
    " OR kind = 'operation.recorded' OR kind = 'ledger.restored' OR kind = 'ledger.archived'"
    " OR kind IN ('ledger.key', 'publishing.key') OR (kind IN ('ca.rotated', 'certificates.revoked', 'keeper.started',"
    " 'ledger.restored', 'list.published') AND kind <> 'list.published') OR kind LIKE 'incident.%'"
    " OR seq = (SELECT max(seq) FROM events WHERE seq <= :last AND kind = 'list.published')"
    " OR seq = (SELECT max(seq) FROM events WHERE seq <= :last AND kind = 'certificate.issued'"
    " AND body ->> 'backend' = 'local')"
}
CARRY_RULE: Final = max(CARRIED)  # by which a new archive carries events over

Row = tuple[Any, ...]


def carried_rows(reader: LedgerReader, last: int, rule: int) -> list[Row]:
    """The events up to `last` that still decide something by a rule of `CARRIED`, in their order."""
    return reader.query(f"{ROWS} WHERE seq <= :last AND ({CARRIED[rule]}) ORDER BY seq", {"last": last})


def held_rows(reader: LedgerReader, first: int, last: int) -> list[Row]:
    """The events from `first` to `last` that the ledger has, in their order."""
    return reader.query(EVENTS_BETWEEN, (first - 1, last))


def carried_digest(rows: Iterable[Row]) -> str:
    """Hex SHA-256 over a line `seq:hash` for each event."""
    return sha256("".join(f"{row[0]}:{row[6]}\n" for row in rows).encode()).hexdigest()


def newest_archive(reader: LedgerReader) -> Archive:
    """The archive after which the ledger's own events begin; raises `LedgerBroken` if no event of theirs says so."""
    base = reader.base
    for archive in reversed(reader.archives()):
        if archive.last == base < archive.seq:
            if archive.head != reader.hash_at(base):
                raise broken_at(archive.seq, f"it names another event {base} than the kept hashes")
            return archive
    raise broken_at(base + 1, f"events 1 to {base} are missing, and no event says that they were archived")


def history(reader: LedgerReader) -> list[Archive]:
    """The archives whose segments together have all archived events, oldest first; raises `LedgerBroken`."""
    found: list[Archive] = []
    known, before = reader.archives(), reader.base
    while before:
        newest = next((one for one in reversed(known) if one.last == before and one.first <= before), None)
        if newest is None:
            raise broken_at(before, "it was archived, and no event says so")
        found.append(newest)
        before = newest.first - 1
    return found[::-1]


def add_archived(db: sqlite3.Connection, source: LedgerReader, last: int) -> None:
    """Makes and fills the table `archived` for events 1 to `last` of `source`, a multiple of 256."""
    db.execute(schema.ARCHIVED)
    db.executemany(schema.ADD_ARCHIVED, _tiles(source, last, CompactRange()))
    for trigger in schema.ARCHIVED_TRIGGERS:
        db.execute(trigger)


def _tiles(source: LedgerReader, last: int, tree: CompactRange) -> Iterator[tuple[int, int, bytes]]:
    """The rows for events 1 to `last`, by which `tree` grows; raises `LedgerBroken`."""
    above: dict[int, list[bytes]] = defaultdict(list)
    for first in range(0, last, _STEP):
        data = leaves(source.hashes(first, min(first + _STEP, last)))
        for level, _, digest in tree.extend(data, schema.TREE_STEP):
            above[level].append(digest)
        for at in range(0, len(data), TILE):
            yield 0, (first + at) // TILE, b"".join(data[at : at + TILE])
    for level, hashes in above.items():
        for at in range(0, len(hashes), TILE):
            yield level, at // TILE, b"".join(hashes[at : at + TILE])


def check_archived(reader: LedgerReader) -> None:
    """Compares all that is kept of archived events with the event that commits to it; raises `LedgerBroken`.

    What was carried over is what the archived chain has: each event's hash is one of those under the root. That nothing
    was left out when the archive was made, only the segment shows (`archive.verify_segments`).
    """
    if not reader.base:
        return
    archive = newest_archive(reader)
    tree = CompactRange()
    rows = dict[tuple[int, int], bytes]()
    for level, number, data in _tiles(reader, archive.last, tree):
        if level or len(data) != TILE * HASH_BYTES:
            rows[level, number] = data
    if tree.size != archive.last or tree.root().hex() != archive.root:
        raise broken_at(archive.seq, f"the kept hashes of events 1 to {archive.last} are not those that it names")
    kept = {
        (level, number): bytes(data)
        for level, number, data in reader.query("SELECT level, number, hashes FROM archived WHERE level > 0")
    }
    if kept != rows:
        raise broken_at(archive.seq, "the kept subtrees are not those of the kept hashes")
    _check_carried(reader, archive)


def _check_carried(reader: LedgerReader, archive: Archive) -> None:
    rows = held_rows(reader, 0, archive.last)
    for seq, time_ms, kind, actor, body, prev, digest in rows:
        if digest != reader.hash_at(seq) or digest != entry_hash(seq, time_ms, kind, actor, body, prev):
            raise broken_at(seq, "it was carried over, and is not what was archived")
    if (len(rows), carried_digest(rows)) != (archive.carried, archive.carried_sha256):
        raise broken_at(archive.seq, f"it carried over {archive.carried} events, and other ones are there")
