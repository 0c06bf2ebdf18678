"""Reads the events of a ledger, and from them what a keeper decides by; also while a keeper writes.

Maps `sqlite3` errors: `Unavailable` for temporary ones, `LedgerBroken` for permanent ones. Certificates are found with
`pages.py`; nothing here reads a view.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from signer.errors import LedgerBroken, NotFound, Unavailable, write_hint
from signer.ledger import schema
from signer.ledger.chain import GENESIS
from signer.model import BACKDATE, LONGEST_VALIDITY, ActiveFreeze, Entry, EventFilter, Head

ROWS: Final = "SELECT seq, time, kind, actor, body, prev, hash FROM events"  # as `Entry` has them
# The events after a number, and up to another one.
EVENTS_BETWEEN: Final = f"{ROWS} WHERE seq > ? AND seq <= ? ORDER BY seq"
# Seconds by which a certificate ends after the time of its event at most: no policy grants more than the longest
# validity; Vault's clock may be ahead by 60 s, and the keeper's may be set back by 60 s between grant and record.
REACH: Final = LONGEST_VALIDITY + 120


@dataclass(frozen=True, slots=True)
class Recent:
    """One certificate that may count towards a limit; times are in seconds."""

    identity: str
    role: str
    issued: int
    valid_before: int


@dataclass(frozen=True, slots=True)
class Restored:
    """One restore: its event and time, the last event that was lost if it is known, and the serials that it skipped."""

    seq: int
    time_ms: int
    lost_seq: int | None
    first_serial: int
    last_serial: int


@dataclass(frozen=True, slots=True)
class Archive:
    """One event `ledger.archived`: its number and time, the first and the last event of the segment, the hash of the
    last one, the root of the tree of all events up to it, name and digest (hex SHA-256) of the segment's file, and how
    many events were carried over by which rule (`archived.py`), with the digest of their numbers and hashes."""

    seq: int
    time_ms: int
    first: int
    last: int
    head: str
    root: str
    file: str
    sha256: str
    rule: int
    carried: int
    carried_sha256: str


@dataclass(frozen=True, slots=True)
class IssuedEvent:
    """What an event says of a certificate that it records; times are in seconds since 1970."""

    seq: int
    at: int
    identity: str
    serial: int
    backend: str
    ca: str
    fingerprint: str
    valid_before: int


class _IssuedFacts(msgspec.Struct):
    serial: str
    backend: str
    ca: str
    fingerprint: str
    valid_before: int


_ISSUED_FACTS: Final = msgspec.json.Decoder(_IssuedFacts)


class LedgerReader:
    """Reads a ledger, also while a keeper writes it; or the file of another name in the folder."""

    def __init__(self, data_dir: Path, file_name: str = schema.FILE_NAME) -> None:
        self.data_dir = data_dir
        self.file_name = file_name
        self._path = data_dir / file_name
        self._db: sqlite3.Connection | None = None
        self._base: int | None = None

    def close(self) -> None:
        """Closes the connection; the next read opens a new one."""
        self._base = None
        if self._db is not None:
            self._db.close()
            self._db = None

    def connection(self) -> sqlite3.Connection:
        """The open connection; raises `Unavailable` or `LedgerBroken`."""
        if self._db is None:
            if not self._path.exists():
                missing = "there is no ledger in SIGNER_DATA_DIR"
                raise Unavailable("ledger_missing", missing, "start the keeper once, or correct SIGNER_DATA_DIR")
            db = self._connect(f"file:{self._path}?mode=ro")
            if db.execute("PRAGMA user_version").fetchone()[0] == 0:
                db.close()
                raise Unavailable("ledger_missing", "the ledger is being created", "retry in a moment")
            self._db = db
        return self._db

    def _connect(self, uri: str) -> sqlite3.Connection:
        with storage_errors():
            db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=2, cached_statements=64)
            db.execute("PRAGMA busy_timeout = 2000")
            found = db.execute("PRAGMA user_version").fetchone()[0]
            is_ledger = db.execute("PRAGMA application_id").fetchone()[0] == schema.APPLICATION_ID
            is_foreign = not is_ledger and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        if is_foreign:
            db.close()
            raise LedgerBroken(
                "ledger_not_ours",
                f"{self.file_name} in {self._place} is not a ledger of signer",
                "give the keeper its own SIGNER_DATA_DIR",
            )
        if found > schema.ARCHIVED_VERSION:
            db.close()
            raise LedgerBroken(
                "ledger_version_newer",
                f"the ledger has version {found}; this signer supports version {schema.ARCHIVED_VERSION}",
                "start the newer version that wrote it",
            )
        return db

    @property
    def _place(self) -> str:
        """The folder, as an error names it."""
        return "SIGNER_DATA_DIR" if self.file_name == schema.FILE_NAME else str(self.data_dir)

    def query(self, sql: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement; raises `Unavailable` or `LedgerBroken`."""
        with storage_errors():
            return self.connection().execute(sql, values).fetchall()

    def rows(self, sql: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        """Yields the rows of a statement one by one."""
        with storage_errors():
            yield from self.connection().execute(sql, values)

    def entries(self, tail: str, values: Sequence[object] = ()) -> list[Entry]:
        """The events of a statement that ends so; conditions are constants, `values` are not."""
        return [Entry(*row) for row in self.query(f"{ROWS} {tail}", values)]

    def head(self) -> Head:
        """The newest entry; seq 0 if the ledger is empty."""
        for seq, digest, time_ms in self.query("SELECT seq, hash, time FROM events ORDER BY seq DESC LIMIT 1"):
            return Head(seq, digest, time_ms)
        return Head(0, GENESIS, 0)

    def entry(self, seq: int) -> Entry:
        """One event by its number; raises `LedgerBroken` if it is not there, `NotFound` if it was archived."""
        for entry in self.entries("WHERE seq = ?", (seq,)):
            return entry
        if 0 < seq <= self.base:
            raise events_archived(seq, self.base)
        raise broken_at(seq, "the event is missing")

    # --- archived events ----------------------------------------------------------------------------------------

    @property
    def base(self) -> int:
        """How many events were archived: the ledger has those after them, and of them only their hashes and those that
        were carried over. 0 for most ledgers."""
        if self._base is None:
            base = 0
            if self.query("PRAGMA user_version")[0][0] == schema.ARCHIVED_VERSION:
                ((last,),) = self.query("SELECT max(number) FROM archived WHERE level = 0")
                base = 0 if last is None else (last + 1) << schema.TREE_STEP
            self._base = base
        return self._base

    def start(self) -> Head:
        """The newest archived event, from which the ledger's own go on; its time is not known here and 0."""
        base = self.base
        return Head(base, GENESIS if not base else self.hashes(base - 1, base)[0][1], 0)

    def hash_at(self, seq: int) -> str | None:
        """The hash of an event, also of one that was archived; None without such an event."""
        if seq <= 0:
            return None
        return next((digest for _, digest in self.hashes(seq - 1, seq)), None)

    def hashes(self, after: int, last: int) -> list[tuple[int, str]]:
        """Number and hash of the events after `after` to `last`, also of those that were archived."""
        found: list[tuple[int, str]] = []
        if after < (end := min(last, self.base)):
            rows = self.query(
                "SELECT number, hashes FROM archived WHERE level = 0 AND number >= ? AND number <= ? ORDER BY number",
                (after >> schema.TREE_STEP, (end - 1) >> schema.TREE_STEP),
            )
            for number, tile in rows:
                digests, start = bytes(tile).hex(), number << schema.TREE_STEP
                places = range(max(after - start, 0), min(end - start, _TILE))
                found += [(start + at + 1, digests[64 * at : 64 * at + 64]) for at in places]
        if last > self.base:
            found += self.query(
                "SELECT seq, hash FROM events WHERE seq > ? AND seq <= ? ORDER BY seq", (max(after, self.base), last)
            )
        return found

    def archived_subtrees(self, level: int, first: int, last: int) -> list[bytes]:
        """The hashes of complete subtrees of archived events at a level that is kept, from number `first` to before
        `last`; raises `LedgerBroken` if the table lacks one."""
        last = min(last, self.base >> level)
        if first >= last:
            return []
        rows = self.query(
            "SELECT hashes FROM archived WHERE level = ? AND number >= ? AND number <= ? ORDER BY number",
            (level, first >> schema.TREE_STEP, (last - 1) >> schema.TREE_STEP),
        )
        data = b"".join(bytes(tile) for (tile,) in rows)[32 * (first % _TILE) :][: 32 * (last - first)]
        if len(data) != 32 * (last - first):
            raise LedgerBroken(
                "ledger_broken",
                f"the ledger's table of archived hashes lacks subtrees of level {level}",
                "keep the file unchanged and restore a backup",
            )
        return [data[at : at + 32] for at in range(0, len(data), 32)]

    def archives(self) -> list[Archive]:
        """What was archived of this ledger, oldest first; raises `LedgerBroken` for a malformed event."""
        found = []
        for entry in self._events(schema.IS_ARCHIVED, 0):
            try:
                body = json.loads(entry.body)
                segment, carried = body["segment"], body["carried"]
                facts = int(body["first"]), int(body["last"]), str(body["head"]), str(body["root"])
                file, rule = (str(segment["name"]), str(segment["sha256"])), int(carried["rule"])
                kept = int(carried["events"]), str(carried["sha256"])
            except (KeyError, ValueError, TypeError):
                raise broken_at(entry.seq, "it is not a valid ledger.archived event") from None
            found.append(Archive(entry.seq, entry.time_ms, *facts, *file, rule, *kept))
        return found

    def operations(self, evidence: str | None, before: int | None, limit: int) -> list[Entry]:
        """Recorded operations, newest first: with that evidence, if given, and before event `before`."""
        return self.entries(
            f"WHERE {schema.IS_OPERATION} AND (? IS NULL OR body ->> 'evidence' = ?) AND seq < ?"
            " ORDER BY seq DESC LIMIT ?",
            (evidence, evidence, _NO_END if before is None else before, limit),
        )

    def events(self, wanted: EventFilter) -> list[Entry]:
        """The events that match, newest first, without a look at a view."""
        scope = None if wanted.identity is None else f"identity:{wanted.identity}"
        return self.entries(
            "WHERE seq >= ? AND seq < ? AND (? IS NULL OR kind = ? OR substr(kind, 1, length(?) + 1) = ? || '.')"
            " AND (? IS NULL OR actor = ? OR body ->> 'identity' = ? OR body ->> 'scope' = ?)"
            " AND NOT (? AND kind = 'certificate.issued')"
            " ORDER BY seq DESC LIMIT ?",
            (
                self.first_since(wanted.since or 0),
                _NO_END if wanted.before is None else wanted.before,
                *(wanted.kind,) * 4,
                *(wanted.identity,) * 3,
                scope,
                wanted.only_others,
                wanted.limit,
            ),
        )

    def events_after(self, after: int, limit: int) -> list[Entry]:
        """Events in their order, after event `after`."""
        return self.entries("WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit))

    def recent(self, since: int) -> list[Recent]:
        """Released certificates that expire after `since` (seconds).

        They are among the events that are not older than `REACH` before it; times of events never decrease, so the
        first of those is found by bisection. A certificate of Vault's is granted before it is recorded; if the clock
        is set back in between, only its validity says so.
        """
        first = self.first_since((since - REACH) * 1000)
        withheld = self._withheld(first)
        rows = self.query(
            "SELECT body ->> 'serial', body ->> 'backend', body ->> 'identity', body ->> 'role',"
            " max(time / 1000, body ->> 'valid_after' + coalesce(body ->> 'backdate', ?)), body ->> 'valid_before'"
            " FROM events"
            " WHERE seq >= ? AND kind = 'certificate.issued' AND body ->> 'valid_before' > ? ORDER BY seq",
            (BACKDATE, first, since),
        )
        return [Recent(*facts) for serial, backend, *facts in rows if backend != "local" or serial not in withheld]

    def first_since(self, time_ms: int) -> int:
        """The number of the first event that is not before a time (milliseconds), or the one after the last."""
        low, high = 1, self.head().seq + 1
        while low < high:
            middle = (low + high) // 2
            found = self.query("SELECT time FROM events WHERE seq >= ? ORDER BY seq LIMIT 1", (middle,))
            if found and found[0][0] < time_ms:
                low = middle + 1
            else:
                high = middle
        return low

    def last_serial(self) -> int:
        """The last serial of the local key, also of those that a restore skipped; 0 if there is none.

        Searches backwards, past Vault's certificates.
        """
        newest = (
            "SELECT body ->> 'serial' FROM events WHERE kind = 'certificate.issued' AND body ->> 'backend' = 'local'"
            " ORDER BY seq DESC LIMIT 1"
        )
        issued = next((int(serial) for (serial,) in self.query(newest)), 0)
        return max([issued, *(restored.last_serial for restored in self.restores())])

    def restores(self) -> list[Restored]:
        """Every restore of this ledger from a backup, oldest first."""
        rows = self.query(
            "SELECT seq, time, body ->> '$.lost_head.seq', body ->> 'first_serial', body ->> 'last_serial'"  # noqa: S608
            f" FROM events WHERE {schema.IS_RESTORED} ORDER BY seq"
        )
        return [Restored(*facts) for facts in rows]

    def last_ca(self) -> str | None:
        """The fingerprint of the local key that the ledger saw last; None if it never saw one."""
        newest = (
            "SELECT ca FROM (SELECT seq, CASE kind WHEN 'ca.rotated' THEN body ->> 'to'"
            " WHEN 'keeper.started' THEN coalesce(body ->> 'compared_with', nullif(body ->> 'ca', 'vault'))"
            " WHEN 'certificate.issued' THEN iif(body ->> 'backend' = 'local', body ->> 'ca', NULL) END AS ca"
            " FROM events) WHERE ca IS NOT NULL ORDER BY seq DESC LIMIT 1"
        )
        return next((str(fingerprint) for (fingerprint,) in self.query(newest)), None)

    def last_service_key(self, kind: str) -> str | None:
        """The public key that an event of that kind, such as `publishing.key`, recorded last."""
        newest = (
            "SELECT body ->> 'public_key' FROM events"  # noqa: S608 - a condition from here
            f" WHERE {schema.IS_SERVICE_KEY} AND kind = ? ORDER BY seq DESC LIMIT 1"
        )
        return next((str(line) for (line,) in self.query(newest, (kind,))), None)

    def has_vault_serial(self, serial: int) -> bool:
        """True if a certificate of Vault's with that serial is recorded."""
        return bool(
            self.query(f"SELECT 1 FROM events WHERE {schema.IS_VAULTS} AND body ->> 'serial' = ?", (str(serial),))  # noqa: S608
        )

    def freezes(self) -> dict[str, ActiveFreeze]:
        """Every freeze in force, by scope."""
        found: dict[str, ActiveFreeze] = {}
        for kind, scope, *facts in self.query(
            "SELECT kind, body ->> 'scope', body ->> 'reason', actor, time / 1000, body ->> 'until'"  # noqa: S608
            f" FROM events WHERE {schema.IS_FREEZE} ORDER BY seq"
        ):
            if kind == "freeze.set":
                found[scope] = ActiveFreeze(*facts)
            else:
                found.pop(scope, None)
        return found

    def asked(self, since: int) -> list[Entry]:
        """What requests and waivers are made of, from `since` (seconds) on, and all incidents; oldest first."""
        first = self.first_since(since * 1000)
        recent = self._events(schema.IS_ASKED, first) + self._events(schema.IS_FREEZE, first)
        incidents = self._events(f"{schema.IS_INCIDENT} AND seq < {first:d}", 0)
        return sorted(incidents + recent, key=lambda entry: entry.seq)

    def noticed_after(self, after: int, limit: int) -> list[Entry]:
        """Events of requests, waivers, incidents, freezes and revocations after event `after`, oldest first."""
        return self._events(schema.IS_NOTICED, after + 1, limit)

    def host_events(self) -> list[Entry]:
        """What the list of host keys is made of, oldest first."""
        return self._events(schema.IS_HOST, 0)

    def operation_events(self) -> list[Entry]:
        """The recorded operations on the platform, oldest first."""
        return self._events(schema.IS_OPERATION, 0)

    def revocation_events(self) -> list[Entry]:
        """What the revocation list is made of besides the certificates, oldest first."""
        return self._events(schema.IS_REVOCATION, 0)

    def issued_between(self, first: int, before: int, identities: Collection[str] | None = None) -> list[IssuedEvent]:
        """The certificates of the events from `first` on to `before`, which is not one of them, oldest first; only of
        some identities, if they are given."""
        # Decoded here: SQLite would take twice as long for the fields of a body one by one.
        sql = (
            "SELECT seq, time / 1000, actor, body FROM events"
            " WHERE seq >= ? AND seq < ? AND kind = 'certificate.issued'"
        )
        values: list[object] = [first, before]
        if identities is not None:
            sql += " AND actor IN (SELECT value FROM json_each(?))"
            values.append(json.dumps(sorted(identities)))
        found = []
        for seq, at, identity, text in self.rows(f"{sql} ORDER BY seq", values):
            try:
                body = _ISSUED_FACTS.decode(text)
                serial = int(body.serial)
            except (msgspec.DecodeError, ValueError, RecursionError):
                raise broken_at(seq, "it is not a valid certificate.issued event") from None
            found.append(
                IssuedEvent(seq, at, identity, serial, body.backend, body.ca, body.fingerprint, body.valid_before)
            )
        return found

    def withheld_since(self, first: int) -> set[int]:
        """Serials of the local key that events from `first` on say were never released."""
        return set(map(int, self._withheld(first)))

    def _withheld(self, first: int) -> set[str]:
        rows = self.query(f"SELECT body ->> 'serial' FROM events WHERE {schema.IS_WITHHELD} AND seq >= ?", (first,))  # noqa: S608
        return {serial for (serial,) in rows}

    def _events(self, condition: str, first: int, limit: int = -1) -> list[Entry]:
        """The events from `first` on that meet one of the schema's conditions, at most `limit`, oldest first."""
        # By numbers that the index has alone: to sort the events themselves takes half as long again.
        numbers = f"SELECT seq FROM events WHERE {condition} AND seq >= ? ORDER BY seq LIMIT ?"  # noqa: S608 - from the schema
        return self.entries(f"WHERE seq IN ({numbers}) ORDER BY seq", (first, limit))


_NO_END: Final = 2**63 - 1
_TILE: Final = 1 << schema.TREE_STEP


def events_archived(seq: int, base: int) -> NotFound:
    """The error for an event that only a segment has; the ledger's own begin after `base`."""
    return NotFound(
        "events_archived",
        f"event {seq:,} is in a segment: the ledger begins after event {base:,}",
        "read the file of `signer ledger archive` with --segment FILE",
        {"archived": base},
    )


def broken_at(seq: int, what: str) -> LedgerBroken:
    """The error for a ledger whose event `seq` is wrong."""
    return LedgerBroken(
        "ledger_broken",
        f"the ledger is broken at event {seq}: {what}",
        "keep the file unchanged and compare it with a saved head and a backup: see runbooks/ledger.md",
        {"seq": seq},
    )


def storage_errors() -> AbstractContextManager[None]:
    """Maps `sqlite3` and file errors: a damaged file to `LedgerBroken`, all others to `Unavailable`.

    An `sqlite3.IntegrityError` stays one: the disk is well, and the statement is an internal error.
    """
    return _STORAGE_ERRORS


class _StorageErrors(AbstractContextManager[None]):
    """Has no state, so that one is enough; a generator would be made anew for each commit."""

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        if error is not None:
            _raise_mapped(error)


_STORAGE_ERRORS: Final = _StorageErrors()


def _raise_mapped(error: BaseException) -> None:
    """Raises the error that `storage_errors` promises; does nothing for one that stays as it is."""
    if isinstance(error, sqlite3.IntegrityError):
        return
    if isinstance(error, sqlite3.OperationalError | OSError):
        if str(error).startswith(("no such table", "no such column", "malformed JSON", "table events has")):
            raise LedgerBroken(
                "ledger_broken",
                f"the ledger's file is damaged: {error}",
                "keep the file unchanged and restore a backup",
            ) from None
        raise Unavailable(
            "ledger_unavailable",
            f"the ledger cannot be used: {short_reason(error)}",
            write_hint(error, "SIGNER_DATA_DIR"),
        ) from None
    if isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError):  # the latter: a damaged name in SQLite's message
        raise LedgerBroken(
            "ledger_broken",
            f"the ledger's file is damaged: {short_reason(error)}",
            "keep the file unchanged and compare it with a backup: see runbooks/ledger.md",
        ) from None


def short_reason(error: Exception) -> str:
    """What a message says of an error of the system or of SQLite."""
    return (error.strerror or "I/O error") if isinstance(error, OSError) else str(error)
