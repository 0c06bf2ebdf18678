"""evidence.html: a run's evidence as one page that a person can read, on a screen and on paper. Pure.

It is made of the run's other files and says nothing that is not in them. No scripts, nothing loaded from anywhere: a
content security policy in the page forbids both. Whatever is in the files is escaped; a file of another form than
ours makes its section smaller, never the page fail.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from signer.migration.evidence.tables import (
    Parity,
    StepRow,
    columns,
    is_line,
    is_table,
    mapping,
    mood_of,
    parity_of,
    sequence,
    step_rows,
)
from signer.units import timestamp

_TEMPLATES: Final = Path(__file__).with_name("templates")
_MOST_TEXT: Final = 20_000  # characters of one log that the page shows
_MOST_ROWS: Final = 400
_DEEPEST: Final = 8
_SENTENCES: Final[Mapping[tuple[str, str], str]] = {
    ("cutover", "applied"): "Certificates are signed by the local CA.",
    ("cutover", "rolled_back"): "A step failed, and the platform was put back: Vault signs, as before.",
    ("cutover", "failed"): "A step failed before anything was changed: Vault signs, as before.",
    ("cutover", "rollback_failed"): "A step failed, and so did putting the platform back. Somebody has to look at it.",
    ("rollback", "rolled_back"): "The platform was put back: Vault signs again.",
    ("rollback", "applied"): "The platform was put back: Vault signs again.",
    ("decommission", "applied"): "Vault is gone. Certificates are signed by the local CA.",
    ("decommission", "rolled_back"): "A step failed before the point of no return, and what was done was undone.",
    ("decommission", "failed"): "A step failed before anything was changed: Vault is as it was.",
    (
        "decommission",
        "stopped",
    ): "A step failed after the point of no return. It stays as it is until it is taken up again.",
}
_CODE: Final = re.compile(r"(?:sha256:|SHA256:|/)\S+|\S{40,}")  # digests, paths, and what else has no place to break
_SEALING: Final = "seal"  # the step that makes this page
_WORDS: Final = {
    "applied": "Applied",
    "rolled_back": "Rolled back",
    "failed": "Failed",
    "stopped": "Stopped",
    "rollback_failed": "Rollback failed",
}


@dataclass(frozen=True, slots=True)
class _Page:
    """All that the template is given."""

    run: str
    operation: str
    title: str
    outcome: str
    word: str
    sentence: str
    mood: str
    error: Any
    reason: str
    began: str
    ended: str
    seconds: float | None
    plan: Mapping[str, Any]
    digest: str
    changes: tuple[tuple[str, Any, Any], ...]
    approvals: Sequence[Mapping[str, Any]]
    steps: Sequence[StepRow]
    parity: Parity | None
    sections: tuple[tuple[str, str, Any], ...]
    logs: tuple[tuple[str, str, int], ...]
    removed: int
    sums: tuple[tuple[str, int, str], ...] = field(default=())


def render_page(run: str, files: Mapping[str, bytes]) -> str:
    """The page for a run of that name; `files` are its other files by name."""
    read = {name: _parsed(content) for name, content in files.items() if name.endswith(".json")}
    plan, outcome = mapping(read.get("plan.json")), mapping(read.get("outcome.json"))
    operation = str(outcome.get("operation") or plan.get("operation") or run.rsplit("-", 1)[-1])
    word = str(outcome.get("outcome", "not ended"))
    began, ended = _times(files.get("journal.jsonl", b""))
    page = _Page(
        run=run,
        operation=operation,
        title=str(plan.get("title") or f"{operation.capitalize()} {run}"),
        outcome=word,
        word=_WORDS.get(word, word),
        sentence=_SENTENCES.get((operation, word), ""),
        mood=mood_of("outcome", word) or "bad",
        error=outcome.get("error"),
        reason=str(outcome.get("reason") or ""),
        began=_moment(began),
        ended=_moment(ended),
        seconds=(ended - began) / 1000 if began is not None and ended is not None else None,
        plan=plan,
        digest=str(plan.get("digest") or outcome.get("plan") or ""),
        changes=tuple(_changes(mapping(plan.get("now")), mapping(plan.get("then")))),
        approvals=[mapping(one) for one in sequence(read.get("approvals.json"))],
        steps=step_rows(plan, outcome, read),
        parity=parity_of(read.get("parity.json")),
        sections=tuple(_sections(plan, read)),
        logs=tuple(_logs(files)),
        removed=int(str(outcome.get("removed", 0)) if str(outcome.get("removed", 0)).isdecimal() else 0),
        sums=tuple((name, len(content), sha256(content).hexdigest()) for name, content in sorted(files.items())
                   if name not in ("evidence.html", "SHA256SUMS", "ledger.json")),
    )  # fmt: skip
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


# --- for the template ------------------------------------------------------------------------------------------------


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
