"""What the two files of a ledger hold: events, and the views that find certificates fast. Pure.

`ledger.sqlite3` holds the events, which are the truth and which alone decide. `views.sqlite3` holds tables that are
folded from them afterwards and can be deleted at any time.

A view is a table of facts: each row is made from one event, carries its `seq`, and never changes. So the rows of a file
and those of the events that it lacks are together the rows of all events, whatever the view is. Beside them is the
Merkle tree over the events (`subtrees.py`): one row for each 256 of them, of the hashes of all.

A ledger whose first events were archived (`archive.py`) has the hashes of these in the table `archived`, and beside its
own events those of the archived ones that still decide something.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

FILE_NAME: Final = "ledger.sqlite3"
VERSION: Final = 2  # 1 had the views as tables beside the events, written by each commit
ARCHIVED_VERSION: Final = 3  # of a ledger with the table `archived`: a release that does not know it must not open it
APPLICATION_ID: Final = 0x5367_4E72  # "SgNr"; shown by `file`
VIEWS_NAME: Final = "views.sqlite3"
VIEWS_APPLICATION_ID: Final = 0x5367_4E76  # "SgNv"

EVENTS: Final = """
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, actor TEXT NOT NULL,
    body TEXT NOT NULL, prev TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE TRIGGER events_are_never_changed BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER events_are_never_removed BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER events_are_never_replaced BEFORE INSERT ON events WHEN NEW.seq <= (SELECT max(seq) FROM events)
    BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TABLE probe (id INTEGER PRIMARY KEY CHECK (id = 1), time INTEGER NOT NULL) STRICT;
