"""What was in force after a run, beside what was before it and what was planned, from the run's own files. Pure.

`observed.json` holds the look that a run takes before it seals its evidence; a run of an earlier version has none. An
applied run is compared with its plan, any other with the state before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from signer.model import RunOutcome

_TITLES: Final = {
    "ready": "service ready",
    "mode": "mode",
    "ca": "CA",
    "signed_by": "certificates signed by",
    "principals": "their principals",
    "policy": "policy.toml (SHA-256)",
    "image": "container image",
    "compose_files": "compose files (SHA-256)",
    "starts_at_boot": "a reboot starts",
    "listens": "listens on",
    "health": "container's own check",
    "container": "container",
    "vault": "Vault",
    "data": "Vault's data",
}
_INFORMATIVE: Final = frozenset({"health", "container"})  # differ after every replacement
_NOT_ROWS: Final = frozenset({"unread"})
_NOTHING_KEPT: Final = "this run recorded nothing of it"
Verdict = Literal["as planned", "as before", "differs from the plan", "differs from before", "changed, not planned", ""]
_EXPECTED: Final[tuple[Verdict, ...]] = ("as planned", "as before")
DIFFERENCES: Final = frozenset({"differs from the plan", "differs from before", "changed, not planned"})


@dataclass(frozen=True, slots=True)
class AfterRow:
    """One fact before, as planned and as observed; each None where it is not known. `why` it was not observed."""

    title: str
    before: Any
    planned: Any
    observed: Any
    why: str
    verdict: Verdict

    @property
    def differs(self) -> bool:
        return self.verdict in DIFFERENCES


@dataclass(frozen=True, slots=True)
class After:
    """The rows, when they were observed (empty if never), and one line that sums them up with its mood."""

    rows: tuple[AfterRow, ...]
    at: str
    summary: str
    mood: Literal["good", "fair", "bad"]


@dataclass(frozen=True, slots=True)
class Logins:
    """The certificates of the last logins: fingerprints of their CAs, and their principals, each once."""

    signed_by: tuple[str, ...]
    principals: tuple[str, ...]


def differing(planned: Mapping[str, Any], observed: Mapping[str, Any]) -> list[str]:
    """The titles of the planned facts that were observed and are not as planned."""
    return [
        _title(name) for name, value in planned.items() if name in observed and not _same(name, value, observed[name])
    ]


def planned_in(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan wants in force after its run, under the names of `observe_service`; empty without a plan."""
    inputs = _table(plan.get("inputs"))
    policy, found = _table(inputs.get("policy")), dict[str, Any]()
    if plan:
        found = {"ready": True, "mode": _table(plan.get("now")).get("mode"), **_named(policy, ca="ca", policy="digest")}
    if plan.get("operation") == "cutover":
        files = [_table(_table(inputs.get("files")).get(name)) for name in ("base", "overlay")]
        digests = {str(one["path"]): one["sha256"] for one in files if "path" in one and "sha256" in one}
        found |= {**_named(_table(inputs.get("compose")), image="image"), "compose_files": digests}
        found["starts_at_boot"] = list(digests)
    return {name: value for name, value in {**found, **_table(plan.get("then"))}.items() if value not in (None, {}, [])}


