"""What `signer status` makes of a keeper's reply, of files, and of what this user may not read."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from signer.errors import SignerError
from signer.ledger.marks import DIFFERS, VERIFIED, Mark, cosigning_warnings, read_mark, write_mark
from signer.ledger.reader import LedgerReader
from signer.ledger.store import Ledger
from signer.model import Event
from signer.service import file_access, status
from signer.settings import Listen, Settings, load_settings
from tests.parts.keeper_replies import reply

pytestmark = pytest.mark.unix_socket

NOW = 1_740_000_700  # of `BEGAN`, minutes later


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("data", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "policy.toml").write_text("# compared by its digest alone\n")
    names = {"DATA_DIR": tmp_path / "data", "RUN_DIR": tmp_path / "run", "POLICY_FILE": tmp_path / "policy.toml"}
    listen = {"SIGNER_LISTEN": f"unix:{tmp_path}/api.sock"}
    return load_settings({**{f"SIGNER_{name}": str(path) for name, path in names.items()}, **listen})


Answering = Callable[[Path, int, bytes], list[bytes]]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Answers one message at a path with `reply`; the list has what came."""
    threads: list[threading.Thread] = []
    listeners: list[socket.socket] = []

    def start(path: Path, kind: int, answer: bytes) -> list[bytes]:
        came: list[bytes] = []
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                came.append(connection.recv(65_536))
                connection.send(answer)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return came

    yield start
    for thread in threads:
        thread.join(10)
    for listener in listeners:
        listener.close()


def gather(settings: Settings, **environ: str) -> status.Report:
    return status.gather(settings, environ, NOW)


def message(fields: dict[str, Any], name: bytes = b"Status") -> bytes:
    return name + b"\n" + json.dumps(fields).encode()


def codes(report: status.Report) -> list[str]:
    return [problem.code for problem in report.problems]


def test_a_keeper_and_an_api_that_answer_are_well(settings: Settings, answering: Answering) -> None:
    came = answering(settings.socket, socket.SOCK_SEQPACKET, message(reply(frozen=True)))
    asked = answering(Path(str(settings.listen[0].path)), socket.SOCK_STREAM, b"HTTP/1.1 200 OK\r\n\r\n")
    report = gather(settings)
    assert codes(report) == []
    header = json.loads(came[0])
    assert (header["op"], header["local"], header["token"]) == ("status", True, None)
    assert asked[0].startswith(b"GET /healthz HTTP/1.1\r\n")
    assert b"uthorization" not in asked[0]
    assert report.facts["live"] == {"gone": 1, "llmops": 3}
    assert report.facts["ca"]["age"] == "11m"
    assert [note.split()[0] for note in report.notes] == ["role:deploy", "the", "policy.toml"]


def test_a_changed_policy_is_not_said_to_be_taken_if_a_reload_refuses_it(
    settings: Settings, answering: Answering
) -> None:
    answering(settings.socket, socket.SOCK_SEQPACKET, message(reply(frozen=True)))
    report = gather(settings)  # the file holds nothing but a comment
    assert report.notes[-1] == (
        "policy.toml is not the policy in force: `signer reload` refuses it, and `signer policy check` says why"
    )


def test_a_keeper_that_refuses_or_is_another_is_a_problem(settings: Settings, answering: Answering) -> None:
    answering(
        settings.socket, socket.SOCK_SEQPACKET, message({"code": "not_permitted", "text": "no", "hint": "h"}, b"Error")
    )
    assert codes(gather(settings))[:2] == ["not_permitted", "api_down"]
    settings.socket.unlink()
    answering(settings.socket, socket.SOCK_SEQPACKET, b"Strange\n{}")
    assert codes(gather(settings))[:2] == ["reply_malformed", "api_down"]


@pytest.mark.parametrize(
    "answer, expected",
    [
        (b"HTTP/1.1 200 OK\r\n", "answers"),
        (b"HTTP/1.1 503 x\r\nX: 200\r\n", "is not a signer's"),
        (b"SSH-2.0-x\r\n", "is not a signer's"),
    ],
)
def test_an_api_answers_only_with_its_health(
    tmp_path: Path, answering: Answering, answer: bytes, expected: str
) -> None:
    answering(tmp_path / "s", socket.SOCK_STREAM, answer)
    assert status.answer_of(Listen(tmp_path / "s", "", 0), has_tls=False) == expected


def test_an_api_that_is_not_there_says_why(tmp_path: Path) -> None:
    found = status.answer_of(Listen(tmp_path / "none", "", 0), has_tls=False)
    assert found == "does not answer: no such file or directory"


def test_a_fault_of_the_ledger_s_history_is_said_once(settings: Settings, answering: Answering) -> None:
    write_mark(settings.data_dir, DIFFERS, Mark(4, NOW - 60))
    said = list(cosigning_warnings(settings.data_dir, NOW).values())
    answering(settings.socket, socket.SOCK_SEQPACKET, message({**reply(), "warnings": [*said, "the list is late"]}))
    report = gather(settings)
    assert "ledger_differs_from_witness" in codes(report)
    assert not [note for note in report.notes if "witness" in note]
    assert "the list is late" in report.notes


