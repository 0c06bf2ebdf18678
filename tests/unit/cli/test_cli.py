"""`signer` beyond its transcripts: JSON and text agree, nothing makes a stack, help is quick, ends are quiet."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st

from signer.cli import main as cli
from signer.cli.parser import load_all
from signer.errors import SignerError
from signer.ledger.audit import verify
from signer.ledger.chain import entry_hash
from signer.ledger.fold import fold_all
from signer.ledger.reader import LedgerReader
from signer.ledger.store import Ledger
from signer.model import Event
from signer.policy.file import parse_policy
from signer.policy.tokens import token_digest
from signer.units import plain
from tests.parts.command import POLICY, World, issued, make_world, run, tamper
from tests.parts.keys import KeyRing

VERBS = {entry.words: verb for entry, verb in load_all()}
ONE_SHOT = [words for words in VERBS if words not in ("serve", "api", "keeper", "notices run", "witness serve")]
ANY_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=30)
IN_A_WORLD = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def world(tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> World:
    return make_world(tmp_path, keyring, monkeypatch)


def in_a_process(*words: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """`signer WORDS` as a process of its own, in the environment of the test's world."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    given_how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **how}
    return subprocess.run(
        [sys.executable, "-P", "-m", "signer", *words],
        text=True,
        env={**environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        **given_how,
    )


# --- text and JSON ----------------------------------------------------------------------------------------------


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value not in (None, "", 0) and not isinstance(value, bool):
        yield str(value)


@pytest.mark.parametrize(
    "words",
    [
        "check",
        "ca inspect ca",
        "ca inspect ca.pub",
        "ca inspect nowhere",
        "policy check",
        "policy explain llmops --as deploy-agent --key user.pub",
        "policy explain deploy --as operator --ttl 3h",
        "certs show 3",
        "ledger head",
        "ledger verify",
        "ledger rebuild",
    ],
)
def test_json_holds_no_fact_that_the_text_lacks(world: World, words: str) -> None:
    text, as_json = run(*words.split()), run(*words.split(), "--json")
    shown = " ".join(text.out.replace("critical options: ", "").split())
    told = json.loads(as_json.out)
    told.pop("code", None)  # stands for the sentence beside it, for programs
    facts = [fact for fact in _leaves(told) if fact not in ("ok", "warn", "fail")]
    assert text.status == as_json.status
    assert len(facts) > 1
    assert [fact for fact in facts if " ".join(fact.split()) not in shown] == []


@pytest.mark.parametrize(
    "words",
    [*ONE_SHOT[:-1], "ca inspect ca", "policy check policy.toml", "policy explain llmops --as late", "certs show 2"],
)
def test_the_text_holds_no_fact_that_json_lacks(world: World, words: str) -> None:
    """Facts are the words with a digit in them: numbers, times, hashes, fingerprints, modes."""
    needed = [param for param in VERBS[words].params if param.required] if words in VERBS else []
    reaches_service = words in VERBS and any(param.name == "token_file" for param in VERBS[words].params)
    if needed or (reaches_service and words != "whoami"):
        return  # not a whole command, or one that reads a service
    if words in ("ledger export", "ledger promote", "certs who", "notices test", "witness list"):
        return  # reads a followed copy, a host's log, channels or the state of a witness
    if words == "reload":
        world.prepare(["launcher", "changed"])
    if words == "ledger key":
        world.prepare(["witnessed"])
    if words in ("whoami", "hosts key", "ledger checkpoint"):
        world.prepare(["keeper"])
        world.prepare(["set", "SAFE_SESSION_TOKEN_FILE", f"{world.folder}/operator.token"])
    text, as_json = run(*words.split()), run(*words.split(), "--json")
    told = json.dumps(json.loads(as_json.out), ensure_ascii=False)
    facts = set(re.findall(r"[\w+/:.@-]*\d[\w+/:.@-]*", text.out))
    facts = {part for fact in facts for part in re.split(r"(?<=\d):(?=[0-9a-f]{64})", fact.strip(".:"))}
    assert facts
    assert {fact for fact in facts if fact not in told} == set()


def test_an_error_is_the_same_in_text_and_json(world: World) -> None:
    world.prepare(["sql", "UPDATE events SET actor = 'x' WHERE seq = 4"])
    text, as_json = run("ledger", "verify"), run("ledger", "verify", "--json")
    error = json.loads(as_json.out)["error"]
    assert (text.status, as_json.status) == (1, 1)
    assert as_json.err == text.err == f"signer: error: {error['text']}\nsigner: hint: {error['hint']}\n"
    assert (error["code"], error["seq"]) == ("ledger_broken", 4)


# --- tokens and exports, as somebody else would use them ----------------------------------------------------------


def test_a_new_token_opens_with_its_policy_line(world: World) -> None:
    made = json.loads(run("token", "new", "operator", "--expires", "90d", "--json").out)
    assert list(made) == ["token", "sha256", "expires", "policy_line"]
    assert token_digest(made["token"]) == made["sha256"]
    assert tomllib.loads(made["policy_line"])["tokens"][0]["sha256"] == made["sha256"]
    text = (world.folder / "policy.toml").read_text() + made["policy_line"] + "\n"
    identity, token = parse_policy(text.encode()).authenticate(made["token"], 1_800_000_000)
    assert identity.name == "operator"
    assert 89 * 86_400 < token.expires - (world.folder / "policy.toml").stat().st_mtime < 91 * 86_400


def test_the_token_is_alone_on_stdout_and_never_the_same(world: World) -> None:
    first, second = (run("token", "new", "operator", "--expires", "1d") for _ in range(2))
    assert re.fullmatch(r"sgn_[0-9A-Za-z]{49}\n", first.out)
    assert first.out != second.out
    assert first.out.strip() not in first.err
    assert token_digest(first.out.strip()) in first.err


def test_anybody_can_verify_an_export(world: World) -> None:
    with closing(Ledger(world.folder / "data")) as ledger:
        ledger.commit([issued(4, reason="naïve \u009b31m \u202e 日本 \U0001f511")], 1_750_000_000_000)
    out = run("ledger", "export").out
    assert out.isascii()
    prev = "0" * 64
    for number, line in enumerate(out.splitlines(), start=1):
        entry = json.loads(line)
        digest = entry.pop("hash")
        assert (entry["seq"], entry["prev"]) == (number, prev)
        assert sha256(rfc8785.dumps(entry)).hexdigest() == digest
        prev = digest
    assert out.count("\n") == 8
    assert run("ledger", "head").out.startswith(f"8:{prev} ")


# --- nothing makes a stack ----------------------------------------------------------------------------------------


def _assert_civil(ran: Any) -> None:
    assert ran.status in (0, 1, 2)
    assert "internal error" not in ran.err
    assert "Traceback" not in ran.err
    for line in (ran.out + ran.err).splitlines():
        assert line.isprintable()
    if ran.status:
        assert ran.err or ran.out


_WORDS = sorted({word for words in VERBS for word in words.split()} - {"serve", "api", "keeper"})
_FLAGS = sorted({name for verb in VERBS.values() for param in verb.params for name in param.opts})
_VALUES = ["llmops", "deploy-agent", "ca", "user.pub", "policy.toml", "data", "1", "0", "-1", "1d", "--", "-", "", "3"]


@IN_A_WORLD
@given(
    st.sampled_from(ONE_SHOT),
    st.lists(st.one_of(st.sampled_from([*_FLAGS, *_VALUES, *_WORDS]), ANY_TEXT, st.just("\udcff\x1b[31m")), max_size=5),
)
@example("ledger verify", ["--head", "9" * 18 + ":" + "0" * 64])
@example("ledger verify", ["--head", "0:" + "0" * 64])
@example("certs list", ["--before", str(2**63 - 1), "--role", "\udcff"])
@example("policy check", ["x" * 5000])
@example("ca inspect", ["\udcff"])
@example("policy explain", ["llmops", "--as", "deploy-agent", "--extension", "\x1b", "--principal", "\udcff"])
@pytest.mark.unix_socket  # some verbs look for a keeper that is not there
def test_no_command_line_makes_a_stack(world: World, verb: str, words: list[str]) -> None:
    _assert_civil(run(*verb.split(), *words))


@IN_A_WORLD
@given(st.lists(st.one_of(st.sampled_from([*_FLAGS, *_VALUES, *_WORDS]), ANY_TEXT), max_size=4))
@pytest.mark.unix_socket
def test_no_verb_makes_a_stack(world: World, words: list[str]) -> None:
    _assert_civil(run(*[word for word in words if word not in ("serve", "api", "keeper")]))


@IN_A_WORLD
@given(st.binary(max_size=200))
@example(b"\xff")
@example(b"a" * 100 + b"=[" * 3000)
@example(b"[ca]\nfingerprint = 1979-05-27T00:32:00.999999999999Z\n")
def test_no_file_makes_a_stack(world: World, content: bytes) -> None:
    (world.folder / "any.toml").write_bytes(content)
    (world.folder / "any.pub").write_bytes(content)
    _assert_civil(run("policy", "check", "any.toml"))
    _assert_civil(run("ca", "inspect", "any.toml"))
    _assert_civil(run("ca", "inspect", "any.pub"))
    _assert_civil(run("policy", "explain", "llmops", "--as", "deploy-agent", "--key", "any.pub"))


@IN_A_WORLD
@given(st.data())
def test_no_policy_makes_a_stack(world: World, data: st.DataObject) -> None:
    """The policy of the other tests with a few lines changed, doubled or cut off."""
    lines = POLICY.splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(lines) - 1))
        value = data.draw(
            st.sampled_from(['""', "[]", "[1]", "{}", "-1", "inf", '"\\u001b"', "true", '["\\u009b"]', "["])
        )
        lines[at] = data.draw(st.sampled_from([lines[at].split("=")[0] + "= " + value, lines[at - 1], ANY_KEY, ""]))
    (world.folder / "policy.toml").write_text("\n".join(lines))
    for words in ("policy check", "check", "policy explain llmops --as deploy-agent", "ca inspect ca"):
        _assert_civil(run(*words.split()))