"""

# The hashes of archived events, a multiple of 256 of them; a table that only the maker of a new file fills. Row (0, n)
# has the hashes of events 256 n + 1 to 256 n + 256. Row (8, n) has those of the complete subtrees of level 8 from
# number 256 n on, at most 256; row (16, n) those of level 16, and so on.
ARCHIVED: Final = """
CREATE TABLE archived (
    level INTEGER NOT NULL, number INTEGER NOT NULL, hashes BLOB NOT NULL, PRIMARY KEY (level, number)
) STRICT;
"""
ARCHIVED_TRIGGERS: Final = tuple(
    f"CREATE TRIGGER archived_is_never_{name} BEFORE {verb} ON archived BEGIN SELECT RAISE(ABORT, 'read only'); END;"
    for name, verb in (("added_to", "INSERT"), ("changed", "UPDATE"), ("removed", "DELETE"))
)
ADD_ARCHIVED: Final = "INSERT INTO archived VALUES (?, ?, ?)"

# Every kind of event that this release records. A ledger may hold others, of an older or a newer release.
EVENT_KINDS: Final = (
    "approval.denied", "approval.expired", "approval.given", "approval.issued", "approval.lapsed",
    "approval.requested", "approval.withdrawn", "ca.refused", "ca.rotated", "certificate.issued",
    "certificate.withheld", "certificates.revoked", "console.signed_in", "console.signed_out", "freeze.lifted",
    "freeze.set", "host.added", "host.removed", "incident.closed", "incident.opened", "keeper.started",
    "keeper.stopped", "ledger.archived", "ledger.key", "ledger.restored", "list.published", "operation.recorded",
    "policy.loaded", "policy.refused", "publishing.key", "refusals.repeated", "request.refused", "shadow.difference",
    "shadow.repeated", "waiver.ended", "waiver.used",
)  # fmt: skip


def _listed(*beginnings: str) -> str:
    """The kinds of this release that begin so, as SQL lists them."""
    return ", ".join(f"'{kind}'" for kind in EVENT_KINDS if kind.startswith(beginnings))


# Each condition below has this one as a term: SQLite uses a partial index only for a statement that has its condition.
IS_OTHER: Final = "kind <> 'certificate.issued'"
IS_FREEZE: Final = f"{IS_OTHER} AND kind IN ('freeze.set', 'freeze.lifted')"
IS_HOST: Final = f"{IS_OTHER} AND kind IN ('host.added', 'host.removed')"
IS_OPERATION: Final = f"{IS_OTHER} AND kind = 'operation.recorded'"
IS_WITHHELD: Final = f"{IS_OTHER} AND kind = 'certificate.withheld'"
# What requests, waivers and incidents are made of. Kinds one by one, as everywhere here: of a range of kinds, SQLite
# would read the entries of all events for those after a number.
_INCIDENTS: Final = _listed("incident.")
_ASKED: Final = _listed("approval.", "incident.", "waiver.")
IS_INCIDENT: Final = f"{IS_OTHER} AND kind IN ({_INCIDENTS})"
IS_ASKED: Final = f"{IS_OTHER} AND kind IN ({_ASKED})"
# What the keeper sends notices of.
IS_NOTICED: Final = f"{IS_OTHER} AND kind IN ({_ASKED}, 'freeze.set', 'freeze.lifted', 'certificates.revoked')"
IS_RESTORED: Final = f"{IS_OTHER} AND kind = 'ledger.restored'"
IS_ARCHIVED: Final = f"{IS_OTHER} AND kind = 'ledger.archived'"
# The public halves of the keeper's own keys, one event for each key.
IS_SERVICE_KEY: Final = f"{IS_OTHER} AND kind IN ('ledger.key', 'publishing.key')"
# What the revocation list is made of, besides the certificates: revocations, and the CA keys that there were.
IS_REVOCATION: Final = (
    f"{IS_OTHER} AND kind IN"
    " ('ca.rotated', 'certificates.revoked', 'keeper.started', 'ledger.restored', 'list.published')"
)
IS_VAULTS: Final = "kind = 'certificate.issued' AND body ->> 'backend' = 'vault'"


@dataclass(frozen=True, slots=True)
class EventIndex:
    """A partial index on events, by `key`: never on local certificates, which nearly all events are.

    A commit of these writes no page of it, and `indexes.py` relies on that, too. SQLite evaluates the condition for
    each event that is inserted, in up to 1 µs.
    """

    name: str
    condition: str
    key: str = "seq"
    is_unique: bool = False

    @property
    def definition(self) -> str:
        """The statement that creates the index, as SQLite keeps it."""
        unique = "UNIQUE " if self.is_unique else ""
        return f"CREATE {unique}INDEX {self.name} ON events ({self.key}) WHERE {self.condition}"

    @property
    def statement(self) -> str:
        """The statement that creates the index if the file lacks it."""
        return self.definition.replace("INDEX ", "INDEX IF NOT EXISTS ", 1)


BY_KIND: Final = EventIndex("events_by_kind", IS_OTHER, "kind")
EVENT_INDEXES: Final = (
    BY_KIND,
    # Also refuses a second certificate of Vault's with the same serial.
    EventIndex("events_of_vault", IS_VAULTS, "body ->> 'serial'", is_unique=True),
)
# Of older releases, which found each group of kinds by its own index. The keeper drops them when it opens the file: an
# older release makes them again, and its definitions are kept so that `verify` knows them.
OLDER_INDEXES: Final = (
    EventIndex("events_of_freezes", "kind IN ('freeze.set', 'freeze.lifted')"),
    EventIndex("events_of_hosts", "kind IN ('host.added', 'host.removed')"),
    EventIndex("events_of_operations", "kind = 'operation.recorded'"),
    EventIndex("events_of_withheld", "kind = 'certificate.withheld'"),
    EventIndex("events_of_asked", "((kind < 'b' OR kind > 'incident') AND (kind < 'incident/' OR kind > 'waiver'))"),
    EventIndex("events_of_restored", "kind = 'ledger.restored'"),
    EventIndex("events_of_archived", "kind = 'ledger.archived'"),
    EventIndex(
        "events_of_revocations",
        "kind IN ('ca.rotated', 'certificates.revoked', 'keeper.started', 'ledger.restored', 'list.published')",
    ),
    EventIndex("events_of_service_keys", "kind IN ('ledger.key', 'publishing.key')"),
)


class IssuedBody(msgspec.Struct, gc=False):
    """What views need of a `certificate.issued` event."""

    serial: str
    backend: str
    identity: str
    role: str
    principals: list[str]
    fingerprint: str
    key_id: str
    valid_after: int
    valid_before: int


class WithheldBody(msgspec.Struct, gc=False):
    """What views need of a `certificate.withheld` event."""

    serial: str


class OtherBody(msgspec.Struct):
    """What views need of the body of any event: whom it is about, and how many times it happened."""

    identity: object = ""
    scope: object = ""
    count: object = 1


BODIES: Final[dict[str, type[msgspec.Struct]]] = {
    "certificate.issued": IssuedBody,
    "certificate.withheld": WithheldBody,
}
ISSUED: Final = "certificate.issued"
OTHERS: Final = "others"  # the view of all events but those
Row = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class View:
    """A table made from the events of one kind; `apply` returns the rows of events by their numbers and decoded bodies.

    The view `OTHERS` has one row for each event that is not a certificate's, made by `other_row`. `columns` is the
    table's declaration: `seq`, or one column that rows are found by and then `seq`, and the rest. The first of these
    are the primary key.
    """

    name: str
    columns: tuple[str, ...]
    kind: str
    apply: Callable[[Sequence[tuple[int, Any]]], list[Row]]
    indexes: tuple[str, ...] = ()

    @property
    def group(self) -> str | None:
        """The column of the primary key before `seq`, None if `seq` is the primary key."""
        first = self.columns[0].split()[0]
        return None if first == "seq" else first

    @property
    def table(self) -> str:
        columns = ", ".join(self.columns)
        if self.group is None:
            return f"CREATE TABLE {self.name} ({columns}) STRICT"
        return f"CREATE TABLE {self.name} ({columns}, PRIMARY KEY ({self.group}, seq)) STRICT, WITHOUT ROWID"

    @property
    def insert(self) -> str:
        return f"INSERT INTO {self.name} VALUES ({', '.join('?' * len(self.columns))})"  # noqa: S608 - names from here


def other_row(seq: int, kind: str, actor: str, body: OtherBody) -> Row:
    """The row of an event that is not a certificate's: `about` is the identity that it names besides its actor."""
    about = body.identity if isinstance(body.identity, str) else ""
    if isinstance(body.scope, str) and body.scope.startswith("identity:"):
        about = body.scope.removeprefix("identity:")
    is_count = type(body.count) is int and 0 <= body.count < 2**53
    return seq, kind, actor, about if about != actor else "", body.count if is_count else 1


