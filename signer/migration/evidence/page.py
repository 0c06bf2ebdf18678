"""evidence.html: a run's evidence as one page for people, on a screen and on paper. Pure.

It is made of the run's other files and contains nothing else. No scripts, nothing is loaded: a content security policy
in the page forbids both. All content of the files is escaped. The tables expect the JSON of `run.py`, `smoke.py` and
`parity.py`; a value of another form makes its section smaller and never fails the page.
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

from signer.migration.plan import StepOutcome
from signer.model import RunOutcome
from signer.units import timestamp

_TEMPLATES: Final = Path(__file__).with_name("templates")
_MOST_TEXT: Final = 20_000  # characters of one log that the page shows
_MOST_ROWS: Final = 400
_DEEPEST: Final = 8
_SENTENCES: Final[Mapping[tuple[str, str], str]] = {
    ("cutover", RunOutcome.APPLIED): "Certificates are signed by the local CA.",
    ("cutover", RunOutcome.ROLLED_BACK): "A step failed, and the platform was put back: Vault signs, as before.",
    ("cutover", RunOutcome.FAILED): "A step failed before anything was changed: Vault signs, as before.",
    ("cutover", RunOutcome.ROLLBACK_FAILED): (
        "A step failed, and so did putting the platform back. Somebody has to look at it."
    ),
    ("rollback", RunOutcome.ROLLED_BACK): "The platform was put back: Vault signs again.",
    ("rollback", RunOutcome.APPLIED): "The platform was put back: Vault signs again.",
    ("decommission", RunOutcome.APPLIED): "Vault is gone. Certificates are signed by the local CA.",
    ("decommission", RunOutcome.ROLLED_BACK): (
        "A step failed before the point of no return, and what was done was undone."
    ),
    ("decommission", RunOutcome.FAILED): "A step failed before anything was changed: Vault is as it was.",
    ("decommission", RunOutcome.STOPPED): (
        "A step failed after the point of no return. It stays as it is until it is resumed."
    ),
}
_CODE: Final = re.compile(r"(?:sha256:|SHA256:|/)\S+|\S{40,}")  # digests, paths, and what else has no place to break
_SEALING: Final = "seal"  # the step that makes this page
_WIDEST_CELL: Final = 240  # characters
_MOST_COLUMNS: Final = 7
_INLINE: Final = 60  # characters of a list that stands on one line
_OUTCOMES: Final = frozenset(RunOutcome)
_BLANK: Final[Mapping[str, Any]] = {"what": StepOutcome.DONE, "summary": "", "facts": {}, "seconds": None}
# Words that say how something went, by their mood; in a table only below such a heading.
_VERDICTS: Final = frozenset({"what", "outcome", "result", "status", "severity", "parity", "trusted"})
_MOODS: Final = {
    "good": frozenset({RunOutcome.APPLIED, StepOutcome.DONE, "ok", "same", "true"}),
    "fair": frozenset({RunOutcome.ROLLED_BACK, StepOutcome.UNDONE, "warn", "note"}),
    "bad": frozenset({RunOutcome.FAILED, RunOutcome.STOPPED, RunOutcome.ROLLBACK_FAILED, "fail", "error", "false"}),
}


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step with all that was observed of it; `share` is its time in percent of the longest step's."""

    number: str
    name: str
    title: str
    effect: str
    undo: str
    results: tuple[Mapping[str, Any], ...]
    share: float

    @property
    def last(self) -> str:
        """What became of it in the end; empty if it was not reached."""
        return str(self.results[-1]["what"]) if self.results else ""


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison with Vault: a line for each role, what differs, and the certificates that were made."""

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
    began, ended = _times(files.get("journal.jsonl", b""))
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
        "changes": list(_changes(mapping(plan.get("now")), mapping(plan.get("then")))),
        "approvals": [mapping(one) for one in sequence(read.get("approvals.json"))],
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
    return _template().render(page=page, style=_style(), style_hash=_style_hash())


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
    environment.filters["mood"] = _mood_class
    environment.tests["a_table"] = is_table
    environment.tests["code_like"] = lambda text: _CODE.fullmatch(text) is not None
    environment.tests["a_line"] = is_line
    environment.globals["sealing"] = _SEALING
    environment.globals["columns_of"] = columns
    environment.globals["most_rows"] = _MOST_ROWS
    environment.globals["deepest"] = _DEEPEST
    return environment.get_template("evidence.html")


@cache
def _style() -> str:
    return (_TEMPLATES / "evidence.css").read_text()


@cache
def _style_hash() -> str:
    """For the content security policy: this style and no other."""
    return "sha256-" + base64.b64encode(sha256(_style().encode()).digest()).decode()


# --- reading what others wrote ---------------------------------------------------------------------------------------


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number_of(value: object) -> float:
    """The value if it is a number of seconds that can be, else 0."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _times(journal: bytes) -> tuple[int | None, int | None]:
    """Milliseconds since 1970 of the journal's first and last line."""
    moments = [
        line["at"]
        for text in journal.splitlines()
        if isinstance(line := _parsed(text), dict) and isinstance(line.get("at"), int) and 0 <= line["at"] < 1 << 45
    ]
    return (moments[0], moments[-1]) if moments else (None, None)


