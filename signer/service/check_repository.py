"""Do the files beside the program still say what it does? Overlays, runbooks, and the preflight's codes.

Only where there is a checkout: an installed copy has none of these files. Everything is read as text, in the forms that
this repository writes; what cannot be read is a fault, and nothing is run. The verbs come from above, where they live.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from signer.service.checks import Check
from signer.service.composefile import Place, parse_compose
from signer.service.runbooks import GATE, shown_commands, ungated_endings
from signer.settings import FINGERPRINT_SETTING, SETTINGS

BASE: Final = "overlays/safe-session.yaml"
LOCAL: Final = "overlays/safe-session-local-ca.yaml"
SHADOW: Final = "overlays/safe-session-shadow.yaml"
PREFLIGHT: Final = "scripts/cutover/safe-session-local-ca-preflight.sh"
CODES: Final = "runbooks/preflight.md"
README: Final = "README.md"
KEY_CODES: Final = "signer/ca/key.py"
_WITH_SETTINGS: Final = (
    BASE, LOCAL, SHADOW, "Containerfile", "scripts/systemd/signer-keeper.service", "scripts/systemd/signer-api.service",
)  # fmt: skip
FILES: Final = (*_WITH_SETTINGS, PREFLIGHT, CODES, README, KEY_CODES)

KEY_VARIABLE: Final = "PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE"
_DEFAULTS: Final = {name: default for name, default, _ in SETTINGS}
_SERVICE: Final = ("services", "safe-session-api")
_MOUNT: Final = (*_SERVICE, "volumes", "0")
# All that an overlay may hold, and with which value; the source has a check of its own.
_MODE: Final = (*_SERVICE, "environment", "SIGNER_MODE")
_OVERLAYS: Final = {LOCAL: "local", SHADOW: "shadow"}
_KEY_MOUNT: Final[dict[Place, str]] = {
    (*_MOUNT, "type"): "bind",
    (*_MOUNT, "target"): _DEFAULTS["SIGNER_CA_KEY_FILE"],
    (*_MOUNT, "read_only"): "true",
    (*_MOUNT, "bind", "create_host_path"): "false",
}
_KEY_SOURCE: Final = (*_MOUNT, "source")
# What the preflight cannot meet: root reads every file, signs nothing, and knows no other owner than root:root.
_KEEPER_ALONE: Final = frozenset(
    {"ca_key_unreadable", "ca_key_self_test_failed", "ca_key_owner_unknown", "ca_key_replaced"}
)

_PATH: Final = re.compile(r"(?<![\w/.~$}*-])(?:\.ci|overlays|runbooks|scripts|signer|tests)/[\w./*-]*\w")
_LINK: Final = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")
_VERB: Final = re.compile(r"(?<![\w./-])(?:[\w./-]*/bin/)?(signer|safe-session) +([a-z][a-z-]*)(?: +([a-z][a-z-]*))?")
_ENTRY: Final = re.compile(r'    "(?:ok  |warn|FAIL) (\S+)(?: +(\S.*))?"')
_ROW: Final = re.compile(r"\| `([^`|]+)` \| [^|]*[^|\s] \| ([^|]*[^|\s]) \|")
_TABLE: Final = "| code | what it says | what to do |"


class _LeftOut(Exception):
    """What this check looks at is not there or cannot be read; the check that says so has said it."""


@dataclass(frozen=True, slots=True)
class _Tree:
    """The files of a checkout."""

    root: Path
    verbs: Collection[str]
    texts: Mapping[str, str]
    unread: Mapping[str, str] = field(default_factory=dict)

    def text(self, name: str) -> str:
        if name not in self.texts:
            raise _LeftOut
        return self.texts[name]

    def compose(self, name: str) -> dict[Place, str]:
        try:
            return parse_compose(self.text(name))
        except ValueError:
            raise _LeftOut from None

    def runbooks(self) -> dict[str, str]:
        return {name: text for name, text in self.texts.items() if name.startswith("runbooks/")}


@dataclass(frozen=True, slots=True)
class _Subject:
    """One thing to look at: `faults` yields a sentence for each fault; none is what `good` says."""

    code: str
    good: str
    hint: str
    faults: Callable[[_Tree], Iterator[str]]


def is_checkout(root: Path) -> bool:
    """Whether `root`, the folder above the package, holds more of the repository than the package."""
    return any((root / name).is_dir() for name in ("overlays", "runbooks"))


def check_repository(root: Path, verbs: Collection[str]) -> Iterator[Check]:
    """Every check of the checkout in `root`; `verbs` are what can be typed, such as `signer ca new`.

    A check whose file is missing or unreadable is left out: `repository_files` or `repository_compose_form` failed.
    """
    texts: dict[str, str] = {}
    unread: dict[str, str] = {}
    names = {*FILES, *(str(path.relative_to(root)) for path in (root / "runbooks").glob("**/*.md"))}
    for name in sorted(names):
        try:
            texts[name] = (root / name).read_text("utf-8")
        except OSError as error:
            unread[name] = error.strerror or "cannot be read"
        except UnicodeDecodeError:
            unread[name] = "is no text"
    tree = _Tree(root, verbs, texts, unread)
    for subject in _SUBJECTS:
        try:
            faults = list(subject.faults(tree))
        except _LeftOut:
            continue
        for fault in faults:
            yield Check("fail", subject.code, fault, subject.hint)
        if not faults:
            yield Check("ok", subject.code, subject.good)


# --- files and overlays ----------------------------------------------------------------------------------------------


def _files(tree: _Tree) -> Iterator[str]:
    for name, why in tree.unread.items():
        yield f"{name}: {why}"


def _compose_form(tree: _Tree) -> Iterator[str]:
    for name in (BASE, *_OVERLAYS):
        try:
            parse_compose(tree.text(name))
        except ValueError as error:
            yield f"{name}: {error}"


def _key_variable(tree: _Tree) -> Iterator[str]:
    for name in _OVERLAYS:
        source = tree.compose(name).get(_KEY_SOURCE, "nothing")
        if re.fullmatch(rf"\$\{{{KEY_VARIABLE}:\?[^{{}}]+\}}", source) is None:
            yield f"{name} mounts {source}"


def _key_mount(tree: _Tree) -> Iterator[str]:
    for name in _OVERLAYS:
        yield from _differing(tree, name, _KEY_MOUNT)


def _overlay_mode(tree: _Tree) -> Iterator[str]:
    for name, mode in _OVERLAYS.items():
        yield from _differing(tree, name, {_MODE: mode})


def _overlay_alone(tree: _Tree) -> Iterator[str]:
    known = {_KEY_SOURCE, _MODE, *_KEY_MOUNT}
    for name in _OVERLAYS:
        for place in tree.compose(name):
            if place not in known:
                yield f"{name} sets {'.'.join(place)}"


def _base_mode(tree: _Tree) -> Iterator[str]:
    yield from _differing(tree, BASE, {_MODE: "vault"})


def _base_root(tree: _Tree) -> Iterator[str]:
    yield from _differing(tree, BASE, {(*_SERVICE, "read_only"): "true"})


def _base_powers(tree: _Tree) -> Iterator[str]:
    yield from _differing(tree, BASE, {(*_SERVICE, "cap_drop", "0"): "ALL"})
    if (*_SERVICE, "privileged") in tree.compose(BASE):
        yield f"{BASE} has services.safe-session-api.privileged"


def _base_privileges(tree: _Tree) -> Iterator[str]:
    yield from _differing(tree, BASE, {(*_SERVICE, "security_opt", "0"): "no-new-privileges:true"})


def _differing(tree: _Tree, name: str, wanted: Mapping[Place, str]) -> Iterator[str]:
    found = tree.compose(name)
    for place, value in wanted.items():
        if found.get(place) != value:
            yield f"{name} has {'.'.join(place)}: {found.get(place, 'nothing')}, not {value}"


def _settings(tree: _Tree) -> Iterator[str]:
    for name in _WITH_SETTINGS:
        for setting in sorted(set(re.findall(r"\bSIGNER_[A-Z0-9_]+", tree.text(name)))):
            if setting not in _DEFAULTS and setting != FINGERPRINT_SETTING[0]:
                yield f"{name} names {setting}"


# --- what documents name ---------------------------------------------------------------------------------------------


def _paths(tree: _Tree) -> Iterator[str]:
    shown = {README: "\n".join(command for _, command in shown_commands(tree.text(README)))}
    for name, text in {**tree.runbooks(), **shown}.items():
        for path in sorted(set(_PATH.findall(text))):
            if not any(tree.root.glob(path)):
                yield f"{name} names {path}"
        for path in sorted(set(_LINK.findall(text))):
            if not (tree.root / name).parent.joinpath(path).exists():
                yield f"{name} links to {path}"


def _verbs(tree: _Tree) -> Iterator[str]:
    groups = {verb.rpartition(" ")[0] for verb in tree.verbs}
    for name, text in {README: tree.text(README), **tree.runbooks()}.items():
        for _, command in shown_commands(text):
            for program, first, second in _VERB.findall(command):
                verb = f"{program} {first}"
                if verb in tree.verbs or f"{verb} {second}" in tree.verbs or (verb in groups and not second):
                    continue
                yield f"{name} shows {verb}{' ' * bool(second)}{second}"


def _vault(tree: _Tree) -> Iterator[str]:
    for name, text in tree.runbooks().items():
        for command in ungated_endings(text):
            yield f"{name} shows {command}"


# --- the preflight's codes -------------------------------------------------------------------------------------------


def read_catalogue(script: str) -> dict[str, str]:
    """Code → next action, from the text of the preflight; raises `ValueError`."""
    names = dict(re.findall(r"^readonly ([A-Z]+)=([\w-]+)$", script, re.MULTILINE))
    block = re.search(r"^readonly CATALOGUE=\(\n(.*?)^\)$", script, re.MULTILINE | re.DOTALL)
    if block is None:
        raise ValueError(f"{PREFLIGHT} has no CATALOGUE")
    found: dict[str, str] = {}
    for line in block[1].splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry is not None and entry[1] not in found:
            # As bash reads a text in double quotes: `\$` is a dollar, `$NAME` what NAME holds.
            found[entry[1]] = re.sub(r"\\\$|\$([A-Z]+)", lambda match: names.get(match[1], "$"), entry[2] or "")
        elif not line.strip().startswith("#"):
            raise ValueError(f"{PREFLIGHT} has a line in CATALOGUE that cannot be read: {line.strip()}")
    return found


def _read_table(text: str) -> dict[str, str]:
    """Code → what to do, from the runbook's table; raises `ValueError`."""
    lines = text.splitlines()
    if _TABLE not in lines:
        raise ValueError(f"{CODES} has no table of codes")
    found: dict[str, str] = {}
    for line in lines[lines.index(_TABLE) + 2 :]:
        if not line.startswith("|"):
            break
        row = _ROW.fullmatch(line)
        if row is None or row[1] in found:
            raise ValueError(f"{CODES} has a row that cannot be read, or twice: {line}")
        found[row[1]] = row[2].replace("`", "")
    return found


