"""A round of cosigning, killed anywhere: the next one ends well, and no fork is ever accepted."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from signer.ledger.checkpoint import Note, check_cosignature, parse_checkpoint, parse_note
from signer.ledger.marks import COSIGNED, DIFFERS, read_mark
from signer.witness.client import Answer
from signer.witness.cosign import Round, run_round
from signer.witness.state import Log, State, group_logs
from signer.witness.witness import Witness
from tests.parts.killed import dies_at
from tests.parts.small_log import SmallLog, witness_key

NOW = 1_750_000_000
PRIVATE, KEY = witness_key("witness.example/w1")
TRUE, REWRITTEN = SmallLog(), SmallLog(fork_at=3)
LOGS = group_logs([(TRUE.origin, TRUE.vkey)])


class Real:
    """A witness in this process, as it starts with the files in `folder`."""

    name = "http://w1"

    def __init__(self, folder: Path) -> None:
        self._witness = Witness(State(folder, LOGS, KEY), LOGS, KEY, PRIVATE.sign, clock=lambda: float(NOW))

    def ask(self, path: str, body: bytes | None = None) -> Answer:
        response = self._witness.answer("GET" if body is None else "POST", path, body or b"")
        return Answer(response.status, response.body)


@dataclass
class Grown:
    """A log of a size."""

    grown: SmallLog
    size: int

    @property
    def log(self) -> Log:
        return LOGS[0]

    def checkpoint(self) -> Note:
        return self.grown.note(self.size)

    def proof(self, old: int, new: int) -> Sequence[bytes]:
        return self.grown.proof(old, new)


class Host:
    """The signer's files and the witness's, each in a folder below one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.data, self.state = folder, folder / "checkpoint", folder / "data", folder / "state"
        for path in (folder, self.data, self.state):
            path.mkdir(exist_ok=True)

    def copy(self, name: str) -> Host:
        shutil.copytree(self.folder, self.folder.with_name(name))
        return Host(self.folder.with_name(name))

    def round(self, log: SmallLog, size: int) -> Round:
        return run_round(Grown(log, size), [(Real(self.state), KEY)], 1, self.out, self.data, NOW)

    def written(self) -> int:
        """The size of the checkpoint in its file, whose cosignature is checked; 0 if there is none."""
        if not self.out.exists():
            return 0
        note = parse_note(self.out.read_bytes())
        check_cosignature(note, KEY)
        assert note.text == TRUE.note(parse_checkpoint(note.text).size).text
        return parse_checkpoint(note.text).size

    def cosigned(self) -> int:
        """The size that the witness has cosigned last, by its files."""
        newest = State(self.state, LOGS, KEY).newest(LOGS[0])
        return 0 if newest is None else newest.checkpoint.size

    def left(self) -> list[str]:
        """Files that a write has not named yet."""
        return [path.name for path in self.folder.rglob(".*")]

    def marked(self) -> int:
        mark = read_mark(self.data, COSIGNED)
        return 0 if mark is None else mark.seq

    def refuses_a_fork(self, size: int) -> bool:
        """Whether the witness refuses the rewritten log, whatever old size and proof are sent with it."""
        tried = (Real(self.state).ask("/add-checkpoint", REWRITTEN.request(old, size)) for old in range(size + 1))
        return all(answer.status in (409, 422) for answer in tried)


def test_a_round_killed_before_any_call_is_repeated_and_no_fork_gets_in(tmp_path: Path) -> None:
    before = Host(tmp_path / "before")
    assert before.round(TRUE, 5).is_written
    number, seen = 0, set()
    while True:
        host = before.copy(f"killed-{number}")
        was_killed = dies_at(number, lambda: host.round(TRUE, 8))  # noqa: B023 - called at once
        stage = (host.cosigned(), host.written(), host.marked())
        assert list(stage) == sorted(stage, reverse=True), "the witness remembers first, then the file, then the mark"
        assert set(stage) <= {5, 8}
        seen.add(stage)
        assert host.refuses_a_fork(8)
        assert host.cosigned() == stage[0], "a refused fork replaces nothing"
        done = host.round(TRUE, 8)
        assert (done.is_written, done.is_noted, done.differs) == (True, True, ())
        assert (host.cosigned(), host.written(), host.marked()) == (8, 8, 8)
        assert host.left() == [], "nothing that was half written stays"
        assert host.round(TRUE, 9).is_written
        if not was_killed:
            break
        number += 1
    assert number > 10, "it was killed at many places"
    assert seen == {(5, 5, 5), (8, 5, 5), (8, 8, 5), (8, 8, 8)}


def test_a_round_that_meets_another_history_and_is_killed_reports_it_the_next_time(tmp_path: Path) -> None:
    before = Host(tmp_path / "before")
    assert before.round(TRUE, 5).is_written
    number = 0
    while True:
        host = before.copy(f"killed-{number}")
        was_killed = dies_at(number, lambda: host.round(REWRITTEN, 8))  # noqa: B023 - called at once
        assert (host.cosigned(), host.written(), host.marked()) == (5, 5, 5), "nothing of the fork is taken"
        done = host.round(REWRITTEN, 8)
        assert (done.is_written, len(done.differs)) == (False, 1)
        assert host.left() == []
        assert read_mark(host.data, DIFFERS) is not None
        kept = parse_note(host.out.with_name("checkpoint.other-5").read_bytes())
        check_cosignature(kept, KEY)
        assert kept.text == TRUE.note(5).text
        assert len([*host.state.glob("*.refused-8-*")]) == 1, "the witness keeps the fork, once"
        if not was_killed:
            break
        number += 1
    assert number > 10, "it was killed at many places"