def _certificates(events: Sequence[tuple[int, IssuedBody]]) -> list[Row]:
    encode = msgspec.json.encode
    return [
        (
            seq,
            body.serial,
            body.backend,
            body.identity,
            body.role,
            encode(body.principals).decode(),
            body.fingerprint,
            body.key_id,
            body.valid_after,
            body.valid_before,
        )
        for seq, body in events
    ]


def _principals(events: Sequence[tuple[int, IssuedBody]]) -> list[Row]:
    return [(principal, seq) for seq, body in events for principal in body.principals]


def _withheld(events: Sequence[tuple[int, WithheldBody]]) -> list[Row]:
    return [(seq, body.serial) for seq, body in events]


VIEWS: Final = (
    View(
        "certificates",
        (
            "seq INTEGER PRIMARY KEY",
            "serial TEXT NOT NULL",
            "backend TEXT NOT NULL",
            "identity TEXT NOT NULL",
            "role TEXT NOT NULL",
            "principals TEXT NOT NULL",
            "fingerprint TEXT NOT NULL",
            "key_id TEXT NOT NULL",
            "valid_after INTEGER NOT NULL",
            "valid_before INTEGER NOT NULL",
        ),
        "certificate.issued",
        _certificates,
        (
            "CREATE INDEX certificates_by_serial ON certificates (serial)",
            "CREATE INDEX certificates_by_identity ON certificates (identity)",
            "CREATE INDEX certificates_by_role ON certificates (role)",
            "CREATE INDEX certificates_by_fingerprint ON certificates (fingerprint)",
            "CREATE INDEX certificates_of_vault ON certificates (seq) WHERE backend = 'vault'",
        ),
    ),
    View(
        "principals",
        ("principal TEXT NOT NULL", "seq INTEGER NOT NULL"),
        "certificate.issued",
        _principals,
    ),
    # Serials of the local key that were recorded and never signed.
    View(
        "withheld",
        ("seq INTEGER PRIMARY KEY", "serial TEXT NOT NULL"),
        "certificate.withheld",
        _withheld,
        ("CREATE INDEX withheld_by_serial ON withheld (serial)",),
    ),
    # All events but those of certificates: few beside them, so that events are counted and found without reading a
    # million certificates. `count` is 1, or how often a repeated refusal came.
    View(
        OTHERS,
        (
            "seq INTEGER PRIMARY KEY",
            "kind TEXT NOT NULL",
            "actor TEXT NOT NULL",
            "about TEXT NOT NULL",
            "count INTEGER NOT NULL",
        ),
        "",
        lambda _events: [],
        (
            "CREATE INDEX others_by_kind ON others (kind)",
            "CREATE INDEX others_by_actor ON others (actor, kind)",
            "CREATE INDEX others_by_about ON others (about, kind) WHERE about <> ''",
        ),
    ),
)

# Hashes of complete subtrees of the Merkle tree over the events, at every eighth level: row (8, n) has that of events
# 256 n + 1 to 256 n + 256. `tree.CompactRange` makes each as its last event is folded.
TREE_STEP: Final = 8  # levels from one kept row of subtrees to the next
_SUBTREES: Final = """CREATE TABLE subtrees (
    level INTEGER NOT NULL, number INTEGER NOT NULL, hash BLOB NOT NULL, PRIMARY KEY (level, number)
) STRICT, WITHOUT ROWID"""
ADD_SUBTREE: Final = "INSERT INTO subtrees VALUES (?, ?, ?)"

# Up to which event the views are folded, and its hash, which only the ledger has that they were folded from. `tree` is
# the Merkle tree up to there, from which it grows (`tree.CompactRange.to_bytes`), and a checksum of `subtrees`. `boot`
# is when the host started (seconds since 1970): without fsync a file is as it was written until the host stops.
# `is_synced` is 1 if the file was synced when it was closed. `base` is how many events were archived: views have none
# of these, and `subtrees` only what is complete after them.
_FOLDED: Final = """CREATE TABLE folded (
    id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, hash TEXT NOT NULL, tree BLOB NOT NULL,
    boot INTEGER NOT NULL, is_synced INTEGER NOT NULL, base INTEGER NOT NULL
) STRICT"""
VIEW_TABLES: Final = (_FOLDED, _SUBTREES, *(view.table for view in VIEWS))
VIEW_INDEXES: Final = tuple(index for view in VIEWS for index in view.indexes)
_MEANING: Final = "1"  # raise it when `apply` of a view makes other rows in the same columns
VIEWS_VERSION: Final = zlib.crc32("\n".join((_MEANING, *VIEW_TABLES, *VIEW_INDEXES)).encode()) & 0x7FFF_FFFF