ANY_KEY = '"\\u001b[2J\\n" = 1'


@settings(IN_A_WORLD, max_examples=40)
@given(
    st.sampled_from(
        ["identity", "role", "principals", "key_id", "valid_after", "valid_before", "serial", "fingerprint"]
    ),
    st.one_of(
        ANY_TEXT,
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from(['["\x1b]0;x\x07"]', "[1]", "{}", "null", "[" * 9999]),
    ),
)
@example("principals", "[1]")
@example("valid_before", 67768036191676799)
@example("valid_after", -1)
@example("serial", "x")
def test_no_table_makes_a_stack(world: World, column: str, value: str | int) -> None:
    number = column.startswith("valid")
    if isinstance(value, int) != number:
        value = len(str(value)) if number else str(value)
    literal = (
        str(value) if isinstance(value, int) else "CAST(x'" + value.encode("utf-8", "replace").hex() + "' AS TEXT)"
    )
    try:
        tamper(world.folder / "data", f"UPDATE certificates SET {column} = {literal} WHERE seq = 3")  # noqa: S608
    except sqlite3.IntegrityError:  # the serial of another row, which SQLite refuses
        reject()
    for words in ("certs list", "certs list --json", "certs show 2", "ledger verify", "check"):
        _assert_civil(run(*words.split()))


