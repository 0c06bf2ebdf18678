"""Every change to sealed evidence is found, whoever made the directory, and the ledger decides."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from signer.errors import Unavailable
from signer.migration.evidence import verify
from signer.migration.evidence.store import Evidence
from signer.migration.evidence.verify import Verdict, check_evidence
from tests.parts.evidence import BEGAN, fill, plan, sealed_run

ROOT = Path(__file__).parents[3]


class Recorded:
    """A ledger with the operations that were told to it."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def keep(self, run: Evidence, **changes: object) -> None:
        outcome = run.read_json("outcome.json")
        told = {name: outcome[name] or "" for name in ("operation", "outcome", "plan")}
        entry = {"seq": 8, "hash": "ab" * 32, "evidence": run.digest, **told, **changes}
        self.entries[run.digest] = entry
        run.keep_ledger_answer({**entry, **told})

    def __call__(self, digest: str) -> Mapping[str, Any] | None:
        return self.entries.get(digest)


@pytest.fixture
def ledger() -> Recorded:
    return Recorded()


@pytest.fixture
def run(tmp_path: Path, ledger: Recorded) -> Evidence:
    made = sealed_run(tmp_path / "evidence")
    ledger.keep(made)
    return made


def codes(verdict: Verdict) -> list[str]:
    return [problem.code for problem in verdict.problems]


def test_what_was_sealed_and_recorded_is_good(run: Evidence, ledger: Recorded) -> None:
    verdict = check_evidence(run.folder, ledger)
    assert (verdict.problems, verdict.is_good) == ((), True)
    assert (verdict.digest, verdict.operation, verdict.outcome) == (run.digest, "cutover", "applied")
    assert verdict.recorded == ledger.entries[run.digest]


def test_every_changed_file_is_found_by_its_name(run: Evidence, ledger: Recorded) -> None:
    for name in [line.split("  ")[1] for line in (run.folder / "SHA256SUMS").read_text().splitlines()]:
        path = run.folder / name
        before = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        path.chmod(0o400)
        verdict = check_evidence(run.folder, ledger)
        assert [problem.text for problem in verdict.problems] == [f"{name}: it has changed since the seal"]
        path.chmod(0o600)
        path.write_bytes(before)
        path.chmod(0o400)
    assert check_evidence(run.folder, ledger).is_good


def test_what_was_applied_has_done_every_step_of_its_plan(tmp_path: Path, ledger: Recorded) -> None:
    """Sealed and recorded without a step that its plan has: whoever made that did not do what was approved."""
    evidence = Evidence.create(tmp_path, "cutover", BEGAN)
    fill(evidence)
    (evidence.folder / "steps" / "07-smoke.json").unlink()
    evidence.seal("applied", {})
    ledger.keep(evidence)
    verdict = check_evidence(evidence.folder, ledger)
    assert [(one.code, one.text) for one in verdict.problems if not one.is_warning] == [
        ("evidence_incomplete", "steps/07-smoke.json: no evidence that the step was done")
    ]


def test_a_file_that_is_gone_is_found(run: Evidence, ledger: Recorded) -> None:
    (run.folder / "smoke/01-rs2000.log").unlink()
    assert codes(check_evidence(run.folder, ledger)) == ["evidence_file_missing"]


@pytest.mark.parametrize("name", ["more.json", "steps/99-x.json", "new/file", "a\x1b[2Jb", ".hidden"])
def test_a_file_that_came_later_is_found(run: Evidence, ledger: Recorded, name: str) -> None:
    (run.folder / name).parent.mkdir(exist_ok=True)
    (run.folder / name).write_text("x")
    assert set(codes(check_evidence(run.folder, ledger))) == {"evidence_file_added"}


