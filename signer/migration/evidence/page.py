"""evidence.html: a run's evidence as one page for people, on a screen and on paper. Pure.

It contains only the run's other files. A content security policy forbids scripts and loading. All content of the files
is escaped. The tables expect the JSON of `run.py`, `smoke.py` and `parity.py`; a value of another form shortens its
section and never fails the page.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from signer.migration.evidence.after import Logins, after_of
from signer.migration.plan import StepOutcome
from signer.model import RunOutcome
from signer.units import timestamp

_TEMPLATES: Final = Path(__file__).with_name("templates")
_MOST_TEXT: Final = 20_000  # characters of one log that the page shows
_MOST_ROWS: Final = 400
_DEEPEST: Final = 8
_SENTENCES: Final[Mapping[tuple[str, str], str]] = {
    ("cutover", RunOutcome.APPLIED): "Certificates are signed by the local CA.",
    ("cutover", RunOutcome.ROLLED_BACK): "A step failed, and the platform was restored: Vault signs, as before.",
    ("cutover", RunOutcome.FAILED): "A step failed before anything was changed: Vault signs, as before.",
    ("cutover", RunOutcome.ROLLBACK_FAILED): (
        "A step failed, and restoring the platform failed, too. Check the platform."
    ),
    ("rollback", RunOutcome.ROLLED_BACK): "The platform was restored: Vault signs again.",
    ("rollback", RunOutcome.APPLIED): "The platform was restored: Vault signs again.",
    ("decommission", RunOutcome.APPLIED): "Vault is gone. Certificates are signed by the local CA.",
    ("decommission", RunOutcome.ROLLED_BACK): ("A step failed before the point of no return, and the run was undone."),
    ("decommission", RunOutcome.FAILED): "A step failed before anything was changed: Vault is as it was.",
    ("decommission", RunOutcome.STOPPED): (
        "A step failed after the point of no return. The run stops there until it is resumed."
    ),
}
_CODE: Final = re.compile(r"(?:sha256:|SHA256:|/)\S+|\S{40,}")  # digests, paths and other text without a place to break
_STEP_TIMES: Final = ("steps", "began_ms")
_SEALING: Final = "seal"  # the step that renders this page
_DIFFERENCE: Final = (("field", "field"), ("ours", "ours"), ("Vault's", "vaults"), ("why", "why"))  # title, name
_WIDEST_CELL: Final = 240  # characters
_MOST_COLUMNS: Final = 7
_INLINE: Final = 60  # characters of a list on one line
_OUTCOMES: Final = frozenset(RunOutcome)
_BLANK: Final[Mapping[str, Any]] = {"what": StepOutcome.DONE, "summary": "", "facts": {}, "seconds": None}
# Result words by mood; in a table only in a column with one of these headings.
_VERDICTS: Final = frozenset({"what", "outcome", "result", "status", "severity", "parity", "trusted"})
_MOODS: Final = {
    "good": frozenset({RunOutcome.APPLIED, StepOutcome.DONE, "ok", "same", "true"}),
    "fair": frozenset({RunOutcome.ROLLED_BACK, StepOutcome.UNDONE, "warn", "note"}),
    "bad": frozenset({RunOutcome.FAILED, RunOutcome.STOPPED, RunOutcome.ROLLBACK_FAILED, "fail", "error", "false"}),
}


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step with its observations; `share` is its time in percent of the longest step's."""

    number: str
    name: str
    title: str
    effect: str
    undo: str
    results: tuple[Mapping[str, Any], ...]
    share: float

    @property
    def last(self) -> str:
        """The last result; empty if the step was not reached."""
        return str(self.results[-1]["what"]) if self.results else ""


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison with Vault: a line for each role, the differences, and the certificates."""

    summary: str
    roles: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def render_page(run: str, files: Mapping[str, bytes]) -> str:
    """The page for a run of that name; `files` are its other files by name."""
    read = {name: _parsed(content) for name, content in files.items() if name.endswith(".json")}
    plan, outcome = mapping(read.get("plan.json")), mapping(read.get("outcome.json"))
    operation = str(outcome.get("operation") or plan.get("operation") or run.rsplit("-", 1)[-1])
    word = str(outcome.get("outcome", "not ended"))
    journal = _lines(files.get("journal.jsonl", b""))
    began, ended = _times(journal)
    approvals = [mapping(one) for one in sequence(read.get("approvals.json"))]
    page = {
        "run": run,
        "operation": operation,
        "title": str(plan.get("title") or f"{operation.capitalize()} {run}"),
        "outcome": word,
        "word": word.replace("_", " ").capitalize() if word in _OUTCOMES else word,
        "sentence": _SENTENCES.get((operation, word), ""),
        "mood": mood_of("outcome", word) or "bad",
        "error": outcome.get("error"),
        "reason": str(outcome.get("reason") or ""),
        "began": _moment(began),
        "ended": _moment(ended),
        "seconds": (ended - began) / 1000 if began is not None and ended is not None else None,
        "plan": plan,
        "digest": str(plan.get("digest") or outcome.get("plan") or ""),
        "after": after_of(plan, word, _before(read), mapping(read.get("observed.json")), _logins(read)),
        "is_applied": word == RunOutcome.APPLIED,
        "pause": _pause(read, journal),
        "approved_by": _names(approvals),
        "given_by": _names(journal),
        "approvals": approvals,
        "steps": step_rows(plan, outcome, read),
        "parity": parity_of(read.get("parity.json")),
        "sections": list(_sections(plan, read)),
        "logs": list(_logs(files)),
        "removed": int(str(outcome.get("removed", 0)) if str(outcome.get("removed", 0)).isdecimal() else 0),
        "sums": [
            (name, len(content), sha256(content).hexdigest())
            for name, content in sorted(files.items())
            if name not in ("evidence.html", "SHA256SUMS", "ledger.json")
        ],
    }
    style, style_hash = _style()
    return _template().render(page=page, style=style, style_hash=style_hash)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = _seconds
    environment.filters["words"] = _words
    environment.filters["mood"] = lambda word, name="what": f"is-{mood_of(name, word) or 'plain'}"
    environment.tests["a_table"] = is_table
    environment.tests["code_like"] = lambda text: _CODE.fullmatch(text) is not None
    environment.tests["a_line"] = is_line
    environment.globals["sealing"] = _SEALING
    environment.globals["columns_of"] = columns
    environment.globals["most_rows"] = _MOST_ROWS
    environment.globals["deepest"] = _DEEPEST
    return environment.get_template("evidence.html")


@cache
def _style() -> tuple[str, str]:
    """The style, and its hash for the content security policy: this style and no other."""
    style = (_TEMPLATES / "evidence.css").read_text()
    return style, "sha256-" + base64.b64encode(sha256(style.encode()).digest()).decode()


# --- reading the run's files -----------------------------------------------------------------------------------------


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number_of(value: object) -> float:
    """The value if it is a valid number of seconds, else 0."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _lines(journal: bytes) -> list[Mapping[str, Any]]:
    """The journal's lines that are objects."""
    return [mapping(line) for text in journal.splitlines() if isinstance(line := _parsed(text), dict)]


