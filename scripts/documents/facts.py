"""What the code says, as Markdown: one function for each generated block of runbooks/. Reads the package only."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, cast, get_args, get_origin

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from signer import model, settings
from signer.api.openapi import ROUTES, Query
from signer.api.schemas import Problem
from signer.authority import core
from signer.authority.shadow import Shadow
from signer.ca import key_text
from signer.cli.catalogue import VERBS
from signer.cli.parser import read_words
from signer.cli.usage import render_help
from signer.error_catalogue import CATALOGUE, render_markdown
from signer.ledger.marks import Mark
from signer.ledger.schema import EVENT_KINDS
from signer.migration.evidence import files as evidence_files
from signer.model import MAX_KEY_ID, MAX_PUBLIC_KEY, CaKeys, Head, Role, Token
from signer.policy import file as policy_file
from signer.policy import reading, tables
from signer.policy.decide import Policy
from signer.protocol import commands, sign_request
from signer.safe_session import settings as safe_session_settings
from signer.safe_session.usage import TEXT as SAFE_SESSION_HELP
from signer.service import metrics
from signer.service.notifier import Counts, render_metrics
from signer.service.overview import Overview
from signer.service.publisher import ListState
from signer.ssh.certificate import MAX_PRINCIPALS
from signer.toml import Duration
from tests.parts.command_blocks import count_marks, read_command_blocks
from tests.parts.source import PACKAGE, called_with, texts, trees


@dataclass(frozen=True)
class Table:
    """A table. `rows` holds the cells that the code knows; the last `by_hand` cells of a row are kept as they are."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    by_hand: int = 0

    def render(self, written: Mapping[str, Sequence[str]]) -> str:
        lines = [self.header, ("---",) * len(self.header)]
        for row in self.rows:
            kept = tuple(written.get(row[0], ()))[-self.by_hand :] if self.by_hand else ()
            lines.append((*row, *kept, *("",) * (len(self.header) - len(row) - len(kept))))
        return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines).replace(
            "| --- ", "|---"
        )


TRANSCRIPTS: Final = Path(__file__).parents[2] / "tests" / "data" / "transcripts"
Fact = Callable[[], Table | str]


def code(text: str) -> str:
    return f"`{text}`" if text else ""


# --- settings --------------------------------------------------------------------------------------------------------


def settings_of(rows: Sequence[tuple[str, str, str]]) -> Table:
    return Table(("setting", "default", "meaning"), [(code(name), code(default), text) for name, default, text in rows])


def service_settings() -> Table:
    return settings_of(settings.SETTINGS)


def ca_render_settings() -> Table:
    return settings_of((settings.FINGERPRINT_SETTING, *settings.INFISICAL_SETTINGS))


def safe_session_names() -> list[str]:
    """Every name of a setting that `safe-session` reads, in the order of its help."""
    sources = "".join(path.read_text() for path in sorted((PACKAGE / "safe_session").glob("*.py")))
    return sorted(set(re.findall(r"SAFE_SESSION_[A-Z_]*[A-Z]", sources)), key=SAFE_SESSION_HELP.rindex)


def client_settings() -> Table:
    defaults = {"SAFE_SESSION_ADDR": safe_session_settings.DEFAULT_ADDR}
    rows = [(code(name), code(defaults.get(name, ""))) for name in safe_session_names()]
    return Table(("setting", "default", "meaning"), rows, by_hand=1)


# --- policy.toml -----------------------------------------------------------------------------------------------------


def policy_keys() -> Table:
    rows = [
        *keys_of(tables.RawCa, "ca"),
        *keys_of(tables.RawRole, "roles.NAME"),
        *keys_of(tables.RawIdentity, "identities.NAME"),
    ]
    return Table(("key", "type", "default", "meaning"), [(code(key), kind) for key, kind in rows], by_hand=2)


def keys_of(model: type[BaseModel], place: str) -> Iterator[tuple[str, str]]:
    """Dotted name and type of each key that a table of policy.toml may have."""
    for name, info in model.model_fields.items():
        here = f"{place}.{info.alias or name}"
        inner = [kind for kind in classes(info.annotation) if issubclass(kind, BaseModel)]
        if name == "tokens":
            inner = [tables.RawToken]
        if inner:
            yield from (key for kind in inner for key in keys_of(kind, here))
        else:
            yield here, type_name(info.annotation, tuple(info.metadata))


def classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from classes(part)