def _codes(tree: _Tree) -> Iterator[str]:
    try:
        real, told = read_catalogue(tree.text(PREFLIGHT)), _read_table(tree.text(CODES))
    except ValueError as error:
        yield str(error)
        return
    yield from (f"{CODES} does not tell {code}" for code in real if code not in told)
    yield from (f"{CODES} tells {code}, which the preflight never says" for code in told if code not in real)


def _actions(tree: _Tree) -> Iterator[str]:
    try:
        real, told = read_catalogue(tree.text(PREFLIGHT)), _read_table(tree.text(CODES))
    except ValueError:
        raise _LeftOut from None
    for code, action in real.items():
        if action and told.get(code, action) != action:
            yield f"{code}: {CODES} says {told[code]}, the preflight {action}"


def _key_codes(tree: _Tree) -> Iterator[str]:
    try:
        real = read_catalogue(tree.text(PREFLIGHT))
    except ValueError:
        raise _LeftOut from None
    raised = set(re.findall(r'\bBadKeyFile\(\s*f?"(ca_key_[^"]+)"', tree.text(KEY_CODES)))
    if not raised:
        yield f"{KEY_CODES} raises no code in a form that is read here"
    for code in sorted(raised - _KEEPER_ALONE):
        if code.replace("{owner}", _DEFAULTS["SIGNER_CA_KEY_OWNER"]) not in real:
            yield f"the keeper says {code}, the preflight does not"