def _times(journal: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """Milliseconds since 1970 of the journal's first and last line."""
    moments = [line["at"] for line in journal if isinstance(line.get("at"), int) and 0 <= line["at"] < 1 << 45]
    return (moments[0], moments[-1]) if moments else (None, None)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is named in the rows, each once."""
    return list(dict.fromkeys(str(row["who"]) for row in rows if row.get("who")))


def _moment(milliseconds: int | None) -> str:
    return "" if milliseconds is None else timestamp(milliseconds // 1000)


def _steps_kept(read: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The files of the steps in the order in which they ended: those that undid something last."""
    kept = [(name, mapping(value)) for name, value in sorted(read.items()) if name.startswith("steps/")]
    return [value for _, value in sorted(kept, key=lambda file: file[1].get("what") == StepOutcome.UNDONE) if value]


def _before(read: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was in force before the first change, as the step that records it saw it."""
    for step in _steps_kept(read):
        facts = mapping(step.get("facts"))
        if step.get("step") == "remember":
            return facts
        if "service" in facts:  # of a decommission's inventory
            return mapping(facts["service"])
    return {}


def _logins(read: Mapping[str, Any]) -> Logins | None:
    """The certificates of the last step that logged in; None if none did."""
    for step in reversed(_steps_kept(read)):
        targets = mapping(mapping(step.get("facts")).get("targets"))
        found = [mapping(one) for one in targets.values() if mapping(one).get("backend")]
        if found:
            signed_by = dict.fromkeys(str(one.get("ca")) for one in found)
            principals = dict.fromkeys(str(name) for one in found for name in sequence(one.get("principals")))
            return Logins(tuple(signed_by), tuple(principals))
    return None


def _pause(read: Mapping[str, Any], journal: Sequence[Mapping[str, Any]]) -> str:
    """How long clients had no service, of the step that waited for it, and of the way back if the run went back."""
    found = []
    for step in _steps_kept(read):
        facts = mapping(step.get("facts"))
        if "pause_seconds" in facts:
            on_the_way_back = step.get("what") == StepOutcome.UNDONE
            seconds = _seconds(facts["pause_seconds"]) or "not measured"
            found.append(f"{seconds} on the way back" if on_the_way_back else seconds)
    if found:
        return ", then ".join(found)
    replaced = any((line.get("event"), line.get("step")) == ("step.began", "up") for line in journal)
    return "not measured" if replaced else "none: the service was not replaced"


def _sections(plan: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Link name, heading and content of the generic sections."""
    parity = read.get("parity.json")
    # What the table of steps does not show.
    timings = {name: value for name, value in mapping(read.get("timings.json")).items() if name not in _STEP_TIMES}
    for name, heading, value in (
        ("preflight", "Preflight on the host", read.get("preflight.json")),
        ("parity", "Vault and the local CA compared", None if parity_of(parity) else parity),
        ("inputs", "What the plan depended on", plan.get("inputs")),
        ("timings", "Timings", timings),
        ("versions", "Versions", read.get("versions.json")),
    ):
        if value:
            yield name, heading, value
    known = {"plan.json", "approvals.json", "preflight.json", "parity.json", "timings.json", "versions.json",
             "outcome.json", "ledger.json", "observed.json"}  # fmt: skip
    for file, value in sorted(read.items()):
        if file not in known and value and "/" not in file:
            yield re.sub(r"[^a-z]+", "-", file.lower()), _words(file.removesuffix(".json")).capitalize(), value


def _logs(files: Mapping[str, bytes]) -> Iterator[tuple[str, str, int]]:
    """Name and text of each login's log, and the number of omitted characters."""
    for name, content in sorted(files.items()):
        if name.startswith("smoke/"):
            text = content.decode(errors="replace")
            yield name, text[:_MOST_TEXT], max(0, len(text) - _MOST_TEXT)


# --- the tables ------------------------------------------------------------------------------------------------------


def step_rows(plan: Mapping[str, Any], outcome: Mapping[str, Any], read: Mapping[str, Any]) -> list[StepRow]:
    """The plan's steps with their observations, then observed steps that are not in the plan."""
    seen = _observations(outcome, read)
    planned = [mapping(step) for step in sequence(plan.get("steps"))]
    names = {str(step.get("name", "")) for step in planned}
    rows = [(step, seen.get(str(step.get("name", "")), [])) for step in planned]
    rows += [(found[0], found) for name, found in seen.items() if name not in names]
    spent = [sum(number_of(one["seconds"]) for one in results) for _, results in rows]
    longest = max(spent, default=0.0) or 1.0
    return [
        StepRow(
            number=str(step.get("number", place)),
            name=str(step.get("name", "")),
            title=str(step.get("title") or step.get("step") or step.get("name") or "step"),
            effect=str(step.get("effect", "")),
            undo=str(step.get("undo", "")),
            results=tuple(results),
            share=round(seconds / longest * 100, 1),
        )
        for place, ((step, results), seconds) in enumerate(zip(rows, spent, strict=True), 1)
    ]


def _observations(outcome: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The observations of each step, its undo last, with the failure that ended the run."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    files = [(name, mapping(value)) for name, value in sorted(read.items()) if name.startswith("steps/")]
    for name, value in sorted(files, key=lambda file: (file[0][:8], file[1].get("what") == StepOutcome.UNDONE)):
        if value:
            one = {**_BLANK, **value, "facts": _without_logs(value.get("facts"))}
            seen.setdefault(str(value.get("step", name)), []).append(one)
    error = mapping(outcome.get("error"))
    results = seen.setdefault(str(error["step"]), []) if error.get("step") else []
    if error and not any(one["what"] == StepOutcome.FAILED for one in results):
        failed = {**_BLANK, "what": StepOutcome.FAILED, "summary": str(error.get("text", ""))}
        results.insert(sum(one["what"] != StepOutcome.UNDONE for one in results), failed)
    return seen


def _without_logs(facts: object) -> Mapping[str, Any]:
    """The facts with targets as rows and a command as one line; logs of targets are separate files."""
    found = dict(mapping(facts))
    targets = mapping(found.get("targets"))
    if targets:
        found["targets"] = [_target(str(name), mapping(fact)) for name, fact in targets.items()]
    command = sequence(found.get("command"))
    if command and all(isinstance(word, str) for word in command):
        found["command"] = shlex.join(command)
    return found


def _target(name: str, fact: Mapping[str, Any]) -> dict[str, Any]:
    """The main facts of a login, as a row; the step's file has all of them."""
    row: dict[str, Any] = {"target": f"{name} ({fact['login']})" if "login" in fact else name}
    if "status" in fact:
        row["status"] = "ok" if fact["status"] == 0 else "failed"
    row["trusted"] = fact.get("trusted")
    row["read in"] = fact.get("file")
    row["principals"] = ", ".join(map(str, sequence(fact.get("principals"))))
    row["serial"] = fact.get("serial")
    row["signed by"] = fact.get("ca")
    row["ledger"] = f"event {mapping(fact['recorded']).get('seq', '?')}" if "recorded" in fact else None
    row["seconds"] = fact.get("seconds")
    return {key: value for key, value in row.items() if value not in (None, "")}


def parity_of(value: object) -> Parity | None:
    """The report of `parity.py`; None for anything else, which becomes a generic section."""
    report = mapping(value)
    roles = [mapping(role) for role in sequence(report.get("roles"))]
    if not roles or not all("samples" in role and "differences" in role for role in roles):
        return None
    samples = [(role, mapping(one)) for role in roles for one in sequence(role["samples"])]
    return Parity(
        summary=str(report.get("summary", "")),
        roles=[_role(role) for role in roles],
        differences=list(_differences(roles)),
        samples=[
            {
                "role": role.get("role"),
                "request": one.get("name"),
                "key type": one.get("key_type"),
                "outcome": one.get("outcome"),
                "differences": len(sequence(one.get("differences"))),
            }
            for role, one in samples
        ],
    )


def _role(role: Mapping[str, Any]) -> dict[str, Any]:
    row = {"role": role.get("role"), "principals": role.get("principals"), "parity": role.get("parity")}
    return {**row, "samples left out": role["left_out"]} if role.get("left_out") else row


def _differences(roles: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each difference once, errors first, with the number of samples that showed it."""
    rows: dict[str, dict[str, Any]] = {}
    for role in roles:
        for place in (role, *map(mapping, sequence(role.get("samples")))):
            for one in map(mapping, sequence(place.get("differences"))):
                where = "role" if place is role else "certificates"
                key = repr((role.get("role"), where, one.get("field"), one.get("severity"), one.get("why")))
                row = rows.setdefault(
                    key,
                    {
                        "severity": one.get("severity"),
                        "in": where,
                        **{title: one.get(name) for title, name in _DIFFERENCE},
                        "times": 0,
                    },
                )
                row["times"] += 1
    yield from sorted(rows.values(), key=lambda row: row["severity"] != "error")


# --- for the template ------------------------------------------------------------------------------------------------


def mood_of(name: object, word: object) -> str:
    """good, fair or bad for a result word below a result heading; empty for any other."""
    if name not in _VERDICTS or not isinstance(word, str | bool):
        return ""
    return next((mood for mood, words in _MOODS.items() if str(word).lower() in words), "")


def is_table(value: object) -> bool:
    """True for a list of objects with few plain fields, which is shown as rows."""
    if not isinstance(value, list) or not value or not all(isinstance(row, Mapping) and row for row in value):
        return False
    cells = [cell for row in value for cell in row.values()]
    plain = all(not isinstance(cell, Mapping | list) and len(str(cell)) <= _WIDEST_CELL for cell in cells)
    return plain and len(columns(value)) <= _MOST_COLUMNS


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every name in the rows that has a value in one of them, in order."""
    return list(dict.fromkeys(name for row in rows for name, cell in row.items() if cell not in ("", None)))


def is_line(value: object) -> bool:
    """True for a few short words, which fit on one line."""
    plain = isinstance(value, list) and all(isinstance(item, str | int) and "\n" not in str(item) for item in value)
    return plain and len(", ".join(map(str, value))) <= _INLINE  # type: ignore[call-overload]


def _seconds(value: object) -> str:
    """`0.6 s`, `2 min 5 s`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return ""
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(min(value, 1e9)), 60)
    return f"{minutes} min {seconds} s"


def _words(name: object) -> str:
    """`valid_before` as `valid before`; names with capitals are unchanged."""
    text = str(name)
    return text.replace("_", " ") if text.islower() else text