def type_name(annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
    """A type of the models in words."""
    if annotation == Duration or get_args(Duration)[1] in metadata:
        return "duration"
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(code(f'"{value}"') for value in arguments)
    if get_origin(annotation) is list:
        return f"list of {'words' if get_origin(arguments[0]) is Literal else 'texts'}"
    if get_origin(annotation) is dict:
        return "table of texts"
    if hasattr(annotation, "__metadata__"):
        return type_name(arguments[0], annotation.__metadata__)
    return " or ".join(type_name(part) for part in arguments if part is not NoneType)


SIMPLE: Final = {str: "text", int: "whole number", bool: "true or false", datetime: "time"}


# --- commands --------------------------------------------------------------------------------------------------------


def verbs() -> Table:
    return Table(("command", "what it does"), [(code(f"signer {verb.words}"), verb.summary) for verb in VERBS])


def fenced(typed: str, printed: str) -> str:
    return f"```text\n$ {typed}\n{printed.rstrip()}\n```"


def signer_help() -> str:
    return fenced("signer --help", render_help())


def safe_session_help() -> str:
    return fenced("safe-session --help", SAFE_SESSION_HELP)


def verb_helps() -> str:
    return "\n\n".join(f"### `signer {verb.words}`\n\n{help_of(verb.words)}" for verb in VERBS)


_INIT: Final = "init <dir>/new --for container --platform edge --ca infisical --ca-fingerprint <ca> --yes"


def recorded(name: str, typed: str) -> str:
    """A command and what it prints, from the first place in tests/data/transcripts/NAME.txt that shows it."""
    _, found, rest = (TRANSCRIPTS / f"{name}.txt").read_text().partition(f"$ signer {typed}\n")
    lines = [line[2:] for line in itertools.takewhile(lambda line: line[:1] in "|!", rest.split("\n"))]
    text = "\n".join([found.strip(), *lines])
    for mark, shown in (
        ("bytes <n>", "bytes 8392704"), ("<dir>", "/etc/signer"),
        ("<ca>", "SHA256:edS3J+HGgzVHYS2CYgjR8ebo1cO69zPG+tsz76bSQHg"),
        ("<sha256>", "…"),
        ("<token-id>", "1f0a77c2b9e4"), ("<n>", "3"), ("<time>", "2027-02-27T09:00:00Z"),
    ):  # fmt: skip
        text = text.replace(mark, shown)
    return f"```text\n{text}\n```"


def help_of(words: str) -> str:
    found = read_words([*words.split(), "--help"])
    if not isinstance(found, str):
        raise TypeError(f"signer {words} has no help")
    return fenced(f"signer {words} --help", found)


# --- HTTP ------------------------------------------------------------------------------------------------------------


def routes() -> Table:
    rows = [
        (
            code(f"{route.method} {route.path}"),
            "no" if route.is_open else "yes",
            link_to(route.body) if route.body is not None else "",
            f"{route.status} {code(route.answer) if isinstance(route.answer, str) else link_to(route.answer)}",
            ", ".join(map(str, route.statuses)),
            route.text,
        )
        for route in ROUTES
    ]
    return Table(("route", "token", "body", "answer", "other statuses", "what it does"), rows)


def link_to(model: type[BaseModel]) -> str:
    return f"[{model.__name__}](#{model.__name__.lower()})"


def queries() -> Table:
    rows = [
        (code(f"{route.path}?{query.name}"), query_type(query), query.text)
        for route in ROUTES
        for query in route.queries
    ]
    return Table(("parameter", "type", "meaning"), rows)


def query_type(query: Query) -> str:
    default = query.schema.get("default")
    return schema_type(query.schema) + ("" if default is None else f", default {code(str(default).lower())}")


def bodies() -> str:
    """Every model of the native API, those that a caller sends included, each once."""
    parts = (part for route in ROUTES for part in (route.body, route.answer, route.accepted))
    models: set[type[BaseModel]] = {Problem}
    models.update(part for part in parts if part is not None and not isinstance(part, str))
    definitions: dict[str, Any] = {}
    for found in models:
        schema = found.model_json_schema(ref_template="{model}")
        definitions |= schema.pop("$defs", {}) | {found.__name__: schema}
    return "\n\n".join(body_of(name, definitions[name]) for name in sorted(definitions))


def body_of(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (code(field), schema_type(facts) + ("" if field in required else ", optional"), facts.get("description", ""))
        for field, facts in schema["properties"].items()
    ]
    about = " ".join(schema.get("description", "").split())
    return "\n\n".join(
        part for part in (f"### {name}", about, Table(("field", "type", "meaning"), rows).render({})) if part
    )


def schema_type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return f"[{schema['$ref']}](#{schema['$ref'].lower()})"
    if "const" in schema:
        return code(str(schema["const"]).lower() if isinstance(schema["const"], bool) else str(schema["const"]))
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(schema_type(part) for part in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {schema_type(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return "map" + (f" of {schema_type(values)}" if isinstance(values, dict) and values else "")
    bounds = [f"{schema[key]}" for key in ("minimum", "maximum", "minLength", "maxLength") if key in schema]
    words = {"string": "text", "integer": "whole number", "boolean": "true or false", "null": "null"}
    return words.get(str(schema.get("type")), "anything") + (f", {' to '.join(bounds)}" if len(bounds) == 2 else "")


def messages() -> Table:
    """What can be asked of the keeper: ops of commands, and those that it answers without a token."""
    direct = [
        text
        for node in ast.walk(trees()[PACKAGE / "service" / "keeper.py"])
        if isinstance(node, ast.match_case) and isinstance(node.pattern, ast.MatchValue)
        for text in texts(node.pattern.value)
    ]
    rows = [(code(op), "yes") for op in commands._READERS] + [(code(op), "no") for op in direct]
    return Table(("op", "needs a token", "meaning"), rows, by_hand=1)


# --- ledger, metrics, evidence ---------------------------------------------------------------------------------------


def event_kinds() -> Table:
    return Table(("event", "written when"), [(code(kind),) for kind in EVENT_KINDS], by_hand=1)


def metric_families() -> Table:
    policy = Policy(
        "", CaKeys(""), {"llmops": cast("Role", None)}, {}, {"": Token("operator", "", 0)}
    )  # a name for each label
    state = core.StateOverview(Head(0, "", 0), {}, {})
    published = ListState(0, 0, 0)
    overview = Overview(0, 0, 0, 0, 0, "local", policy, state, 0, "", published, cosigned=Mark(0, 0))
    shadow = Shadow(lambda _fault: None)
    shadow.compared["llmops"] = shadow.faults["llmops"] = shadow.differences["llmops", "ttl"] = 1
    told = render_metrics({"phone": Counts()}, is_up=True)
    made = metrics.Metrics(lambda: [*overview.gauges(), *told], lambda: ["llmops"], metrics.commit_histogram(), shadow)
    rows = [
        (
            code(family.name + ("_total" if family.type == "counter" else "")),
            family.type,
            ", ".join(code(label) for label in sorted(family.samples[0].labels) if label != "le"),
        )
        for family in text_string_to_metric_families(made.render(by_role=True))
    ]
    return Table(("metric", "type", "labels", "meaning"), rows, by_hand=1)


def evidence_names() -> Table:
    named = {text for _, node in called_with({"write_json", "write_text"}) for text in texts(node)}
    folders = {text for _, node in called_with({"numbered"}) for text in texts(node)}
    named |= {evidence_files.SUMS, evidence_files.LEDGER, evidence_files.OUTCOME, evidence_files.PAGE}
    endings = {"steps": "steps/NN-NAME.json", "smoke": "smoke/NN-TARGET.log"}
    rows = [(code(name),) for name in sorted({*named, *(endings.get(folder, f"{folder}/") for folder in folders)})]
    return Table(("file", "content"), rows, by_hand=1)


def evidence_findings() -> Table:
    found = [entry for entry in CATALOGUE.values() if entry.code.startswith("evidence_") and "Finding" in entry.subject]
    return Table(("finding", "meaning", "action"), [(code(entry.code), entry.meaning, entry.action) for entry in found])


# --- limits ----------------------------------------------------------------------------------------------------------


def limits() -> Table:
    hours = 3600
    rows = (
        ("body of a request", f"{sign_request.MAX_BODY // 1024} KiB"),
        ("public key in a request", f"{MAX_PUBLIC_KEY // 1024} KiB"),
        ("policy file", f"{reading.MAX_POLICY_BYTES // 1024**2} MiB"),
        ("name of a role", f"{policy_file.MAX_ROLE_NAME} characters"),
        ("CA key file", f"{key_text.MAX_KEY_FILE // 1024} KiB"),
        ("lifetime of a certificate", f"{policy_file.DEFAULT_CEILING // hours} hour unless the role sets another"),
        ("lifetime of a certificate, at most", f"{policy_file.CEILING // hours} hours"),
        (
            "principals in a certificate",
            f"{MAX_PRINCIPALS}, each 256 characters of letters, digits and `._@:+=/$\\~-`",
        ),
        ("key id", f"{MAX_KEY_ID} bytes of letters, digits and `._@=:+/-`"),
        ("reason", f"{model.MAX_REASON} printable characters, one line"),
        ("page of certificates or operations", f"{commands.MAX_PAGE}"),
        ("certificates are back-dated by", f"{model.BACKDATE} seconds, for hosts whose clock is behind"),
        (
            "clock behind the ledger's newest event",
            f"{core.CLOCK_TOLERANCE} seconds; beyond that nothing is signed",
        ),
        ("workers and threads of the api", f"{settings.MAX_WORKERS} and {settings.MAX_THREADS}"),
    )
    return Table(("what", "limit"), rows)


def bounds() -> Table:
    """Every public constant of a module that is a number, with the remark behind it."""
    rows = []
    for module, tree in trees().items():
        path = module.relative_to(PACKAGE)
        lines = module.read_text().splitlines()
        for node in tree.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            name = node.target.id
            value = None if name.startswith("_") else getattr(module_of(path), name, None)
            if name.isupper() and isinstance(value, int | float) and not isinstance(value, bool):
                _, _, remark = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
                remark = re.sub(r"noqa: \S+ - ", "", remark).replace("|", "\\|")
                rows.append((code(f"signer/{path}"), code(name), f"{value:,}", remark))
    return Table(("module", "constant", "value", "remark"), rows)


def module_of(path: Path) -> Any:
    return importlib.import_module(".".join(("signer", *path.with_suffix("").parts)).removesuffix(".__init__"))


# --- blocks of commands ----------------------------------------------------------------------------------------------


def marked_blocks() -> Table:
    """What the tests lack for blocks of commands in README and the runbooks."""
    marks = count_marks(read_command_blocks())
    rows = [
        (lacks, "run with a stand-in" if stands_in else "not run", str(count))
        for (lacks, stands_in), count in sorted(marks.items())
    ]
    return Table(("missing", "so the block is", "blocks"), rows)


# --- rooms and modules -----------------------------------------------------------------------------------------------


def layers() -> str:
    """The layers of import-linter, and its contracts."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    (rooms,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    lines = [*rooms[:-1], "root modules"]
    return "\n".join(["```text", *lines, "```", "", *(f"- {contract['name']}." for contract in contracts)])


def modules() -> str:
    """The modules of each room with the first sentence of their docstrings."""
    rooms: dict[str, list[tuple[str, str]]] = {}
    abouts: dict[str, str] = {}
    for module, tree in trees().items():
        path = module.relative_to(PACKAGE)
        sentence = first_sentence(ast.get_docstring(tree) or "")
        room = path.parts[0] if len(path.parts) > 1 else ""
        if path.name == "__init__.py" and len(path.parts) == 2:
            abouts[room] = sentence
        else:
            rooms.setdefault(room, []).append((code(f"signer/{path}"), sentence))
    parts = []
    for room, rows in sorted(rooms.items()):
        title = f"`signer/{room}/`: {lower_first(abouts[room])}" if room else "Root modules: what every room may use"
        parts.append(f"### {title.removesuffix('.')}\n\n{Table(('module', 'what lives there'), rows).render({})}")
    return "\n\n".join(parts)


def first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")
    found = re.match(r".*?[.?!](?= |$)", paragraph)
    return (found[0] if found is not None else paragraph).removesuffix(".")


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:] if text.partition(" ")[0][1:].islower() else text


FACTS: Final[Mapping[str, Fact]] = {
    "settings": service_settings,
    "shown-init": lambda: recorded("init", _INIT),
    "marked blocks": marked_blocks,
    "shown-status": lambda: recorded("status", "status"),
    "shown-policy-list": lambda: recorded("policy_list", "policy list"),
    "shown-token-revoke": lambda: recorded("policy_edit", "token revoke deploy-agent --write"),
    "settings of ca render": ca_render_settings,
    "settings of safe-session": client_settings,
    "policy keys": policy_keys,
    "commands": verbs,
    "help of signer": signer_help,
    "help of safe-session": safe_session_help,
    "help of each command": verb_helps,
    "routes": routes,
    "queries": queries,
    "bodies": bodies,
    "messages": messages,
    "errors": render_markdown,
    "event kinds": event_kinds,
    "metrics": metric_families,
    "evidence files": evidence_names,
    "evidence findings": evidence_findings,
    "limits": limits,
    "bounds": bounds,
    "layers": layers,
    "modules": modules,
}
