"""Everything that `signer status` shows, gathered on the service's host without a token. Changes nothing.

The keeper answers from memory. Without a keeper the ledger's files show what an index finds, so that a million
certificates take no longer than ten.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from signer import __version__
from signer.errors import BadFile, SignerError, Unavailable
from signer.files import belongs_to, undone_by
from signer.ledger.marks import BACKED_UP, COSIGNED, DIFFERS, VERIFIED, is_late, read_mark
from signer.policy.reading import read_policy
from signer.service.file_access import become_reader
from signer.settings import Listen, Settings
from signer.units import render_span, timestamp

KEEPER_WITHIN: Final = 2.0  # seconds for the keeper's reply
MAX_REPLY: Final = 1024 * 1024  # bytes; more than a keeper sends
LOOK_WITHIN: Final = 1.0  # seconds for a connection to the api, Vault or Infisical
ROOM: Final = 256 * 1024 * 1024  # bytes of the disk below which an operator must act
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(slots=True)
class Report:
    """The facts by subject, as JSON shows them; the service is degraded by each problem. Notes are none."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[SignerError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, error: SignerError) -> None:
        self.problems.append(error)


def gather(settings: Settings, environ: Mapping[str, str], now: int) -> Report:
    """The state of the service now; `now` is in seconds since 1970. Raises `SignerError` only if it may not look.

    Root that may not read the keeper's files becomes the keeper's user, for the rest of the process.
    """
    report = Report()
    report.facts["version"] = __version__
    report.facts["mode"] = settings.mode
    has_tls = settings.tls_cert_file is not None
    api = [{"address": str(listen), "state": answer_of(listen, has_tls=has_tls)} for listen in settings.listen]
    become_reader(settings)
    status = _ask_keeper(settings, report)
    report.facts["api"] = api
    for row in api:
        if row["state"] != "answers":
            report.add(Unavailable("api_down", f"the api at {row['address']} {row['state']}", "see the service's log"))
    if status is not None:
        _add_status(report, status, now)
    _add_policy(report, settings, status, now)
    _add_ledger(report, settings, status, now)
    _add_remotes(report, settings, environ)
    return report


# --- keeper and api ---------------------------------------------------------------------------------------------------


def _ask_keeper(settings: Settings, report: Report) -> dict[str, Any] | None:
    """The keeper's own view, the fields of the reply `Status`; None, and a problem, if it does not answer."""
    try:
        status = _converse(settings)
    except SignerError as error:
        report.facts["keeper"] = {"state": "does not answer"}
        report.add(error)
        return None
    fault = status["fault"]
    report.facts["keeper"] = {"state": "ready" if fault is None else "not ready", "started": status["started"]}
    if fault is not None:
        report.add(SignerError(fault["code"], fault["text"], fault["hint"]))
    return status


def _converse(settings: Settings) -> dict[str, Any]:
    """Asks as `protocol/client.py` does, whose models and event loop would take longer to import than all of this."""
    if settings.run_dir.exists() and not os.access(settings.run_dir, os.X_OK):
        text = f"this user may not reach the keeper's socket in SIGNER_RUN_DIR: {belongs_to(settings.socket)}"
        raise Unavailable("keeper_denied", text, "run it as root or as that user")
    header = {"op": "status", "local": True, "token": None, "address": None, "request_id": str(uuid.uuid4())}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(KEEPER_WITHIN)
            connection.connect(str(settings.socket))
            connection.send(json.dumps(header).encode() + b"\n")
            name, _, fields = connection.recv(MAX_REPLY + 1).partition(b"\n")
        found = json.loads(fields) if name in (b"Status", b"Error") else None
    except (OSError, ValueError):
        raise Unavailable("keeper_gone", "the keeper does not answer", "start the service, or see its log") from None
    if name == b"Error" and isinstance(found, dict):
        raise SignerError(found["code"], found["text"], found["hint"])
    if not isinstance(found, dict):
        raise Unavailable(
            "reply_malformed",
            "the keeper's reply is malformed",
            "use the `signer` of the version that serves, or restart the service",
        )
    return found


