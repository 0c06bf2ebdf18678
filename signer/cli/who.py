"""`signer certs who`: from what a host's sshd logged to the person, the reason and the approver in the ledger."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from signer.cli import output
from signer.cli.arguments import MAX_SERIAL, is_whole, quoted, segment_option
from signer.cli.ledger import check_form, csv_option, reading_certificates
from signer.cli.parser import verb
from signer.cli.usage import UsageError
from signer.model import Filter

if TYPE_CHECKING:
    from signer.ledger.pages import CertificateReader

MAX_LINE: Final = 8_192  # characters of a line of a log; sshd's have some hundreds
MAX_FOUND: Final = 1_000  # certificates of one key
_SSHD: Final = re.compile(r"sshd(?:-session|-auth)?(\[\d+\]): ", re.ASCII)
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}", re.ASCII)
_COLUMNS: Final = (
    "serial", "identity", "kind", "role", "principals", "valid_after", "valid_before", "status", "reason", "address",
    "approved_by", "request", "waiver", "event",
)  # fmt: skip
_SHOWN: Final = ("serial", "identity", "role", "reason", "approved_by", "valid_before", "event")


@dataclass(frozen=True, slots=True)
class Login:
    """What one line of sshd's log says of a certificate; `fingerprint` is empty where the line does not say it.

    `process` is `HOST [PID]`, one for each connection; empty where a log has no such prefix.
    """

    serial: int
    key_id: str
    ca: str
    fingerprint: str = ""
    process: str = ""


def read_login(line: str) -> Login | None:
    """The certificate in a line of sshd, of its parts `sshd-session` and `sshd-auth`, or None; linear in the line.

    Reads `Accepted publickey for … ssh2: KIND SHA256:… ID … (serial N) CA KIND SHA256:…` and
    `Accepted certificate ID "…" (serial N) signed by KIND CA SHA256:… via …`. A key id may hold anything: the rest is
    found from the line's end.
    """
    found = _SSHD.search(line[:MAX_LINE])
    text = (line[found.end() :] if found else line)[:MAX_LINE].rstrip()
    process = f"{line[: found.start()].rstrip().rpartition(' ')[2]} {found[1]}" if found else ""
    if text.startswith("Accepted publickey for "):
        start, _, rest = text.partition(" ID ")
        key_id, _, end = rest.rpartition(" (serial ")
        serial, _, ca = end.partition(") CA ")
        return _login(serial, key_id, ca.rpartition(" ")[2], start.rpartition(" ")[2], process)
    if text.startswith('Accepted certificate ID "'):
        key_id, _, end = text.removeprefix('Accepted certificate ID "').rpartition('" (serial ')
        serial, _, signed = end.partition(") signed by ")
        return _login(serial, key_id, signed.partition(" via ")[0].rpartition(" ")[2], None, process)
    return None


def _login(serial: str, key_id: str, ca: str, fingerprint: str | None, process: str) -> Login | None:
    if not is_whole(serial, 0, MAX_SERIAL):
        return None
    if not all(_FINGERPRINT.fullmatch(print_of) for print_of in (ca, fingerprint) if print_of is not None):
        return None
    return Login(int(serial), key_id, ca, fingerprint or "", process)


def read_logins(lines: Iterable[str]) -> list[tuple[int, Login]]:
    """Each login once, with the number of its line; in the order of their first lines.

    With LogLevel VERBOSE one login has several lines, of which the last one also names the key: that one counts. Lines
    are of one login if process, serial, key id and CA are the same; without a process, up to the line with the key.
    """
    found: list[tuple[int, Login]] = []
    places: dict[Login, int] = {}
    for number, line in enumerate(lines, 1):
        login = read_login(line)
        if login is None:
            continue
        same = replace(login, fingerprint="")
        place = places.get(same)
        if place is None or (login.fingerprint and found[place][1].fingerprint not in ("", login.fingerprint)):
            places[same] = len(found)
            found.append((number, login))
        elif login.fingerprint:
            found[place] = (number, login)
        if login.fingerprint and not login.process:
            del places[same]
    return found


@verb(
    "certs who",
    "signer certs who 4711",
    "ssh host journalctl -u ssh --since today | signer certs who",
    "signer certs who --csv <auth.log >logins.csv",
)
@click.argument("what", nargs=-1, metavar="[SERIAL|SHA256:…]", help="default: lines of sshd's log from stdin")
@csv_option
@segment_option
def certs_who(what: Sequence[str], *, as_csv: bool, segment: Path | None, as_json: bool) -> int:
    """Shows for each certificate who asked for it and why, who approved it, and which event of the ledger says so.
    A line whose key id, key or CA is not what the ledger has is not ours, though its serial is: exit status 1, as
    for a serial that the ledger lacks. Lines without a certificate are passed over; a login with several lines
    (LogLevel VERBOSE) is shown once."""
    check_form(as_csv=as_csv, as_json=as_json)
    now = int(time.time())
    with reading_certificates(segment) as reader:
        if what:
            rows = [row for word in what for row in _of_word(reader, word, now)]
        else:
            logins = read_logins(sys.stdin)
            rows = [{"line": number, **_row(reader, login.serial, now, login)} for number, login in logins]
    if as_json:
        output.show_json({"certificates": rows})
    elif as_csv:
        output.show_csv(("line", *_COLUMNS, "problem"), rows)
    elif rows:
        titles = [name.replace("_", " ").upper() for name in _SHOWN]
        output.show_table([titles, *([_cell(row.get(name)) for name in _SHOWN] for row in rows)])
    else:
        output.note("no line names a certificate" if not what else "no matching certificates")
    for row in rows:
        if row["problem"]:
            place = f" in line {row['line']}" if row.get("line") else ""
            output.warn(f"serial {row['serial']}{place}: {row['problem']}")
    return int(not rows or any(row["problem"] for row in rows))


def _of_word(reader: CertificateReader, word: str, now: int) -> Iterator[dict[str, Any]]:
    if _FINGERPRINT.fullmatch(word):
        for issued in reader.certificates(Filter(fingerprint=word, limit=MAX_FOUND)):
            yield _row(reader, issued.serial, now)
    elif is_whole(word, 0, MAX_SERIAL):
        yield _row(reader, int(word), now)
    else:
        raise UsageError(f"{quoted(word, 60)} is neither a serial nor a fingerprint", "see `signer certs who --help`")


def _row(reader: CertificateReader, serial: int, now: int, login: Login | None = None) -> dict[str, Any]:
    from signer.ledger.lookups import certificate_details

    found = reader.certificate(serial)
    if found is None:
        return {"serial": str(serial), "problem": _why_missing(reader, serial)}
    details = certificate_details(*found, now)
    row = {name: details.get(name) for name in _COLUMNS if name != "event"}
    row["event"] = found[1].seq
    told = {} if login is None else {"key_id": login.key_id, "ca": login.ca, "fingerprint": login.fingerprint}
    other = [name for name, value in told.items() if value and value != details[name]]
    row["problem"] = f"not ours: the log has another {' and '.join(other).replace('_', ' ')}" if other else ""
    return row


def _why_missing(reader: CertificateReader, serial: int) -> str:
    for restored in reader.restores():
        if restored.first_serial <= serial <= restored.last_serial:
            lost = f"lost, or never issued: a backup was restored at event {restored.seq}, and the serial is revoked"
            return f"the ledger has no such certificate; {lost}"
    where = f"; the segments of its first {reader.base:,} events may: --segment FILE" if reader.base else ""
    return f"the ledger has no such certificate{where}"


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "-" if value is None else str(value)
