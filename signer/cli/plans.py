"""What the verbs share that apply plans: the plan file, the phrase, and the record of an attempt without it."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Final

from signer.api_client import ApiClient
from signer.cli import output, runs
from signer.errors import ApprovalRefused, BadFile, SignerError
from signer.files import read_owned, write_atomically
from signer.migration.approval import Approval, ask_approval, whoever
from signer.migration.config import CutoverFile
from signer.migration.journal import note_attempt
from signer.migration.plan import Operation, Plan, read_plan
from signer.units import timestamp

MAX_PLAN: Final = 4 * 1024 * 1024  # bytes


def write_plan(path: Path, plan: Plan) -> None:
    """The plan file, 0600, whole or not at all; raises `BadFile`. No link that somebody laid in its way is followed."""
    content = json.dumps(plan.as_json(), indent=2).encode() + b"\n"
    try:
        write_atomically(path, content, 0o600, temporary=f".{path.name}.{os.getpid()}.new")
    except OSError as error:
        text = f"the plan file cannot be written: {error.strerror}"
        raise BadFile("plan_unwritable", text, "choose another") from None


def load_plan(path: Path, operation: Operation) -> tuple[Plan, Path]:
    """A plan file of ours, and the configuration it was made of; raises `BadFile`."""
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
        raise BadFile("plan_unreadable", "the plan file is no plan", f"make one: signer {operation} plan --config FILE")
    return plan, Path(where)


def approve(plan: Plan, given: str | None, file: CutoverFile, recorder: ApiClient) -> Approval:
    """The approval of this plan; a refused one is kept beside the journals and in the ledger, never what was typed.

    Where it cannot be kept it is refused all the same. Raises `ApprovalRefused`.
    """
    is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))
    try:
        return ask_approval(plan, given, (lambda: _ask(plan)) if is_terminal else None, int(time.time()))
    except ApprovalRefused as refused:
        facts = {"code": refused.code, "operation": plan.operation, "plan": plan.digest, "who": whoever()}
        try:
            note_attempt(file.evidence_dir, {"at": timestamp(int(time.time())), **facts})
        except SignerError as error:
            output.warn(f"this attempt is not kept: {error.text}")
        try:
            recorder.record(plan.operation, "approval_refused", plan.digest, "", refused.code)
        except SignerError as error:
            output.warn(f"the ledger does not hold this attempt: {error.text}")
        raise


def _ask(plan: Plan) -> str:
    facts = [
        (word, ", ".join(f"{name} {value}" for name, value in state.items() if value and isinstance(value, str)))
        for word, state in (("now", plan.now), ("then", plan.then))
    ]
    with redirect_stdout(sys.stderr):  # it is part of the question, which a person must see; stdout has the result
        runs.show_plan(plan, facts=[*facts, ("plan", plan.digest)], commands=False)
    output.say(f"to approve {plan.digest}, type the phrase of the runbook")
    return sys.stdin.readline().strip()
