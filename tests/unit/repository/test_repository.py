"""The shape of the repository itself: fixed top level, small modules, reasons where they are owed, locks that fit."""

from __future__ import annotations

import ast
import fnmatch
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pytest_socket import SocketBlockedError

ROOT = Path(__file__).parents[3]
LOCKS = ROOT / "scripts" / "requirements"

TOP_LEVEL = {
    "pyproject.toml", "signer", "overlays", "scripts", "runbooks", "tests", "Containerfile",
    "README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".ci", ".gitignore", ".git",
}  # fmt: skip

FUNCTION_LINES = 60
# Path and function that is longer; with the reason why that reads better than two halves.
LONGER: dict[str, str] = {}


def _ignored() -> list[str]:
    return [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if line]


def _files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            parts = path.relative_to(ROOT).parts
            ours = not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in _ignored())
            if path.is_file() and ours:
                yield path


def _sources(*folders: str) -> Iterator[tuple[str, str]]:
    """Name and text of each Python file, whether it ends in .py or says so in its first line."""
    for path in _files(*folders):
        if path.suffix == ".py" or (path.suffix == "" and "python" in _first_line(path)):
            yield str(path.relative_to(ROOT)), path.read_text()


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(200).decode(errors="replace").rstrip("\n")


def test_top_level_is_fixed() -> None:
    found = {path.name for path in ROOT.iterdir()}
    strangers = {
        name for name in found - TOP_LEVEL if not any(fnmatch.fnmatch(name, pattern) for pattern in _ignored())
    }
    assert not strangers, f"the top level of the repository is fixed; move or remove {sorted(strangers)}"


def test_the_root_of_the_package_and_readme_stay_small() -> None:
    assert len(list((ROOT / "signer").glob("*.py"))) <= 14, "what one room alone uses belongs into that room"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 260, "README leads to runbooks, which have the rest"


_DATA = {
    ".lua",
    ".py",
    ".toml",
    ".txt",
    ".md",
    ".json",
    ".service",
    ".socket",
    ".timer",
}  # endings of what is not started


def test_scripts_can_be_started() -> None:
    wrong = []
    for path in _files("scripts", ".ci"):
        if "requirements" in path.parts or path.suffix in _DATA:
            continue
        if not _first_line(path).startswith("#!/"):
            wrong.append(f"{path.relative_to(ROOT)}: no #! line")
        elif not path.stat().st_mode & 0o100:
            wrong.append(f"{path.relative_to(ROOT)}: not executable")
    assert not wrong, "\n".join(wrong)


def test_shell_scripts_stop_at_the_first_surprise() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in _files("scripts", ".ci", "runbooks", "overlays")
        if re.match(r"#!.*\b(ba|da)?sh\b", _first_line(path))
        and not re.search(r"^set -[a-z]*u|^exec |BASH_SOURCE\[0\]\}\" = ", path.read_text(), re.MULTILINE)
    ]
    assert not wrong, f"`set -u` (better: set -euo pipefail) is missing in {wrong}"


def test_functions_fit_a_screen() -> None:
    long = []
    for name, text in _sources("signer", "scripts"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION_LINES and f"{name} {node.name}" not in LONGER:
                    long.append(f"{name} {node.name}: {count} lines")
    assert not long, f"split them, or give a reason in LONGER: {long}"


def test_reasons_for_length_are_still_needed() -> None:
    names = {name for name, _ in _sources("signer", "scripts")}
    assert all(entry.split()[0] in names and reason for entry, reason in LONGER.items())


def test_nothing_is_put_off_in_a_comment() -> None:
    word = re.compile(rf"\b({'TO' + 'DO'}|{'FIX' + 'ME'}|{'XX' + 'X'})\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _files("signer", "scripts", "tests", "overlays", "runbooks", ".ci")
        if path.suffix not in {".lock", ".png"}
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if word.search(line)
    ]
    assert not found, f"do it, or file an issue: {found}"


def test_no_error_is_dropped_without_a_reason() -> None:
    found = []
    for name, text in _sources("signer", "scripts", "tests"):
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(part, ast.Pass) for part in node.body):
                handler = lines[node.lineno - 1 : node.end_lineno]
                if not any("#" in line for line in handler):
                    found.append(f"{name}:{node.lineno}")
    assert not found, f"say in a comment why the error may be dropped, or use contextlib.suppress: {found}"


