"""Imports point down only, and a few things happen in one module only. Read from the syntax trees, not by importing.

The table below is the layout of README.md. A new module at the top of signer/ has to be added to it, which is the
moment to think about where it belongs. Imports inside functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "signer"

# From the top down. A module may import from any layer below its own, and inside its own package.
LAYERS: dict[str, tuple[str, ...]] = {
    "entry": ("cli", "serve", "login", "__main__"),
    "verb": (
        "grammar", "verbs", "verbform", "platformverbs", "telling", "planned", "verbs_check", "verbs_policy",
        "verbs_ledger", "verbs_ca", "verbs_cutover", "verbs_decommission", "verbs_evidence", "verbs_parity",
    ),
    "edge": ("api", "keeper", "keeper_start", "keeper_reload", "link", "forwarding"),
    "use case": (
        "ops", "bundle", "core", "commands", "counts", "drafts", "foreign", "orders", "queries", "recorded", "shadow",
        "check", "check_repository",
    ),
    "adapter": (
        "ledger", "ledger_reader", "ledgeraudit", "cakey", "keychannel", "publickeyfile", "vault",
        "vaultfaults", "vaultadmin", "vaultinventory", "auditlog", "tokenfile", "apiclient", "boundedhttp",
        "boundedrun", "compose", "composetrial",
        "infisical", "harden", "metrics",
    ),
    "rules": (
        "policy", "policyfile", "policytables", "rules", "approvals", "settings", "ask", "tokens", "toml_places",
        "parity", "vaultrole", "operations",
    ),
    "formats": ("ssh", "address", "duration", "goduration", "gojson", "chain", "printing", "composefile", "runbooks"),
    "words": ("model", "errors", "timestamps", "loglimit", "__init__"),
}  # fmt: skip

# Neighbours in one layer that may know each other, one way.
NEIGHBOURS = {
    ("__main__", "cli"): "`python -m signer` is the same command",
    ("api", "link"): "the api reaches the keeper through its end of the socket",
    ("keeper_start", "keeper"): "starts it",
    ("keeper_start", "keeper_reload"): "gives the keeper what it does on SIGHUP",
    ("keeper_reload", "keeper"): "says what was taken, in the keeper's word",
    ("cakey", "keychannel"): "opens the file as the launcher does",
    ("keeper", "forwarding"): "grants that Vault signs go out and come back through it",
    ("core", "foreign"): "what Vault made of a grant",
    ("foreign", "commands"): "a forwarded grant belongs to one",
    ("check", "ops"): "where a key may lie is asked with the question of `ca render`",
    ("cli", "serve"): "`signer serve` is a verb",
    ("grammar", "verbs"): "reads words by the list of verbs",
    ("verbs", "verbform"): "what a verb is",
    ("verbs", "platformverbs"): "the rest of the list",
    ("platformverbs", "verbform"): "what a verb is",
    ("verbs_decommission", "telling"): "shows plans and steps",
    ("verbs_decommission", "planned"): "plan file and phrase",
    ("verbs_cutover", "telling"): "shows plans and steps",
    ("verbs_cutover", "planned"): "reads plan and approval",
    ("planned", "telling"): "shows the plan before it asks",
    ("verbs_check", "verbs"): "documents may show no verb that there is not",
    ("check_repository", "check"): "its findings are checks",
    ("core", "counts"): "what the core remembers",
    ("core", "shadow"): "what our key would have made of a grant that Vault signed",
    ("shadow", "counts"): "differences are folded",
    ("shadow", "drafts"): "what our key would have signed",
    ("shadow", "foreign"): "what Vault made of a grant",
    ("core", "commands"): "what the core is told",
    ("core", "drafts"): "from a grant to the bytes that are signed",
    ("core", "queries"): "what the core can be asked",
    ("queries", "commands"): "a query is one of them",
    ("queries", "recorded"): "the words for a certificate",
    ("goduration", "gojson"): "quotes as Go does",
    ("infisical", "harden"): "the child that runs the SDK forbids dumps of itself",
    ("ledger", "ledger_reader"): "who writes reads, too",
    ("ledgeraudit", "ledger_reader"): "with its way of opening and reading",
    ("ledgeraudit", "ledger"): "checks what the other wrote, with its way of opening and reading",
    ("vault", "boundedhttp"): "its calls must end",
    ("compose", "boundedrun"): "its commands must end",
    ("composetrial", "compose"): "a trial is one more project of compose's",
    ("composetrial", "boundedrun"): "how a command ended",
    ("vault", "vaultfaults"): "what Vault says as codes of ours",
    ("vaultadmin", "boundedhttp"): "its calls must end",
    ("vaultfaults", "tokenfile"): "its token is in a file",
    ("apiclient", "boundedhttp"): "its calls must end",
    ("apiclient", "tokenfile"): "its token is in a file",
    ("vaultadmin", "vaultfaults"): "what Vault says as codes of ours",
    ("vaultinventory", "vaultfaults"): "a sealed Vault",
    ("metrics", "ledger"): "times what the other commits",
    ("core", "orders"): "what is recorded and no certificate",
    ("orders", "commands"): "an order is one of them",
    ("orders", "queries"): "who has which right",
    ("core", "recorded"): "the reply to a record is the record",
    ("operations", "ask"): "numbers in a body",
    ("operations", "rules"): "a reason is as long as one",
    ("operations", "tokens"): "no token is kept",
    ("policy", "rules"): "deciding is asking each rule",
    ("policy", "tokens"): "an identity is found by its token's digest",
    ("parity", "vaultrole"): "what a role of Vault's means",
    ("parity", "policy"): "by how much a certificate of ours is back-dated",
    ("policyfile", "policy"): "text to Policy",
    ("policyfile", "policytables"): "text to Policy, by way of raw tables",
    ("policyfile", "rules"): "a file may not allow what no rule could grant",
    ("policyfile", "toml_places"): "each fault has its line",
}

# What `safe-session` may take from the rest of the product: people feel each import at every login.
LOGIN_MAY_IMPORT = {"login", "ssh", "address", "errors", "__init__"}

# The one module that may read or make a private key with `cryptography`.
PRIVATE_KEYS = "cakey"
PRINTERS = {"printing", "login"}


@dataclass(frozen=True)
class Module:
    """One file under signer/; `top` is its name, or its package's, directly under signer/."""

    path: Path
    top: str
    tree: ast.Module

    def __str__(self) -> str:
        return str(self.path.relative_to(PACKAGE.parent))


