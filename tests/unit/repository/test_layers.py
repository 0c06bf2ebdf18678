"""What import-linter cannot express: a few things happen in one module only. Read from the syntax trees."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.parts.source import PACKAGE, trees

# The modules that may read or make a private key with `cryptography`: the CA's key, and the keys of processes, which a
# witness loads without the former.
PRIVATE_KEYS = {Path("ca/key.py"), Path("ca/service_key.py")}
PRINTERS = {Path("cli/output.py"), Path("safe_session/output.py")}
# Calls that decide whether a link is followed, a file is synced or a lock is taken, and who else makes them.
FILE_CALLS = {"O_NOFOLLOW", "O_EXCL", "O_CREAT", "O_TMPFILE", "O_NONBLOCK", "O_DIRECTORY", "flock", "lockf", "mkstemp"}
SYNCERS = {
    "files.py": "",
    "ca/key_text.py": "writes the bytes of a key to an open descriptor",
    "migration/evidence/store.py": "syncs the room that it reserves",
    "migration/journal.py": "syncs the lines of a file that stays open",
}
OPENERS = {
    "files.py": "",
    "safe_session/claims.py": "the same as settings.py",
    "safe_session/settings.py": "imports no module of ours that could slow a login down",
    "safe_session/wrappers.py": "the same",
}


def modules() -> list[tuple[Path, ast.Module]]:
    """Each module's path in the package, and its syntax tree."""
    return [(path.relative_to(PACKAGE), tree) for path, tree in trees().items()]


def names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that a module uses, and every name that it imports from `cryptography`; with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cryptography"):
            for alias in node.names:
                yield alias.name, node.lineno


def test_two_modules_touch_private_keys() -> None:
    uses = [
        (path, f"{path}:{line} {name}")
        for path, tree in modules()
        for name, line in names(tree)
        if name.endswith("PrivateKey") or (name.startswith("load_") and name.endswith("_private_key"))
    ]
    assert {path for path, _ in uses} == PRIVATE_KEYS, uses


def test_printing_is_done_in_one_place_for_each_command() -> None:
    uses = [(path, line) for path, tree in modules() for name, line in names(tree) if name == "print"]
    assert {path for path, _ in uses} <= PRINTERS, uses


def test_files_are_opened_and_synced_in_one_place() -> None:
    def users(wanted: set[str]) -> set[str]:
        return {str(path) for path, tree in modules() for name, _ in names(tree) if name in wanted}

    assert users(FILE_CALLS) == set(OPENERS)
    assert users({"fsync", "fdatasync"}) == set(SYNCERS)


def test_safe_session_imports_the_standard_library_and_nothing_else_from_outside() -> None:
    """Each import is felt at every login. What it may import of ours is a contract of import-linter's."""
    foreign = {
        name
        for path, tree in modules()
        if path.parts[0] == "safe_session"
        for node in ast.walk(tree)
        for name in imported(node)
    } - set(sys.stdlib_module_names)
    assert foreign == {"signer"}


def imported(node: ast.AST) -> list[str]:
    """The top-level packages that a statement imports from."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").split(".")[0]]
    return []