def _moment(milliseconds: int | None) -> str:
    return "" if milliseconds is None else timestamp(milliseconds // 1000)


def _changes(now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What was, what was to be; names of both, in the plan's order."""
    for name in [*now, *(name for name in then if name not in now)]:
        yield name, now.get(name), then.get(name)


def _sections(plan: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name for links, heading and content of what is shown as it is."""
    parity = read.get("parity.json")
    for name, heading, value in (
        ("preflight", "Preflight on the host", read.get("preflight.json")),
        ("parity", "Vault and the local CA compared", None if parity_of(parity) else parity),
        ("inputs", "What the plan depended on", plan.get("inputs")),
        ("timings", "Timings", _timings(mapping(read.get("timings.json")))),
        ("versions", "Versions", read.get("versions.json")),
    ):
        if value:
            yield name, heading, value
    known = {"plan.json", "approvals.json", "preflight.json", "parity.json", "timings.json", "versions.json",
             "outcome.json", "ledger.json"}  # fmt: skip
    for file, value in sorted(read.items()):
        if file not in known and value and "/" not in file:
            yield re.sub(r"[^a-z]+", "-", file.lower()), _words(file.removesuffix(".json")).capitalize(), value


def _timings(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the table of steps does not tell already."""
    return {name: item for name, item in value.items() if name not in ("steps", "began_ms")}


def _logs(files: Mapping[str, bytes]) -> Iterator[tuple[str, str, int]]:
    """Name and text of each login's log, and how many characters of it are left out."""
    for name, content in sorted(files.items()):
        if name.startswith("smoke/"):
            text = content.decode(errors="replace")
            yield name, text[:_MOST_TEXT], max(0, len(text) - _MOST_TEXT)


# --- the tables ------------------------------------------------------------------------------------------------------


def step_rows(plan: Mapping[str, Any], outcome: Mapping[str, Any], read: Mapping[str, Any]) -> list[StepRow]:
    """The plan's steps with what was observed, then steps that were observed and stand in no plan."""
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
    """What was observed of each step, its undoing last, and the failure that ended the run at its step."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    files = [(name, mapping(value)) for name, value in sorted(read.items()) if name.startswith("steps/")]
    for name, value in sorted(files, key=lambda file: (file[0][:8], file[1].get("what") == StepOutcome.UNDONE)):
        if value:
            one = {**_BLANK, **value, "facts": _without_logs(value.get("facts"))}
            seen.setdefault(str(value.get("step", name)), []).append(one)
    error = mapping(outcome.get("error"))
    told = seen.setdefault(str(error["step"]), []) if error.get("step") else []
    if error and not any(one["what"] == StepOutcome.FAILED for one in told):
        failed = {**_BLANK, "what": StepOutcome.FAILED, "summary": str(error.get("text", ""))}
        told.insert(sum(one["what"] != StepOutcome.UNDONE for one in told), failed)
    return seen


def _without_logs(facts: object) -> Mapping[str, Any]:
    """Facts of targets as rows, a command as it would be typed. Logs of targets are files of their own."""
    found = dict(mapping(facts))
    targets = mapping(found.get("targets"))
    if targets:
        found["targets"] = [_target(str(name), mapping(fact)) for name, fact in targets.items()]
    command = sequence(found.get("command"))
    if command and all(isinstance(word, str) for word in command):
        found["command"] = shlex.join(command)
    return found


def _target(name: str, fact: Mapping[str, Any]) -> dict[str, Any]:
    """What one login showed, as a row; all of it is in the step's file."""
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
    """The report of `parity.py`; None for anything else, which is shown as it is."""
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
                row = rows.setdefault(key, {"severity": one.get("severity"), "in": where, **_told(one), "times": 0})
                row["times"] += 1
    yield from sorted(rows.values(), key=lambda row: row["severity"] != "error")


def _told(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "field": one.get("field"), "ours": one.get("ours"), "Vault's": one.get("vaults"), "why": one.get("why"),
    }  # fmt: skip


# --- for the template ------------------------------------------------------------------------------------------------


def mood_of(name: object, word: object) -> str:
    """good, fair or bad for a word below a heading that says how something went; empty for any other."""
    if name not in _VERDICTS or not isinstance(word, str | bool):
        return ""
    return next((mood for mood, words in _MOODS.items() if str(word).lower() in words), "")


def is_table(value: object) -> bool:
    """True for objects of the same few plain fields, which read best as rows."""
    if not isinstance(value, list) or not value or not all(isinstance(row, Mapping) and row for row in value):
        return False
    cells = [cell for row in value for cell in row.values()]
    plain = all(not isinstance(cell, Mapping | list) and len(str(cell)) <= _WIDEST_CELL for cell in cells)
    return plain and len(columns(value)) <= _MOST_COLUMNS


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every name in the rows that has a value in one of them, in order."""
    return list(dict.fromkeys(name for row in rows for name, cell in row.items() if cell not in ("", None)))


def is_line(value: object) -> bool:
    """True for a few short words, which need no list."""
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
    """`valid_before` as people write it; the name of a variable stays."""
    text = str(name)
    return text.replace("_", " ") if text.islower() else text


def _mood_class(word: object, name: object = "what") -> str:
    return f"is-{mood_of(name, word) or 'plain'}"
