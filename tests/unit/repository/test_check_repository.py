"""`signer check` in a checkout: every check of the repository's own files is good here, and each can fail alone."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from signer.cli import check as verbs_check
from signer.cli.catalogue import VERBS
from signer.safe_session.arguments import Usage, parse_arguments
from signer.service.check_repository import (
    BASE,
    CODES,
    FILES,
    KEY_CODES,
    LOCAL,
    PREFLIGHT,
    README,
    SHADOW,
    check_repository,
    is_checkout,
    read_catalogue,
)
from signer.service.checks import Check
from signer.service.composefile import Place, parse_compose
from signer.service.runbooks import GATE
from tests.parts.command import make_world, run
from tests.parts.keys import KeyRing

ROOT = Path(__file__).parents[3]
KNOWN = {f"signer {verb.words}" for verb in VERBS} | {"safe-session ssh", "safe-session exec"}
CONTAINERFILE = "Containerfile"
UNIT = "scripts/systemd/signer-api.service"
RUNBOOK = "runbooks/ledger.md"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of all that is looked at, and of all that documents may name."""
    root = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("overlays", "runbooks", "scripts", "signer", "tests", ".ci"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in (CONTAINERFILE, README, "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copyfile(ROOT / name, root / name)
    return root


def checked(root: Path) -> list[Check]:
    return list(check_repository(root, KNOWN))


def failed(root: Path) -> list[tuple[str, str]]:
    return [(check.code, check.detail) for check in checked(root) if check.outcome != "ok"]


def test_this_repository_is_in_order() -> None:
    assert failed(ROOT) == []
    codes = [check.code for check in checked(ROOT)]
    assert len(codes) == len(set(codes)) == 17


def test_the_copy_is_in_order_and_stays_as_it_was(tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    assert failed(tree) == []
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


# What is changed (file, before, after), and all that is then said.
FAULTS: dict[str, tuple[str, str, str, str, str]] = {
    "a compose file in another form": (
        BASE, "cap_drop: [ALL]", "cap_drop: {ALL}",
        "repository_compose_form", f"{BASE}: line ",
    ),
    "the key with a default": (
        LOCAL, "_CA_KEY_FILE:?name the file that holds the rendered CA key}", "_CA_KEY_FILE:-/run/ca}",
        "repository_overlay_key_variable",
        f"{LOCAL} mounts ${{PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE:-/run/ca}}",
    ),
    "the key without a message": (
        LOCAL, ":?name the file that holds the rendered CA key}", "}",
        "repository_overlay_key_variable", f"{LOCAL} mounts ${{PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE}}",
    ),
    "the key from a fixed path": (
        LOCAL, "${PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE:?name the file that holds the rendered CA key}", "/run/ca",
        "repository_overlay_key_variable", f"{LOCAL} mounts /run/ca",
    ),
    "a mount that can be written": (
        LOCAL, "read_only: true", "read_only: false",
        "repository_overlay_key_mount", f"{LOCAL} has {{mount}}.read_only: false, not true",
    ),
    "a mount that says nothing of writing": (
        LOCAL, "        read_only: true\n", "",
        "repository_overlay_key_mount", f"{LOCAL} has {{mount}}.read_only: nothing, not true",
    ),
    "a mount that the engine may create": (
        LOCAL, "create_host_path: false", "create_host_path: true",
        "repository_overlay_key_mount", f"{LOCAL} has {{mount}}.bind.create_host_path: true, not false",
    ),
    "a mount somewhere else": (
        LOCAL, "target: /run/signer-ca/ca", "target: /etc/ca",
        "repository_overlay_key_mount", f"{LOCAL} has {{mount}}.target: /etc/ca, not /run/signer-ca/ca",
    ),
    "an overlay in the mode of before": (
        LOCAL, "SIGNER_MODE: local", "SIGNER_MODE: vault", "repository_overlay_mode",
        f"{LOCAL} has services.safe-session-api.environment.SIGNER_MODE: vault, not local",
    ),
    "a shadow that signs": (
        SHADOW, "SIGNER_MODE: shadow", "SIGNER_MODE: local", "repository_overlay_mode",
        f"{SHADOW} has services.safe-session-api.environment.SIGNER_MODE: local, not shadow",
    ),
    "a shadow's mount that can be written": (
        SHADOW, "read_only: true", "read_only: false",
        "repository_overlay_key_mount", f"{SHADOW} has {{mount}}.read_only: false, not true",
    ),
    "a shadow's key with a default": (
        SHADOW, "_CA_KEY_FILE:?name the file that holds the rendered CA key}", "_CA_KEY_FILE:-/run/ca}",
        "repository_overlay_key_variable",
        f"{SHADOW} mounts ${{PLATFORM_RUNTIME_SAFE_SESSION_CA_KEY_FILE:-/run/ca}}",
    ),
    "a shadow that changes more": (
        SHADOW, "    volumes:\n", "    user: root\n    volumes:\n",
        "repository_overlay_alone", f"{SHADOW} sets services.safe-session-api.user",
    ),
    "an overlay that changes more": (
        LOCAL, "    volumes:\n", "    user: root\n    volumes:\n",
        "repository_overlay_alone", f"{LOCAL} sets services.safe-session-api.user",
    ),
    "an overlay with a second mount": (
        LOCAL, "    volumes:\n", "    tmpfs:\n      - /tmp\n    volumes:\n",
        "repository_overlay_alone", f"{LOCAL} sets services.safe-session-api.tmpfs.0",
    ),
    "a base that moved over by itself": (
        BASE, "SIGNER_MODE: vault", "SIGNER_MODE: local", "repository_base_mode",
        f"{BASE} has services.safe-session-api.environment.SIGNER_MODE: local, not vault",
    ),
    "a root file system that can be written": (
        BASE, "    read_only: true\n    cap_drop", "    cap_drop",
        "repository_base_root", f"{BASE} has services.safe-session-api.read_only: nothing, not true",
    ),
    "capabilities that stay": (
        BASE, "cap_drop: [ALL]", "cap_drop: [NET_RAW]",
        "repository_base_capabilities", f"{BASE} has services.safe-session-api.cap_drop.0: NET_RAW, not ALL",
    ),
    "a privileged service": (
        BASE, "    cap_drop:", "    privileged: true\n    cap_drop:",
        "repository_base_capabilities", f"{BASE} has services.safe-session-api.privileged",
    ),
    "privileges that can be gained": (
        BASE, "no-new-privileges:true", "no-new-privileges:false", "repository_base_privileges",
        f"{BASE} has services.safe-session-api.security_opt.0: no-new-privileges:false, not no-new-privileges:true",
    ),
    "a misspelt setting in a compose file": (
        BASE, "SIGNER_LISTEN:", "SIGNER_LISTN:", "repository_settings", f"{BASE} names SIGNER_LISTN",
    ),
    "a misspelt setting in the image": (
        CONTAINERFILE, "SIGNER_API_USER", "SIGNER_APIUSER", "repository_settings", "Containerfile names SIGNER_APIUSER",
    ),
    "a misspelt setting in a unit": (
        UNIT, "SIGNER_RUN_DIR", "SIGNER_RUNDIR", "repository_settings", f"{UNIT} names SIGNER_RUNDIR",
    ),
    "a path in a runbook's words": (
        RUNBOOK, "First, always", "See scripts/cutover/other.sh. First, always",
        "repository_paths", f"{RUNBOOK} names scripts/cutover/other.sh",
    ),
    "a link in a runbook": (
        RUNBOOK, "First, always", "See [this](gone.md). First, always",
        "repository_paths", f"{RUNBOOK} links to gone.md",
    ),
    "a path in README's commands": (
        README, "    scripts/quickstart  ", "    scripts/quickstarts ",
        "repository_paths", f"{README} names scripts/quickstarts",
    ),
    "a verb in a runbook": (
        RUNBOOK, "`signer ledger export`", "`signer ledger dump`",
        "repository_verbs", f"{RUNBOOK} shows signer ledger dump",
    ),
    "a verb in README": (
        README, "`signer policy check` lists", "`signer policies check` lists",
        "repository_verbs", f"{README} shows signer policies check",
    ),
    "a verb of the client": (
        RUNBOOK, "First, always", "`safe-session login rs2000`: First, always",
        "repository_verbs", f"{RUNBOOK} shows safe-session login rs",
    ),
    "a way to end Vault": (
        RUNBOOK, "First, always", "`systemctl stop vault`. First, always",
        "repository_vault_gate", f"{RUNBOOK} shows systemctl stop vault",
    ),
    "a code that the table lacks": (
        CODES, "| `ca_key_has_links` |", "| `ca_key_has_link` |",
        "repository_preflight_codes", f"{CODES} does not tell ca_key_has_links",
    ),
    "a row that cannot be read": (
        CODES, "| `ca_key_has_links` |", "| ca_key_has_links |",
        "repository_preflight_codes", f"{CODES} has a row that cannot be read, or twice: | ca_key_has_links |",
    ),
    "a table with another head": (
        CODES, "| code | what it says", "| codes | what it says",
        "repository_preflight_codes", f"{CODES} has no table of codes",
    ),
    "other words than the script's": (
        CODES, "| name the file itself |", "| name the file |", "repository_preflight_actions",
        f"ca_key_is_a_link: {CODES} says name the file, the preflight name the file itself",
    ),
    "a code of the keeper alone": (
        KEY_CODES, '"ca_key_has_links"', '"ca_key_has_hard_links"',
        "repository_key_codes", "the keeper says ca_key_has_hard_links, the preflight does not",
    ),
    "a keeper whose codes cannot be found": (
        KEY_CODES, "BadKeyFile(", "Fault(", "repository_key_codes",
        f"{KEY_CODES} raises no code in a form that is read here",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_told_alone(name: str, tree: Path) -> None:
    path, before, after, code, detail = FAULTS[name]
    text = (tree / path).read_text()
    assert before in text
    (tree / path).write_text(text.replace(before, after))
    found = failed(tree)
    assert {code for code, _ in found} == {code}
    assert found[0][1].startswith(detail.replace("{mount}", "services.safe-session-api.volumes.0"))


@pytest.mark.parametrize("name", [name for name in FILES if name != CODES])
def test_a_file_that_is_missing_is_told_once_and_what_needs_it_is_left_out(name: str, tree: Path) -> None:
    everything = {check.code for check in checked(tree)}
    (tree / name).unlink()
    found = [(code, detail) for code, detail in failed(tree) if code != "repository_paths"]
    assert found == [("repository_files", f"{name}: No such file or directory")]
    assert {check.code for check in checked(tree)} < everything


def test_a_file_that_is_no_text_is_told(tree: Path) -> None:
    (tree / LOCAL).write_bytes(b"\xff\xfe")
    assert failed(tree) == [("repository_files", f"{LOCAL}: is no text")]


def test_a_code_that_the_preflight_no_longer_says_is_told(tree: Path) -> None:
    text = (tree / PREFLIGHT).read_text()
    (tree / PREFLIGHT).write_text(re.sub(r'^    "warn clock_unknown"\n', "", text, flags=re.MULTILINE))
    told = f"{CODES} tells clock_unknown, which the preflight never says"
    assert failed(tree) == [("repository_preflight_codes", told)]


@pytest.mark.parametrize(
    "line", ['"oops ca_key_new"', "ca_key_new", '"ok   ca_key_path"'], ids=["status", "no quotes", "twice"]
)
def test_a_catalogue_that_cannot_be_read_is_told(line: str, tree: Path) -> None:
    text = (tree / PREFLIGHT).read_text()
    (tree / PREFLIGHT).write_text(
        text.replace("    # status, code, next action\n", f'    "ok   ca_key_path"\n    {line}\n')
    )
    assert [code for code, _ in failed(tree)] == ["repository_preflight_codes"]


def test_the_gated_section_may_show_how_vault_ends(tree: Path) -> None:
    (tree / RUNBOOK).write_text(f"# Clean up: {GATE}\n\n    systemctl stop vault\n")
    assert failed(tree) == []


def test_the_catalogue_is_read_as_bash_reads_it() -> None:
    script = (ROOT / PREFLIGHT).read_text()
    listed = subprocess.run(["bash", ROOT / PREFLIGHT, "--codes"], capture_output=True, text=True, check=True).stdout
    sourced = f'. {ROOT / PREFLIGHT}; load_catalogue; for c in "${{codes[@]}}"; do echo "${{next_of[$c]}}"; done'
    actions = subprocess.run(["bash", "-c", sourced], capture_output=True, text=True, check=True).stdout
    assert list(read_catalogue(script)) == listed.split()
    assert list(read_catalogue(script).values()) == actions.splitlines()
    assert re.findall(r"^\| `(\S+)` \|.*\|.*\|$", (ROOT / CODES).read_text().partition("## All codes")[2], re.M) == (
        listed.split()
    )


def test_verbs_of_the_client_are_those_that_it_knows() -> None:
    for words in (["ssh", "host"], ["exec", "--", "true"]):
        assert parse_arguments(words).verb == words[0]
        assert f"safe-session {words[0]}" in verbs_check._LOGIN_VERBS
    assert len(verbs_check._LOGIN_VERBS) == 2
    with pytest.raises(Usage):
        parse_arguments(["login", "host"])


# --- signer check ----------------------------------------------------------------------------------------------------


def test_signer_check_looks_at_a_checkout_and_json_says_the_same(
    tree: Path, tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world(tmp_path, keyring, monkeypatch)
    without = run("check").out.splitlines()
    assert not any("repository_" in line for line in without)
    monkeypatch.setattr(verbs_check, "ABOVE_PACKAGE", tree)
    found = json.loads(run("check", "--json").out)
    codes = [check["code"] for check in found["checks"] if check["code"].startswith("repository_")]
    assert codes == [check.code for check in checked(tree)]
    assert re.findall(r"^ok +(repository_\w+)", run("check").out, re.MULTILINE) == codes
    (tree / LOCAL).write_text((tree / LOCAL).read_text().replace("read_only: true", "read_only: false"))
    broken = run("check", "--json")
    assert broken.status == 1
    assert json.loads(broken.out)["failed"] == found["failed"] + 1
    assert "FAIL  repository_overlay_key_mount" in run("check").out


def test_what_is_installed_is_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "signer").mkdir()
    assert not is_checkout(tmp_path)
    (tmp_path / "overlays").mkdir()
    assert is_checkout(tmp_path)
    assert verbs_check.ABOVE_PACKAGE == ROOT
    assert is_checkout(ROOT)


# --- the reader of compose files -------------------------------------------------------------------------------------


def flattened(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flattened(inner, (*place, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from flattened(inner, (*place, str(number)))
    elif value is not None:
        yield place, str(value).lower() if isinstance(value, bool) else str(value)


FORMS = [
    "a: b\nc:\n  d: e # f\n  g:\n    - h\n    - i: j\n      k: l\n",
    'a: ["b:c", d]\ne: "f#g"\n',
    "# a\n\na: ${B:-http://c:1} d\n",
    "a:\n  - b:c\n  -\n    d: e\n",
]


@pytest.mark.parametrize("text", [*((ROOT / name).read_text() for name in (BASE, LOCAL, SHADOW)), *FORMS])
def test_compose_files_are_read_as_yaml(text: str) -> None:
    yaml: Any = importlib.import_module("yaml")  # comes with podman-compose, and without types
    assert parse_compose(text) == dict(flattened(yaml.safe_load(text)))


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: c}", "a: &b c", "a: *b", "a: |\n  b", "a: >\n  b", "a: !b c", "<<: *a", "a: 'b'", "a: b\na: c",
        "a: b: c", "a:\n- b", "- a\nb: c", "a: b\n  c: d", "\ta: b", "a:\tb", "a", "? a", "---", "a: [b, [c]]",
        "a: ~", "a: - b", 'a: "b\\n"', "a: ${B:-c: d}", "a:\n  - b\n  c: d", "a: b\n  c", "a: é", "a: b#c",
        'a: "b # c"', 'a: ["b,c"]',
    ],
)  # fmt: skip
def test_another_form_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line \d: "):
        parse_compose(text)
