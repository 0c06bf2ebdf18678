"""A witness's answers (c2sp.org/tlog-witness), its state on the disk, and what it keeps as evidence."""

from __future__ import annotations

import os
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import pytest

from signer.errors import BadFile, SignerError, Unavailable
from signer.ledger.checkpoint import Checkpoint, Note, check_cosignature, parse_note, parse_signatures, sign_note
from signer.ledger.tree import EMPTY_ROOT
from signer.witness import state as state_module
from signer.witness.client import render_request
from signer.witness.server import Response
from signer.witness.state import (
    FORK,
    MAX_KEPT,
    REFUSED,
    Log,
    State,
    claim_state,
    group_logs,
    list_evidence,
    list_states,
)
from signer.witness.witness import CLOCK_STEP, SAME_ANSWER, SIZE_TYPE, Witness
from tests.parts.small_log import SmallLog, private_key, witness_key

NAME = "witness.example/w1"
NOW = 1_790_000_000
LOG = SmallLog()
REWRITTEN = SmallLog(fork_at=3)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(tmp_path: Path, clock: Clock) -> Callable[..., Witness]:
    """A witness that reads its state from the disk, as after a start."""

    def make(*logs: tuple[str, SmallLog], name: str = NAME) -> Witness:
        known = group_logs((origin, log.vkey) for origin, log in (logs or ((LOG.origin, LOG),)))
        key, own = witness_key(name)
        return Witness(State(tmp_path, known, own), known, own, key.sign, clock=clock)

    return make


def add(witness: Witness, body: bytes) -> Response:
    return witness.answer("POST", "/add-checkpoint", body)


def sizes(response: Response) -> tuple[int, str, bytes]:
    return response.status, response.content_type, response.body


def cosigned_at(response: Response, note: Note) -> int:
    """When the response's cosignature says that the note was cosigned; fails the test if it does not verify."""
    assert response.status == HTTPStatus.OK
    return check_cosignature(note.with_signatures(parse_signatures(response.body.decode())), witness_key(NAME)[1])


@pytest.mark.parametrize("steps", [(5,), (0, 5), (1, 2, 3), (4, 4, 8, 9, 100), (0, 0, 1, 1)])
def test_cosigns_what_goes_on_from_the_checkpoint_before(start: Callable[..., Witness], steps: tuple[int, ...]) -> None:
    witness, old = start(), 0
    for new in steps:
        assert cosigned_at(add(witness, LOG.request(old, new)), LOG.note(new)) == NOW
        old = new


def test_remembers_over_a_start(start: Callable[..., Witness]) -> None:
    add(start(), LOG.request(0, 5))
    assert sizes(add(start(), LOG.request(0, 7))) == (409, SIZE_TYPE, b"5\n")
    assert add(start(), LOG.request(5, 7)).status == HTTPStatus.OK
    assert sizes(add(start(), LOG.request(5, 9))) == (409, SIZE_TYPE, b"7\n")


def test_does_not_go_back(start: Callable[..., Witness]) -> None:
    witness = start()
    add(witness, LOG.request(0, 9))
    assert sizes(add(witness, LOG.request(0, 5))) == (409, SIZE_TYPE, b"9\n")
    assert sizes(add(witness, LOG.request(5, 5))) == (409, SIZE_TYPE, b"9\n")
    assert add(witness, LOG.request(9, 5)).status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    "old, new, kind",
    [(5, 5, FORK), (5, 9, REFUSED)],
    ids=["the same size", "a larger one"],
)
def test_refuses_a_rewritten_log_and_keeps_it(
    start: Callable[..., Witness], tmp_path: Path, old: int, new: int, kind: str
) -> None:
    witness = start()
    add(witness, LOG.request(0, 5))
    before = witness.answer("GET", f"/{Log(LOG.origin, ()).origin_hash}/checkpoint", b"").body
    assert add(witness, REWRITTEN.request(old, new)).status == HTTPStatus.UNPROCESSABLE_ENTITY
    (kept,) = list_evidence(tmp_path, Log(LOG.origin, ()), kind)
    assert kept.read_bytes() == before + b"\n" + REWRITTEN.note(new).render()
    assert kept.stat().st_mode & 0o777 == 0o600
    # The true log is still cosigned, by the same process and after a start.
    assert add(witness, LOG.request(5, 6)).status == HTTPStatus.OK
    assert add(start(), LOG.request(6, 7)).status == HTTPStatus.OK


