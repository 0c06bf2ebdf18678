"""A folder with everything that `signer` commands read, fixed in time: policy, CA key, and a ledger of seven events."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import pytest

from signer.api_client import ApiClient
from signer.ca.infisical import Secret
from signer.cli import main
from signer.ledger.fold import fold_all
from signer.ledger.schema import FILE_NAME, VIEWS, VIEWS_NAME
from signer.ledger.store import Ledger
from signer.model import Event
from signer.safe_session import terminal
from tests.parts.answering import answer_commands
from tests.parts.answering_channels import play_channels
from tests.parts.evidence import sealed_run
from tests.parts.keeper_replies import play_status
from tests.parts.keys import Key, KeyRing
from tests.parts.long_ledger import fill_long
from tests.parts.moving import play_move
from tests.parts.parity_sides import play
from tests.parts.removal import play_removal
from tests.parts.service import Tokens, fill_policy
from tests.parts.small_log import fill_state
from tests.parts.witnessed import play_witnessed, play_witnessing

OWNER = f"{os.geteuid()}:{os.getegid()}"
POLICY = """\
[ca]
fingerprint = "{ca}"

[roles.llmops]
principals = ["llmops", "{identity}"]
default_principals = ["llmops"]
default_ttl = "15m"
max_ttl = "30m"
key_types = ["ssh-ed25519"]
extensions = { allowed = ["permit-pty"], default = ["permit-pty"] }

[roles.deploy]
principals = ["deploy"]
default_principals = ["deploy"]
key_types = ["ssh-rsa"]
force_command = "/usr/bin/deploy"
source_address = ["10.0.0.0/8"]
reason_required = true
limits = { per_minute = 30, live = 20 }

[identities.deploy-agent]
kind = "agent"
roles = ["llmops", "deploy"]
tokens = [{ sha256 = "{token:deploy-agent}", expires = 2099-01-01T00:00:00Z }]

[identities.late]
kind = "workload"
roles = ["llmops"]
tokens = [{ sha256 = "{token:late}", expires = 2020-01-01T00:00:00Z }]