@settings(IN_A_WORLD, max_examples=40)
@given(
    st.sampled_from(["kind", "actor", "body", "prev", "hash"]),
    st.one_of(
        ANY_TEXT, st.sampled_from(["[" * 99_999, "1e999", "{}", '{"serial": {}}', '{"serial": "\x1b"}', "\r\x1b[2J"])
    ),
)
def test_no_event_makes_a_stack(world: World, column: str, value: str) -> None:
    literal = "CAST(x'" + value.encode("utf-8", "replace").hex() + "' AS TEXT)"
    tamper(world.folder / "data", f"UPDATE events SET {column} = {literal} WHERE seq = 3")  # noqa: S608
    for words in ("ledger verify", "ledger export", "ledger head", "certs show 2", "ledger rebuild", "check"):
        _assert_civil(run(*words.split()))


@given(st.text())
def test_plain_text_is_printable_and_keeps_what_was(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_an_event_that_no_signer_wrote_stops_a_rebuild_by_name(world: World) -> None:
    """Right hash, wrong content: somebody who can write the file can compute hashes, too."""
    with closing(Ledger(world.folder / "data")) as ledger:
        writer = ledger.connection()
        ledger.commit([Event("note", "x", {"serial": "x"})], 1_750_000_000_000)
        entry = ledger.entry(8)
        writer.execute("DROP TRIGGER events_are_never_changed")
        digest = entry_hash(8, entry.time_ms, "certificate.issued", "x", entry.body, entry.prev)
        writer.execute("UPDATE events SET kind = 'certificate.issued', hash = ? WHERE seq = 8", (digest,))
    ran = run("ledger", "rebuild")
    assert ran.status == 1
    assert "broken at event 8: it is not a valid certificate.issued event" in ran.err


def test_a_fault_of_ours_is_one_line_with_its_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_ledger: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LedgerReader, "head", fail)
    ran = run("ledger", "head")
    assert ran.status == 1
    assert re.match(r"signer: error: internal error, ZeroDivisionError in test_cli\.py:\d+\n", ran.err)