def answer_of(listen: Listen, *, has_tls: bool) -> str:
    """`answers`, or what is wrong with the API at an address of this host. Sends no secret, so it trusts any TLS."""
    try:
        with _connected(listen) as plain_socket:
            connection = plain_socket
            if has_tls:
                import ssl

                context = ssl.create_default_context()
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
                connection = context.wrap_socket(plain_socket)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            start = connection.recv(64)
    except TimeoutError:
        return f"does not answer within {LOOK_WITHIN:.0f} s"
    except PermissionError:
        return "may not be reached by this user"
    except OSError as error:
        return f"does not answer: {(error.strerror or 'no connection').lower()}"
    return "answers" if b" 200" in start.split(b"\r\n")[0] else "is not a signer's"


def _connected(listen: Listen) -> socket.socket:
    if listen.path is not None:
        connection = socket.socket(socket.AF_UNIX)
        with undone_by(connection.close):
            connection.settimeout(LOOK_WITHIN)
            connection.connect(str(listen.path))
        return connection
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)  # noqa: S104 - not bound here
    return socket.create_connection((host, listen.port), LOOK_WITHIN)


# --- what they know ---------------------------------------------------------------------------------------------------


def _add_status(report: Report, status: Mapping[str, Any], now: int) -> None:
    facts = report.facts
    facts["mode"] = status["mode"]
    facts["ca"] = {"fingerprint": status["ca_fingerprint"], **_age(status["key_since"], now)}
    if status["ledger"] is not None:  # without it the keeper knows neither
        facts["live"] = {row["role"]: row["count"] for row in status["live"]}
        facts["freezes"] = status["freezes"]
        facts["requests"] = {"open": status["requests"]}
        facts["incidents"] = {"open": status["incidents"], "overdue": status["incidents_overdue"]}
    facts["tokens"] = status["tokens"]
    _add_list(report, status["revocation_list"], now)
    facts["clock"] = {"keeper": status["time"], "newest_event": (status["ledger"] or {}).get("time")}
    report.notes += [f"{row['scope']} is frozen by {row['by']}: {row['reason']}" for row in status["freezes"]]
    report.notes += status.get("warnings", ())  # a keeper of an earlier version sends none
    for row in status["tokens"]:
        ends = "ended" if row["expires"] <= timestamp(now) else "ends"
        report.notes.append(f"the token {row['id']} of {row['identity']} {ends} on {row['expires']}")


def _add_list(report: Report, row: Mapping[str, Any], now: int) -> None:
    """The revocation list that hosts fetch, and a note while it is not the one that the ledger asks for."""
    report.facts["revocation_list"] = {**row, **(_age(row["as_of"], now) if row["as_of"] else {})}
    if row["version"] is None:
        report.notes.append("no revocation list is published yet: see the service's log")
    elif row["behind"]:
        text = f"hosts get version {row['version']} of the revocation list, not {row['wanted']}: see the service's log"
        report.notes.append(text)


def _age(since: str, now: int) -> dict[str, str]:
    import calendar
    import time

    seconds = calendar.timegm(time.strptime(since, "%Y-%m-%dT%H:%M:%SZ"))
    return {"since": since, "age": render_span(max(now - seconds, 0))}


def _add_policy(report: Report, settings: Settings, status: Mapping[str, Any] | None, now: int) -> None:
    """The policy in force, and whether the file is still the same."""
    facts: dict[str, Any] = {"file": str(settings.policy_file)}
    if status is not None:
        facts |= {"digest": status["policy"], **_age(status["policy_since"], now)}
    try:
        digest = sha256(read_policy(settings.policy_file)).hexdigest()
    except BadFile as error:
        report.add(error)
    else:
        facts["file_digest"] = digest
        if status is not None and digest != status["policy"]:
            report.notes.append(f"policy.toml is not the policy in force: {_what_a_reload_does(settings.policy_file)}")
    report.facts["policy"] = facts