@dataclass(frozen=True)
class Import:
    """A name with dots that a module imports, and where."""

    by: Module
    name: str
    line: int

    @property
    def top(self) -> str | None:
        """The module directly under signer/ that is meant; None for somebody else's."""
        package, *rest = self.name.split(".")
        if package != "signer":
            return None
        known = rest and (rest[0] in MODULE_NAMES or rest[0] in RANK)
        return rest[0] if known else "__init__"

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.name}"


def _modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.append(Module(path, first, ast.parse(path.read_text(), str(path))))
    return found


def _imports(module: Module) -> Iterator[Import]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            # `from signer import errors` names a module, `from signer import __version__` does not; the same at
            # every level, so each name is looked at with what it hangs on.
            for alias in node.names:
                yield Import(module, f"{base}.{alias.name}", node.lineno)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = ["signer", *module.path.relative_to(PACKAGE).parent.parts]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


MODULES = _modules()
MODULE_NAMES = {module.top for module in MODULES}
RANK = {name: -depth for depth, names in enumerate(LAYERS.values()) for name in names}
LAYER = {name: layer for layer, names in LAYERS.items() for name in names}
IMPORTS = [found for module in MODULES for found in _imports(module)]


def test_every_module_has_its_place_in_the_table() -> None:
    strangers = sorted(MODULE_NAMES - set(RANK))
    assert not strangers, f"add it to the table LAYERS in {__file__}, in the layer where it belongs: {strangers}"


def test_imports_point_down_only() -> None:
    wrong = [
        f"{found} ({LAYER[found.by.top]} -> {LAYER[found.top]})"
        for found in IMPORTS
        if found.top is not None and {found.by.top, found.top} <= set(RANK) and not _allowed(found.by.top, found.top)
    ]
    assert not wrong, "\n".join(wrong)


def _allowed(by: str, target: str) -> bool:
    return target in (by, "__init__") or RANK[by] > RANK[target] or (by, target) in NEIGHBOURS


def test_neighbours_are_neighbours_and_one_way() -> None:
    for by, target in NEIGHBOURS:
        assert LAYER[by] == LAYER[target], (by, target)
        assert (target, by) not in NEIGHBOURS


def test_safe_session_imports_formats_errors_and_the_standard_library_only() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.by.top == "login"
        and not (
            found.name.split(".")[0] in sys.stdlib_module_names if found.top is None else found.top in LOGIN_MAY_IMPORT
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_one_module_touches_private_keys() -> None:
    wrong = [
        f"{module}:{line} {name}"
        for module in MODULES
        if module.top != PRIVATE_KEYS
        for name, line in _names(module.tree)
        if name.endswith("PrivateKey") or (name.startswith("load_") and name.endswith("_private_key"))
    ]
    assert not wrong, "\n".join(wrong)


def _names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cryptography"):
            for alias in node.names:
                yield alias.name, node.lineno


def test_printing_is_done_in_one_place_for_each_command() -> None:
    wrong = [
        f"{module}:{line}"
        for module in MODULES
        if module.top not in PRINTERS
        for name, line in _names(module.tree)
        if name == "print"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "place, text, expected",
    [
        ("policy.py", "from signer import errors, __version__", ["errors", "__init__"]),
        ("policy.py", "import signer.ssh.wire", ["ssh"]),
        ("policy.py", "from .ssh.wire import Reader", ["ssh"]),
        ("ssh/wire.py", "from ..errors import BadFormat", ["errors"]),
        ("ssh/wire.py", "from . import agent", ["ssh"]),
        ("policy.py", "import json", [None]),
        ("policy.py", "def late():\n    from signer.keeper import serve", ["keeper"]),
    ],
)
def test_reading_of_imports(place: str, text: str, expected: list[str | None]) -> None:
    module = Module(PACKAGE / place, place.split("/", maxsplit=1)[0].removesuffix(".py"), ast.parse(text))
    assert [found.top for found in _imports(module)] == expected


@pytest.mark.parametrize(
    "by, target, allowed",
    [
        ("core", "policy", True),
        ("policy", "core", False),
        ("keeper", "api", False),
        ("errors", "model", False),
        ("api", "link", True),
        ("link", "api", False),
        ("ssh", "errors", True),
    ],
)
def test_the_arrows(by: str, target: str, allowed: bool) -> None:
    assert _allowed(by, target) is allowed