def test_evidence_has_the_signatures_of_the_log_alone(start: Callable[..., Witness], tmp_path: Path) -> None:
    witness, stranger = start(), SmallLog(key_name="stranger.example")
    add(witness, LOG.request(0, 5))
    fork = REWRITTEN.note(5)
    more = fork.with_signatures([sign_note(fork.text, stranger.vkey, stranger.key.sign)])
    add(witness, render_request(5, [], more))
    (kept,) = list_evidence(tmp_path, Log(LOG.origin, ()), FORK)
    assert b"stranger.example" not in kept.read_bytes()


def test_keeps_a_bounded_number_of_refusals_of_each_kind(start: Callable[..., Witness], tmp_path: Path) -> None:
    witness = start()
    add(witness, LOG.request(0, 5))
    log = Log(LOG.origin, ())
    for number in range(MAX_KEPT + 3):
        other = SmallLog(fork_at=2, word=f"fork {number}")
        assert add(witness, other.request(5, 5)).status == HTTPStatus.UNPROCESSABLE_ENTITY
        assert add(witness, other.request(5, 6)).status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert len(list_evidence(tmp_path, log, FORK)) == len(list_evidence(tmp_path, log, REFUSED)) == MAX_KEPT


def test_a_wrong_proof_of_a_right_checkpoint_is_no_evidence_any_more(
    start: Callable[..., Witness], tmp_path: Path
) -> None:
    """Anyone can send a public checkpoint with a wrong proof: that must not fill the room for evidence."""
    witness = start()
    add(witness, LOG.request(0, 5))
    assert add(witness, LOG.request(5, 8, proof=[bytes(32)])).status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert len(list_evidence(tmp_path, Log(LOG.origin, ()), REFUSED)) == 1
    assert add(witness, LOG.request(5, 8)).status == HTTPStatus.OK
    assert list_evidence(tmp_path, Log(LOG.origin, ()), REFUSED) == []


def test_wrong_proof_of_a_first_checkpoint(start: Callable[..., Witness], tmp_path: Path) -> None:
    assert add(start(), LOG.request(0, 5, proof=[bytes(32)])).status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert list(tmp_path.iterdir()) == []


def test_an_empty_tree_has_one_root(start: Callable[..., Witness]) -> None:
    text = Checkpoint(LOG.origin, 0, EMPTY_ROOT).text.replace("47DE", "47DF")
    note = Note(text, (sign_note(text, LOG.vkey, LOG.key.sign),))
    assert add(start(), render_request(0, [], note)).status == HTTPStatus.UNPROCESSABLE_ENTITY


def test_unknown_origin(start: Callable[..., Witness]) -> None:
    other = SmallLog(origin="other.example/ledger")
    assert add(start(), other.request(0, 5)).status == HTTPStatus.NOT_FOUND


def test_no_signature_of_the_log(start: Callable[..., Witness]) -> None:
    other = SmallLog(key_name="someone.example")
    assert add(start(), other.request(0, 5)).status == HTTPStatus.FORBIDDEN


def test_one_wrong_signature_of_a_known_key_refuses_the_note(start: Callable[..., Witness]) -> None:
    """A second key of the log signed rightly, but the first one's signature is wrong: the note is malformed."""
    second = SmallLog(key_name="log.example/second")
    witness = start((LOG.origin, LOG), (LOG.origin, second))
    text = LOG.checkpoint(5).text
    good = sign_note(text, second.vkey, second.key.sign)
    wrong = sign_note(text, LOG.vkey, second.key.sign)
    assert add(witness, render_request(0, [], Note(text, (good, wrong)))).status == HTTPStatus.FORBIDDEN
    assert add(witness, render_request(0, [], Note(text, (good,)))).status == HTTPStatus.OK


def test_a_log_whose_key_has_another_name(start: Callable[..., Witness]) -> None:
    log = SmallLog(origin="go.sum database tree", key_name="sum.example")
    assert add(start((log.origin, log)), log.request(0, 5)).status == HTTPStatus.OK