def link_outside(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    outside = path.parents[1] / "outside"
    outside.write_bytes(content)
    outside.chmod(0o400)
    path.symlink_to(outside)


def second_name(path: Path) -> None:
    os.link(path, path.parents[1] / "other name")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("how", [link_outside, second_name, pipe])
def test_what_is_no_plain_file_is_found_and_not_waited_for(
    run: Evidence, ledger: Recorded, how: Callable[[Path], None]
) -> None:
    how(run.folder / "versions.json")
    assert set(codes(check_evidence(run.folder, ledger))) == {"evidence_file_kind"}


def test_a_folder_that_is_a_link_is_not_followed(run: Evidence, ledger: Recorded) -> None:
    (run.folder / "smoke").rename(run.folder.parent / "elsewhere")
    (run.folder / "smoke").symlink_to(run.folder.parent / "elsewhere")
    found = check_evidence(run.folder, ledger)
    assert set(codes(found)) == {"evidence_file_added", "evidence_file_kind"}
    other = run.folder.parent / "link"
    other.symlink_to(run.folder)
    assert codes(check_evidence(other, ledger)) == ["evidence_sums_malformed"]


def test_huge_files_are_not_read_to_their_end(run: Evidence, ledger: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MOST_BYTES", 1 << 20)
    (run.folder / "versions.json").chmod(0o600)
    os.truncate(run.folder / "versions.json", 1 << 40)
    found = check_evidence(run.folder, ledger)
    assert [p.code for p in found.problems if not p.is_warning] == ["evidence_file_kind"]
    assert "bytes" in found.problems[-1].text
    (run.folder / "SHA256SUMS").chmod(0o600)
    os.truncate(run.folder / "SHA256SUMS", 1 << 40)
    assert codes(check_evidence(run.folder, ledger)) == ["evidence_sums_malformed"]


def test_many_large_files_are_not_all_read(run: Evidence, ledger: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [path.stat().st_size for path in run.folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(verify, "MOST_BYTES", max(sizes) + 1)
    assert "evidence_file_kind" in codes(check_evidence(run.folder, ledger))


def resum(run: Evidence) -> None:
    """Makes SHA256SUMS fit whatever the files are now, as somebody would who has the disk."""
    lines = [line.split("  ")[1] for line in (run.folder / "SHA256SUMS").read_text().splitlines()]
    text = "".join(f"{sha256((run.folder / name).read_bytes()).hexdigest()}  {name}\n" for name in lines)
    (run.folder / "SHA256SUMS").chmod(0o600)
    (run.folder / "SHA256SUMS").write_text(text)
    (run.folder / "SHA256SUMS").chmod(0o400)


def rewrite(run: Evidence, name: str, text: str) -> None:
    (run.folder / name).chmod(0o600)
    (run.folder / name).write_text(text)
    (run.folder / name).chmod(0o400)


def test_changing_file_and_sums_together_is_found_by_the_ledger(run: Evidence, ledger: Recorded) -> None:
    rewrite(run, "smoke/01-rs2000.log", "all was well")
    resum(run)
    assert codes(check_evidence(run.folder, ledger)) == ["evidence_not_recorded", "evidence_ledger_json"]


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(str.upper, id="capitals"),
        pytest.param(lambda text: text + "\n", id="an empty line"),
        pytest.param(lambda text: text.rstrip("\n"), id="no end"),
        pytest.param(lambda text: "".join(reversed(text.splitlines(keepends=True))), id="another order"),
        pytest.param(lambda text: text + text.splitlines(keepends=True)[-1], id="a file twice"),
        pytest.param(lambda text: text + "0" * 64 + "  ../../etc/passwd\n", id="a file elsewhere"),
        pytest.param(lambda text: text + "0" * 64 + "  zz\x1b[2J\n", id="control characters"),
        pytest.param(lambda text: text + "ä\n", id="other letters"),
        pytest.param(lambda _: "", id="nothing"),
    ],
)
def test_sums_of_another_form_are_found(run: Evidence, ledger: Recorded, edit: Callable[[str], str]) -> None:
    rewrite(run, "SHA256SUMS", edit((run.folder / "SHA256SUMS").read_text()))
    verdict = check_evidence(run.folder, ledger)
    assert codes(verdict) == ["evidence_sums_malformed"]
    assert all(problem.text.isprintable() for problem in verdict.problems)


def test_a_run_that_was_never_sealed_is_told(tmp_path: Path, ledger: Recorded) -> None:
    open_run = Evidence.create(tmp_path / "evidence", "cutover", BEGAN)
    fill(open_run)
    assert codes(check_evidence(open_run.folder, ledger)) == ["evidence_not_sealed"]
    assert codes(check_evidence(tmp_path / "nowhere", ledger)) == ["evidence_not_sealed"]
    (tmp_path / "file").write_text("")
    assert codes(check_evidence(tmp_path / "file", ledger)) == ["evidence_unreadable"]


def edited_plan() -> dict[str, Any]:
    made = plan().as_json()
    made["inputs"]["ca"] = "SHA256:another"
    return made


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("plan.json", edited_plan(), "the plan file was edited"),
        ("plan.json", {"operation": "cutover"}, "the plan file is not a plan"),
        ("plan.json", {**plan().as_json(), "operation": "decommission"}, "a plan for another operation"),
        ("plan.json", plan("of something else").as_json(), "approves another plan"),
        ("approvals.json", [{"operation": "decommission", "plan": plan().digest}], "approves another plan"),
        ("approvals.json", [], "no approval of this cutover"),
        ("approvals.json", {"no": "list"}, "no approval of this cutover"),
    ],
)
def test_files_that_contradict_each_other_are_found(
    tmp_path: Path, ledger: Recorded, name: str, value: object, told: str
) -> None:
    run = Evidence.create(tmp_path / "evidence", "cutover", BEGAN)
    fill(run)
    run.write_json(name, value)
    run.seal("applied")
    ledger.keep(run)
    verdict = check_evidence(run.folder, ledger)
    assert not verdict.is_good
    assert told in "\n".join(problem.text for problem in verdict.problems)
    assert {problem.code for problem in verdict.problems} <= {"evidence_inconsistent", "evidence_incomplete"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"outcome": 1}', "[" * 100_000, '{"outcome": "applied"}'])
