"""The evidence of a run: written whole or not at all, without a secret, sealed under one digest, also after a crash."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from signer import files
from signer.errors import NotFound, SignerError
from signer.migration.evidence import store as evidence_module
from signer.migration.evidence.files import found_in, numbered
from signer.migration.evidence.redact import Guard
from signer.migration.evidence.store import Evidence, operation_of
from tests.parts.evidence import BEGAN, fill, sealed_run
from tests.parts.marked_secrets import SECRETS


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "evidence"


@pytest.fixture
def run(parent: Path) -> Evidence:
    return Evidence.create(parent, "cutover", BEGAN)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# --- the directory ---------------------------------------------------------------------------------------------------


def test_a_run_is_named_for_its_time_and_operation(run: Evidence, parent: Path) -> None:
    assert run.folder == parent / "2026-11-22T14-05-02Z-cutover"
    assert operation_of(run.run) == "cutover"
    assert (mode_of(parent), mode_of(run.folder)) == (0o700, 0o700)


def test_two_runs_of_one_second_have_two_directories(run: Evidence, parent: Path) -> None:
    other = Evidence.create(parent, "cutover", BEGAN + 0.9)
    assert other.run == "2026-11-22T14-05-02Z-2-cutover"
    assert operation_of(other.run) == "cutover"


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_where_others_may_write_is_refused(parent: Path, mode: int) -> None:
    parent.mkdir()
    parent.chmod(mode)
    with pytest.raises(SignerError) as refused:
        Evidence.create(parent, "cutover", BEGAN)
    assert refused.value.code == "evidence_dir_not_private"


def test_a_run_can_be_taken_up_again(run: Evidence) -> None:
    run.write_json("versions.json", {"signer": "1"})
    assert Evidence.open(run.folder).read_json("versions.json") == {"signer": "1"}


@pytest.mark.parametrize("name", ["2026-11-22T14-05-02Z-rollback", "journal", ".."])
def test_what_is_no_run_is_not_opened(run: Evidence, parent: Path, name: str) -> None:
    with pytest.raises(NotFound):
        Evidence.open(parent / name)


@pytest.mark.parametrize("name", ["../x.json", "/x.json", "a/b/c.json", ".x", "", "x\ny", "steps/", "ä.json"])
def test_a_file_of_evidence_cannot_be_named_anyhow(run: Evidence, name: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        run.write_json(name, {})


def test_any_target_has_a_file_name() -> None:
    assert numbered("smoke", 3, "../rs 2000\x1b[0m", "log") == "smoke/03-rs-2000-0m.log"
    assert numbered("smoke", 3, "…", "log") == "smoke/03-unnamed.log"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_files_are_private_and_whole_json(run: Evidence) -> None:
    run.write_json("steps/01-x.json", {"a": float("nan"), "b": {1: "ü\ud800"}})
    path = run.folder / "steps" / "01-x.json"
    assert mode_of(path) == 0o600
    assert json.loads(path.read_text())["b"] == {"1": "ü\ud800"}
    assert mode_of(path.parent) == 0o700


def test_text_that_could_steer_a_terminal_is_shown_as_an_escape(run: Evidence) -> None:
    run.write_text("smoke/01-x.log", "a\x1b[31mred\r\n\tb\u202e\ud800\n")
    assert (run.folder / "smoke/01-x.log").read_text() == "a\\x1b[31mred\\r\n\tb\\u202e\\ud800\n"


def test_a_file_and_its_directory_are_brought_to_the_disk(run: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    run.write_json("versions.json", {})
    assert synced == [".versions.json.new", run.run]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_leaves_the_old_file_or_none(run: Evidence, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    run.write_text("smoke/01-x.log", "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        if call == "write":
            patched.setattr(files, "write_new", half_filled)
        elif call == "fsync":
            patched.setattr(os, "fsync", full)
        else:
            patched.setattr(Path, "rename", full)
        for name in ("smoke/01-x.log", "smoke/02-y.log"):
            with pytest.raises(SignerError) as failed:
                run.write_text(name, "new")
            assert failed.value.code == "evidence_unwritable"
            assert "No space left" in failed.value.text
    assert found_in(run.folder) == ["smoke/01-x.log"]
    assert (run.folder / "smoke/01-x.log").read_text() == "old"


def half_filled(path: Path, content: bytes, _mode: int, **_named: object) -> None:
    path.write_bytes(content[: len(content) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_crash_left_half_written_is_gone_with_the_seal(run: Evidence) -> None:
    fill(run)
    (run.folder / "steps" / ".09-x.json.new").write_text("{")
    run.seal("applied")
    assert ".09-x.json.new" not in "".join(found_in(run.folder))


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_reaches_any_file(parent: Path) -> None:
    guard = Guard()
    guard.never("an-unseal-key-MARKER-of-nobody")
    run = Evidence.create(parent, "cutover", BEGAN, guard)
    fill(run)
    secrets = [*SECRETS.values(), "an-unseal-key-MARKER-of-nobody"]
    for number, secret in enumerate(secrets, 1):
        run.write_text(numbered("smoke", number + 10, "x", "log"), f"said: {secret}\n")
        run.write_json(numbered("steps", number + 10, "x", "json"), {"summary": secret, "facts": {"out": [secret]}})
        run.write_json("versions.json", {secret: secret})
    run.write_text("journal.jsonl", "".join(json.dumps({"at": 1, "error": secret}) + "\n" for secret in secrets))
    run.seal("failed", {"error": {"text": f"it said {secrets[-1]}", "also": secrets}})
    run.keep_ledger_answer({"reason": secrets[0]})
    content = everything(run.folder)
    assert b"MARKER" not in content.upper()
    for secret in secrets:
        assert secret.encode() not in content
        assert secret.split("\n")[-1].encode() not in content.replace(b"-----END", b"")


def test_how_often_something_was_taken_out_is_told(run: Evidence) -> None:
    fill(run)
    run.write_text("smoke/09-x.log", "hvs.CAESIJmarkerMARKERmarker and hvs.CAESIJmarkerMARKERmarkes")
    run.seal("failed", {"error": {"text": "s.MARKERmarkerMARKERmarker"}})
    assert run.read_json("outcome.json")["removed"] == 3


def test_lines_of_a_journal_stay_json(run: Evidence) -> None:
    run.write_text("journal.jsonl", '{"authorization": null, "at": 1}\n{"token": "hvs.CAESIJmarkerMARKER"}\nhalf')
    lines = (run.folder / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[:2]] == [{"authorization": None, "at": 1}, {"token": "[removed]"}]
    assert lines[2] == "half"


# --- the seal --------------------------------------------------------------------------------------------------------


def test_sha256sum_agrees_with_the_seal(parent: Path) -> None:
    run = sealed_run(parent)
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=run.folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    names = [line.split("  ")[1] for line in (run.folder / "SHA256SUMS").read_text().splitlines()]
    assert names == sorted(set(found_in(run.folder)) - {"SHA256SUMS"})
    digest = subprocess.run(["sha256sum", run.folder / "SHA256SUMS"], capture_output=True, text=True).stdout
    assert run.digest == f"sha256:{digest.split()[0]}"


def test_what_is_sealed_is_read_only_and_names_run_outcome_and_plan(parent: Path) -> None:
    run = sealed_run(parent, "rolled_back")
    assert {mode_of(run.folder / name) for name in found_in(run.folder)} == {0o400}
    plan = run.read_json("plan.json")
    assert run.read_json("outcome.json") == {
        "run": run.run, "operation": "cutover", "outcome": "rolled_back", "plan": plan["digest"], "removed": 0,
    }  # fmt: skip


def test_sealing_again_changes_nothing(parent: Path) -> None:
    run = sealed_run(parent)
    before = everything(run.folder)
    assert Evidence.open(run.folder).seal("applied", {"reason": "another process, other facts"}) == run.digest
    assert everything(run.folder) == before


def test_a_seal_that_was_cut_off_is_done_again(run: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(run)
    write = Evidence._write

    def cut_off(self: Evidence, name: str, content: bytes, mode: int) -> None:
        if name == "SHA256SUMS":
            raise KeyboardInterrupt
        write(self, name, content, mode)

    with monkeypatch.context() as patched:
        patched.setattr(Evidence, "_write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run.seal("applied")
    assert run.digest == ""
    again = Evidence.open(run.folder)
    assert again.seal("rolled_back") == again.digest != ""
    assert again.read_json("outcome.json")["outcome"] == "rolled_back"
    assert not (run.folder / "superseded").exists()


def test_an_outcome_that_changes_before_it_is_recorded_keeps_the_earlier_seal(parent: Path) -> None:
    run = sealed_run(parent)
    first, sums = run.digest, (run.folder / "SHA256SUMS").read_bytes()
    second = run.seal("rolled_back", {"error": {"code": "x", "text": "the ledger was away"}})
    assert second == run.digest != first
    assert (run.folder / "superseded/01-SHA256SUMS").read_bytes() == sums
    assert run.read_json("superseded/01-outcome.json")["outcome"] == "applied"
    assert "superseded/01-SHA256SUMS" in (run.folder / "SHA256SUMS").read_text()


def test_a_file_that_comes_after_the_seal_opens_it_visibly(parent: Path) -> None:
    run = sealed_run(parent)
    first = (run.folder / "SHA256SUMS").read_bytes()
    run.write_json("steps/05-up-undone.json", {"step": "up", "what": "undone"})
    assert run.digest == ""
    assert (run.folder / "superseded/01-SHA256SUMS").read_bytes() == first
    run.seal("rolled_back")
    assert "steps/05-up-undone.json" in (run.folder / "SHA256SUMS").read_text()


def test_writing_the_same_again_leaves_the_seal(parent: Path) -> None:
    run = sealed_run(parent)
    before = run.digest
    run.write_json("plan.json", run.read_json("plan.json"))
    assert run.digest == before != ""


def test_nothing_is_added_to_what_the_ledger_holds(parent: Path) -> None:
    run = sealed_run(parent)
    was_recorded = run.is_recorded
    run.keep_ledger_answer({"seq": 9, "evidence": run.digest})
    assert (was_recorded, run.is_recorded) == (False, True)
    before = everything(run.folder)
    for act in (lambda: run.write_json("steps/09-x.json", {}), lambda: run.seal("rolled_back")):
        with pytest.raises(SignerError) as refused:
            act()
        assert refused.value.code == "evidence_recorded"
    assert run.seal("applied") == run.digest
    assert everything(run.folder) == before


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_sealed(run: Evidence, kind: str) -> None:
    fill(run)
    place = run.folder / "steps" / "strange"
    if kind == "link":
        place.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(SignerError) as refused:
        run.seal("applied")
    assert refused.value.code == "evidence_damaged"
    assert run.digest == ""


def test_a_page_that_cannot_be_made_does_not_keep_a_run_from_its_end(
    run: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise KeyError("s.MARKERmarkerMARKERmarker")

    fill(run)
    monkeypatch.setattr(evidence_module, "render_page", broken)
    assert run.seal("applied") == run.digest != ""
    assert "No page could be made: KeyError" in (run.folder / "evidence.html").read_text()
    assert b"MARKER" not in everything(run.folder)


# --- room for the end ------------------------------------------------------------------------------------------------


def test_room_is_taken_at_the_start_and_given_back_by_the_seal(run: Evidence) -> None:
    run.reserve_space(1 << 20)
    (reserved,) = [path for path in run.folder.iterdir() if path.name.startswith(".")]
    assert reserved.stat().st_blocks * 512 >= 1 << 20
    fill(run)
    run.seal("applied")
    assert not reserved.exists()
    run.release_space()


def test_room_that_is_not_there_is_told_before_anything_is_done(run: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SignerError) as failed:
        run.reserve_space()
    assert failed.value.code == "evidence_unwritable"
    assert list(run.folder.iterdir()) == []


def test_a_damaged_file_is_told_when_it_is_read_back(run: Evidence) -> None:
    (run.folder / "approvals.json").write_text("[{")
    with pytest.raises(SignerError) as refused:
        run.read_json("approvals.json")
    assert refused.value.code == "evidence_damaged"
    assert run.read_json("parity.json") is None