def test_a_hint_says_that_space_is_short_only_where_it_is() -> None:
    """`write_hint` looks at the error; a fixed text sends the operator of a read-only disk the wrong way."""
    measured = {"signer/service/status.py": 1, "signer/service/checks.py": 1}  # `disk_nearly_full`
    found = {
        name: count
        for name, text in _sources("signer")
        if (count := len(re.findall(r"\bfree (?:disk |some )?space\b", text)))
        and name not in ("signer/errors.py", "signer/error_catalogue.py")
    }
    assert found == measured


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _stated(lock: str) -> list[Requirement]:
    project = _project()
    runtime = project["project"]["dependencies"]
    extras = project["project"]["optional-dependencies"]
    of_lock = {
        "build": project["build-system"]["requires"],
        "parts": project["dependency-groups"]["parts"],
        "run": runtime,
        "test": [*runtime, *extras["test"]],
    }
    return [Requirement(text) for text in of_lock[lock]]


def _locked(lock: str) -> dict[str, str]:
    text = (LOCKS / f"{lock}.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE)}


def test_every_dependency_says_why_it_is_here() -> None:
    bare = [
        line.strip()
        for line in (ROOT / "pyproject.toml").read_text().splitlines()
        if re.match(r'\s+"[A-Za-z0-9_.-]+[<>=~!][^"]*",', line) and not re.search(r'",\s+# \S', line)
    ]
    assert not bare, f"a reason is missing behind {bare}"


@pytest.mark.parametrize("lock", ["build", "parts", "run", "test"])
def test_locks_hold_what_pyproject_asks_for(lock: str) -> None:
    locked = _locked(lock)
    wrong = [
        f"{wanted} (locked: {locked.get(canonicalize_name(wanted.name), 'nothing')})"
        for wanted in _stated(lock)
        if not wanted.specifier.contains(locked.get(canonicalize_name(wanted.name), "0"), prereleases=True)
    ]
    assert not wrong, f"run scripts/lock: {wrong}"


def test_every_dependency_has_both_ends_of_a_range() -> None:
    open_ended = [
        str(wanted)
        for lock in ("build", "parts", "test")
        for wanted in _stated(lock)
        if {part.operator for part in wanted.specifier} != {">=", "<"}
    ]
    assert not open_ended


@pytest.mark.parametrize("lock", ["build", "parts", "run", "test"])
def test_locks_are_pinned_by_hash_and_name_no_place(lock: str) -> None:
    text = (LOCKS / f"{lock}.lock").read_text()
    assert "://" not in text
    entries = [entry for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE) if entry.strip()]
    assert entries
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+ ", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_tests_run_with_what_the_service_runs_with() -> None:
    run, test = _locked("run"), _locked("test")
    assert run.items() <= test.items()


def test_commands_exist() -> None:
    scripts = _project()["project"]["scripts"]
    assert scripts == {"signer": "signer.cli.main:main", "safe-session": "signer.safe_session.main:main"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), target


def test_each_pattern_of_package_data_matches_a_file() -> None:
    patterns = _project()["tool"]["setuptools"]["package-data"]
    idle = [
        f"{package}: {pattern}"
        for package, listed in patterns.items()
        for pattern in listed
        if not any(path.is_file() for path in ROOT.joinpath(*package.split(".")).glob(pattern))
    ]
    assert not idle, f"pyproject.toml ships what does not exist: {idle}"


def test_unit_tests_reach_for_no_network() -> None:
    with pytest.raises(SocketBlockedError):
        socket.socket()
    with pytest.raises(SocketBlockedError):
        socket.socket(socket.AF_UNIX)


@pytest.mark.unix_socket
def test_unit_tests_with_the_mark_reach_unix_sockets_only() -> None:
    socket.socket(socket.AF_UNIX).close()
    with pytest.raises(SocketBlockedError):
        socket.socket()


def test_tests_import_nothing_from_other_tests() -> None:
    """What several tests need is in tests/parts, where a change of it is seen as one."""
    shared = [
        f"{name}:{node.lineno}"
        for name, text in _sources("tests")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("tests.unit", "tests.system"))
    ]
    assert not shared, f"move what they import to tests/parts: {shared}"
