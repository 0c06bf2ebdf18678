"""What operators did: strictly read, recorded under whoever has the right, and answered with the committed entry."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from signer.errors import BadRequest, SignerError
from signer.ledger.fold import fold_all
from signer.ledger.pages import CertificateReader, _select
from signer.ledger.reader import LedgerReader
from signer.ledger.schema import VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Entry, Event, Filter
from signer.protocol.bodies import read_body_as
from signer.protocol.commands import MAX_REPLY, Freeze, ListOperations, RecordOperation, read_command
from signer.protocol.operations import OperationBody, cut_over_at, read_digest, still_vault
from tests.parts import builders
from tests.parts.builders import NOW, Bench, caller, policy, sign
from tests.parts.events import issued

PLAN, EVIDENCE = "sha256:" + "0a" * 32, "sha256:" + "0b" * 32


def record(who: str = "operator", **fields: str) -> RecordOperation:
    return RecordOperation(caller(who), OperationBody(**{"operation": "cutover", "outcome": "applied", **fields}))  # type: ignore[arg-type]


def listed(bench: Bench, evidence: str | None = None, before: int | None = None, limit: int = 50) -> dict[str, Any]:
    reply: dict[str, Any] = bench.ask(ListOperations(caller("operator"), evidence, before, limit))[0]
    return reply


def code_of(reply: object) -> str:
    assert isinstance(reply, SignerError), reply
    return reply.code


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_body_is_read_as_it_is() -> None:
    fields = {"operation": "rollback", "outcome": "rolled_back", "plan": PLAN, "evidence": EVIDENCE, "reason": "ß 1"}
    assert read_body_as(OperationBody, fields).model_dump() == fields
    assert read_body_as(OperationBody, {"operation": "cutover", "outcome": "failed"}).reason == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"operation": "party"},
        {"operation": None},
        {"outcome": "perfect"},
        {"plan": "0a" * 32},
        {"plan": "sha256:" + "0A" * 32},
        {"plan": PLAN + "\n"},
        {"evidence": EVIDENCE + "0"},
        {"evidence": ["x"]},
        {"reason": "r" * 501},
        {"reason": "two\nlines"},
        {"reason": "\x1b[2J"},
        {"reason": "\ud800"},
        {"reason": 5},
        {"colour": "red"},
    ],
)
def test_anything_else_is_refused_and_named(changes: dict[str, object]) -> None:
    sent = json.dumps({"operation": "cutover", "outcome": "applied", **changes}).encode()
    header = {"op": "record", "token": "t", "address": None, "request_id": "r-1"}
    command = read_command(header, sent, lambda _caller: None)
    assert isinstance(command, RecordOperation)
    assert isinstance(command.operation, BadRequest)
    assert command.operation.code == "field_malformed"
    assert next(iter(changes)) in command.operation.text


@pytest.mark.parametrize("text", ["", "sha256:", "0b" * 32, EVIDENCE + " ", EVIDENCE.upper()])
def test_evidence_to_look_for_is_a_whole_digest(text: str) -> None:
    with pytest.raises(BadRequest):
        read_digest(text)
    assert read_digest(EVIDENCE) == EVIDENCE


# --- recording ----------------------------------------------------------------------------------------------------


def test_the_reply_is_the_committed_entry_wherever_it_stands_in_its_batch() -> None:
    bench = Bench()
    replies = bench.ask(sign(), record(plan=PLAN), sign(principals=("root",)), record(outcome="failed"), sign())
    for reply, outcome in ((replies[1], "applied"), (replies[3], "failed")):
        entry = bench.store.entry(reply["seq"])
        assert (entry.kind, entry.hash, entry.actor) == ("operation.recorded", reply["hash"], "operator")
        assert json.loads(entry.body)["outcome"] == reply["outcome"] == outcome
    assert replies[1] == {
        "seq": 3,
        "hash": bench.store.entry(3).hash,
        "time": "2027-01-15T08:00:00Z",
        "actor": "operator",
        "operation": "cutover",
        "outcome": "applied",
        "plan": PLAN,
        "evidence": "",
        "reason": "",
        "address": "192.0.2.7",
        "request_id": "r-1",
    }


def test_what_could_not_be_committed_is_not_told_as_recorded() -> None:
    bench = Bench()
    bench.store.fail = "before"
    assert code_of(bench.ask(record())[0]) == "ledger_unavailable"
    bench.store.fail = ""
    assert bench.ask(record())[0]["seq"] == 2


def test_neither_a_freeze_nor_a_clock_that_is_behind_stops_a_record() -> None:
    bench = Bench()
    bench.ask(Freeze(caller("operator"), "all", "drill"))
    bench.now = NOW - 3600
    assert code_of(bench.sign()) == "clock_behind"
    assert bench.ask(record(outcome="stopped"))[0]["outcome"] == "stopped"


def test_recording_needs_its_right_and_so_does_reading() -> None:
    bench = Bench(policy=policy(builders.POLICY, ('"ledger.read", "operate"]', '"ledger.read"]')))
    assert code_of(bench.ask(record())[0]) == "not_permitted"
    assert code_of(bench.ask(ListOperations(caller("stranger"), None, None, 50))[0]) == "not_permitted"
    assert "operation.recorded" not in bench.store.kinds()


def test_a_field_at_fault_is_told_to_who_may_record_only() -> None:
    bench = Bench()
    wrong = BadRequest("field_malformed", "field 'plan': wrong")
    assert code_of(bench.ask(RecordOperation(caller("operator"), wrong))[0]) == "field_malformed"
    assert code_of(bench.ask(RecordOperation(caller("stranger"), wrong))[0]) == "not_permitted"
    assert code_of(bench.ask(RecordOperation(caller(None), wrong))[0]) == "token_missing"


def test_a_token_in_a_reason_is_not_kept() -> None:
    bench = Bench()
    reply = bench.ask(record(reason=f"used {builders.token('operator')} here"))[0]
    assert reply["reason"] == "used [hidden] here"
    assert builders.token("operator") not in " ".join(entry.body for entry in bench.store.entries)


# --- listing ------------------------------------------------------------------------------------------------------


def test_pages_follow_one_another_newest_first() -> None:
    bench = Bench()
    for number in range(5):
        bench.ask(record(reason=str(number), evidence=EVIDENCE if number % 2 else ""))
    first = listed(bench, limit=2)
    second = listed(bench, before=int(first["before"]), limit=2)
    last = listed(bench, before=int(second["before"]), limit=2)
    assert [row["reason"] for page in (first, second, last) for row in page["operations"]] == ["4", "3", "2", "1", "0"]
    assert last["before"] is None
    assert [row["reason"] for row in listed(bench, EVIDENCE)["operations"]] == ["3", "1"]


def test_a_page_of_long_reasons_fits_in_a_reply() -> None:
    bench = Bench()
    for _ in range(200):
        bench.ask(record(reason="\U0001f511" * 500))
    page, seen = listed(bench, limit=200), 0
    while True:
        assert len(json.dumps(page, ensure_ascii=False).encode()) < MAX_REPLY
        seen += len(page["operations"])
        if page["before"] is None:
            break
        page = listed(bench, before=int(page["before"]), limit=200)
    assert seen == 200


# --- the real ledger ----------------------------------------------------------------------------------------------


def operation(evidence: str = "") -> Event:
    names = ("operation", "outcome", "plan", "reason", "address", "request_id")
    return Event("operation.recorded", "operator", {**dict.fromkeys(names, ""), "evidence": evidence})


def plan_of(reader: LedgerReader, ask: Any) -> str:
    """How SQLite goes about the statements that `ask` makes."""
    said: list[str] = []
    reader.connection().set_trace_callback(said.append)
    ask()
    reader.connection().set_trace_callback(None)
    return "\n".join(
        row[3] for text in said if text.startswith("SELECT") for row in reader.query(f"EXPLAIN QUERY PLAN {text}")
    )


def test_operations_are_found_without_looking_at_the_others(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit([issued(1), issued(2, backend="vault"), operation(), operation(EVIDENCE), issued(3)], NOW * 1000)
    assert [entry.seq for entry in ledger.operations(None, None, 9)] == [4, 3]
    assert [entry.seq for entry in ledger.operations(None, 4, 9)] == [3]
    assert [entry.seq for entry in ledger.operations(EVIDENCE, None, 9)] == [4]
    for evidence in (None, EVIDENCE):
        plan = plan_of(ledger, lambda evidence=evidence: ledger.operations(evidence, None, 9))
        assert plan.startswith("SEARCH events USING INDEX events_by_kind (kind=? AND rowid<?)")
        assert "B-TREE" not in plan
    ledger.close()


@pytest.mark.parametrize("folds", [False, True])
def test_vaults_certificates_are_found_without_looking_at_the_others(tmp_path: Path, *, folds: bool) -> None:
    ledger = Ledger(tmp_path)
    ledger.commit([issued(1), issued(2, backend="vault"), issued(3)], NOW * 1000)
    if folds:
        fold_all(ledger)
    reader = CertificateReader(tmp_path)
    for wanted in (
        Filter(backend="vault"),
        Filter(backend="vault", role="llmops", active_at=NOW),
        Filter(backend="vault", principal="llmops"),
    ):
        assert [row.serial for row in reader.page(wanted)[0]] == [2]
    assert [row.serial for row in reader.page(Filter(backend="local"))[0]] == [3, 1]
    assert [row.serial for row in reader.page(Filter(backend="vault", identity="deploy-agent"))[0]] == [2]
    reader.close()
    ledger.close()
    if folds:
        with closing(sqlite3.connect(tmp_path / VIEWS_NAME)) as db:
            statements: list[str] = []
            db.set_trace_callback(statements.append)
            _select(db, Filter(backend="vault", role="llmops"), 0, 9)
            db.set_trace_callback(None)
            (plan,) = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statements[0]}") if "INDEX cert" in row[3]]
        assert "USING INDEX certificates_of_vault" in plan


def entry(seq: int, operation: str, outcome: str, kind: str = "operation.recorded") -> Entry:
    body = json.dumps({"operation": operation, "outcome": outcome})
    return Entry(seq, seq * 1000, kind, "operator", body, "", "")


@pytest.mark.parametrize(
    "recorded, at",
    [
        ([], None),
        ([("cutover", "applied")], 1),
        ([("cutover", "failed")], None),
        ([("cutover", "stopped")], None),
        ([("cutover", "approval_refused")], None),
        ([("cutover", "applied"), ("rollback", "failed")], 1),
        ([("cutover", "applied"), ("rollback", "rollback_failed")], 1),
        ([("cutover", "applied"), ("rollback", "applied")], None),
        ([("cutover", "rolled_back")], None),
        ([("cutover", "applied"), ("rollback", "applied"), ("cutover", "applied")], 3),
        ([("cutover", "applied"), ("decommission", "applied")], 1),
    ],
)
def test_a_cutover_is_in_force_until_a_way_back_is_recorded(recorded: list[tuple[str, str]], at: int | None) -> None:
    entries = [entry(seq, *words) for seq, words in enumerate(recorded, 1)]
    assert cut_over_at(entries) == at
    found = None
    for one in entries:  # as the keeper sees them, one commit after the other
        found = cut_over_at([one], found)
    assert found == at
    assert cut_over_at([entry(9, "rollback", "applied", "host.added")], at) == at


@pytest.mark.parametrize(
    "mode, at, warns", [("vault", 1, True), ("shadow", 1, True), ("local", 1, False), ("vault", None, False)]
)
def test_vault_that_signs_after_a_cutover_is_warned_about(mode: str, at: int | None, warns: bool) -> None:
    found = still_vault(mode, at)
    assert bool(found) == warns
    assert all("1970-01-01T00:00:01Z" in text and mode in text for text in found)
