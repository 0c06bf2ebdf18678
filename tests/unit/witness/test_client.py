"""The log's side of a witness: what is sent, and what is believed of the answers, of a real witness and of liars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from signer.errors import BadNote, SignerError, Unavailable
from signer.ledger.checkpoint import Note, check_cosignature, cosign, parse_note
from signer.witness.client import (
    CLOCK_TOLERANCE,
    TRIES,
    Answer,
    Cosignature,
    OtherHistory,
    WitnessAhead,
    ask_witness,
)
from signer.witness.state import Log, State, claim_state, group_logs
from signer.witness.witness import Witness
from tests.parts.small_log import SmallLog, witness_key

NAME = "witness.example/w1"
NOW = 1_790_000_000
PRIVATE, KEY = witness_key(NAME)
TRUE = SmallLog()
REWRITTEN = SmallLog(fork_at=3)
OTHER_KEY = witness_key("witness.example/other")


@dataclass
class Real:
    """A witness in this process."""

    witness: Witness
    name: str = "http://w1"
    asked: list[bytes] = field(default_factory=list)

    def ask(self, path: str, body: bytes | None = None) -> Answer:
        if body is not None:
            self.asked.append(body)
        response = self.witness.answer("GET" if body is None else "POST", path, body or b"")
        return Answer(response.status, response.body)


@dataclass
class Lying:
    """A witness that gives prepared answers, the last one for ever, and shows a prepared checkpoint."""

    answers: list[Answer]
    newest: Answer = field(default_factory=lambda: Answer(404, b""))
    name: str = "http://liar"
    asked: int = 0

    def ask(self, path: str, body: bytes | None = None) -> Answer:
        if body is None:
            assert path == f"/{log_of(TRUE).origin_hash}/checkpoint"
            return self.newest
        assert path == "/add-checkpoint"
        assert body.startswith(b"old ")
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@dataclass
class Grown:
    """A log of a size."""

    grown: SmallLog
    size: int

    @property
    def log(self) -> Log:
        return log_of(self.grown)

    def checkpoint(self) -> Note:
        return self.grown.note(self.size)

    def proof(self, old: int, new: int) -> Sequence[bytes]:
        return self.grown.proof(old, new)


def log_of(log: SmallLog) -> Log:
    return Log(log.origin, (log.vkey,))


def start(folder: Path) -> Real:
    logs = group_logs([(TRUE.origin, TRUE.vkey)])
    folder.mkdir(exist_ok=True)
    claim_state(folder)
    return Real(Witness(State(folder, logs, KEY), logs, KEY, PRIVATE.sign, clock=lambda: float(NOW)))


def ask(
    remote: Real | Lying, log: SmallLog, size: int, known: int = 0, *, now: int = NOW, grown: int | None = None
) -> Cosignature:
    source = Grown(log, size if grown is None else grown)
    return ask_witness(remote, KEY, source, log.note(size), known, now)


def test_a_round_goes_on_from_what_the_witness_knows(tmp_path: Path) -> None:
    remote = start(tmp_path)
    for size, known, requests in ((3, 0, 1), (7, 3, 1), (9, 0, 2), (9, 9, 1), (12, 5, 2)):
        remote.asked.clear()
        made = ask(remote, TRUE, size, known)
        assert (len(remote.asked), made.at, made.was_behind) == (requests, NOW, False)
        assert check_cosignature(TRUE.note(size).with_signatures([made.line]), KEY) == NOW


def test_a_witness_that_was_restored_cosigns_and_is_told(tmp_path: Path) -> None:
    remote = start(tmp_path / "old")
    ask(remote, TRUE, 5)
    assert ask(remote, TRUE, 20, known=12).was_behind
    assert not ask(start(tmp_path / "new"), TRUE, 20).was_behind


@pytest.mark.parametrize("size", [4, 8, 9, 30])
def test_a_rewritten_log_is_told_with_the_witness_s_checkpoint(tmp_path: Path, size: int) -> None:
    remote = start(tmp_path)
    ask(remote, TRUE, 8)
    with pytest.raises(OtherHistory) as caught:
        ask(remote, REWRITTEN, size, known=8)
    assert caught.value.code == "ledger_differs_from_witness"
    assert caught.value.evidence.text == TRUE.note(8).text
    check_cosignature(caught.value.evidence, KEY)


def test_a_log_that_was_cut_off_is_told(tmp_path: Path) -> None:
    remote = start(tmp_path)
    ask(remote, TRUE, 8)
    with pytest.raises(OtherHistory):
        ask(remote, TRUE, 5, known=8)


def test_another_one_who_was_faster_is_no_fork(tmp_path: Path) -> None:
    remote = start(tmp_path)
    ask(remote, TRUE, 8)
    with pytest.raises(WitnessAhead):
        ask(remote, TRUE, 5, known=5, grown=9)


def test_two_signers_that_feed_one_witness_have_one_history_or_one_of_them_is_told(tmp_path: Path) -> None:
    """Both sign with the ledger's key. By turns they go on together, until one of them writes other events."""
    remote = start(tmp_path)
    for size in range(1, 9):  # each knows only what it was answered itself
        assert ask(remote, TRUE, size, known=max(size - 2, 0)).at == NOW
    with pytest.raises(OtherHistory):
        ask(remote, REWRITTEN, 9, known=7)
    assert ask(remote, TRUE, 9, known=8).at == NOW, "the refused one holds nobody up"
    with pytest.raises(OtherHistory):
        ask(remote, REWRITTEN, 12, known=9)


