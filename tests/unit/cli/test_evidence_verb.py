"""`signer evidence verify --config`: the ledger is asked through the service that cutover.toml names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from signer.errors import Unavailable
from tests.parts.command import run
from tests.parts.cutover_file import GOOD
from tests.parts.evidence import sealed_run


class Service:
    """A service whose ledger holds `rows`, or that is away."""

    rows: tuple[dict[str, Any], ...] = ()
    is_away = False
    asked: tuple[object, ...] = ()

    def __init__(self, address: str, token_file: Path) -> None:
        Service.asked = (address, token_file)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        Service.asked = (*Service.asked, "closed")

    def operations(self, evidence: str) -> list[dict[str, Any]]:
        if self.is_away:
            raise Unavailable("service_down", "nothing listens there")
        return [row for row in self.rows if row["evidence"] == evidence]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = sealed_run(tmp_path / "evidence")
    plan = made.read_json("plan.json")["digest"]
    row = {"seq": 9, "hash": "ab" * 32, "time": "2026-11-22T14:05:13Z", "actor": "operator", "plan": plan,
           "operation": "cutover", "outcome": "applied", "evidence": made.digest, "reason": ""}  # fmt: skip
    made.keep_ledger_answer(row)
    (tmp_path / "cutover.toml").write_text(GOOD)
    monkeypatch.setattr(Service, "rows", (row,))
    monkeypatch.setattr("signer.api_client.ApiClient", Service)
    monkeypatch.chdir(tmp_path)
    return made.folder


def test_the_service_of_the_configuration_is_asked(folder: Path) -> None:
    ran = run("evidence", "verify", str(folder), "--config", "cutover.toml")
    assert (ran.status, ran.err) == (0, "")
    assert "ledger  event 9, 2026-11-22T14:05:13Z, by operator" in ran.out
    assert Service.asked == ("http://127.0.0.1:8222", Path("/root/token"), "closed")


def test_a_service_that_does_not_hold_it_or_is_away_means_not_good(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Service, "rows", ())
    ran = run("evidence", "verify", str(folder), "--config", "cutover.toml", "--json")
    assert ran.status == 1
    assert "evidence_not_recorded" in [problem["code"] for problem in json.loads(ran.out)["problems"]]
    monkeypatch.setattr(Service, "is_away", True)
    ran = run("evidence", "verify", str(folder), "--config", "cutover.toml")
    assert ran.status == 1
    assert "evidence_ledger_unreachable" in ran.out


def test_names_that_would_steer_a_terminal_are_shown_as_escapes(folder: Path) -> None:
    (folder / "a\x1b[2J\nFAIL").write_text("x")
    ran = run("evidence", "verify", str(folder), "--config", "cutover.toml")
    assert ran.status == 1
    assert "\x1b" not in ran.out
    assert r"a\x1b[2J\nFAIL: a file that was not sealed" in ran.out
