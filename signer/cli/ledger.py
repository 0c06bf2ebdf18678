"""`signer certs` and `signer ledger`: what the ledger in SIGNER_DATA_DIR holds. All but `rebuild` only read."""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from signer.cli import output
from signer.errors import LedgerBroken, NotFound, Unavailable
from signer.ledger import audit
from signer.ledger.reader import FILE_NAME, Filter, LedgerReader, broken_at, storage_errors
from signer.ledger.store import DERIVED, Ledger
from signer.ledger.views import certificate_details, certificate_row
from signer.model import Entry, Head
from signer.settings import Settings
from signer.units import timestamp

_TITLES = ("SERIAL", "SIGNED BY", "IDENTITY", "ROLE", "PRINCIPALS", "VALID UNTIL", "STATUS", "FINGERPRINT")


@contextmanager
def _reading(settings: Settings, *, as_it_is_now: bool = True) -> Iterator[LedgerReader]:
    """The ledger as it is now, however much a keeper writes meanwhile; `verify` sees to that itself, in threads."""
    reader = LedgerReader(settings.data_dir)
    try:
        if as_it_is_now:
            reader.query("BEGIN")
        yield reader
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise LedgerBroken(
            "ledger_broken",
            "the ledger holds a row that no signer wrote",
            "run `signer ledger verify`, which says where",
        ) from None
    finally:
        reader.close()


# --- certs ------------------------------------------------------------------------------------------------------


def certs_list(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """A page of certificates, newest first."""
    now = int(time.time())
    wanted = Filter(
        identity=arguments.identity,
        role=arguments.role,
        principal=arguments.principal,
        fingerprint=arguments.fingerprint,
        backend=arguments.backend,
        active_at=now if arguments.active else None,
        before=arguments.before,
        limit=arguments.limit,
    )
    with _reading(settings()) as reader:
        found = reader.certificates(replace(wanted, limit=wanted.limit + 1))  # one more tells whether there are more
        rows = [certificate_row(row, now) for row in found[: wanted.limit]]
        more = str(found[wanted.limit - 1].seq) if len(found) > wanted.limit else None
    if arguments.json:
        output.show_json({"certificates": rows, "before": more})
        return 0
    if rows:
        output.show_table([_TITLES, *(_columns(row) for row in rows)])
    else:
        output.say("no certificate fits")
    if more is not None:
        output.say(f"there are older ones: add --before {more}")
    return 0


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    names = ",".join(row["principals"])
    return (
        row["serial"],
        row["backend"],
        row["identity"],
        row["role"],
        names if len(names) <= 40 else f"{names[:39]}…",
        row["valid_before"],
        row["status"],
        row["fingerprint"],
    )


def certs_show(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """Everything that was recorded of one certificate."""
    with _reading(settings()) as reader:
        found = reader.certificate(arguments.serial)
        if found is None:
            raise NotFound(
                "unknown_serial", f"the ledger has no certificate {arguments.serial}", "see `signer certs list`"
            )
        details = certificate_details(*found, int(time.time()))
    if arguments.json:
        output.show_json(details)
    else:
        output.show_table([(name.replace("_", " "), _readable(value)) for name, value in _flat(details)])
    return 0


def _flat(details: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in details.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}: ")
        else:
            yield above + name, value


def _readable(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == {}:
        return "none"
    return str(value) or '""'


# --- ledger -----------------------------------------------------------------------------------------------------


def ledger_verify(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """Whether the whole ledger is what was put into it."""
    saved = Head(arguments.head[0], arguments.head[1], 0) if arguments.head else None
    with _reading(settings(), as_it_is_now=False) as reader, output.Progress("verify") as progress:
        head = audit.verify(reader, progress, saved)
    compared = ", and goes on from the saved head" if saved else ""
    if arguments.json:
        output.show_json({"intact": True, "events": head.seq, "head": _head_facts(head)})
    else:
        output.show(f"intact: {output.count(head.seq, 'event')}, each with its hash and in its place{compared}")
        output.show(f"head    {_head_line(head)}")
    return 0


def ledger_head(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """The newest event, unverified."""
    with _reading(settings()) as reader:
        head = reader.head()
    if arguments.json:
        output.show_json(_head_facts(head))
    else:
        output.show(_head_line(head))
    return 0


def _head_facts(head: Head) -> dict[str, object]:
    return {"seq": head.seq, "hash": head.hash, "time": timestamp(head.time_ms // 1000) if head.seq else None}


def _head_line(head: Head) -> str:
    at = timestamp(head.time_ms // 1000) if head.seq else "empty"
    return output.plain(f"{head.seq}:{head.hash} {at}")


def ledger_export(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """Every event as one line of JSON."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()  # None when closed
    with _reading(settings()) as reader, output.Progress("export", hidden=on_terminal) as progress:
        total = reader.head().seq
        for entry in audit.export(reader, arguments.first):
            output.show_json(_line(entry), on_one_line=True)
            if entry.seq % 1_000 == 0:
                progress(entry.seq, total)
    return 0


def _line(entry: Entry) -> dict[str, object]:
    """An event as it is exported; raises `LedgerBroken` for a body that is no JSON, instead of breaking the line."""
    try:
        body = json.loads(entry.body)
    except (ValueError, RecursionError):
        raise broken_at(entry.seq, "its body is no JSON") from None
    return {
        "actor": entry.actor,
        "body": body,
        "hash": entry.hash,
        "kind": entry.kind,
        "prev": entry.prev,
        "seq": entry.seq,
        "time": entry.time_ms,
    }


def ledger_rebuild(arguments: Namespace, settings: Callable[[], Settings]) -> int:
    """The tables anew, from the events."""
    data_dir = settings().data_dir
    LedgerReader(data_dir).connection()  # says so if there is none; opening it for writing would make one
    _act_as_owner(data_dir / FILE_NAME)
    try:
        ledger = Ledger(data_dir)
    except Unavailable as error:
        if error.code == "ledger_in_use":
            raise Unavailable(error.code, "a keeper writes this ledger", "stop it, then rebuild") from None
        raise
    try:
        with output.Progress("rebuild") as progress:
            events = audit.rebuild(ledger, progress)
        counted = ledger.query(
            "SELECT (SELECT count(*) FROM certificates), (SELECT count(*) FROM principals),"
            " (SELECT count(*) FROM freezes)"
        )[0]
    finally:
        ledger.close()
    made = dict(zip(DERIVED, counted, strict=True))
    if arguments.json:
        output.show_json({"events": events, "tables": made})
    else:
        listed = ", ".join(f"{name} {rows:,}" for name, rows in made.items())
        output.show(f"rebuilt from {output.count(events, 'event')}: {listed} rows")
    return 0


def _act_as_owner(path: Path) -> None:
    """Root gives itself up for the ledger's owner, so that no file comes to be that the keeper cannot write."""
    with storage_errors():
        facts = path.stat()
        if os.geteuid() == 0 and facts.st_uid != 0:
            os.setgroups([])
            os.setgid(facts.st_gid)
            os.setuid(facts.st_uid)