def conflict(size: object) -> Answer:
    return Answer(409, f"{size}\n".encode())


@pytest.mark.parametrize(
    "answers",
    [
        [conflict(0)],
        [conflict(1), conflict(2), conflict(3), conflict(4)],
        [conflict(99)],
        [conflict("-1")],
        [conflict("1 ")],
        [Answer(409, b"1")],
        [Answer(409, b"9" * 100_000)],
        [Answer(409, "\u0661\n".encode())],
        [Answer(422, b"no")],
    ],
    ids=["the same size", "for ever", "ahead without proof", "negative", "blank", "no line", "huge", "digits", "422"],
)
def test_a_witness_that_lies_is_given_up(answers: list[Answer]) -> None:
    remote = Lying(answers)
    with pytest.raises(Unavailable) as caught:
        ask(remote, TRUE, 8)
    assert caught.value.code == "witness_faulty"
    assert remote.asked <= TRIES


def shown(log: SmallLog, size: int) -> Answer:
    note = log.note(size)
    return Answer(200, note.with_signatures([cosign(note.text, NOW, KEY, PRIVATE.sign)]).render())


UNSIGNED = SmallLog(fork_at=3, key_name="somebody")
FOREIGN = replace(SmallLog(fork_at=3), origin="other.example/log")


@pytest.mark.parametrize(
    "newest",
    [
        Answer(404, b""),
        Answer(200, b"nothing"),
        Answer(200, REWRITTEN.note(8).render()),
        shown(UNSIGNED, 8),
        shown(FOREIGN, 8),
        shown(TRUE, 8),
        shown(TRUE, 5),
    ],
    ids=["none", "no note", "not cosigned", "not the log's key", "another log", "the same", "an older one"],
)
def test_a_refusal_is_no_fork_unless_both_keys_signed_another_history(newest: Answer) -> None:
    with pytest.raises(Unavailable) as caught:
        ask(Lying([Answer(422, b"no")], newest), TRUE, 8)
    assert caught.value.code == "witness_faulty"


def good_lines() -> str:
    return f"{cosign(TRUE.note(8).text, NOW, KEY, PRIVATE.sign)}\n"


def dated(at: int) -> str:
    return f"{cosign(TRUE.note(8).text, at, KEY, PRIVATE.sign)}\n"


@pytest.mark.parametrize(
    "body, code",
    [
        (lambda: "", "note_malformed"),
        (lambda: good_lines() + "\n", "note_malformed"),
        (lambda: good_lines() * 2, "note_malformed"),
        (lambda: f"{cosign(TRUE.note(8).text, NOW, OTHER_KEY[1], OTHER_KEY[0].sign)}\n", "note_not_signed"),
        (lambda: f"{cosign(TRUE.note(8).text, NOW, KEY, OTHER_KEY[0].sign)}\n", "note_signature_wrong"),
        (lambda: f"{cosign(TRUE.note(7).text, NOW, KEY, PRIVATE.sign)}\n", "note_signature_wrong"),
        (lambda: dated(NOW - CLOCK_TOLERANCE - 1), "cosignature_time_wrong"),
        (lambda: dated(NOW + CLOCK_TOLERANCE + 1), "cosignature_time_wrong"),
    ],
    ids=["empty", "more", "twice", "another key", "forged", "another checkpoint", "old", "of the future"],
)
def test_a_cosignature_counts_only_if_it_verifies_and_is_of_now(body: Callable[[], str], code: str) -> None:
    with pytest.raises(BadNote) as caught:
        ask(Lying([Answer(200, body().encode())]), TRUE, 8)
    assert caught.value.code == code


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(BadNote):
        ask(Lying([Answer(200, b"\xff\n")]), TRUE, 8)


def test_further_lines_of_a_witness_are_passed_over() -> None:
    more = cosign(TRUE.note(8).text, NOW, OTHER_KEY[1], OTHER_KEY[0].sign)
    made = ask(Lying([Answer(200, f"{good_lines()}{more}\n".encode())]), TRUE, 8)
    assert parse_note(TRUE.note(8).with_signatures([made.line]).render()).signatures[-1].name == NAME


@pytest.mark.parametrize("status", [301, 400, 403, 404, 500, 503])
def test_any_other_answer_is_shown_on_one_line(status: int) -> None:
    with pytest.raises(SignerError) as caught:
        ask(Lying([Answer(status, b"no\x1b[31m\nway\xff" + b"x" * 1000)]), TRUE, 8)
    assert caught.value.code == "witness_refused"
    assert caught.value.text.isprintable()
    assert len(caught.value.text) < 300
