"""Shapes what other modules wrote as JSON into tables for the page: steps, logins, parity. Pure.

The forms are those of `running.py`, `smoke.py` and `parity.py`. Whatever has another form is left out here, never an
error: the page must be made of any run, and the files are beside it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_WIDEST_CELL: Final = 240  # characters
_MOST_COLUMNS: Final = 7
_INLINE: Final = 60  # characters of a list that stands on one line
_BLANK: Final[Mapping[str, Any]] = {"what": "done", "summary": "", "facts": {}, "seconds": None}
# Words that say how something went, by their mood; in a table only below such a heading.
_VERDICTS: Final = frozenset({"what", "outcome", "result", "status", "severity", "parity", "trusted"})
_MOODS: Final = {
    "good": frozenset({"applied", "done", "ok", "same", "true"}),
    "fair": frozenset({"rolled_back", "undone", "warn", "note"}),
    "bad": frozenset({"failed", "fail", "stopped", "rollback_failed", "error", "false"}),
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


# --- reading without trust -------------------------------------------------------------------------------------------


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def number_of(value: object) -> float:
    """The value if it is a number of seconds that can be, else 0."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0


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
    for name, value in sorted(files, key=lambda file: (file[0][:8], file[1].get("what") == "undone")):
        if value:
            one = {**_BLANK, **value, "facts": _without_logs(value.get("facts"))}
            seen.setdefault(str(value.get("step", name)), []).append(one)
    error = mapping(outcome.get("error"))
    told = seen.setdefault(str(error["step"]), []) if error.get("step") else []
    if error and not any(one["what"] == "failed" for one in told):
        failed = {**_BLANK, "what": "failed", "summary": str(error.get("text", ""))}
        told.insert(sum(one["what"] != "undone" for one in told), failed)
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


# --- how a value reads best ------------------------------------------------------------------------------------------


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