def test_extension_lines_are_cosigned(start: Callable[..., Witness]) -> None:
    log = SmallLog(extensions=("any line", "another"))
    assert cosigned_at(add(start(), log.request(0, 5)), log.note(5)) == NOW


_HASH = b"A" * 43 + b"=\n"
MALFORMED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda body: b"",
    "no old": lambda body: body.removeprefix(b"old "),
    "two spaces": lambda body: body.replace(b"old 0\n", b"old  0\n"),
    "leading zero": lambda body: body.replace(b"old 0\n", b"old 00\n"),
    "negative": lambda body: body.replace(b"old 0\n", b"old -1\n"),
    "CRLF": lambda body: body.replace(b"old 0\n", b"old 0\r\n"),
    "arabic digit": lambda body: body.replace(b"old 0\n", "old \u0661\n".encode()),
    "64 lines of proof": lambda body: body.replace(b"old 0\n", b"old 0\n" + _HASH * 64),
    "base64 not canonical": lambda body: body.replace(b"old 0\n", b"old 0\n" + b"A" * 42 + b"B=\n"),
    "short hash": lambda body: body.replace(b"old 0\n", b"old 0\nAAAA\n"),
    "two empty lines": lambda body: body.replace(b"old 0\n", b"old 0\n\n"),
    "a trailing line": lambda body: body + b"one more line\n",
    "no end": lambda body: body.removesuffix(b"\n"),
    "a signature twice": lambda body: body + body.splitlines(keepends=True)[-1],
    "size changed": lambda body: body.replace(b"\n5\n", b"\n05\n"),
    "no checkpoint": lambda body: b"old 0\n\n",
    "not UTF-8": lambda body: b"\xff" * 100,
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests(start: Callable[..., Witness], tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    response = add(start(), change(LOG.request(0, 5)))
    # A changed checkpoint is one that the log did not sign.
    assert response.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND)
    assert list(tmp_path.iterdir()) == []


def test_a_signed_text_that_is_no_checkpoint(start: Callable[..., Witness]) -> None:
    for text in (f"{LOG.origin}\n5\n", f"{LOG.origin}\n05\n{'A' * 43}=\n", f"{LOG.origin}\n5\n{'A' * 42}B=\n"):
        note = Note(text, (sign_note(text, LOG.vkey, LOG.key.sign),))
        assert add(start(), render_request(0, [], note)).status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    "method, target, status",
    [
        ("GET", "/add-checkpoint", 405),
        ("POST", f"/{'0' * 64}/checkpoint", 405),
        ("GET", f"/{'0' * 64}/checkpoint", 404),
        ("GET", "/", 404),
        ("POST", "/add-checkpoint/", 404),
        ("POST", "/../add-checkpoint", 404),
    ],
)
def test_other_routes(start: Callable[..., Witness], method: str, target: str, status: int) -> None:
    assert start().answer(method, target, LOG.request(0, 5)).status == status


def test_serves_the_newest_checkpoint_with_both_signatures(start: Callable[..., Witness]) -> None:
    witness, target = start(), f"/{Log(LOG.origin, ()).origin_hash}/checkpoint"
    assert witness.answer("GET", target, b"").status == HTTPStatus.NOT_FOUND
    add(witness, LOG.request(0, 5))
    note = parse_note(witness.answer("GET", target, b"").body)
    assert note.text == LOG.note(5).text
    assert [line.name for line in note.signatures] == [LOG.key_name, NAME]
    assert check_cosignature(note, witness_key(NAME)[1]) == NOW


def test_the_same_checkpoint_gets_a_new_cosignature_after_a_while(
    start: Callable[..., Witness], clock: Clock, tmp_path: Path
) -> None:
    """Strangers can repeat a public checkpoint: that must not cost a write each time."""
    witness = start()
    add(witness, LOG.request(0, 5))
    (path,) = tmp_path.glob("*.checkpoint")
    written = path.stat().st_ino
    clock.now += SAME_ANSWER - 1
    assert cosigned_at(add(witness, LOG.request(5, 5)), LOG.note(5)) == NOW
    assert path.stat().st_ino == written
    clock.now += 1
    assert cosigned_at(add(witness, LOG.request(5, 5)), LOG.note(5)) == NOW + SAME_ANSWER
    assert path.stat().st_ino != written