def test_an_outcome_that_says_nothing_is_found(run: Evidence, ledger: Recorded, text: str) -> None:
    rewrite(run, "outcome.json", text)
    resum(run)
    assert "evidence_inconsistent" in codes(check_evidence(run.folder, ledger))


def test_a_rollback_by_hand_needs_no_approval_and_no_plan(tmp_path: Path, ledger: Recorded) -> None:
    run = Evidence.create(tmp_path / "evidence", "rollback", BEGAN)
    run.write_json("versions.json", {"signer": "0.1.0"})
    run.seal("rolled_back", {"reason": "edge1 lacks the CA"})
    ledger.keep(run)
    assert check_evidence(run.folder, ledger).problems == ()


@pytest.mark.parametrize("field", ["operation", "outcome", "plan"])
def test_a_ledger_that_tells_something_else_is_found(tmp_path: Path, ledger: Recorded, field: str) -> None:
    run = sealed_run(tmp_path / "evidence")
    ledger.keep(run, **{field: "another"})
    verdict = check_evidence(run.folder, ledger)
    assert codes(verdict) == ["evidence_ledger_differs"]
    assert field in verdict.problems[0].text
    assert verdict.recorded is None


def test_a_ledger_that_cannot_be_asked_is_no_proof(run: Evidence) -> None:
    def away(_: str) -> None:
        raise Unavailable("service_down", "nothing listens there")

    verdict = check_evidence(run.folder, away)
    assert (codes(verdict), verdict.is_good) == (["evidence_ledger_unreachable"], False)


def test_the_copy_of_the_ledgers_answer_proves_nothing_and_may_not_mislead(run: Evidence, ledger: Recorded) -> None:
    answer = run.read_json("ledger.json")
    rewrite(run, "ledger.json", json.dumps({**answer, "seq": 9}))
    assert codes(check_evidence(run.folder, ledger)) == ["evidence_ledger_json"]
    (run.folder / "ledger.json").unlink()
    verdict = check_evidence(run.folder, ledger)
    assert (codes(verdict), verdict.is_good) == (["evidence_ledger_json"], True)
    assert not check_evidence(run.folder, lambda _: None).is_good


@pytest.mark.parametrize("place, mode", [("plan.json", 0o440), ("SHA256SUMS", 0o600), (".", 0o750)])
def test_loose_modes_are_warned_about(run: Evidence, ledger: Recorded, place: str, mode: int) -> None:
    (run.folder / place).chmod(mode)
    verdict = check_evidence(run.folder, ledger)
    assert (codes(verdict), verdict.is_good) == (["evidence_mode"], True)


def test_a_strange_owner_is_warned_about(run: Evidence, ledger: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(run.folder / "plan.json", 4711, -1)
    verdict = check_evidence(run.folder, ledger)
    assert (codes(verdict), verdict.is_good) == (["evidence_owner"], True)


def test_every_finding_is_documented() -> None:
    source = Path(verify.__file__).read_text()
    page = (ROOT / "runbooks/reference/evidence.md").read_text()
    told = re.findall(r"^\| `(evidence_\w+)` \| ", page, re.MULTILINE)
    assert sorted(told) == sorted(set(re.findall(r'Defect\(\s*"(evidence_\w+)"', source)))
