"""An error about a file names its path, and the argument or setting that the path came from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from signer.cli.parser import load_all
from signer.cli.places import Place, name_places, places_of_settings, with_places
from signer.errors import SignerError
from tests.parts.command import run

PLACES = (Place("/a/b", "--file"), Place("/var/d", "SIGNER_DATA_DIR"), Place("link", "--out"))
VAULT = "policy import-vault --address http://127.0.0.1:9 --mount ssh"
# Each argument that names a file, with a command line that gets as far as that file; {} is its path.
READ = {
    ("ca inspect", "FILE"): "ca inspect {}",
    ("hosts install", "--ca"): "hosts install edge1 --principals a=b --ca {}",
    ("hosts install", "--publisher"): "hosts install edge1 --principals a=b --ca {good} --publisher {}",
    ("hosts add", "--keys"): "hosts add edge1 --keys {}",
    ("policy check", "FILE"): "policy check {}",
    ("policy list", "--file"): "policy list --file {}",
    ("policy import-vault", "--token-file"): f"{VAULT} --token-file {{}}",
    ("policy import-vault", "--ca-file"): f"{VAULT} --token-file {{token}} --ca-file {{}}",
    ("token list", "--file"): "token list --file {}",
    ("token renew", "--file"): "token renew ci --expires 9d --file {}",
    ("token revoke", "--file"): "token revoke ci --file {}",
    ("identity add", "--file"): "identity add ci --kind agent --file {}",
    ("identity remove", "--file"): "identity remove ci --file {}",
    ("role add", "--file"): "role add web --principal www --file {}",
    ("role show", "--file"): "role show web --file {}",
    ("key enrol", "FILE"): "key enrol {}",
    ("certs list", "--segment"): "certs list --segment {}",
    ("certs show", "--segment"): "certs show 1 --segment {}",
    ("certs who", "--segment"): "certs who --segment {}",
    ("events list", "--segment"): "events list --segment {}",
    ("ledger export", "--segment"): "ledger export --segment {}",
    ("witness list", "--state"): "witness list --state {}",
    ("cutover plan", "--config"): "cutover plan --config {}",
    ("cutover parity", "--config"): "cutover parity --config {}",
    ("cutover apply", "PLAN"): "cutover apply {}",
    ("cutover status", "--config"): "cutover status --config {}",
    ("cutover rollback", "--config"): "cutover rollback --reason x --config {}",
    ("decommission plan", "--config"): "decommission plan --config {}",
    ("decommission apply", "PLAN"): "decommission apply {}",
    ("decommission status", "--config"): "decommission status --config {}",
    ("evidence verify", "DIR"): "evidence verify {}",
    **{
        (verb, "--token-file"): f"{verb} {words} --token-file {{}}".replace("  ", " ")
        for verb, words in {
            "hosts list": "", "hosts remove": "edge1", "hosts seen": "", "requests list": "",
            "requests show": "r-aaaaaaaaaa", "requests approve": "r-aaaaaaaaaa",
            "requests deny": "r-aaaaaaaaaa --reason x", "requests watch": "", "waivers list": "",
            "waivers end": "w-aaaaaaaaaa", "incidents list": "", "incidents show": "i-aaaaaaaaaa",
            "incidents close": "i-aaaaaaaaaa --reference c", "revoke": "--serial 1 --reason x", "revocations": "",
            "freeze": "all --reason x", "unfreeze": "all", "freezes": "", "whoami": "",
        }.items()
    },
}  # fmt: skip
WRITTEN = {
    ("init", "DIR"): "init {} --yes",
    ("ca new", "--out"): "ca new --out {}",
    ("publish", "DIR"): "publish {}",
    ("witness key", "--state"): "witness key --name w1 --state {}",
}
# Reached only when a service, a ledger or another machine has answered; the same reader or writer as one above.
LATER = {
    ("policy explain", "--key"), ("approval-key add", "--webauthn"),
    ("ca render", "--to"), ("hosts install", "--kit"), ("hosts install", "--token-file"), ("hosts add", "--token-file"),
    ("policy import-vault", "--out"), ("token new", "--file"), ("approval-key add", "--file"),
    ("requests approve", "--key"), ("publish", "--publisher"), ("ledger verify", "--checkpoint"),
    ("ledger verify", "--policy"), ("ledger verify", "--segment"), ("ledger witness", "--out"),
    ("ledger backup", "FILE"), ("ledger restore", "FILE"), ("ledger follow", "--start-from"),
    ("ledger follow", "--token-file"), ("ledger archive", "FILE"), ("witness serve", "--state"),
    ("cutover plan", "--out"), ("decommission plan", "--out"), ("decommission apply", "--config"),
    ("evidence verify", "--config"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in os.environ:
        if name.startswith(("SIGNER_", "SAFE_SESSION_", "INFISICAL_")):
            monkeypatch.delenv(name)
    (tmp_path / "policy.toml").write_text("mine = ")
    (tmp_path / "good").write_text("x")
    (tmp_path / "token").write_text("hvs.x")
    (tmp_path / "token").chmod(0o400)
    monkeypatch.setenv("SIGNER_POLICY_FILE", str(tmp_path / "policy.toml"))
    monkeypatch.setenv("SIGNER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("SIGNER_RUN_DIR", str(tmp_path / "run"))
    return tmp_path


def said(line: str, path: Path) -> str:
    folder = path.parent.parent if path.name == "file" else path.parent
    ran = run(*line.format(path, good=folder / "good", token=folder / "token").split())
    assert ran.status == 1, ran.out + ran.err
    return ran.out + ran.err


def test_every_argument_that_names_a_file_is_in_a_table() -> None:
    named = {
        (entry.words, param.opts[-1] if param.opts[-1].startswith("-") else param.human_readable_name)
        for entry, verb in load_all()
        for param in verb.params
        if type(param.type).__name__ == "File"
    }
    assert named == READ.keys() | WRITTEN.keys() | LATER


@pytest.mark.parametrize("verb, name", READ)
def test_a_file_that_is_not_there_is_named_with_its_argument(folder: Path, verb: str, name: str) -> None:
    path = folder / "nowhere" / "file"
    found = said(READ[verb, name], path)
    assert str(path) in found
    assert name in found


@pytest.mark.parametrize("verb, name", [*READ, *WRITTEN])
def test_a_path_below_a_file_is_named_with_its_argument(folder: Path, verb: str, name: str) -> None:
    path = folder / "good" / "file"
    found = said((READ | WRITTEN)[verb, name], path)
    assert str(path) in found
    assert name in found


# What is in these files is not looked at before something else is there.
UNREAD = {("hosts install", "--ca"), ("hosts install", "--publisher"), ("policy import-vault", "--ca-file")}


@pytest.mark.parametrize("verb, name", [key for key in READ if key[1] != "--token-file" and key not in UNREAD])
def test_a_file_with_nothing_that_can_be_used_is_named_with_its_argument(folder: Path, verb: str, name: str) -> None:
    path = folder / "garbage"
    path.write_text("x = = y\n")
    path.chmod(0o600)
    found = said(READ[verb, name], path)
    assert str(path) in found
    assert name in found


def test_a_setting_that_an_error_names_has_its_path(folder: Path) -> None:
    assert f"error: {folder / 'policy.toml'} (SIGNER_POLICY_FILE): 1 problem" in run("policy", "list").err
    assert f"SIGNER_DATA_DIR ({folder / 'data'}) cannot be used" in run("ledger", "promote").err


@pytest.mark.parametrize(
    "text, expected",
    [
        ("/a/b cannot be read", "/a/b (--file) cannot be read"),
        ("/a/b (--file) cannot be read", "/a/b (--file) cannot be read"),
        ("'/a/b' is a link", "'/a/b' (--file) is a link"),
        ("/a/b (the token) is long", "/a/b (--file, the token) is long"),
        ("/a/b/c.d cannot be written", "/a/b/c.d (in --file) cannot be written"),
        ("b: 2 problems", "/a/b (--file): 2 problems"),
        ("policy: b: 1 problem (policy_refused)", "policy: /a/b (--file): 1 problem (policy_refused)"),
        ("with this edit b: 1 problem", "with this edit /a/b (--file): 1 problem"),
        ("run `x /a/b`", "run `x /a/b`"),
        ("/a/bc and /x/a/b are others", "/a/bc and /x/a/b are others"),
        ("there is none at SIGNER_DATA_DIR", "there is none at SIGNER_DATA_DIR (/var/d)"),
        ("SIGNER_DATA_DIR: /var/d is small", "SIGNER_DATA_DIR: /var/d is small"),
        ("`SIGNER_DATA_DIR=/x signer check`", "`SIGNER_DATA_DIR=/x signer check`"),
        ("the policy file is long", "the policy file (/a/b, --file) is long"),
        ("the policy file . (--file) is long", "the policy file . (--file) is long"),
        ("link cannot be read, it is a link", "link (--out) cannot be read, it is a link"),
        ("it is a link", "it is a link"),
        ("there is no kit in link", "there is no kit in link (--out)"),
    ],
)
def test_what_is_added_to_a_sentence(text: str, expected: str) -> None:
    assert with_places(text, PLACES) == expected


def test_a_secret_in_the_place_of_a_path_is_not_shown() -> None:
    environ = {"INFISICAL_CLIENT_SECRET_FILE": "geheim", "SAFE_SESSION_TOKEN_FILE": "sgn_x", "SIGNER_DATA_DIR": "/d"}
    found = {place.name: place.path for place in places_of_settings(environ)}
    assert found["SIGNER_DATA_DIR"] == "/d"
    assert found.keys().isdisjoint({"INFISICAL_CLIENT_SECRET_FILE", "SAFE_SESSION_TOKEN_FILE"})


@pytest.mark.parametrize(
    "text, hint, expected",
    [
        ("the ledger cannot be used", "fix SIGNER_DATA_DIR", "fix SIGNER_DATA_DIR (/d)"),
        ("no service listens on /d/x", "set SIGNER_DATA_DIR", "set SIGNER_DATA_DIR"),
        ("SIGNER_DATA_DIR is full", "make SIGNER_DATA_DIR larger", "make SIGNER_DATA_DIR larger"),
    ],
)
def test_a_hint_names_the_path_of_a_setting_where_the_text_names_no_file(text: str, hint: str, expected: str) -> None:
    error = SignerError("code", text, hint)
    name_places(error, (), {"SIGNER_DATA_DIR": "/d"})
    assert error.hint == expected


@pytest.mark.parametrize(
    "line, named", [("token new ci --expires 9d --file {}", "--file"), ("ca inspect {good}", "SIGNER_POLICY_FILE")]
)
def test_a_warning_about_a_policy_names_its_path_too(folder: Path, line: str, named: str) -> None:
    path = folder / "policy.toml"
    ran = run(*line.format(path, good=folder / "good").split())
    assert f"{path} ({named}): 1 problem" in ran.err