@pytest.mark.parametrize("fault, code", [(ZeroDivisionError(), "fault_of_ours"), (OSError(5, "broken"), "io_failed")])
def test_who_asked_for_json_gets_json_of_any_fault(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str
) -> None:
    def fail(_ledger: object) -> None:
        raise fault

    monkeypatch.setattr(LedgerReader, "head", fail)
    ran = run("ledger", "head", "--json")
    assert (ran.status, json.loads(ran.out)["error"]["code"]) == (1, code)
    assert "signer: error: " in ran.err


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, reads",
    [
        ("certs list", True),
        ("certs show 1", True),
        ("ledger verify", True),
        ("ledger head", True),
        ("ledger export", True),
        ("ledger rebuild", True),
        ("policy check", True),
        ("policy explain llmops --as deploy-agent", True),
        ("token new operator --expires 1d", True),
        ("ca inspect ca", True),
        ("policy check policy.toml", False),
        ("ca inspect ca.pub", False),
    ],
)
def test_verbs_that_read_settings_warn_once_of_an_unknown_one(
    world: World, monkeypatch: pytest.MonkeyPatch, words: str, reads: bool
) -> None:
    monkeypatch.setenv("SIGNER_DATADIR", "/x")
    ran = run(*words.split())
    warning = "signer: warning: SIGNER_DATADIR is not a setting, did you mean SIGNER_DATA_DIR\n"
    assert (ran.status, ran.err.count(warning)) == (0, int(reads))


# --- the key stays put --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["ca inspect ca", "ca inspect ca --json", "check", "ca inspect key.pub"])
def test_nothing_of_a_private_key_is_shown(world: World, words: str) -> None:
    (world.folder / "key.pub").write_bytes((world.folder / "ca").read_bytes())
    ran = run(*words.split())
    secret = (world.folder / "ca").read_text().splitlines()[1:-1]
    # The first lines hold the public half as well; from the third on it is the private one.
    assert [line for line in secret if line in ran.out + ran.err] == []