_SUBJECTS: Final = (
    _Subject(
        "repository_files",
        "overlays, units, preflight and runbooks are there",
        "restore it from the repository",
        _files,
    ),
    _Subject(
        "repository_compose_form",
        "the compose files can be read",
        "write plain block style, or teach signer/service/composefile.py the form",
        _compose_form,
    ),
    _Subject(
        "repository_overlay_key_variable",
        f"the key is ${{{KEY_VARIABLE}:?}}",
        f"write ${{{KEY_VARIABLE}:?message}} as the source of the mount",
        _key_variable,
    ),
    _Subject(
        "repository_overlay_key_mount",
        "bind, read-only, never made by the engine, where the service looks for it",
        "restore the overlay's mount",
        _key_mount,
    ),
    _Subject(
        "repository_overlay_mode",
        "SIGNER_MODE local in the one, shadow in the other",
        "set SIGNER_MODE to what the overlay is for",
        _overlay_mode,
    ),
    _Subject(
        "repository_overlay_alone",
        "and nothing else",
        "take it out: the overlay changes who signs, no more",
        _overlay_alone,
    ),
    _Subject("repository_base_mode", "SIGNER_MODE vault", "set SIGNER_MODE: vault in the base file", _base_mode),
    _Subject("repository_base_root", "the root file system is read-only", "set read_only: true", _base_root),
    _Subject(
        "repository_base_capabilities",
        "all capabilities dropped first",
        "set cap_drop: [ALL], unprivileged",
        _base_powers,
    ),
    _Subject(
        "repository_base_privileges",
        "no new privileges",
        'set security_opt: ["no-new-privileges:true"]',
        _base_privileges,
    ),
    _Subject(
        "repository_settings",
        "compose files, Containerfile and units name settings that there are",
        "mend its name, or add it to signer/settings.py",
        _settings,
    ),
    _Subject("repository_paths", "files that documents name are there", "mend the path, or add the file", _paths),
    _Subject(
        "repository_verbs", "commands that documents show are there", "mend the command, see `signer --help`", _verbs
    ),
    _Subject(
        "repository_vault_gate",
        "no runbook shows how to end Vault outside its gated section",
        f"move it into the section that names {GATE}",
        _vault,
    ),
    _Subject("repository_preflight_codes", "the runbook tells all of them", "mend the table, see --codes", _codes),
    _Subject("repository_preflight_actions", "in the preflight's own words", "write what the script says", _actions),
    _Subject("repository_key_codes", "keeper and preflight use the same", "give both the same code", _key_codes),
)