def _what_a_reload_does(policy_file: Path) -> str:
    from signer.policy.file import load_policy  # whose models take long to import, for a file that has changed

    try:
        load_policy(policy_file)
    except BadFile:
        return "`signer reload` refuses it, and `signer policy check` says why"
    return "`signer reload` takes it"


def _add_ledger(report: Report, settings: Settings, status: Mapping[str, Any] | None, now: int) -> None:
    """The ledger as the keeper or its files have it; its last verification and backup, and the room on its disk."""
    facts: dict[str, Any] = {"events": None, "head": None, "bytes": None}
    if status is not None and status["ledger"] is not None:
        facts = dict(status["ledger"])
    elif settings.data_dir.exists():
        from signer.ledger.reader import LedgerReader

        with closing(LedgerReader(settings.data_dir)) as reader:
            try:
                head = reader.head()
                at = timestamp(head.time_ms // 1000) if head.seq else None
                facts = {"events": head.seq, "head": head.hash, "time": at, "bytes": _size(settings.data_dir)}
                report.facts["freezes"] = [
                    {"scope": scope, "reason": freeze.reason, "by": freeze.by, "since": timestamp(freeze.since)}
                    for scope, freeze in sorted(reader.freezes().items())
                ]
            except SignerError as error:
                report.add(error)
    for name, title in ((VERIFIED, "verified"), (BACKED_UP, "backed_up"), (COSIGNED, "cosigned")):
        mark = read_mark(settings.data_dir, name)
        facts[title] = None if mark is None else {"events": mark.seq, **_age(timestamp(mark.time), now)}
        if name == VERIFIED and mark is not None and is_late(name, mark, now):
            report.notes.append(f"the ledger was last verified {facts[title]['age']} ago: run `signer ledger verify`")
    report.facts["ledger"] = facts
    if (differs := read_mark(settings.data_dir, DIFFERS)) is not None:
        text = f"a witness held another history of the ledger at {timestamp(differs.time)}"
        hint = "see runbooks/ledger.md; delete ledger.differs in SIGNER_DATA_DIR when that is resolved"
        report.add(Unavailable("ledger_differs_from_witness", text, hint))
        report.notes = [note for note in report.notes if not note.startswith(text)]  # the keeper's word for it
    with suppress(OSError):
        free = shutil.disk_usage(settings.data_dir).free
        facts["free_bytes"] = free
        if free < ROOM:
            text = f"{free // 2**20} MiB are free on the disk of the ledger"
            report.add(Unavailable("disk_nearly_full", text, "free disk space"))


def _size(data_dir: Path) -> int:
    return sum(path.stat().st_size for path in data_dir.glob("ledger.sqlite3*"))


def _add_remotes(report: Report, settings: Settings, environ: Mapping[str, str]) -> None:
    """Vault where it signs, and Infisical where this environment names a client of it."""
    for name, url in _remotes(settings, environ):
        state = "accepts connections" if (fault := _unreachable(url)) is None else fault
        report.facts[name] = {"address": url, "state": state}
        if fault is not None and name == "vault":
            report.add(Unavailable("vault_down", f"Vault at {url} {fault}", "start Vault, check SIGNER_VAULT_ADDR"))
        elif fault is not None:
            report.notes.append(f"Infisical at {url} {fault}: a CA key cannot be rendered from it now")


def _remotes(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if settings.asks_vault and settings.vault_addr is not None:
        yield "vault", settings.vault_addr
    if environ.get("INFISICAL_CLIENT_ID"):
        yield "infisical", environ.get("INFISICAL_SITE_URL") or "https://app.infisical.com"


def _unreachable(url: str) -> str | None:
    """Why nothing accepts connections at an address; None if something does."""
    try:
        parts = urlsplit(url)
        place = (parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 443))
        socket.create_connection(place, LOOK_WITHIN).close()
    except TimeoutError:
        return f"does not answer within {LOOK_WITHIN:.0f} s"
    except (OSError, ValueError) as error:
        return f"cannot be reached: {str(getattr(error, 'strerror', None) or 'no such address').lower()}"
    return None
