"""The syntax trees of the package, and what calls in them are made with."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "signer"


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of each module, by its path; read at the first call, so that collecting tests stays fast."""
    return {path: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def called_with(functions: set[str]) -> Iterator[tuple[str, ast.expr]]:
    """The first argument of each call of one of these names in the package, with the name."""
    for tree in trees().values():
        yield from calls(tree, functions)


def calls(tree: ast.AST, functions: set[str]) -> Iterator[tuple[str, ast.expr]]:
    """The same for one syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in functions:
                yield name, node.args[0]


def texts(node: ast.AST) -> Iterator[str]:
    """The texts that an expression can be; a part that is filled in at run time is `…`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Tuple):
        for part in node.elts:
            yield from texts(part)


def error_classes() -> set[str]:
    """The names of all classes of the error tree."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"SignerError"}
    while grown := {name for name, above in bases.items() if above & found} - found:
        found |= grown
    return found
