"""What the verbs that make and apply plans share: the plan file, the approval phrase, and the record of a refusal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Final

from signer.api_client import ApiClient
from signer.cli import output
from signer.cli.runs import show_plan
from signer.errors import ApprovalRefused, BadFile, SignerError, write_hint
from signer.files import read_owned, write_atomically
from signer.migration.approval import Approval, ask_approval, current_operator
from signer.migration.config import CutoverFile
from signer.migration.journal import note_attempt
from signer.migration.plan import Operation, Plan, read_plan
from signer.units import plain, timestamp

MAX_PLAN: Final = 4 * 1024 * 1024  # bytes


def present_plan(
    plan: Plan,
    *,
    facts: Sequence[tuple[str, str]],
    config: Path,
    out: Path | None,
    commands: bool,
    as_json: bool,
    remarks: Sequence[str] = (),
) -> None:
    """Writes the plan file if `out` is given, and shows the plan, `remarks`, and the command that applies it."""
    if out is not None:
        write_plan(out, plan)
    if as_json:
        output.show_json(plan.as_json())
        return
    show_plan(plan, facts=facts, commands=commands)
    for line in remarks:
        output.show(line)
    output.show("Nothing has been changed. To apply exactly this:")
    name = plain(out or "plan.json")
    if out is None:
        output.show_command(f"  signer {plan.operation} plan --config {plain(config)} --out {name}")
    output.show_command(f"  signer {plan.operation} apply {name} --approve <phrase of the runbook, section 4>")


def write_plan(path: Path, plan: Plan) -> None:
    """Writes the plan file, 0600, completely or not at all; raises `BadFile`. Follows no symbolic link."""
    content = json.dumps(plan.as_json(), indent=2).encode() + b"\n"
    try:
        write_atomically(path, content, 0o600, is_shared=True)
    except OSError as error:
        text = f"the plan file cannot be written: {error.strerror}"
        raise BadFile(
            "plan_unwritable", text, f"{write_hint(error, str(path.parent))}, or choose another file"
        ) from None


def load_plan(path: Path, operation: Operation) -> tuple[Plan, Path]:
    """The plan of a plan file and the path of its configuration; raises `BadFile`."""
    try:
        raw = read_owned(path, MAX_PLAN, "the plan file")
    except OSError as error:
        raise BadFile(
            "plan_unreadable",
            f"the plan file cannot be read: {error.strerror}",
            f"signer {operation} plan --config FILE --out PLAN",
        ) from None
    plan = read_plan(raw.decode(errors="replace") if len(raw) <= MAX_PLAN else "", operation)
    config = plan.inputs.get("config")
    where = config.get("path") if isinstance(config, dict) else None
    if not isinstance(where, str) or not where.startswith("/"):
        raise BadFile(
            "plan_unreadable", "the plan file is not a plan", f"make one: signer {operation} plan --config FILE"
        )
    return plan, Path(where)


def check_approval(plan: Plan, given: str | None, file: CutoverFile, recorder: ApiClient) -> Approval:
    """The approval of this plan; raises `ApprovalRefused`.

    A refusal is recorded beside the journals and in the ledger, without the text that was typed; if it cannot be
    recorded, that is a warning.
    """
    is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    try:
        return ask_approval(plan, given, (lambda: _ask(plan)) if is_terminal else None, int(time.time()))
    except ApprovalRefused as refused:
        facts = {"code": refused.code, "operation": plan.operation, "plan": plan.digest, "who": current_operator()}
        try:
            note_attempt(file.evidence_dir, {"at": timestamp(int(time.time())), **facts})
        except SignerError as error:
            output.warn(f"this attempt is not recorded: {error.text}")
        try:
            recorder.record(plan.operation, "approval_refused", plan.digest, "", refused.code)
        except SignerError as error:
            output.warn(f"this attempt is not recorded in the ledger: {error.text}")
        raise


def _ask(plan: Plan) -> str:
    facts = [
        (word, ", ".join(f"{name} {value}" for name, value in state.items() if value and isinstance(value, str)))
        for word, state in (("now", plan.now), ("then", plan.then))
    ]
    with redirect_stdout(sys.stderr):  # it is part of the question; stdout is for the result
        show_plan(plan, facts=[*facts, ("plan", plan.digest)], commands=False)
    output.note(f"to approve {plan.digest}, type the phrase of the runbook")
    return sys.stdin.readline().strip()