def test_time_does_not_go_back(start: Callable[..., Witness], clock: Clock) -> None:
    witness = start()
    add(witness, LOG.request(0, 5))
    clock.now -= CLOCK_STEP
    assert cosigned_at(add(witness, LOG.request(5, 6)), LOG.note(6)) == NOW
    clock.now -= 1
    assert add(start(), LOG.request(6, 7)).status == HTTPStatus.SERVICE_UNAVAILABLE
    clock.now = NOW
    assert add(witness, LOG.request(6, 7)).status == HTTPStatus.OK


def test_nothing_is_cosigned_that_is_not_on_the_disk(
    start: Callable[..., Witness], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = start()
    add(witness, LOG.request(0, 5))

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_module, "write_atomically", fail)
    assert add(witness, LOG.request(5, 6)).status == HTTPStatus.SERVICE_UNAVAILABLE
    assert add(witness, REWRITTEN.request(5, 6)).status == HTTPStatus.SERVICE_UNAVAILABLE
    monkeypatch.undo()
    assert sizes(add(witness, LOG.request(6, 7))) == (409, SIZE_TYPE, b"5\n")
    assert add(witness, LOG.request(5, 7)).status == HTTPStatus.OK


def test_the_state_is_on_the_disk_before_the_key_signs_an_answer_that_leaves(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of fsync, rename, fsync of the directory and answer."""
    steps: list[str] = []

    def noted(name: str) -> Callable[..., object]:
        real: Callable[..., object] = getattr(os, name)

        def call(*values: object, **named: object) -> object:
            steps.append(name)
            return real(*values, **named)

        return call

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, noted(name))
    key, own = witness_key(NAME)
    known = group_logs([(LOG.origin, LOG.vkey)])
    response = add(Witness(State(tmp_path, known, own), known, own, key.sign, clock=clock), LOG.request(0, 5))
    steps.append("answer")
    assert response.status == HTTPStatus.OK
    assert steps == ["fsync", "rename", "fsync", "answer"]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b"\n5\n", b"\n4\n"),
        lambda data: data + b"x",
        lambda data: LOG.note(5).render(),
        lambda data: SmallLog(origin="other.example").note(5).render(),
    ],
    ids=["cut off", "empty", "another size", "more", "not cosigned", "another log"],
)
def test_a_damaged_state_ends_the_start(
    start: Callable[..., Witness], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    add(start(), LOG.request(0, 5))
    (path,) = tmp_path.glob("*.checkpoint")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadFile) as error:
        start()
    assert error.value.code == "witness_state_damaged"


def test_the_state_of_another_witness_or_of_another_key_ends_the_start(start: Callable[..., Witness]) -> None:
    add(start(), LOG.request(0, 5))
    with pytest.raises(BadFile, match="signature"):
        start(name="another.example")
    with pytest.raises(BadFile, match="signature"):
        start((LOG.origin, SmallLog(key_name="log.example/second")))


def test_one_state_for_one_witness(tmp_path: Path) -> None:
    first = claim_state(tmp_path / "state")
    with pytest.raises(Unavailable) as error:
        claim_state(tmp_path / "state")
    assert error.value.code == "witness_state_in_use"
    os.close(first)
    os.close(claim_state(tmp_path / "state"))
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_a_state_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for work in (claim_state, list_states):
        with pytest.raises(SignerError) as error:
            work(tmp_path / "file" / "state")
        assert error.value.code == "witness_state_unusable"


def test_the_list_of_an_operator(start: Callable[..., Witness], tmp_path: Path) -> None:
    witness = start()
    add(witness, LOG.request(0, 5))
    add(witness, REWRITTEN.request(5, 5))
    add(witness, REWRITTEN.request(5, 8))
    (found,) = list_states(tmp_path)
    assert (found.origin, found.size, found.at) == (LOG.origin, 5, NOW)
    assert found.root == LOG.checkpoint(5).root
    assert (len(found.forks), len(found.refused)) == (1, 1)


def test_keys_of_a_test_differ() -> None:
    assert private_key("one").private_bytes_raw() != private_key("two").private_bytes_raw()