@pytest.mark.parametrize("words", ["check", "ca inspect ca"])
def test_dumps_are_forbidden_before_the_key_is_read(world: World, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def refuse() -> None:
        raise SignerError("stop", "stopped before the key")

    def read(*_values: object) -> None:
        pytest.fail("the key was read first")

    monkeypatch.setattr("signer.cli.check.forbid_dumps", refuse)
    monkeypatch.setattr("signer.ca.key.examine_ca_key", read)
    monkeypatch.setattr("signer.service.checks.examine_ca_key", read)
    assert "stopped before the key" in run(*words.split()).err


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", VERBS)
def test_every_verb_has_help_with_an_example(words: str) -> None:
    ran = run(*words.split(), "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == run("help", *words.split()).out == run(*words.split(), "-h").out
    assert f"\n  signer {words}" in ran.out.split("example", 1)[1]
    assert max(map(len, ran.out.splitlines())) <= 110


@pytest.mark.parametrize("words", ONE_SHOT)
def test_every_verb_has_a_function(words: str) -> None:
    verb = VERBS[words]
    assert verb.words == words
    assert callable(verb.callback)
    assert any(param.opts == ["--json"] for param in verb.params)


def test_the_services_list_every_setting() -> None:
    from signer.settings import SETTINGS

    for words in ("serve", "api", "keeper", "check"):
        out = run(words, "--help").out
        assert [name for name, _, _ in SETTINGS if f"\n  {name} " not in out] == []


HEAVY = {"cryptography", "pydantic", "flask", "sqlite3", "gunicorn", "logging", "requests", "hvac", "jinja2"}


def loaded(program: str, *words: str) -> str:
    """The last line that a Python process prints after `program`."""
    root = str(Path(cli.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, cwd=root, timeout=60)
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["nonsense"], ["certs", "list", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    program = (
        f"import sys; from signer.cli.main import main; main(sys.argv[1:]);print(sorted({HEAVY} & set(sys.modules)))"
    )
    assert loaded(program, *words) == "[]"


def test_help_of_signer_and_of_a_group_imports_no_verb() -> None:
    program = (
        "import sys; from signer.cli.main import main; main(['--help']); main(['ledger', '--help']); main(['polcy']);"
        "from signer.cli.catalogue import VERBS;"
        "print([entry.module for entry in VERBS if f'signer.cli.{entry.module}' in sys.modules])"
    )
    assert loaded(program) == "[]"


def test_the_verbs_of_every_module_are_described_without_anything_heavy() -> None:
    """So help, usage errors and completion of each verb are fast; its function imports what it works with."""
    program = (
        "import sys; from signer.cli.parser import load_all; [verb.render_help() for _, verb in load_all()];"
        f"print(sorted({HEAVY - {'logging'}} & set(sys.modules)))"  # the services log
    )
    assert loaded(program) == "[]"


def test_reading_certificates_loads_no_cryptography(world: World) -> None:
    program = (
        "import sys; from signer.cli.main import main; assert main(['certs', 'list']) == 0;"
        "print(sorted({'cryptography', 'flask', 'gunicorn'} & set(sys.modules)))"
    )
    root = str(Path(cli.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


# --- how it ends --------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_without_a_word(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_reader: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LedgerReader, "head", interrupt)
    ran = run("ledger", "head")
    assert (ran.status, ran.out, ran.err) == (130, "", "")


@pytest.mark.parametrize("words", ["ledger export", "certs list", "--help"])
def test_a_reader_that_went_away_is_no_error(world: World, words: str) -> None:
    receiver, sender = os.pipe()
    os.close(receiver)
    try:
        done = in_a_process(*words.split(), stdout=sender)
    finally:
        os.close(sender)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", ["ledger export", "certs list --json", "--help"])
def test_a_full_disk_behind_stdout_is_told(world: World, words: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = in_a_process(*words.split(), stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("signer: error: the result cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_closed_output_is_no_error(world: World) -> None:
    done = in_a_process("ledger", "head", preexec_fn=lambda: os.closerange(1, 3))
    assert done.returncode == 0


def test_a_terminal_without_the_letters_gets_escapes(world: World) -> None:
    world.prepare(["sql", "UPDATE certificates SET identity = 'naïve' WHERE seq = 2"])
    os.environ["PYTHONIOENCODING"] = "ascii"
    try:
        done = in_a_process("certs", "list")
    finally:
        del os.environ["PYTHONIOENCODING"]
    assert (done.returncode, done.stderr) == (0, "")
    assert "na\\xefve" in done.stdout


def test_progress_is_for_terminals_only(world: World) -> None:
    leader, follower = pty.openpty()
    head = run("ledger", "head").out.split()[0]
    try:
        shown = in_a_process("ledger", "verify", "--head", head, stderr=follower)
        bar = os.read(leader, 4096).decode()
    finally:
        os.close(follower)
        os.close(leader)
    silent = in_a_process("ledger", "verify", "--head", head)
    assert re.search(r"\rverify \[#{24}\] 100%  7 of 7  .*/s\x1b\[K\r\x1b\[K$", bar)
    assert silent.stderr == ""
    assert shown.stdout == silent.stdout
    assert "[" not in silent.stdout


def test_a_rebuild_that_finds_the_disk_full_leaves_the_tables_as_they_were(world: World) -> None:
    def forbid_growth() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # SQLite cannot write its log, as on a full disk

    before = run("certs", "list").out
    done = in_a_process("ledger", "rebuild", preexec_fn=forbid_growth)
    assert done.returncode == 1
    assert done.stderr.startswith("signer: error: the ledger cannot be used: ")
    assert run("certs", "list").out == before
    with closing(LedgerReader(world.folder / "data")) as reader:
        assert verify(reader).seq == 7


def test_a_rebuild_is_refused_while_a_keeper_holds_the_ledger(world: World) -> None:
    with closing(Ledger(world.folder / "data")):
        ran = run("ledger", "rebuild")
    assert (ran.status, ran.err) == (
        1,
        "signer: error: a keeper writes this ledger\nsigner: hint: stop it, then rebuild\n",
    )
    assert run("ledger", "rebuild").status == 0


def test_what_a_keeper_commits_and_folds_meanwhile_is_no_difference(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = LedgerReader.query

    def commit_and_look(reader: LedgerReader, sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        if type(reader) is LedgerReader and "quick_check" in sql:
            writer.commit([issued(4)], 1_750_000_000_000)
            fold_all(writer)
        return look(reader, sql, values)

    with closing(Ledger(world.folder / "data")) as writer:
        monkeypatch.setattr(LedgerReader, "query", commit_and_look)
        ran = run("ledger", "verify")
        assert writer.head().seq == 8, "nothing was committed meanwhile"
    warned = ran.err.startswith("signer: warning: no saved head given") and ran.err.count("\n") == 1
    assert (ran.status, warned or ran.err == "") == (0, True)
    assert "7 events" in ran.out


def test_audit_5f2_verify_without_a_saved_head_says_what_it_cannot_know(world: World) -> None:
    """A ledger that was computed anew as a whole, without any key, is intact to it."""
    ran = run("ledger", "verify")
    assert "rewritten as a whole, or cut off, looks intact as well; pass --head" in ran.err
    assert json.loads(run("ledger", "verify", "--json").out)["compared_with_saved_head"] is False
    compared = run("ledger", "verify", "--json", "--head", run("ledger", "head").out.split()[0])
    assert (compared.err, json.loads(compared.out)["compared_with_saved_head"]) == ("", True)


def test_looking_for_a_ledger_makes_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = world.folder / "empty"
    empty.mkdir(mode=0o700)
    monkeypatch.setenv("SIGNER_DATA_DIR", str(empty))
    for words in ("ledger rebuild", "ledger verify", "certs list", "check"):
        run(*words.split())
    assert list(empty.iterdir()) == []


def test_check_changes_nothing(world: World) -> None:
    def content() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in world.folder.rglob("*") if path.is_file() and path.suffix != ".sqlite3-shm"]
        return {path.name: (path.stat().st_mode, path.read_bytes()) for path in paths}

    run("check")  # the first reader of a ledger at rest leaves SQLite's empty log beside it
    before = content()
    assert run("check").status == 0
    assert content() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as somebody else")
def test_root_rebuilds_as_the_owner_of_the_ledger(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.folder / "data" / "ledger.lock").unlink()
    with tempfile.TemporaryDirectory() as outside:  # pytest's own folders let nobody else pass
        data = Path(outside) / "data"
        shutil.copytree(world.folder / "data", data)
        Path(outside).chmod(0o711)
        for path in (data, *data.iterdir()):
            os.chown(path, 65_534, 65_534)
        monkeypatch.setenv("SIGNER_DATA_DIR", str(data))
        done = in_a_process("ledger", "rebuild")
        assert (done.returncode, done.stderr) == (0, "")
        assert {path.stat().st_uid for path in data.iterdir()} == {65_534}