@pytest.mark.parametrize("age, is_late", [(86_400, False), (8 * 86_400, True)])
def test_a_verification_that_is_late_is_noted(settings: Settings, age: int, is_late: bool) -> None:
    write_mark(settings.data_dir, VERIFIED, Mark(4, NOW - age))
    notes = [note for note in gather(settings).notes if "verified" in note]
    assert notes == (["the ledger was last verified 8 days ago: run `signer ledger verify`"] if is_late else [])


def test_without_a_keeper_files_show_head_and_freezes(settings: Settings) -> None:
    with closing(Ledger(settings.data_dir)) as ledger:
        ledger.commit([Event("freeze.set", "operator", {"scope": "all", "reason": "drill"})], NOW * 1000)
    report = gather(settings)
    assert codes(report) == ["keeper_gone", "api_down"]
    assert (report.facts["ledger"]["events"], report.facts["freezes"][0]["scope"]) == (1, "all")
    assert "live" not in report.facts  # only a keeper counts them without a scan


def test_no_statement_reads_a_whole_ledger(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million certificates take no longer than ten: SQLite searches by key or index, and scans no table of events."""
    with closing(Ledger(settings.data_dir)) as ledger:
        ledger.commit([Event("freeze.set", "operator", {"scope": "all", "reason": "drill"})], NOW * 1000)
    asked: list[tuple[str, Sequence[Any]]] = []
    query = LedgerReader.query

    def note(self: LedgerReader, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        asked.append((sql, values))
        return query(self, sql, values)

    monkeypatch.setattr(LedgerReader, "query", note)
    gather(settings)
    assert asked
    with closing(Ledger(settings.data_dir)) as ledger:
        for sql, values in asked:
            plan = " ".join(row[3] for row in ledger.connection().execute(f"EXPLAIN QUERY PLAN {sql}", values))
            assert "LIMIT 1" in sql or "SEARCH events USING INDEX events_by_kind (kind=?" in plan, (sql, plan)


def test_infisical_is_looked_for_where_the_environment_names_a_client(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(place: object, _timeout: float) -> socket.socket:
        asked.append(place)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert "infisical" not in gather(settings).facts
    report = gather(settings, INFISICAL_CLIENT_ID="id", INFISICAL_SITE_URL="https://secrets.example:8443/x")
    assert report.facts["infisical"]["state"] == "cannot be reached: connection refused"
    assert asked == [("secrets.example", 8443)]
    assert not [code for code in codes(report) if "infisical" in code]  # it is needed to render a key, not to sign


# --- marks and access -------------------------------------------------------------------------------------------------


def test_a_mark_comes_back_and_anything_else_is_none(tmp_path: Path) -> None:
    assert read_mark(tmp_path, VERIFIED) is None
    assert write_mark(tmp_path, VERIFIED, Mark(7, NOW))
    assert read_mark(tmp_path, VERIFIED) == Mark(7, NOW)
    for content in (
        "",
        "[]",
        '{"seq": -1, "time": 1}',
        '{"seq": true, "time": 1}',
        '{"seq": 1, "time": 1e99}',
        "{" * 9999,
    ):
        (tmp_path / "ledger.verified").write_text(content)
        assert read_mark(tmp_path, VERIFIED) is None


def test_a_mark_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('{"seq": 1, "time": 1}')
    (tmp_path / "ledger.verified").symlink_to("other")
    assert read_mark(tmp_path, VERIFIED) is None
    assert write_mark(tmp_path, VERIFIED, Mark(2, 2))
    assert (tmp_path / "other").read_text() == '{"seq": 1, "time": 1}'


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_who_may_not_read_is_told_whose_files_they_are(settings: Settings) -> None:
    """In a process of its own, which becomes another user."""
    os.chown(settings.data_dir, 1, 1)
    settings.data_dir.parent.chmod(0o755)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(65_534)
        os.setuid(65_534)
        try:
            file_access.become_reader(settings)
        except SignerError as error:
            os.write(writing, f"{error.code} {error.text} {error.hint}".encode())
        os._exit(0)
    os.close(writing)
    said = os.read(reading, 65_536).decode()
    os.close(reading)
    os.waitpid(child, 0)
    assert said.startswith("files_denied")
    assert "belongs to user" in said
    assert "space" not in said


def test_what_is_no_directory_makes_root_nobody_else(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root that may read everything stays root, whatever is in the place of the directory."""
    monkeypatch.setattr(file_access, "_become_keeper", lambda _settings: pytest.fail("it became another user"))
    settings.data_dir.rmdir()
    file_access.become_reader(settings)
    settings.data_dir.write_text("a file")
    file_access.become_reader(settings)
    settings.data_dir.unlink()
    settings.data_dir.symlink_to("nowhere")
    file_access.become_reader(settings)