[identities.operator]
kind = "human"
roles = ["llmops"]
may = ["ledger.read"]
"""


def issued(serial: int, identity: str = "deploy-agent", **changes: object) -> Event:
    """The event of a certificate as the core would record it, valid from 2025 on."""
    body: dict[str, object] = {
        "serial": str(serial),
        "backend": "local",
        "identity": identity,
        "kind": "agent",
        "role": "llmops",
        "principals": ["llmops"],
        "key_id": f"{identity}:llmops",
        "key_type": "ssh-ed25519",
        "fingerprint": "SHA256:" + "A" * 43,
        "valid_after": 1_740_000_000,
        "valid_before": 1_740_000_900,
        "critical_options": {},
        "extensions": ["permit-pty"],
        "reason": None,
        "address": "10.0.0.7",
        "request_id": f"request-{serial}",
        "policy": "b" * 64,
        "ca": "SHA256:" + "C" * 43,
        "to_be_signed_sha256": "d" * 64,
    }
    return Event("certificate.issued", identity, {**body, **changes})


EVENTS = (
    Event("keeper.started", "keeper", {"version": "0.1.0", "mode": "local"}),
    issued(1),
    issued(2, "ci", principals=["ci", "llmops"], valid_before=4_102_444_800, fingerprint="SHA256:" + "B" * 43),
    issued(3, reason="ticket 812", critical_options={"source-address": "10.0.0.7/32"}, valid_before=4_102_444_800),
    Event("certificate.withheld", "deploy-agent", {"serial": "3", "error": "OSError"}),
    Event("freeze.set", "operator", {"scope": "role:deploy", "reason": "incident 7"}),
    Event("request.refused", "deploy-agent", {"code": "ttl_above_max", "text": "ttl", "role": "llmops"}),
)


_NO_DIFFERENCE: dict[str, list[str]] = {"added": [], "changed": [], "removed": []}
# What a running launcher answers to `signer reload`; tests/system/operations/test_reload.py asks a real one.
LAUNCHER_REPLIES: dict[str, dict[str, object]] = {
    "changed": {
        "keeper": {
            "policy": {
                "digest": "4f" * 32,
                "changed": True,
                "unrecorded": None,
                "roles": {**_NO_DIFFERENCE, "added": ["backup"], "changed": ["llmops"]},
                "identities": {**_NO_DIFFERENCE, "removed": ["late"]},
                "tokens": {
                    "added": ["deploy-agent until 2025-06-01T00:00:00Z"],
                    "changed": [],
                    "removed": ["late until 2020-01-01T00:00:00Z"],
                },
            },
            "key": {"from": "SHA256:" + "C" * 43, "to": "SHA256:" + "D" * 43},
        },
        "api": {
            "changed": True,
            "from": "aa" * 32,
            "fingerprint": "bb" * 32,
            "subject": "CN=signer.example",
            "expires": "2025-06-01T00:00:00Z",
        },
        "notices": {"channels": ["annas-phone", "hook"]},
    },
    "refused": {
        "keeper": {
            "policy": {
                "error": {
                    "code": "policy_refused",
                    "text": "policy.toml has 1 problem",
                    "hint": "correct the line",
                    "problems": ['line 7: roles.llmops.max_ttl: "30x" is not a duration'],
                },
                "digest": "4f" * 32,
            },
            "key": {
                "error": {"code": "ca_key_mode", "text": "the CA key file has mode 0644", "hint": "chmod 0400 it"},
                "kept": "SHA256:" + "C" * 43,
            },
        },
        "api": {
            "error": {
                "code": "tls_pair_refused",
                "text": "certificate and key do not belong together",
                "hint": "write both files of one renewal, then reload",
            },
            "kept": "aa" * 32,
        },
        "notices": {
            "channels": ["hook"],
            "error": {
                "code": "notices_file_refused",
                "text": "notices.toml: 1 problem",
                "hint": "see runbooks/operate/notices.md for its form",
                "problems": ["line 3    channels.hook.url    is plain http to another machine"],
            },
        },
    },
}


def play_launcher(environ: pytest.MonkeyPatch, _folder: Path, found: str) -> None:
    """A launcher that gives one of the replies."""
    reply = LAUNCHER_REPLIES[found]
    environ.setattr("signer.service.control.ask_launcher", lambda _settings, _operation: reply)


class World:
    """A folder with everything that the verbs read."""

    def __init__(self, folder: Path, ca: Key, user: Key, environ: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.ca = ca
        self._environ = environ
        self._sealed: list[tuple[str, str]] = []
        self._made: list[str] = []  # digests of tokens
        self._runs = False
        policy = fill_policy(POLICY, ca.fingerprint, Tokens())
        self._made += re.findall(r'sha256 = "([0-9a-f]{64})"', policy)
        (folder / "policy.toml").write_text(policy)
        (folder / "ca").write_bytes(ca.private.read_bytes())
        (folder / "ca").chmod(0o400)
        (folder / "ca.pub").write_text(ca.public_line + "\n")
        (folder / "user.pub").write_text(user.public_line + "\n")
        self.user = user
        data = folder / "data"
        data.mkdir(mode=0o700)
        with closing(Ledger(data)) as ledger:
            for minute, event in enumerate(EVENTS):
                ledger.commit([event], 1_740_000_000_000 + minute * 60_000)
            fold_all(ledger)
        for name in [name for name in os.environ if name.startswith(("SIGNER_", "INFISICAL_"))]:
            environ.delenv(name)
        for name, value in {
            "POLICY_FILE": folder / "policy.toml",
            "CA_KEY_FILE": folder / "ca",
            "CA_KEY_OWNER": OWNER,
            "DATA_DIR": data,
            "RUN_DIR": folder / "run",
        }.items():
            environ.setenv(f"SIGNER_{name}", str(value))
        if os.geteuid() == 0:  # root must name two users, nobody else may
            environ.setenv("SIGNER_KEEPER_USER", "daemon")
            environ.setenv("SIGNER_API_USER", "nobody")
            # pytest's folder is root's alone; tests/system/operations/test_check.py acts as the users elsewhere
            environ.setattr("signer.service.checks.acting_as", lambda _uid, **_: nullcontext())
        environ.chdir(folder)
        locks = folder.parent / f"{folder.name}-locks"
        locks.mkdir(mode=0o700)
        # Tests run at once and name the same compose file, which stands for a host's one platform.
        environ.setattr("signer.files.own_lock_folder", lambda: locks)

    def prepare(self, words: Sequence[str]) -> None:  # noqa: C901, PLR0912 - one branch for each word
        """A `%` line of a transcript: chmod MODE FILE, copy, link, remove, write FILE TEXT, replace FILE OLD NEW,
        set NAME VALUE, sql STATEMENT (see `tamper`), vault ROLE (see `parity_sides`), cutover CASE (see `moving`),
        removal CASE (see `removal`), launcher CASE (see `LAUNCHER_REPLIES`), keeper (see `answering`), status CASE (see
        `keeper_replies`), channels FILE (see `play_channels`), witnessed, rewritten or witnessing (see `witnessed`),
        witness (see `fill_state`), long (a ledger of 300 days, see `long_ledger`), evidence (a run, sealed and
        recorded), host NAME and its principals, if they are recorded, terminal COLUMNS (see `show_on_terminal`). <dir>,
        <ca>, <ca-key> and <owner> stand for what they name."""
        named = {"<dir>": str(self.folder), "<ca>": self.ca.fingerprint, "<owner>": OWNER}
        named["<ca-key>"] = self.ca.public_line.split()[1]
        match [re.sub("<dir>|<ca>|<ca-key>|<owner>", lambda found: named[found[0]], word) for word in words]:
            case ["chmod", mode, name]:
                (self.folder / name).chmod(int(mode, 8))
            case ["copy", source, target]:
                (self.folder / target).write_bytes((self.folder / source).read_bytes())
            case ["link", source, target]:
                (self.folder / target).symlink_to(source)
            case ["remove", name]:
                (self.folder / name).unlink()
            case ["write", name, text]:
                (self.folder / name).write_text(text.encode().decode("unicode_escape"))
            case ["replace", name, old, new]:
                before = (self.folder / name).read_text()
                assert old in before, f"{name} does not hold {old}"
                (self.folder / name).write_text(before.replace(old, new.encode().decode("unicode_escape"), 1))
            case ["set", name, value]:
                self._environ.setenv(name, value)
            case ["vault" | "launcher" | "status" as part, found]:
                played = {"vault": play, "launcher": play_launcher, "status": play_status}
                played[part](self._environ, self.folder, found)
            case ["removal" | "cutover" as operation, found]:
                play_run = play_move if operation == "cutover" else play_removal
                play_run(self._environ, self.folder, found)
                self._runs = True
            case ["witnessed" | "rewritten" as word]:
                play_witnessed(self.folder, word)
            case ["witnessing"]:
                play_witnessing(self._environ, self.folder)
            case ["channels", name]:
                play_channels(self._environ, self.folder, name)
            case ["keeper"]:
                answer_commands(self._environ, self.folder)
            case ["evidence"]:
                self._keep_evidence()
            case ["host", name, *principals]:
                self._list_host(name, principals)
            case ["long"]:
                shutil.rmtree(self.folder / "data")
                (self.folder / "data").mkdir(mode=0o700)
                fill_long(self.folder / "data", 300)
            case ["terminal", columns]:
                self.show_on_terminal(int(columns))
            case ["witness"]:
                fill_state(self.folder / "witness")
            case ["sql", statement]:
                tamper(self.folder / "data", statement)
            case _:
                raise AssertionError(f"no such preparation: {words}")

    def show_on_terminal(self, columns: int) -> None:
        """What follows is laid out as for a terminal so wide; tests/system/operations/test_cli.py has a real one."""
        self._environ.setattr("signer.cli.output.width_of", lambda _stream: terminal.within(columns))

    def _list_host(self, name: str, principals: list[str]) -> None:
        """The event of `signer hosts add`, in the ledger."""
        key = " ".join(self.ca.public_line.split()[:2])
        body: dict[str, object] = {"name": name, "addresses": [f"{name}.example"], "keys": [key]}
        if principals:
            body["principals"] = principals
        with closing(Ledger(self.folder / "data")) as ledger:
            ledger.commit([Event("host.added", "operator", body)], 1_740_000_420_000)

    def _keep_evidence(self) -> None:
        """A run in evidence/, sealed, and recorded in the ledger."""
        run = sealed_run(self.folder / "evidence")
        told = {"operation": "cutover", "outcome": "applied", "evidence": run.digest, "reason": ""}
        body = {**told, "plan": run.read_json("plan.json")["digest"], "address": "10.0.0.7", "request_id": "request-8"}
        with closing(Ledger(self.folder / "data")) as ledger:
            ledger.commit([Event("operation.recorded", "operator", body)], 1_740_000_420_000)
            head = ledger.head()
        run.keep_ledger_answer({**told, "seq": head.seq, "hash": head.hash})
        self._sealed += [(run.digest, "<evidence>"), (head.hash, "<event>"), (body["plan"], "<plan>")]

    def filled(self, word: str) -> str:
        """A word of a transcript's command, with what `<dir>` and `<ca>` stand for."""
        return word.replace("<dir>", str(self.folder)).replace("<ca>", self.ca.fingerprint)

    def steady(self, text: str) -> str:
        """What was printed, with names for what differs from run to run."""
        policy = self.folder / "policy.toml"
        if self._runs:  # a run is named after its time, and what it came to hangs on that
            text = re.sub(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ(-\d+)?-(?=[a-z])", "<time>-", text)
            text = re.sub(r"sha256:[0-9a-f]{12,64}", "sha256:<digest>", text)
            text = re.sub(r"(?<=  )[ \d]{3}\.\d s$", "  <n> s", text, flags=re.MULTILINE)  # in a column of its own
            text = re.sub(r"\d+\.\d s$", "<n> s", text, flags=re.MULTILINE)
        known = [
            (str(self.folder), "<dir>"),
            (self.ca.fingerprint, "<ca>"),
            (self.ca.public_line.split()[1], "<ca-key>"),
            (self.user.fingerprint, "<user>"),
        ]
        known += self._sealed
        if policy.exists():
            digest = sha256(policy.read_bytes()).hexdigest()
            known += [(digest, "<policy>"), (digest[:16], "<policy>")]
        for token in re.findall(r"sgn_\w{49}", text):
            known.append((token, "<token>"))
            self._made.append(sha256(token.encode()).hexdigest())
        known += [(digest, "<sha256>") for digest in self._made]
        known += [(digest[:12], "<token-id>") for digest in self._made]
        for blob in re.findall(r"ssh-ed25519 (AAAA\S{64})", text):  # after those above, of a key that was made
            print_of = base64.b64encode(sha256(base64.b64decode(blob)).digest()).decode().rstrip("=")
            known += [(blob, "<new-key>"), (f"SHA256:{print_of}", "<new>")]
        for value, name in known:
            text = text.replace(value, name)
        text = re.sub(r'(sha256 = \\?")[0-9a-f]{64}', r"\1<sha256>", text)
        text = re.sub(r"keeper (and api )?runs? as [^\"\n]*", "<users>", text)
        text = re.sub(rf'(ca_key_owner +|owned by |"detail": "){OWNER}', r"\1<owner>", text)
        text = re.sub(r"(owner|belongs to user) \d+", r"\1 <n>", text)
        text = re.sub(r'("(free_)?bytes": |events \d+, bytes )\d+', r"\1<n>", text)
        text = re.sub(r"\b20(2[6-9]|[3-8]\d)-\d\d-\d\dT\d\d:\d\d:\d\dZ", "<time>", text)
        text = re.sub(r"\b(\d+:)[0-9a-f]{64} <time>", r"\1<hash> <time>", text)  # the head of a restored ledger
        text = re.sub(r'("hash": ")[0-9a-f]{64}(", "time": "<time>")', r"\1<hash>\2", text)  # and of a followed one
        text = re.sub(r"ledger\.(replaced|archived)-\S+Z(-\d+)?", r"ledger.\1-<time>", text)  # a second one
        text = re.sub(r'(sha256  |"sha256": ")[0-9a-f]{64}$', r"\1<sha256>", text, flags=re.MULTILINE)
        text = re.sub(r'(since <time> \(|"age": ")\d+[ms]', r"\1<n>s", text)
        return re.sub(r"\b\d+(\s+)days", r"<n>\1days", text)


def tamper(data: Path, statement: str) -> None:
    """Changes a ledger, or its views, behind everybody's back; triggers stop nobody who can drop them."""
    is_of_views = any(re.search(rf"\b{view.name}\b", statement) for view in VIEWS)
    with closing(sqlite3.connect(data / (VIEWS_NAME if is_of_views else FILE_NAME), isolation_level=None)) as db:
        for trigger in ("events_are_never_changed", "events_are_never_removed"):
            db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
        db.execute(statement)


def make_world(tmp_path: Path, keyring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> World:
    """A fresh world, which `signer` commands run in this process will see until the test ends."""
    for module in ("check", "ca"):
        monkeypatch.setattr(f"signer.cli.{module}.forbid_dumps", lambda: None)  # it would bind this whole test run
    monkeypatch.setattr("signer.service.checks.file_system_of", lambda _path: "ext4")
    # No sockets here; tests/system/operations/test_check.py binds.
    monkeypatch.setattr("signer.service.checks.try_to_bind", lambda _listen, _group: None)
    monkeypatch.setattr("signer.ca.render.file_system_of", lambda _path: "ext4")
    monkeypatch.setattr("signer.service.file_access._become_keeper", _stay)
    monkeypatch.setattr("signer.service.file_access.become_writer", lambda _settings: None)
    play_status(monkeypatch, tmp_path, "down")  # unit tests reach no network
    monkeypatch.setattr(ApiClient, "_connect", _refuse)
    folder = tmp_path / "w"
    # What Infisical holds is a file; tests/system/ca/test_ca_render.py asks a server, with the SDK.
    monkeypatch.setattr("signer.ca.infisical.fetch_secret", lambda _: Secret((folder / "infisical").read_text()))
    folder.mkdir(mode=0o700)
    return World(folder, keyring("ed25519", "ca"), keyring("ed25519", "user"), monkeypatch)


def _refuse(client: ApiClient, _within: float) -> NoReturn:
    """In place of a connection, which unit tests may not open."""
    raise client._no_connection(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))


def _stay(_settings: object) -> None:
    """In place of what would make another user of the process that runs the tests."""
    raise AssertionError("a test that runs as root may read every file")


@dataclass(frozen=True)
class Ran:
    """How one command ended."""

    status: int
    out: str
    err: str


def run(*words: str) -> Ran:
    """Runs `signer WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main.main(words)
    return Ran(status, out.getvalue(), err.getvalue())