def _named(table: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The values of a table under other names, as far as it has them."""
    return {name: table.get(key) for name, key in names.items()}


def after_of(
    plan: Mapping[str, Any], outcome: str, before: Mapping[str, Any], look: Mapping[str, Any], logins: Logins | None
) -> After:
    """`before` are the facts that the run recorded before its first change, `look` is observed.json."""
    planned, observed, unread = (_table(look.get(name)) for name in ("planned", "observed", "unread"))
    planned = {**planned_in(plan), **planned}
    before = {**_table(plan.get("now")), **before}
    if logins is not None:
        signed_by = logins.signed_by[0] if len(logins.signed_by) == 1 else list(logins.signed_by)
        observed = {**observed, "signed_by": signed_by, "principals": list(logins.principals)}
    for table in (planned, before):
        if table.get("ca") and (look or logins is not None):
            table["signed_by"] = table["ca"]
    is_applied = outcome == RunOutcome.APPLIED
    rows = tuple(
        _row(name, before.get(name), planned.get(name), observed.get(name), unread, is_applied=is_applied)
        for name in _names(planned, before, observed)
    )
    return After(rows, str(look.get("at") or ""), *_summed_up(rows, look, is_applied=is_applied))


def _names(*tables: Mapping[str, Any]) -> Iterator[str]:
    """The names in the order of `_TITLES`, then those that it lacks."""
    found = dict.fromkeys(name for table in tables for name in table if name not in _NOT_ROWS)
    yield from (name for name in _TITLES if name in found)
    yield from (name for name in found if name not in _TITLES)


def _row(
    name: str, before: Any, planned: Any, observed: Any, unread: Mapping[str, Any], *, is_applied: bool
) -> AfterRow:
    expected, to_plan = (planned, True) if is_applied and planned is not None else (before, False)
    verdict: Verdict = ""
    if observed is not None and expected is not None and name not in _INFORMATIVE and _comparable(expected, observed):
        if _same(name, expected, observed):
            verdict = "as planned" if to_plan else "as before"
        elif to_plan:
            verdict = "differs from the plan"
        else:
            verdict = "changed, not planned" if is_applied else "differs from before"
    why = "" if observed is not None else str(unread.get(name) or unread.get("all") or _NOTHING_KEPT)
    shown = _IN_WORDS.get(name, _as_it_is)
    return AfterRow(_title(name), shown(before), planned, shown(observed), why, verdict)


def _same(name: str, expected: Any, observed: Any) -> bool:
    if name == "principals" and isinstance(expected, Sequence) and isinstance(observed, Sequence):
        return set(map(str, observed)) <= set(map(str, expected)) or any("{" in str(one) for one in expected)
    return bool(expected == observed)


def _comparable(expected: Any, observed: Any) -> bool:
    """Vault before its removal is an inventory, and after it one word."""
    return isinstance(expected, Mapping) == isinstance(observed, Mapping)


def _summed_up(
    rows: Sequence[AfterRow], look: Mapping[str, Any], *, is_applied: bool
) -> tuple[str, Literal["good", "fair", "bad"]]:
    if not look:
        return f"not observed: {_NOTHING_KEPT}", "fair"
    if different := [row.title for row in rows if row.differs]:
        return f"differs from {'the plan' if is_applied else 'before'}: {', '.join(different)}", "bad"
    verdicts = [row.verdict for row in rows]
    counted = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in _EXPECTED if verdict in verdicts)
    if missing := [row.title for row in rows if row.observed is None and _is_wanted(row, is_applied=is_applied)]:
        return f"{counted or 'nothing compared'}; not observed: {', '.join(missing)}", "fair"
    return counted or "nothing to compare", "good" if counted else "fair"


def _is_wanted(row: AfterRow, *, is_applied: bool) -> bool:
    return (row.planned if is_applied else row.before) is not None


def _container(value: Any) -> Any:
    """A container in words; its other facts have rows of their own or are in the file."""
    found = _table(value)
    if not found:
        return None
    started = str(found.get("started", "an unknown time"))[:19].replace("T", " ")
    return f"{str(found.get('id', ''))[:12]}, {found.get('state', 'unknown')}, started {started}"


def _vault(value: Any) -> Any:
    """Vault's inventory in words; all of it is in a section of its own."""
    found = _table(value)
    if not found:
        return value or None
    mounts = found.get("mounts")
    counted = f", {len(mounts)} mounts" if isinstance(mounts, list) else ""
    return f"version {found.get('version', 'unknown')}{counted}, as in the plan"


def _as_it_is(value: Any) -> Any:
    return value


_IN_WORDS: Final = {"container": _container, "vault": _vault}


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _table(value: object) -> dict[str, Any]:
    return {str(name): item for name, item in value.items()} if isinstance(value, Mapping) else {}
