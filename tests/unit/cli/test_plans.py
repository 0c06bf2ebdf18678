"""The plan file on its way out and in, whose it must be, and what becomes of an approval that is refused."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from signer.cli.plans import check_approval, load_plan, show_end, write_plan
from signer.errors import ApprovalRefused, BadFile, Unavailable
from signer.migration.compose import ComposeFailed
from signer.migration.config import CutoverFile, load_cutover_file, parse_cutover_file
from signer.migration.plan import Plan
from signer.migration.runner import RunResult
from signer.model import RunOutcome
from tests.parts.cutover_file import GOOD

STEP = {"number": 1, "name": "up", "title": "up", "effect": "CHANGES", "undo": "", "reads": [], "would": []}

NOW = {"mode": "vault", "ready": True, "code": "", "inventory": {"mounts": ["ssh/"]}}


def a_plan(path: object = "/etc/cutover.toml") -> Plan:
    return Plan("cutover", "a title", {"config": {"path": path}}, NOW, {"mode": "local"}, (STEP,))


class Ledger:
    """Takes every record, or none."""

    def __init__(self) -> None:
        self.held: list[tuple[str, ...]] = []
        self.is_down = False

    def record(self, *words: str) -> dict[str, object]:
        if self.is_down:
            raise Unavailable("service_down", "nobody answers", "start it")
        self.held.append(words)
        return {}


def a_file(folder: Path) -> CutoverFile:
    return parse_cutover_file(GOOD.replace("/var/lib/safe-session/evidence", str(folder)).encode())


def test_a_plan_file_is_private_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, a_plan())
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_plan(path, "cutover") == (a_plan(), Path("/etc/cutover.toml"))
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def test_no_link_that_lies_in_the_way_is_followed(tmp_path: Path) -> None:
    """Root may write its plan where others can lay a link under the name that is written to first."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (".plan.json.new", f".plan.json.{os.getpid()}.new", "plan.json"):
        (tmp_path / name).symlink_to(precious)
    write_plan(tmp_path / "plan.json", a_plan())
    assert precious.read_text() == "mine"
    assert not (tmp_path / "plan.json").is_symlink()


def test_a_plan_that_cannot_be_written_is_an_error_of_the_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "plan.json", tmp_path):
        with pytest.raises(BadFile) as refused:
            write_plan(path, a_plan())
        assert refused.value.code == "plan_unwritable"


@pytest.mark.parametrize("where", [None, 17, "cutover.toml", "", {"x": 1}])
def test_a_plan_that_names_no_configuration_is_none(tmp_path: Path, where: object) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(a_plan(where).as_json()))
    with pytest.raises(BadFile) as refused:
        load_plan(path, "cutover")
    assert refused.value.code == "plan_unreadable"


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o646])
@pytest.mark.parametrize("name", ["plan.json", "cutover.toml"])
def test_what_others_may_write_is_not_carried_out(tmp_path: Path, name: str, mode: int) -> None:
    path = tmp_path / name
    write_plan(path, a_plan()) if name == "plan.json" else path.write_text(GOOD)
    path.chmod(mode)
    with pytest.raises(BadFile) as refused:
        load_plan(path, "cutover") if name == "plan.json" else load_cutover_file(path)
    assert refused.value.code == "file_not_private"


def test_what_another_user_wrote_is_not_carried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, a_plan())
    if path.stat().st_uid == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BadFile) as refused:
        load_plan(path, "cutover")
    assert refused.value.code == "file_not_private"


def test_a_refused_approval_is_kept_without_what_was_typed(tmp_path: Path) -> None:
    ledger = Ledger()
    with pytest.raises(ApprovalRefused):
        check_approval(a_plan(), "my-password", a_file(tmp_path), ledger)  # type: ignore[arg-type]
    kept = (tmp_path / "journal" / "attempts.jsonl").read_text()
    assert json.loads(kept)["code"] == "approval_wrong"
    assert ledger.held == [("cutover", "approval_refused", a_plan().digest, "", "approval_wrong")]
    assert "my-password" not in kept


def test_where_it_cannot_be_kept_it_is_refused_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal").write_text("in the way")
    ledger = Ledger()
    ledger.is_down = True
    with pytest.raises(ApprovalRefused):
        check_approval(a_plan(), "wrong", a_file(tmp_path), ledger)  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "warning: this attempt is not recorded: " in said
    assert "warning: this attempt is not recorded in the ledger" in said


def test_the_plan_of_the_question_is_not_mixed_with_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json, or with stdout in a file, the person at the terminal must see it and stdout must stay one value."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("m04-vault-runtime-cutover-approved\n"))
    monkeypatch.setattr(sys, "stderr", said)
    approval = check_approval(a_plan(), None, a_file(tmp_path), Ledger())  # type: ignore[arg-type]
    assert (approval.way, approval.plan) == ("terminal", a_plan().digest)
    assert a_plan().digest in said.getvalue()
    assert "a title" in said.getvalue()
    assert "  now   mode vault\n" in said.getvalue()  # in words, without what is only there to be compared
    assert capsys.readouterr().out == ""


def test_what_a_failed_command_printed_is_shown_above_the_hint_to_fix_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = "\n".join(f"line {number}\x1b[2J" for number in range(30))
    error = ComposeFailed("compose_failed", "compose ended with status 1", "see the output above", said)
    result = RunResult(RunOutcome.ROLLED_BACK, error)
    state = SimpleNamespace(evidence="")
    run: Any = SimpleNamespace(evidence=SimpleNamespace(folder="run"), journal=SimpleNamespace(state=state))
    assert show_end(result, run, 1.0, {RunOutcome.ROLLED_BACK: "not cut over"}, as_json=False) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "signer: error: not cut over"
    assert lines[1:21] == [f"  line {number}\\x1b[2J" for number in range(10, 30)]
    assert lines[21:] == ["signer: hint: see the output above"]
